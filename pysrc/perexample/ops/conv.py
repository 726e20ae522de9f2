"""Convolution (MATHS 5): linear (3) with x unfolded on the fly, t running over the output positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import Moments, accumulate_dtype, check_floating, check_tensor, empty_moments, register

__all__ = ["conv_moments"]


def _weight_shape(dy: Tensor, x: Tensor, kernel_size: Sequence[int], groups: int) -> tuple[int, ...]:
    return (dy.shape[1], x.shape[1] // groups, *kernel_size)


def _reference(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = dtype or dy.dtype
    wide = accumulate_dtype(dy.dtype)
    shape = _weight_shape(dy, x, kernel_size, groups)
    weight = Moments(shape, dy)
    column = Moments((shape[0] if bias else 0,), dy)
    like = torch.empty(shape, dtype=wide, device=dy.device)
    for b in range(dy.shape[0]):
        dy_b, x_b = dy[b : b + 1].to(wide), x[b : b + 1].to(wide)
        if dy_b.numel() == 0:
            continue
        _, grad, _ = torch.ops.aten.convolution_backward(
            dy_b,
            x_b,
            like,
            None,
            list(stride),
            list(padding),
            list(dilation),
            False,
            [0] * len(kernel_size),
            groups,
            [False, True, False],
        )
        weight.add(grad.unsqueeze(0))
        if bias:
            column.add(dy_b.flatten(2).sum(2))
    return (*weight.result(dtype), *column.result(dtype))


def _fake(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = dtype or dy.dtype
    return (
        *empty_moments(_weight_shape(dy, x, kernel_size, groups), dy, dtype),
        *empty_moments((dy.shape[1] if bias else 0,), dy, dtype),
    )


_op = register(
    "conv_moments(Tensor dy, Tensor x, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " SymInt groups, bool bias, ScalarType? dtype=None) -> (Tensor dw, Tensor dw_sq, Tensor db, Tensor db_sq)",
    _reference,
    _fake,
)


def conv_moments(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight (and bias) gradient of a 1-, 2- or 3-d convolution and its per-example second moment (MATHS 5).

    Args:
        dy: (B, O, *out)  gradient with respect to the output, one to three spatial dimensions.
        x: (B, C, *in)  input; dtype and device of `dy`.
        kernel_size, stride, padding, dilation: one integer per spatial dimension; zero padding.
        groups: as in torch.nn.Conv2d; C and O are multiples of it.
        bias: also the bias' moments.
        dtype: of the gradients; that of `dy` by default.

    Returns:
        dw (O, C / groups, *kernel_size), dw_sq (like dw), db (O,), db_sq (O,); the last two have no elements
        unless `bias`. Second moments are float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    name = "conv_moments"
    check_tensor(
        name, "dy", dy, "of shape (B, O, *out), 3 to 5 dimensions", isinstance(dy, Tensor) and 3 <= dy.dim() <= 5
    )
    batch, outputs = dy.shape[:2]
    check_tensor(
        name,
        "x",
        x,
        f"(B={batch}, C, *in) of {dy.dim()} dimensions",
        isinstance(x, Tensor) and x.dim() == dy.dim() and x.shape[0] == batch,
    )
    check_floating(name, dtype, dy=dy, x=x)
    spatial = dy.dim() - 2
    for argument, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(values) != spatial or any(v < least for v in values):
            raise ValueError(f"{name}: {argument} must be {spatial} integers >= {least}, got {tuple(values)}")
    if groups < 1 or x.shape[1] % groups or outputs % groups:
        raise ValueError(f"{name}: groups must divide C={x.shape[1]} and O={outputs}, got {groups}")
    expected = tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    )
    check_tensor(name, "dy", dy, f"(B={batch}, O={outputs}, *out={expected})", tuple(dy.shape[2:]) == expected)
    return _op(dy, x, list(kernel_size), list(stride), list(padding), list(dilation), groups, bias, dtype)
