"""When second moments and the example count are made, added up, cleared, and refused."""

from __future__ import annotations

import re

import pytest
import torch
from models import adam, backward, half_square_mean, mlp, randn, squares, weighted_sum
from torch import nn
from torch.utils.checkpoint import checkpoint

import perexample as px
from perexample.testing import assert_moments, assert_within_budget, oracle

X, Y = randn(6, 5), randn(6, 3, seed=1)
# torch.compile itself does these while it traces an autograd Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]


def model_of(seed=0):
    return px.convert(mlp(torch.float64, seed))


def by_hand(model):
    for p in model.parameters():
        p.grad = None


def by_hand_in_place(model):
    for p in model.parameters():
        p.grad.zero_()


def by_hand_with_zeros(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


CLEARED = {
    "model.zero_grad()": lambda model: model.zero_grad(),
    "px optimizer": lambda model: adam(model).zero_grad(),
    "stock optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1).zero_grad(),
    "p.grad = None": by_hand,
}
ZEROED = {
    "model.zero_grad(False)": lambda model: model.zero_grad(set_to_none=False),
    "px optimizer, False": lambda model: adam(model).zero_grad(set_to_none=False),
    "stock optimizer, False": lambda model: torch.optim.SGD(model.parameters(), lr=0.1).zero_grad(set_to_none=False),
    "p.grad.zero_()": by_hand_in_place,
    "p.grad = zeros": by_hand_with_zeros,
}


@pytest.fixture(params=["eager", "compiled"])
def call(request):
    """The model as training calls it."""
    torch.compiler.reset()
    return (
        (lambda model: model) if request.param == "eager" else (lambda model: torch.compile(model, backend="aot_eager"))
    )


WAYS = {**CLEARED, **ZEROED}


@pytest.mark.parametrize("way", WAYS)
class TestClearing:
    """Whatever clears p.grad clears the second moment and the count with it."""

    def test_a_stale_sum_never_enters_the_next_gradients(self, way):
        model = model_of()
        for rows in (4, 6, 6):
            if rows == 6:
                WAYS[way](model)
            backward(model, X[:rows], target=Y[:rows])
        assert_moments(model, oracle(model, half_square_mean, X, Y))
        assert model._examples.total.item() == 6

    def test_reading_after_clearing_gives_none(self, way):
        model = model_of()
        backward(model, X, target=Y)
        WAYS[way](model)
        assert all(p.sum_grad_squared is None for p in model.parameters())

    def test_a_stale_sum_never_enters_the_next_step(self, way):
        weights = []
        for stale in (False, True):
            model = model_of()
            opt = adam(model)
            if stale:
                backward(model, X[:4] * 100, target=Y[:4])
                WAYS[way](model)
            backward(model, X, target=Y)
            opt.step()
            weights.append([p.detach().clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

    def test_a_step_after_clearing_moves_nothing(self, way):
        model = model_of()
        opt = adam(model)
        backward(model, X, target=Y)
        before = [p.detach().clone() for p in model.parameters()]
        WAYS[way](model)
        opt.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_clearing_a_compiled_model(call):
    """All the ways in turn, on one compiled model."""
    model = model_of()
    expected, called = oracle(model, half_square_mean, X, Y), call(model)
    for way in WAYS:
        backward(called, 100 * X, target=Y)
        WAYS[way](model)
        assert all(p.sum_grad_squared is None for p in model.parameters()), way
        backward(called, X, target=Y)
        assert_moments(model, expected)
        assert model._examples.total.item() == 6, way
        model.zero_grad()


def test_backward_passes_add_up_until_cleared(call):
    model = model_of()
    called = call(model)
    for rows in (slice(0, 1), slice(1, 6), slice(0, 6)):
        backward(called, X[rows], target=Y[rows], loss_fn=weighted_sum)
    expected = oracle(model, weighted_sum, torch.cat([X, X]), torch.cat([Y, Y]), reduction="sum")
    assert_moments(model, expected)
    assert model._examples.total.item() == 12


def test_two_forward_passes_before_one_backward_are_separate_examples(call):
    model = model_of()
    called = call(model)
    (weighted_sum(called(X), Y) + weighted_sum(called(2 * X[:2]), Y[:2])).backward()
    x, y = torch.cat([X, 2 * X[:2]]), torch.cat([Y, Y[:2]])
    assert_moments(model, oracle(model, weighted_sum, x, y, reduction="sum"))
    assert model._examples.total.item() == 8


def test_an_evaluation_between_forward_and_backward_disturbs_nothing(call):
    model = model_of()
    expected, called = oracle(model, half_square_mean, X, Y), call(model)
    loss = half_square_mean(called(X), Y)
    model.eval()
    with torch.no_grad():
        called(X[:2])
    model.train()
    loss.backward()
    assert_moments(model, expected)
    assert model._examples.total.item() == 6


def test_retain_graph_backpropagates_the_examples_again():
    model = model_of()
    loss = half_square_mean(model(X), Y)
    loss.backward(retain_graph=True)
    once = squares(model)
    loss.backward()
    assert all(torch.equal(a, 2 * b) for a, b in zip(squares(model), once, strict=True))
    assert model._examples.total.item() == 12


def test_autograd_grad_leaves_no_trace():
    model = model_of()
    torch.autograd.grad(half_square_mean(model(X), Y), list(model.parameters()))
    assert all(p.sum_grad_squared is None for p in model.parameters())
    backward(model, X, target=Y)
    assert_moments(model, oracle(model, half_square_mean, X, Y))
    assert model._examples.total.item() == 6


def test_two_optimizers_that_clear_at_different_times_each_know_their_count():
    """The first steps at every micro-batch, the second at every other one."""
    model = model_of()
    fast = px.optim.Adam(model[0].parameters(), lr=1e-3, n_g=100, n_s=1000)
    slow = px.optim.Adam(model[2].parameters(), lr=1e-3, n_g=100, n_s=1000)
    seen = {"fast": [], "slow": []}
    for step in range(4):
        rows = slice(0, 2) if step % 2 == 0 else slice(2, 6)
        backward(model, X[rows], target=Y[rows], loss_fn=weighted_sum)
        alone = oracle(model, weighted_sum, X[rows], Y[rows], reduction="sum")
        assert_within_budget(
            model[0].weight.sum_grad_squared, *[alone["0.weight"].sum_grad_squared] * 2, torch.float64, "the fast one"
        )
        fast.step()
        fast.zero_grad()
        seen["fast"].append(fast.state[model[0].weight]["examples"].item())
        assert model[0].weight.sum_grad_squared is None and model[2].weight.sum_grad_squared is not None
        if step % 2:
            slow.step()
            slow.zero_grad()
            seen["slow"].append(slow.state[model[2].weight]["examples"].item())
            assert model._examples.total is None
    assert seen == {"fast": [2, 6, 8, 12], "slow": [6, 12]}


@pytest.mark.parametrize("context", ["no_moments", "eval", "no_grad"])
def test_without_moments_nothing_is_recorded(context, call):
    model = model_of()
    called = call(model)
    model.train(context != "eval")
    with {"no_moments": px.no_moments, "no_grad": torch.no_grad}.get(context, torch.enable_grad)():
        loss = half_square_mean(called(X), Y)
    if loss.requires_grad:
        loss.backward()
        stock = mlp(torch.float64)
        backward(stock, X, target=Y)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), stock.parameters(), strict=True))
    assert all(p.sum_grad_squared is None for p in model.parameters())
    assert model._examples.total is None
    model.train().zero_grad()
    backward(called, X, target=Y)
    assert_moments(model, oracle(model, half_square_mean, X, Y))


