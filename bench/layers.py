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
        self.results: list[Tensor] | None = None  # where set, results go there before the model counts its examples

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(*[x] * self.times)
        result: Tensor = y if isinstance(y, Tensor) else y[0]
        if self.results is not None:
            self.results.append(result)
        return result


def graph_of(model: First, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The layer's output, and all that its backward is to be taken with respect to.

    Without the count of examples, which is the model's, once a step (`bench.step` has it).
    """
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    model.results = results = []
    y = model(x)
    model.results = None
    if type(results[0]) is Tensor:  # not so what the fallback holds copies of
        y = results[0]
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


def by_fallback(layer: nn.Module) -> nn.Module:
    """The same layer as a class that no kernel serves."""
    stock = type(layer)
    layer.__class__ = type(f"Plain{stock.__name__}", (stock,), {})
    return layer


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
        fallback: Any = None
        if peers:
            try:
                fallback = graph_of(px.convert(First(by_fallback(copy.deepcopy(stock.layer)), times)), data)  # type: ignore[arg-type]
            except ValueError as error:
                fallback = error
        return dy, graph, graph_of(px.convert(copy.deepcopy(stock)), data), fallback, data, stock  # type: ignore[arg-type]

    def by_copies(fallback: Any, dy: Tensor) -> Any:
        if isinstance(fallback, ValueError):
            raise fallback
        return backward(fallback, dy)

    others: dict[str, _kernels.Program] = {
        "torch.func, and forward": lambda dy, stock, ours, fallback, data, model: per_example(model, data, dy),
        "exact fallback": lambda dy, stock, ours, fallback, data, model: by_copies(fallback, dy),
    }
    return _kernels.Case(
        name,
        inputs,
        lambda dy, stock, ours, fallback, data, model: backward(stock, dy),
        lambda dy, stock, ours, fallback, data, model: backward(ours, dy),
        lambda dy, stock, ours, fallback, data, model: check(first, data),
        reach,
        others if peers else {},
    )


def cases(full: bool) -> list[_kernels.Case]:
    """The default shapes, and with `full` every class, beside torch.func and the fallback where these can do it."""
    randn = torch.randn

    def case(*arguments: Any, **options: Any) -> _kernels.Case:
        return _case(*arguments, **options, peers=full)

    small = [
        case("RMSNorm 8×128×768", lambda: nn.RMSNorm(768), lambda: randn(8, 128, 768), 1.15),
        case(
            "InstanceNorm2d 16×64@32²", lambda: nn.InstanceNorm2d(64, affine=True), lambda: randn(16, 64, 32, 32), 1.15
        ),
        case(
            "ConvTranspose2d 8×64→32@16² k4 s2",
            lambda: nn.ConvTranspose2d(64, 32, 4, 2, 1),
            lambda: randn(8, 64, 16, 16),
        ),
        case(
            "MultiheadAttention 8×128×256 h8",
            lambda: nn.MultiheadAttention(256, 8, batch_first=True),
            lambda: randn(8, 128, 256),
            times=3,
        ),
        case("LSTM 32×64×128→256", lambda: nn.LSTM(128, 256, batch_first=True), lambda: randn(32, 64, 128), 1.3),
        case("GRU 32×64×128→256", lambda: nn.GRU(128, 256, batch_first=True), lambda: randn(32, 64, 128), 1.3),
    ]
    large = [
        case("RMSNorm 128×1024", lambda: nn.RMSNorm(1024), lambda: randn(128, 1024), 1.15),
        case("LayerNorm 8×128×768", lambda: nn.LayerNorm(768), lambda: randn(8, 128, 768), 1.15),
        case("GroupNorm 16×64@32²", lambda: nn.GroupNorm(32, 64), lambda: randn(16, 64, 32, 32), 1.15),
        case("BatchNorm2d in eval 16×64@32²", lambda: nn.BatchNorm2d(64).eval(), lambda: randn(16, 64, 32, 32), 1.15),
        case("Linear 16×32×256→256", lambda: nn.Linear(256, 256), lambda: randn(16, 32, 256)),
        case("Conv1d 16×64→64@64", lambda: nn.Conv1d(64, 64, 3, padding=1), lambda: randn(16, 64, 64)),
        case("Conv2d 16×64→64@16²", lambda: nn.Conv2d(64, 64, 3, padding=1), lambda: randn(16, 64, 16, 16)),
        case("Conv3d 8×16→16@8³", lambda: nn.Conv3d(16, 16, 3, padding=1), lambda: randn(8, 16, 8, 8, 8)),
        case("ConvTranspose1d 8×64→32@64", lambda: nn.ConvTranspose1d(64, 32, 4, 2, 1), lambda: randn(8, 64, 64)),
        case("ConvTranspose3d 4×16→8@6³", lambda: nn.ConvTranspose3d(16, 8, 4, 2, 1), lambda: randn(4, 16, 6, 6, 6)),
        case(
            "TransformerEncoderLayer 8×64×256",
            lambda: nn.TransformerEncoderLayer(256, 8, 512, 0.0, batch_first=True),
            lambda: randn(8, 64, 256),
        ),
        case(
            "TransformerDecoderLayer 8×64×256",
            lambda: nn.TransformerDecoderLayer(256, 8, 512, 0.0, batch_first=True),
            lambda: randn(8, 64, 256),
            times=2,
        ),
        case("LSTM 8×128×64→128", lambda: nn.LSTM(64, 128, batch_first=True), lambda: randn(8, 128, 64), 1.3),
        case("RNN 32×64×128→256", lambda: nn.RNN(128, 256, batch_first=True), lambda: randn(32, 64, 128), 1.3),
        case("LSTMCell 64×128→256", lambda: nn.LSTMCell(128, 256), lambda: randn(64, 128)),
        case("Embedding 8×128 V=1024 D=512", lambda: nn.Embedding(1024, 512), lambda: indices(1024, 8, 128), 1.15),
        case(
            "EmbeddingBag 64×32 V=10000 D=64", lambda: nn.EmbeddingBag(10000, 64), lambda: indices(10000, 64, 32), 1.15
        ),
        case("PReLU 16×64@32²", lambda: nn.PReLU(64), lambda: randn(16, 64, 32, 32), 1.15),
        case("Bilinear 128×64×64→32", lambda: nn.Bilinear(64, 64, 32), lambda: randn(128, 64), times=2),
    ]
    # As small as those above, a good part of the time is Python's.
    larger = [
        _case("LayerNorm 8×1024×768", lambda: nn.LayerNorm(768), lambda: randn(8, 1024, 768), 1.15),
        _case("Embedding 8×1024 V=1024 D=512", lambda: nn.Embedding(1024, 512), lambda: indices(1024, 8, 1024), 1.15),
        _case(
            "EmbeddingBag 1024×32 V=10000 D=64",
            lambda: nn.EmbeddingBag(10000, 64),
            lambda: indices(10000, 1024, 32),
            1.15,
        ),
    ]
    return small + large + larger if full else small


def indices(rows: int, *shape: int) -> Tensor:
    return torch.randint(rows, shape)


if __name__ == "__main__":
    _kernels.main("layers", TITLE, cases)
