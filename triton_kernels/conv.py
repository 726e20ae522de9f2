"""Convolution (MATHS 5): linear (3) with x unfolded on the fly, t running over the output positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, configs
from .linear import kind_of, offset_dtype, product, store_tile, tile_of
from .reduce import bias_moments


@triton.jit
def in_three(i, N2, N3):
    """(i1, i2, i3) with i = (i1 N2 + i2) N3 + i3"""
    return i // (N2 * N3), i // N3 % N2, i % N3


@triton.jit(do_not_specialize=["batch", "examples"])
def _implicit_gemm(
    dy, x, dw, dw_sq, batch, positions, outputs, inputs, examples, groups, channels,
    out_2, out_3, in_1, in_2, in_3, dy_b, dy_o, dy_1, dy_2, dy_3, x_b, x_c, x_1, x_2, x_3,
    K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """G_b[o,(c,k)] = sum_t dy[b,o,t] x[b,c,t S - P + k D];  dw = sum_b G_b,  dw_sq = sum_b G_b**2  (MATHS 5).

    t = (t1, t2, t3) runs over output positions and k over taps. A program owns a tile of one group's (outputs, channels
    * taps) and one part of the batch. `outputs`, `channels` and `inputs` = channels * taps are those of one group.
    """
    part = tl.program_id(1)
    first = part * examples
    last = tl.minimum(first + examples, batch)
    tiles = tl.cdiv(outputs, BO) * tl.cdiv(inputs, BI)
    group = tl.program_id(0) // tiles
    row, column = tile_of(tl.program_id(0) % tiles, tl.cdiv(outputs, BO), tl.cdiv(inputs, BI), GROUP)
    o = row * BO + tl.arange(0, BO)
    i = column * BI + tl.arange(0, BI)
    c, k2, k3 = in_three(i, K2, K3)
    tap_1 = c % K1 * D1
    tap_2 = k2 * D2
    tap_3 = k3 * D3
    c = c // K1
    dy_tile = dy + tl.cast(group * outputs, tl.int64) * dy_o
    x_tile = x + tl.cast(group * channels, tl.int64) * x_c
    dy_column = o.to(OFFSET) * dy_o
    x_column = c.to(OFFSET) * x_c + tap_1.to(OFFSET) * x_1 + tap_2.to(OFFSET) * x_2 + tap_3.to(OFFSET) * x_3
    total = tl.zeros((BO, BI), tl.float32)
    total_sq = tl.zeros((BO, BI), tl.float32)
    G = tl.zeros((BO, BI), tl.float32)
    blocks = tl.cdiv(positions, BT)
    for step in tl.range(0, (last - first) * blocks):  # one loop over (example, block of positions), as in linear.py
        b = tl.cast(first + step // blocks, tl.int64)
        block = step % blocks
        t = block * BT + tl.arange(0, BT)
        t1, t2, t3 = in_three(t, out_2, out_3)
        dy_row = t1.to(OFFSET) * dy_1 + t2.to(OFFSET) * dy_2 + t3.to(OFFSET) * dy_3
        dy_inside = (t < positions)[:, None] & (o < outputs)[None, :]
        dy_b_t = tl.load(dy_tile + b * dy_b + (dy_row[:, None] + dy_column[None, :]), mask=dy_inside, other=0.0)
        x1 = t1 * S1 - P1
        x2 = t2 * S2 - P2
        x3 = t3 * S3 - P3
        x_row = x1.to(OFFSET) * x_1 + x2.to(OFFSET) * x_2 + x3.to(OFFSET) * x_3
        x_inside = (t < positions)[:, None] & (i < inputs)[None, :]
        x_inside &= (x3[:, None] + tap_3[None, :] >= 0) & (x3[:, None] + tap_3[None, :] < in_3)
        if K2 > 1 or P2 > 0:
            x_inside &= (x2[:, None] + tap_2[None, :] >= 0) & (x2[:, None] + tap_2[None, :] < in_2)
        if K1 > 1 or P1 > 0:
            x_inside &= (x1[:, None] + tap_1[None, :] >= 0) & (x1[:, None] + tap_1[None, :] < in_1)
        x_b_t = tl.load(x_tile + b * x_b + (x_row[:, None] + x_column[None, :]), mask=x_inside, other=0.0)
        G = product(tl.trans(dy_b_t), x_b_t, G, PRECISION, INTERPRET)
        if block == blocks - 1:
            total += G
            total_sq += G * G
            G = tl.zeros((BO, BI), tl.float32)
    whole = part * groups + group
    store_tile(dw, dw_sq, total, total_sq, o, i, outputs, inputs, whole)


@triton.jit(do_not_specialize=["batch", "examples"])
def _depthwise(
    dy, x, dw, dw_sq, batch, positions, outputs, multiplier, examples,
    out_2, out_3, in_1, in_2, in_3, dy_b, dy_o, dy_1, dy_2, dy_3, x_b, x_c, x_1, x_2, x_3,
    K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """G_b[o,k] = sum_t dy[b,o,t] x[b,c,t S - P + k D];  dw = sum_b G_b,  dw_sq = sum_b G_b**2  (MATHS 5).

    Of groups of one channel: output o reads channel c = o // multiplier. A program owns one output and one tap.
    """
    part = tl.program_id(1)
    first = part * examples
    last = tl.minimum(first + examples, batch)
    o = tl.program_id(0) // (K1 * K2 * K3)
    k1, k2, k3 = in_three(tl.program_id(0) % (K1 * K2 * K3), K2, K3)
    tap_1 = k1 * D1 - P1
    tap_2 = k2 * D2 - P2
    tap_3 = k3 * D3 - P3
    dy_o_at = dy + o.to(tl.int64) * dy_o
    x_c_at = x + (o // multiplier).to(tl.int64) * x_c
    total = 0.0
    total_sq = 0.0
    for b in range(first, last):
        sums = tl.zeros((BT,), tl.float32)
        for block in range(0, positions, BT):
            t = block + tl.arange(0, BT)
            t1, t2, t3 = in_three(t, out_2, out_3)
            x1 = t1 * S1 + tap_1
            x2 = t2 * S2 + tap_2
            x3 = t3 * S3 + tap_3
            inside = (t < positions) & (x1 >= 0) & (x1 < in_1) & (x2 >= 0) & (x2 < in_2) & (x3 >= 0) & (x3 < in_3)
            dy_at = t1.to(tl.int64) * dy_1 + t2.to(tl.int64) * dy_2 + t3.to(tl.int64) * dy_3
            x_at = x1.to(tl.int64) * x_1 + x2.to(tl.int64) * x_2 + x3.to(tl.int64) * x_3
            g = tl.load(dy_o_at + tl.cast(b, tl.int64) * dy_b + dy_at, mask=inside, other=0.0).to(tl.float32)
            sums += g * tl.load(x_c_at + tl.cast(b, tl.int64) * x_b + x_at, mask=inside, other=0.0).to(tl.float32)
        G = tl.sum(sums, 0)
        total += G
        total_sq += G * G
    out = part.to(tl.int64) * outputs * (K1 * K2 * K3) + tl.program_id(0)
    tl.store(dw + out, total)
    tl.store(dw_sq + out, total_sq)


def conv_moments(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's kernel of `perexample.ops.conv_moments`, of 1 to 3 dimensions; float32, bfloat16 and float16.

    dy (B, O, *out), x (B, C, *in) -> dw, dw_sq (O, C / groups, *kernel_size), db (O,), db_sq (O,), empty unless `bias`.
    """
    name, spatial = "conv_moments", len(kernel_size)
    _launch.check(name, 1 <= spatial <= 3, f"kernel_size must be 1 to 3 integers, got {tuple(kernel_size)}")
    right = dy.dim() == x.dim() == spatial + 2 and dy.shape[0] == x.shape[0]
    _launch.check(name, right, f"dy and x must be (B, O, *out) and (B, C, *in), got {(*dy.shape,)} and {(*x.shape,)}")
    _launch.check_inputs(name, dy=dy, x=x)
    _launch.check(name, dy.dtype != torch.float64, "float64 is not supported")
    (batch, all_outputs), channels = dy.shape[:2], x.shape[1]
    right = groups > 0 and all_outputs % groups == 0 and channels % groups == 0
    _launch.check(name, right, f"groups must divide C={channels} and O={all_outputs}, got {groups}")
    for argument, values, least in (
        ("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1),
    ):  # fmt: skip
        right = len(values) == spatial and all(v >= least for v in values)
        _launch.check(name, right, f"{argument} must be {spatial} integers >= {least}, got {tuple(values)}")
    expected = tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    )
    _launch.check(name, tuple(dy.shape[2:]) == expected, f"dy must be (B, O, *{expected}), got {tuple(dy.shape)}")
    dtype = dtype or dy.dtype
    shape = (all_outputs, channels // groups, *kernel_size)
    columns = bias_moments(dy.flatten(2).mT, dtype) if bias else _launch.empty_moments((0,), dy, dtype)
    if dy.numel() * x.numel() == 0:
        return *_launch.zero_moments(shape, dy, dtype), *columns

    while dy.dim() < 5:  # as three dimensions, the first of which have one position
        dy, x = dy.unsqueeze(2), x.unsqueeze(2)
    geometry = {
        f"{letter}{j + 1}": value
        for letter, values, other in (("K", kernel_size, 1), ("S", stride, 1), ("P", padding, 0), ("D", dilation, 1))
        for j, value in enumerate([other] * (3 - spatial) + list(values))
    }
    taps = geometry["K1"] * geometry["K2"] * geometry["K3"]
    positions = dy.shape[2] * dy.shape[3] * dy.shape[4]
    where = (dy.shape[3], dy.shape[4], *x.shape[2:], *dy.stride(), *x.stride())
    device, size = _launch.device_of(dy), all_outputs * channels // groups * taps
    if channels == groups:
        tiles = all_outputs * taps
        parts = _launch.split(batch, tiles, configs.DEPTHWISE.programs * device.processors, size)
        block = min(configs.DEPTHWISE.elements, _launch.power_of_two(positions))

        def run(dw: Tensor, dw_sq: Tensor) -> None:
            _launch.launch(
                _depthwise, (tiles, parts.count), dy, x, dw, dw_sq, batch, positions, all_outputs,
                all_outputs // groups, parts.examples, *where, **geometry, BT=block, num_warps=configs.DEPTHWISE.warps,
            )  # fmt: skip
    else:
        kind = kind_of(dy.dtype, torch.backends.cudnn.conv.fp32_precision)
        tile = configs.CONV[device.arch][kind]
        outputs, inputs = all_outputs // groups, channels // groups * taps
        tiles = groups * _launch.cdiv(outputs, tile.outputs) * _launch.cdiv(inputs, tile.inputs)
        parts = _launch.split(batch, tiles, tile.resident * device.processors, size)
        reaches = (sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in (dy, x))

        def run(dw: Tensor, dw_sq: Tensor) -> None:
            _launch.launch(
                _implicit_gemm, (tiles, parts.count), dy, x, dw, dw_sq, batch, positions, outputs, inputs,
                parts.examples, groups, channels // groups, *where, **geometry, BO=tile.outputs, BI=tile.inputs,
                BT=tile.positions, GROUP=configs.GROUP, OFFSET=offset_dtype(*reaches),
                PRECISION="tf32" if kind == "tf32" else "ieee", INTERPRET=_launch.INTERPRET,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

    return *_launch.with_moments(run, shape, dy, dtype, parts.count), *columns
