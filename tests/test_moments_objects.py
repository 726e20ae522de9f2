"""Which parameter object, and which gradient, a second moment belongs to."""

from __future__ import annotations

import pytest
import torch
from models import adam, backward, half_square_mean, mlp, randn
from torch import nn

import perexample as px
from perexample.testing import assert_moments, oracle

X, Y = randn(6, 5), randn(6, 3, seed=1)


@pytest.fixture
def model():
    return px.convert(mlp(torch.float64, 0))


def called_with_other_parameters(model):
    others = {name: nn.Parameter(p.detach() + 1) for name, p in model.named_parameters()}
    half_square_mean(torch.func.functional_call(model, others, (X,)), Y).backward()


def swapped_and_put_back(model):
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    p = layer.weight
    layer.weight = nn.Parameter(p.detach().clone())
    layer.weight = p


@pytest.mark.parametrize("disturb", [called_with_other_parameters, swapped_and_put_back])
def test_another_parameter_in_between_leaves_the_first_served(model, disturb):
    optimizer = adam(model)
    expected = oracle(model, half_square_mean, X, Y)
    disturb(model)
    optimizer.zero_grad()
    backward(model, X, target=Y)
    assert_moments(model, expected)
    optimizer.step()


def test_another_parameter_while_accumulating_does_not_enter_the_sum(model):
    """Its contribution must not pass for the first one's: that one's sum is given up, and the step says so."""
    optimizer = adam(model)
    backward(model, X, target=Y)
    called_with_other_parameters(model)
    assert all(p.sum_grad_squared is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="has a gradient but no second moment"):
        optimizer.step()


class Blocked(nn.Module):
    """Its first layer's gradient is exactly zero, and so are the gradients of its examples."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        nn.init.zeros_(self.second.weight)

    def forward(self, x):
        return self.second(self.first(x))


def test_clipping_does_not_clear_a_gradient_that_is_zero():
    model = px.convert(Blocked().double())
    optimizer = adam(model)
    backward(model, X, target=Y)
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert model.first.weight.sum_grad_squared is not None
    optimizer.step()
    assert optimizer.state[model.first.weight]["examples"] == len(X)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.sum_grad_squared is None for p in model.parameters())


class Cancelling(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], 1)


def test_a_gradient_that_cancels_and_was_clipped_is_not_dropped_in_silence():
    """Zero, with a second moment, and changed in place with others that are not: cleared alone, or clipped with all?"""
    model = px.convert(Cancelling().double())
    optimizer = adam(model)
    weights = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    (model(torch.ones(2, 1, dtype=torch.float64)) * weights).sum().backward()
    assert model.first.weight.grad.item() == 0 and model.first.weight.sum_grad_squared.item() == 2
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    message = (
        r"step: the gradient of parameter 'first.weight' is zero everywhere and was changed in place while others were "
        r"too, so whether it was cleared or clipped cannot be told; clear gradients with set_to_none=True, and clip "
        r"with px.clip_grad_norm_"
    )
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    optimizer.zero_grad()
    (model(torch.ones(2, 1, dtype=torch.float64)) * weights).sum().backward()
    px.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.step()
    assert optimizer.state[model.first.weight]["examples"] == 2


def test_a_parameter_whose_data_was_replaced_gets_a_fitting_second_moment():
    model = px.convert(mlp(torch.float64, 0))
    for p in model.parameters():
        p.data = p.data.float()
    backward(model, X.float(), target=Y.float())
    assert all(p.sum_grad_squared.dtype == torch.float32 for p in model.parameters())
    adam(model).step()


def test_parameters_whose_contents_conversion_swaps_keep_their_hooks(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer = adam(model)
    for _ in range(2):  # the second time on gradients that were cleared in between
        expected = oracle(model, half_square_mean, X, Y)
        backward(model, X, target=Y)
        assert_moments(model, expected)
        optimizer.step()
        optimizer.zero_grad()
