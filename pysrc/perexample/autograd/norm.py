"""The Functions of the norms (MATHS 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..moments.uses import Call
from ..ops._library import accumulate_dtype
from ._common import add_uses, apply, call_of, once_differentiable, one_use, ops, owned, shaped

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def _statistics(x: Tensor, mean: Tensor, rstd: Tensor, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """What the norm's op takes: statistics in the accumulation dtype, or None where only rounded ones exist."""
    if mean.dtype != accumulate_dtype(x.dtype) or x.dtype != mean.dtype:
        return None, None
    return shaped(mean, shape), shaped(rstd, shape)


def _positions(x: Tensor, normalized: int, batch_dim: int) -> Tensor:
    """(B, ..., *normalized) -> (B, T, D)."""
    if batch_dim:
        x = x.movedim(batch_dim, 0)
    if normalized == 1 and x.dim() == 3:
        return x
    split = x.dim() - normalized
    return x.reshape(x.shape[0], x.shape[1:split].numel(), x.shape[split:].numel())


def _unflatten(dx: Tensor, like: Tensor, batch_dim: int) -> Tensor:
    """The reverse of `_positions`, to the shape of `like`."""
    if not batch_dim:
        return shaped(dx, like.shape)
    return dx.reshape(like.movedim(batch_dim, 0).shape).movedim(0, batch_dim)


class _LayerNorm(Function):
    """MATHS (7). x: (B, ..., *normalized_shape), the batch as `batch_dim`; weight, bias: normalized_shape or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | Call | None,
        normalized_shape: Sequence[int],
        eps: float,
        batch_dim: int,
    ) -> Tensor:
        ctx.call = call_of(uses, "other", "other")
        ctx.eps, ctx.normalized, ctx.batch_dim = eps, len(normalized_shape), batch_dim
        y, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        want = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
        shape = x.shape[x.dim() - ctx.normalized :]
        rows = _positions(x, ctx.normalized, ctx.batch_dim)
        if mean.dtype != accumulate_dtype(x.dtype) or x.dtype != mean.dtype:
            mean = rstd = None  # rounded ones: the op makes better ones
        else:
            mean, rstd = (_positions(s, ctx.normalized, ctx.batch_dim).squeeze(2) for s in (mean, rstd))
        tensors = (_positions(dy, ctx.normalized, ctx.batch_dim), rows, mean, rstd)
        rest = (None if weight is None else weight.flatten(), ctx.eps)
        results = _moments(ctx.call, ops.layer_norm_moments, tensors, rest, want)
        grads = _norm_grads(results, want, shape)
        dx = _unflatten(results[0], x, ctx.batch_dim) if want[0] else None
        return (dx, *grads, one_use(dy, ctx.needs_input_grad[5]), None, None, None)


def _half_precision_eps(dtype: torch.dtype) -> float:
    """What ``F.rms_norm(eps=None)`` uses: the eps of float32, or in older versions that of `dtype`. Asked once."""
    small = F.rms_norm(torch.full((1,), 2.0**-9, dtype=dtype), (1,))
    return torch.finfo(torch.float32 if small.item() > 0.5 else dtype).eps


_DEFAULT_EPS = {dtype: _half_precision_eps(dtype) for dtype in (torch.bfloat16, torch.float16)}


class _RMSNorm(Function):
    """MATHS (7). x: (B, ..., *normalized_shape), the batch as `batch_dim`; weight: normalized_shape or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        weight_leaf: Tensor | None,
        uses: Tensor | Call | None,
        normalized_shape: Sequence[int],
        eps: float,
        batch_dim: int,
    ) -> Tensor:
        ctx.call = call_of(uses, "other")
        ctx.eps, ctx.normalized, ctx.batch_dim = eps, len(normalized_shape), batch_dim
        ctx.save_for_backward(x, weight)
        return F.rms_norm(x, normalized_shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        want = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        shape = x.shape[x.dim() - ctx.normalized :]
        rows = _positions(x, ctx.normalized, ctx.batch_dim)
        tensors = (_positions(dy.to(x.dtype), ctx.normalized, ctx.batch_dim), rows)
        rest = (None, None if weight is None else weight.flatten(), ctx.eps)
        dx, dw, dw_sq = _moments(ctx.call, ops.rms_norm_moments, tensors, rest, want)
        return (
            _unflatten(dx, x, ctx.batch_dim) if want[0] else None,
            shaped(dw, shape) if want[1] else None,
            shaped(dw_sq, shape) if want[1] and dw_sq is not None else None,
            one_use(dy, ctx.needs_input_grad[3]),
            None,
            None,
            None,
        )


def _moments(
    call: Call | None,
    op: Callable[..., Any],
    tensors: tuple[Tensor | None, ...],
    rest: tuple[Any, ...],
    want: Sequence[bool],
) -> Sequence[Any]:
    """``op(*tensors, *rest, want)``, with what goes to the leaves where a parameter was used more than once.

    `tensors` have the batch as dimension 0. The op returns dx, and for each parameter wanted its moments.
    """
    results = op(*tensors, *rest, want)
    if call is None:
        return results
    shared = [i for i in range(len(want) - 1) if want[1 + i] and call.shared(i) is not None]
    if shared:
        results = list(results)
        for which in shared:
            alone = [place == 1 + which for place in range(len(want))]

            def grad(*one: Tensor | None, place: int = 1 + 2 * which, alone: list[bool] = alone) -> Tensor:
                return op(*one, *rest, alone)[place]

            results[2 + 2 * which] = add_uses(call, which, results[2 + 2 * which], grad, *tensors)
    return results


def _norm_grads(results: Sequence[Any], want: Sequence[bool], shape: Sequence[int]) -> tuple[Tensor | None, ...]:
    """The gradients of weight, bias and their leaves."""
    _, dw, dw_sq, db, db_sq = results
    return (
        shaped(dw, shape) if want[1] else None,
        shaped(db, shape) if want[2] else None,
        shaped(dw_sq, shape) if want[1] and dw_sq is not None else None,
        shaped(db_sq, shape) if want[2] and db_sq is not None else None,
    )


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | Call | None,
    normalized_shape: Sequence[int],
    eps: float,
    batch_dim: int = 0,
) -> Tensor:
    """``F.layer_norm`` with second moments. x: (B, ..., *normalized_shape), the batch as dimension `batch_dim`."""
    rest = bias, weight_leaf, bias_leaf, uses, list(normalized_shape), eps, batch_dim
    return apply(_LayerNorm, "LayerNorm", x, weight, *rest, low_precision=False)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    weight_leaf: Tensor | None,
    uses: Tensor | Call | None,
    normalized_shape: Sequence[int],
    eps: float | None,
    batch_dim: int = 0,
) -> Tensor:
    """``F.rms_norm`` with second moments. x: (B, ..., *normalized_shape), the batch as dimension `batch_dim`."""
    if eps is None:
        eps = _DEFAULT_EPS.get(x.dtype, torch.finfo(x.dtype).eps)
    return _RMSNorm.apply(x, weight, weight_leaf, uses, list(normalized_shape), eps, batch_dim)


