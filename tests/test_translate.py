"""px.optim.translate: exact for SGD and momentum; for the others right under the assumption that it states."""

from __future__ import annotations

import math

import pytest
import torch
from models import mlp, raises, train_step
from torch import nn
from transcription import X, Y

import perexample as px
from perexample.testing import assert_within_budget

B = 16


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.05},
        {"lr": 0.05, "weight_decay": 0.1},
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.05, "momentum": 0.5, "dampening": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("named", [True, False])
def test_sgd_is_exact(options, named):
    model, stock = px.convert(mlp(torch.float64)), mlp(torch.float64)
    other = torch.optim.SGD(stock.parameters(), **options)
    found = px.optim.translate("SGD" if named else other, batch_size=B, **(options if named else {}))
    assert (found.optimizer, found.assumption) == ("SGD", "")
    opt = px.optim.SGD(model.parameters(), **found.options)
    for step in range(12):
        rows = torch.arange(step, step + B)
        train_step(model, opt, X[rows], Y[rows])
        train_step(stock, other, X[rows], Y[rows])
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        assert_within_budget(p.detach(), q.detach(), q.detach(), torch.float64, "parameter")


COPIES, STEPS = 4000, 60


def displacements(stock, found, signal, noise):
    """Where torch's optimizer and ours end, on gradients ``signal + noise * normal`` of every example.

    The gradient does not depend on the parameter, so that both see the same stream, COPIES times over.
    """
    ends = []
    for which in ("stock", "ours"):
        generator = torch.Generator().manual_seed(0)
        layer = nn.Linear(1, COPIES, bias=False).double()
        nn.init.zeros_(layer.weight)
        model = px.convert(layer) if which == "ours" else layer
        params = list(model.parameters())
        opt = stock(params) if which == "stock" else getattr(px.optim, found.optimizer)(params, **found.options)
        x = torch.ones(B, 1, dtype=torch.float64)
        for _ in range(STEPS):
            examples = signal + noise * torch.randn(B, COPIES, generator=generator, dtype=torch.float64)
            (model(x) * examples).sum(1).mean().backward()
            opt.step()
            opt.zero_grad()
        ends.append(layer.weight.detach().flatten())
    return ends


STOCK = {
    "AdamW": (
        {"lr": 1e-3, "betas": (0.5, 0.9), "weight_decay": 0.5, "eps": 1e-4},
        lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.5, 0.9), weight_decay=0.5, eps=1e-4),
    ),
    "RMSprop": (
        {"lr": 1e-3, "alpha": 0.9, "eps": 1e-4},
        lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.9, eps=1e-4),
    ),
}
CASES = {
    "noise": (0.02, 1.0, {"assume": "noise"}, "noise-dominated: a gradient noise scale far above 16 examples"),
    "signal": (1.0, 0.02, {"assume": "signal"}, "signal-dominated: a gradient noise scale far below 1 example"),
    "measured": (
        1.0,
        3.0,
        {"noise_scale": 9.0},
        "a gradient noise scale of 9 examples, the same for all parameters",
    ),
}


def lengths(ends):
    stock, ours = (float(end.square().mean().sqrt()) for end in ends)
    return ours / stock


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("case", CASES)
def test_adam_and_rmsprop_go_as_far_where_the_assumption_holds(name, case):
    """The path of ours is as long as torch's, far better than under the other assumptions.

    What is left: torch's average of B-means has B times the variance of ours in the root, of relative size
    2 / (B N_s), and its bias correction weighs the first steps otherwise.
    """
    signal, noise, how, words = CASES[case]
    options, stock = STOCK[name]
    found = px.optim.translate(name, batch_size=B, **how, **options)
    assert found.assumption == words
    off = abs(math.log(lengths(displacements(stock, found, signal, noise))))
    others = []
    for other, (_, _, wrong, _) in CASES.items():
        if other != case:
            different = px.optim.translate(name, batch_size=B, **wrong, **options)
            others.append(abs(math.log(lengths(displacements(stock, different, signal, noise)))))
    assert off < 0.25 * min(others), f"off by {off:.3f}, under the other assumptions by {others}"


def test_the_measured_scale_has_the_assumptions_as_its_limits():
    noise, signal = (px.optim.translate("AdamW", batch_size=B, assume=how).options for how in ("noise", "signal"))
    for scale, expected in ((math.inf, noise), (0.0, signal), (torch.tensor(1e12), noise), (1e-12, signal)):
        found = px.optim.translate("AdamW", batch_size=B, noise_scale=scale).options
        assert found.keys() == expected.keys()
        assert all(math.isclose(found[key], value, rel_tol=1e-9) for key, value in expected.items())


