"""Embedding and bags (MATHS 6): rows of one example with the same index are added before squaring."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import Moments, accumulate_dtype, check_floating, check_tensor, empty_moments, register

__all__ = ["embedding_moments"]


def _reference(
    dy: Tensor, indices: Tensor, num_embeddings: int, padding_idx: int = -1, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    batch, _, width = dy.shape
    wide = accumulate_dtype(dy.dtype)
    moments = Moments((num_embeddings, width), dy)
    for b in range(batch):
        rows, position = torch.unique(indices[b], return_inverse=True)
        grad = torch.zeros((rows.shape[0], width), dtype=wide, device=dy.device)
        grad.index_add_(0, position, dy[b].to(wide))
        grad[rows == padding_idx] = 0
        moments.sum[rows] += grad
        moments.sum_sq[rows] += grad.square()
    return moments.result(dtype or dy.dtype)


def _fake(
    dy: Tensor, indices: Tensor, num_embeddings: int, padding_idx: int = -1, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    return empty_moments((num_embeddings, dy.shape[2]), dy, dtype or dy.dtype)


_op = register(
    "embedding_moments(Tensor dy, Tensor indices, SymInt num_embeddings, int padding_idx=-1, ScalarType? dtype=None)"
    " -> (Tensor dw, Tensor dw_sq)",
    _reference,
    _fake,
)


def embedding_moments(
    dy: Tensor, indices: Tensor, num_embeddings: int, padding_idx: int = -1, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of an embedding table and its per-example second moment (MATHS 6).

    Args:
        dy: (B, T, D)  gradient with respect to the output.
        indices: (B, T)  rows looked up, int32 or int64, in [0, num_embeddings).
        num_embeddings: V, rows of the table.
        padding_idx: a row that receives no gradient; negative for none.
        dtype: of the gradient; that of `dy` by default.

    Returns:
        dw (V, D), dw_sq (V, D).

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was expected and what came.
    """
    name = "embedding_moments"
    check_tensor(name, "dy", dy, "of shape (B, T, D)", isinstance(dy, Tensor) and dy.dim() == 3)
    check_floating(name, dtype, dy=dy)
    batch, positions = dy.shape[:2]
    check_tensor(
        name,
        "indices",
        indices,
        f"(B={batch}, T={positions})",
        isinstance(indices, Tensor) and indices.shape == dy.shape[:2],
    )
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: indices must be int32 or int64, got {indices.dtype}")
    if indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= num_embeddings:
            raise IndexError(f"{name}: indices must be in [0, {num_embeddings}), got {low if low < 0 else high}")
    return _op(dy, indices, num_embeddings, padding_idx, dtype)


def bag_lengths(indices: Tensor, offsets: Tensor) -> Tensor:
    """(B,), how many of the indices (N,) belong to each of the bags, which begin at the offsets (B,)."""
    return torch.diff(offsets, append=offsets.new_full((1,), indices.shape[0]))


def bag_positions(
    dy: Tensor,
    factors: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    sizes: Tensor | None,
    num_embeddings: int,
    padding_idx: int,
    length: int | None,
) -> tuple[Tensor, Tensor, int]:
    """The bags as examples of one length, filled up with an index that counts for nothing.

    Arguments as `_bag_reference`'s. Returns the gradients (B, T, D), the indices (B, T), and the filler, which may be
    `num_embeddings`, or -1 for none.
    """
    batch, width = dy.shape
    lengths = None
    longest = length
    if longest is None:
        lengths = bag_lengths(indices, offsets)
        longest = int(lengths.max()) if batch else 0
    if lengths is None or batch * longest == indices.numel():  # all of one length
        table, at = indices.view(batch, longest), None
        filler = padding_idx  # nothing to fill
    else:
        filler = padding_idx if padding_idx >= 0 else num_embeddings
        place = torch.arange(longest, device=dy.device)
        at = (offsets.unsqueeze(1) + place).clamp(max=indices.numel() - 1)
        inside = place < lengths.unsqueeze(1)
        table = torch.where(inside, indices[at], filler)
    if sizes is not None:
        dy = dy / sizes.clamp(min=1).unsqueeze(1)
    positions = dy.unsqueeze(1).expand(batch, longest, width)
    if factors is not None:
        factors = factors.view(batch, longest) if at is None else factors[at]
        positions = dy.to(accumulate_dtype(dy.dtype)).unsqueeze(1) * factors.to(dy.dtype).unsqueeze(2)
    return positions, table, filler


def _bag_reference(
    dy: Tensor,
    factors: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    sizes: Tensor | None,
    num_embeddings: int,
    padding_idx: int,
    length: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Moments of the table of bags of sums (or means): dy (B, D), offsets (B,), indices (N,) and their factors (N,).

    `sizes` (B,), where the bags are means, is what each divides by; `length` is that of all bags, None where they
    differ or it is not known. Inside of an op because the longest bag, which tells the shapes, is data: torch.compile
    could not trace it.
    """
    positions, table, filler = bag_positions(dy, factors, indices, offsets, sizes, num_embeddings, padding_idx, length)
    # One row more for the filler, where no index of the table is free for it.
    dw, dw_sq = _op(positions, table, max(num_embeddings, filler + 1), filler, dtype)
    return dw[:num_embeddings], dw_sq[:num_embeddings]


def _bag_fake(
    dy: Tensor,
    factors: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    sizes: Tensor | None,
    num_embeddings: int,
    padding_idx: int,
    length: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return empty_moments((num_embeddings, dy.shape[1]), dy, dtype)


register(
    "bag_moments(Tensor dy, Tensor? factors, Tensor indices, Tensor offsets, Tensor? sizes, SymInt num_embeddings,"
    " int padding_idx, SymInt? length, ScalarType dtype) -> (Tensor dw, Tensor dw_sq)",
    _bag_reference,
    _bag_fake,
    composed=True,
)
