"""Recurrent layers, without what does not depend on the step before: an LSTM over all steps, the cell of a GRU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check_floating, check_tensor, register

__all__ = ["after_and_before", "gru_cell_backward_", "lstm_backward_", "lstm_forward_"]


def after_and_before(states: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states after each step and those before it, of all (T + 1, B, ...): views."""
    return (states[:-1], states[1:]) if reverse else (states[1:], states[:-1])


def _steps(gates: Tensor, active: Sequence[int], reverse: bool) -> list[tuple[int, int]]:
    """(t, how many examples are there) in the order of time."""
    order = range(gates.shape[0])
    return [(t, active[t] if active else gates.shape[1]) for t in (reversed(order) if reverse else order)]


def _lstm_forward_reference(
    gates: Tensor,
    states: Tensor,
    cells: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    active: Sequence[int],
    reverse: bool,
) -> None:
    (h_after, h_before), (c_after, c_before) = (after_and_before(s, reverse) for s in (states, cells))
    for t, n in _steps(gates, active, reverse):
        gate = gates[t, :n].addmm_(h_before[t, :n], weight_hh.t())
        i, f, g, o = gate.chunk(4, 1)
        for part in (i, f, o):
            part.sigmoid_()
        g.tanh_()
        cell = torch.addcmul(f * c_before[t, :n], i, g, out=c_after[t, :n])
        h = o * cell.tanh()
        h_after[t, :n] = h if weight_hr is None else h.mm(weight_hr.t())
        h_after[t, n:], c_after[t, n:] = h_before[t, n:], c_before[t, n:]


def _lstm_backward_reference(
    dgates: Tensor,
    dstates: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    dy: Tensor,
    gates: Tensor,
    cells: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    active: Sequence[int],
    reverse: bool,
) -> None:
    after, before = after_and_before(cells, reverse)
    for t, n in reversed(_steps(gates, active, reverse)):
        dm = dh[:n].add_(dy[t, :n])
        if dstates is not None and weight_hr is not None:
            dstates[t, :n], dstates[t, n:] = dm, 0
            dm = dm.mm(weight_hr)
        i, f, g, o = gates[t, :n].chunk(4, 1)
        squashed, cell = after[t, :n].tanh(), before[t, :n]
        d = dc[:n].add_(dm * o * (1 - squashed.square()))
        parts = (d * g * i * (1 - i), d * cell * f * (1 - f), d * i * (1 - g.square()), dm * squashed * o * (1 - o))
        dgates[t, :n], dgates[t, n:] = torch.cat(parts, 1), 0
        d *= f
        torch.mm(dgates[t, :n], weight_hh, out=dh[:n])


def _gru_reference(dgates: Tensor, dhidden: Tensor, dh: Tensor, gates: Tensor, hidden: Tensor, state: Tensor) -> None:
    r, z, n = gates.chunk(3, 1)
    new = dh * (1 - z) * (1 - n.square())
    dgates.copy_(torch.cat((new * hidden * r * (1 - r), dh * (state - n) * z * (1 - z), new), 1))
    dhidden.copy_(torch.cat((dgates[:, : 2 * dh.shape[1]], new * r), 1))
    dh *= z


def _fake(*args: Tensor) -> None:
    return None


_lstm_forward_op = register(
    "lstm_forward_(Tensor(a!) gates, Tensor(b!) states, Tensor(c!) cells, Tensor weight_hh, Tensor? weight_hr,"
    " int[] active, bool reverse) -> ()",
    _lstm_forward_reference,
    _fake,
)
_lstm_backward_op = register(
    "lstm_backward_(Tensor(a!) dgates, Tensor(b!)? dstates, Tensor(c!) dh, Tensor(d!) dc, Tensor dy, Tensor gates,"
    " Tensor cells, Tensor weight_hh, Tensor? weight_hr, int[] active, bool reverse) -> ()",
    _lstm_backward_reference,
    _fake,
)
_gru_op = register(
    "gru_cell_backward_(Tensor(a!) dgates, Tensor(b!) dhidden, Tensor(c!) dh, Tensor gates, Tensor hidden,"
    " Tensor state) -> ()",
    _gru_reference,
    _fake,
)


def _check(name: str, shapes: dict[str, tuple[int, ...]], /, **tensors: Tensor | None) -> None:
    there = {label: tensor for label, tensor in tensors.items() if tensor is not None}
    for label, tensor in there.items():
        shape = shapes[label]
        check_tensor(name, label, tensor, str(shape), isinstance(tensor, Tensor) and tuple(tensor.shape) == shape)
    check_floating(name, **there)


