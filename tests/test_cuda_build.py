"""The CUDA part of the library, compiled and read, on a machine that need not have a GPU.

What registers, stack and instructions every kernel takes is written down in KERNELS. By default two archs are
compiled, which together take every path of the sources; PEREXAMPLE_TEST_ARCHS=all compiles those of a release.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "build_support"))
from ninja_file import CUDA_ARCHS, CXX, nvcc  # noqa: E402

ARCHS = CUDA_ARCHS if os.environ.get("PEREXAMPLE_TEST_ARCHS") == "all" else "8.0+PTX 9.0a"

pytestmark = pytest.mark.skipif(not (nvcc() and CXX), reason="no nvcc in CUDA_HOME/bin or on PATH: nothing to compile")


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: of the toolkit, or of the wheels of the `test` extra."""
    wheels = [str(path) for path in Path(torch.__file__).parents[1].glob("nvidia/*/bin")]
    wheels += [str(path) for entry in sys.path for path in Path(entry).glob("nvidia/*/bin")]
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *wheels]))
    assert found is not None, f"{name} is missing: pip install -e '.[test]'"
    return found


def read(*arguments: str) -> str:
    tools = os.pathsep.join([os.environ.get("PATH", ""), str(Path(tool("nvdisasm")).parent)])
    result = subprocess.run(
        [tool("cuobjdump"), *arguments], capture_output=True, text=True, env=os.environ | {"PATH": tools}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder, what the compilers said) of a library for ARCHS, with the CPU kernels as they are in the tree."""
    folder = tmp_path_factory.mktemp("cuda")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "installed-*")
    for name in ("build_support", "csrc", "pysrc", "triton_kernels", "build"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    environment = os.environ | {"PEREXAMPLE_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHS}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return folder, result.stdout + result.stderr


def test_the_compilers_warn_of_nothing(built):
    # C75..: ptxas serialises wgmma, or splits its groups.
    said = [line for line in built[1].splitlines() if re.search(r"\(C75\d\d\)|warning", line, re.IGNORECASE)]
    assert not [line for line in said if "--warning-as-error" not in line]


def test_it_loads_on_this_torch_and_serves_the_cpu(built):
    code = """
import sys, torch, perexample as px
assert px.__file__.startswith(sys.argv[1]), px.__file__
from perexample import _extension, ops
assert _extension.info().build()["cuda"] is True
for name in sys.argv[2].split():
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"perexample::{name}", "CUDA"), name
dy, x = torch.randn(4, 5, 6), torch.randn(4, 5, 7)
expected = ops.OPS["linear_moments"][0](dy, x, True)
for got, want in zip(ops.linear_moments(dy, x, True), expected, strict=True):
    torch.testing.assert_close(got, want)
from perexample.__main__ import report
print(report())
"""
    # Not through this environment's site directories: an editable installation would come first.
    paths = [str(built[0] / "pysrc"), *(entry for entry in sys.path if "site-packages" in entry)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-S", "-c", code, str(built[0]), " ".join(OPS)]
    result = subprocess.run(command, cwd=built[0], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, source in OPS.items():
        assert re.search(rf"^{name} +C\+\+  \S+ +C\+\+  csrc/bindings/{source}.cpp:\d+$", result.stdout, re.MULTILINE)


# Ops with CUDA kernels -> file of csrc/bindings.
OPS = {
    "linear_moments": "linear",
    "bias_moments": "reduce",
    "reduce_moments": "reduce",
    "conv_moments": "conv",
    "embedding_moments": "embedding",
    "layer_norm_moments": "norm",
    "rms_norm_moments": "norm",
    "group_norm_moments": "norm",
    "batch_norm_moments": "norm",
    "optimizer_step_": "optimizer",
}

# Kernel -> most registers a thread, and instructions that must be in it, one of each group.
KERNELS = {
    # 168 at entry: 384 threads; the multiplying warpgroups take 224 each.
    "wgmma_moments": (168, [("HGMMA",), ("UTMALDG",), ("SYNCS",), ("USETMAXREG",)]),
    "mma_moments": (255, [("HMMA",), ("LDGSTS", "LDG")]),
    "simple_moments": (128, [("DFMA",), ("BAR",)]),
    "add_slots": (64, [("LDG",)]),
    "add_bias_slots": (64, [("LDG",)]),
    "column_moments": (128, [("LDG",)]),
    "add_columns": (128, [("LDG",)]),
    "few_channels": (128, [("LDG",)]),
    "reorder": (64, [("LDG",)]),
    "layer_norm": (128, [("LDG",), ("SHFL",), ("BAR",)]),
    "group_norm": (128, [("LDG",), ("SHFL",), ("BAR",)]),
    "embedding_chunks": (128, [("LDG",), ("BAR",)]),
    "embedding_join": (64, [("LDG",), ("BAR",)]),
    "step_batch": (128, [("LDG",), ("STG",), ("MUFU",)]),
    "count_examples": (64, [("DADD",)]),
}
# Local memory means that registers did not suffice; atomic additions have no fixed order.
FORBIDDEN = ("LDL", "STL", "ATOM", "ATOMG", "ATOMS", "RED")


def expected_archs() -> set[str]:
    return {"sm_" + entry.removesuffix("+PTX").replace(".", "") for entry in ARCHS.split()}


def holds_kernels(source: Path) -> bool:
    return source.stem != "device"


@pytest.fixture(scope="module")
def objects(built):
    return [
        built[0] / f"build/cuda.{source.stem}.o"
        for source in (ROOT / "csrc/cuda").glob("*.cu")
        if holds_kernels(source)
    ]


def find_kernel(mangled: str) -> str:
    found = [name for name in KERNELS if re.search(rf"\d{name}(?=[IEP]|$)", mangled)]
    assert len(found) == 1, f"{mangled}: not in the table of kernels, or ambiguous: {found}"
    return found[0]


def test_registers_and_stack(objects):
    archs, seen = set(), set()
    for path in objects:
        text = read("--dump-resource-usage", str(path))
        archs |= set(re.findall(r"^arch = (\S+)", text, re.MULTILINE))
        for mangled, usage in re.findall(r"Function (\S+):\s+(REG:.*)", text):
            figures = dict(re.findall(r"([A-Z]+):(\d+)", usage))
            name = find_kernel(mangled)
            seen.add(name)
            assert int(figures["REG"]) <= KERNELS[name][0], f"{mangled}: {usage}"
            assert figures["STACK"] == figures["LOCAL"] == "0", f"{mangled}: {usage}"
    assert seen == set(KERNELS)
    assert expected_archs() <= archs


def test_instructions(objects):
    seen = set()
    for path in objects:
        function, instructions = None, {}
        for line in read("-sass", str(path)).splitlines():
            if match := re.search(r"Function : (\S+)", line):
                function = match[1]
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_]+)", line):
                instructions.setdefault(function, set()).add(match[1])
        for mangled, used in instructions.items():
            name = find_kernel(mangled)
            seen.add(name)
            assert not used & set(FORBIDDEN), f"{mangled}: {used & set(FORBIDDEN)}"
            for group in KERNELS[name][1]:
                assert used & set(group), f"{mangled}: none of {group}"
    assert seen == set(KERNELS)


def test_hopper_kernels_are_compiled_for_hopper_only(objects):
    (hopper,) = (path for path in objects if path.name == "cuda.linear_wgmma.o")
    assert set(re.findall(r"sm_\w+?(?=\.cubin)", read("-lelf", str(hopper)))) == {"sm_90a"}
