"""Installing: without a compiler, with a broken extension, and what the wheel holds."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import perexample

ROOT = Path(__file__).parents[1]
STEP = """
import torch, perexample as px
model = px.convert(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2)))
optimizer = px.optim.Adam(model.parameters(), lr=1e-3, n_g=10, n_s=100)
model(torch.randn(5, 1, 4, 4)).square().mean().backward()
optimizer.step()
print("stepped", model[2].weight.sum_grad_squared.shape)
"""


def run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked sources, so that building leaves no trace."""
    target = tmp_path_factory.mktemp("source")
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
        "build_support",
        "csrc",
        "pysrc",
        "triton_kernels",
    ):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def pure_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a machine without a compiler."""
    empty = tmp_path_factory.mktemp("no_compiler")
    out = tmp_path_factory.mktemp("wheel")
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(empty)}
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(out), str(source))
    result = run(*pip, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "NO C++ COMPILER" in result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(pure_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_holds_every_module(pure_wheel: Path) -> None:
    sources = {str(path.relative_to(ROOT / "pysrc")) for path in (ROOT / "pysrc/perexample").rglob("*.py")}
    sources |= {f"perexample/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    with zipfile.ZipFile(pure_wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
        assert "perexample/py.typed" in archive.namelist()
    assert held == sources


def test_without_a_compiler_every_op_runs_on_its_reference(installed: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    code = f"import perexample; assert perexample.__file__.startswith({str(installed)!r}), perexample.__file__\n" + STEP
    result = run(sys.executable, "-c", code, env=env, cwd=tmp_path)
    assert result.stdout.strip() == "stepped torch.Size([2, 8])", result.stderr
    report = run(sys.executable, "-m", "perexample", env=env, cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert "NOT BUILT" in report.stdout


def test_a_broken_extension_raises(installed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(installed, broken)
    (broken / "perexample/_kernels.so").write_bytes(b"not a library")
    env = {**os.environ, "PYTHONPATH": str(broken)}
    result = run(sys.executable, "-c", "import perexample", env=env, cwd=tmp_path)
    assert result.returncode != 0
    assert "ImportError: perexample: its compiled kernels are present but cannot be loaded" in result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PEREXAMPLE_BUILD_CUDA": "yes"}, "PEREXAMPLE_BUILD_CUDA must be 0, 1 or unset, got 'yes'"),
        (
            {"PEREXAMPLE_BUILD_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "PEREXAMPLE_BUILD_CUDA=1, but missing: nvcc (in CUDA_HOME/bin or on PATH)",
        ),
    ],
)
def test_the_cuda_switch_fails_loudly(source: Path, environment: dict[str, str], message: str) -> None:
    result = run(sys.executable, "setup.py", "build_ext", "--inplace", env=os.environ | environment, cwd=source)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def test_the_version_is_in_the_changelog_and_the_citation() -> None:
    assert f"[{perexample.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^version: {re.escape(perexample.__version__)}$", (ROOT / "CITATION.cff").read_text(), re.M)


def test_the_report_names_every_op() -> None:
    report = run(sys.executable, "-m", "perexample").stdout
    for name in perexample.ops.OPS:
        assert name in report
