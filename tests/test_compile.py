"""torch.compile(fullgraph=True): forward and backward of every layer, equal to eager, without recompiling."""

from __future__ import annotations

import pytest
import torch
from models import Net, Plain, backward, half_square_mean, net_data, randn
from torch import Tensor, nn

import perexample as px
from perexample.testing import assert_moments, oracle

# torch.compile itself does these while it traces an autograd Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


class Everything(nn.Module):
    """`Net`, and the convolutions of one and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.net = (
            nn.Conv1d(3, 3, 3, padding=1, groups=3),
            nn.Conv3d(1, 1, 3, padding="same"),
            Net(),
        )

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = self.one(x.flatten(2)).unflatten(2, (5, 5)).tanh()
        return self.net(self.three(x[:, None])[:, 0], tokens)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_inductor_and_no_recompilation_on_the_second_call():
    torch.manual_seed(0)
    model = px.convert(Everything())
    x, tokens, y = net_data(6, torch.float32)
    exact = oracle(model, half_square_mean, (x, tokens), y)
    stock = oracle(model, half_square_mean, (x, tokens), y, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    backward(compiled, x, tokens, target=y)
    assert_moments(model, exact, stock)
    for _ in range(2):
        model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=True):
            backward(compiled, x, tokens, target=y)
        assert_moments(model, exact, stock)
        assert model._examples.total.item() == 6


def test_aot_eager_equals_eager_and_the_oracle():
    torch.manual_seed(0)
    model = px.convert(Everything().double())
    x, tokens, y = net_data(6)
    backward(model, x, tokens, target=y)
    eager = [(p.grad.clone(), p.sum_grad_squared.clone()) for p in model.parameters()]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    backward(compiled, x, tokens, target=y)
    assert_moments(model, oracle(model, half_square_mean, (x, tokens), y))
    for p, (grad, square) in zip(model.parameters(), eager, strict=True):
        assert torch.equal(p.grad, grad) and torch.equal(p.sum_grad_squared, square)
    model.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        backward(compiled, x, tokens, target=y)
    assert model._examples.total.item() == 6


@pytest.mark.parametrize("dynamic", [True, None])
def test_changing_batch_sizes(dynamic):
    torch.manual_seed(0)
    model = px.convert(Plain().double())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (6, 4, 9, 1):
        x, y = randn(batch, 2, 6, 5), randn(batch, 6, 3, seed=1)
        model.zero_grad()
        backward(compiled, x, target=y)
        assert_moments(model, oracle(model, half_square_mean, x, y))
        assert model._examples.total.item() == batch


def test_a_compiled_part_of_an_eager_model():
    torch.manual_seed(0)
    model = px.convert(Net().double())
    model.fc.compile(fullgraph=True, backend="aot_eager")
    x, tokens, y = net_data(6)
    twin = px.convert(Net().double())
    twin.load_state_dict(model.state_dict())
    expected = oracle(twin, half_square_mean, (x, tokens), y)
    for _ in range(2):
        model.zero_grad()
        backward(model, x, tokens, target=y)
        assert_moments(model, expected)
        assert model._examples.total.item() == 6


def test_training_steps_compiled_are_those_of_eager():
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = px.convert(Net().double())
        opt = px.optim.Adam(model.parameters(), lr=1e-3, n_g=100, n_s=1000)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for _ in range(3):
            x, tokens, y = net_data(6)
            backward(call, x, tokens, target=y)
            opt.step()
            opt.zero_grad()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def test_layer_outputs_changed_in_place():
    model = px.convert(nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double())
    x, y = randn(2, 4, 5), randn(2, 4, 3, seed=1)
    expected = oracle(model, half_square_mean, x, y)
    backward(torch.compile(model, fullgraph=True, backend="aot_eager"), x, target=y)
    assert_moments(model, expected)
