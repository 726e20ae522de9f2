"""The Function of recurrent layers: one layer in one direction (MATHS 3, t running over time).

A weight is used at every time step. The gradients of the gates are gathered over time, so that each weight takes one
contraction (B, T, gates) x (B, T, inputs); nothing is larger than B T gates. The products with the input leave the loop
over time, in both passes.

Time comes first here: x is (T, B, I). The states are kept in one tensor (T + 1, B, P), with the initial one at its
beginning (at its end where time runs backward), so that both the states and the states before them are views of it.
Where a sequence has ended, its state is carried on and its gates get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..moments.uses import Call
from ..ops.recurrent import after_and_before
from ._common import add_small, autocast, call_of, check_dtype, once_differentiable, one_use, ops, sum_positions

__all__ = ["Parameters", "recurrent", "recurrent_dtypes"]


class Parameters(NamedTuple):
    """Of one layer in one direction, or their leaves; None for what it has not."""

    weight_ih: Tensor | None
    weight_hh: Tensor | None
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None


def _states(initial: Tensor, steps: int, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(all, those after each step, those before each step), with the initial one filled in."""
    states = initial.new_empty(steps + 1, *initial.shape)
    states[steps if reverse else 0] = initial
    return (states, *after_and_before(states, reverse))


class _Pass(NamedTuple):
    """What the cells need to know of a pass: its order in time and how many examples are there at each step."""

    steps: list[int]
    active: Sequence[int]
    reverse: bool


def _gru_forward(run: _Pass, gates: Tensor, w: Parameters, after: Tensor, before: Tensor, cells: Tensor) -> None:
    """Gates (T, B, 3 H) come as the products with the input, and leave activated: r, z, n; cells: n's part of h."""
    size = cells.shape[2]
    weight, batch = w.weight_hh.t(), gates.shape[1]  # type: ignore[union-attr]
    for t in run.steps:
        n = run.active[t]
        h, gate = before[t], gates[t]
        if n < batch:
            after[t, n:] = h[n:]
            h, gate = h[:n], gate[:n]
        hidden = h.mm(weight) if w.bias_hh is None else torch.addmm(w.bias_hh, h, weight)
        rz, new = gate[:, : 2 * size], gate[:, 2 * size :]
        rz.add_(hidden[:, : 2 * size]).sigmoid_()
        cells[t, :n] = hidden[:, 2 * size :]
        new.addcmul_(rz[:, :size], hidden[:, 2 * size :]).tanh_()
        torch.lerp(new, h, rz[:, size:], out=after[t, :n])


def _rnn_forward(run: _Pass, gates: Tensor, w: Parameters, after: Tensor, before: Tensor, relu: bool) -> None:
    weight, batch = w.weight_hh.t(), gates.shape[1]  # type: ignore[union-attr]
    for t in run.steps:
        n = run.active[t]
        if n < batch:
            after[t, n:] = before[t, n:]
        state = torch.addmm(gates[t, :n], before[t, :n], weight, out=after[t, :n])
        state.relu_() if relu else state.tanh_()


