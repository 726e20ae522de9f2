"""The Function of the convolutions (MATHS 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..moments.uses import Call
from ._common import add_small, add_uses, apply, call_of, cast, once_differentiable, one_use, ops, sum_positions

__all__ = ["conv", "conv_transpose"]


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
        uses: Tensor | Call | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        ctx.call = call_of(uses, "other", "other")
        ctx.geometry = (list(stride), list(padding), list(dilation), groups)
        ctx.grad_dtype = weight.dtype
        weight = cast(weight, x.dtype)
        ctx.save_for_backward(x, weight)
        bias = None if bias is None else cast(bias, x.dtype)
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
            dw, dw_sq, db, db_sq = ops.conv_moments(
                dy, x, list(weight.shape[2:]), stride, padding, dilation, groups, want_bias, ctx.grad_dtype
            )
        elif want_bias:
            db, db_sq = ops.bias_moments(dy.flatten(2).transpose(1, 2), ctx.grad_dtype)
        if not want_bias:
            db = db_sq = None
        if ctx.call is not None:
            kernel = list(weight.shape[2:])

            def one_weight(dy: Tensor, x: Tensor) -> Tensor:
                return ops.conv_moments(dy, x, kernel, stride, padding, dilation, groups, False, None)[0]

            dw_sq = add_uses(ctx.call, 0, dw_sq, one_weight, dy, x)
            db_sq = add_small(ctx.call, 1, db_sq, lambda: sum_positions(dy.flatten(2).transpose(1, 2)))
        return dx, dw, db, dw_sq, db_sq, one_use(dy, want_uses), None, None, None, None


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | Call | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``F.conv1d/2d/3d`` with second moments. x: (B, C, *in); zero padding of as many integers as dimensions."""
    leaves = weight_leaf, bias_leaf, uses
    return apply(_Conv, "Conv", x, weight, bias, *leaves, stride, padding, dilation, groups)


class _ConvTranspose(Function):
    """MATHS (5), x and dy in exchanged roles. x: (B, C, *in), weight: (C, O / groups, *kernel) -> (B, O, *out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        uses: Tensor | Call | None,
        stride: Sequence[int],
        padding: Sequence[int],
        output_padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        ctx.call = call_of(uses, "other", "other")
        ctx.geometry = (list(stride), list(padding), list(output_padding), list(dilation), groups)
        ctx.grad_dtype = weight.dtype
        weight = cast(weight, x.dtype)
        ctx.save_for_backward(x, weight)
        bias = None if bias is None else cast(bias, x.dtype)
        return torch.convolution(x, weight, bias, stride, padding, dilation, True, output_padding, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, output_padding, dilation, groups = ctx.geometry
        want_x, _, _, want_weight, want_bias, want_uses = ctx.needs_input_grad[:6]
        dx = dw = db = dw_sq = db_sq = None
        if want_x:
            dx, _, _ = torch.ops.aten.convolution_backward(
                dy, x, weight, None, stride, padding, dilation, True, output_padding, groups, [True, False, False]
            )
        if want_weight:
            # The forward pass is the input gradient of a convolution that takes (B, O, *out) to (B, C, *in). Where the
            # output padding reaches a stride, that convolution has positions that x has not: zeros.
            extra = [p // s for p, s in zip(output_padding, stride, strict=True)]
            if any(extra):
                x = F.pad(x, [n for size in reversed(extra) for n in (0, size)])
            rest = (list(weight.shape[2:]), stride, padding, dilation, groups, False)
            dw, dw_sq, _, _ = ops.conv_moments(x, dy, *rest, ctx.grad_dtype)
            dw_sq = add_uses(ctx.call, 0, dw_sq, lambda x, dy: ops.conv_moments(x, dy, *rest, None)[0], x, dy)
        if want_bias:
            db, db_sq = ops.bias_moments(dy.flatten(2).transpose(1, 2), ctx.grad_dtype)
            db_sq = add_small(ctx.call, 1, db_sq, lambda: sum_positions(dy.flatten(2).transpose(1, 2)))
        return dx, dw, db, dw_sq, db_sq, one_use(dy, want_uses), None, None, None, None, None


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_leaf: Tensor | None,
    bias_leaf: Tensor | None,
    uses: Tensor | Call | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``F.conv_transpose1d/2d/3d`` with second moments. x: (B, C, *in)."""
    leaves = weight_leaf, bias_leaf, uses
    rest = stride, padding, output_padding, dilation, groups
    return apply(_ConvTranspose, "ConvTranspose", x, weight, bias, *leaves, *rest)