def _lstm_shapes(
    name: str, gates: Tensor, cells: Tensor, weight_hh: Tensor, projects: bool, active: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    for label, value, dims in (("cells", cells, "(T + 1, B, H)"), ("weight_hh", weight_hh, "(4 H, P)")):
        ok = isinstance(value, Tensor) and value.dim() == (3 if label == "cells" else 2)
        check_tensor(name, label, value, f"of shape {dims}", ok)
    steps, batch, size = cells.shape[0] - 1, *cells.shape[1:]
    width = weight_hh.shape[1] if projects else size
    if active and (len(active) != steps or not all(0 <= n <= batch for n in active)):
        raise ValueError(f"{name}: active must be {steps} numbers from 0 to {batch}, or none, got {list(active)}")
    shapes = dict.fromkeys(("gates", "dgates"), (steps, batch, 4 * size))
    shapes |= {"cells": (steps + 1, batch, size), "states": (steps + 1, batch, width)}
    shapes |= dict.fromkeys(("dy", "dstates"), (steps, batch, width))
    return shapes | {
        "dh": (batch, width),
        "dc": (batch, size),
        "weight_hh": (4 * size, width),
        "weight_hr": (width, size),
    }


def lstm_forward_(
    gates: Tensor,
    states: Tensor,
    cells: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None = None,
    active: Sequence[int] = (),
    reverse: bool = False,
) -> None:
    """All steps of an LSTM in one direction, in place. At each, with ``i, f, g, o`` the activated gates::

        gates += h @ weight_hh.T
        c = f c + i g
        h = o tanh(c)                (@ weight_hr.T)

    Args:
        gates: (T, B, 4 H)  the products with the input and the biases; become the activated i, f, g, o.
        states: (T + 1, B, P)  h before, between and after all steps: of these the one before the first step is given,
            states[0], or states[T] where time runs backward; the others are written. Without projection P is H.
        cells: (T + 1, B, H)  the same for c.
        weight_hh: (4 H, P)
        weight_hr: (P, H)  of the projection.
        active: how many examples, counted from the first, are there at each step; none: all. The others' h and c are
            carried on, their gates undefined.
        reverse: from the last step to the first.
    """
    name = "lstm_forward_"
    shapes = _lstm_shapes(name, gates, cells, weight_hh, weight_hr is not None, active)
    _check(name, shapes, gates=gates, states=states, cells=cells, weight_hh=weight_hh, weight_hr=weight_hr)
    _lstm_forward_op(gates, states, cells, weight_hh, weight_hr, list(active), reverse)


def lstm_backward_(
    dgates: Tensor,
    dstates: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    dy: Tensor,
    gates: Tensor,
    cells: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None = None,
    active: Sequence[int] = (),
    reverse: bool = False,
) -> None:
    """The backward of `lstm_forward_`, in place. At each step, from the last to the first::

        dh    += dy                  dstates = dh                 dm = dh  (@ weight_hr)
        dc    += dm o (1 - tanh(c_after)**2)
        dgates = (dc g i (1 - i), dc c_before f (1 - f), dc i (1 - g**2), dm tanh(c_after) o (1 - o))
        dc     = dc f                dh = dgates @ weight_hh

    Args:
        dgates: (T, B, 4 H)  written: the gradients before activation; 0 for examples that are not there.
        dstates: (T, B, P)  written: the gradients of h; None without projection.
        dh: (B, P)  the gradient of the last h; becomes that of the first.
        dc: (B, H)  the same for c.
        dy: (T, B, P)  the gradients of the outputs.
        gates, cells: as `lstm_forward_` has left them.
        weight_hh, weight_hr, active, reverse: as there.
    """
    name = "lstm_backward_"
    shapes = _lstm_shapes(name, gates, cells, weight_hh, weight_hr is not None, active)
    if (dstates is None) != (weight_hr is None):
        raise ValueError(f"{name}: dstates must be given where weight_hr is, and only there")
    _check(
        name, shapes, gates=gates, dgates=dgates, dstates=dstates, dh=dh, dc=dc, dy=dy, cells=cells,
        weight_hh=weight_hh, weight_hr=weight_hr,
    )  # fmt: skip
    _lstm_backward_op(dgates, dstates, dh, dc, dy, gates, cells, weight_hh, weight_hr, list(active), reverse)


def gru_cell_backward_(
    dgates: Tensor, dhidden: Tensor, dh: Tensor, gates: Tensor, hidden: Tensor, state: Tensor
) -> None:
    """One step of a GRU cell, backward, in place. With ``r, z, n`` the activated gates::

        new     = dh (1 - z) (1 - n**2)
        dgates  = (new hidden r (1 - r), dh (state - n) z (1 - z), new)
        dhidden = the same with new r at the end
        dh      = dh z

    Args:
        dgates: (B, 3 H)  written: the gradients of the products with the input.
        dhidden: (B, 3 H)  written: the gradients of the products with the state.
        dh: (B, H)  the gradient of the state after the step; becomes what of it passes on to the one before directly.
        gates: (B, 3 H)  after activation, in the order r, z, n.
        hidden: (B, H)  the product with the state that belongs to n.
        state: (B, H)  before the step.
    """
    name = "gru_cell_backward_"
    check_tensor(name, "dh", dh, "of shape (B, H)", isinstance(dh, Tensor) and dh.dim() == 2)
    wide, tensors = (dh.shape[0], 3 * dh.shape[1]), {"dgates": dgates, "dhidden": dhidden, "gates": gates}
    shapes = dict.fromkeys(tensors, wide) | dict.fromkeys(("dh", "hidden", "state"), tuple(dh.shape))
    _check(name, shapes, dh=dh, **tensors, hidden=hidden, state=state)
    _gru_op(dgates, dhidden, dh, gates, hidden, state)
