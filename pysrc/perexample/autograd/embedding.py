"""The Function of Embedding (MATHS 6)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ._common import one_use, ops

__all__ = ["embedding"]


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
        dw, dw_sq = ops.embedding_moments(
            dy.reshape(batch, positions, dy.shape[-1]),
            indices.reshape(batch, positions),
            ctx.rows,
            ctx.padding_idx,
            ctx.grad_dtype,
        )
        return None, dw, dw_sq, one_use(dy, ctx.needs_input_grad[3]), None


def embedding(
    indices: Tensor, weight: Tensor, weight_leaf: Tensor, uses: Tensor | None, padding_idx: int | None
) -> Tensor:
    """``F.embedding`` with second moments. indices: (B, ...); may be an expanded view."""
    return _Embedding.apply(indices, weight, weight_leaf, uses, padding_idx)
