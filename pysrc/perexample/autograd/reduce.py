"""A parameter as one copy for each example (MATHS 8)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ._common import one_use, ops

__all__ = ["expand"]


class _Expand(Function):
    """MATHS (8). parameter: (*shape) -> (batch, *shape), a view."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, leaf: Tensor | None, uses: Tensor | None, batch: int) -> Tensor:
        ctx.dtype = parameter.dtype
        return parameter.expand(batch, *parameter.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        want, _, want_uses = ctx.needs_input_grad[:3]
        total, total_sq = ops.reduce_moments(grad, ctx.dtype) if want else (None, None)
        return total, total_sq, one_use(grad, want_uses), None


def expand(parameter: Tensor, leaf: Tensor | None, uses: Tensor | None, batch: int) -> Tensor:
    """`parameter` once for each of `batch` examples, (batch, *shape), with second moments."""
    return _Expand.apply(parameter, leaf, uses, batch)
