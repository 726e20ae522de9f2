"""The Function of PReLU: ``G_b[c] = sum over the positions of channel c where x < 0 of dy x``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..moments.uses import Call
from ._common import add_small, apply, call_of, cast, once_differentiable, one_use, ops, sum_positions

__all__ = ["prelu"]


class _PReLU(Function):
    """x: (B, C, ...) or (B, ...), weight: (C,) or (1,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_leaf: Tensor | None, uses: Tensor | Call | None) -> Tensor:
        ctx.call = call_of(uses, "other")
        ctx.grad_dtype = weight.dtype
        weight = cast(weight, x.dtype)
        ctx.save_for_backward(x, weight)
        return F.prelu(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        channels = weight.numel()
        shape = [1] * x.dim()
        if channels > 1:
            shape[1] = channels
        # As stock PyTorch does: one pass for dx and for the terms of dw, which has the shape of x.
        dx, terms = torch.ops.aten._prelu_kernel_backward(dy, x, weight.reshape(shape))
        rows = terms.reshape(x.shape[0], channels, x.shape[1:].numel() // channels if channels else 0)
        rows = rows.transpose(1, 2)
        dw, dw_sq = ops.bias_moments(rows, ctx.grad_dtype)
        dw_sq = add_small(ctx.call, 0, dw_sq.reshape(weight.shape), lambda: sum_positions(rows))
        return dx, dw.reshape(weight.shape), dw_sq, one_use(dy, ctx.needs_input_grad[3])


def prelu(x: Tensor, weight: Tensor, weight_leaf: Tensor | None, uses: Tensor | Call | None) -> Tensor:
    """``F.prelu(x, weight)`` with second moments. x: (B, C, ...), weight: (C,); or x: (B, ...), weight: (1,)."""
    return apply(_PReLU, "PReLU", x, weight, weight_leaf, uses)
