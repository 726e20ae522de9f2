"""The CUDA part of the library, compiled and read, on a machine that need not have a GPU.

What registers, stack and instructions every kernel takes is written down in KERNELS. By default two archs are
compiled, which together take every path of the sources; PEREXAMPLE_TEST_ARCHS=all compiles those of a release.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from perexample._triton import MODULES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "build_support"))
from ninja_file import CUDA_ARCHS, CXX, HOPPER_SOURCES, nvcc  # noqa: E402

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


# Ops with CUDA kernels -> file of csrc/bindings, where an op has the basename that it has everywhere.
OPS = {name: module for name, module in MODULES.items() if module != "recurrent"}

# Kernel -> most registers a thread, and instructions that must be in it, one of each group.
KERNELS = {
    # 168 at entry: 384 threads; the multiplying warpgroups take 224 each.
    "wgmma_moments": (168, [("HGMMA",), ("UTMALDG",), ("SYNCS",), ("USETMAXREG",)]),
    "mma_moments": (255, [("HMMA",), ("LDGSTS", "LDG")]),
    "simple_moments": (128, [("DFMA",), ("BAR",)]),
    "add_slots": (64, [("LDG",)]),
    "add_bias_slots": (64, [("LDG",)]),
    "column_moments": (128, [("LDG",)]),
    "few_channels": (128, [("LDG",)]),
    "reorder": (64, [("LDG",)]),
    "layer_norm": (128, [("LDG",), ("SHFL",), ("BAR",)]),
    "group_norm": (128, [("LDG",), ("SHFL",), ("BAR",)]),
    "embedding_chunks": (128, [("LDG",), ("BAR",)]),
    "embedding_join": (64, [("LDG",), ("BAR",)]),
    "step_batch": (128, [("LDG",), ("STG",), ("MUFU",)]),
    "count_examples": (64, [("DADD",)]),
}
# Source -> kernels of each arch. More of them take longer to build: three minutes for the library are the aim.
INSTANCES = {
    "linear": {"mma_moments": 24, "simple_moments": 1, "add_slots": 3, "add_bias_slots": 2},
    "linear_wgmma": {"wgmma_moments": 12, "add_slots": 2, "add_bias_slots": 2},
    "conv": {"mma_moments": 9, "simple_moments": 1, "add_slots": 2, "few_channels": 4, "reorder": 2},
    "reduce": {"column_moments": 16, "add_bias_slots": 6},
    "norm": {"layer_norm": 4, "group_norm": 4},
    "embedding": {"embedding_chunks": 4, "embedding_join": 2},
    "optimizer": {"step_batch": 2, "count_examples": 1},
}
HOPPER = [Path(name).stem for name in HOPPER_SOURCES]
# Bytes of shared memory that a kernel declares: `launch` leaves room for them, for what a launch asks for comes on top.
MOST_DECLARED = 8 * 1024
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


def test_launches_leave_room_for_the_shared_memory_that_a_kernel_declares():
    text = (ROOT / "csrc/cuda/ptx.cuh").read_text()
    assert f"kMostDeclared = {MOST_DECLARED // 1024} * 1024;" in text
    assert "if (grid.shared_bytes > 48 * 1024 - kMostDeclared)" in text


def find_kernel(mangled: str) -> str:
    found = [name for name in KERNELS if re.search(rf"\d{name}(?=[IEP]|$)", mangled)]
    assert len(found) == 1, f"{mangled}: not in the table of kernels, or ambiguous: {found}"
    return found[0]


@pytest.fixture(scope="module")
def usages(objects):
    """(source, arch, mangled name, registers and memory) of every kernel."""
    found = []
    for path in objects:
        for part in re.split(r"^(?=arch = )", read("--dump-resource-usage", str(path)), flags=re.MULTILINE):
            if match := re.match(r"arch = (\S+)", part):
                kernels = re.findall(r"Function (\S+):\s+(REG:.*)", part)
                found += [(path.name.split(".")[1], match[1], *kernel) for kernel in kernels]
    return found


def test_there_are_as_many_kernels_as_meant(usages):
    counted = Counter((source, arch, find_kernel(mangled)) for source, arch, mangled, _ in usages)
    expected = {
        (source, arch, kernel): count
        for source, kernels in INSTANCES.items()
        for arch in (["sm_90a"] if source in HOPPER else expected_archs())
        for kernel, count in kernels.items()
    }
    assert dict(counted) == expected


def test_registers_and_stack(usages):
    for _, _, mangled, usage in usages:
        figures = dict(re.findall(r"([A-Z]+):(\d+)", usage))
        name = find_kernel(mangled)
        assert int(figures["REG"]) <= KERNELS[name][0], f"{mangled}: {usage}"
        assert figures["STACK"] == figures["LOCAL"] == "0", f"{mangled}: {usage}"
        assert int(figures["SHARED"]) <= MOST_DECLARED + 1024, f"{mangled}: {usage}"  # 1 KB the system takes


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
