"""The autograd Functions: save, call the ops, return (dx, dw, ..., second moments).

Each takes, beside the parameters, their leaves (see `moments`), and returns the second moment as the leaf's
gradient. A parameter and its leaf are wanted together: where the leaf is None the parameter is frozen.
"""

from .activation import prelu
from .bilinear import bilinear
from .conv import conv, conv_transpose
from .count import count_examples
from .embedding import embedding, embedding_bag
from .linear import input_major_linear, linear
from .norm import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from .recurrent import Parameters, recurrent, recurrent_dtypes
from .reduce import expand

__all__ = [
    "Parameters",
    "batch_norm",
    "bilinear",
    "conv",
    "conv_transpose",
    "count_examples",
    "embedding",
    "embedding_bag",
    "expand",
    "group_norm",
    "input_major_linear",
    "instance_norm",
    "layer_norm",
    "linear",
    "prelu",
    "recurrent",
    "recurrent_dtypes",
    "rms_norm",
]
