"""The Function of Bilinear (MATHS 3, of an outer product): ``G_b[o,i,j] = sum_t dy[b,t,o] x1[b,t,i] x2[b,t,j]``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..moments.uses import Call
from ..ops._library import accumulate_dtype, chunk_rows
from ._common import (
    add_small,
    add_uses,
    autocast,
    call_of,
    check_dtype,
    once_differentiable,
    one_use,
    ops,
    owned,
    rows,
    sum_positions,
)

__all__ = ["bilinear"]


class _Bilinear(Function):
    """x1: (B, ..., I), x2: (B, ..., J), weight: (O, I, J), bias: (O,) or None -> (B, ..., O)."""

    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | Call | None,
    ) -> Tensor:
        ctx.call = call_of(uses, "other", "other")
        ctx.grad_dtype = weight.dtype
        weight = weight.to(x1.dtype)
        ctx.save_for_backward(x1, x2, weight)
        return owned(F.bilinear(x1, x2, weight, None if bias is None else bias.to(x1.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, weight = ctx.saved_tensors
        want_1, want_2, _, _, want_weight, want_bias, want_uses = ctx.needs_input_grad
        out, size1, size2 = weight.shape
        wide = accumulate_dtype(dy.dtype)
        dx1, dx2 = (torch.empty_like(x) if want else None for x, want in ((x1, want_1), (x2, want_2)))
        dw, dw_sq = (
            torch.zeros(size, dtype=wide, device=dy.device) if want_weight else None
            for size in ((out * size1, size2), (out * size1, size2))
        )
        dy_all, x1_all, x2_all = rows(dy), rows(x1), rows(x2)
        batch, positions = dy_all.shape[:2]
        matrix = weight.view(out * size1, size2).to(wide)
        # The outer products of a few examples at a time.
        step = chunk_rows(batch, positions * out * size1)
        for begin in range(0, batch, step):
            part = slice(begin, begin + step)
            g, a, b = (t[part].to(wide) for t in (dy_all, x1_all, x2_all))
            outer = _outer(g, a)
            if dw is not None and dw_sq is not None:
                grad, square, _, _ = ops.linear_moments(outer, b, False, wide)
                dw += grad
                dw_sq += square
            if dx2 is not None:
                dx2[part] = (outer @ matrix).view(dx2[part].shape)
            if dx1 is not None:
                through = (b @ matrix.t()).unflatten(2, (out, size1))
                dx1[part] = (g.unsqueeze(2) @ through).view(dx1[part].shape)
        db, db_sq = ops.bias_moments(dy_all, ctx.grad_dtype) if want_bias else (None, None)
        db_sq = add_small(ctx.call, 1, db_sq, lambda: sum_positions(dy_all))
        shape = weight.shape
        if dw_sq is not None:
            dw_sq = add_uses(ctx.call, 0, dw_sq.view(shape), _weight_grad, dy_all, x1_all, x2_all)
        return (
            dx1,
            dx2,
            None if dw is None else dw.view(shape).to(ctx.grad_dtype),
            db,
            dw_sq,
            db_sq,
            one_use(dy, want_uses),
        )


def _outer(dy: Tensor, x1: Tensor) -> Tensor:
    """(B, T, O), (B, T, I) -> (B, T, O I)."""
    return (dy.unsqueeze(3) * x1.unsqueeze(2)).flatten(2)


def _weight_grad(dy: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """(O I, J), of all examples together."""
    wide = accumulate_dtype(dy.dtype)
    outer = _outer(dy.to(wide), x1.to(wide))
    return outer.flatten(0, 1).t().mm(x2.to(wide).flatten(0, 1))


def bilinear(
    x1: Tensor,
    x2: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | Call | None,
) -> Tensor:
    """``F.bilinear(x1, x2, weight, bias)`` with second moments. x1: (B, ..., I), x2: (B, ..., J)."""
    # Autocast leaves this one in the widest of the dtypes, as it does stock PyTorch's.
    _, context = autocast(x1, low_precision=False)
    check_dtype("Bilinear", x1, weight, context)
    dtype = torch.promote_types(torch.promote_types(x1.dtype, x2.dtype), weight.dtype)
    with context:
        return _Bilinear.apply(x1.to(dtype), x2.to(dtype), weight, bias, weight_leaf, bias_leaf, uses)
