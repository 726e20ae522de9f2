"""Recurrent layers and cells."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import autograd
from ..autograd import Parameters
from ..moments import Call, ExampleCount, MomentModule

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class _Recurrent(MomentModule):
    """What the three have in common: all layers, directions, projections, and packed sequences."""

    _batch_at = "says"
    _reusable = True
    mode: str
    num_layers: int
    hidden_size: int
    proj_size: int
    dropout: float
    bidirectional: bool
    batch_first: bool

    @property
    def batch_dim(self) -> int:  # type: ignore[override]
        """Which dimension of the input is the batch."""
        return 0 if self.batch_first else 1

    def _join(self, examples: ExampleCount, name: str) -> None:
        super()._join(examples, name)
        # Dynamo leaves recurrent layers to eager mode, but would trace the frames inside. Done here and once, as it
        # loads all of Dynamo.
        if not hasattr(_Recurrent.forward, "_torchdynamo_disable"):
            _Recurrent.forward = torch.compiler.disable(_Recurrent.forward)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = nn.RNNBase.__getstate__(self)
        state.pop("_moments", None)
        return state

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not self._recording(*self._parameters):
            return super().forward(input, hx)
        packed = isinstance(input, PackedSequence)
        if packed:
            self._check_packed(int(input.batch_sizes[0]))
        else:
            self._check_batch(input, 3)
        if not torch.is_grad_enabled():
            return super().forward(input, hx)
        if not packed:
            x = input.transpose(0, 1) if self.batch_first else input
            initial = self._initial(x, hx)
            self._check_arguments(input, initial, None)
            y, states = self._run(x, initial, None)
            return (y.transpose(0, 1) if self.batch_first else y), states
        # The longest come first, so those that are still there at a step are the first `batch_sizes` of it.
        data, batch_sizes, order, back = input
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        initial = self._initial(x, hx)
        self._check_arguments(data, initial, batch_sizes)
        if hx is not None and order is not None:
            initial = tuple(s.index_select(1, order) for s in initial)
        y, states = self._run(x, initial, batch_sizes.tolist())
        if back is not None:
            states = _map(states, lambda s: s.index_select(1, back))
        repacked = pack_padded_sequence(y, lengths)
        return PackedSequence(repacked.data, batch_sizes, order, back), states

    def _check_packed(self, batch: int) -> None:
        expected = self._examples.batch
        if expected is not None and batch != expected:
            raise ValueError(
                f"{self._label()} saw a packed sequence of {batch} examples, the batch has {expected}; pack all "
                f"examples of the batch together, or run this part under px.no_moments()"
            )

    def _check_arguments(self, input: Tensor, initial: tuple[Tensor, ...], batch_sizes: Tensor | None) -> None:
        hx = initial if self.mode == "LSTM" else initial[0]
        self.check_forward_args(input, hx, batch_sizes)  # type: ignore[operator]

    def _initial(self, x: Tensor, hx: Any) -> tuple[Tensor, ...]:
        """The initial states, (layers * directions, B, ...) each: h, and for an LSTM c."""
        if hx is not None:
            return hx if isinstance(hx, tuple) else (hx,)
        count = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]
        return tuple(x.new_zeros(count, x.shape[1], size) for size in sizes)

    def _run(self, x: Tensor, initial: tuple[Tensor, ...], active: list[int] | None) -> tuple[Tensor, Any]:
        """x: (T, B, I) -> (T, B, directions * P), and the last states as the stock layer returns them."""
        names = list(self._parameters)
        *leaves, uses = self._leaves(*names)
        leaf_of = dict(zip(names, leaves, strict=True))
        place_of = {name: i for i, name in enumerate(names)}
        directions = 2 if self.bidirectional else 1
        last: list[tuple[Tensor, ...]] = []
        dtype, wide = autograd.recurrent_dtypes(self.mode, x, self._parameters["weight_ih_l0"])
        x = x.to(wide)
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                suffix = f"_l{layer}{'_reverse' if direction else ''}"
                own = [f"{name}{suffix}" for name in Parameters._fields]
                at = layer * directions + direction
                call = uses.take([place_of.get(name) for name in own]) if isinstance(uses, Call) else None
                y, *states = autograd.recurrent(
                    self.mode,
                    x,
                    initial[0][at],
                    initial[1][at] if self.mode == "LSTM" else None,
                    Parameters(*(self._parameters.get(name) for name in own)),
                    Parameters(*(leaf_of.get(name) for name in own)),
                    # One scalar counts the uses of the whole layer.
                    uses if at == 0 and call is None else call,
                    bool(direction),
                    active,
                )
                outputs.append(y)
                last.append(tuple(states))
            x = outputs[0] if directions == 1 else torch.cat(outputs, 2)
            if self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        # A copy, as callers may change it in place, and it lies in what backward has saved.
        x = x.to(dtype, copy=directions == 1)
        stacked = tuple(torch.stack(states).to(dtype) for states in zip(*last, strict=True))
        return x, stacked if self.mode == "LSTM" else stacked[0]


def _map(states: Any, f: Any) -> Any:
    return tuple(f(s) for s in states) if isinstance(states, tuple) else f(states)


class LSTM(_Recurrent, nn.LSTM):
    """torch.nn.LSTM whose backward also computes ``p.sum_grad_squared`` (MATHS 3, t running over time).

    Input (T, B, I), or (B, T, I) with `batch_first`, or a packed sequence; arguments and results are the stock ones.
    """


class GRU(_Recurrent, nn.GRU):
    """torch.nn.GRU whose backward also computes ``p.sum_grad_squared``; input as `LSTM`'s."""


