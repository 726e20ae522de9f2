"""Registers the Triton kernels (`perexample.triton_kernels`) for CUDA. Triton itself is imported at the first launch.

PEREXAMPLE_CUDA chooses what serves CUDA: unset, Triton fills what the C++ library left empty; "triton", Triton serves
every op that it has; "reference", plain PyTorch serves every op.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import NAMESPACE, OPS

__all__ = ["load", "register", "source"]

# op -> its module in perexample.triton_kernels, where a function has the op's name.
MODULES = {
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
    "lstm_forward_": "recurrent",
    "lstm_backward_": "recurrent",
    "gru_cell_backward_": "recurrent",
}
# They compute in float32: the reference takes float64.
NO_FLOAT64 = (
    "linear_moments", "conv_moments", "layer_norm_moments", "rms_norm_moments", "group_norm_moments",
    "batch_norm_moments", "lstm_forward_", "lstm_backward_", "gru_cell_backward_",
)  # fmt: skip
CHOICES = ("", "triton", "reference")

_library = torch.library.Library(NAMESPACE, "IMPL")
_registered: set[tuple[str, str]] = set()
# (op, device) whose reference was registered over whatever else there is.
forced_references: set[tuple[str, str]] = set()


def load() -> None:
    """Register for CUDA what PEREXAMPLE_CUDA and this installation ask for.

    Raises:
        ValueError: for an unknown choice.
        ImportError: if Triton is asked for and not installed.
    """
    choice = os.environ.get("PEREXAMPLE_CUDA", "")
    if choice not in CHOICES:
        raise ValueError(f"perexample: PEREXAMPLE_CUDA must be triton, reference or unset, got {choice!r}")
    if choice == "reference":
        for name in OPS:
            _library.impl(name, OPS[name][0], "CUDA")
            forced_references.add((name, "CUDA"))
        return
    present = importlib.util.find_spec("triton") is not None
    if choice == "triton" and not present:
        raise ImportError(
            "perexample: PEREXAMPLE_CUDA=triton, but Triton is not installed: pip install 'perexample[triton]'"
        )
    if present and (choice == "triton" or torch.version.cuda is not None):
        register("CUDA", override=choice == "triton")


def register(device: str, *, override: bool) -> None:
    """Let the Triton kernels serve their ops under the dispatch key `device`; with `override` also where another does.

    Another key than CUDA is for tests, in Triton's interpreter.
    """
    for name, module in MODULES.items():
        if override or not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device):
            _library.impl(name, _lazily(name, module), device)
            _registered.add((name, device))


def source(name: str, device: str) -> tuple[str, int] | None:
    """File and line of the Triton launcher that serves an op on a device, or None where none does."""
    if (name, device) not in _registered:
        return None
    code = _launcher(name, MODULES[name]).__code__
    return code.co_filename, code.co_firstlineno


@functools.cache
def _launcher(name: str, module: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.triton_kernels.{module}"), name)
    return launcher


def _lazily(name: str, module: str) -> Callable[..., Any]:
    """The dispatcher's kernel of an op: imports the launcher at the first call; the rest is the reference's."""
    reference = OPS[name][0]

    def call(*args: Any, **keywords: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else next(iter(args[0]), None)
        if first is None or not _served(name, first):
            return reference(*args, **keywords)
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return _launcher(name, module)(*args, **keywords)
        return _launcher(name, module)(*args, **keywords)

    return call


def _served(name: str, tensor: Tensor) -> bool:
    if tensor.dtype == torch.float64 and name in NO_FLOAT64:
        return False
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (8, 0)
