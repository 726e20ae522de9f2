"""Sums over examples: of a bias' gradient (MATHS 3), of any [B, *shape] gradient (MATHS 8), of parts of a batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, configs


@triton.jit(do_not_specialize=["batch", "examples"])
def _bias(
    dy, db, db_sq, batch, positions, outputs, dy_b, dy_t, dy_o, examples, BT: tl.constexpr, BO: tl.constexpr
):  # fmt: skip
    """G_b[o] = sum_t dy[b,t,o];  db = sum_b G_b,  db_sq = sum_b G_b**2  (MATHS 3).

    A program takes BO outputs and one part of the batch, example by example, BT positions at a time.
    """
    part = tl.program_id(1)
    first = part * examples
    last = tl.minimum(first + examples, batch)
    o = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
    t = tl.arange(0, BT)
    wide: tl.constexpr = db_sq.dtype.element_ty
    total = tl.zeros((BO,), wide)
    total_sq = tl.zeros((BO,), wide)
    for b in range(first, last):
        example = dy + tl.cast(b, tl.int64) * dy_b + o[None, :] * dy_o
        rows = tl.zeros((BT, BO), wide)
        for block in range(0, positions, BT):
            at = block + t[:, None]
            inside = (at < positions) & (o < outputs)[None, :]
            rows += tl.load(example + at.to(tl.int64) * dy_t, mask=inside, other=0).to(wide)
        G = tl.sum(rows, 0)
        total += G
        total_sq += G * G
    out = part.to(tl.int64) * outputs + o
    tl.store(db + out, total, mask=o < outputs)
    tl.store(db_sq + out, total_sq, mask=o < outputs)


@triton.jit(do_not_specialize=["parts"])
def _add_parts(workspace, out, out_sq, parts, size, BLOCK: tl.constexpr):
    """out = sum_k workspace[0,k],  out_sq = sum_k workspace[1,k]: sums over b (MATHS 1) of parts of the batch.

    In the order of k: the same bits on every run.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide: tl.constexpr = workspace.dtype.element_ty
    total = tl.zeros((BLOCK,), wide)
    total_sq = tl.zeros((BLOCK,), wide)
    for part in range(0, parts):
        at = workspace + tl.cast(part, tl.int64) * size + i
        total += tl.load(at, mask=i < size, other=0)
        total_sq += tl.load(at + tl.cast(parts, tl.int64) * size, mask=i < size, other=0)
    tl.store(out + i, total, mask=i < size)
    tl.store(out_sq + i, total_sq, mask=i < size)


def add_parts(workspace: Tensor, out: Tensor, out_sq: Tensor) -> None:
    """Add the parts of both moments in `workspace` (2, parts, *shape) up into `out` and `out_sq` (*shape)."""
    size = out.numel()
    grid = (_launch.cdiv(size, configs.ADD_PARTS),)
    _launch.launch(_add_parts, grid, workspace, out, out_sq, workspace.shape[1], size, BLOCK=configs.ADD_PARTS)


def bias_moments(dy: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The dispatcher's kernel of `perexample.ops.bias_moments`: dy (B, T, O) -> db (O,), db_sq (O,)."""
    _launch.check("bias_moments", dy.dim() == 3, f"dy must be of shape (B, T, O), got {tuple(dy.shape)}")
    _launch.check_inputs("bias_moments", dy=dy)
    batch, positions, outputs = dy.shape
    dtype = dtype or dy.dtype
    if dy.numel() == 0:
        return _launch.zero_moments((outputs,), dy, dtype)
    rows = configs.BIAS
    block_o = min(rows.outputs, _launch.power_of_two(outputs))
    block_t = min(rows.elements // block_o, _launch.power_of_two(positions))
    tiles = _launch.cdiv(outputs, block_o)
    parts = _launch.split(batch, tiles, rows.programs * _launch.device_of(dy).processors, outputs)

    def run(db: Tensor, db_sq: Tensor) -> None:
        _launch.launch(
            _bias, (tiles, parts.count), dy, db, db_sq, batch, positions, outputs, *dy.stride(), parts.examples,
            BT=block_t, BO=block_o, num_warps=rows.warps,
        )  # fmt: skip

    return _launch.with_moments(run, (outputs,), dy, dtype, parts.count)


def reduce_moments(grad: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The dispatcher's kernel of `perexample.ops.reduce_moments`: grad (B, *shape) -> sum (*shape), sum_sq (*shape)."""
    _launch.check("reduce_moments", grad.dim() >= 1, "grad must be of shape (B, *shape), got ()")
    # One position an example, and as many outputs as the parameter has elements: the kernel of the bias.
    size = grad[:1].numel() if grad.shape[0] else torch.Size(grad.shape[1:]).numel()
    total, total_sq = bias_moments(grad.reshape(grad.shape[0], 1, size), dtype)
    return total.view(grad.shape[1:]), total_sq.view(grad.shape[1:])
