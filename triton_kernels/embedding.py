"""Embedding (MATHS 6): rows of one example with the same index are added before squaring."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, configs


@triton.jit
def _table_row(
    dy, order, starts, dw, dw_sq, positions, width, padding_idx, dy_b, dy_t, dy_d, BD: tl.constexpr
):  # fmt: skip
    """G_b[v,d] = sum of dy[b,t,d] over the t with indices[b,t] = v;  dw = sum_b G_b,  dw_sq = sum_b G_b**2  (MATHS 6).

    A program takes BD columns of row v of the table. Its uses are order[starts[v] : starts[v + 1]], sorted by example
    and then position: G grows as long as the example stays the same.
    """
    v = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin = tl.load(starts + v)
    end = tl.where(v == padding_idx, begin, tl.load(starts + v + 1))
    wide: tl.constexpr = dw_sq.dtype.element_ty
    G = tl.zeros((BD,), wide)
    total = tl.zeros((BD,), wide)
    total_sq = tl.zeros((BD,), wide)
    example = begin * 0 - 1
    for k in range(begin, end):
        use = tl.load(order + k)
        b = use // positions
        at = dy + b * dy_b + (use % positions) * dy_t
        row = tl.load(at + d.to(tl.int64) * dy_d, mask=d < width, other=0.0).to(wide)
        same = b == example
        total += tl.where(same, 0.0, G)
        total_sq += tl.where(same, 0.0, G * G)
        G = tl.where(same, G + row, row)
        example = b
    total += G
    total_sq += G * G
    out = v.to(tl.int64) * width + d
    tl.store(dw + out, total, mask=d < width)
    tl.store(dw_sq + out, total_sq, mask=d < width)


def embedding_moments(
    dy: Tensor, indices: Tensor, num_embeddings: int, padding_idx: int = -1, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The dispatcher's kernel of `perexample.ops.embedding_moments`: dy (B, T, D), indices (B, T) -> dw, dw_sq (V, D).

    An index outside of the table takes part in nothing; the forward pass has already refused it.
    """
    name = "embedding_moments"
    _launch.check(name, dy.dim() == 3, f"dy must be of shape (B, T, D), got {tuple(dy.shape)}")
    _launch.check_inputs(name, dy=dy)
    right = indices.shape == dy.shape[:2] and indices.dtype in (torch.int32, torch.int64)
    _launch.check(name, right, f"indices must be {tuple(dy.shape[:2])} int32 or int64, got {tuple(indices.shape)}")
    _launch.check(name, indices.device == dy.device, f"indices must be on {dy.device}, got {indices.device}")
    _launch.check(name, num_embeddings >= 0, f"num_embeddings must be >= 0, got {num_embeddings}")
    _, positions, width = dy.shape
    dtype = dtype or dy.dtype
    if dy.numel() == 0 or num_embeddings == 0:
        return _launch.zero_moments((num_embeddings, width), dy, dtype)
    # Stable: uses of one row stay in the order of example and position. Neither waits for the device.
    rows, order = torch.sort(indices.reshape(-1), stable=True)
    starts = torch.searchsorted(rows, torch.arange(num_embeddings + 1, dtype=rows.dtype, device=rows.device))
    sums = _launch.empty_moments((num_embeddings, width), dy, dtype)
    block = min(configs.EMBEDDING, _launch.power_of_two(width))
    _launch.launch(
        _table_row, (num_embeddings, _launch.cdiv(width, block)), dy, order, starts, *sums, positions, width,
        padding_idx, *dy.stride(), BD=block, num_warps=max(1, min(4, block // 64)),
    )  # fmt: skip
    return sums
