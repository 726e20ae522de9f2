"""Norms with running statistics: constants in eval mode, and kept as the stock layer keeps them in training."""

from __future__ import annotations

import copy

import pytest
import torch
from models import randn, weighted_sum
from torch import nn

import perexample as px
from perexample.testing import assert_moments, oracle

NORMS = {
    "batch1": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "batch1-positions": (lambda: nn.BatchNorm1d(4, eps=1e-2), (5, 4, 3)),
    "batch2": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 2)),
    "batch3": (lambda: nn.BatchNorm3d(4), (2, 4, 3, 2, 2)),
    "sync-rows": (lambda: nn.SyncBatchNorm(4), (5, 4)),
    "sync": (lambda: nn.SyncBatchNorm(4, eps=1e-2), (3, 4, 5, 2)),
    "instance1": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (5, 4, 3)),
    "instance2": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 5, 2)),
    "instance3": (lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True), (2, 4, 3, 2, 2)),
}
INSTANCE = [name for name in NORMS if name.startswith("instance")]


def model_of(name, dtype=torch.float64):
    """A 1x1 convolution or linear layer, then the norm, with running statistics of their own."""
    make, shape = NORMS[name]
    torch.manual_seed(0)
    mix = {2: lambda: nn.Linear(4, 4), 3: lambda: nn.Conv1d(4, 4, 1), 4: lambda: nn.Conv2d(4, 4, 1)}
    model = nn.Sequential(mix.get(len(shape), lambda: nn.Conv3d(4, 4, 1))(), make()).to(dtype)
    for tensor in (model[1].weight, model[1].bias, model[1].running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model, randn(*shape, dtype=dtype).requires_grad_(), randn(*shape, seed=1, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_in_eval_mode_inside_of_a_model_in_training_the_moments_are_exact(name, dtype):
    model, x, target = model_of(name, dtype)
    model[1].eval()
    expected, stock = (
        oracle(model, weighted_sum, x.detach(), target, reduction="sum", dtype=d) for d in (torch.float64, dtype)
    )
    converted = px.convert(copy.deepcopy(model))
    y, stock_y = converted(x), copy.deepcopy(model)(x)
    assert torch.equal(y, stock_y)
    weighted_sum(y, target).backward()
    assert_moments(converted, expected, stock)
    assert torch.equal(converted[1].running_mean, model[1].running_mean)
    px.optim.Adam(converted.parameters(), lr=1e-3, n_g=10, n_s=100).step()


@pytest.mark.parametrize("name", NORMS)
def test_in_a_model_in_eval_mode_the_layer_is_the_stock_layer(name):
    model, x, target = model_of(name)
    model.eval()
    converted = px.convert(copy.deepcopy(model))
    y, stock_y = converted(x), model(x)
    assert torch.equal(y, stock_y)
    weighted_sum(y, target).backward()
    assert all(p.grad is not None and p.sum_grad_squared is None for p in converted.parameters())


@pytest.mark.parametrize("name", INSTANCE)
def test_in_training_running_statistics_are_kept_and_have_no_part_in_the_output(name):
    model, x, target = model_of(name)
    model[0].bias = None  # its gradient would be zero but for rounding
    expected = oracle(model, weighted_sum, x.detach(), target, reduction="sum")
    converted = px.convert(copy.deepcopy(model))
    y, stock_y = converted(x), model(x)
    assert torch.equal(y, stock_y)
    for buffer, stock in zip(converted.buffers(), model.buffers(), strict=True):
        assert torch.equal(buffer, stock)
    weighted_sum(y, target).backward()
    assert_moments(converted, expected)


@pytest.mark.parametrize("name", ["batch2", "sync"])
def test_batch_norm_that_goes_back_to_training_is_refused_by_name(name):
    model, x, _ = model_of(name)
    kind = type(model[1]).__name__
    model[1].eval()
    px.convert(model)
    model.train()
    with pytest.raises(ValueError, match=rf"1: {kind} with the statistics of the batch.*call \.eval\(\)"):
        model(x)


def test_batch_norm_without_running_statistics_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False).eval())
    with pytest.raises(ValueError, match="batch statistics mix the examples"):
        px.convert(model)
