"""The ops: schema, reference (the dispatcher's default kernel), fake kernel and validated function of each."""

from ._library import NAMESPACE, OPS
from .conv import conv_moments
from .embedding import embedding_moments
from .linear import linear_moments
from .norm import batch_norm_moments, group_norm_moments, layer_norm_moments, rms_norm_moments
from .optimizer import optimizer_step_
from .recurrent import gru_cell_backward_, lstm_backward_, lstm_forward_
from .reduce import bias_moments, reduce_moments

__all__ = [
    "NAMESPACE",
    "OPS",
    "batch_norm_moments",
    "bias_moments",
    "conv_moments",
    "embedding_moments",
    "group_norm_moments",
    "gru_cell_backward_",
    "layer_norm_moments",
    "linear_moments",
    "lstm_backward_",
    "lstm_forward_",
    "optimizer_step_",
    "reduce_moments",
    "rms_norm_moments",
]
