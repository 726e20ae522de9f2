"""Layers that other libraries define for themselves: what computes them, whatever the class is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import autograd
from ..moments import MomentModule

__all__ = ["InputMajorLinear", "RMSNormLookalike", "eps_of"]


class InputMajorLinear(MomentModule):
    """A linear layer whose weight is (I, O), as GPT-2's Conv1D."""

    _reusable = True
    _batch_at = "any"

    def forward(self, x: Tensor) -> Tensor:
        if not self._tracking(x, 2, "weight", "bias"):
            return super().forward(x)
        return autograd.input_major_linear(x, self.weight, self.bias, *self._leaves("weight", "bias"), self._axis(x, 2))


class RMSNormLookalike(MomentModule):
    """A norm by the root of the mean square, with a weight and nothing else."""

    _reusable = True
    _batch_at = "any"

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        if not self._tracking(x, 2, "weight"):
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        weight, width, axis = self.weight.to(dtype), self.weight.shape, self._axis(x, 2)
        return autograd.rms_norm(x.to(dtype), weight, *self._leaves("weight"), width, eps_of(self), axis)


def eps_of(module: nn.Module) -> float | None:
    """The eps of a norm, by any of its usual names."""
    found = (getattr(module, name, None) for name in ("eps", "variance_epsilon", "epsilon"))
    return next((value for value in found if isinstance(value, float)), None)
