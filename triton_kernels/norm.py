"""LayerNorm, RMSNorm, GroupNorm, and BatchNorm with fixed statistics (MATHS 7).

``G_b = sum_t dy xhat`` (weight), ``sum_t dy`` (bias), and with ``h = dy weight`` and means over what was normalized
together, ``dx = rstd (h - mean(h) - xhat mean(h xhat))``; RMSNorm has no mean of x, nor of h. The statistics of
BatchNorm in eval mode are constants of its channels: ``dx = rstd h``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, configs
from .reduce import bias_moments


@triton.jit
def _normalized(
    dy, x, mean, rstd, weight, dx, rows, size, positions, weights, dy_b, dy_r, dy_f, dy_p, x_b, x_r, x_f, x_p,
    dx_b, dx_r, dx_f, dx_p, eps,
    BLOCK: tl.constexpr, MEAN: tl.constexpr, GIVEN: tl.constexpr, WEIGHT: tl.constexpr, DX: tl.constexpr,
):  # fmt: skip
    """dx = rstd (h - mean(h) - xhat mean(h xhat)), h = dy weight  (MATHS 7); first mean and rstd where not GIVEN.

    A program takes what was normalized together: `size` elements, (features, positions) of row r of example b. Feature
    f of row r has the weight r * weights + f: (B, T, D) is (b, r=t, f=d), (B, C, S) is (b, r=group, f=channel, p=s).
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // rows
    r = row % rows
    dy_row = dy + b * dy_b + r * dy_r
    x_row = x + b * x_b + r * x_r
    dx_row = dx + b * dx_b + r * dx_r
    lane = tl.arange(0, BLOCK)
    if GIVEN:
        center = tl.load(mean + row) if MEAN else 0.0
        scale = tl.load(rstd + row)
    else:
        center = 0.0
        if MEAN:
            part = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, size, BLOCK):
                f = ((first + lane) // positions).to(tl.int64)
                p = ((first + lane) % positions).to(tl.int64)
                part += tl.load(x_row + f * x_f + p * x_p, mask=first + lane < size, other=0.0).to(tl.float32)
            center = tl.sum(part, 0) / size
            tl.store(mean + row, center)
        part = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, size, BLOCK):
            f = ((first + lane) // positions).to(tl.int64)
            p = ((first + lane) % positions).to(tl.int64)
            value = tl.load(x_row + f * x_f + p * x_p, mask=first + lane < size, other=0.0).to(tl.float32)
            away = tl.where(first + lane < size, value - center, 0.0)
            part += away * away
        scale = 1.0 / tl.sqrt(tl.sum(part, 0) / size + eps)
        tl.store(rstd + row, scale)
    if DX:
        part_h = tl.zeros((BLOCK,), tl.float32)
        part_hx = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, size, BLOCK):
            f = ((first + lane) // positions).to(tl.int64)
            p = ((first + lane) % positions).to(tl.int64)
            inside = first + lane < size
            h = tl.load(dy_row + f * dy_f + p * dy_p, mask=inside, other=0.0).to(tl.float32)
            if WEIGHT:
                h *= tl.load(weight + r * weights + f, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x_row + f * x_f + p * x_p, mask=inside, other=0.0).to(tl.float32)
            part_h += h
            part_hx += h * (value - center) * scale
        mean_h = tl.sum(part_h, 0) / size if MEAN else 0.0
        mean_hx = tl.sum(part_hx, 0) / size
        for first in range(0, size, BLOCK):
            f = ((first + lane) // positions).to(tl.int64)
            p = ((first + lane) % positions).to(tl.int64)
            inside = first + lane < size
            h = tl.load(dy_row + f * dy_f + p * dy_p, mask=inside, other=0.0).to(tl.float32)
            if WEIGHT:
                h *= tl.load(weight + r * weights + f, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x_row + f * x_f + p * x_p, mask=inside, other=0.0).to(tl.float32)
            xhat = (value - center) * scale
            tl.store(dx_row + f * dx_f + p * dx_p, scale * (h - mean_h - xhat * mean_hx), mask=inside)


@triton.jit
def _scaled(
    dy, rstd, weight, dx, channels, positions, dy_b, dy_c, dy_s, dx_b, dx_c, dx_s,
    WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx[b,c,s] = dy[b,c,s] weight[c] rstd[c]  (MATHS 7), for a block of the (channels, positions) of one example."""
    size = tl.cast(channels, tl.int64) * positions
    blocks = tl.cdiv(size, BLOCK)
    b = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    c = i // positions
    s = i % positions
    h = tl.load(dy + b * dy_b + c * dy_c + s * dy_s, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT:
        h *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    h *= tl.load(rstd + c, mask=inside, other=0.0)
    tl.store(dx + b * dx_b + c * dx_c + s * dx_s, h, mask=inside)


@triton.jit(do_not_specialize=["batch", "examples"])
def _affine(
    dy, x, mean, rstd, dw, dw_sq, batch, positions, features, examples, dy_b, dy_p, dy_f, x_b, x_p, x_f,
    stat_b, stat_p, stat_f, together, BP: tl.constexpr, BF: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """G_b[f] = sum_p dy[b,p,f] xhat[b,p,f];  dw = sum_b G_b,  dw_sq = sum_b G_b**2  (MATHS 7).

    A program takes BF features and one part of the batch, example by example, BP positions at a time. The statistics of
    an element are at b * stat_b + p * stat_p + (f // together) * stat_f.
    """
    part = tl.program_id(1)
    first = part * examples
    last = tl.minimum(first + examples, batch)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    p = tl.arange(0, BP)
    wide_f = f.to(tl.int64)[None, :]
    total = tl.zeros((BF,), tl.float32)
    total_sq = tl.zeros((BF,), tl.float32)
    for b in range(first, last):
        wide_b = tl.cast(b, tl.int64)
        rows = tl.zeros((BP, BF), tl.float32)
        for block in range(0, positions, BP):
            at = (block + p[:, None]).to(tl.int64)
            inside = (at < positions) & (f < features)[None, :]
            value = tl.load(x + wide_b * x_b + at * x_p + wide_f * x_f, mask=inside, other=0.0).to(tl.float32)
            stat = wide_b * stat_b + at * stat_p + (f // together)[None, :] * stat_f
            if MEAN:
                value -= tl.load(mean + stat, mask=inside, other=0.0)
            value *= tl.load(rstd + stat, mask=inside, other=0.0)
            g = tl.load(dy + wide_b * dy_b + at * dy_p + wide_f * dy_f, mask=inside, other=0.0).to(tl.float32)
            rows += g * value
        G = tl.sum(rows, 0)
        total += G
        total_sq += G * G
    out = part.to(tl.int64) * features + f
    tl.store(dw + out, total, mask=f < features)
    tl.store(dw_sq + out, total_sq, mask=f < features)


def _check(name: str, dy: Tensor, x: Tensor) -> None:
    _launch.check(name, dy.dim() == 3 and x.shape == dy.shape, f"x must be {tuple(dy.shape)}, got {tuple(x.shape)}")
    _launch.check_inputs(name, dy=dy, x=x)
    _launch.check(name, dy.dtype != torch.float64, "float64 is not supported")


def _norm(
    name: str,
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    groups: int | None,
    eps: float,
    output_mask: Sequence[bool],
    *,
    centered: bool = True,
) -> tuple[Tensor, ...]:
    """The norms of each example: without `groups` (B, T, D) normalized over D, else (B, C, S) over a group and S."""
    _check(name, dy, x)
    # (batch, rows, features, positions); the affine part's (positions, features); its weights; statistics of a row.
    batch = dy.shape[0]
    if groups is None:
        rows, features, positions, affine = dy.shape[1], dy.shape[2], 1, (dy.shape[1], dy.shape[2])
        weights, stat = 0, (rows, 1, 0, 1)
    else:
        _launch.check(name, groups > 0 and dy.shape[1] % groups == 0, f"groups must divide C={dy.shape[1]}")
        features, positions, affine = dy.shape[1] // groups, dy.shape[2], (dy.shape[2], dy.shape[1])
        rows, weights, stat = groups, features, (groups, 0, 1, features)

    def strides(t: Tensor) -> tuple[int, int, int, int]:  # of (batch, row, feature, position)
        b, second, third = t.stride()
        return (b, second, third, 0) if groups is None else (b, features * second, second, third)

    for label, value, shape in (
        ("mean", mean, (batch, rows)), ("rstd", rstd, (batch, rows)), ("weight", weight, (affine[1],)),
    ):  # fmt: skip
        right = value is None or (value.shape == shape and value.device == dy.device)
        _launch.check(name, right, f"{label} must be {shape} on {dy.device}")
    dtype = dy.dtype if weight is None else weight.dtype
    given = rstd is not None and (mean is not None or not centered)
    if given:
        mean, rstd = (None if s is None else s.to(torch.float32).contiguous() for s in (mean, rstd))
    else:
        mean = dy.new_empty((batch, rows), dtype=torch.float32) if centered else None
        rstd = dy.new_empty((batch, rows), dtype=torch.float32)
    dx = torch.empty(dy.shape if output_mask[0] else (0, 1, 1), dtype=dy.dtype, device=dy.device)
    empty = dy.numel() == 0
    if not empty and (output_mask[0] or (output_mask[1] and not given)):
        size = features * positions
        block = min(configs.NORM_ROW, _launch.power_of_two(size))
        _launch.launch(
            _normalized, (batch * rows,), dy, x, rstd if mean is None else mean, rstd,
            rstd if weight is None else weight.contiguous(), dx, rows, size, positions, weights, *strides(dy),
            *strides(x), *strides(dx), eps, BLOCK=block, MEAN=centered, GIVEN=given, WEIGHT=weight is not None,
            DX=output_mask[0], num_warps=max(1, min(8, block // 128)),
        )  # fmt: skip
    # The affine part's view of dy and x: (batch, positions, features).
    dy_rows, x_rows = (dy, x) if groups is None else (dy.mT, x.mT)
    moments = _affine_moments(
        dy_rows, x_rows, mean, rstd, stat, dtype, output_mask[1], output_mask[-1] and centered
    )  # fmt: skip
    return (dx if output_mask[0] else dx.view(0), *moments)


def _affine_moments(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    stat: tuple[int, int, int, int],
    dtype: torch.dtype,
    weight: bool,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dw, dw_sq, db, db_sq of dy and x (B, positions, features), as far as wanted; `stat`: see the end of `_affine`."""
    batch, positions, features = dy.shape
    rows = configs.NORM
    block_f = min(rows.outputs if dy.stride(2) == 1 else 1, _launch.power_of_two(features))
    block_p = min(rows.elements // block_f, _launch.power_of_two(positions))
    tiles = _launch.cdiv(features, block_f)

    def run(dw: Tensor, dw_sq: Tensor) -> None:
        _launch.launch(
            _affine, (tiles, parts.count), dy, x, rstd if mean is None else mean, rstd, dw, dw_sq, batch, positions,
            features, parts.examples, *dy.stride(), *x.stride(), *stat, BP=block_p, BF=block_f,
            MEAN=mean is not None, num_warps=rows.warps,
        )  # fmt: skip

    if not weight:
        weights = _launch.empty_moments((0,), dy, dtype)
    elif dy.numel() == 0:
        weights = _launch.zero_moments((features,), dy, dtype)
    else:
        parts = _launch.split(batch, tiles, rows.programs * _launch.device_of(dy).processors, features)
        weights = _launch.with_moments(run, (features,), dy, dtype, parts.count)
    return *weights, *(bias_moments(dy, dtype) if bias else _launch.empty_moments((0,), dy, dtype))


def layer_norm_moments(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None, eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The dispatcher's kernel of `perexample.ops.layer_norm_moments`: dy, x (B, T, D) -> dx, dw, dw_sq, db, db_sq."""
    return _norm("layer_norm_moments", dy, x, mean, rstd, weight, None, eps, output_mask)


def rms_norm_moments(
    dy: Tensor, x: Tensor, rstd: Tensor | None, weight: Tensor | None, eps: float, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The dispatcher's kernel of `perexample.ops.rms_norm_moments`: dy, x (B, T, D) -> dx, dw, dw_sq."""
    return _norm("rms_norm_moments", dy, x, None, rstd, weight, None, eps, output_mask, centered=False)[:3]


def group_norm_moments(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None, groups: int, eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The dispatcher's kernel of `perexample.ops.group_norm_moments`: dy, x (B, C, S) -> dx, dw, dw_sq, db, db_sq."""
    return _norm("group_norm_moments", dy, x, mean, rstd, weight, groups, eps, output_mask)


def batch_norm_moments(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The dispatcher's kernel of `perexample.ops.batch_norm_moments`: dy, x (B, C, S) -> dx, dw, dw_sq, db, db_sq."""
    name = "batch_norm_moments"
    _check(name, dy, x)
    batch, channels, positions = dy.shape
    for label, value in (("mean", mean), ("rstd", rstd), ("weight", weight)):
        right = value is None or (value.shape == (channels,) and value.device == dy.device)
        _launch.check(name, right, f"{label} must be {(channels,)} on {dy.device}")
    mean, rstd = (s.to(torch.float32).contiguous() for s in (mean, rstd))
    dx = torch.empty(dy.shape if output_mask[0] else (0, 1, 1), dtype=dy.dtype, device=dy.device)
    if dx.numel() > 0:
        block = min(configs.NORM_ROW, _launch.power_of_two(channels * positions))
        _launch.launch(
            _scaled, (batch * _launch.cdiv(channels * positions, block),), dy, rstd,
            rstd if weight is None else weight.contiguous(), dx, channels, positions, *dy.stride(), *dx.stride(),
            WEIGHT=weight is not None, BLOCK=block,
        )  # fmt: skip
    dtype = dy.dtype if weight is None else weight.dtype
    moments = _affine_moments(dy.mT, x.mT, mean, rstd, (0, 0, 1, 1), dtype, output_mask[1], output_mask[2])
    return (dx if output_mask[0] else dx.view(0), *moments)
