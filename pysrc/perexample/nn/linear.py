"""Linear."""

from __future__ import annotations

from torch import Tensor, nn

from .. import autograd
from ..moments import MomentModule

__all__ = ["Linear"]


class Linear(MomentModule, nn.Linear):
    """torch.nn.Linear whose backward also computes ``p.sum_grad_squared`` (MATHS 3, 4).

    Input (B, ..., I): the batch is dimension 0; everything between it and the features belongs to one example.
    Equivalent to ``torch.nn.Linear`` in everything else: arguments, initialisation, state_dict, output.

    Raises:
        ValueError: in a converted model in training, if dimension 0 of the input is not the batch.
    """

    _reusable = True
    _batch_at = "any"

    def forward(self, input: Tensor) -> Tensor:
        if not self._tracking(input, 2, "weight", "bias"):
            return super().forward(input)
        return autograd.linear(input, self.weight, self.bias, *self._leaves("weight", "bias"), self._axis(input, 2))
