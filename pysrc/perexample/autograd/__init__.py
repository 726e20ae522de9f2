"""The autograd Functions: save, call the ops, return (dx, dw, ..., second moments).

Each takes, beside the parameters, their leaves (see `moments`), and returns the second moment as the leaf's
gradient. A parameter and its leaf are wanted together: where the leaf is None the parameter is frozen.
"""

from .conv import conv, conv_transpose
from .count import count_examples
from .embedding import embedding
from .linear import input_major_linear, linear
from .norm import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from .reduce import expand

__all__ = [
    "batch_norm",
    "conv",
    "conv_transpose",
    "count_examples",
    "embedding",
    "expand",
    "group_norm",
    "input_major_linear",
    "instance_norm",
    "layer_norm",
    "linear",
    "rms_norm",
]
