"""The Function that gives each example its own copy of a parameter (MATHS 8)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..moments.uses import Call
from ._common import add_small, call_of, once_differentiable, one_use, ops

__all__ = ["expand"]


class _Expand(Function):
    """MATHS (8). parameter: (*shape) -> (batch, *shape), a view, or with `whole`, of one example or none, (*shape)."""

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, leaf: Tensor | None, uses: Tensor | Call | None, batch: int, whole: bool
    ) -> Tensor:
        ctx.call = call_of(uses, "other")
        ctx.dtype, ctx.whole = parameter.dtype, whole
        return parameter.detach() if whole else parameter.expand(batch, *parameter.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        want, _, want_uses = ctx.needs_input_grad[:3]
        grad = grad[None] if ctx.whole else grad
        total, total_sq = ops.reduce_moments(grad, ctx.dtype) if want else (None, None)
        total_sq = add_small(ctx.call, 0, total_sq, lambda: grad.reshape(grad.shape[0], grad.shape[1:].numel()))
        return total, total_sq, one_use(grad, want_uses), None, None


def expand(
    parameter: Tensor, leaf: Tensor | None, uses: Tensor | Call | None, batch: int, whole: bool = False
) -> Tensor:
    """`parameter` once for each of `batch` examples, (batch, *shape), with second moments.

    With `whole`, for one example or none, `parameter` as it is.
    """
    return _Expand.apply(parameter, leaf, uses, batch, whole)
