"""Saving and loading optimizers: every kind, in a new process, across dtypes and devices, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from models import adam, mlp, raises, train_step
from test_optimizers import KINDS, make
from transcription import X, Y

import perexample as px

# Every kind per example and per batch, with state in float32 and in bfloat16, as far as it has any.
RUNS = [
    (kind, {**second, **state})
    for kind, (name, options) in KINDS.items()
    for second in ([{}] if name == "SGD" else [{"second_moment": how} for how in ("per_example", "per_batch")])
    for state in ([{}] if name == "SGD" and "n_g" not in options else [{"state_dtype": s} for s in (None, "bf16")])
]


def resume(file, first, last):
    """Train every run from step `first` to `last`, from the file unless `first` is 0, into the file."""
    torch.set_num_threads(1)
    saved = torch.load(file, weights_only=True) if first else [None] * len(RUNS)
    ends = []
    for (kind, options), before in zip(RUNS, saved, strict=True):
        model = px.convert(mlp())
        options = {name: torch.bfloat16 if value == "bf16" else value for name, value in options.items()}
        opt = make(kind, model.parameters(), **options)
        if before is not None:
            model.load_state_dict(before["model"])
            opt.load_state_dict(before["opt"])
        for step in range(first, last):
            rows = torch.arange(step, step + 1 + step % 5) % len(X)
            train_step(model, opt, X[rows].float(), Y[rows])
        ends.append({"model": model.state_dict(), "opt": opt.state_dict()})
    torch.save(ends, file)


def test_twenty_steps_and_twenty_in_a_new_process_are_forty_to_the_bit(tmp_path):
    threads = torch.get_num_threads()
    straight, parts = str(tmp_path / "straight"), str(tmp_path / "parts")
    resume(straight, 0, 40)
    resume(parts, 0, 20)
    torch.set_num_threads(threads)
    code = f"import sys\nsys.path[:0] = {sys.path!r}\nfrom test_resume import resume\nresume({parts!r}, 20, 40)"
    subprocess.run([sys.executable, "-c", code], check=True)
    ends = (torch.load(file, weights_only=True) for file in (straight, parts))
    for run, one, two in zip(RUNS, *ends, strict=True):
        assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items()), run
        assert one["opt"]["state"].keys() == two["opt"]["state"].keys() == set(range(4))
        for key, state in one["opt"]["state"].items():
            assert state["examples"] == sum(1 + step % 5 for step in range(40))
            assert all(torch.equal(value, two["opt"]["state"][key][name]) for name, value in state.items()), run
            if run[1].get("state_dtype"):
                assert all(value.dtype == torch.bfloat16 for name, value in state.items() if name != "examples")


def trained(dtype=torch.float32, **options):
    model = px.convert(mlp(dtype))
    opt = adam(model, **options)
    train_step(model, opt, X.to(dtype), Y)
    return model, opt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
def test_into_a_model_of_another_dtype_no_bit_is_lost(dtype, state_dtype):
    _, opt = trained(state_dtype=state_dtype)
    model = px.convert(mlp(dtype))
    other = adam(model)
    other.load_state_dict(opt.state_dict())
    kept = torch.float64 if dtype == torch.float64 else state_dtype or torch.float32
    for p, q in zip(opt.param_groups[0]["params"], model.parameters(), strict=True):
        for name, value in other.state[q].items():
            assert value.dtype == (torch.float64 if name == "examples" else kept)
            assert torch.equal(value.double(), opt.state[p][name].double())
    train_step(model, other, X.to(dtype), Y)
    assert other.state[model[0].weight]["examples"] == 2 * len(X)


def test_onto_the_device_of_the_parameters():
    """On the meta device, which has no values but shows where a tensor would be."""
    _, opt = trained()
    with torch.device("meta"):
        model = px.convert(mlp())
    far = adam(model)
    far.load_state_dict(opt.state_dict())
    for p in model.parameters():
        assert {name: value.device.type for name, value in far.state[p].items()} == dict.fromkeys(far.state[p], "meta")
    train_step(model, far, X.float().to("meta"), Y.to("meta"))
    assert far.state[model[0].weight]["exp_avg"].device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_dict_crosses_devices():
    model, other = px.convert(mlp()), px.convert(mlp()).cuda()
    opt, far = adam(model), adam(other)
    train_step(model, opt, X[:16].float(), Y[:16])
    far.load_state_dict(opt.state_dict())
    opt.load_state_dict(far.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert all(value.device == q.device for value in far.state[q].values())
        assert all(torch.equal(value.cpu(), opt.state[p][name]) for name, value in far.state[q].items())


def test_the_hooks_of_load_state_dict_see_and_decide_what_is_loaded():
    model, opt = trained(torch.bfloat16)
    other, found = adam(model), []

    def without_guard(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for group in state_dict["param_groups"]:
            group.setdefault("guard", True)
        for state in state_dict["state"].values():
            state["exp_avg"].fill_(1 / 3)
        return state_dict

    other.register_load_state_dict_pre_hook(without_guard)
    other.register_load_state_dict_post_hook(lambda o: found.extend(o.state[p]["exp_avg"] for p in model.parameters()))
    saved = opt.state_dict()
    del saved["param_groups"][0]["guard"]
    other.load_state_dict(saved)
    assert len(found) == 4 and all(value.dtype == torch.float32 for value in found)
    assert all(torch.equal(value, torch.full_like(value, 1 / 3)) for value in found)
    assert all(opt.state[p]["exp_avg"].ne(1 / 3).any() for p in model.parameters())


def test_loading_the_state_of_no_step_starts_anew():
    model, opt = trained()
    opt.load_state_dict(adam(model).state_dict())
    train_step(model, opt, X.float(), Y)
    assert opt.state[model[0].weight]["examples"] == len(X)


REFUSED = {
    "of torch.optim": (
        lambda model, opt: torch.optim.AdamW(model.parameters()).state_dict(),
        "a group lacks averaging, bias_correction, guard, loss_reduction, lr_times_eps, n_g, n_s, second_moment, "
        "state_dtype: the state_dict must be of px.optim.Adam; px.optim.translate gives the settings of one of "
        "torch.optim",
    ),
    "of RMSprop": (
        lambda model, opt: px.optim.RMSprop(model.parameters(), lr=1.0, n_s=9).state_dict(),
        "a group lacks n_g: the state_dict must be of px.optim.Adam; px.optim.translate gives the settings of one of "
        "torch.optim",
    ),
    "other shapes": (
        lambda model, opt: px.optim.Adam(
            [{"params": list(model.parameters())[::-1]}], lr=1.0, n_g=9, n_s=9
        ).load_state_dict(opt.state_dict()),
        "exp_avg of parameter 0 of its group must be (3,), got (8, 5)",
    ),
    "fewer parameters": (
        lambda model, opt: adam(model[0]).state_dict(),
        "groups must have [4] parameters, got [2]",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_changes(which):
    make_dict, message = REFUSED[which]
    model, opt = trained()
    before = copy.deepcopy(opt.state_dict())
    with raises(ValueError, f"Adam.load_state_dict: {message}"):
        opt.load_state_dict(make_dict(model, opt))
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in after["state"].items():
        assert all(torch.equal(value, before["state"][key][name]) for name, value in state.items())


def test_the_state_of_adam_is_not_one_of_sgd():
    model, opt = trained(bias_correction=(True, False))
    message = (
        "SGD.load_state_dict: a group has eps, guard, lr_times_eps, n_s, second_moment: the state_dict must be of "
        "px.optim.SGD; px.optim.translate gives the settings of one of torch.optim"
    )
    with raises(ValueError, message):
        px.optim.SGD(model.parameters(), lr=1.0).load_state_dict(opt.state_dict())


def test_per_example_options_on_a_stock_model_are_refused():
    stock = mlp()
    opt = adam(stock, second_moment="per_batch")
    message = (
        "Adam: parameter 0 of its group, of shape (8, 5), has no second moment: no layer of perexample owns it; call "
        "px.convert(model) before making the optimizer, or use second_moment='per_batch'"
    )
    with raises(ValueError, message):
        opt.load_state_dict(trained()[1].state_dict())
    assert opt.param_groups[0]["second_moment"] == "per_batch" and not opt.state


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam", "per batch", "stock"])
def test_distributed_checkpoint(kind, tmp_path):
    """A fresh optimizer gets its state from a step on gradients of zero; then what was saved is loaded into it."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def fresh():
        model = mlp() if kind == "stock" else px.convert(mlp())
        options = {"second_moment": "per_batch"} if kind in ("per batch", "stock") else {}
        return model, make(kind if kind in KINDS else "Adam", model.parameters(), **options)

    def step(model, opt):
        F.cross_entropy(model(X[:16].float()), Y[:16]).backward()
        opt.step(batch_size=16 if kind == "stock" else None)
        opt.zero_grad()

    model, opt = fresh()
    step(model, opt)
    checkpoint.save(get_optimizer_state_dict(model, opt), checkpoint_id=tmp_path, no_dist=True)
    twin, other = fresh()
    twin.load_state_dict(model.state_dict())
    loaded = get_optimizer_state_dict(twin, other)
    assert all(value["examples"] == 0 for value in loaded["state"].values()) and len(loaded["state"]) == 4
    checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(twin, other, loaded)
    for m, o in ((model, opt), (twin, other)):
        step(m, o)
        assert o.state[m[0].weight]["examples"] == 32
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
