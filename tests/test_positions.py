"""Indices that carry no batch: position ids are expanded, and asked about where they are ambiguous."""

from __future__ import annotations

import re

import pytest
import torch
from models import randn, weighted_sum
from torch import nn
from torch.utils.checkpoint import checkpoint

import perexample as px
from perexample.testing import assert_moments, oracle


class Positions(nn.Module):
    """A sum of token and position embeddings, and a head. Positions are as `shape` says."""

    def __init__(self, shape, batched=None):
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 3)
        self.shape, self.batched = shape, batched

    def forward(self, tokens):
        ids = torch.arange(5)
        ids = {"[T]": ids, "[1, T]": ids[None], "[B, T]": ids.expand(len(tokens), 5), "[T, 1]": ids[:, None]}[
            self.shape
        ]
        h = self.position(ids)
        return self.head(self.token(tokens) + (h.squeeze(-2) if self.shape == "[T, 1]" else h))


def positions_case(batch, shape, batched=None):
    torch.manual_seed(0)
    model = px.convert(Positions(shape).double())
    model.position.batched = batched
    return model, torch.randint(0, 7, (batch, 5)), randn(batch, 5, 3, seed=1)


@pytest.mark.parametrize(
    ("batch", "shape", "batched"),
    [
        (4, "[T]", None),
        (4, "[1, T]", None),
        (4, "[B, T]", None),
        (1, "[T]", None),
        (1, "[1, T]", None),
        (5, "[1, T]", None),
        (5, "[B, T]", None),
        (5, "[T]", False),
        (4, "[T]", False),
        (4, "[1, T]", False),
        (1, "[1, T]", False),
        (4, "[B, T]", True),
        (0, "[T]", None),
    ],
)
def test_position_ids_are_expanded_to_the_batch(batch, shape, batched):
    model, tokens, y = positions_case(batch, shape, batched)
    output = model(tokens)
    assert output.shape == (batch, 5, 3)
    weighted_sum(output, y).backward()
    assert_moments(model, oracle(model, weighted_sum, tokens, y, reduction="sum"))


def test_as_many_positions_as_examples_are_ambiguous():
    model, tokens, y = positions_case(5, "[T]")
    message = (
        "position saw 5 indices in a batch of 5 examples: do they belong to the examples, or are they positions "
        "without a batch? Set its attribute: batched=True (dimension 0 is the batch) or batched=False"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(tokens)
    model.position.batched = False
    weighted_sum(model(tokens), y).backward()
    assert_moments(model, oracle(model, weighted_sum, tokens, y, reduction="sum"))


def test_batched_true_takes_one_index_per_example():
    model = px.nn.Embedding(7, 3, batched=True, dtype=torch.float64)
    px.convert(model)
    indices, y = torch.tensor([3, 1, 3, 0]), randn(4, 3)
    weighted_sum(model(indices), y).backward()
    assert_moments(model, oracle(model, weighted_sum, indices, y, reduction="sum"))


class Looking(nn.Module):
    """What `look(self, x)` does with an embedding of positions and x (B, ..., 4), which comes out of a layer."""

    def __init__(self, look):
        super().__init__()
        self.fc, self.norm, self.table, self.look = nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(7, 4), look
        self.around = None

    def forward(self, x):
        if self.around is None:
            return self.look(self, self.fc(x))
        return checkpoint(lambda h: self.look(self, h), self.fc(x), use_reentrant=self.around)


LOOKS = {  # with the shape of x without B; none of them knew how long the batch was
    "mean": (lambda n, x: x + n.table(torch.arange(5)).mean(0), (5, 4)),
    "one": (lambda n, x: x + n.table(torch.tensor([2]))[0], (5, 4)),
    "one to each row": (lambda n, x: x + n.table(torch.tensor([2])), (4,)),
    "a number": (lambda n, x: x + n.table(torch.tensor(2)), (5, 4)),
    "first of one": (lambda n, x: x + n.table(torch.arange(5)[None])[0], (5, 4)),
    "new first dimension": (lambda n, x: x + n.table(torch.arange(5)).unsqueeze(0), (5, 4)),
    "heads": (lambda n, x: x + n.table(torch.arange(5)), (3, 5, 4)),
    "heads and a batch of one": (lambda n, x: x + n.table(torch.arange(5)[None]), (3, 5, 4)),
    "prototypes": (lambda n, x: x @ n.table(torch.arange(5)).t(), (4,)),
    "some": (lambda n, x: x + n.table(torch.arange(5))[torch.tensor([0, 1, 0, 2, 2])], (5, 4)),
    "through layers": (lambda n, x: x * n.norm(n.fc(n.table(torch.arange(5)))), (5, 4)),
}


@pytest.mark.parametrize("which", LOOKS)
@pytest.mark.parametrize("around", [None, False, True])
def test_an_embedding_of_positions_is_the_same_to_whatever_comes_next(which, around):
    look, shape = LOOKS[which]
    if around is not None and which == "through layers":
        pytest.skip("layers do not take copies where a checkpoint repeats them")
    torch.manual_seed(0)
    model = px.convert(Looking(look).double())
    model.table.batched = False  # the lengths coincide
    for batch in (3, 2, 5, 1):
        x, model.around = randn(batch, *shape), None
        with px.no_moments():
            stock = model(x).detach()
        y = randn(*stock.shape, seed=1)
        expected = oracle(model, weighted_sum, x, y, reduction="sum")
        model.zero_grad()
        model.around = around
        output = model(x)
        torch.testing.assert_close(output, stock)
        weighted_sum(output, y).backward()
        assert_moments(model, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_layers_of_positions_alone_are_refused_in_reentrant_checkpoints(batch):
    model = px.convert(Looking(lambda n, x: x * n.norm(n.table(torch.arange(5)))))
    weighted_sum(model(torch.randn(batch, 5, 4)), torch.ones(batch, 5, 4)).backward()  # whereupon layers take copies
    model.around = True
    with pytest.raises(ValueError, match=rf"^norm saw 5 rows, the batch has {batch} examples"):
        model(torch.randn(batch, 5, 4))
