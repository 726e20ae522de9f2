"""px.clip_grad_norm_: torch's on the gradients, its square on the second moments."""

from __future__ import annotations

import math

import pytest
import torch
from models import X, Y, adam, backward, half_square_mean, mlp, raises, squares

import perexample as px
from perexample.testing import assert_moments, assert_within_budget, oracle


def pair(dtype=torch.float64):
    """A converted and a stock model with the same gradients."""
    models = px.convert(mlp(dtype)), mlp(dtype)
    backward(models[0], X.to(dtype), target=Y.to(dtype))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        q.grad = p.grad.clone()
    return models


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3, math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1e-2, 0.5, 1e6])
def test_gradients_are_clipped_as_torch_clips_them_and_moments_by_the_square(dtype, norm_type, max_norm):
    model, stock = pair(dtype)
    before = squares(model)
    norm = px.clip_grad_norm_(model.parameters(), max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(stock.parameters(), max_norm, norm_type)
    assert torch.equal(norm, expected)
    factor = (max_norm / (expected + 1e-6)).clamp(max=1.0).double()
    for p, q, square in zip(model.parameters(), stock.parameters(), before, strict=True):
        assert torch.equal(p.grad, q.grad)
        right = square.double() * factor**2
        assert_within_budget(p.sum_grad_squared, right, right, p.sum_grad_squared.dtype, "second moment")


def test_what_remains_are_the_moments_of_the_scaled_loss():
    model, _ = pair()
    norm = px.clip_grad_norm_(model.parameters(), 0.1)
    factor = 0.1 / (norm + 1e-6)
    assert_moments(model, oracle(model, lambda out, y: factor * half_square_mean(out, y), X, Y))
    adam(model).step()


def test_the_guard_and_zero_norms_live_with_it():
    """A factor of 0 is no zero_grad: the step is taken, with gradients and moments of 0."""
    model, _ = pair()
    opt = adam(model)
    px.clip_grad_norm_(model.parameters(), 0.0)
    assert all(p.sum_grad_squared is not None and not p.sum_grad_squared.any() for p in model.parameters())
    opt.step()
    assert opt.state[model[0].weight]["examples"].item() == len(X)


def test_a_tensor_for_the_largest_norm():
    (one, _), (two, _) = pair(), pair()
    px.clip_grad_norm_(one.parameters(), torch.tensor(0.1, dtype=torch.float64))
    px.clip_grad_norm_(two.parameters(), 0.1)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_under_a_grad_scaler_the_limit_is_scaled():
    plain, scaled = px.convert(mlp()), px.convert(mlp())
    opts, scaler = [adam(plain), adam(scaled)], torch.amp.GradScaler("cpu", init_scale=2.0**10)
    backward(plain, X.float(), target=Y.float())
    px.clip_grad_norm_(plain.parameters(), 0.1)
    opts[0].step()
    scaler.scale(half_square_mean(scaled(X.float()), Y.float())).backward()
    px.clip_grad_norm_(scaled.parameters(), 0.1 * scaler.get_scale())
    scaler.step(opts[1])
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert_within_budget(q.detach(), p.detach().double(), p.detach(), torch.float32, "parameter")


def test_stale_moments_stay_stale_and_parameters_without_gradient_are_skipped():
    model, _ = pair()
    model[0].weight.grad = None
    model[2].bias.grad.zero_()
    px.clip_grad_norm_(iter(model.parameters()), 0.1)
    assert model[0].weight.sum_grad_squared is None and model[2].bias.sum_grad_squared is None
    assert px.clip_grad_norm_([], 1.0).item() == 0
    stock = mlp()
    backward(stock, X.float(), target=Y.float())
    px.clip_grad_norm_(stock[0].weight, 0.1)
    assert stock[0].weight.grad.norm() <= 0.1


def test_plain_clipping_leaves_the_moments():
    model, _ = pair()
    before = squares(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(squares(model), before, strict=True))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite(bad):
    model, _ = pair()
    model[0].weight.grad[0, 0] = bad
    with pytest.raises(RuntimeError, match="non-finite"):
        px.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    assert not px.clip_grad_norm_(model.parameters(), 1.0).isfinite()


ARGUMENTS = {
    "max_norm": (TypeError, {"max_norm": "1"}, "clip_grad_norm_: max_norm must be a number, got str"),
    "negative": (ValueError, {"max_norm": -1}, "clip_grad_norm_: max_norm must be at least 0, got -1"),
    "shape": (
        ValueError,
        {"max_norm": torch.ones(2)},
        "clip_grad_norm_: max_norm must be a number or a scalar tensor, got shape (2,)",
    ),
    "norm_type": (TypeError, {"norm_type": None}, "clip_grad_norm_: norm_type must be a number, got NoneType"),
    "parameters": (TypeError, {"parameters": ["w"]}, "clip_grad_norm_: parameters[0] must be a Tensor, got str"),
    "error_if_nonfinite": (
        TypeError,
        {"error_if_nonfinite": 1},
        "clip_grad_norm_: error_if_nonfinite must be True or False, got 1",
    ),
}


@pytest.mark.parametrize("which", ARGUMENTS)
def test_arguments(which):
    error, changes, message = ARGUMENTS[which]
    with raises(error, message):
        px.clip_grad_norm_(**{"parameters": [], "max_norm": 1.0, **changes})
