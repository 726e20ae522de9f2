"""SGD, RMSprop, Adam and AdamW: against their equations, against torch.optim, and in the limits that MATHS names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import mlp, raises, train_step
from torch import nn
from transcription import BATCHES, X, Y, run

import perexample as px
from perexample.testing import assert_within_budget, oracle

# Every kind of optimizer: class and options.
KINDS = {
    "SGD": ("SGD", {"lr": 1e-2}),
    "momentum": ("SGD", {"lr": 1e-2, "n_g": 50}),
    "momentum, corrected": ("SGD", {"lr": 1e-2, "n_g": 50, "bias_correction": True, "weight_decay": 0.1}),
    "RMSprop": ("RMSprop", {"lr": 1e-3, "n_s": 100}),
    "RMSprop, corrected": ("RMSprop", {"lr": 1e-3, "n_s": 100, "bias_correction": True}),
    "RMSprop, centered": ("RMSprop", {"lr": 1e-3, "n_s": 100, "centered": True, "eps": 1e-2, "weight_decay": 0.1}),
    "RMSprop over sigma squared": ("RMSprop", {"lr": 1e-4, "n_s": 100, "denominator": "sigma_squared", "eps": 1e-2}),
    "RMSprop, eps": ("RMSprop", {"lr": 1e-1, "n_s": 100, "lr_times_eps": True, "eps": 0.1, "weight_decay": 0.1}),
    "Adam": ("Adam", {"lr": 1e-3, "n_g": 50, "n_s": 100}),
    "Adam, uncorrected": ("Adam", {"lr": 1e-3, "n_g": 50, "n_s": 100, "bias_correction": False}),
    "Adam, half corrected": ("Adam", {"lr": 1e-3, "n_g": 50, "n_s": 100, "bias_correction": (False, True)}),
    "Adam, power": ("Adam", {"lr": 1e-3, "n_g": 50, "n_s": 100, "averaging": "power"}),
    "AdamW": ("AdamW", {"lr": 1e-3, "n_g": 50, "n_s": 100}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, params, **changes):
    name, options = KINDS[kind]
    return getattr(px.optim, name)(params, **{**options, **changes})


class Equations:
    """One optimizer in plain float64, parameter by parameter, written from MATHS (9)-(19)."""

    def __init__(self, kind, params, per_example):
        name, options = KINDS[kind]
        self.o = {"eps": 1e-8, "weight_decay": 1e-2 if name == "AdamW" else 0.0, **options}
        self.per_example = per_example
        corrected = self.o.get("bias_correction", name in ("Adam", "AdamW"))
        self.correct_g, self.correct_s = corrected if isinstance(corrected, tuple) else (corrected, corrected)
        self.params = [p.detach().double().clone() for p in params]
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.seen = 0

    def kappa(self, batch, horizon, corrected):
        keep = (1 - 1 / horizon) ** batch if self.o.get("averaging") == "power" else max(0, 1 - batch / horizon)
        return 1 - min(keep, 1 - batch / self.seen) if corrected else 1 - keep

    def step(self, moments, batch):
        self.seen += batch
        o = self.o
        for i, (p, (grad, total)) in enumerate(zip(self.params, moments, strict=True)):
            update = grad
            if "n_g" in o:
                k = self.kappa(batch, o["n_g"], self.correct_g)
                update = self.m[i] = (1 - k) * self.m[i] + k * grad
            if "n_s" in o:
                k = self.kappa(batch, o["n_s"], self.correct_s)
                self.v[i] = (1 - k) * self.v[i] + k * (batch * total if self.per_example else grad**2)
                denominator = self.v[i]
                if o.get("centered"):
                    self.m[i] = (1 - k) * self.m[i] + k * grad
                    denominator = denominator - self.m[i] ** 2
                if o.get("denominator") != "sigma_squared":
                    denominator = denominator.sqrt()
                update = update / (denominator + o["eps"])
            rate = batch * o["lr"]
            p.copy_(p - rate * o["weight_decay"] * p - rate * (o["eps"] if o.get("lr_times_eps") else 1) * update)


@every_kind
@pytest.mark.parametrize("per_example", [True, False])
def test_equals_its_equations_over_changing_batch_sizes(kind, per_example):
    if KINDS[kind][0] == "SGD" and not per_example:
        pytest.skip("SGD has no second moment")
    model = px.convert(mlp(torch.float64))
    reference = Equations(kind, model.parameters(), per_example)
    options = {} if KINDS[kind][0] == "SGD" else {"second_moment": "per_example" if per_example else "per_batch"}
    opt = make(kind, model.parameters(), **options)
    twin = mlp(torch.float64)
    start = 0
    for batch in BATCHES:
        for p, q in zip(twin.parameters(), reference.params, strict=True):
            p.data.copy_(q)
        rows = torch.arange(start, start + batch) % len(X)
        start += batch
        moments = oracle(twin, F.cross_entropy, X[rows], Y[rows])
        reference.step([(m.grad, m.sum_grad_squared) for m in moments.values()], batch)
        train_step(model, opt, X[rows], Y[rows])
    for i, (p, q) in enumerate(zip(model.parameters(), reference.params, strict=True)):
        assert_within_budget(p.detach(), q, q, torch.float64, "parameter")
        for name, expected in (("exp_avg", reference.m[i]), ("exp_avg_sq", reference.v[i])):
            if name in opt.state[p]:
                assert_within_budget(opt.state[p][name], expected, expected, torch.float64, name)
        assert opt.state[p]["examples"].item() == sum(BATCHES)


B, LR = 8, 0.05
TORCH = {
    "SGD": (lambda p: px.optim.SGD(p, lr=LR / B), lambda p: torch.optim.SGD(p, lr=LR)),
    "momentum": (
        lambda p: px.optim.SGD(p, lr=LR / B / (1 - 0.9), n_g=B / (1 - 0.9)),
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    ),
    "SGD, decay": (
        lambda p: px.optim.SGD(p, lr=LR / B, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=LR, weight_decay=0.1),
    ),
    "momentum, maximize": (
        lambda p: px.optim.SGD(p, lr=LR / B / (1 - 0.9), n_g=B / (1 - 0.9), maximize=True),
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, maximize=True),
    ),
    "RMSprop": (
        lambda p: px.optim.RMSprop(p, lr=LR / B, n_s=B / (1 - 0.95), eps=1e-3, second_moment="per_batch"),
        lambda p: torch.optim.RMSprop(p, lr=LR, alpha=0.95, eps=1e-3),
    ),
    "RMSprop, centered": (
        lambda p: px.optim.RMSprop(
            p, lr=LR / B, n_s=B / (1 - 0.95), eps=1e-3, second_moment="per_batch", centered=True
        ),
        lambda p: torch.optim.RMSprop(p, lr=LR, alpha=0.95, eps=1e-3, centered=True),
    ),
}


@pytest.mark.parametrize("which", TORCH)
@pytest.mark.parametrize("converted", [True, False])
def test_equals_torch_at_one_batch_size(which, converted):
    ours, stock = TORCH[which]
    model, other = mlp(torch.float64), mlp(torch.float64)
    if converted:
        px.convert(model)
    opt, torch_opt = ours(model.parameters()), stock(other.parameters())
    for step in range(12):
        rows = torch.arange(step, step + B)
        train_step(model, opt, X[rows], Y[rows], **({} if converted else {"batch_size": B}))
        train_step(other, torch_opt, X[rows], Y[rows])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_within_budget(p.detach(), q.detach(), q.detach(), torch.float64, "parameter")


@pytest.mark.parametrize("batch", [1, 8])
def test_the_decay_of_adamw_is_that_of_torch(batch):
    """With gradients of zero only the decay is left: (1 - lr weight_decay) a step, at lr = B lr0."""
    p, q = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    ours = px.optim.AdamW([p], lr=0.1 / batch, n_g=100, n_s=100, weight_decay=0.3, second_moment="per_batch")
    stock = torch.optim.AdamW([q], lr=0.1, weight_decay=0.3)
    for _ in range(5):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        ours.step(batch_size=batch)
        stock.step()
    assert_within_budget(p.detach(), q.detach(), q.detach(), torch.float64, "parameter")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][0] != "SGD" and "centered" not in kind])
def test_one_example_a_step_makes_per_example_and_per_batch_the_same(kind):
    models = [px.convert(mlp(torch.float64)) for _ in range(2)]
    for model, second in zip(models, ("per_example", "per_batch"), strict=True):
        for _ in run(model, make(kind, model.parameters(), second_moment=second), X, Y, [1] * 20):
            pass
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert_within_budget(p.detach(), q.detach(), q.detach(), torch.float64, "parameter")


@pytest.mark.parametrize("batches", [[64], [1] * 64, [3, 9, 1, 27, 24]], ids=str)
@pytest.mark.parametrize("kind", ["momentum, corrected", "RMSprop, corrected", "Adam", "Adam, power"])
def test_until_the_averaging_time_a_corrected_average_is_the_plain_mean(kind, batches):
    model = px.convert(mlp(torch.float64))
    horizons = {name: 64 for name in ("n_g", "n_s") if name in KINDS[kind][1]}
    opt = make(kind, model.parameters(), lr=0.0, weight_decay=0.0, **horizons)
    for _ in run(model, opt, X, Y, batches):
        pass
    expected = oracle(model, lambda out, y: F.cross_entropy(out, y, reduction="sum"), X, Y, reduction="sum")
    for name, p in model.named_parameters():
        for average, total in (("exp_avg", expected[name].grad), ("exp_avg_sq", expected[name].sum_grad_squared)):
            if average in opt.state[p]:
                assert_within_budget(opt.state[p][average], total / 64, total / 64, torch.float64, average)


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_stationary_variance_of_sgd_in_one_dimension(batch):
    """The slides' example: loss (beta - y)**2 / 2 with y normal of variance 1, beta trained by SGD with eta = B eta0.

    beta <- (1 - B eta0) beta + B eta0 mean(y), so its variance is eta0 / (2 - B eta0) in the end, and of that
    1 - (1 - B eta0)**(2 steps) after so many steps from a known start: to first order in eta0 not a matter of B.
    """
    eta, examples, copies = 0.01, 640, 5_000
    beta = nn.Parameter(torch.zeros(copies, dtype=torch.float64))
    opt = px.optim.SGD([beta], lr=eta)
    generator = torch.Generator().manual_seed(batch)
    for _ in range(examples // batch):
        y = torch.randn(batch, copies, generator=generator, dtype=torch.float64)
        (beta - y).square().sum(1).mean().div(2).backward()
        opt.step(batch_size=batch)
        opt.zero_grad()
    theory = eta / (2 - batch * eta) * (1 - (1 - batch * eta) ** (2 * examples // batch))
    # The variance of n normal numbers is known to sqrt(2 / n); five times that is exceeded once in two million.
    assert abs(float(beta.detach().var()) / theory - 1) < 5 * (2 / copies) ** 0.5


def test_sgd_moves_as_far_per_example_whatever_the_batch_size():
    """A constant gradient: after the same examples the same place, to rounding."""
    ends = []
    for batches in ([64], [1] * 64, [3, 60, 1]):
        p = nn.Parameter(torch.ones(5, dtype=torch.float64))
        opt = px.optim.SGD([p], lr=1e-2)
        for batch in batches:
            p.grad = torch.arange(5, dtype=torch.float64)
            opt.step(batch_size=batch)
        ends.append(p.detach())
    for end in ends[1:]:
        assert_within_budget(end, ends[0], ends[0], torch.float64, "parameter")


class TestState:
    """State in one piece: what users do with it, and what changes under it."""

    def test_views_of_one_tensor_with_the_parameters_shapes(self):
        model = px.convert(mlp())
        opt = make("Adam", model.parameters())
        train_step(model, opt, X[:16].float(), Y[:16])
        for name in ("exp_avg", "exp_avg_sq"):
            assert len({opt.state[p][name].untyped_storage().data_ptr() for p in model.parameters()}) == 1
        for p in model.parameters():
            assert opt.state[p]["exp_avg"].shape == p.shape and opt.state[p]["examples"].shape == ()

    @pytest.mark.parametrize("change", ["channels_last", "transposed", "replaced state", "replaced tensor", "groups"])
    def test_changes_between_steps_are_followed(self, change):
        """A run in which something is laid out anew in the middle gives what the undisturbed one gives."""

        def net():
            torch.manual_seed(0)
            return px.convert(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 3)).double())

        x, results = torch.randn(8, 2, 5, 5, dtype=torch.float64), []
        for disturbed in (False, True):
            model = net()
            opt = make("Adam", model.parameters())
            for step in range(4):
                if disturbed and step == 2:
                    weight = model[0].weight
                    if change == "channels_last":
                        model.to(memory_format=torch.channels_last)
                        assert not weight.is_contiguous()
                    elif change == "transposed":
                        weight.data = weight.data.transpose(0, 3).contiguous().transpose(0, 3)
                    elif change == "replaced state":
                        opt.state[weight] = {name: value.clone() for name, value in opt.state[weight].items()}
                    elif change == "replaced tensor":
                        opt.state[weight]["exp_avg"] = opt.state[weight]["exp_avg"].clone()
                    else:
                        group = opt.param_groups[0]
                        group["params"] = group["params"][::-1]
                train_step(model, opt, x, Y[:8])
            results.append([t for p in model.parameters() for t in (p.detach(), *opt.state[p].values())])
        for a, b in zip(*results, strict=True):
            assert_within_budget(b, a, a, torch.float64, change)

    def test_replacing_the_state_has_an_effect(self):
        model = px.convert(mlp(torch.float64))
        opt = make("momentum", model.parameters())
        train_step(model, opt, X[:16], Y[:16])
        opt.state[model[0].weight]["exp_avg"] = torch.full_like(model[0].weight, 7.0)
        model.zero_grad()
        before = model[0].weight.detach().clone()
        train_step(model, opt, X[:1], Y[:1])
        assert (before - model[0].weight > 1e-2 * 6).all()  # lr times about 7
        opt.state.clear()
        train_step(model, opt, X[:1], Y[:1])
        assert opt.state[model[0].weight]["examples"].item() == 1

    def test_parameters_that_come_late(self):
        """Gradients that come one parameter after another give the state that each would have by itself."""
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3 + i, dtype=torch.float64)) for i in range(30)]
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        opt = make("Adam", params, second_moment="per_batch")
        alone = [make("Adam", [p], second_moment="per_batch") for p in copies]
        for step in range(32):
            for i, (p, q) in enumerate(zip(params, copies, strict=True)):
                if i <= step and (i + step) % 3:
                    p.grad = torch.randn(p.shape, dtype=torch.float64)
                    q.grad = p.grad.clone()
            opt.step(batch_size=2)
            for one, q in zip(alone, copies, strict=True):
                if q.grad is not None:
                    one.step(batch_size=2)
            for p in (*params, *copies):
                p.grad = None
        for p, q, one in zip(params, copies, alone, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(value, one.state[q][name]) for name, value in opt.state[p].items())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_bfloat16_state(self, dtype):
        model = px.convert(mlp(dtype))
        opt = make("Adam", model.parameters(), state_dtype=torch.bfloat16)
        for _ in run(model, opt, X.to(dtype), Y):
            pass
        saved = opt.state_dict()
        other = make("Adam", model.parameters(), state_dtype=torch.bfloat16)
        other.load_state_dict(saved)
        for p in model.parameters():
            assert opt.state[p]["exp_avg"].dtype == opt.state[p]["exp_avg_sq"].dtype == torch.bfloat16
            assert all(torch.equal(other.state[p][name], value) for name, value in opt.state[p].items())

    def test_float64_parameters_keep_float64_state(self):
        model = px.convert(mlp(torch.float64))
        opt = make("Adam", model.parameters(), state_dtype=torch.bfloat16)
        train_step(model, opt, X[:16], Y[:16])
        assert opt.state[model[0].weight]["exp_avg"].dtype == torch.float64


def test_groups_of_different_kinds_in_one_optimizer():
    """Each group takes the step that it would take alone."""
    model, twins = px.convert(mlp(torch.float64)), [px.convert(mlp(torch.float64)) for _ in range(2)]
    options = [
        {"lr": 1e-2, "n_s": 50, "centered": True, "eps": 1e-2},
        {"lr": 1e-3, "n_s": 200, "denominator": "sigma_squared", "eps": 0.1, "second_moment": "per_batch"},
    ]
    groups = [{"params": list(model[i].parameters()), **o} for i, o in zip((0, 2), options, strict=True)]
    opt = px.optim.RMSprop(groups, lr=1.0, n_s=1.0)
    alone = [px.optim.RMSprop(twin[i].parameters(), **o) for twin, i, o in zip(twins, (0, 2), options, strict=True)]
    F.cross_entropy(model(X[:16]), Y[:16]).backward()
    opt.step()
    for twin, one, i in zip(twins, alone, (0, 2), strict=True):
        F.cross_entropy(twin(X[:16]), Y[:16]).backward()
        one.step()
        assert all(torch.equal(p, q) for p, q in zip(model[i].parameters(), twin[i].parameters(), strict=True))


@pytest.mark.parametrize("n_g", [None, 16])
def test_only_what_is_averaged_warns_of_large_batches(n_g, recwarn):
    model = px.convert(mlp(torch.float64))
    train_step(model, px.optim.SGD(model.parameters(), lr=1e-3, n_g=n_g), X, Y)
    train_step(model, px.optim.SGD(model.parameters(), lr=1e-3, n_g=16, averaging="power"), X, Y)
    assert [str(w.message) for w in recwarn] == (
        []
        if n_g is None
        else [
            "SGD: the batch of 64 examples is larger than the averaging time of 16 examples (n_g): nothing is "
            "averaged, and from here on results depend on the batch size"
        ]
    )


OPTIONS = {
    "SGD n_g": ("SGD", ValueError, {"n_g": 0.5}, "SGD: n_g must be at least 1, got 0.5"),
    "SGD bias": ("SGD", TypeError, {"bias_correction": 1}, "SGD: bias_correction must be True or False, got 1"),
    "averaging": ("SGD", ValueError, {"averaging": "ema"}, "SGD: averaging must be one of linear, power, got 'ema'"),
    "maximize": ("SGD", TypeError, {"maximize": None}, "SGD: maximize must be True or False, got None"),
    "state_dtype": (
        "SGD",
        ValueError,
        {"state_dtype": torch.float16},
        "SGD: state_dtype must be None (float32) or torch.bfloat16, got torch.float16",
    ),
    "RMSprop n_s": ("RMSprop", TypeError, {"n_s": "10"}, "RMSprop: n_s must be a number, got str"),
    "denominator": (
        "RMSprop",
        ValueError,
        {"denominator": "variance"},
        "RMSprop: denominator must be one of sigma, sigma_squared, got 'variance'",
    ),
    "centered and corrected": (
        "RMSprop",
        ValueError,
        {"centered": True, "bias_correction": True},
        "RMSprop: bias_correction must be False with centered=True, got True: the variance of the first value is 0, "
        "and would be the denominator of the first step",
    ),
    "SGD, infinite": (
        "SGD",
        ValueError,
        {"n_g": math.inf},
        "SGD: n_g must be finite without bias_correction, got inf: the average would take in nothing",
    ),
    "RMSprop, infinite": (
        "RMSprop",
        ValueError,
        {"n_s": math.inf, "centered": True},
        "RMSprop: n_s must be finite without bias_correction, got inf: the average would take in nothing",
    ),
    "Adam, infinite": (
        "Adam",
        ValueError,
        {"n_g": math.inf, "bias_correction": (False, True)},
        "Adam: n_g must be finite without bias_correction, got inf: the average would take in nothing",
    ),
    "lr_times_eps": (
        "Adam",
        TypeError,
        {"lr_times_eps": "yes"},
        "Adam: lr_times_eps must be True or False, got 'yes'",
    ),
    "pair": (
        "AdamW",
        TypeError,
        {"bias_correction": (True, 1)},
        "AdamW: bias_correction must be a bool or a pair of them, got (True, 1)",
    ),
}


@pytest.mark.parametrize("which", OPTIONS)
def test_options_out_of_range(which):
    name, error, options, message = OPTIONS[which]
    model = px.convert(mlp())
    with raises(error, message):
        make(name, model.parameters(), **options)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "AdamW"])
def test_sparse_gradients_and_complex_parameters_are_refused(kind):
    options = {} if kind == "SGD" else {"second_moment": "per_batch"}
    p = nn.Parameter(torch.ones(4))
    opt = make(kind, [p], **options)
    p.grad = torch.ones(4).to_sparse()
    with raises(RuntimeError, f"{kind}: parameter 0 of its group has a sparse gradient; use a dense one"):
        opt.step(batch_size=1)
    with raises(TypeError, f"{kind}: parameter 0 of its group is complex; only real parameters are supported"):
        make(kind, [nn.Parameter(torch.zeros(2, dtype=torch.complex64))], **options)


@pytest.mark.parametrize("zeros", [lambda p: p.grad.zero_(), lambda p: setattr(p, "grad", torch.zeros_like(p))])
def test_a_step_on_gradients_cleared_in_place_touches_no_state(zeros):
    """Second moments of gradients that are gone enter no average, also where nothing came in their place."""
    model = px.convert(mlp(torch.float64))
    opt = make("Adam", model.parameters())
    train_step(model, opt, X[:16], Y[:16])
    before = [value.clone() for p in model.parameters() for value in (p.detach(), *opt.state[p].values())]
    F.cross_entropy(model(X[:8]), Y[:8]).backward()
    for p in model.parameters():
        zeros(p)
    opt.step()
    after = [value for p in model.parameters() for value in (p.detach(), *opt.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
