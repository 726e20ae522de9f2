"""The backward pass of whole layers against the stock layer's. `python -m bench.layers`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import perexample as px
from perexample.testing import assert_moments, oracle

from . import _gate, _kernels

TITLE = "Backward of a layer (input, parameters, second moments) ÷ stock layer's backward"


class First(nn.Module):
    """A layer whose inputs have the batch first, and its first result."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(*[x] * self.times)
        result: Tensor = y if isinstance(y, Tensor) else y[0]
        return result


def graph_of(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and all that its backward is to be taken with respect to."""
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    y = model(x)
    wanted = [x] if x.requires_grad else []
    for p in model.parameters():
        moment = px.moments.moment_of(p)
        wanted += [p] if moment is None or moment.leaf is None else [p, moment.leaf]
    return y, wanted


def backward(graph: tuple[Tensor, list[Tensor]], dy: Tensor) -> Any:
    return torch.autograd.grad(*graph, dy, retain_graph=True)


def check(make: Callable[[], First], x: Tensor) -> None:
    """Two examples at full width, against the loop over examples."""
    torch.manual_seed(0)
    model, x = make(), x[:2].detach()
    target = torch.randn_like(model(x))

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return (y * t).sum()

    expected = oracle(model, loss, x, target, reduction="sum")
    stock = oracle(model, loss, x, target, reduction="sum", dtype=torch.float32)
    converted = px.convert(copy.deepcopy(model))
    loss(converted(x), target).backward()
    try:
        assert_moments(converted, expected, stock)
    except AssertionError as error:
        raise _gate.RedGate(f"{type(model.layer).__name__}: {error}") from error


def per_example(model: First, x: Tensor, dy: Tensor) -> Any:
    """Per-example gradients by torch.func, forward included."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], one: Tensor, g: Tensor) -> Tensor:
        return (functional_call(model, values, (one[None],))[0] * g).sum()

    return [c.square_().sum(0) for c in vmap(grad(loss), in_dims=(None, 0, 0))(params, x, dy).values()]


def _case(
    name: str,
    make: Callable[[], nn.Module],
    x: Callable[[], Tensor],
    reach: float | None = None,
    *,
    times: int = 1,
    peers: bool = False,
) -> _kernels.Case:
    def first() -> First:
        return First(make(), times)

    def inputs() -> tuple[Any, ...]:
        stock, data = first(), x()
        graph = graph_of(stock, data)
        dy = torch.randn_like(graph[0])
        return dy, graph, graph_of(px.convert(copy.deepcopy(stock)), data), data, stock  # type: ignore[arg-type]

    return _kernels.Case(
        name,
        inputs,
        lambda dy, stock, ours, data, model: backward(stock, dy),
        lambda dy, stock, ours, data, model: backward(ours, dy),
        lambda dy, stock, ours, data, model: check(first, data),
        reach,
        {"torch.func": lambda dy, stock, ours, data, model: per_example(model, data, dy)} if peers else {},
    )


def cases(full: bool) -> list[_kernels.Case]:
    """The default shapes, and with `full` more of them, and torch.func where it can do them."""
    randn = torch.randn
    small = [
        _case("RMSNorm 8×128×768", lambda: nn.RMSNorm(768), lambda: randn(8, 128, 768), 1.15, peers=full),
        _case(
            "InstanceNorm2d 16×64@32²",
            lambda: nn.InstanceNorm2d(64, affine=True),
            lambda: randn(16, 64, 32, 32),
            1.15,
            peers=full,
        ),
        _case(
            "ConvTranspose2d 8×64→32@16² k4 s2",
            lambda: nn.ConvTranspose2d(64, 32, 4, 2, 1),
            lambda: randn(8, 64, 16, 16),
            peers=full,
        ),
        _case(
            "MultiheadAttention 8×128×256 h8",
            lambda: nn.MultiheadAttention(256, 8, batch_first=True),
            lambda: randn(8, 128, 256),
            times=3,
        ),
        _case("LSTM 32×64×128→256", lambda: nn.LSTM(128, 256, batch_first=True), lambda: randn(32, 64, 128), 1.3),
        _case("GRU 32×64×128→256", lambda: nn.GRU(128, 256, batch_first=True), lambda: randn(32, 64, 128), 1.3),
    ]
    large = [
        _case("RMSNorm 128×1024", lambda: nn.RMSNorm(1024), lambda: randn(128, 1024), 1.15),
        _case(
            "TransformerEncoderLayer 8×64×256",
            lambda: nn.TransformerEncoderLayer(256, 8, 512, 0.0, batch_first=True),
            lambda: randn(8, 64, 256),
        ),
        _case("LSTM 8×128×64→128", lambda: nn.LSTM(64, 128, batch_first=True), lambda: randn(8, 128, 64), 1.3),
        _case("RNN 32×64×128→256", lambda: nn.RNN(128, 256, batch_first=True), lambda: randn(32, 64, 128), 1.3),
        _case(
            "EmbeddingBag 64×32 V=10000 D=64",
            lambda: nn.EmbeddingBag(10000, 64),
            lambda: torch.randint(10000, (64, 32)),
            1.15,
        ),
        _case("PReLU 16×64@32²", lambda: nn.PReLU(64), lambda: randn(16, 64, 32, 32), 1.15, peers=True),
        _case("Bilinear 128×64×64→32", lambda: nn.Bilinear(64, 64, 32), lambda: randn(128, 64), times=2),
    ]
    return small + large if full else small


if __name__ == "__main__":
    _kernels.main("layers", TITLE, cases)
