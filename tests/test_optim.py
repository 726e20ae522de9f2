"""px.optim.Adam against an independent transcription of MATHS (2), (11), (16)-(18)."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import adam, backward, half_square_mean, mlp, randn, train_step
from transcription import Transcription, X, Y, assert_close, run

import perexample as px
from perexample.testing import assert_within_budget, oracle

OPTIONS = {
    "defaults": {},
    "weight_decay": {"weight_decay": 0.1},
    "large eps": {"eps": 1e-2},
    "short averages": {"n_g": 20.0, "n_s": 30.0},
    "maximize": {"maximize": True},
    "everything": {"weight_decay": 0.01, "eps": 1e-3, "n_g": 21.5, "n_s": 400, "maximize": True},
}


@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("kind", ["per_example", "per_batch"])
def test_equals_the_transcription_over_changing_batch_sizes(which, kind):
    options = {"lr": 1e-3, "n_g": 100, "n_s": 1000, **OPTIONS[which]}
    model = px.convert(mlp(torch.float64))
    reference = Transcription(model, per_example=kind == "per_example", **options)
    opt = px.optim.Adam(model.parameters(), second_moment=kind, **options)
    for rows in run(model, opt, X, Y):
        reference.step(X[rows], Y[rows])
    assert_close(model, reference, opt)


def test_per_batch_on_a_stock_model_with_its_batch_size():
    model = mlp(torch.float64)
    reference = Transcription(model, 1e-3, 100, 1000, per_example=False)
    opt = adam(model, second_moment="per_batch")
    for rows in run(model, opt, X, Y, batch_size=True):
        reference.step(X[rows], Y[rows])
    assert_close(model, reference, opt)
    F.cross_entropy(model(X), Y).backward()
    message = (
        "Adam.step: no example was counted for parameter 0 of its group: the backward pass did not go through the "
        "output of a converted model (a sub-module was called directly, or px.convert was not); call the model that "
        "was converted, convert the part that is called (px.convert(model.part)), or pass step(batch_size=...)"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        opt.step()


def test_a_sum_reduced_loss_takes_the_same_steps():
    results = []
    for reduction in ("mean", "sum"):
        model = px.convert(mlp(torch.float64))
        opt = adam(model, loss_reduction=reduction)
        for _ in run(model, opt, X, Y, loss_fn=lambda out, y, r=reduction: F.cross_entropy(out, y, reduction=r)):
            pass
        results.append([p.detach() for p in model.parameters()])
    for one, two in zip(*results, strict=True):
        assert_within_budget(two, one, one, torch.float64, "parameter")


def test_micro_batches_take_the_step_of_the_whole_batch():
    results = []
    for parts in ([16], [5, 1, 10]):
        model = px.convert(mlp(torch.float64))
        opt = adam(model)
        for _ in range(3):
            for rows in torch.arange(16).split(parts):
                (F.cross_entropy(model(X[rows]), Y[rows]) * (len(rows) / 16)).backward()
            opt.step()
            opt.zero_grad()
        results.append([p.detach() for p in model.parameters()])
        assert opt.state[model[0].weight]["examples"].item() == 48
    for one, two in zip(*results, strict=True):
        assert_within_budget(two, one, one, torch.float64, "parameter")


def test_batch_size_overrides_the_count():
    """Twice the examples by override is what a doubled batch would give: c_b of half the size, each twice."""
    results = []
    for double in (False, True):
        model = px.convert(mlp(torch.float64))
        opt = adam(model)
        x, y = (torch.cat([X[:8]] * 2), torch.cat([Y[:8]] * 2)) if double else (X[:8], Y[:8])
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if not double:  # sum c_b² of the doubled batch is half of this one's; the gradient is the same
            for p in model.parameters():
                p.sum_grad_squared.div_(2)
        opt.step(batch_size=None if double else torch.tensor(16))
        results.append([p.detach() for p in model.parameters()])
        assert opt.state[model[0].weight]["examples"].item() == 16
    for one, two in zip(*results, strict=True):
        assert_within_budget(two, one, one, torch.float64, "parameter")


@pytest.mark.parametrize("batches", [[64], [1] * 64, [3, 9, 1, 27, 24], [63, 1], [7] * 9 + [1]], ids=str)
def test_until_the_averaging_time_the_state_is_the_plain_mean(batches):
    """MATHS (11): for n <= N0, whatever the batch sizes were; parameters stand still at lr = 0."""
    model = px.convert(mlp(torch.float64))
    opt = adam(model, lr=0.0, n_g=64, n_s=64)
    for _ in run(model, opt, X, Y, batches):
        pass
    expected = oracle(model, lambda out, y: F.cross_entropy(out, y, reduction="sum"), X, Y, reduction="sum")
    for name, p in model.named_parameters():
        mean, square = expected[name].grad / 64, expected[name].sum_grad_squared / 64
        assert_within_budget(opt.state[p]["exp_avg"], mean, mean, torch.float64, name)
        assert_within_budget(opt.state[p]["exp_avg_sq"], square, square, torch.float64, name)


def test_one_example_a_step_is_the_simplified_adam():
    """At B = 1, (17) is (16): the per-example and the per-batch second moment are the same number."""
    models = [px.convert(mlp(torch.float64)) for _ in range(2)]
    for model, kind in zip(models, ("per_example", "per_batch"), strict=True):
        for _ in run(model, adam(model, second_moment=kind), X, Y, [1] * 20):
            pass
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert_within_budget(p.detach(), q.detach(), q.detach(), torch.float64, "parameter")


def test_with_full_averages_one_example_a_step_is_torch_adamw():
    """Past the averaging times, at B = 1, the betas are 1 - 1/N, and torch's bias correction has come to its end."""
    model, stock = px.convert(mlp(torch.float64)), mlp(torch.float64)
    opt = adam(model, lr=1e-3, n_g=10, n_s=1000, weight_decay=0.1)
    other = torch.optim.AdamW(stock.parameters(), lr=1e-3, betas=(1 - 1 / 10, 1 - 1 / 1000), eps=1e-8, weight_decay=0.1)
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        opt.state[p] = {
            "examples": torch.tensor(1e9, dtype=torch.float64),
            "exp_avg": torch.full_like(p, 0.01),
            "exp_avg_sq": torch.full_like(p, 0.1),
        }
        # beta ** 1e9 is 0: no bias correction is left.
        other.state[q] = {
            "step": torch.tensor(1e9),
            "exp_avg": torch.full_like(q, 0.01),
            "exp_avg_sq": torch.full_like(q, 0.1),
        }
    for i in range(10):
        train_step(model, opt, X[i : i + 1], Y[i : i + 1])
        train_step(stock, other, X[i : i + 1], Y[i : i + 1])
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        assert_within_budget(p.detach(), q.detach(), q.detach(), torch.float64, "parameter")


