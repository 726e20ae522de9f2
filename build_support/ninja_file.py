"""The whole build as a ninja file, for setup.py: every source of csrc/, once per CPU capability or for all CUDA archs.

CUDA is built wherever nvcc and a CUDA build of torch are. PEREXAMPLE_BUILD_CUDA: 1 builds it with a CPU build of torch
too (the library then serves any torch), 0 never does. TORCH_CUDA_ARCH_LIST chooses the archs; CUDA_HOME the toolkit.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import torch

CXX = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra"
CAPABILITIES = {"generic": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["avx2"] = "-mavx2 -mfma -mf16c"
    CAPABILITIES["avx512"] = CAPABILITIES["avx2"] + " -mavx512f -mavx512bw -mavx512dq -mavx512vl"
    CAPABILITIES["avx512_bf16"] = CAPABILITIES["avx512"] + " -mavx512bf16"
# avx512_bf16 makes a difference to linear.cpp only, which calls reduce.cpp; the rest it takes from avx512 (table.cpp).
BF16_SOURCES = ("linear.cpp", "reduce.cpp", "table.cpp")
CUDA_ARCHS = "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
HOPPER_SOURCES = ("linear_wgmma.cu",)  # compiled for sm_90a only
# ptxas warns where it serialises wgmma: an error.
NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Xptxas --warning-as-error"


def nvcc() -> str | None:
    """The CUDA compiler: that of CUDA_HOME where it is set, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def with_cuda() -> bool:
    """Whether to build the CUDA kernels; raises where they were asked for and cannot be built."""
    choice = os.environ.get("PEREXAMPLE_BUILD_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"PEREXAMPLE_BUILD_CUDA must be 0, 1 or unset, got {choice!r}")
    needs = {"a C++ compiler": CXX, "nvcc (in CUDA_HOME/bin or on PATH)": nvcc()}
    missing = [what for what, found in needs.items() if not found]
    if choice == "1" and missing:
        raise SystemExit(f"PEREXAMPLE_BUILD_CUDA=1, but missing: {'; '.join(missing)}")
    return choice == "1" or (choice == "" and not missing and torch.version.cuda is not None)


def cuda_archs() -> tuple[list[str], bool]:
    """The archs to compile for, and whether to add PTX. 9.0 is 90a: the Hopper kernels need it."""
    archs, ptx = [], False
    for entry in re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or CUDA_ARCHS):
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must hold archs like 8.0, 9.0a or 12.0+PTX, got {entry!r}")
        number = match[1] + match[2]
        archs.append(number + ("a" if number == "90" else match[3]))
        ptx = ptx or match[4] is not None
    return archs, ptx


def lowest(archs: list[str]) -> str:
    """The virtual arch of the portable sources, compiled once for all: any of these archs, and later ones, takes it."""
    return min((arch.removesuffix("a") for arch in archs), key=int)


def gencodes(archs: list[str], ptx: bool) -> str:
    """nvcc's flags for the portable sources: they use nothing that came after the lowest arch."""
    virtual = f"compute_{lowest(archs)}"
    real = [*(f"sm_{arch}" for arch in archs), *([virtual] if ptx else [])]
    return " ".join(f"-gencode=arch={virtual},code={code}" for code in real)


def toolkit_libraries() -> str:
    """Flags to link the static CUDA runtime, as nvcc itself would."""
    told = subprocess.run([str(nvcc()), "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ LIBRARIES=(.*)$", told.stderr, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{nvcc()} --dryrun does not say where its libraries are:\n{told.stderr}")
    return " ".join(shlex.split(found[1])) + " -lcudart_static -ldl -lrt -lpthread"


def ninja_file(info: str) -> str:
    """The build; `info` is the name of the second library."""
    cuda = with_cuda()
    archs, ptx = cuda_archs() if cuda else ([], False)
    lib, include = (Path(torch.__file__).parent / part for part in ("lib", "include"))
    facts = {"FLAGS": FLAGS, "COMPILED_CAPABILITIES": " ".join(CAPABILITIES), "TORCH_VERSION": torch.__version__}
    facts["CUDA_ARCHS"] = ", ".join([*archs, *([f"{lowest(archs)} PTX"] if ptx else [])])
    python = [f"-isystem {path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    python += [f"'-DPX_{k}=\"{v}\"'" for k, v in facts.items()]
    stable_abi = f"-DTORCH_TARGET_VERSION=0x020b000000000000 -isystem {include}"  # torch 2.11
    # unit -> (rule, source, flags); those that take longest first
    units = {"capability": ("compile", "csrc/cpu/capability.cpp", ""), "plan": ("compile", "csrc/cuda/plan.cpp", "")}
    if cuda:
        portable, hopper = gencodes(archs, ptx), "90a" in archs
        for source in sorted(Path("csrc/cuda").glob("*.cu")):
            for_hopper = hopper and source.name in HOPPER_SOURCES
            flags = "-gencode=arch=compute_90a,code=sm_90a" if for_hopper else portable
            units[f"cuda.{source.stem}"] = ("cuda", str(source), f"{flags} -DPX_SM90A={int(hopper)}")
    else:
        units["cuda.absent"] = ("compile", "csrc/cuda/absent.cpp", "")
    for source in sorted(Path("csrc/bindings").glob("*.cpp")):
        units[f"bindings.{source.stem}"] = ("compile", str(source), stable_abi)
    for source in sorted(set(Path("csrc/cpu").glob("*.cpp")) - {Path("csrc/cpu/capability.cpp")}):
        for name, flags in CAPABILITIES.items():
            if name == "avx512_bf16" and source.name not in BF16_SOURCES:
                continue
            units[f"{source.stem}.{name}"] = ("compile", str(source), f"-DPX_CAPABILITY={name} {flags}")
    objects = " ".join(f"build/{stem}.o" for stem in units)
    units["module"] = ("compile", "csrc/module.cpp", " ".join(python))
    return f"""builddir = build
rule compile
  command = {shlex.join(CXX)} {FLAGS} $flags {os.environ.get("CXXFLAGS", "")} -MD -MF $out.d -c $in -o $out
  deps = gcc
  depfile = $out.d
rule cuda
  command = {nvcc()} -ccbin {CXX[-1]} {NVCC_FLAGS} $flags -MD -MF $out.d -c $in -o $out
  deps = gcc
  depfile = $out.d
rule link
  command = {shlex.join(CXX)} -shared $in -o $out $libs {os.environ.get("LDFLAGS", "")}
build build/_kernels.so: link {objects}
  libs = -Wl,-soname,_kernels.so -Wl,-z,defs -L{lib} -ltorch -ltorch_cpu -lc10 {toolkit_libraries() if cuda else ""}
build build/{info}: link build/module.o build/_kernels.so
  libs = -Wl,-rpath,$$ORIGIN
""" + "".join(
        f"build build/{stem}.o: {rule} {source}\n  flags = {flags}\n" for stem, (rule, source, flags) in units.items()
    )
