"""Builds the kernels: `perexample/_kernels.so` (the ops; no Python) and `perexample._info` (build facts).

Sources in csrc/cpu are compiled once per CPU capability that makes a difference, and chosen at run time. Without a C++
compiler the package installs in pure Python. build_support/ninja_file.py says what is compiled, and when CUDA is.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).parent)  # relative paths keep this folder's name out of the binaries
sys.path.insert(0, "build_support")
from ninja_file import CXX, ninja_file, with_cuda  # noqa: E402


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


with_cuda()  # fails here where it was asked for and cannot be built
if not CXX:
    print("perexample: NO C++ COMPILER ($CXX, c++, g++, clang++): installing without kernels")
setup(
    packages=[*find_packages("pysrc"), "perexample.triton_kernels"],
    package_dir={"": "pysrc", "perexample.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("perexample._kernels", []), Extension("perexample._info", [])] if CXX else [],
    cmdclass={"build_ext": NinjaBuild},
)
