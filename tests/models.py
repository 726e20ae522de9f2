"""The models, losses and small helpers that several test files share."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexample as px
from perexample.testing import assert_moments, oracle


class Net(nn.Module):
    """conv -> linear -> linear with positions, and every other layer on the way. x (B, 3, 5, 5), tokens (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.norm = nn.GroupNorm(2, 4)
        self.fc = nn.Linear(20, 6)
        self.ln = nn.LayerNorm(6)
        self.token = nn.Embedding(7, 6)
        self.position = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).tanh().permute(0, 2, 1, 3).flatten(2)  # (B, 5, 20)
        h = self.ln(self.fc(h)).tanh() + self.token(tokens) + self.position(torch.arange(5)[None])
        return self.head(h)


class Plain(nn.Module):
    """conv -> linear -> linear with positions. x (B, 2, 6, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.fc = nn.Linear(20, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.conv(x).permute(0, 2, 1, 3).flatten(2)).tanh())


def net_data(batch: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, tokens and targets for `Net`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 5, 5, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 7, (batch, 5), generator=g), torch.randn(batch, 5, 3, generator=g).to(dtype)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, drawn in float64 and rounded."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A stock 5-8-3 perceptron with parameters drawn from `seed`."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def weighted_sum(output: Tensor, target: Tensor) -> Tensor:
    """A sum-reduced loss whose gradient with respect to the output is `target`."""
    return (output * target).sum()


def half_square_mean(output: Tensor, target: Tensor) -> Tensor:
    """A mean-reduced loss (of examples), half the squared error of each."""
    return (output - target).square().flatten(1).sum(1).mean() / 2


def backward(model: nn.Module, *inputs: Tensor, target: Tensor, loss_fn=half_square_mean) -> Tensor:
    loss = loss_fn(model(*inputs), target)
    loss.backward()
    return loss


def squares(model: nn.Module) -> list[Tensor]:
    """Copies of the second moments of all parameters."""
    return [p.sum_grad_squared.clone() for p in model.parameters()]


def adam(model: nn.Module, **options: object) -> px.optim.Adam:
    """px.optim.Adam over `model` with small-test values for what is not given."""
    return px.optim.Adam(model.parameters(), **{"lr": 1e-3, "n_g": 100, "n_s": 1000, **options})


def train_step(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, **options: object) -> None:
    """One step of cross entropy."""
    F.cross_entropy(model(x), y).backward()
    opt.step(**options)
    opt.zero_grad()


def converted_net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    """`Net`, converted, with parameters drawn from `seed`."""
    torch.manual_seed(seed)
    return px.convert(Net().to(dtype))


X, Y = randn(6, 5), randn(6, 3, seed=1)


def raises(error, message):
    """The error with this message, the whole of it."""
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def assert_nothing_lost(model, opt=None, x=X, y=Y):
    """A step after the error is the step that there would have been without it."""
    opt = opt or adam(model)
    seen = {p: opt.state[p]["examples"].item() if p in opt.state else 0 for p in model.parameters()}
    opt.zero_grad()
    expected = oracle(model, half_square_mean, x, y)
    backward(model, x, target=y)
    assert_moments(model, expected)
    opt.step()
    assert all(opt.state[p]["examples"].item() == n + len(x) for p, n in seen.items())
    opt.zero_grad()


class Turn(torch.autograd.Function):
    """A custom Function that moves the batch, which autograd's graph does not tell."""

    @staticmethod
    def forward(ctx, x):
        return x.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return grad.transpose(0, 1)
