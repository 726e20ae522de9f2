"""The Function of Embedding (MATHS 6)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..moments.uses import Call
from ._common import call_of, one_use, ops

__all__ = ["embedding"]


class _Embedding(Function):
    """MATHS (6). indices: (B, ...), weight: (V, D) -> (B, ..., D)."""

    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        weight: Tensor,
        weight_leaf: Tensor,
        uses: Tensor | Call | None,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.call = call_of(uses, "rows")
        if ctx.call is not None:
            ctx.number = ctx.call.uses[0].look_up(indices.flatten(1) if indices.dim() > 1 else indices[:, None])
        ctx.save_for_backward(indices)
        ctx.rows, ctx.grad_dtype = weight.shape[0], weight.dtype
        ctx.padding_idx = -1 if padding_idx is None else padding_idx
        return F.embedding(indices, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        batch, positions = indices.shape[0], indices.shape[1:].numel()
        dy, indices = dy.reshape(batch, positions, dy.shape[-1]), indices.reshape(batch, positions)
        dw, dw_sq = ops.embedding_moments(dy, indices, ctx.rows, ctx.padding_idx, ctx.grad_dtype)
        uses = None if ctx.call is None else ctx.call.shared(0)
        if uses is not None:
            dw_sq = uses.add_rows(ctx.number, dy, indices, ctx.padding_idx, dw_sq)
        return None, dw, dw_sq, one_use(dy, ctx.needs_input_grad[3]), None


def embedding(
    indices: Tensor, weight: Tensor, weight_leaf: Tensor, uses: Tensor | Call | None, padding_idx: int | None
) -> Tensor:
    """``F.embedding`` with second moments. indices: (B, ...); may be an expanded view."""
    return _Embedding.apply(indices, weight, weight_leaf, uses, padding_idx)
