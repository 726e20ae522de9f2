"""The models of the main job, in plain PyTorch: a GPT-2-like block stack, a GroupNorm ResNet and an MLP."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Pre-norm attention and MLP, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))  # (B, T, 3, H, D / H)
        q, k, v = heads.transpose(1, 3).unbind(2)  # (B, H, T, D / H)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a norm, and a head of its own: (B, T) -> (B, T, vocabulary)."""

    def __init__(self, width: int, layers: int, heads: int, positions: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(positions))))


class Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(min(32, outputs), outputs), nn.GroupNorm(min(32, outputs), outputs)
        same = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Sequential):
    """One or more residual blocks a stage, halving the image from the second stage on: (B, 3, S, S) -> (B, 10)."""

    def __init__(self, widths: Sequence[int], blocks: int) -> None:
        stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        body: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                body.append(Residual(before, width, 2 if stage and not block else 1))
                before = width
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
        super().__init__(stem, nn.GroupNorm(min(32, widths[0]), widths[0]), nn.ReLU(), *body, *head)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, averaged over examples and, where there are any, positions."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def stock_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The fastest stock optimizer of the kind."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def our_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Ours, with averaging times like the usual betas at a batch of 100."""
    import perexample as px  # here, so that a process that measures stock PyTorch's memory is without it

    return px.optim.Adam(model.parameters(), lr=1e-6, n_g=1000, n_s=100_000)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]
) -> Callable[[int], None]:
    """The program to time: one whole step on batch i."""

    def step(i: int) -> None:
        x, y = batches[i % len(batches)]
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    return step


class Workload(NamedTuple):
    """A model, its batches, a small version of it for the correctness gate, and the ratio to reach."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    small: Callable[[], nn.Module]
    small_batch: Callable[[], Batch]
    reach: float


def _gpt(width: int, layers: int, positions: int, batch: int) -> Workload:
    def tokens(vocabulary: int, *shape: int) -> Batch:
        return torch.randint(vocabulary, shape), torch.randint(vocabulary, shape)

    return Workload(
        f"GPT d={width} L={layers} T={positions} B={batch}",
        lambda: GPT(width, layers, width // 64, positions, 1024),
        lambda: tokens(1024, batch, positions),
        lambda: GPT(32, 2, 2, 17, 23),
        lambda: tokens(23, 5, 17),
        1.05,
    )


def _resnet(widths: tuple[int, ...], blocks: int, batch: int) -> Workload:
    def images(size: int, count: int) -> Batch:
        return torch.randn(count, 3, size, size), torch.randint(10, (count,))

    return Workload(
        f"ResNet-GN {'-'.join(map(str, widths))}x{blocks} B={batch}",
        lambda: ResNet(widths, blocks),
        lambda: images(32, batch),
        lambda: ResNet((8, 12), 1),
        lambda: images(9, 4),
        1.05,
    )


def _mlp(widths: tuple[int, ...], batch: int) -> Workload:
    def rows(width: int, count: int) -> Batch:
        return torch.randn(count, width), torch.randint(10, (count,))

    return Workload(
        f"MLP {'-'.join(map(str, widths))} B={batch}",
        lambda: mlp(*widths),
        lambda: rows(widths[0], batch),
        lambda: mlp(30, 41, 10),
        lambda: rows(30, 9),
        1.35,
    )


def workloads(full: bool) -> list[Workload]:
    """The default set, and with `full` more sizes."""
    small = [
        _gpt(512, 2, 64, 8),
        _gpt(512, 2, 128, 8),
        _resnet((64, 128, 256), 1, 16),
        _mlp((784, 2048, 2048, 10), 128),
    ]
    large = [
        _gpt(768, 4, 64, 8),
        _gpt(768, 4, 128, 4),
        _gpt(256, 4, 256, 4),
        _resnet((64, 128, 256), 2, 32),
        _resnet((32, 64, 128), 3, 32),
        _mlp((784, 1024, 10), 64),
        _mlp((784, 2048, 2048, 10), 512),
        _mlp((64, 512, 512, 10), 32),
    ]
    return small + large if full else small


def peer_workloads() -> list[Workload]:
    """Small ones, since the peers are slow."""
    return [_gpt(256, 2, 64, 8), _resnet((32, 64), 1, 8), _mlp((784, 512, 512, 10), 32)]
