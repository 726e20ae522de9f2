"""The autograd Functions: save, call the ops, return (dx, dw, ..., second moments).

Each takes, beside the parameters, their leaves (see `moments`), and returns the second moment as the leaf's
gradient. A parameter and its leaf are wanted together: where the leaf is None the parameter is frozen.
"""

from .conv import conv
from .count import count_examples
from .embedding import embedding
from .linear import linear
from .norm import group_norm, layer_norm

__all__ = ["conv", "count_examples", "embedding", "group_norm", "layer_norm", "linear"]
