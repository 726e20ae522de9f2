"""Builds the kernels: `perexample/_kernels.so` (the ops; no Python) and `perexample._info` (build facts).

Every source in csrc/cpu is compiled once per CPU capability and chosen at run time. Without a C++ compiler the
package installs in pure Python. PEREXAMPLE_BUILD_CUDA: unset builds CUDA where it can, 1 must, 0 never does.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).parent)  # relative paths keep this folder's name out of the binaries
CXX = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra"
CAPABILITIES = {"generic": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["avx2"] = "-mavx2 -mfma -mf16c"
    CAPABILITIES["avx512"] = CAPABILITIES["avx2"] + " -mavx512f -mavx512bw -mavx512dq -mavx512vl"
    CAPABILITIES["avx512_bf16"] = CAPABILITIES["avx512"] + " -mavx512bf16"


def with_cuda() -> bool:
    """Whether to build the CUDA kernels; raises where they were asked for and cannot be built."""
    choice = os.environ.get("PEREXAMPLE_BUILD_CUDA", "")
    needs = {
        "a CUDA build of torch": torch.version.cuda,
        "nvcc on PATH": shutil.which("nvcc"),
        "CUDA sources (this version has none in csrc/cuda)": any(Path("csrc/cuda").glob("*.cu")),
    }
    missing = [what for what, found in needs.items() if not found]
    if choice not in ("", "0", "1"):
        raise SystemExit(f"PEREXAMPLE_BUILD_CUDA must be 0, 1 or unset, got {choice!r}")
    if choice == "1" and missing:
        raise SystemExit(f"PEREXAMPLE_BUILD_CUDA=1, but missing: {'; '.join(missing)}")
    return choice != "0" and not missing


def ninja_file(info: str) -> str:
    """The whole build as a ninja file; `info` is the name of the second library."""
    lib, include = (Path(torch.__file__).parent / part for part in ("lib", "include"))
    facts = {"FLAGS": FLAGS, "COMPILED_CAPABILITIES": " ".join(CAPABILITIES), "TORCH_VERSION": torch.__version__}
    python = [f"-isystem {path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    python += [f"-DPX_HAS_CUDA={int(HAS_CUDA)}", *(f"'-DPX_{k}=\"{v}\"'" for k, v in facts.items())]
    stable_abi = f"-DTORCH_TARGET_VERSION=0x020b000000000000 -isystem {include}"  # torch 2.11
    units = {"capability": ("csrc/cpu/capability.cpp", "")}
    for source in sorted(Path("csrc/bindings").glob("*.cpp")):
        units[f"bindings.{source.stem}"] = (str(source), stable_abi)
    for source in sorted(set(Path("csrc/cpu").glob("*.cpp")) - {Path("csrc/cpu/capability.cpp")}):
        for name, flags in CAPABILITIES.items():
            units[f"{source.stem}.{name}"] = (str(source), f"-DPX_CAPABILITY={name} {flags}")
    objects = " ".join(f"build/{stem}.o" for stem in units)
    units["module"] = ("csrc/module.cpp", " ".join(python))
    return f"""builddir = build
rule compile
  command = {shlex.join(CXX)} {FLAGS} $flags {os.environ.get("CXXFLAGS", "")} -MD -MF $out.d -c $in -o $out
  deps = gcc
  depfile = $out.d
rule link
  command = {shlex.join(CXX)} -shared $in -o $out $libs {os.environ.get("LDFLAGS", "")}
build build/_kernels.so: link {objects}
  libs = -Wl,-soname,_kernels.so -L{lib} -ltorch -ltorch_cpu -lc10
build build/{info}: link build/module.o build/_kernels.so
  libs = -Wl,-rpath,$$ORIGIN
""" + "".join(f"build build/{stem}.o: compile {source}\n  flags = {flags}\n" for stem, (source, flags) in units.items())


class NinjaBuild(build_ext):
    """One ninja run makes both libraries; setuptools copies them to where they belong."""

    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so" if name.endswith("_kernels") else super().get_ext_filename(name)

    def build_extension(self, ext):
        Path("build").mkdir(exist_ok=True)
        Path("build/build.ninja").write_text(ninja_file(self.get_ext_filename("_info")))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.run(["ninja", "-f", "build/build.ninja", "-j", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(f"build/{target.name}", target)


HAS_CUDA = with_cuda()
if not CXX:
    print("perexample: NO C++ COMPILER ($CXX, c++, g++, clang++): installing without kernels")
setup(
    packages=[*find_packages("pysrc"), "perexample.triton_kernels"],
    package_dir={"": "pysrc", "perexample.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("perexample._kernels", []), Extension("perexample._info", [])] if CXX else [],
    cmdclass={"build_ext": NinjaBuild},
)
