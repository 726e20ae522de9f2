"""The cells of recurrent layers, element by element; the products with the weights are cuBLAS'.

LSTM, with the activated gates i, f, g, o:  ``c = f c + i g``, ``h = o tanh(c)``. GRU, with r, z, n:  the backward alone
of ``n = tanh(input + r hidden)``, ``h = (1 - z) n + z h``. Derivatives of gates before their activation are the dy of
(MATHS 3), whose t runs over the steps of time; its x are the inputs and the states. Everything is computed in float32,
and rounded where it is stored.
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
    """tanh(x) = sign(x) (1 - exp(-2 |x|)) / (1 + exp(-2 |x|)); near 0, where that cancels, by its series."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    small = tl.exp(-2 * tl.abs(x))
    far = (1 - small) / (1 + small)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def elements(count, size, BLOCK: tl.constexpr):
    """(b, j, inside): the example and the unit of each of a program's elements of (count, size)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at // size, at % size, at < tl.cast(count, tl.int64) * size


@triton.jit
def read(tensor, b, j, stride_b, stride_j, inside):
    """tensor[b, j] in float32."""
    return tl.load(tensor + b * stride_b + j * stride_j, mask=inside, other=0).to(tl.float32)


@triton.jit
def write(tensor, b, j, stride_b, stride_j, inside, value):
    """tensor[b, j] = value"""
    tl.store(tensor + b * stride_b + j * stride_j, value, mask=inside)


@triton.jit
def _lstm_cell(
    gates, before, after, h, count, size, gates_b, gates_j, before_b, before_j, after_b, after_j, h_b, h_j,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """i, f, o = sigmoid(i, f, o), g = tanh(g);  after = f before + i g,  h = o tanh(after), an x of (MATHS 3).

    The gates (count, 4 size) lie in the order i, f, g, o, and are activated in place.
    """
    b, j, inside = elements(count, size, BLOCK)
    i = tl.sigmoid(read(gates, b, j, gates_b, gates_j, inside))
    f = tl.sigmoid(read(gates, b, j + size, gates_b, gates_j, inside))
    g = tanh(read(gates, b, j + 2 * size, gates_b, gates_j, inside))
    o = tl.sigmoid(read(gates, b, j + 3 * size, gates_b, gates_j, inside))
    c = f * read(before, b, j, before_b, before_j, inside) + i * g
    write(gates, b, j, gates_b, gates_j, inside, i)
    write(gates, b, j + size, gates_b, gates_j, inside, f)
    write(gates, b, j + 2 * size, gates_b, gates_j, inside, g)
    write(gates, b, j + 3 * size, gates_b, gates_j, inside, o)
    write(after, b, j, after_b, after_j, inside, c)
    write(h, b, j, h_b, h_j, inside, o * tanh(c))


@triton.jit
def _lstm_cell_backward(
    dgates, dc, dm, gates, before, after, count, size, dgates_b, dgates_j, dc_b, dc_j, dm_b, dm_j, gates_b, gates_j,
    before_b, before_j, after_b, after_j, BLOCK: tl.constexpr,
):  # fmt: skip
    """d = dc + dm o (1 - tanh(after)**2),  dc = d f,  and the dy of (MATHS 3), with each gate's own derivative:
    dgates = (d g i (1 - i), d before f (1 - f), d i (1 - g**2), dm tanh(after) o (1 - o)).

    dm is the derivative of h, dc that of the cell: on entry of the one after this step, then of the one before.
    """
    b, j, inside = elements(count, size, BLOCK)
    i = read(gates, b, j, gates_b, gates_j, inside)
    f = read(gates, b, j + size, gates_b, gates_j, inside)
    g = read(gates, b, j + 2 * size, gates_b, gates_j, inside)
    o = read(gates, b, j + 3 * size, gates_b, gates_j, inside)
    squashed = tanh(read(after, b, j, after_b, after_j, inside))
    cell = read(before, b, j, before_b, before_j, inside)
    m = read(dm, b, j, dm_b, dm_j, inside)
    d = read(dc, b, j, dc_b, dc_j, inside) + m * o * (1 - squashed * squashed)
    write(dgates, b, j, dgates_b, dgates_j, inside, d * g * i * (1 - i))
    write(dgates, b, j + size, dgates_b, dgates_j, inside, d * cell * f * (1 - f))
    write(dgates, b, j + 2 * size, dgates_b, dgates_j, inside, d * i * (1 - g * g))
    write(dgates, b, j + 3 * size, dgates_b, dgates_j, inside, m * squashed * o * (1 - o))
    write(dc, b, j, dc_b, dc_j, inside, d * f)


@triton.jit
def _gru_cell_backward(
    dgates, dhidden, dh, gates, hidden, state, count, size, dgates_b, dgates_j, dhidden_b, dhidden_j, dh_b, dh_j,
    gates_b, gates_j, hidden_b, hidden_j, state_b, state_j, BLOCK: tl.constexpr,
):  # fmt: skip
    """new = dh (1 - z) (1 - n**2),  dh = dh z,  and the dy of (MATHS 3), of the input's and of the state's product:
    dgates = (new hidden r (1 - r), dh (state - n) z (1 - z), new),  dhidden the same but new r at the end.

    The gates (count, 3 size) lie in the order r, z, n.
    """
    b, j, inside = elements(count, size, BLOCK)
    r = read(gates, b, j, gates_b, gates_j, inside)
    z = read(gates, b, j + size, gates_b, gates_j, inside)
    n = read(gates, b, j + 2 * size, gates_b, gates_j, inside)
    product = read(hidden, b, j, hidden_b, hidden_j, inside)
    d = read(dh, b, j, dh_b, dh_j, inside)
    new = d * (1 - z) * (1 - n * n)
    new_r = new * product * r * (1 - r)
    new_z = d * (read(state, b, j, state_b, state_j, inside) - n) * z * (1 - z)
    write(dgates, b, j, dgates_b, dgates_j, inside, new_r)
    write(dgates, b, j + size, dgates_b, dgates_j, inside, new_z)
    write(dgates, b, j + 2 * size, dgates_b, dgates_j, inside, new)
    write(dhidden, b, j, dhidden_b, dhidden_j, inside, new_r)
    write(dhidden, b, j + size, dhidden_b, dhidden_j, inside, new_z)
    write(dhidden, b, j + 2 * size, dhidden_b, dhidden_j, inside, new * r)
    write(dh, b, j, dh_b, dh_j, inside, d * z)


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
