"""A linear layer by its kernel, by the exact fallback and by torch.func. `python -m bench.fallback`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexample as px

from . import _kernels
from .layers import First, backward, check, graph_of, per_example

TITLE = "Backward of a linear layer by its kernel, the exact fallback and torch.func ÷ stock layer's backward"


class Plain(nn.Module):
    """A linear layer of a class that no kernel serves."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layer = nn.Linear(inputs, outputs)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _case(batch: int, positions: int, inputs: int, outputs: int) -> _kernels.Case:
    def x() -> Tensor:
        return torch.randn(batch, positions, inputs)

    def make() -> tuple[Any, ...]:
        plain, layer, data = Plain(inputs, outputs), nn.Linear(inputs, outputs), x()
        layer.load_state_dict(plain.state_dict())
        stock = First(layer)
        graph = graph_of(stock, data)
        ours = [graph_of(px.convert(First(copy.deepcopy(part))), data) for part in (layer, plain)]
        return torch.randn_like(graph[0]), graph, *ours, data, stock

    def gate(dy: Tensor, stock: Any, kernel: Any, fallback: Any, data: Tensor, model: First) -> None:
        check(lambda: First(nn.Linear(inputs, outputs)), data)
        check(lambda: First(Plain(inputs, outputs)), data)

    return _kernels.Case(
        f"Linear {batch}×{positions}×{inputs}→{outputs}",
        make,
        lambda dy, stock, kernel, fallback, data, model: backward(stock, dy),
        lambda dy, stock, kernel, fallback, data, model: backward(kernel, dy),
        gate,
        None,
        {
            "exact fallback": lambda dy, stock, kernel, fallback, data, model: backward(fallback, dy),
            "torch.func": lambda dy, stock, kernel, fallback, data, model: per_example(model, data, dy),
        },
    )


def cases(full: bool) -> list[_kernels.Case]:
    """The default shape, and with `full` more of them."""
    large = [_case(128, 1, 512, 512), _case(8, 128, 768, 768)]
    return [_case(16, 32, 256, 256), *(large if full else [])]


if __name__ == "__main__":
    _kernels.main("fallback", TITLE, cases)