def test_a_batch_beyond_the_averaging_time_warns_once():
    model = px.convert(mlp(torch.float64))
    opt = adam(model, n_g=16, n_s=32)
    message = (
        "Adam: the batch of 20 examples is larger than the averaging time of 16 examples (n_g, n_s): nothing is "
        "averaged, and from here on results depend on the batch size"
    )
    train_step(model, opt, X[:16], Y[:16])
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        train_step(model, opt, X[:20], Y[:20])
    assert len(caught) == 1 and caught[0].filename == __file__.replace("test_optim", "models")
    train_step(model, opt, X[:20], Y[:20])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_parameters_keep_their_state_in_float32(dtype):
    model = px.convert(mlp(dtype))
    opt = adam(model)
    train_step(model, opt, X.to(dtype), Y)
    for p in model.parameters():
        assert p.dtype == dtype and opt.state[p]["exp_avg"].dtype == opt.state[p]["exp_avg_sq"].dtype == torch.float32


def test_training_lowers_the_loss_without_warnings():
    model = px.convert(mlp())
    opt = adam(model, lr=1e-3)
    y = half_square_mean
    target = torch.tanh(X.float() @ randn(5, 3, seed=5, dtype=torch.float32))
    first = y(model(X.float()), target).item()
    opt.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            loss = backward(model, X.float(), target=target)
            opt.step()
            opt.zero_grad()
    assert loss.item() < first / 2
