"""px.optim.Adam as an Optimizer among others: state_dicts, groups, schedulers, closures, GradScaler."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import adam, backward, mlp, train_step
from torch import nn
from transcription import Transcription, X, Y, assert_close, run

import perexample as px
from perexample.testing import assert_within_budget


class TestStateDict:
    """Saving and loading."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_forty_steps_are_twenty_saved_loaded_and_twenty_more(self, dtype):
        x = X.to(dtype)

        def steps(model, opt, numbers):
            for i in numbers:
                rows = torch.arange(i, i + 1 + i % 5) % len(x)
                train_step(model, opt, x[rows], Y[rows])

        straight = px.convert(mlp(dtype))
        opt = adam(straight)
        steps(straight, opt, range(40))
        first = px.convert(mlp(dtype))
        half = adam(first)
        steps(first, half, range(20))
        file = io.BytesIO()
        torch.save({"model": first.state_dict(), "opt": half.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        second = px.convert(mlp(dtype, seed=9))
        rest = adam(second, lr=0.5)
        second.load_state_dict(saved["model"])
        rest.load_state_dict(saved["opt"])
        steps(second, rest, range(20, 40))
        assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), second.parameters(), strict=True))
        for p, q in zip(straight.parameters(), second.parameters(), strict=True):
            assert all(torch.equal(opt.state[p][key], value) for key, value in rest.state[q].items())
            assert rest.state[q]["exp_avg"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert rest.state[q]["examples"].dtype == torch.float64

    def test_loading_leaves_the_saved_one_alone(self):
        model, twin = px.convert(mlp()), px.convert(mlp())
        opt, other = adam(model), adam(twin)
        train_step(model, opt, X.float(), Y)
        state = opt.state_dict()
        kept = copy.deepcopy(state)
        other.load_state_dict(state)
        train_step(twin, other, X.float(), Y)
        assert all(torch.equal(kept["state"][0][key], value) for key, value in opt.state[model[0].weight].items())

    @pytest.mark.parametrize(
        "copy_of", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
    )
    def test_model_and_optimizer_copied_together(self, copy_of):
        model = px.convert(mlp(torch.float64))
        opt = adam(model)
        train_step(model, opt, X, Y)
        twin, other = copy_of((model, opt))
        for m, o in ((model, opt), (twin, other)):
            train_step(m, o, X[:7], Y[:7])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        assert other.state[twin[0].weight]["examples"].item() == 71 == opt.state[model[0].weight]["examples"].item()


class TestGroups:
    """Param groups, schedulers, and the ways of handing over parameters."""

    def test_each_group_has_options_of_its_own(self):
        model = px.convert(mlp(torch.float64))
        slow = Transcription(model, 1e-4, 50, 60, weight_decay=0.1)
        fast = Transcription(model, 1e-2, 20, 30, eps=1e-3)
        groups = [
            {"params": model[0].parameters(), "lr": 1e-4, "n_g": 50, "n_s": 60, "weight_decay": 0.1},
            {"params": model[2].parameters(), "eps": 1e-3},
        ]
        opt = px.optim.Adam(groups, lr=1e-2, n_g=20, n_s=30)
        for rows in run(model, opt, X, Y, [4, 9]):
            slow.step(X[rows], Y[rows])
            fast.step(X[rows], Y[rows])
            for reference, other in ((slow, fast), (fast, slow)):
                half = 2 if reference is slow else 0
                for p, q in zip(reference.model[half].parameters(), other.model[half].parameters(), strict=True):
                    p.data.copy_(q.data)
        assert_close(model[:1], type("R", (), {"model": slow.model[:1]}))
        assert_close(model[2:], type("R", (), {"model": fast.model[2:]}))

    def test_add_param_group(self):
        model = px.convert(mlp(torch.float64))
        opt = px.optim.Adam(model[0].parameters(), lr=1e-3, n_g=100, n_s=1000)
        train_step(model, opt, X[:4], Y[:4])
        model.zero_grad()
        opt.add_param_group({"params": model[2].parameters(), "lr": 1e-2})
        train_step(model, opt, X[:8], Y[:8])
        assert (
            opt.state[model[0].weight]["examples"].item() == 12 and opt.state[model[2].weight]["examples"].item() == 8
        )

    def test_named_parameters(self):
        model = px.convert(mlp(torch.float64))
        opt = px.optim.Adam(model.named_parameters(), lr=1e-3, n_g=100, n_s=1000)
        train_step(model, opt, X, Y)
        assert opt.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step),
            lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 4),
            lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=9, cycle_momentum=False),
        ],
        ids=["LambdaLR", "CosineAnnealingLR", "OneCycleLR"],
    )
    @pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
    def test_schedulers_act_on_the_learning_rate_for_one_example(self, schedule, tensor):
        model = px.convert(mlp(torch.float64))
        reference = Transcription(model, 1e-3, 100, 1000)
        opt = adam(model, lr=torch.tensor(1e-3, dtype=torch.float64) if tensor else 1e-3)
        scheduler = schedule(opt)
        rates = []
        for step in range(4):
            reference.lr = float(opt.param_groups[0]["lr"])
            rates.append(reference.lr)
            reference.step(X[step : step + 6], Y[step : step + 6])
            train_step(model, opt, X[step : step + 6], Y[step : step + 6])
            scheduler.step()
        assert len(set(rates)) == 4
        assert_close(model, reference)

    def test_parameters_without_a_gradient_are_left_alone(self):
        model = px.convert(nn.Sequential(nn.Linear(5, 3), nn.Linear(5, 3)).double())
        opt = adam(model)
        before = [p.detach().clone() for p in model[1].parameters()]
        model.forward = model[0].forward
        train_step(model, opt, X, Y)
        assert all(torch.equal(p, q) for p, q in zip(model[1].parameters(), before, strict=True))
        assert model[1].weight not in opt.state and model[0].weight in opt.state

    def test_closure(self):
        model = px.convert(mlp(torch.float64))
        opt = adam(model)

        def closure():
            opt.zero_grad()
            return backward(model, X, target=Y, loss_fn=F.cross_entropy)

        first = opt.step(closure)
        second = opt.step(closure)
        assert second < first and opt.state[model[0].weight]["examples"].item() == 128

    def test_step_hooks_run(self):
        model, calls = px.convert(mlp(torch.float64)), []
        opt = adam(model)
        opt.register_step_post_hook(lambda *_: calls.append("after"))
        train_step(model, opt, X, Y)
        assert calls == ["after"]


