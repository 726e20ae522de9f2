"""Bilinear."""

from __future__ import annotations

from torch import Tensor, nn

from .. import autograd
from ..moments import MomentModule

__all__ = ["Bilinear"]


class Bilinear(MomentModule, nn.Bilinear):
    """torch.nn.Bilinear whose backward also computes ``p.sum_grad_squared`` (MATHS 3, of an outer product).

    Inputs (B, ..., I) and (B, ..., J).
    """

    _reusable = True
    _batch_at = "any"

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        if not self._tracking(input1, 2, "weight", "bias"):
            return super().forward(input1, input2)
        self._check_batch(input2, 2)
        axis = self._axis(input1, 2)
        if axis:
            input1, input2 = input1.transpose(0, axis), input2.transpose(0, axis)
        y = autograd.bilinear(input1, input2, self.weight, self.bias, *self._leaves("weight", "bias"))
        return y.transpose(0, axis) if axis else y
