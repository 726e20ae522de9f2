"""The Functions of the norms (MATHS 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops._library import accumulate_dtype
from ._common import autocast, one_use, ops

__all__ = ["group_norm", "layer_norm"]


def _statistics(x: Tensor, mean: Tensor, rstd: Tensor, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """What the norm's op takes: statistics in the accumulation dtype, or None where only rounded ones exist."""
    if mean.dtype != accumulate_dtype(x.dtype) or x.dtype != mean.dtype:
        return None, None
    return mean.reshape(shape), rstd.reshape(shape)


class _LayerNorm(Function):
    """MATHS (7). x: (B, ..., *normalized_shape), weight and bias: normalized_shape or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | None,
        normalized_shape: Sequence[int],
        eps: float,
    ) -> Tensor:
        ctx.eps, ctx.normalized = eps, len(normalized_shape)
        y, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        want = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
        normalized = x.shape[x.dim() - ctx.normalized :]
        width = normalized.numel()
        positions = x.shape[1 : x.dim() - ctx.normalized].numel()
        rows = (x.shape[0], positions, width)
        results = ops.layer_norm_moments(
            dy.reshape(rows),
            x.reshape(rows),
            *_statistics(x, mean, rstd, rows[:2]),
            None if weight is None else weight.reshape(width),
            ctx.eps,
            want,
        )
        return (*_norm_grads(results, want, x.shape, normalized), one_use(dy, ctx.needs_input_grad[5]), None, None)


def _norm_grads(
    results: Sequence[Tensor], want: Sequence[bool], x_shape: Sequence[int], shape: Sequence[int]
) -> tuple[Tensor | None, ...]:
    dx, dw, dw_sq, db, db_sq = results
    return (
        dx.reshape(x_shape) if want[0] else None,
        dw.reshape(shape) if want[1] else None,
        db.reshape(shape) if want[2] else None,
        dw_sq.reshape(shape) if want[1] else None,
        db_sq.reshape(shape) if want[2] else None,
    )


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | None,
    normalized_shape: Sequence[int],
    eps: float,
) -> Tensor:
    """``F.layer_norm`` with second moments. x: (B, ..., *normalized_shape)."""
    dtype, context = autocast(x, low_precision=False)
    with context:
        return _LayerNorm.apply(x.to(dtype), weight, bias, weight_leaf, bias_leaf, uses, list(normalized_shape), eps)


class _GroupNorm(Function):
    """MATHS (7). x: (B, C, ...), weight and bias: (C,) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | None,
        groups: int,
        eps: float,
    ) -> Tensor:
        ctx.groups, ctx.eps = groups, eps
        batch, channels = x.shape[:2]
        positions = x.shape[2:].numel()
        # F.group_norm chooses the layout of x in the same way: channels_last stays what it is.
        y, mean, rstd = torch.native_group_norm(
            x if _is_channels_last(x) else x.contiguous(), weight, bias, batch, channels, positions, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        want = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
        batch, channels = x.shape[:2]
        rows = (batch, channels, x.shape[2:].numel())
        results = ops.group_norm_moments(
            dy.reshape(rows),
            x.reshape(rows),
            *_statistics(x, mean, rstd, (batch, ctx.groups)),
            weight,
            ctx.groups,
            ctx.eps,
            want,
        )
        return (*_norm_grads(results, want, x.shape, (channels,)), one_use(dy, ctx.needs_input_grad[5]), None, None)


def _is_channels_last(x: Tensor) -> bool:
    return (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    """``F.group_norm`` with second moments. x: (B, C, ...)."""
    dtype, context = autocast(x, low_precision=False)
    with context:
        return _GroupNorm.apply(x.to(dtype), weight, bias, weight_leaf, bias_leaf, uses, groups, eps)
