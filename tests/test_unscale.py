"""px.unscale_ and GradScaler: a scale and its undoing leave every result as it is without them."""

from __future__ import annotations

import math

import pytest
import torch
from models import X, Y, adam, half_square_mean, mlp, raises, squares

import perexample as px
from perexample.testing import assert_within_budget

SCALE = 2.0**10


def scaler_of(scale=SCALE, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def backward(model, scaler=None, parts=1, x=X, y=Y):
    """Gradients of the mean over all rows, in micro-batches of unequal size."""
    dtype = model[0].weight.dtype
    for rows in torch.arange(len(x)).tensor_split([1, 4][: parts - 1]):
        loss = half_square_mean(model(x[rows].to(dtype)), y[rows].to(dtype)) * (len(rows) / len(x))
        (loss if scaler is None else scaler.scale(loss)).backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("clip", [False, True])
def test_the_recipe_of_amp_takes_the_steps_of_training_without_it(dtype, parts, clip):
    plain, scaled = px.convert(mlp(dtype)), px.convert(mlp(dtype))
    opt, other, scaler = adam(plain), adam(scaled), scaler_of()
    for rows in (6, 1, 5):
        backward(plain, None, parts, X[:rows], Y[:rows])
        backward(scaled, scaler, parts, X[:rows], Y[:rows])
        px.unscale_(scaler, other)
        assert all(torch.equal(s, t) for s, t in zip(squares(scaled), squares(plain), strict=True))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), scaled.parameters(), strict=True))
        if clip:
            px.clip_grad_norm_(plain.parameters(), 0.1)
            px.clip_grad_norm_(scaled.parameters(), 0.1)
        opt.step()
        scaler.step(other)
        scaler.update()
        opt.zero_grad()
        other.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), scaled.parameters(), strict=True))
    assert other.state[scaled[0].weight]["examples"] == 12 and not hasattr(other, "found_inf")


def test_a_scale_that_is_no_power_of_two():
    plain, scaled = px.convert(mlp()), px.convert(mlp())
    scaler = scaler_of(1000.1)
    backward(plain)
    backward(scaled, scaler)
    px.unscale_(scaler, adam(scaled))
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        exact = p.sum_grad_squared.double()
        assert_within_budget(q.sum_grad_squared, exact, exact, torch.float32, "second moment")


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_on_what_is_not_finite_is_skipped(bad):
    model, scaler = px.convert(mlp()), scaler_of()
    opt = adam(model)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, scaler, x=X * bad)
    px.unscale_(scaler, opt)
    px.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == SCALE / 2
    opt.zero_grad()
    backward(model, scaler)
    px.unscale_(scaler, opt)
    scaler.step(opt)
    assert opt.state[model[0].weight]["examples"] == len(X)


def test_a_scaler_that_is_not_enabled_changes_nothing():
    model = px.convert(mlp())
    scaler = scaler_of(enabled=False)
    opt = adam(model)
    backward(model, scaler)
    before = squares(model)
    px.unscale_(scaler, opt)
    assert all(torch.equal(a, b) for a, b in zip(squares(model), before, strict=True))
    scaler.step(opt)
    assert opt.state[model[0].weight]["examples"] == len(X)


def test_two_optimizers_and_one_of_torch():
    plain, model, scaler = px.convert(mlp()), px.convert(mlp()), scaler_of()
    backward(plain)
    backward(model, scaler)
    opts = adam(model[0]), torch.optim.SGD(model[2].parameters(), lr=0.1)
    px.unscale_(scaler, opts[0])
    assert torch.equal(model[0].weight.sum_grad_squared, plain[0].weight.sum_grad_squared)
    assert torch.equal(model[2].weight.sum_grad_squared, plain[2].weight.sum_grad_squared * SCALE**2)
    px.unscale_(scaler, opts[1])
    assert torch.equal(model[2].weight.sum_grad_squared, plain[2].weight.sum_grad_squared)
    for opt in opts:
        scaler.step(opt)
    with pytest.raises(RuntimeError, match=r"already been called|after step"):  # torch's own
        px.unscale_(scaler, opts[0])


def test_a_gradient_that_is_gone_is_not_brought_back():
    model, scaler = px.convert(mlp()), scaler_of()
    opt = adam(model)
    backward(model, scaler)
    model[0].weight.grad = None
    px.unscale_(scaler, opt)
    scaler.step(opt)
    assert model[0].weight not in opt.state and opt.state[model[2].weight]["examples"] == len(X)
    opt.zero_grad()
    scaler.update()
    backward(model, scaler)  # the next pass is scaled again, and noticed as such
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="but not their second moments"):
        scaler.step(opt)


def test_squares_that_overflow_under_the_scale_stop_training_and_touch_no_state():
    """In bfloat16 or float32 the scale grows until something overflows; squares do so long before gradients."""
    model = px.convert(mlp())
    opt = adam(model)
    backward(model, scaler := scaler_of(2.0**10))
    scaler.step(opt)
    opt.zero_grad()
    before = [t.clone() for p in model.parameters() for t in (p.detach(), *opt.state[p].values())]
    scaler = scaler_of(2.0**72)
    backward(model, scaler)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    names = "parameter '0.weight', parameter '0.bias', parameter '2.weight', parameter '2.bias'"
    message = (
        f"Adam.step: the second moment of {names} is not finite, though its gradient is: the scale of GradScaler has "
        f"grown until the squares overflowed. Only float16 needs a GradScaler: use GradScaler(enabled=False), or one "
        f"whose growth is limited. The step has not been applied"
    )
    with raises(RuntimeError, message):
        scaler.step(opt)
    after = [t for p in model.parameters() for t in (p.detach(), *opt.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_arguments():
    with raises(TypeError, "unscale_: scaler must be a torch.amp.GradScaler, got Adam"):
        px.unscale_(adam(px.convert(mlp())), scaler_of())
    with raises(TypeError, "unscale_: optimizer must be a torch.optim.Optimizer, got Sequential"):
        px.unscale_(scaler_of(), mlp())
