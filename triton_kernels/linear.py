"""Linear (MATHS 3, 4): ``G_b[o,i] = sum_t dy[b,t,o] x[b,t,i]``, ``dw = sum_b G_b``, ``dw_sq = sum_b G_b**2``.

Three kernels. In each a program owns a tile of (outputs, inputs) and one part of the batch, and keeps accumulators in
registers: G of the example under way, and both sums over examples. Nothing of size B·O·I exists. One compiled kernel
serves all sizes of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _launch, configs
from .reduce import bias_moments


@triton.jit
def tile_of(program, tiles_o, tiles_i, GROUP: tl.constexpr):
    """(row, column) of a program's tile. They go down GROUP rows before the next column: loads meet in L2."""
    group = program // (GROUP * tiles_i)
    first = group * GROUP
    rows = tl.minimum(tiles_o - first, GROUP)
    inside = program % (GROUP * tiles_i)
    return first + inside % rows, inside // rows


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b in float32. The interpreter has no product of bfloat16: there the factors are widened."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def store_tile(dw, dw_sq, total, total_sq, o, i, outputs, inputs, part):
    """Write both sums of a tile to this part's (outputs, inputs)."""
    at = part.to(tl.int64) * outputs * inputs + o[:, None].to(tl.int64) * inputs + i[None, :]
    inside = (o < outputs)[:, None] & (i < inputs)[None, :]
    tl.store(dw + at, total, mask=inside)
    tl.store(dw_sq + at, total_sq, mask=inside)