def _gru_backward(
    run: _Pass, gates: Tensor, w: Parameters, before: Tensor, cells: Tensor, dy: Tensor, dh: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the products with the input, and of those with the state."""
    weight, batch = w.weight_hh, gates.shape[1]
    whole = all(n == batch for n in run.active)
    make = torch.empty_like if whole else torch.zeros_like
    dgates, dhidden = make(gates), make(gates)
    assert weight is not None
    for t in reversed(run.steps):
        n = run.active[t]
        dh_t = dh if n == batch else dh[:n]
        dh_t += dy[t, :n]
        ops.gru_cell_backward_(dgates[t, :n], dhidden[t, :n], dh_t, gates[t, :n], cells[t, :n], before[t, :n])
        dh_t.addmm_(dhidden[t, :n], weight)
    return dgates, dhidden


def _rnn_backward(run: _Pass, w: Parameters, after: Tensor, dy: Tensor, dh: Tensor, relu: bool) -> Tensor:
    weight, batch = w.weight_hh, after.shape[1]
    whole = all(n == batch for n in run.active)
    # What lies between a state and its sum, for all steps at once.
    slope = (after > 0).to(after.dtype) if relu else 1 - after.square()
    dgates = torch.empty_like(after) if whole else torch.zeros_like(after)
    assert weight is not None
    for t in reversed(run.steps):
        n = run.active[t]
        dh_t = dh if n == batch else dh[:n]
        dh_t += dy[t, :n]
        torch.mul(dh_t, slope[t, :n], out=dgates[t, :n])
        torch.mm(dgates[t, :n], weight, out=dh_t)
    return dgates


class _Recurrent(Function):
    """x: (T, B, I), h: (B, P), c: (B, H) or None -> (T, B, P), the last h, the last c (LSTM)."""

    @staticmethod
    def forward(
        ctx: Any,
        mode: str,
        reverse: bool,
        active: Sequence[int] | None,
        uses: Tensor | Call | None,
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        steps, batch, _ = x.shape
        ctx.batch_dim = 1
        ctx.call = call_of(uses, "product", "product", "other", "other", "product")
        ctx.grad_dtypes = [None if p is None else p.dtype for p in parameters[:5]]
        w = Parameters(*(None if p is None else p.to(x.dtype) for p in parameters[:5]))
        assert w.weight_hh is not None and w.weight_ih is not None
        order = list(range(steps))
        run = _Pass(order[::-1] if reverse else order, [batch] * steps if active is None else active, reverse)
        bias = w.bias_ih
        if bias is not None and w.bias_hh is not None and mode != "GRU":
            bias = bias + w.bias_hh
        gates: Tensor | None = F.linear(x, w.weight_ih, bias)
        assert gates is not None
        states, after, before = _states(h, steps, reverse)
        cells = None
        if mode == "LSTM":
            assert c is not None
            cells, _, _ = _states(c, steps, reverse)
            ops.lstm_forward_(gates, states, cells, w.weight_hh, w.weight_hr, active or (), reverse)
        elif mode == "GRU":
            cells = torch.zeros_like(after)
            _gru_forward(run, gates, w, after, before, cells)
        else:
            _rnn_forward(run, gates, w, after, before, mode == "RNN_RELU")
            gates = None  # the states tell all
        ctx.mode, ctx.reverse, ctx.active, ctx.run = mode, reverse, active, run
        ctx.save_for_backward(x, gates, states, cells, *w)
        last = 0 if reverse else -1
        results = [after, states[last].clone()]
        if mode == "LSTM" and cells is not None:
            results.append(cells[last].clone())
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor, dc: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, gates, states, cells, *weights = ctx.saved_tensors
        w, run = Parameters(*weights), ctx.run
        want_uses, want_x = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        want = Parameters(*ctx.needs_input_grad[12:17])
        after, before = after_and_before(states, ctx.reverse)
        assert w.weight_ih is not None
        dh = dh.clone(memory_format=torch.contiguous_format)
        dstates = projected = None
        if ctx.mode == "LSTM":
            assert dc is not None
            dc = dc.clone(memory_format=torch.contiguous_format)
            assert w.weight_hh is not None
            dhidden = dgates = torch.empty_like(gates)
            if w.weight_hr is not None:
                dstates = torch.empty_like(after)
                projected = after_and_before(cells, ctx.reverse)[0].tanh().mul_(gates[..., 3 * cells.shape[2] :])
            active = () if ctx.active is None else ctx.active
            ops.lstm_backward_(dgates, dstates, dh, dc, dy, gates, cells, w.weight_hh, w.weight_hr, active, ctx.reverse)
        elif ctx.mode == "GRU":
            dgates, dhidden = _gru_backward(run, gates, w, before, cells, dy, dh)
        else:
            dgates = dhidden = _rnn_backward(run, w, after, dy, dh, ctx.mode == "RNN_RELU")
        uses = one_use(dy, want_uses)
        dx = dgates.matmul(w.weight_ih) if want_x else None
        ih = _contract(dgates, x, want.weight_ih, want.bias_ih, ctx.grad_dtypes[0] or ctx.grad_dtypes[2])
        same_bias = dhidden is dgates and want.bias_ih
        hh = _contract(
            dhidden, before, want.weight_hh, want.bias_hh and not same_bias, ctx.grad_dtypes[1] or ctx.grad_dtypes[3]
        )
        if want.bias_hh and same_bias:
            hh = (*hh[:2], ih[2], ih[3])
        hr: tuple[Tensor | None, ...] = (None, None)
        if want.weight_hr and dstates is not None and projected is not None:
            hr = _contract(dstates, projected, True, False, ctx.grad_dtypes[4])
        grads = (ih[0], hh[0], ih[2], hh[2], hr[0])
        leaves = [ih[1], hh[1], ih[3], hh[3], hr[1]]
        if ctx.call is not None:
            products = ((0, dgates, x), (1, dhidden, before), (4, dstates, projected))
            for which, left, right in products:
                alone = leaves[which]
                shared = None if alone is None else ctx.call.shared(which)
                if shared is not None:
                    assert alone is not None and left is not None and right is not None
                    leaves[which] = shared.add_product(left.transpose(0, 1), right.transpose(0, 1), alone)
            leaves[2] = add_small(ctx.call, 2, leaves[2], lambda: sum_positions(dgates.transpose(0, 1)))
            leaves[3] = add_small(ctx.call, 3, leaves[3], lambda: sum_positions(dhidden.transpose(0, 1)))
        return None, None, None, uses, dx, dh, dc, *grads, *leaves


def _contract(
    dy: Tensor, x: Tensor, want_weight: Any, want_bias: Any, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dw, dw_sq, db, db_sq of (T, B, O) and (T, B, I), gathered over time."""
    dy = dy.transpose(0, 1)
    if want_weight:
        dw, dw_sq, db, db_sq = ops.linear_moments(dy, x.transpose(0, 1), bool(want_bias), dtype)
        return (dw, dw_sq, db, db_sq) if want_bias else (dw, dw_sq, None, None)
    if want_bias:
        return (None, None, *ops.bias_moments(dy, dtype))
    return None, None, None, None


def recurrent(
    mode: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    parameters: Parameters,
    leaves: Parameters,
    uses: Tensor | Call | None,
    reverse: bool = False,
    active: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """One layer of an LSTM, GRU or RNN in one direction, with second moments.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        x: (T, B, I)  its dtype is the one to compute in.
        h: (B, P)  the initial state.
        c: (B, H)  the initial cell state of an LSTM.
        parameters, leaves: in the layout of torch.nn.
        uses: the leaf that counts uses, or the `Call` of the five parameters.
        reverse: run from the last step to the first.
        active: how many examples, counted from the first, are still there at each step; all by default.

    Returns:
        The states (T, B, P) and the last one (B, P); of an LSTM also the last cell state (B, H).
    """
    _, context = autocast(x, low_precision=True)
    with context:
        c = None if c is None else c.to(x.dtype)
        return _Recurrent.apply(mode, reverse, active, uses, x, h.to(x.dtype), c, *parameters, *leaves)


def recurrent_dtypes(mode: str, x: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the output, and the one to compute in: x has to be cast to it before the first layer.

    On the CPU half precision is widened: there is nothing to gain from a recurrence that rounds every state and gate.
    """
    dtype, context = autocast(x, low_precision=True)
    check_dtype(mode, x, weight, context)
    half, cpu = dtype in (torch.bfloat16, torch.float16), x.device.type == "cpu"
    # Under autocast on the CPU a stock GRU comes out in the dtype of its state.
    return x.dtype if cpu and mode == "GRU" else dtype, torch.float32 if half and cpu else dtype
