"""perexample: exact per-example second moments inside backward, and optimizers that use them."""

import torch as _torch  # noqa: F401  (the extension needs its libraries)

from . import _extension, _triton, nn, ops, optim
from .convert import ConversionTable, Served, convert, register
from .moments import no_moments

__all__ = ["ConversionTable", "Served", "__version__", "convert", "nn", "no_moments", "ops", "optim", "register"]
__version__ = "0.1.0"

_extension.load()
_triton.load()
