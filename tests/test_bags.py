"""EmbeddingBag with offsets and with weights of its indices."""

from __future__ import annotations

import copy

import pytest
import torch
from models import randn, weighted_sum
from torch import nn

import perexample as px
from perexample.testing import assert_moments, oracle

LENGTHS = torch.tensor([3, 0, 5, 1])


class Bags(nn.Module):
    """Indices (B, 5), of which `lengths` are in the bag, and their weights (B, 5): as one list with offsets."""

    def __init__(self, include_last_offset=False, weighted=False, **keywords):
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, include_last_offset=include_last_offset, **keywords)
        self.weighted = weighted

    def forward(self, indices, lengths, factors):
        inside = torch.arange(5) < lengths[:, None]
        ends = lengths.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends if self.bag.include_last_offset else ends[:-1]])
        return self.bag(indices[inside], offsets, factors[inside] if self.weighted else None)


VARIANTS = {
    "sum": dict(mode="sum"),
    "mean": dict(mode="mean"),
    "mean with padding": dict(mode="mean", padding_idx=1),
    "max": dict(mode="max"),
    "max with padding": dict(mode="max", padding_idx=1),
    "last offset": dict(mode="sum", include_last_offset=True),
    "weighted": dict(mode="sum", weighted=True),
    "weighted with padding": dict(mode="sum", weighted=True, padding_idx=2, include_last_offset=True),
}


@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor([2, 2, 2, 2]), torch.tensor([0, 0])], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bags_by_offsets(variant, lengths):
    torch.manual_seed(0)
    model = Bags(**VARIANTS[variant]).double()
    batch = len(lengths)
    indices, factors = torch.randint(6, (batch, 5)), randn(batch, 5).requires_grad_()
    target = randn(batch, 4, seed=1)
    stock = model(indices, lengths, factors)
    expected = oracle(model, weighted_sum, (indices, lengths, factors.detach()), target, reduction="sum")
    converted = px.convert(copy.deepcopy(model))
    y = converted(indices, lengths, factors)
    assert torch.equal(y, stock)
    weighted_sum(y, target).backward()
    assert_moments(converted, expected)
    if model.weighted and lengths.any():
        (expected_grad,) = torch.autograd.grad(weighted_sum(stock, target), factors)
        torch.testing.assert_close(factors.grad, expected_grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.parametrize("variant", VARIANTS)
def test_bags_compile_in_one_graph_whatever_their_lengths(variant):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Bags(**VARIANTS[variant]).double()
    converted = px.convert(copy.deepcopy(model))
    converted.bag.compile(fullgraph=True, backend="aot_eager")
    target = randn(4, 4, seed=1)
    for call, lengths in enumerate([LENGTHS, torch.tensor([2, 4, 1, 2]), torch.tensor([0, 0, 5, 4])]):
        indices, factors = torch.randint(6, (4, 5)), randn(4, 5, seed=call).requires_grad_()
        expected = oracle(model, weighted_sum, (indices, lengths, factors.detach()), target, reduction="sum")
        converted.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=call > 0):
            weighted_sum(converted(indices, lengths, factors), target).backward()
        assert_moments(converted, expected)
        if model.weighted:
            (expected_grad,) = torch.autograd.grad(weighted_sum(model(indices, lengths, factors), target), factors)
            torch.testing.assert_close(factors.grad, expected_grad)
    torch.compiler.reset()


def test_the_op_of_bags():
    dy, indices, offsets = randn(4, 3), torch.randint(6, (9,)), torch.tensor([0, 3, 3, 8])
    sizes = torch.tensor([3, 0, 5, 1])
    op = torch.ops.perexample.bag_moments
    for factors, divisors, padding in ((None, None, -1), (randn(9), None, 2), (None, sizes, 1), (None, sizes, -1)):
        arguments = dy, factors, indices, offsets, divisors, 6, padding, None, torch.float32
        torch.library.opcheck(op, arguments)
    alike = dy[:3], randn(9), indices, torch.tensor([0, 3, 6]), None, 6, 2
    torch.library.opcheck(op, (*alike, 3, torch.float32))
    torch.testing.assert_close(op(*alike, 3, torch.float32), op(*alike, None, torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_what_has_no_per_example_gradient_is_refused(option):
    arguments = {option: 1.0 if option == "max_norm" else True}
    with pytest.raises(ValueError, match=r"^EmbeddingBag: .*(max_norm|scale_grad_by_freq|sparse)"):
        px.nn.EmbeddingBag(4, 3, **arguments)
    with pytest.raises(ValueError, match=r"0 \(EmbeddingBag\): "):
        px.convert(nn.Sequential(nn.EmbeddingBag(4, 3, **arguments)))


def test_another_number_of_bags_than_of_examples_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(6, 4)

        def forward(self, x):
            return self.bag(x.flatten(), torch.arange(3))

    with pytest.raises(ValueError, match="bag saw 3 rows, the batch has 2 examples"):
        px.convert(Model())(torch.ones(2, 4, dtype=torch.long))
