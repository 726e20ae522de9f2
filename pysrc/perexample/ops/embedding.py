"""Embedding (MATHS 6): rows of one example with the same index are added before squaring."""

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
    check_floating(name, dy=dy)
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