def test_groups_of_an_optimizer():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    stock = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5, "momentum": 0.75}], lr=torch.tensor(0.25))
    found = px.optim.translate(stock, batch_size=4)
    assert found.groups == (
        {"lr": 0.0625, "weight_decay": 0.0},
        {"lr": 0.5, "n_g": 16.0, "weight_decay": 0.0},
    )
    with raises(ValueError, "Translation.options: the groups differ; give each group its own of `groups`"):
        _ = found.options


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_the_direction_is_kept(name):
    p = nn.Parameter(torch.ones(2))
    stock = getattr(torch.optim, name)([p], lr=0.1, maximize=True)
    for found in (px.optim.translate(stock, batch_size=4), px.optim.translate(name, batch_size=4, maximize=True)):
        assert found.options["maximize"] is True
        options = {} if name == "SGD" else {"second_moment": "per_batch"}
        assert getattr(px.optim, name)([p], **found.options, **options).param_groups[0]["maximize"] is True
    assert "maximize" not in px.optim.translate(name, batch_size=4).options


def test_dampening_is_exact_but_for_the_first_step_and_named():
    """torch's first momentum is the gradient, undamped: from the second step on both add the same."""
    options = {"lr": 0.05, "momentum": 0.5, "dampening": 0.25}
    found = px.optim.translate("SGD", batch_size=B, **options)
    assert found.assumption == "dampening, which torch leaves out of the first step, is in that one too"
    p, q = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    ours, stock = px.optim.SGD([p], **found.options), torch.optim.SGD([q], **options)
    for gradient in (0.0, 1.0, -3.0, 2.0):  # of the first step nothing is left where it is 0
        p.grad, q.grad = (torch.full((1,), gradient, dtype=torch.float64) for _ in range(2))
        ours.step(batch_size=B)
        stock.step()
    assert_within_budget(p.detach(), q.detach(), q.detach(), torch.float64, "parameter")


def test_the_coupled_decay_of_momentum_is_named():
    found = px.optim.translate("SGD", batch_size=4, momentum=0.9, weight_decay=0.1)
    assert found.assumption == (
        "weight_decay, which torch adds to the gradient and so averages, is applied to the weights at once"
    )


ARGUMENTS = {
    "name": (ValueError, "Adagrad", {}, "optimizer must be one of SGD, RMSprop, Adam, AdamW, got 'Adagrad'"),
    "instance": (
        TypeError,
        torch.optim.Adagrad([nn.Parameter(torch.ones(1))]),
        {},
        "optimizer must be one of torch.optim's SGD, RMSprop, Adam, AdamW, got Adagrad",
    ),
    "ours": (
        TypeError,
        px.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1),
        {},
        "optimizer must be one of torch.optim's SGD, RMSprop, Adam, AdamW, got SGD",
    ),
    "options": (
        TypeError,
        torch.optim.SGD([nn.Parameter(torch.ones(1))]),
        {"lr": 0.1},
        "options must be left out with an optimizer, got lr",
    ),
    "unknown": (
        TypeError,
        "SGD",
        {"betas": 1},
        "options of SGD must be among lr, momentum, dampening, weight_decay, nesterov, maximize, got betas",
    ),
    "batch": (TypeError, "SGD", {"batch_size": 2.0}, "batch_size must be an int, got float"),
    "batch 0": (ValueError, "SGD", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    "assume": (ValueError, "Adam", {"assume": "both"}, "assume must be one of noise, signal, got 'both'"),
    "scale": (ValueError, "Adam", {"noise_scale": -1.0}, "noise_scale must be at least 0, got -1.0"),
    "momentum": (ValueError, "SGD", {"momentum": 1.0}, "momentum must be below 1, got 1.0"),
    "betas": (ValueError, "Adam", {"betas": (0.9, 1.0)}, "betas must be below 1, got 1.0"),
    "beta": (TypeError, "Adam", {"betas": 0.9}, "betas must be a pair of numbers, got 0.9"),
    "nesterov": (ValueError, "SGD", {"nesterov": True}, "nesterov must be False, got True: it has no counterpart here"),
    "amsgrad": (ValueError, "AdamW", {"amsgrad": True}, "amsgrad must be False, got True: it has no counterpart here"),
    "rmsprop momentum": (
        ValueError,
        "RMSprop",
        {"momentum": 0.9},
        "momentum of RMSprop must be 0, got 0.9: it has no counterpart here",
    ),
    "maximize": (TypeError, "SGD", {"maximize": 1}, "maximize must be True or False, got 1"),
    "coupled": (
        ValueError,
        "Adam",
        {"weight_decay": 0.1},
        "weight_decay of Adam must be 0, got 0.1: torch adds it to the gradient, here it is decoupled; tune "
        "torch.optim.AdamW",
    ),
}


@pytest.mark.parametrize("which", ARGUMENTS)
def test_arguments(which):
    error, optimizer, options, message = ARGUMENTS[which]
    with raises(error, f"translate: {message}"):
        px.optim.translate(optimizer, **{"batch_size": 4, **options})


@pytest.mark.parametrize("how", [{"assume": "noise"}, {"assume": "signal"}, {"noise_scale": 5.0}], ids=str)
def test_the_decay_of_a_step_is_that_of_torch(how):
    found = px.optim.translate("AdamW", batch_size=B, lr=1e-3, weight_decay=0.3, **how).options
    assert math.isclose(B * found["lr"] * found["weight_decay"], 1e-3 * 0.3)
