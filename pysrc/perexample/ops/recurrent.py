"""The cells of recurrent layers, element by element; the products with the weights are elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_floating, check_tensor, register

__all__ = ["gru_cell_backward_", "lstm_cell_", "lstm_cell_backward_"]


def _lstm_forward_reference(gates: Tensor, cell: Tensor, state: Tensor, h: Tensor) -> None:
    i, f, g, o = gates.chunk(4, 1)
    for gate in (i, f, o):
        gate.sigmoid_()
    g.tanh_()
    state.copy_(f * cell + i * g)
    h.copy_(o * state.tanh())


def _lstm_reference(dgates: Tensor, dc: Tensor, dh: Tensor, gates: Tensor, state: Tensor, cell: Tensor) -> None:
    squashed = state.tanh()
    i, f, g, o = gates.chunk(4, 1)
    dc += dh * o * (1 - squashed.square())
    grads = (dc * g * i * (1 - i), dc * cell * f * (1 - f), dc * i * (1 - g.square()), dh * squashed * o * (1 - o))
    dgates.copy_(torch.cat(grads, 1))
    dc *= f


def _gru_reference(dgates: Tensor, dhidden: Tensor, dh: Tensor, gates: Tensor, hidden: Tensor, state: Tensor) -> None:
    r, z, n = gates.chunk(3, 1)
    new = dh * (1 - z) * (1 - n.square())
    dgates.copy_(torch.cat((new * hidden * r * (1 - r), dh * (state - n) * z * (1 - z), new), 1))
    dhidden.copy_(torch.cat((dgates[:, : 2 * dh.shape[1]], new * r), 1))
    dh *= z


def _fake(*args: Tensor) -> None:
    return None


_lstm_forward_op = register(
    "lstm_cell_(Tensor(a!) gates, Tensor cell, Tensor(b!) state, Tensor(c!) h) -> ()", _lstm_forward_reference, _fake
)
_lstm_op = register(
    "lstm_cell_backward_(Tensor(a!) dgates, Tensor(b!) dc, Tensor dh, Tensor gates, Tensor state, Tensor cell) -> ()",
    _lstm_reference,
    _fake,
)
_gru_op = register(
    "gru_cell_backward_(Tensor(a!) dgates, Tensor(b!) dhidden, Tensor(c!) dh, Tensor gates, Tensor hidden,"
    " Tensor state) -> ()",
    _gru_reference,
    _fake,
)


def _check(name: str, batch: int, width: int, /, **tensors: Tensor) -> None:
    for label, tensor in tensors.items():
        factor = 1
        if label in ("dgates", "dhidden", "gates"):
            factor = 4 if name.startswith("lstm") else 3
        shape = (batch, width * factor)
        check_tensor(name, label, tensor, str(shape), isinstance(tensor, Tensor) and tuple(tensor.shape) == shape)
    check_floating(name, **tensors)


def lstm_cell_(gates: Tensor, cell: Tensor, state: Tensor, h: Tensor) -> None:
    """One step of an LSTM cell, in place. With ``i, f, g, o`` the activated gates::

        state = f cell + i g
        h     = o tanh(state)

    Args:
        gates: (B, 4 H)  before activation, in the order i, f, g, o; activated in place.
        cell: (B, H)  the cell state before the step.
        state: (B, H)  written: the one after.
        h: (B, H)  written.
    """
    name = "lstm_cell_"
    check_tensor(name, "cell", cell, "of shape (B, H)", isinstance(cell, Tensor) and cell.dim() == 2)
    _check(name, *cell.shape, cell=cell, gates=gates, state=state, h=h)
    _lstm_forward_op(gates, cell, state, h)


def lstm_cell_backward_(dgates: Tensor, dc: Tensor, dh: Tensor, gates: Tensor, state: Tensor, cell: Tensor) -> None:
    """One step of an LSTM cell, backward, in place. With ``i, f, g, o`` the activated gates::

        dc    += dh o (1 - tanh(state)**2)
        dgates = (dc g i (1 - i), dc cell f (1 - f), dc i (1 - g**2), dh tanh(state) o (1 - o))
        dc     = dc f

    Args:
        dgates: (B, 4 H)  written: the gradients before activation.
        dc: (B, H)  the gradient of the cell state after the step; becomes that of the one before.
        dh: (B, H)  the gradient of ``o tanh(state)``.
        gates: (B, 4 H)  after activation, in the order i, f, g, o.
        state: (B, H)  the cell state after the step.
        cell: (B, H)  the cell state before the step.
    """
    name = "lstm_cell_backward_"
    check_tensor(name, "dh", dh, "of shape (B, H)", isinstance(dh, Tensor) and dh.dim() == 2)
    _check(name, *dh.shape, dh=dh, dgates=dgates, dc=dc, gates=gates, state=state, cell=cell)
    _lstm_op(dgates, dc, dh, gates, state, cell)


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
    _check(name, *dh.shape, dh=dh, dgates=dgates, dhidden=dhidden, gates=gates, hidden=hidden, state=state)
    _gru_op(dgates, dhidden, dh, gates, hidden, state)
