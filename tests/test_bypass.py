"""A weight that the forward pass uses besides its layer: refused, or exact by the way out that the message names."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from models import backward, half_square_mean, randn
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import perexample as px
from perexample.testing import assert_moments, oracle


class Model(nn.Module):
    def __init__(self, compute):
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.head = nn.Linear(5, 7), nn.Linear(7, 5)
        self.compute = compute

    def forward(self, x):
        return self.compute(self, self.encode(x).tanh())


BYPASSES = {
    "a transposed weight": lambda m, h: F.linear(h, m.encode.weight.t()),
    "a product": lambda m, h: h @ m.encode.weight,
    "a computed weight": lambda m, h: h @ (2 * m.encode.weight + 1).tanh(),
    "a bias": lambda m, h: m.head(h + m.encode.bias),
    "a penalty inside of the output": lambda m, h: m.head(h) + m.encode.weight.square().mean(),
    "a layer's input that knows it": lambda m, h: m.head(h * m.encode.weight.norm()),
    "a checkpoint": lambda m, h: m.head(checkpoint(lambda h: h * m.encode.bias, h, use_reentrant=False)),
}


@pytest.mark.parametrize("name", BYPASSES)
def test_a_weight_used_besides_its_layer_is_refused_by_name(name):
    model = px.convert(Model(BYPASSES[name]).double())
    which = "bias" if name in ("a bias", "a checkpoint") else "weight"
    text = (
        f"encode.{which}: this forward pass uses it besides its layer, where the examples' parts of its gradient "
        f"cannot be told apart; let a module of its own do that (other.weight = layer.weight makes both uses exact), "
        f"detach it, or add a penalty on weights outside of the model's forward. Found at '"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        model(randn(4, 3, 5))
    assert model._examples.batch is None  # the pass is over


def test_it_is_found_where_only_later_passes_do_it():
    model = px.convert(Model(lambda m, h: m.head(h)).double())
    for _ in range(5):
        backward(model, randn(4, 5), target=randn(4, 5, seed=1))
    model.compute = BYPASSES["a product"]
    with pytest.raises(ValueError, match="besides its layer"):
        for _ in range(4):
            model(randn(4, 5))


class Transposed(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, h):
        return F.linear(h, self.weight.t())


@pytest.mark.parametrize("shape", [(4, 5), (3, 2, 5), (1, 5)], ids=str)
def test_the_way_out_is_exact(shape):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(5, 7)
            self.decode = Transposed(self.encode.weight)

        def forward(self, x):
            return self.decode(self.encode(x).tanh())

    model, x, y = px.convert(Tied().double()), randn(*shape), randn(*shape, seed=1)
    expected = oracle(model, half_square_mean, x, y)
    backward(model, x, target=y)
    assert_moments(model, expected)


FINE = {
    "detached": lambda m, h: m.head(h * m.encode.weight.detach().norm()),
    "a second call": lambda m, h: m.encode(m.head(h)),
    "its dtype": lambda m, h: m.head(h.to(m.encode.weight.dtype)),
    "without gradients": lambda m, h: m.head(h * _norm(m.encode.weight)),
    "a checkpoint": lambda m, h: checkpoint(m.head, h, use_reentrant=False),
}


@torch.no_grad()
def _norm(p):
    return p.norm()


@pytest.mark.parametrize("name", FINE)
def test_other_reads_are_no_bypass(name):
    model = px.convert(Model(FINE[name]).double())
    model(randn(4, 3, 5)).sum().backward()


def test_weights_and_penalties_beside_the_output_are_left_to_the_guard():
    model = px.convert(Model(lambda m, h: (m.head(h), m.encode.weight, m.encode.weight.square().sum())).double())
    model(randn(4, 5))[0].sum().backward()
    assert model.encode.weight.sum_grad_squared is not None


class Keeping(nn.Module):
    """Adds what the last pass has left; `keep` says what of it."""

    def __init__(self, keep):
        super().__init__()
        self.fc, self.scale, self.keep, self.kept = nn.Linear(5, 5), nn.Parameter(torch.ones(5)), keep, None

    def forward(self, x):
        h = self.fc(x).tanh() if self.kept is None else self.fc(x).tanh() + self.kept
        self.kept = self.keep(self, h)
        return h


KEEPS = {
    "a state": (lambda m, h: h, "fc\\.(weight|bias)"),
    "a function of a parameter": (lambda m, h: m.scale.exp(), "scale"),
}


@pytest.mark.parametrize("which", KEEPS)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_an_earlier_pass_left_in_the_model_is_refused(which, batch):
    keep, name = KEEPS[which]
    model = px.convert(Keeping(keep))
    model(randn(batch, 5).float())
    with pytest.raises(ValueError, match=f"^{name}: this forward pass uses what an earlier one computed with it"):
        model(randn(batch, 5, seed=1).float())
    assert model._examples.batch is None


def test_a_state_that_is_detached_or_went_through_a_converted_part_is_not_refused():
    model = px.convert(Keeping(lambda m, h: h.detach()))
    for seed in range(2):
        model(randn(3, 5, seed=seed).float()).sum().backward()
    whole = nn.ModuleDict({"encoder": nn.Linear(5, 7), "decoder": nn.Linear(7, 5)})
    for part in (whole, *whole.values()):
        px.convert(part)
    whole["decoder"](whole["encoder"](randn(3, 5).float())).sum().backward()
    assert all(p.sum_grad_squared is not None for p in whole.parameters())


@pytest.mark.parametrize("batch", [1, 3])
def test_a_weight_that_two_passes_compute_once_is_refused(batch):
    model = px.convert(parametrizations.weight_norm(nn.Linear(5, 5)))
    with parametrize.cached():
        model(randn(batch, 5).float())
        with pytest.raises(ValueError, match=r"original.: this forward pass uses what an earlier one computed with it"):
            model(randn(batch, 5, seed=1).float())