class TestGradScaler:
    """torch.amp.GradScaler hands its scale over."""

    def test_the_scale_changes_nothing(self):
        plain, scaled = px.convert(mlp(torch.float64)), px.convert(mlp(torch.float64))
        opt, other = adam(plain), adam(scaled)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for batch in (4, 9, 1):
            F.cross_entropy(plain(X[:batch]), Y[:batch]).backward()
            scaler.scale(F.cross_entropy(scaled(X[:batch]), Y[:batch])).backward()
            opt.step()
            scaler.step(other)
            scaler.update()
            opt.zero_grad()
            other.zero_grad()
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), scaled.parameters(), strict=True))
        assert not hasattr(other, "found_inf") and not hasattr(other, "grad_scale")

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_a_step_with_inf_is_skipped_and_the_scale_goes_down(self, bad):
        model = px.convert(mlp())
        opt, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        train_step(model, opt, X.float(), Y)
        before = [t.clone() for p in model.parameters() for t in (p.detach(), *opt.state[p].values())]
        scaler.scale(F.cross_entropy(model(X.float() * bad), Y)).backward()
        scaler.step(opt)
        scaler.update()
        after = [t for p in model.parameters() for t in (p.detach(), *opt.state[p].values())]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)) and scaler.get_scale() == 2.0**9
        opt.zero_grad()
        scaler.scale(F.cross_entropy(model(X.float()), Y)).backward()
        scaler.step(opt)
        assert opt.state[model[0].weight]["examples"].item() == 128


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
    ],
)
def test_plain_torch_optimizers_work_on_a_converted_model(make):
    model, stock = px.convert(mlp(torch.float64)), mlp(torch.float64)
    for m in (model, stock):
        opt = make(m.parameters())
        for batch in (4, 9, 1):
            train_step(m, opt, X[:batch], Y[:batch])
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        assert_within_budget(p.detach(), q.detach(), q.detach(), torch.float64, "parameter")
