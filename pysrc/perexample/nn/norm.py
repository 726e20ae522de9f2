"""Norms with an affine part."""

from __future__ import annotations

from torch import Tensor, nn

from .. import autograd
from ..moments import MomentModule

__all__ = ["GroupNorm", "LayerNorm"]


class LayerNorm(MomentModule, nn.LayerNorm):
    """torch.nn.LayerNorm whose backward also computes ``p.sum_grad_squared`` (MATHS 7).

    Input (B, ..., *normalized_shape).
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self._tracking(input, len(self.normalized_shape) + 1, "weight", "bias"):
            return super().forward(input)
        return autograd.layer_norm(
            input, self.weight, self.bias, *self._leaves("weight", "bias"), self.normalized_shape, self.eps
        )


class GroupNorm(MomentModule, nn.GroupNorm):
    """torch.nn.GroupNorm whose backward also computes ``p.sum_grad_squared`` (MATHS 7). Input (B, C, ...)."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._tracking(input, 2, "weight", "bias"):
            return super().forward(input)
        return autograd.group_norm(
            input, self.weight, self.bias, *self._leaves("weight", "bias"), self.num_groups, self.eps
        )