def _channel_grads(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    op: Callable[..., Any],
    statistics: tuple[Tensor | None, ...],
    rest: tuple[Any, ...],
) -> tuple[Tensor | None, ...]:
    """Of norms of x (B, C, ...) with parameters (C,): the gradients of x, of these, of their leaves and of the uses."""
    want = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
    channels = x.shape[1]
    rows = (x.shape[0], channels, x.shape[2:].numel())
    results = _moments(ctx.call, op, (dy.reshape(rows), x.reshape(rows), *statistics), rest, want)
    dx = results[0].reshape(x.shape) if want[0] else None
    return (dx, *_norm_grads(results, want, (channels,)), one_use(dy, ctx.needs_input_grad[5]))


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
        uses: Tensor | Call | None,
        groups: int,
        eps: float,
    ) -> Tensor:
        ctx.call = call_of(uses, "other", "other")
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
        statistics = _statistics(x, mean, rstd, (x.shape[0], ctx.groups))
        rest = (weight, ctx.groups, ctx.eps)
        return (*_channel_grads(ctx, dy, x, ops.group_norm_moments, statistics, rest), None, None)


class _InstanceNorm(Function):
    """MATHS (7): GroupNorm with a group for each channel. x: (B, C, ...), weight and bias: (C,) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | Call | None,
        eps: float,
    ) -> Tensor:
        ctx.call = call_of(uses, "other", "other")
        ctx.eps = eps
        batch, channels = x.shape[:2]
        # F.instance_norm as well is batch norm of one example with B C channels.
        y, mean, rstd = torch.native_batch_norm(
            x.reshape(1, batch * channels, *x.shape[2:]),
            None if weight is None else weight.repeat(batch),
            None if bias is None else bias.repeat(batch),
            None,
            None,
            True,
            0.0,
            eps,
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return owned(y.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels = x.shape[:2]
        statistics = _statistics(x, mean, rstd, (batch, channels))
        rest = (weight, channels, ctx.eps)
        return (*_channel_grads(ctx, dy, x, ops.group_norm_moments, statistics, rest), None)


class _BatchNorm(Function):
    """MATHS (7) with constant statistics. x: (B, C, ...), mean and variance: (C,), weight and bias: (C,) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | Call | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.call = call_of(uses, "other", "other")
        wide = accumulate_dtype(x.dtype)
        ctx.save_for_backward(x, weight, mean.to(wide), (variance.to(wide) + eps).rsqrt())
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        return (*_channel_grads(ctx, dy, x, ops.batch_norm_moments, (), (mean, rstd, weight)), None, None, None)


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
    uses: Tensor | Call | None,
    groups: int,
    eps: float,
) -> Tensor:
    """``F.group_norm`` with second moments. x: (B, C, ...)."""
    rest = bias, weight_leaf, bias_leaf, uses, groups, eps
    return apply(_GroupNorm, "GroupNorm", x, weight, *rest, low_precision=False)


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | Call | None,
    eps: float,
) -> Tensor:
    """``F.instance_norm`` by the statistics of the input, with second moments. x: (B, C, ...)."""
    return _InstanceNorm.apply(x, weight, bias, weight_leaf, bias_leaf, uses, eps)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | Call | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Tensor:
    """``F.batch_norm`` in eval mode with second moments. x: (B, C, ...); mean, variance: (C,), constants."""
    return _BatchNorm.apply(x, weight, bias, weight_leaf, bias_leaf, uses, mean, variance, eps)
