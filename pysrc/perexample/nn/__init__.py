"""Drop-in layers that also compute per-example second moments; subclasses of torch.nn's, state_dicts alike."""

from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .linear import Linear
from .norm import GroupNorm, LayerNorm

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "GroupNorm", "LayerNorm", "Linear"]