def test_no_moments_nests_and_survives_an_exception():
    with px.no_moments():
        with pytest.raises(KeyError), px.no_moments():
            raise KeyError
        assert not px.moments._Mode.enabled
    assert px.moments._Mode.enabled


class Blocks(nn.Module):
    """Three residual blocks, checkpointed or not."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointing_over_micro_batches(reentrant):
    model = px.convert(Blocks(reentrant).double())
    x, y = randn(9, 3, 4), randn(9, 3, 4, seed=1)
    expected = oracle(px.convert(Blocks(None).double()), weighted_sum, x, y, reduction="sum")
    for rows in (slice(0, 4), slice(4, 5), slice(5, 9)):
        backward(model, x[rows].clone().requires_grad_(), target=y[rows], loss_fn=weighted_sum)
    assert_moments(model, expected)
    assert model._examples.total.item() == 9 and model._examples.rounds == 3


def test_checkpointing_compiled(call):
    model = px.convert(Blocks(False).double())
    x, y = randn(9, 3, 4), randn(9, 3, 4, seed=1)
    expected = oracle(px.convert(Blocks(None).double()), weighted_sum, x, y, reduction="sum")
    backward(call(model), x, target=y, loss_fn=weighted_sum)
    assert_moments(model, expected)
    assert model._examples.total.item() == 9


class Stumble(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("stumbled")


class MayRaise(nn.Module):
    """An MLP that raises where it is told to."""

    def __init__(self):
        super().__init__()
        self.net, self.raises = mlp(torch.float64), ""

    def forward(self, x):
        h = self.net[1](self.net[0](x))
        if self.raises == "forward":
            raise ArithmeticError("stumbled")
        return self.net[2](Stumble.apply(h) if self.raises == "backward" else h)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_a_raise_training_goes_on(where):
    model = px.convert(MayRaise())
    opt = adam(model)
    model.raises = where
    with pytest.raises(ArithmeticError):
        backward(model, X[:3] * 10, target=Y[:3])
    opt.zero_grad()
    model.raises = ""
    backward(model, X, target=Y)
    assert_moments(model.net, oracle(model.net, half_square_mean, X, Y))
    assert model._examples.total.item() == 6
    opt.step()


def test_zero_examples_count_nothing_and_step_nowhere():
    model = model_of()
    opt = adam(model)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, X[:0], target=Y[:0], loss_fn=weighted_sum)
    assert all(not p.sum_grad_squared.any() for p in model.parameters()) and model._examples.total.item() == 0
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert opt.state[model[0].weight]["examples"].item() == 0


def test_layers_without_a_converted_model_record_but_count_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(px.nn.Linear(5, 8), nn.Tanh(), px.nn.Linear(8, 3)).double()
    backward(model, X, target=Y)
    assert_moments(model, oracle(model, half_square_mean, X, Y))
    assert model[0]._examples.total is None
    adam(model).step(batch_size=6)


def test_a_part_backpropagated_outside_of_the_model_as_well_is_noticed():
    model = model_of()
    opt = adam(model)
    backward(model, X, target=Y)
    model[0](X[:2]).sum().backward()
    message = (
        "Adam.step: '0.weight' was backpropagated through outside of the converted model as well as inside, so its "
        "examples were not all counted; convert the part that is called by itself (px.convert(model.part)), or pass "
        "step(batch_size=...)"
    )
    message = message.replace("0.weight", model._examples.uncounted)
    assert model._examples.uncounted in ("0.weight", "0.bias")
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        opt.step()
    opt.step(batch_size=8)
    opt.zero_grad()
    backward(model, X, target=Y)
    opt.step()
    assert opt.state[model[0].weight]["examples"].item() == 14


def test_sum_grad_squared_is_read_only_and_tells_strangers():
    message = (
        "sum_grad_squared: this parameter belongs to no layer of perexample; convert the model with px.convert(model)"
    )
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(AttributeError, match=f"^{re.escape(message)}$"):
        p.sum_grad_squared  # noqa: B018
    assert not hasattr(p, "sum_grad_squared")
    with pytest.raises(AttributeError):
        p.sum_grad_squared = torch.zeros(2)


def test_the_leaf_is_in_no_state_dict_and_no_parameters():
    model = model_of()
    backward(model, X, target=Y)
    assert len(list(model.parameters())) == 4 and len(model.state_dict()) == 4 and not list(model.buffers())


def test_the_second_moment_lives_as_long_as_the_layer():
    model = model_of()
    backward(model, X, target=Y)
    square = model[0].weight.sum_grad_squared
    expected = square.clone()
    model.zero_grad()
    backward(model, 2 * X, target=Y)
    assert_within_budget(square, expected, expected, torch.float64, "a sum that was handed out")
    assert torch.equal(square, expected)
