"""Linear (MATHS 3, 4): ``G_b[o,i] = sum_t dy[b,t,o] x[b,t,i]``, ``dw = sum_b G_b``, ``dw_sq = sum_b G_b**2``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import (
    Moments,
    accumulate_dtype,
    check_floating,
    check_tensor,
    chunk_rows,
    empty_moments,
    register,
)

__all__ = ["linear_moments"]


def _reference(
    dy: Tensor, x: Tensor, bias: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, _, outputs), inputs = dy.shape, x.shape[2]
    dtype = dtype or dy.dtype
    wide = accumulate_dtype(dy.dtype)
    weight = Moments((outputs, inputs), dy)
    column = Moments((outputs if bias else 0,), dy)
    step = chunk_rows(batch, outputs * inputs)
    for b in range(0, batch, step):
        dy_b, x_b = dy[b : b + step].to(wide), x[b : b + step].to(wide)
        weight.add(torch.einsum("bto,bti->boi", dy_b, x_b))
        if bias:
            column.add(dy_b.sum(1))
    return (*weight.result(dtype), *column.result(dtype))


def _fake(dy: Tensor, x: Tensor, bias: bool, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs, inputs = dy.shape[2], x.shape[2]
    dtype = dtype or dy.dtype
    return (
        *empty_moments((outputs, inputs), dy, dtype),
        *empty_moments((outputs if bias else 0,), dy, dtype),
    )


_op = register(
    "linear_moments(Tensor dy, Tensor x, bool bias, ScalarType? dtype=None)"
    " -> (Tensor dw, Tensor dw_sq, Tensor db, Tensor db_sq)",
    _reference,
    _fake,
)


def linear_moments(
    dy: Tensor, x: Tensor, bias: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight (and bias) gradient of a linear layer and its per-example second moment, in one pass (MATHS 3, 4).

    Args:
        dy: (B, T, O)  gradient with respect to the output.
        x: (B, T, I)  input; dtype and device of `dy`.
        bias: also the bias' moments.
        dtype: of the gradients; that of `dy` by default.

    Returns:
        dw (O, I), dw_sq (O, I), db (O,), db_sq (O,); the last two have no elements unless `bias`. Second
        moments are float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Equivalent to::

        G = torch.einsum("bto,bti->boi", dy, x)
        G.sum(0), G.square().sum(0), dy.sum(1).sum(0), dy.sum(1).square().sum(0)
    """
    check_tensor("linear_moments", "dy", dy, "of shape (B, T, O)", isinstance(dy, Tensor) and dy.dim() == 3)
    batch, positions = dy.shape[:2]
    check_tensor(
        "linear_moments",
        "x",
        x,
        f"(B={batch}, T={positions}, I)",
        isinstance(x, Tensor) and x.dim() == 3 and x.shape[:2] == dy.shape[:2],
    )
    check_floating("linear_moments", dtype, dy=dy, x=x)
    return _op(dy, x, bias, dtype)
