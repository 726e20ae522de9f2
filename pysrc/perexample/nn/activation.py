"""Activations with parameters."""

from __future__ import annotations

from torch import Tensor, nn

from .. import autograd
from ..moments import MomentModule

__all__ = ["PReLU"]


class PReLU(MomentModule, nn.PReLU):
    """torch.nn.PReLU whose backward also computes ``p.sum_grad_squared``. Input (B, C, ...), or any (B, ...).

    The channels are dimension 1, also in models that have the batch there: with one parameter for each, the batch comes
    first in any case.
    """

    _reusable = True

    @property
    def _batch_at(self) -> str:  # type: ignore[override]
        return "any" if self.num_parameters == 1 else "first"

    def forward(self, input: Tensor) -> Tensor:
        dims = 1 if self.num_parameters == 1 and input.dim() < 2 else 2
        if not self._tracking(input, dims, "weight"):
            return super().forward(input)
        axis = self._axis(input, dims)
        y = autograd.prelu(input.transpose(0, axis) if axis else input, self.weight, *self._leaves("weight"))
        return y.transpose(0, axis) if axis else y
