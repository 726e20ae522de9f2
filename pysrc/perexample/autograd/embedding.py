"""The Functions of Embedding and EmbeddingBag (MATHS 6)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..moments.uses import Call
from ..ops._library import accumulate_dtype
from ..ops.embedding import bag_lengths, bag_positions
from ._common import add_uses, call_of, once_differentiable, one_use, ops

__all__ = ["embedding", "embedding_bag"]


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
        if indices.dim() != 2:
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


class _EmbeddingBag(Function):
    """MATHS (6): an index of a bag has the bag's gradient, weighted. indices: (N,), offsets: (B,) -> (B, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        factors: Tensor | None,
        weight_leaf: Tensor | None,
        uses: Tensor | Call | None,
        indices: Tensor,
        offsets: Tensor,
        mode: str,
        padding_idx: int | None,
        length: int | None,
    ) -> Tensor:
        ctx.call = call_of(uses, "other")
        ctx.mode, ctx.padding_idx, ctx.length = mode, -1 if padding_idx is None else padding_idx, length
        y, _, sizes, largest = torch.embedding_bag(
            weight, indices, offsets, False, _MODES.index(mode), False, factors, False, padding_idx
        )
        # Where bags are alike, and every index counts once, an embedding with one dy for all that a bag looks up.
        ctx.alike = mode != "max" and bool(length) and factors is None and padding_idx is None
        if ctx.alike:
            ctx.rows, ctx.grad_dtype = weight.shape[0], weight.dtype
            ctx.save_for_backward(indices)
        else:
            ctx.save_for_backward(weight, factors, indices, offsets, sizes, largest if mode == "max" else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.alike:
            return _alike_bags(ctx, dy)
        weight, factors, indices, offsets, sizes, largest = ctx.saved_tensors
        want_factors, want_weight, want_uses = ctx.needs_input_grad[1:4]
        dw = dw_sq = dfactors = None
        if want_factors:
            bag_of = torch.repeat_interleave(
                torch.arange(len(offsets), device=dy.device).to(offsets.dtype),
                bag_lengths(indices, offsets),
                output_size=indices.numel(),
            )
            dfactors = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                dy, weight, indices, offsets, bag_of, _MODES.index(ctx.mode), ctx.padding_idx
            )
        if want_weight and ctx.mode == "max":
            # Each element of a bag comes from one row: nothing to add before squaring.
            wide = accumulate_dtype(dy.dtype)
            g = (dy * (sizes > 0).unsqueeze(1)).to(wide)
            zeros, largest = torch.zeros(weight.shape, dtype=wide, device=dy.device), largest.long()
            dw = zeros.scatter_add(0, largest, g).to(weight.dtype)
            dw_sq = zeros.scatter_add_(0, largest, g.square())

            def one(largest: Tensor, g: Tensor) -> Tensor:
                return g.new_zeros(weight.shape).scatter_add_(0, largest, g)

            dw_sq = add_uses(ctx.call, 0, dw_sq, one, largest, g)
        elif want_weight:
            bags = (
                dy,
                factors,
                indices,
                offsets,
                sizes if ctx.mode == "mean" else None,
                weight.shape[0],
                ctx.padding_idx,
                ctx.length,
            )
            dw, dw_sq = ops.bag_moments(*bags, weight.dtype)
            shared = None if ctx.call is None else ctx.call.shared(0)
            if shared is not None:
                positions, table, filler = bag_positions(*bags)
                nothing = table == filler
                positions, table = positions.masked_fill(nothing[..., None], 0), table.masked_fill(nothing, 0)
                dw_sq = shared.add_rows(None, positions, table, -1, dw_sq)
        return dw, dfactors, dw_sq, one_use(dy, want_uses), None, None, None, None, None


_MODES = ("sum", "mean", "max")


def _alike_bags(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The backward of bags of sums or means of `ctx.length` indices each."""
    (indices,) = ctx.saved_tensors
    table = indices.view(-1, ctx.length)
    if ctx.mode == "mean":
        dy = dy / ctx.length
    positions = dy.unsqueeze(1).expand(-1, ctx.length, -1)
    dw, dw_sq = ops.embedding_moments(positions, table, ctx.rows, -1, ctx.grad_dtype)
    shared = None if ctx.call is None else ctx.call.shared(0)
    if shared is not None:
        dw_sq = shared.add_rows(None, positions, table, -1, dw_sq)
    return dw, None, dw_sq, one_use(dy, ctx.needs_input_grad[3]), None, None, None, None, None


def embedding_bag(
    weight: Tensor,
    factors: Tensor | None,
    weight_leaf: Tensor | None,
    uses: Tensor | Call | None,
    indices: Tensor,
    offsets: Tensor,
    mode: str,
    padding_idx: int | None,
    length: int | None = None,
) -> Tensor:
    """``F.embedding_bag`` with second moments; each bag is an example.

    Args:
        weight: (V, D).
        factors: (N,)  the weight of each index in its bag, for `mode` "sum"; or None.
        weight_leaf, uses: the leaves of `weight`, and of the number of uses.
        indices: (N,)  of all bags.
        offsets: (B,)  where each bag begins.
        mode: "sum", "mean" or "max".
        padding_idx: an index that counts for nothing, or None.
        length: of all bags; None where they differ, or to look.
    """
    return _EmbeddingBag.apply(weight, factors, weight_leaf, uses, indices, offsets, mode, padding_idx, length)
