"""Recurrent layers: packed sequences, initial states, partial losses, cells, and memory."""

from __future__ import annotations

import copy

import pytest
import torch
from models import randn, weighted_sum
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import perexample as px
from perexample.testing import assert_moments, oracle

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
KINDS = {
    "LSTM": dict(kind=nn.LSTM),
    "LSTM with projections": dict(kind=nn.LSTM, proj_size=2),
    "GRU": dict(kind=nn.GRU),
    "RNN": dict(kind=nn.RNN),
    "RNN of relu": dict(kind=nn.RNN, nonlinearity="relu"),
}
LENGTHS = torch.tensor([3, 6, 1, 6])


class Packed(nn.Module):
    """x: (B, 6, 3), lengths: (B,). Gives all outputs, and the last states."""

    def __init__(self, kind, enforce_sorted=False, **keywords):
        super().__init__()
        self.rnn = kind(3, 5, num_layers=2, bidirectional=True, batch_first=True, **keywords)
        self.enforce_sorted = enforce_sorted

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.enforce_sorted)
        y, states = self.rnn(packed)
        y, _ = pad_packed_sequence(y, batch_first=True, total_length=6)
        states = states if isinstance(states, tuple) else (states,)
        return torch.cat([y.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS.sort(descending=True)[0], torch.tensor([6, 6, 6])], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_packed_sequences_are_exact(name, lengths):
    torch.manual_seed(0)
    model = Packed(**KINDS[name]).double()
    inputs = (randn(len(lengths), 6, 3).requires_grad_(), lengths)
    stock = model(*inputs)
    target = randn(*stock.shape, seed=1)
    (expected_dx,) = torch.autograd.grad(weighted_sum(stock, target), inputs[0])
    expected = oracle(model, weighted_sum, (inputs[0].detach(), lengths), target, reduction="sum")
    converted = px.convert(copy.deepcopy(model))
    y = converted(*inputs)
    torch.testing.assert_close(y, stock)
    weighted_sum(y, target).backward()
    torch.testing.assert_close(inputs[0].grad, expected_dx)
    assert_moments(converted, expected)


def test_the_packed_output_is_the_stock_one():
    torch.manual_seed(0)
    stock = nn.GRU(3, 5)
    layer = px.convert(copy.deepcopy(stock))
    packed = pack_padded_sequence(torch.randn(6, 4, 3), LENGTHS, enforce_sorted=False)
    with px.no_moments():
        expected, _ = stock(packed)
    layer._examples.batch = None
    y, _ = px.nn.GRU.forward(layer, packed)
    assert isinstance(y, PackedSequence)
    torch.testing.assert_close(tuple(y), tuple(expected))


class ChangedInPlace(nn.Module):
    def __init__(self, kind, **keywords):
        super().__init__()
        self.rnn = kind(3, 5, batch_first=True, **keywords)

    def forward(self, x):
        return self.rnn(x)[0].mul_(2).tanh_()


@pytest.mark.parametrize("name", KINDS)
def test_the_output_may_be_changed_in_place(name):
    torch.manual_seed(0)
    model, x = ChangedInPlace(**KINDS[name]).double(), randn(4, 6, 3)
    stock = model(x)
    target = randn(*stock.shape, seed=1)
    expected = oracle(model, weighted_sum, x, target, reduction="sum")
    converted = px.convert(copy.deepcopy(model))
    y = converted(x)
    torch.testing.assert_close(y, stock)
    weighted_sum(y, target).backward()
    assert_moments(converted, expected)


class WithState(nn.Module):
    """x: (B, T, 3) and initial states (B, layers, size)."""

    def __init__(self, kind, **keywords):
        super().__init__()
        self.rnn = kind(3, 4, num_layers=2, batch_first=True, **keywords)

    def forward(self, x, *states):
        states = tuple(s.transpose(0, 1) for s in states)
        y, _ = self.rnn(x, states if len(states) > 1 else states[0])
        return y


@pytest.mark.parametrize("name", KINDS)
def test_initial_states_get_their_gradients(name):
    torch.manual_seed(0)
    keywords = dict(KINDS[name])
    model = WithState(keywords.pop("kind"), **keywords).double()
    sizes = [keywords.get("proj_size", 4), 4][: 2 if name.startswith("LSTM") else 1]
    inputs = [randn(3, 5, 3).requires_grad_(), *(randn(3, 2, s, seed=s).requires_grad_() for s in sizes)]
    target = randn(*model(*inputs).shape, seed=1)
    expected_grads = torch.autograd.grad(weighted_sum(model(*inputs), target), inputs)
    expected = oracle(model, weighted_sum, [x.detach() for x in inputs], target, reduction="sum")
    converted = px.convert(copy.deepcopy(model))
    weighted_sum(converted(*inputs), target).backward()
    torch.testing.assert_close([x.grad for x in inputs], list(expected_grads))
    assert_moments(converted, expected)


@pytest.mark.parametrize("part", ["last output", "last state of the first layer"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_loss_that_sees_a_part_of_the_results(kind, part):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(3, 4, num_layers=2, batch_first=True)

        def forward(self, x):
            y, states = self.rnn(x)
            h = states[0] if isinstance(states, tuple) else states
            return y[:, -1] if part == "last output" else h[0]

    torch.manual_seed(0)
    model = Model().double()
    x, target = randn(3, 5, 3), randn(3, 4, seed=1)
    expected = oracle(model, weighted_sum, x, target, reduction="sum")
    converted = px.convert(copy.deepcopy(model))
    weighted_sum(converted(x), target).backward()
    named = {name: m for name, m in expected.items() if part == "last output" or "l0" in name}
    for name, moments in named.items():
        p = converted.get_parameter(name)
        torch.testing.assert_close(p.grad, moments.grad)
        torch.testing.assert_close(p.sum_grad_squared, moments.sum_grad_squared)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_layers_is_drawn_as_in_the_stock_layer(kind):
    torch.manual_seed(0)
    stock = kind(3, 4, num_layers=3, dropout=0.5).double()
    layer = px.convert(copy.deepcopy(stock))
    x = randn(5, 2, 3)
    torch.manual_seed(1)
    y, _ = layer(x)
    assert (y - stock.eval()(x)[0]).abs().max() > 1e-3
    layer.eval()
    torch.testing.assert_close(layer(x)[0], stock(x)[0])


def test_without_a_batch_it_is_refused():
    with pytest.raises(ValueError, match="LSTM: expected an input of at least 3 dimensions"):
        px.nn.LSTM(3, 4)(torch.randn(5, 3))


def test_a_packed_sequence_of_another_size_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            return self.rnn(pack_padded_sequence(x[1:], torch.tensor([4, 2]), batch_first=True))[1][0]

    with pytest.raises(ValueError, match=r"rnn saw a packed sequence of 2 examples, the batch has 3"):
        px.convert(Model())(torch.randn(3, 4, 3))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_two_uses_in_one_pass_are_added_before_squaring(kind):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(3, 3, batch_first=True)

        def forward(self, x):
            return self.rnn(self.rnn(x)[0])[0]

    torch.manual_seed(0)
    model = Twice().double()
    x, target = randn(3, 4, 3), randn(3, 4, 3, seed=1)
    expected = oracle(model, weighted_sum, x, target, reduction="sum")
    converted = px.convert(copy.deepcopy(model))
    weighted_sum(converted(x), target).backward()
    assert_moments(converted, expected)
