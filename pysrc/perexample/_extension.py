"""Loads the compiled kernels, where they were built."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

LIBRARY = Path(__file__).with_name("_kernels.so")
_info: ModuleType | None = None


def load() -> None:
    """Register the compiled kernels. Without them the reference kernels serve every op; broken ones raise."""
    global _info
    if not LIBRARY.exists():
        return
    try:
        torch.ops.load_library(str(LIBRARY))
        from . import _info as info  # type: ignore[attr-defined]
    except (OSError, ImportError) as error:
        raise ImportError(
            f"perexample: its compiled kernels are present but cannot be loaded ({error}); they were built for "
            "another torch or "
            f"Python: reinstall with `pip install --no-build-isolation --force-reinstall --no-deps perexample`"
        ) from error
    _info = info


def info() -> ModuleType | None:
    """The module of build facts and CPU capability, or None without the extension."""
    return _info
