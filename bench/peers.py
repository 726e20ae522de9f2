"""Other ways to the same second moments: forward and backward over stock's. `python -m bench.peers`."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import perexample as px

from . import _gate, _report, _timing
from .models import Batch, Workload, loss_fn, peer_workloads

TITLE = "Forward + backward with Σ c², ÷ stock forward + backward"
Program = Callable[[int], Any]


def _backward(model: nn.Module, batches: list[Batch]) -> Program:
    def program(i: int) -> None:
        x, y = batches[i % len(batches)]
        model.zero_grad()
        loss_fn(model(x), y).backward()

    return program


def _loop(model: nn.Module, batches: list[Batch]) -> Program:
    params = list(model.parameters())

    def program(i: int) -> list[Tensor]:
        x, y = batches[i % len(batches)]
        squares = [torch.zeros_like(p) for p in params]
        sums = [torch.zeros_like(p) for p in params]
        for b in range(len(x)):
            loss = loss_fn(model(x[b : b + 1]), y[b : b + 1]) / len(x)
            for total, square, c in zip(sums, squares, torch.autograd.grad(loss, params), strict=True):
                total += c
                square.addcmul_(c, c)
        return squares

    return program


def _vmap(model: nn.Module, batches: list[Batch]) -> Program:
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(model, values, (x[None],)), y[None])

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))

    def program(i: int) -> list[Tensor]:
        x, y = batches[i % len(batches)]
        return [c.div_(len(x)).square_().sum(0) for c in per_example(params, x, y).values()]

    return program


def _opacus(model: nn.Module, batches: list[Batch]) -> Program:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="mean")

    def program(i: int) -> list[Tensor]:
        x, y = batches[i % len(batches)]
        wrapped.zero_grad()
        loss_fn(wrapped(x), y).backward()
        squares = [p.grad_sample.div_(len(x)).square_().sum(0) for p in wrapped.parameters()]
        for p in wrapped.parameters():
            p.grad_sample = None
        return squares

    return program


def _backpack(model: nn.Module, batches: list[Batch]) -> Program:
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    extended, loss = extend(model), extend(nn.CrossEntropyLoss())

    def program(i: int) -> None:
        x, y = batches[i % len(batches)]
        extended.zero_grad()
        with backpack(SumGradSquared()):
            loss(extended(x), y).backward()

    return program


def _programs(work: Workload, model: nn.Module, batches: list[Batch]) -> dict[str, Program]:
    programs = {"perexample": _backward(px.convert(copy.deepcopy(model)), batches)}
    programs["loop over examples"] = _loop(copy.deepcopy(model), batches)
    programs["torch.func vmap"] = _vmap(copy.deepcopy(model), batches)
    if importlib.util.find_spec("opacus"):
        programs["Opacus"] = _opacus(copy.deepcopy(model), batches)
    if importlib.util.find_spec("backpack") and work.name.startswith("MLP"):
        programs["BackPACK"] = _backpack(copy.deepcopy(model), batches)
    return programs


def table(seconds: float) -> list[_report.Row]:
    """Measure, print and save; peers that are not installed, or cannot do a model, are left out."""
    works = peer_workloads()
    rows: list[_report.Row] = []
    with _timing.threads(1), _timing.progress(len(works), "peers") as bar:
        for work in works:
            _gate.model_gate(work)
            torch.manual_seed(0)
            model = work.build()
            batches = [work.batch() for _ in range(2)]
            stock = _backward(model, batches)
            for peer, program in _programs(work, model, batches).items():
                result = _timing.compare(stock, program, seconds, least_rounds=3)
                rows.append({"case": f"{work.name} [{peer}]", "threads": 1, "reach": None, **result._asdict()})
            bar.update()
    _report.ratio_table(TITLE, rows)
    _report.save("peers", rows)
    return rows


if __name__ == "__main__":
    _report.announce()
    table(seconds=3.0)
