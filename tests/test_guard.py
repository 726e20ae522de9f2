"""The guard: a gradient that bypassed the layers is caught, and legitimate training never is."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from models import Net as FullNet
from models import adam, backward, half_square_mean, mlp, net_data, randn
from torch import nn

import perexample as px

X, Y = randn(6, 5), randn(6, 3, seed=1)


def message(*names: str) -> str:
    text = (
        f"Adam.step: the gradient of {', '.join(names)} is larger than its second moment allows ((sum_b c_b)**2 <= B "
        f"sum_b c_b**2): part of it did not come through the layer. Usual causes: F.linear or F.conv2d on the layer's "
        f"weight, a hook or code that changed p.grad, a penalty on the weights in the loss (use weight_decay, which "
        f"is decoupled), a wrong batch_size. guard=False turns this check off. The step has been applied"
    )
    return f"^{re.escape(text)}$"


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(2, 3, 2), nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


def data_for(model):
    dtype = model[0].weight.dtype
    return X.to(dtype), Y.to(dtype)


def linear_on_its_weight(model):
    x, y = data_for(model)
    (half_square_mean(model(x), y) + 100 * F.linear(x, model[0].weight).square().mean()).backward()


def a_weight_tied_into_another_computation(model):
    x, y = data_for(model)
    (half_square_mean(model(x), y) + 100 * (x @ model[0].weight.t()).tanh().square().mean()).backward()


def hook_that_scales_up(model):
    x, y = data_for(model)
    handle = model[0].weight.register_hook(lambda grad: grad * 100)
    backward(model, x, target=y)
    handle.remove()


def code_that_scales_up(model):
    x, y = data_for(model)
    backward(model, x, target=y)
    model[0].weight.grad.mul_(100)


def code_that_adds(model):
    x, y = data_for(model)
    backward(model, x, target=y)
    model[0].weight.grad += 10


def code_that_replaces(model):
    x, y = data_for(model)
    backward(model, x, target=y)
    model[0].weight.grad = torch.full_like(model[0].weight, 10)


def weight_penalty(model):
    x, y = data_for(model)
    (half_square_mean(model(x), y) + 100 * model[0].weight.square().sum()).backward()


WAYS = [
    linear_on_its_weight,
    a_weight_tied_into_another_computation,
    hook_that_scales_up,
    code_that_scales_up,
    code_that_adds,
    code_that_replaces,
    weight_penalty,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
class TestBypass:
    """Each way in which a gradient can bypass the layers."""

    def run(self, way, dtype, **options):
        model = px.convert(mlp(dtype))
        opt = adam(model, **options)
        way(model)
        opt.step()

    def test_raises_and_names_the_parameter(self, way, dtype):
        with pytest.raises(RuntimeError, match=message("parameter '0.weight'")):
            self.run(way, dtype)

    def test_is_silent_when_turned_off(self, way, dtype):
        self.run(way, dtype, guard=False)


def test_conv2d_on_its_weight():
    model, x, y = px.convert(Conv().double()), randn(4, 2, 3, 3), randn(4, 3, seed=1)
    (half_square_mean(model(x), y) + 100 * F.conv2d(x, model.conv.weight).square().mean()).backward()
    with pytest.raises(RuntimeError, match=message("parameter 'conv.weight'")):
        adam(model).step()
    adam(model, guard=False).step()


def test_a_wrong_batch_size():
    """Examples that pull the same way sit on the bound, so half of their true number breaks it for every parameter."""
    model = px.convert(nn.Linear(3, 1).double())
    opt = adam(model)
    model(torch.ones(8, 3).double()).sum().backward()
    with pytest.raises(RuntimeError, match=message("parameter 'weight'", "parameter 'bias'")):
        opt.step(batch_size=4)
    opt = adam(model)
    opt.step(batch_size=8)


def test_at_one_example_a_thousandth_too_much_is_caught():
    """The bound is met there, for every parameter."""
    model = px.convert(mlp(torch.float64))
    backward(model, X[:1], target=Y[:1])
    for p in model.parameters():
        p.grad.mul_(1.001)
    names = [f"parameter '{name}'" for name, _ in model.named_parameters()]
    with pytest.raises(RuntimeError, match=message(*names)):
        adam(model).step()


def test_more_than_five_parameters_are_cut_short():
    model = px.convert(nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))).double())
    backward(model, randn(4, 3), target=randn(4, 3, seed=1))
    for p in model.parameters():
        p.grad += 100
    names = [f"parameter '{name}'" for name in ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight")]
    with pytest.raises(
        RuntimeError, match=message(*names).replace(re.escape(names[-1]), re.escape(names[-1] + " and 3 more"))
    ):
        adam(model).step()


def test_after_the_guard_training_goes_on():
    model = px.convert(mlp(torch.float64))
    opt = adam(model)
    weight_penalty(model)
    with pytest.raises(RuntimeError, match=message("parameter '0.weight'")):
        opt.step()
    opt.zero_grad()
    backward(model, X, target=Y)
    opt.step()
    assert opt.state[model[0].weight]["examples"].item() == 12


def test_a_gradient_scaled_down_is_no_bypass_that_the_bound_can_see():
    model = px.convert(mlp(torch.float64))
    backward(model, X, target=Y)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    adam(model).step()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class TestLegitimate:
    """Rounding alone never breaks the bound. Examples that are all the same sit right on it: the hardest case."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("batch", [1, 2, 3, 7, 64, 1000])
    def test_equal_examples_sit_on_the_bound(self, dtype, batch):
        model = px.convert(mlp(dtype))
        opt = adam(model, n_g=10_000, n_s=10_000)
        x, y = X[:1].to(dtype).expand(batch, 5), Y[:1].to(dtype).expand(batch, 3)
        for _ in range(3):
            backward(model, x, target=y)
            opt.step()
            opt.zero_grad()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("micro_batches", [1, 10, 100])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_accumulation(self, dtype, micro_batches, batch):
        model = px.convert(mlp(dtype))
        opt = px.optim.Adam(model.parameters(), lr=1e-6, n_g=1000, n_s=1000)
        for _ in range(micro_batches):
            loss = half_square_mean(model(X[:1].to(dtype).expand(batch, 5)), Y[:1].to(dtype).expand(batch, 3))
            (loss / micro_batches).backward()
        opt.step()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scale", [1e-4, 1e-8, 1e-18, 1e-22, 1e-30, 1e-44])
    def test_tiny_gradients_whose_squares_underflow(self, dtype, scale):
        model = px.convert(mlp(dtype))
        opt = adam(model)
        for rows in (6, 1):
            (half_square_mean(model(X[:rows].to(dtype)), Y[:rows].to(dtype)) * scale).backward()
            opt.step()
            opt.zero_grad()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_every_layer_over_changing_batch_sizes(self, dtype):
        torch.manual_seed(0)
        model = px.convert(FullNet().to(dtype))
        opt = adam(model)
        for step, batch in enumerate((1, 5, 2, 33, 1, 4)):
            x, tokens, y = net_data(batch, dtype, seed=step)
            backward(model, x, tokens, target=y)
            opt.step()
            opt.zero_grad()

    def test_autocast(self):
        torch.manual_seed(0)
        model = px.convert(FullNet())
        opt = adam(model)
        for batch in (1, 8, 1, 3):
            x, tokens, y = net_data(batch, torch.float32)
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x, tokens)
            half_square_mean(output.float(), y).backward()
            opt.step()
            opt.zero_grad()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_grad_scaler(self, dtype):
        model = px.convert(mlp(dtype))
        opt, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for batch in (1, 6, 1):
            scaler.scale(half_square_mean(model(X[:batch].to(dtype)), Y[:batch].to(dtype))).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        assert opt.state[model[0].weight]["examples"].item() == 8

    def test_gradients_that_are_not_finite_are_not_the_guards_business(self):
        model = px.convert(mlp())
        opt = adam(model)
        backward(model, X.float() * float("inf"), target=Y.float())
        opt.step()
