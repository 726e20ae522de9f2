"""The CPU kernels of every capability, and what their object files may not share."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perexample import _extension

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for path in (ROOT / "csrc/cpu").glob("*.cpp") if path.stem != "capability")
CXX = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
INFO = _extension.info()
CAPABILITIES = INFO.capabilities() if INFO else []
# Of the tests of the ops: those that go by the public function, or by what stands in for it, to a kernel.
NUMERICAL = (
    "public and (cases_equal or equals_the_loop or memory_layout or expanded or several or another_dtype or empty"
    " or output_mask or transcription or constant or guard or simplified or plain_mean or bfloat16) or around"
)
PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "tests/ops"]


def python(*arguments, **environment):
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.skipif(INFO is None, reason="the C++ kernels are not built: the reference serves every op")
@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c != INFO.capability()])
def test_every_capability_of_this_machine_passes_the_tests_of_the_ops(capability):
    # The best one is what all other tests run on.
    code = (
        "import sys, pytest, perexample._extension as e; assert e.info().capability() == sys.argv[1];"
        "sys.exit(pytest.main(sys.argv[2:]))"
    )
    assert " passed" in python("-c", code, capability, *PYTEST, "-k", NUMERICAL, PEREXAMPLE_CPU_CAPABILITY=capability)


@pytest.fixture(scope="module")
def wide_objects(tmp_path_factory):
    """The kernels for 64-byte vectors, as AVX-512 has them, on any machine with AVX2: name -> object file."""
    if not CXX:
        pytest.skip("no C++ compiler here")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the stand-in for AVX-512 needs AVX2: this is no x86")
    folder = tmp_path_factory.mktemp("wide")
    flags = (
        "-std=c++20 -O1 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wno-psabi"
        " -mavx2 -mfma -mf16c -DPX_CAPABILITY=wide -DPX_VECTOR_BYTES=64 -Icsrc/cpu"
        ' -DPX_BF16_DOT="bf16_dot.h" -Itests/kernels'
    ).split()
    objects = {path.stem: folder / f"{path.stem}.o" for path in [*SOURCES, ROOT / "tests/kernels/shim.cpp"]}

    def compile_one(path):
        command = [*CXX, *flags, "-c", str(path), "-o", str(objects[path.stem])]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(compile_one, [*SOURCES, ROOT / "tests/kernels/shim.cpp"]):
            assert result.returncode == 0, result.stderr[-3000:]
    return objects


def test_kernels_for_64_byte_vectors_pass_the_tests_of_the_ops(wide_objects):
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or " avx2 " not in cpuinfo.read_text():
        pytest.skip("this machine has no AVX2, or does not say so")
    library = wide_objects["shim"].with_name("libwide.so")
    objects = [str(path) for path in wide_objects.values()]
    subprocess.run([*CXX, "-shared", *objects, "-o", str(library), "-pthread"], check=True)
    # The launcher's own arrangements, which the stand-in for it does not know.
    without = "not (test_optimizer and (memory_layout or expanded or mixed))"
    assert " passed" in python("tests/kernels/flat.py", str(library), *PYTEST, "-k", f"({NUMERICAL}) and {without}")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump here")
def test_products_of_bfloat16_pairs_stay_in_registers():
    path = ROOT / "build/linear.avx512_bf16.o"
    if not path.exists():
        pytest.skip("not built in this directory, or not for this instruction set")
    command = ["objdump", "-dC", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    tiles = [part.splitlines() for part in listing.split("\n\n") if "vdpbf16ps" in part]
    assert len(tiles) >= 10
    for name, *lines in tiles:
        products = [i for i, line in enumerate(lines) if "vdpbf16ps" in line]
        loop = lines[products[0] : products[-1] + 1]
        assert not [line for line in loop if "zmm" in line and ("(%rsp" in line or "(%rbp" in line)], name


def weak_symbols(path, capability):
    """Symbols that the linker may replace by another object's, unless their own name says the capability."""
    listing = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
    weak = [line for line in listing.splitlines() if line[17:18] in ("W", "V", "u", "w", "v")]
    # Undefined weak symbols, and the exception tables' references to the runtime, carry no code.
    return [line for line in weak if f"cpu::{capability}::" not in line and line[17] in "WVu" and "DW.ref." not in line]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
def test_no_capability_leaves_code_that_another_could_be_linked_to(wide_objects):
    # An inline function compiled with AVX-512, if linked for all capabilities, would be an illegal instruction.
    leaks = {name: weak_symbols(path, "wide") for name, path in wide_objects.items() if name != "shim"}
    assert not any(leaks.values()), leaks
    for path in (path for path in (ROOT / "build").glob("*.*.o") if not path.name.startswith("bindings.")):
        assert not weak_symbols(path, path.name.split(".")[1]), path
