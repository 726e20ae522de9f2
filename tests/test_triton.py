"""The Triton kernels, in processes of their own (tests/triton/conftest.py); their registration and their absence."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import perexample
from perexample import _triton

HERE = Path(__file__).parent
SOURCES = HERE.parent / "triton_kernels"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# Name -> environment. PEREXAMPLE_TEST_TRITON: another interpreter, with another Triton, that runs them as well.
SUITES: dict[str, dict[str, str]] = {"kernels": {"TRITON_INTERPRET": "1"}, "lint": {}}
OTHER = os.environ.get("PEREXAMPLE_TEST_TRITON", "")
if OTHER:
    SUITES |= {f"{name}, other Triton": environment for name, environment in SUITES.items()}


class Suite(NamedTuple):
    """A running pytest and its output."""

    process: subprocess.Popen[bytes]
    log: Path


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Suite]]:
    """Both, side by side; each with a compilation cache of its own, so that nothing is taken from earlier runs."""
    running = {}
    for name, environment in SUITES.items():
        folder = tmp_path_factory.mktemp(f"triton_{name.split(',')[0]}")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PEREXAMPLE_", "PYTEST_"))}
        env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment}
        python, tests = (OTHER if "other" in name else sys.executable), str(HERE / "triton" / name.split(",")[0])
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, env=env, cwd=HERE.parent, stdout=log, stderr=subprocess.STDOUT)
        running[name] = Suite(process, folder / "log")
    yield running
    for suite in running.values():
        suite.process.kill()
        suite.process.wait()


@needs_triton
@pytest.mark.parametrize("name", SUITES)
def test_suite(name: str, suites: dict[str, Suite]) -> None:
    code = suites[name].process.wait()
    log = suites[name].log.read_text()
    assert code == 0, log[-8000:]
    assert " passed" in log


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PEREXAMPLE_"))} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
sys.meta_path.insert(0, Block())
"""
STEP = """
import torch, perexample as px
model = px.convert(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4)))
optimizer = px.optim.Adam(model.parameters(), lr=1e-3, n_g=10, n_s=100)
model(torch.randn(5, 3, 8)).square().mean().backward()
optimizer.step()
print(model[0].weight.sum_grad_squared.shape)
"""


def test_without_triton_everything_else_works() -> None:
    result = run(BLOCKED + STEP)
    assert result.stdout.strip() == "torch.Size([4, 8])", result.stderr
    report = run(BLOCKED + "import runpy; runpy.run_module('perexample', run_name='__main__')")
    assert "not installed (optional: perexample[triton])" in report.stdout, report.stderr
    asked = run(BLOCKED + "import perexample", PEREXAMPLE_CUDA="triton")
    assert "ImportError: perexample: PEREXAMPLE_CUDA=triton, but Triton is not installed" in asked.stderr


@needs_triton
@pytest.mark.parametrize("choice", ["", "triton"])
def test_importing_does_not_import_triton_and_the_cpu_does_not_import_the_kernels(choice: str) -> None:
    loaded = "print([name for name in sys.modules if name == 'triton' or 'triton_kernels' in name])\n"
    stepped = "print([name for name in sys.modules if 'triton_kernels' in name])"  # the step imports torch's compiler
    result = run("import sys, perexample\n" + loaded + STEP + stepped, PEREXAMPLE_CUDA=choice)
    assert result.stdout.split("\n")[:3] == ["[]", "torch.Size([4, 8])", "[]"], result.stderr + result.stdout


@needs_triton
def test_the_report_names_the_launcher_that_serves_cuda() -> None:
    chosen = run("import runpy; runpy.run_module('perexample', run_name='__main__')", PEREXAMPLE_CUDA="triton")
    rows = {line.split()[0]: line for line in chosen.stdout.splitlines() if line.split()}
    for name, module in _triton.MODULES.items():
        tree = ast.parse((SOURCES / f"{module}.py").read_text())
        (line,) = (node.lineno for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        assert rows[name].endswith(f"triton_kernels/{module}.py:{line}"), rows[name]
        assert "Triton  " in rows[name]
    assert "PEREXAMPLE_CUDA=triton" in chosen.stdout


def test_the_references_can_be_chosen_and_nothing_else() -> None:
    chosen = run("import runpy; runpy.run_module('perexample', run_name='__main__')", PEREXAMPLE_CUDA="reference")
    rows = {line.split()[0]: line for line in chosen.stdout.splitlines() if line.split()}
    for name in perexample.ops.OPS:
        assert "reference  " in rows[name]
    wrong = run("import perexample", PEREXAMPLE_CUDA="cudnn")
    assert "ValueError: perexample: PEREXAMPLE_CUDA must be triton, reference or unset, got 'cudnn'" in wrong.stderr


def test_the_kernels_know_nothing_of_the_rest() -> None:
    for path in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{path.name} imports from {'.' * node.level}{node.module or ''}"
                assert not (node.module or "").startswith("perexample"), path.name
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("perexample") for alias in node.names), path.name


def test_every_op_of_the_table_exists() -> None:
    assert set(_triton.MODULES) <= set(perexample.ops.OPS)
    assert set(_triton.NO_FLOAT64) <= set(_triton.MODULES)


def test_every_kernel_opens_with_its_formula_and_equation_number() -> None:
    kernels = {
        node.name: ast.get_docstring(node) or ""
        for path in SOURCES.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_")
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert {"_descriptor", "_bias", "_implicit_gemm", "_table_row", "_affine", "_step", "_lstm_cell"} <= kernels.keys()
    del kernels["_table"]  # moves what it is given
    for name, text in kernels.items():
        head = text.split("\n\n")[0]
        assert "=" in head and "(MATHS " in head, f"{name}: {head}"
