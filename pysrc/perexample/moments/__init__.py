"""Second moments and the number of examples as gradients: leaves, counts, uses, and the base of the layers."""

from .count import ExampleCount, in_reentrant_checkpoint, overlap
from .leaf import Moment, _Mode, accumulate_dtype, moment_of, no_moments
from .module import MomentModule
from .uses import Call, Uses

__all__ = [
    "Call",
    "ExampleCount",
    "Moment",
    "MomentModule",
    "Uses",
    "_Mode",
    "accumulate_dtype",
    "in_reentrant_checkpoint",
    "moment_of",
    "no_moments",
    "overlap",
]