@triton.jit(do_not_specialize=["batch", "positions", "examples"])
def _descriptor(
    dy, x, dw, dw_sq, batch, positions, outputs, inputs, examples,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """G_b[o,i] = sum_t dy[b,t,o] x[b,t,i];  dw = sum_b G_b,  dw_sq = sum_b G_b**2  (MATHS 3), where TMA can load.

    dy and x are descriptors of (B, T, O) and (B, T, I) that load [1, BT, BO or BI]. What they load beyond an edge is
    zero, so neither positions nor outputs nor inputs need a mask.
    """
    part = tl.program_id(1)
    first = part * examples
    last = tl.minimum(first + examples, batch)
    row, column = tile_of(tl.program_id(0), tl.cdiv(outputs, BO), tl.cdiv(inputs, BI), GROUP)
    total = tl.zeros((BO, BI), tl.float32)
    total_sq = tl.zeros((BO, BI), tl.float32)
    if ONE_BLOCK:  # T <= BT: every product begins from zero, and needs no zeroed accumulator
        for b in tl.range(first, last):
            dy_b = dy.load([b, 0, row * BO]).reshape(BT, BO)
            x_b = x.load([b, 0, column * BI]).reshape(BT, BI)
            G = product(tl.trans(dy_b), x_b, tl.zeros((BO, BI), tl.float32), PRECISION, INTERPRET)
            total += G
            total_sq += G * G
    else:
        # One loop over (example, block of positions): with two nested ones the pipeline would drain at every example.
        G = tl.zeros((BO, BI), tl.float32)
        blocks = tl.cdiv(positions, BT)
        for step in tl.range(0, (last - first) * blocks):
            b = first + step // blocks
            block = step % blocks
            dy_b = dy.load([b, block * BT, row * BO]).reshape(BT, BO)
            x_b = x.load([b, block * BT, column * BI]).reshape(BT, BI)
            G = product(tl.trans(dy_b), x_b, G, PRECISION, INTERPRET)
            if block == blocks - 1:
                total += G
                total_sq += G * G
                G = tl.zeros((BO, BI), tl.float32)
    o = row * BO + tl.arange(0, BO)
    i = column * BI + tl.arange(0, BI)
    store_tile(dw, dw_sq, total, total_sq, o, i, outputs, inputs, part)


@triton.jit(do_not_specialize=["batch", "positions", "examples"])
def _pointer(
    dy, x, dw, dw_sq, batch, positions, outputs, inputs, examples, dy_b, dy_t, dy_o, x_b, x_t, x_i,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr, ONE_BLOCK: tl.constexpr,
    OFFSET: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """G_b[o,i] = sum_t dy[b,t,o] x[b,t,i];  dw = sum_b G_b,  dw_sq = sum_b G_b**2  (MATHS 3), for any strides.

    dy (B, T, O), x (B, T, I). OFFSET holds the distances inside one tile, in elements.
    """
    part = tl.program_id(1)
    first = part * examples
    last = tl.minimum(first + examples, batch)
    row, column = tile_of(tl.program_id(0), tl.cdiv(outputs, BO), tl.cdiv(inputs, BI), GROUP)
    o = row * BO + tl.arange(0, BO)
    i = column * BI + tl.arange(0, BI)
    t = tl.arange(0, BT)
    dy_tile = dy + tl.cast(row * BO, tl.int64) * dy_o
    x_tile = x + tl.cast(column * BI, tl.int64) * x_i
    dy_inside = t.to(OFFSET)[:, None] * dy_t + tl.arange(0, BO).to(OFFSET)[None, :] * dy_o
    x_inside = t.to(OFFSET)[:, None] * x_t + tl.arange(0, BI).to(OFFSET)[None, :] * x_i
    total = tl.zeros((BO, BI), tl.float32)
    total_sq = tl.zeros((BO, BI), tl.float32)
    G = tl.zeros((BO, BI), tl.float32)
    blocks = 1 if ONE_BLOCK else tl.cdiv(positions, BT)
    for step in tl.range(0, (last - first) * blocks):  # one loop over (example, block of positions), as above
        b = tl.cast(first + step // blocks, tl.int64)
        block = step % blocks
        left = positions - block * BT
        dy_at = dy_tile + b * dy_b + tl.cast(block * BT, tl.int64) * dy_t
        x_at = x_tile + b * x_b + tl.cast(block * BT, tl.int64) * x_t
        dy_b_t = tl.load(dy_at + dy_inside, mask=(t < left)[:, None] & (o < outputs)[None, :], other=0.0)
        x_b_t = tl.load(x_at + x_inside, mask=(t < left)[:, None] & (i < inputs)[None, :], other=0.0)
        if ONE_BLOCK:
            G = product(tl.trans(dy_b_t), x_b_t, tl.zeros((BO, BI), tl.float32), PRECISION, INTERPRET)
            total += G
            total_sq += G * G
        else:
            G = product(tl.trans(dy_b_t), x_b_t, G, PRECISION, INTERPRET)
            if block == blocks - 1:
                total += G
                total_sq += G * G
                G = tl.zeros((BO, BI), tl.float32)
    store_tile(dw, dw_sq, total, total_sq, o, i, outputs, inputs, part)


@triton.jit(do_not_specialize=["batch"])  # the examples of a part are a multiple of BB
def _one_position(
    dy, x, dw, dw_sq, batch, outputs, inputs, examples, dy_b, dy_o, x_b, x_i,
    BO: tl.constexpr, BI: tl.constexpr, BB: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dw = dy' x,  dw_sq = (dy**2)' (x**2), both contracted over the examples  (MATHS 4); dy (B, O), x (B, I).

    The square of a bfloat16 has 16 bits. It is split into two bfloat16, exactly, so that its product too runs on the
    tensor cores; other squares are taken in float32 and multiplied with PRECISION.
    """
    part = tl.program_id(1)
    first = part * examples
    last = tl.minimum(first + examples, batch)
    row, column = tile_of(tl.program_id(0), tl.cdiv(outputs, BO), tl.cdiv(inputs, BI), GROUP)
    o = row * BO + tl.arange(0, BO)
    i = column * BI + tl.arange(0, BI)
    r = tl.arange(0, BB)
    dy_tile = dy + tl.cast(row * BO, tl.int64) * dy_o
    x_tile = x + tl.cast(column * BI, tl.int64) * x_i
    dy_inside = r.to(OFFSET)[:, None] * dy_b + tl.arange(0, BO).to(OFFSET)[None, :] * dy_o
    x_inside = r.to(OFFSET)[:, None] * x_b + tl.arange(0, BI).to(OFFSET)[None, :] * x_i
    total = tl.zeros((BO, BI), tl.float32)
    total_sq = tl.zeros((BO, BI), tl.float32)
    for b in tl.range(first, last, BB):
        dy_at = dy_tile + tl.cast(b, tl.int64) * dy_b
        x_at = x_tile + tl.cast(b, tl.int64) * x_b
        dy_b_o = tl.load(dy_at + dy_inside, mask=(r < last - b)[:, None] & (o < outputs)[None, :], other=0.0)
        x_b_i = tl.load(x_at + x_inside, mask=(r < last - b)[:, None] & (i < inputs)[None, :], other=0.0)
        total = product(tl.trans(dy_b_o), x_b_i, total, PRECISION, INTERPRET)
        dy_sq = dy_b_o.to(tl.float32) * dy_b_o.to(tl.float32)
        x_sq = x_b_i.to(tl.float32) * x_b_i.to(tl.float32)
        if dy_b_o.dtype == tl.bfloat16:
            dy_high = dy_sq.to(tl.bfloat16)
            x_high = x_sq.to(tl.bfloat16)
            dy_low = (dy_sq - dy_high.to(tl.float32)).to(tl.bfloat16)
            x_low = (x_sq - x_high.to(tl.float32)).to(tl.bfloat16)
            total_sq = product(tl.trans(dy_low), x_low, total_sq, PRECISION, INTERPRET)
            total_sq = product(tl.trans(dy_low), x_high, total_sq, PRECISION, INTERPRET)
            total_sq = product(tl.trans(dy_high), x_low, total_sq, PRECISION, INTERPRET)
            total_sq = product(tl.trans(dy_high), x_high, total_sq, PRECISION, INTERPRET)
        else:
            total_sq = product(tl.trans(dy_sq), x_sq, total_sq, PRECISION, INTERPRET)
    store_tile(dw, dw_sq, total, total_sq, o, i, outputs, inputs, part)


def kind_of(dtype: torch.dtype, fp32_precision: str) -> str:
    """The tables' name for a dtype, and for how float32 is multiplied: as PyTorch has been told to."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if fp32_precision == "tf32" else "float32"


def _describable(tensor: Tensor) -> bool:
    """Whether TMA can load (B, T, columns): 16-byte rows, one after another without overlap, and 32-bit places."""
    size = tensor.element_size()
    rows = tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1] * tensor.stride(1)
    return (
        tensor.stride(2) == 1
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(1) * size % 16 == 0
        and rows * size % 16 == 0
        and tensor.stride(1) >= tensor.shape[2]
        and rows >= (tensor.shape[1] - 1) * tensor.stride(1) + tensor.shape[2]
        and rows % tensor.stride(1) == 0  # strides nested, as those of a slice are
        and max(tensor.shape) < 2**31
    )


def _aligned(*tensors: Tensor) -> bool:
    """Whether loads along the last dimension, and the masks of their tails, come in whole vectors."""
    return all(
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(n % 16 == 0 for n in (tensor.shape[-1], *tensor.stride()[:-1]))
        for tensor in tensors
    )


def offset_dtype(*reaches: int) -> tl.dtype:
    """int32 where every distance inside a tile fits, else int64."""
    return tl.int32 if max(reaches) < 2**31 else tl.int64


def choose(dy: Tensor, x: Tensor) -> tuple[str, str, int]:
    """The row of configs.LINEAR for dy (B, T, O) and x (B, T, I): from shapes, strides, dtype, architecture alone."""
    arch = _launch.device_of(dy).arch
    kind = kind_of(dy.dtype, torch.backends.cuda.matmul.fp32_precision)
    table, positions = configs.LINEAR[arch], dy.shape[1]
    aligned = _aligned(dy, x)
    if positions == 1:
        return "one position" if aligned else "one position, unaligned", kind, 1
    if kind == "half" and arch >= 90 and _describable(dy) and _describable(x):
        kernel = "descriptor"
    else:
        kernel = "pointer" if aligned else "pointer, unaligned"
    short = [most for name, dtype, most in table if (name, dtype) == (kernel, kind) and most >= positions]
    return kernel, kind, min(short, default=0)


def linear_moments(
    dy: Tensor, x: Tensor, bias: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's kernel of `perexample.ops.linear_moments`; float32, bfloat16 and float16.

    dy (B, T, O), x (B, T, I) -> dw (O, I), dw_sq (O, I), db (O,), db_sq (O,), the last two empty unless `bias`.
    """
    name = "linear_moments"
    _launch.check(name, dy.dim() == 3, f"dy must be of shape (B, T, O), got {tuple(dy.shape)}")
    _launch.check(
        name, x.dim() == 3 and x.shape[:2] == dy.shape[:2],
        f"x must be (B={dy.shape[0]}, T={dy.shape[1]}, I), got {tuple(x.shape)}",
    )  # fmt: skip
    _launch.check_inputs(name, dy=dy, x=x)
    _launch.check(name, dy.dtype != torch.float64, "float64 is not supported")
    dtype = dtype or dy.dtype
    columns = bias_moments(dy, dtype) if bias else _launch.empty_moments((0,), dy, dtype)
    (batch, positions, outputs), inputs = dy.shape, x.shape[2]
    if batch * positions * outputs * inputs == 0:
        return *_launch.zero_moments((outputs, inputs), dy, dtype), *columns

    row, device = choose(dy, x), _launch.device_of(dy)
    tile, kernel = configs.LINEAR[device.arch][row], row[0].removesuffix(", unaligned")
    meta = {
        "BO": tile.outputs, "BI": tile.inputs, "GROUP": configs.GROUP,
        "PRECISION": "tf32" if row[1] == "tf32" else "ieee", "INTERPRET": _launch.INTERPRET,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    # Examples that stay together.
    unit = tile.positions if kernel == "one position" else 1
    program: Any
    if kernel == "one position":
        program, dy, x, sizes = _one_position, dy[:, 0], x[:, 0], (batch, outputs, inputs)
        meta["BB"] = tile.positions
        if dy.dtype == torch.float16:  # its square has 22 bits: two tf32
            meta["PRECISION"] = "tf32x3"
    else:
        program, sizes = _descriptor if kernel == "descriptor" else _pointer, (batch, positions, outputs, inputs)
        meta |= {"BT": tile.positions, "ONE_BLOCK": row[2] > 0}
    if kernel == "descriptor":
        operands: tuple[Any, ...] = (
            _descriptor_of(dy, tile.positions, tile.outputs), _descriptor_of(x, tile.positions, tile.inputs),
        )  # fmt: skip
        strides: tuple[int, ...] = ()
    else:
        operands, strides = (dy, x), (*dy.stride(), *x.stride())
        meta["OFFSET"] = offset_dtype(
            (tile.positions - 1) * dy.stride(-2) + (tile.outputs - 1) * dy.stride(-1),
            (tile.positions - 1) * x.stride(-2) + (tile.inputs - 1) * x.stride(-1),
        )
    tiles = _launch.cdiv(outputs, tile.outputs) * _launch.cdiv(inputs, tile.inputs)
    programs = tile.resident * device.processors
    parts = _launch.split(_launch.cdiv(batch, unit), tiles, programs, outputs * inputs, unit)

    def run(dw: Tensor, dw_sq: Tensor) -> None:
        grid = (tiles, parts.count)
        _launch.launch(program, grid, *operands, dw, dw_sq, *sizes, parts.examples, *strides, **meta)

    return *_launch.with_moments(run, (outputs, inputs), dy, dtype, parts.count), *columns


def _descriptor_of(tensor: Tensor, positions: int, columns: int) -> TensorDescriptor:
    """TMA's view of (B, T, columns); a batch of one may have any stride, which TMA would not take."""
    rows = tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1] * tensor.stride(1)
    return TensorDescriptor(tensor, list(tensor.shape), [rows, tensor.stride(1), 1], [1, positions, columns])
