"""The cells of recurrent layers, element by element; the products with the weights are cuBLAS'.

LSTM, with the activated gates i, f, g, o:  ``c = f c + i g``, ``h = o tanh(c)``. GRU, with r, z, n: its backward alone.
Everything is computed in float32, and rounded where it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, configs


@triton.jit
def tanh(x):
    """By its series near 0, where 1 - exp(-2 |x|) would cancel."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    small = tl.exp(-2 * tl.abs(x))
    far = (1 - small) / (1 + small)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def _lstm_cell(
    gates, before, after, h, count, size, gates_b, gates_j, before_b, before_j, after_b, after_j, h_b, h_j,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """after = f before + i g,  h = o tanh(after); the gates (count, 4 size) are activated in place, (i, f, o) by a
    sigmoid and g by tanh."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.cast(count, tl.int64) * size
    b = at // size
    j = at % size
    gate = gates + b * gates_b + j * gates_j
    step = tl.cast(size, tl.int64) * gates_j
    i = tl.sigmoid(tl.load(gate, mask=inside, other=0).to(tl.float32))
    f = tl.sigmoid(tl.load(gate + step, mask=inside, other=0).to(tl.float32))
    g = tanh(tl.load(gate + 2 * step, mask=inside, other=0).to(tl.float32))
    o = tl.sigmoid(tl.load(gate + 3 * step, mask=inside, other=0).to(tl.float32))
    c = f * tl.load(before + b * before_b + j * before_j, mask=inside, other=0).to(tl.float32) + i * g
    tl.store(gate, i, mask=inside)
    tl.store(gate + step, f, mask=inside)
    tl.store(gate + 2 * step, g, mask=inside)
    tl.store(gate + 3 * step, o, mask=inside)
    tl.store(after + b * after_b + j * after_j, c, mask=inside)
    tl.store(h + b * h_b + j * h_j, o * tanh(c), mask=inside)


@triton.jit
def _lstm_cell_backward(
    dgates, dc, dm, gates, before, after, count, size, dgates_b, dgates_j, dc_b, dc_j, dm_b, dm_j, gates_b, gates_j,
    before_b, before_j, after_b, after_j, BLOCK: tl.constexpr,
):  # fmt: skip
    """d = dc + dm o (1 - tanh(after)**2), dc = d f, and with a gate's own derivative
    dgates = (d g i (1 - i), d before f (1 - f), d i (1 - g**2), dm tanh(after) o (1 - o))."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.cast(count, tl.int64) * size
    b = at // size
    j = at % size
    gate = gates + b * gates_b + j * gates_j
    step = tl.cast(size, tl.int64) * gates_j
    i = tl.load(gate, mask=inside, other=0).to(tl.float32)
    f = tl.load(gate + step, mask=inside, other=0).to(tl.float32)
    g = tl.load(gate + 2 * step, mask=inside, other=0).to(tl.float32)
    o = tl.load(gate + 3 * step, mask=inside, other=0).to(tl.float32)
    squashed = tanh(tl.load(after + b * after_b + j * after_j, mask=inside, other=0).to(tl.float32))
    cell = tl.load(before + b * before_b + j * before_j, mask=inside, other=0).to(tl.float32)
    m = tl.load(dm + b * dm_b + j * dm_j, mask=inside, other=0).to(tl.float32)
    d = tl.load(dc + b * dc_b + j * dc_j, mask=inside, other=0).to(tl.float32) + m * o * (1 - squashed * squashed)
    out = dgates + b * dgates_b + j * dgates_j
    next_gate = tl.cast(size, tl.int64) * dgates_j
    tl.store(out, d * g * i * (1 - i), mask=inside)
    tl.store(out + next_gate, d * cell * f * (1 - f), mask=inside)
    tl.store(out + 2 * next_gate, d * i * (1 - g * g), mask=inside)
    tl.store(out + 3 * next_gate, m * squashed * o * (1 - o), mask=inside)
    tl.store(dc + b * dc_b + j * dc_j, d * f, mask=inside)


@triton.jit
def _gru_cell_backward(
    dgates, dhidden, dh, gates, hidden, state, count, size, dgates_b, dgates_j, dhidden_b, dhidden_j, dh_b, dh_j,
    gates_b, gates_j, hidden_b, hidden_j, state_b, state_j, BLOCK: tl.constexpr,
):  # fmt: skip
    """new = dh (1 - z) (1 - n**2), dgates = (new hidden r (1 - r), dh (state - n) z (1 - z), new), dhidden the same but
    new r at the end, dh = dh z."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.cast(count, tl.int64) * size
    b = at // size
    j = at % size
    gate = gates + b * gates_b + j * gates_j
    step = tl.cast(size, tl.int64) * gates_j
    r = tl.load(gate, mask=inside, other=0).to(tl.float32)
    z = tl.load(gate + step, mask=inside, other=0).to(tl.float32)
    n = tl.load(gate + 2 * step, mask=inside, other=0).to(tl.float32)
    d = tl.load(dh + b * dh_b + j * dh_j, mask=inside, other=0).to(tl.float32)
    old = tl.load(state + b * state_b + j * state_j, mask=inside, other=0).to(tl.float32)
    product = tl.load(hidden + b * hidden_b + j * hidden_j, mask=inside, other=0).to(tl.float32)
    new = d * (1 - z) * (1 - n * n)
    new_r = new * product * r * (1 - r)
    new_z = d * (old - n) * z * (1 - z)
    out = dgates + b * dgates_b + j * dgates_j
    next_gate = tl.cast(size, tl.int64) * dgates_j
    tl.store(out, new_r, mask=inside)
    tl.store(out + next_gate, new_z, mask=inside)
    tl.store(out + 2 * next_gate, new, mask=inside)
    out = dhidden + b * dhidden_b + j * dhidden_j
    next_gate = tl.cast(size, tl.int64) * dhidden_j
    tl.store(out, new_r, mask=inside)
    tl.store(out + next_gate, new_z, mask=inside)
    tl.store(out + 2 * next_gate, new * r, mask=inside)
    tl.store(dh + b * dh_b + j * dh_j, d * z, mask=inside)


def _run(kernel: triton.JITFunction, size: int, *tensors: Tensor) -> None:
    """Launch a cell's kernel on tensors (count, multiple of size)."""
    count = tensors[0].shape[0]
    if count * size > 0:
        strides = [stride for t in tensors for stride in t.stride()]
        grid = (_launch.cdiv(count * size, configs.CELL),)
        _launch.launch(kernel, grid, *tensors, count, size, *strides, BLOCK=configs.CELL)


def _check(name: str, shapes: dict[str, tuple[int, ...]], **tensors: Tensor) -> None:
    _launch.check_inputs(name, **tensors)
    for label, tensor in tensors.items():
        right = tuple(tensor.shape) == shapes[label]
        _launch.check(name, right, f"{label} must be {shapes[label]}, got {tuple(tensor.shape)}")
    _launch.check(name, next(iter(tensors.values())).dtype != torch.float64, "float64 is not supported")


def _lstm_shapes(name: str, cells: Tensor, weight_hh: Tensor, active: Sequence[int]) -> dict[str, tuple[int, ...]]:
    _launch.check(name, cells.dim() == 3, f"cells must be (T + 1, B, H), got {tuple(cells.shape)}")
    _launch.check(name, weight_hh.dim() == 2, f"weight_hh must be (4 H, P), got {tuple(weight_hh.shape)}")
    steps, batch, size = cells.shape[0] - 1, *cells.shape[1:]
    right = not active or (len(active) == steps and all(0 <= n <= batch for n in active))
    _launch.check(name, steps >= 0 and right, f"active must be {steps} numbers from 0 to {batch}, or none")
    width, all_gates = weight_hh.shape[1], (steps, batch, 4 * size)
    return {
        "cells": (steps + 1, batch, size), "states": (steps + 1, batch, width), "gates": all_gates,
        "dgates": all_gates, "dstates": (steps, batch, width), "dy": (steps, batch, width), "dh": (batch, width),
        "dc": (batch, size), "weight_hh": (4 * size, width), "weight_hr": (width, size),
    }  # fmt: skip


def _steps(gates: Tensor, active: Sequence[int], reverse: bool) -> list[tuple[int, int, int, int]]:
    """Of every step in the order of time: t, examples that are there, where the states before and after it lie."""
    order = range(gates.shape[0])
    return [
        (t, active[t] if active else gates.shape[1], t + reverse, t + (not reverse))
        for t in (reversed(order) if reverse else order)
    ]


def lstm_forward_(
    gates: Tensor, states: Tensor, cells: Tensor, weight_hh: Tensor, weight_hr: Tensor | None, active: Sequence[int],
    reverse: bool,
) -> None:  # fmt: skip
    """The dispatcher's kernel of `perexample.ops.lstm_forward_`: gates (T, B, 4 H), states, cells (T + 1, B, ...)."""
    name = "lstm_forward_"
    shapes, size = _lstm_shapes(name, cells, weight_hh, active), cells.shape[2]
    weights = {"weight_hh": weight_hh} | ({} if weight_hr is None else {"weight_hr": weight_hr})
    _check(name, shapes, gates=gates, states=states, cells=cells, **weights)
    _launch.check(name, weight_hr is not None or weight_hh.shape[1] == size, "without weight_hr, P must be H")
    for t, n, before, after in _steps(gates, active, reverse):
        gate = gates[t, :n].addmm_(states[before, :n], weight_hh.t())
        h = states[after, :n] if weight_hr is None else torch.empty_like(cells[after, :n])
        _run(_lstm_cell, size, gate, cells[before, :n], cells[after, :n], h)
        if weight_hr is not None:
            states[after, :n] = h.mm(weight_hr.t())
        if n < gates.shape[1]:
            states[after, n:], cells[after, n:] = states[before, n:], cells[before, n:]


def lstm_backward_(
    dgates: Tensor, dstates: Tensor | None, dh: Tensor, dc: Tensor, dy: Tensor, gates: Tensor, cells: Tensor,
    weight_hh: Tensor, weight_hr: Tensor | None, active: Sequence[int], reverse: bool,
) -> None:  # fmt: skip
    """The dispatcher's kernel of `perexample.ops.lstm_backward_`: dgates, gates (T, B, 4 H), cells (T + 1, B, H)."""
    name = "lstm_backward_"
    shapes, size = _lstm_shapes(name, cells, weight_hh, active), cells.shape[2]
    _launch.check(name, (dstates is None) == (weight_hr is None), "dstates must be given where weight_hr is")
    projection = {} if weight_hr is None or dstates is None else {"dstates": dstates, "weight_hr": weight_hr}
    _check(
        name, shapes, dgates=dgates, dh=dh, dc=dc, dy=dy, gates=gates, cells=cells, weight_hh=weight_hh, **projection
    )
    _launch.check(name, weight_hr is not None or weight_hh.shape[1] == size, "without weight_hr, P must be H")
    for t, n, before, after in reversed(_steps(gates, active, reverse)):
        dm = dh[:n].add_(dy[t, :n])
        if dstates is not None and weight_hr is not None:
            dstates[t, :n], dstates[t, n:] = dm, 0
            dm = dm.mm(weight_hr)
        _run(_lstm_cell_backward, size, dgates[t, :n], dc[:n], dm, gates[t, :n], cells[before, :n], cells[after, :n])
        dgates[t, n:] = 0
        dh[:n] = dgates[t, :n].mm(weight_hh)


def gru_cell_backward_(
    dgates: Tensor, dhidden: Tensor, dh: Tensor, gates: Tensor, hidden: Tensor, state: Tensor
) -> None:
    """The dispatcher's kernel of `perexample.ops.gru_cell_backward_`: the gates' (B, 3 H), others (B, H)."""
    name = "gru_cell_backward_"
    _launch.check(name, dh.dim() == 2, f"dh must be (B, H), got {tuple(dh.shape)}")
    shape = tuple(dh.shape)
    shapes = dict.fromkeys(("dgates", "dhidden", "gates"), (shape[0], 3 * shape[1]))
    shapes |= dict.fromkeys(("dh", "hidden", "state"), shape)
    _check(name, shapes, dh=dh, dgates=dgates, dhidden=dhidden, gates=gates, hidden=hidden, state=state)
    _run(_gru_cell_backward, shape[1], dgates, dhidden, dh, gates, hidden, state)
