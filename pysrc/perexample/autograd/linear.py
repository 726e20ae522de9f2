"""The Function of Linear (MATHS 3, 4)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ._common import autocast, check_dtype, one_use, ops, rows

__all__ = ["linear"]


class _Linear(Function):
    """MATHS (3), (4). x: (B, ..., I), weight: (O, I), bias: (O,) or None -> (B, ..., O); the batch as `batch_dim`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | None,
        batch_dim: int,
    ) -> Tensor:
        ctx.grad_dtype, ctx.batch_dim = weight.dtype, batch_dim
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x if weight_leaf is not None else None, weight)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        want_x, _, _, want_weight, want_bias, want_uses = ctx.needs_input_grad[:6]
        dx = dw = db = dw_sq = db_sq = None
        dy_rows = rows(dy, ctx.batch_dim)
        if want_weight:
            dw, dw_sq, db, db_sq = ops.linear_moments(dy_rows, rows(x, ctx.batch_dim), want_bias, ctx.grad_dtype)
        elif want_bias:
            db, db_sq = ops.bias_moments(dy_rows, ctx.grad_dtype)
        if want_x:
            dx = dy.matmul(weight)
        if not want_bias:
            db = db_sq = None
        return dx, dw, db, dw_sq, db_sq, one_use(dy, want_uses), None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | None,
    batch_dim: int = 0,
) -> Tensor:
    """``F.linear(x, weight, bias)`` with second moments. x: (B, ..., I), the batch as dimension `batch_dim`."""
    dtype, context = autocast(x, low_precision=True)
    check_dtype("Linear", x, weight, context)
    with context:
        return _Linear.apply(x.to(dtype), weight, bias, weight_leaf, bias_leaf, uses, batch_dim)
