"""Two whole models as people write them, a nanoGPT and a ResNet with GroupNorm: every moment, and `dry_run`'s table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_files import assert_golden
from models import randn
from torch import nn

import perexample as px
from perexample.testing import assert_moments, oracle

POSITIONS, VOCABULARY, CLASSES = 5, 11, 4


class CausalSelfAttention(nn.Module):
    """Query, key and value from one layer."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, 2))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Norms before attention and MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), CausalSelfAttention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """Position ids of shape [T], and a head tied to the tokens. (B, T) -> (B, T, vocabulary)."""

    def __init__(self, width=6, heads=2, layers=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(POSITIONS, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Residual(nn.Module):
    """Two convolutions with GroupNorm, and a projection where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(2, outputs), nn.GroupNorm(2, outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(2, outputs))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Two stages, the second with stride 2. (B, 3, 5, 5) -> (B, classes)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4), nn.ReLU())
        self.layer1, self.layer2 = Residual(4, 4, 1), Residual(4, 8, 2)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def batch_of(name, batch):
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(batch)
    if name == "nanoGPT":
        return torch.randint(VOCABULARY, (2, batch, POSITIONS), generator=generator).unbind()
    return randn(batch, 3, 5, 5), torch.randint(CLASSES, (batch,), generator=generator)


def cross_entropy(reduction):
    return lambda output, target: F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction=reduction)


def model_of(name):
    torch.manual_seed(0)
    model = {"nanoGPT": NanoGPT, "ResNet-GN": ResNet}[name]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def converted(name, *batches):
    model = px.convert(model_of(name))
    if name == "nanoGPT" and POSITIONS in batches:
        model.wpe.batched = False  # with as many examples as positions the ids could be either
    return model


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch", [3, POSITIONS])
@pytest.mark.parametrize("name", ["nanoGPT", "ResNet-GN"])
def test_every_second_moment_equals_the_loop_over_examples(name, batch, reduction):
    model, (x, y), loss_fn = converted(name, batch), batch_of(name, batch), cross_entropy(reduction)
    expected = oracle(model_of(name), loss_fn, x, y, reduction=reduction)
    assert len(expected) == len(list(model.parameters()))
    loss_fn(model(x), y).backward()
    assert_moments(model, expected)
    assert model._examples.total.item() == batch


@pytest.mark.parametrize("name", ["nanoGPT", "ResNet-GN"])
def test_two_micro_batches_add_up(name):
    model, (x, y), loss_fn = converted(name, 3, POSITIONS), batch_of(name, 3 + POSITIONS), cross_entropy("sum")
    expected = oracle(model_of(name), loss_fn, x, y, reduction="sum")
    for rows in (slice(0, 3), slice(3, None)):
        loss_fn(model(x[rows]), y[rows]).backward()
    assert_moments(model, expected)
    assert model._examples.total.item() == len(x)


def test_position_ids_that_could_be_a_batch_ask():
    model = px.convert(model_of("nanoGPT"))
    with pytest.raises(ValueError, match="batched"):
        model(batch_of("nanoGPT", POSITIONS)[0])


@pytest.mark.parametrize("name", ["nanoGPT", "ResNet-GN"])
def test_the_table(name):
    assert_golden(name, str(px.convert(model_of(name), dry_run=True)))
