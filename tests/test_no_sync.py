"""What a step, clipping and the noise scale do on a device: no value of it is waited for.

Everything runs on the meta device, whose tensors have no values: looking at one raises. The mode notes what else could
make the host wait, or leave a scalar on it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import mlp
from test_optimizers import KINDS, make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import perexample as px


class Transfers(TorchDispatchMode):
    """Notes the ops between the host and the device, but for copies to the device that nobody waits for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        sends = "_to_copy" in str(func) and kwargs.get("non_blocking") and out.device.type == "meta"
        if len({t.device.type for t in tensors}) > 1 and not sends:
            self.found.append(str(func))
        return out


@pytest.fixture
def model():
    with torch.device("meta"):
        return px.convert(mlp())


def backward(model):
    x, y = torch.empty(4, 5, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    F.cross_entropy(model(x), y).backward()


def test_the_meta_device_notices():
    with Transfers() as transfers, pytest.raises(RuntimeError):
        torch.empty((), device="meta").item()
    with Transfers() as transfers:
        torch.ones((), device="meta") * torch.ones(())
        torch.ones(()).to("meta")
        torch.ones(()).to("meta", non_blocking=True)
    assert transfers.found == ["aten.mul.Tensor", "aten._to_copy.default"]


@pytest.mark.parametrize("second", ["per_example", "per_batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_step(model, kind, second):
    opt = make(kind, model.parameters(), **({} if KINDS[kind][0] == "SGD" else {"second_moment": second}))
    for _ in range(2):
        backward(model)
        backward(model)
        opt.param_groups[0]["lr"] *= 0.5
        with Transfers() as transfers:
            opt.step()
            opt.zero_grad()
        assert not transfers.found
    assert all(value.device.type == "meta" for state in opt.state.values() for value in state.values())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tensors_for_the_learning_rate_and_the_batch_size(model, device):
    lr, batch, limit = (torch.tensor(value, device=device) for value in (1e-3, 4.0, 1.0))
    opt, noise = make("Adam", model.parameters(), lr=lr), px.noise.GradientNoise(model)
    backward(model)
    with Transfers() as transfers:
        px.clip_grad_norm_(model.parameters(), limit)
        for size in (batch, 4):
            noise.update(batch_size=size, grad_scale=size)
        opt.step(batch_size=batch.double())
    assert not transfers.found


def test_clipping(model):
    backward(model)
    with Transfers() as transfers:
        norm = px.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.device.type == "meta" and not transfers.found


def test_a_step_under_a_grad_scaler(model):
    """With what GradScaler hands over."""
    opt = make("Adam", model.parameters())
    backward(model)
    opt.grad_scale, opt.found_inf = (torch.empty((), device="meta") for _ in range(2))
    with Transfers() as transfers:
        opt.step()
    assert not transfers.found


def test_noise(model):
    opt = make("Adam", model.parameters())
    noise = px.noise.GradientNoise(model)
    noise.attach(opt)
    for _ in range(2):
        backward(model)
        with Transfers() as transfers:
            opt.step()
            results = [noise.scale(), *noise.by_layer().values(), *noise.by_parameter().values()]
            results += [*noise.variance_by_parameter().values(), px.noise.variance(model[0].weight)]
            opt.zero_grad()
        assert not transfers.found and all(result.device.type == "meta" for result in results)
