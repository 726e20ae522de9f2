"""Activations with parameters."""

from __future__ import annotations

from torch import Tensor, nn

from .. import autograd
from ..moments import MomentModule

__all__ = ["PReLU"]


class PReLU(MomentModule, nn.PReLU):
    """torch.nn.PReLU whose backward also computes ``p.sum_grad_squared``. Input (B, C, ...), or any (B, ...)."""

    _reusable = True

    def forward(self, input: Tensor) -> Tensor:
        if not self._tracking(input, 1 if self.num_parameters == 1 else 2, "weight"):
            return super().forward(input)
        return autograd.prelu(input, self.weight, *self._leaves("weight"))