class RNN(_Recurrent, nn.RNN):
    """torch.nn.RNN whose backward also computes ``p.sum_grad_squared``; input as `LSTM`'s."""


class _Cell(MomentModule):
    """One step: two linear layers, and what comes after them is plain autograd's."""

    _batch_at = "first"
    _reusable = True
    hidden_size: int
    weight_ih: Any
    weight_hh: Any
    bias_ih: Any
    bias_hh: Any

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if not self._tracking(input, 2, *self._parameters):
            return super().forward(input, hx)
        if hx is None:
            zeros = input.new_zeros(input.shape[0], self.hidden_size)
            hx = (zeros, zeros) if isinstance(self, nn.LSTMCell) else zeros
        h = hx[0] if isinstance(hx, tuple) else hx
        x = autograd.linear(input, self.weight_ih, self.bias_ih, *self._leaves("weight_ih", "bias_ih"))
        w_hh, b_hh, uses = self._leaves("weight_hh", "bias_hh")
        # One scalar counts the uses of the whole layer: once is enough.
        uses = None if isinstance(uses, Tensor) else uses
        return self._step(x, autograd.linear(h, self.weight_hh, self.bias_hh, w_hh, b_hh, uses), hx)

    def _step(self, x: Tensor, h: Tensor, hx: Any) -> Any:
        raise NotImplementedError


class LSTMCell(_Cell, nn.LSTMCell):
    """torch.nn.LSTMCell whose backward also computes ``p.sum_grad_squared`` (MATHS 4). Input (B, I)."""

    def _step(self, x: Tensor, h: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        i, f, g, o = (x + h).chunk(4, 1)
        c = f.sigmoid() * hx[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class GRUCell(_Cell, nn.GRUCell):
    """torch.nn.GRUCell whose backward also computes ``p.sum_grad_squared`` (MATHS 4). Input (B, I)."""

    def _step(self, x: Tensor, h: Tensor, hx: Tensor) -> Tensor:
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), h.chunk(3, 1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        wide = torch.promote_types(n.dtype, hx.dtype)  # under autocast they differ
        return torch.lerp(n.to(wide), hx.to(wide), z.to(wide))


class RNNCell(_Cell, nn.RNNCell):
    """torch.nn.RNNCell whose backward also computes ``p.sum_grad_squared`` (MATHS 4). Input (B, I)."""

    def _step(self, x: Tensor, h: Tensor, hx: Tensor) -> Tensor:
        return (x + h).tanh() if self.nonlinearity == "tanh" else (x + h).relu()
