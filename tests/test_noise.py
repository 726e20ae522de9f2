"""px.noise against per-example gradients, example by example."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import adam, mlp, raises
from transcription import X, Y

import perexample as px
from perexample.testing import assert_within_budget


def per_example_gradients(model, x, y):
    """name -> (B, *shape), ghat_b."""
    stock = mlp(torch.float64)
    stock.load_state_dict(model.state_dict())
    rows = []
    for b in range(len(x)):
        loss = F.cross_entropy(stock(x[b : b + 1]), y[b : b + 1])
        rows.append(torch.autograd.grad(loss, list(stock.parameters())))
    names = [name for name, _ in stock.named_parameters()]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def brute_force(rows):
    """tr(Sigma) and |G|**2 of (B, *shape), both unbiased."""
    centred = rows - rows.mean(0)
    trace = centred.square().sum() / (len(rows) - 1)
    return trace, rows.mean(0).square().sum() - trace / len(rows)


def close(actual, expected, what):
    assert_within_budget(actual.double(), expected, expected, torch.float64, what)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_step_equals_brute_force(reduction, micro_batches):
    model = px.convert(mlp(torch.float64))
    noise = px.noise.GradientNoise(model, loss_reduction=reduction)
    for rows in torch.arange(24).chunk(micro_batches):
        loss = F.cross_entropy(model(X[rows]), Y[rows], reduction="sum")
        (loss / 24 if reduction == "mean" else loss).backward()
    gradients = per_example_gradients(model, X[:24], Y[:24])
    noise.update()
    terms = {name: brute_force(rows) for name, rows in gradients.items()}
    for name, p in model.named_parameters():
        trace, signal = terms[name]
        # |G|**2 is a difference of numbers as large as the trace, and the scale their quotient.
        close(noise.averages[name][1:], torch.stack([trace, signal]), name)
        assert noise.variance_by_parameter()[name] == noise.averages[name][1]
        assert noise.by_parameter()[name] == noise.averages[name][1] / noise.averages[name][2]
        variance = (gradients[name] - gradients[name].mean(0)).square().mean(0)
        close(px.noise.variance(p, loss_reduction=reduction), variance, f"variance of {name}")
    for layer in ("0", "2"):
        both = noise.averages[f"{layer}.weight"] + noise.averages[f"{layer}.bias"]
        assert noise.by_layer()[layer] == both[1] / both[2]
    total = torch.stack(list(noise.averages.values())).sum(0)
    assert noise.scale() == total[1] / total[2]


def test_smoothing_is_the_ratio_of_averages_over_examples():
    model = px.convert(mlp(torch.float64))
    noise, terms, seen = px.noise.GradientNoise(model, n=40), None, 0
    for batch in (8, 2, 1, 30, 5):  # one example says nothing of the variance
        F.cross_entropy(model(X[:batch]), Y[:batch]).backward()
        noise.update()
        model.zero_grad()
        if batch > 1:
            rows = per_example_gradients(model, X[:batch], Y[:batch])
            new = torch.stack([torch.stack(brute_force(column)) for column in rows.values()]).sum(0)
            seen += batch
            kappa = min(1, batch / min(seen, 40))
            terms = new if terms is None else (1 - kappa) * terms + kappa * new
    total = torch.stack(list(noise.averages.values())).sum(0)
    close(total[1:], terms, "averages")
    assert noise.scale() == total[1] / total[2]
    assert noise.averages["0.weight"][0].item() == seen


def test_the_true_scale_is_found_from_small_batches():
    """Gradients of mean 1 and variance 9 in each of 2,000 coordinates: the scale is 9, whatever the batches are."""
    layer = torch.nn.Linear(1, 2000, bias=False).double()
    model = px.convert(layer)
    noise = px.noise.GradientNoise(model, n=math.inf)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        batch = 2 + step % 3
        examples = 1 + 3 * torch.randn(batch, 2000, generator=generator, dtype=torch.float64)
        (model(torch.ones(batch, 1, dtype=torch.float64)) * examples).sum(1).mean().backward()
        noise.update()
        model.zero_grad()
    # 360,000 squared deviations and as many in |G|**2, whose variance dominates: about 1 % by 5 standard errors each.
    assert abs(float(noise.scale()) / 9 - 1) < 0.1


def test_attached_to_an_optimizer_it_looks_before_every_step():
    model = px.convert(mlp())
    opt, noise = adam(model), px.noise.GradientNoise(model)
    handle = noise.attach(opt)
    for _ in range(3):
        F.cross_entropy(model(X.float()), Y).backward()
        opt.step()
        opt.zero_grad()
    assert len(noise.history) == 3 and noise.history[-1][0].item() == 3 * len(X)
    handle.remove()
    F.cross_entropy(model(X.float()), Y).backward()
    opt.step()
    assert len(noise.history) == 3


def test_a_grad_scaler_and_its_overflows_change_nothing():
    """Of each step the same terms, whatever the scale is; a step that overflowed is left out for good."""
    plain, scaled = px.convert(mlp()), px.convert(mlp())
    noises = []
    for model in (plain, scaled):
        opt, scaler = adam(model, lr=0.0), torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=model is scaled)
        noises.append(px.noise.GradientNoise(model))
        noises[-1].attach(opt)
        for step, rows in enumerate((8, 5, 7, 9)):
            if step % 2 and model is plain:
                continue
            x = X[:rows].float() * (math.inf if step % 2 else 1)
            scaler.scale(F.cross_entropy(model(x), Y[:rows])).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    assert all(torch.equal(noises[0].averages[name], value) for name, value in noises[1].averages.items())
    assert noises[0].averages["0.weight"][0] == 15


def test_by_hand_under_a_grad_scaler():
    results = []
    for scale in (1.0, 2.0**12):
        model = px.convert(mlp())
        (F.cross_entropy(model(X.float()), Y) * scale).backward()
        results.append(px.noise.GradientNoise(model))
        results[-1].update(grad_scale=scale)
    assert all(torch.equal(results[0].averages[name], value) for name, value in results[1].averages.items())


def test_gradients_that_changed_without_their_moments_are_refused():
    model = px.convert(mlp())
    F.cross_entropy(model(X.float()), Y).backward()
    noise = px.noise.GradientNoise(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    message = (
        "GradientNoise.update: a gradient of shape (8, 5) was changed in place after backward, and its second moment "
        "was not; use px.clip_grad_norm_ in place of torch's, or call this before the change"
    )
    with raises(RuntimeError, message):
        noise.update()


def test_clipping_by_this_library_is_taken_in():
    model = px.convert(mlp(torch.float64))
    noise = px.noise.GradientNoise(model)
    F.cross_entropy(model(X), Y).backward()
    factor = 1e-3 / (px.clip_grad_norm_(model.parameters(), 1e-3) + 1e-6)
    noise.update()
    gradients = per_example_gradients(model, X, Y)
    for name, rows in gradients.items():
        close(noise.averages[name][1:], torch.stack(brute_force(rows * factor)), name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parameters_of_any_shape(memory_format, dtype):
    """Convolutions, scalars and empty ones: what is summed does not depend on how it lies in memory."""
    torch.manual_seed(0)
    parts = torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 1), torch.nn.PReLU()
    model = torch.nn.Sequential(*parts).to(dtype)
    model = px.convert(model.to(memory_format=memory_format))
    noise = px.noise.GradientNoise(model)
    x = torch.randn(6, 2, 5, 5).to(dtype)
    model(x).square().mean().backward()
    noise.update()
    for name, p in model.named_parameters():
        total, mean = 6 * p.sum_grad_squared.double().sum(), p.grad.double().square().sum()
        trace = (total - mean) * 6 / 5
        expected = torch.stack([trace, mean - trace / 6])
        stock = torch.stack([(6 * p.sum_grad_squared.sum() - p.grad.to(p.sum_grad_squared.dtype).square().sum()) * 1.2])
        assert_within_budget(noise.averages[name][1:2], expected[:1], stock, p.sum_grad_squared.dtype, name)


def test_plot():
    import matplotlib

    matplotlib.use("agg")
    model = px.convert(mlp())
    noise = px.noise.GradientNoise(model)
    for _ in range(2):
        F.cross_entropy(model(X.float()), Y).backward()
        noise.update()
    line = px.noise.plot(noise).lines[0]
    assert list(line.get_xdata()) == [float(seen) for seen, _ in noise.history]
    assert list(line.get_ydata()) == [float(scale) for _, scale in noise.history]
    matplotlib.pyplot.close("all")


def test_errors():
    model, stock = px.convert(mlp()), mlp()
    with raises(ValueError, "GradientNoise: model must have parameters with second moments; call px.convert(model)"):
        px.noise.GradientNoise(stock)
    with raises(TypeError, "GradientNoise: n must be a number, got str"):
        px.noise.GradientNoise(model, n="many")
    with raises(ValueError, "GradientNoise: n must be at least 1, got 0"):
        px.noise.GradientNoise(model, n=0)
    with raises(ValueError, "GradientNoise: loss_reduction must be one of mean, sum, got 'none'"):
        px.noise.GradientNoise(model, loss_reduction="none")
    with raises(ValueError, "GradientNoise.scale: nothing was taken in yet; call update() after backward, or attach()"):
        px.noise.GradientNoise(model).scale()
    missing = (
        "variance: a parameter of shape (8, 5) has no second moment; call it between backward and zero_grad, on a "
        "converted model"
    )
    for p in (model[0].weight, stock[0].weight):
        with raises(ValueError, missing):
            px.noise.variance(p)
    layer = px.nn.Linear(5, 3)
    layer(X.float()).sum().backward()
    with raises(ValueError, "variance: no example was counted; call the model that was converted, or give batch_size"):
        px.noise.variance(layer.weight)
    assert px.noise.variance(layer.weight, batch_size=64, loss_reduction="sum").shape == (3, 5)
