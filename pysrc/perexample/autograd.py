"""The autograd Functions: save, call the ops, return (dx, dw, ..., second moments).

Each takes, beside the parameters, their leaves (see `moments`), and returns the second moment as the leaf's
gradient. A parameter and its leaf are wanted together: where the leaf is None the parameter is frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .moments import accumulate_dtype

__all__ = ["conv", "count_examples", "embedding", "group_norm", "layer_norm", "linear"]

_ops = torch.ops.perexample


def _autocast(x: Tensor, *, low_precision: bool) -> tuple[torch.dtype, contextlib.AbstractContextManager[Any]]:
    """The dtype in which autocast would compute, and a context without autocast to do it in.

    Matrix products and convolutions run in the autocast dtype, norms on CUDA in float32. The cast of the weight is
    made inside the Function, so that the weight's gradient arrives in the weight's own dtype unrounded.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64 or not x.is_floating_point():
        return x.dtype, contextlib.nullcontext()
    if low_precision:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.float32 if device == "cuda" else x.dtype
    return dtype, torch.autocast(device, enabled=False)


def _check_dtype(layer: str, x: Tensor, weight: Tensor, context: object) -> None:
    if x.dtype != weight.dtype and isinstance(context, contextlib.nullcontext):
        raise TypeError(f"{layer}: the input must be {weight.dtype} like the weight, got {x.dtype}")


class _Linear(Function):
    """MATHS (3), (4). x: (B, ..., I), weight: (O, I), bias: (O,) or None -> (B, ..., O)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | None,
    ) -> Tensor:
        ctx.grad_dtype = weight.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x if weight_leaf is not None else None, weight)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        want_x, _, _, want_weight, want_bias, want_uses = ctx.needs_input_grad
        dx = dw = db = dw_sq = db_sq = None
        dy_rows = _rows(dy)
        if want_weight:
            dw, dw_sq, db, db_sq = _ops.linear_moments(dy_rows, _rows(x), want_bias, ctx.grad_dtype)
        elif want_bias:
            db, db_sq = _ops.bias_moments(dy_rows, ctx.grad_dtype)
        if want_x:
            dx = dy.matmul(weight)
        if not want_bias:
            db = db_sq = None
        return dx, dw, db, dw_sq, db_sq, _one_use(dy, want_uses)


def _one_use(dy: Tensor, wanted: bool) -> Tensor | None:
    return torch.ones((), device=dy.device) if wanted else None


def _rows(x: Tensor) -> Tensor:
    """(B, ..., D) -> (B, T, D), a view wherever the strides allow one."""
    return x.unsqueeze(1) if x.dim() == 2 else x if x.dim() == 3 else x.flatten(1, -2)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | None,
) -> Tensor:
    """``F.linear(x, weight, bias)`` with second moments. x: (B, ..., I)."""
    dtype, context = _autocast(x, low_precision=True)
    _check_dtype("Linear", x, weight, context)
    with context:
        return _Linear.apply(x.to(dtype), weight, bias, weight_leaf, bias_leaf, uses)


class _Conv(Function):
    """MATHS (5). x: (B, C, *in), weight: (O, C / groups, *kernel), bias: (O,) or None -> (B, O, *out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        ctx.geometry = (list(stride), list(padding), list(dilation), groups)
        ctx.grad_dtype = weight.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        bias = None if bias is None else bias.to(x.dtype)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        want_x, _, _, want_weight, want_bias, want_uses = ctx.needs_input_grad[:6]
        dx = dw = db = dw_sq = db_sq = None
        if want_x:
            dx, _, _ = torch.ops.aten.convolution_backward(
                dy, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [True, False, False]
            )
        if want_weight:
            dw, dw_sq, db, db_sq = _ops.conv_moments(
                dy, x, list(weight.shape[2:]), stride, padding, dilation, groups, want_bias, ctx.grad_dtype
            )
        elif want_bias:
            db, db_sq = _ops.bias_moments(dy.flatten(2).transpose(1, 2), ctx.grad_dtype)
        if not want_bias:
            db = db_sq = None
        return dx, dw, db, dw_sq, db_sq, _one_use(dy, want_uses), None, None, None, None


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``F.conv1d/2d/3d`` with second moments. x: (B, C, *in); zero padding of as many integers as dimensions."""
    dtype, context = _autocast(x, low_precision=True)
    _check_dtype("Conv", x, weight, context)
    with context:
        return _Conv.apply(x.to(dtype), weight, bias, weight_leaf, bias_leaf, uses, stride, padding, dilation, groups)


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
        results = _ops.layer_norm_moments(
            dy.reshape(rows),
            x.reshape(rows),
            *_statistics(x, mean, rstd, rows[:2]),
            None if weight is None else weight.reshape(width),
            ctx.eps,
            want,
        )
        return (*_norm_grads(results, want, x.shape, normalized), _one_use(dy, ctx.needs_input_grad[5]), None, None)


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
    dtype, context = _autocast(x, low_precision=False)
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
        results = _ops.group_norm_moments(
            dy.reshape(rows),
            x.reshape(rows),
            *_statistics(x, mean, rstd, (batch, ctx.groups)),
            weight,
            ctx.groups,
            ctx.eps,
            want,
        )
        return (*_norm_grads(results, want, x.shape, (channels,)), _one_use(dy, ctx.needs_input_grad[5]), None, None)


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
    dtype, context = _autocast(x, low_precision=False)
    with context:
        return _GroupNorm.apply(x.to(dtype), weight, bias, weight_leaf, bias_leaf, uses, groups, eps)


class _Embedding(Function):
    """MATHS (6). indices: (B, ...), weight: (V, D) -> (B, ..., D)."""

    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, weight: Tensor, weight_leaf: Tensor, uses: Tensor | None, padding_idx: int | None
    ) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows, ctx.grad_dtype = weight.shape[0], weight.dtype
        ctx.padding_idx = -1 if padding_idx is None else padding_idx
        return F.embedding(indices, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        batch, positions = indices.shape[0], indices.shape[1:].numel()
        dw, dw_sq = _ops.embedding_moments(
            dy.reshape(batch, positions, dy.shape[-1]),
            indices.reshape(batch, positions),
            ctx.rows,
            ctx.padding_idx,
            ctx.grad_dtype,
        )
        return None, dw, dw_sq, _one_use(dy, ctx.needs_input_grad[3]), None


def embedding(
    indices: Tensor, weight: Tensor, weight_leaf: Tensor, uses: Tensor | None, padding_idx: int | None
) -> Tensor:
    """``F.embedding`` with second moments. indices: (B, ...); may be an expanded view."""
    return _Embedding.apply(indices, weight, weight_leaf, uses, padding_idx)


class _CountExamples(Function):
    """The identity on the model's outputs; each backward pass adds `batch` to the count and 1 to the passes."""

    @staticmethod
    def forward(ctx: Any, count: Tensor, passes: Tensor, batch: int, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.batch, ctx.dtype, ctx.device = batch, count.dtype, count.device
        ctx.set_materialize_grads(False)
        # An alias made by detach() is not a view to autograd, so the caller may go on to change it in place.
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        examples = torch.full((), ctx.batch, dtype=ctx.dtype, device=ctx.device)
        return examples, torch.ones((), device=ctx.device), None, *grads


def count_examples(count: Tensor, passes: Tensor, batch: int, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`outputs` unchanged; when any is backpropagated, `count` receives the gradient `batch`, and `passes` 1."""
    return _CountExamples.apply(count, passes, batch, *outputs)
