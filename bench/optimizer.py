"""The optimizer's step against torch's fused AdamW. `python -m bench.optimizer`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import perexample as px
from perexample.ops.optimizer import state_starts

from . import _gate, _kernels
from .models import GPT

TITLE = "Step ÷ torch.optim.AdamW(fused=True).step()"


class Parallel(nn.Module):
    """Many small layers side by side, so that no gradient vanishes."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


class GPT2(GPT):
    """The parameters of GPT-2 124M: 148 tensors, its head being the token embedding."""

    def __init__(self) -> None:
        super().__init__(768, 12, 12, 1024, 50257)
        self.head = nn.Identity()  # type: ignore[assignment]


def gradients(model: nn.Module, x: Tensor) -> None:
    """Give every parameter a random gradient and, on a converted model, the second moment that goes with it."""
    model(x).sum().backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad.normal_(std=1e-2)
        if hasattr(p, "sum_grad_squared"):
            p.sum_grad_squared.copy_(p.grad.square())


def _programs(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """Stock's step, ours, our op by itself, and the model, which has to live; the gradients stay from step to step."""
    converted = px.convert(copy.deepcopy(model))
    gradients(model, x)
    gradients(converted, x)
    stock = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ours = px.optim.AdamW(converted.parameters(), lr=1e-5, n_g=10, n_s=1000)
    return stock.step, ours.step, _bare(converted), converted


def _bare(model: nn.Module) -> Callable[[], Any]:
    params = list(model.parameters())
    detached = [p.detach() for p in params]
    grads, sums = [p.grad for p in params], [p.sum_grad_squared for p in params]
    averages = [torch.zeros(state_starts(params)[-1]) for _ in range(2)]
    seen, flags = torch.zeros(len(params), dtype=torch.float64), torch.zeros(len(params), dtype=torch.int32)
    batch, rate = torch.tensor(2.0, dtype=torch.float64), torch.tensor(1e-5, dtype=torch.float64)
    rest = (batch, rate, *_gate.ADAM)
    return lambda: torch.ops.perexample.optimizer_step_(detached, grads, sums, *averages, seen, flags, *rest)


def _case(name: str, build: Callable[[], nn.Module], x: Tensor, reach: float, bare: bool) -> _kernels.Case:
    return _kernels.Case(
        name,
        lambda: _programs(build(), x),
        lambda stock, ours, op, model: stock(),
        lambda stock, ours, op, model: ours(),
        lambda stock, ours, op, model: _gate.optimizer_gate(),
        reach,
        {"op alone": lambda stock, ours, op, model: op()} if bare else {},
    )


def _in_a_row(program: Callable[[], Any], times: int = 10) -> None:
    for _ in range(times):
        program()


def _warm_case() -> _kernels.Case:
    """As in many steps one after another, each finds what its last run left in the caches."""
    return _kernels.Case(
        "2,000 tensors of 64, op alone, ten in a row",
        lambda: _programs(Parallel(2000, 8), torch.randn(2, 8)),
        lambda stock, ours, op, model: _in_a_row(stock),
        lambda stock, ours, op, model: _in_a_row(op),
        lambda stock, ours, op, model: _gate.optimizer_gate(),
        0.1,
    )


def cases(full: bool) -> list[_kernels.Case]:
    """Many tiny tensors, and GPT-2's parameters where memory allows."""
    tiny = _case("2,000 tensors of 64", lambda: Parallel(2000, 8), torch.randn(2, 8), 1.0, bare=True)
    middle = _case("5.8 M in 6 tensors", _three_layers, torch.randn(2, 784), 1.15, bare=full)
    large = _case("124 M in 148 tensors", GPT2, torch.randint(50257, (2, 4)), 1.15, bare=True)
    return [tiny, _warm_case(), *([middle] if full else []), *([large] if _free_memory() > 10 << 30 else [])]


def _three_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 10))


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    _kernels.main("optimizer", TITLE, cases)
