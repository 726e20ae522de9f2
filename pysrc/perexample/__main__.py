"""``python -m perexample``: what this installation can do, and which code serves every op on every device."""

from __future__ import annotations

import inspect
import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import __version__, _extension, _triton, ops
from .ops import OPS

DEVICES = ("CPU", "CUDA")


def _short(path: str) -> str:
    """A path below the package's parent directory or the working directory, or as it came."""
    for root in (Path(__file__).parents[1], Path.cwd()):
        if Path(path).is_relative_to(root):
            return str(Path(path).relative_to(root))
    return path


def implementation(name: str, device: str) -> str:
    """The kernel that the dispatcher holds for an op on a device, with file and line."""
    qualified = f"{ops.NAMESPACE}::{name}"
    if (triton := _triton.source(name, device)) is not None:
        return f"Triton  {_short(triton[0])}:{triton[1]}"
    forced = (name, device) in _triton.forced_references
    if forced or not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device):
        reference: Callable[..., Any] = inspect.unwrap(OPS[name][0])
        return f"reference  {_short(inspect.getfile(reference))}:{reference.__code__.co_firstlineno}"
    found = re.search(rf"^{device}: registered at (\S+):(\d+)", torch._C._dispatch_dump(qualified), re.MULTILINE)
    if found is None:
        return "registered"
    path, line = found.groups()
    return f"{'C++' if path.endswith(('.cpp', '.cu')) else 'Python'}  {_short(path)}:{line}"


def report() -> str:
    """All of it, as text."""
    facts = {"perexample": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    info = _extension.info()
    if info is None:
        facts["compiled kernels"] = "NOT BUILT: every op runs on its Python reference"
    else:
        build = info.build()
        wish = os.environ.get("PEREXAMPLE_CPU_CAPABILITY")
        facts["compiled kernels"] = _short(str(_extension.LIBRARY))
        facts["CPU capability"] = info.capability() + (f" (PEREXAMPLE_CPU_CAPABILITY={wish})" if wish else "")
        facts["  this machine runs"] = ", ".join(info.capabilities())
        facts["  compiled in"] = build["compiled_capabilities"].replace(" ", ", ")
        facts["CUDA kernels for"] = f"sm_{build['cuda_archs']}" if build["cuda"] else "nothing: built without CUDA"
        facts["built with"] = f"{build['compiler']}, torch {build['torch']}"
        facts["  flags"] = build["flags"]
    facts["Triton"] = version("triton") if find_spec("triton") else "not installed (optional: perexample[triton])"
    if choice := os.environ.get("PEREXAMPLE_CUDA"):
        facts["CUDA choice"] = f"PEREXAMPLE_CUDA={choice}"
    lines = [f"{name:<20}{value}" for name, value in facts.items()]
    rows = [("op", *DEVICES), *((name, *(implementation(name, device) for device in DEVICES)) for name in OPS)]
    widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
    table = ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *table])


if __name__ == "__main__":
    print(report())
