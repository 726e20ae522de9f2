"""perexample: exact per-example second moments inside backward, and optimizers that use them."""

import torch as _torch  # noqa: F401  (the extension needs its libraries)

from . import _extension, _triton, nn, noise, ops, optim
from .convert import ConversionTable, Served, convert, register
from .moments import no_moments
from .optim import clip_grad_norm_, unscale_
from .testing import check

__all__ = [
    "ConversionTable",
    "Served",
    "__version__",
    "check",
    "clip_grad_norm_",
    "convert",
    "nn",
    "no_moments",
    "noise",
    "ops",
    "optim",
    "register",
    "unscale_",
]
__version__ = "0.1.0"

_extension.load()
_triton.load()
