"""Sums over examples: of a bias' gradient (MATHS 3), and of any [B, *shape] gradient (MATHS 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import Moments, accumulate_dtype, check_floating, check_tensor, chunk_rows, empty_moments, register

__all__ = ["bias_moments", "reduce_moments"]


def _bias_reference(dy: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    batch, positions, outputs = dy.shape
    moments = Moments((outputs,), dy)
    step = chunk_rows(batch, positions * outputs)
    for b in range(0, batch, step):
        moments.add(dy[b : b + step].to(accumulate_dtype(dy.dtype)).sum(1))
    return moments.result(dtype or dy.dtype)


def _bias_fake(dy: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return empty_moments((dy.shape[2],), dy, dtype or dy.dtype)


_bias_op = register(
    "bias_moments(Tensor dy, ScalarType? dtype=None) -> (Tensor db, Tensor db_sq)", _bias_reference, _bias_fake
)


def bias_moments(dy: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Gradient of a bias and its per-example second moment: ``G_b[o] = sum_t dy[b,t,o]`` (MATHS 3).

    Args:
        dy: (B, T, O)  gradient with respect to the output, of any strides.
        dtype: of the gradient; that of `dy` by default.

    Returns:
        db (O,), db_sq (O,).

    Equivalent to::

        G = dy.sum(1)
        G.sum(0), G.square().sum(0)
    """
    check_tensor("bias_moments", "dy", dy, "of shape (B, T, O)", isinstance(dy, Tensor) and dy.dim() == 3)
    check_floating("bias_moments", dtype, dy=dy)
    return _bias_op(dy, dtype)


def _reduce_reference(grad: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    moments = Moments(tuple(grad.shape[1:]), grad)
    step = chunk_rows(grad.shape[0], grad[:1].numel())
    for b in range(0, grad.shape[0], step):
        moments.add(grad[b : b + step].to(accumulate_dtype(grad.dtype)))
    return moments.result(dtype or grad.dtype)


def _reduce_fake(grad: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return empty_moments(tuple(grad.shape[1:]), grad, dtype or grad.dtype)


_reduce_op = register(
    "reduce_moments(Tensor grad, ScalarType? dtype=None) -> (Tensor sum, Tensor sum_sq)",
    _reduce_reference,
    _reduce_fake,
)


def reduce_moments(grad: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Sum, and sum of squares, over the examples of per-example gradients (MATHS 8).

    Args:
        grad: (B, *shape)  one gradient per example.
        dtype: of the sum; that of `grad` by default.

    Returns:
        sum (*shape), sum_sq (*shape).

    Equivalent to::

        grad.sum(0), grad.square().sum(0)
    """
    check_tensor("reduce_moments", "grad", grad, "of shape (B, *shape)", isinstance(grad, Tensor) and grad.dim() >= 1)
    check_floating("reduce_moments", dtype, grad=grad)
    return _reduce_op(grad, dtype)
