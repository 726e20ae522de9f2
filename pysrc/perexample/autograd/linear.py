"""The Functions of Linear (MATHS 3, 4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..moments.uses import Call
from ._common import (
    add_small,
    add_uses,
    apply,
    call_of,
    cast,
    once_differentiable,
    one_use,
    ops,
    owned,
    rows,
    sum_positions,
)

__all__ = ["input_major_linear", "linear"]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, which rounds twice, before and after it adds the bias, where x is not contiguous; once here."""
    if x.is_contiguous() or bias is None or x.dim() < 3 or x.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(x, weight, bias)
    return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


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
        uses: Tensor | Call | None,
        batch_dim: int,
    ) -> Tensor:
        ctx.call = call_of(uses, "product", "other")
        ctx.grad_dtype, ctx.batch_dim = weight.dtype, batch_dim
        weight = cast(weight, x.dtype)
        ctx.save_for_backward(x if weight_leaf is not None else None, weight)
        return owned(_linear(x, weight, None if bias is None else cast(bias, x.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        want_x, _, _, want_weight, want_bias, want_uses = ctx.needs_input_grad[:6]
        dx = dw = db = dw_sq = db_sq = None
        dy_rows = rows(dy, ctx.batch_dim)
        if want_weight:
            x_rows = rows(x, ctx.batch_dim)
            dw, dw_sq, db, db_sq = ops.linear_moments(dy_rows, x_rows, want_bias, ctx.grad_dtype)
            uses = None if ctx.call is None else ctx.call.shared(0)
            if uses is not None:
                dw_sq = uses.add_product(dy_rows, x_rows, dw_sq, ctx.call.begins[0])
        elif want_bias:
            db, db_sq = ops.bias_moments(dy_rows, ctx.grad_dtype)
        if want_x:
            dx = dy.matmul(weight)
        if not want_bias:
            db = db_sq = None
        db_sq = add_small(ctx.call, 1, db_sq, lambda: sum_positions(dy_rows))
        return dx, dw, db, dw_sq, db_sq, one_use(dy, want_uses), None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | Call | None,
    batch_dim: int = 0,
) -> Tensor:
    """``F.linear(x, weight, bias)`` with second moments. x: (B, ..., I), the batch as dimension `batch_dim`."""
    return apply(_Linear, "Linear", x, weight, bias, weight_leaf, bias_leaf, uses, batch_dim)


class _InputMajorLinear(Function):
    """MATHS (3), (4). x: (B, ..., I), weight: (I, O), bias: (O,) -> (B, ..., O); the batch as `batch_dim`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | Call | None,
        batch_dim: int,
    ) -> Tensor:
        ctx.call = call_of(uses, "other", "other")
        ctx.grad_dtype, ctx.batch_dim = weight.dtype, batch_dim
        weight = cast(weight, x.dtype)
        ctx.save_for_backward(x if weight_leaf is not None else None, weight)
        return owned(_linear(x, weight.t(), cast(bias, x.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        want_x, _, _, want_weight, want_bias, want_uses = ctx.needs_input_grad[:6]
        dx = dw = db = dw_sq = db_sq = None
        dy_rows = rows(dy, ctx.batch_dim)
        if want_weight:
            # G_b[i, o] = sum_t x[b,t,i] dy[b,t,o]: the same product with its two sides exchanged.
            x_rows = rows(x, ctx.batch_dim)
            dw, dw_sq, _, _ = ops.linear_moments(x_rows, dy_rows, False, ctx.grad_dtype)
            dw_sq = add_uses(
                ctx.call, 0, dw_sq, lambda x, dy: ops.linear_moments(x, dy, False, None)[0], x_rows, dy_rows
            )
        if want_bias:
            db, db_sq = ops.bias_moments(dy_rows, ctx.grad_dtype)
            db_sq = add_small(ctx.call, 1, db_sq, lambda: sum_positions(dy_rows))
        if want_x:
            dx = dy.matmul(weight.t())
        return dx, dw, db, dw_sq, db_sq, one_use(dy, want_uses), None


def input_major_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | Call | None,
    batch_dim: int = 0,
) -> Tensor:
    """``x @ weight + bias`` with second moments. x: (B, ..., I), the batch as dimension `batch_dim`; weight: (I, O)."""
    return apply(_InputMajorLinear, "Linear", x, weight, bias, weight_leaf, bias_leaf, uses, batch_dim)
