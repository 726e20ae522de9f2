"""embedding_moments against the loop over examples (MATHS 6)."""

import math

import pytest
import torch
from opchecks import (
    DTYPE_PAIRS,
    LAYOUTS,
    both,
    check_moments,
    every_dtype,
    expanded,
    implementation,
    kernel,
    needs_extension,
    relaid,
)

from perexample.ops import embedding_moments
from perexample.testing import EMBEDDING_CASES


def check(which, dy, indices, rows, padding_idx=-1, dtype=None):
    result = implementation("embedding_moments", which)(dy, indices, rows, padding_idx, dtype)

    def contribution(b, d):
        one_hot = torch.nn.functional.one_hot(indices[b].long(), rows).to(d)
        if padding_idx >= 0:
            one_hot[:, padding_idx] = 0
        return one_hot.T @ dy[b].to(d)

    check_moments(result, contribution, dy.shape[0], (rows, dy.shape[2]), dy.dtype, dtype, "embedding")


def problem(batch, positions, rows, width, dtype=torch.float32):
    return torch.randn(batch, positions, width).to(dtype), torch.randint(rows, (batch, positions))


@both
@every_dtype
@pytest.mark.parametrize("case", EMBEDDING_CASES, ids=str)
def test_cases_equal_the_loop_over_examples(which, dtype, case):
    dy, indices = problem(case.batch, math.prod(case.positions), case.rows, case.width, dtype)
    padding_idx = -1 if case.padding_idx is None else case.padding_idx % case.rows
    check(which, dy, indices, case.rows, padding_idx)
    check(which, dy, indices.int(), case.rows, padding_idx)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (8, 300, 70, 40),
        (300, 3, 5000, 9),  # more than one digit of the sort, most rows untouched
        (500, 1, 3, 700),
        (2, 2000, 2, 300),  # one row dominates
        (4, 64, 1, 1100),
        (2, 5, 3, 0),
        (2, 0, 3, 4),
    ],
    ids=str,
)
def test_shapes_that_take_several_tasks(shape, dtype):
    check("public", *problem(*shape, dtype), shape[2])


@pytest.mark.parametrize("width", [*range(1, 20), 31, 32, 33, 63, 65, 127, 129, 255, 257])
def test_widths_around_vectors(width):
    for dtype in (torch.float32, torch.float16):
        check("public", *problem(3, 40, 7, width, dtype), 7, padding_idx=3)


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_memory_layout(which, layout, dtype):
    dy, indices = problem(4, 30, 6, 19, dtype)
    check(which, relaid(dy, layout), relaid(indices, layout), 6)
    check(which, dy, relaid(indices.int(), layout), 6)


@both
def test_expanded_gradient_and_indices(which):
    _, indices = problem(4, 30, 6, 1)
    for dy in expanded((4, 30, 21)):
        check(which, dy, indices, 6)
        check(which, dy, indices[:1].expand(4, 30), 6)
        check(which, dy, indices[:, :1].expand(4, 30), 6)


@both
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPE_PAIRS, ids=str)
def test_gradient_in_another_dtype_than_the_inputs(which, dtype, grad_dtype):
    check(which, *problem(4, 9, 5, 21, dtype), 5, 1, grad_dtype)


@both
def test_repeats_within_an_example_add_before_they_are_squared_and_between_examples_after(which):
    op = implementation("embedding_moments", which)
    dy = torch.tensor([1.0, 2.0]).repeat(2, 1).unsqueeze(2)
    within = op(dy, torch.tensor([[0, 0], [1, 1]]), 3)
    assert [m.flatten().tolist() for m in within] == [[3, 3, 0], [9, 9, 0]]
    between = op(dy, torch.tensor([[0, 1], [0, 1]]), 3)
    assert [m.flatten().tolist() for m in between] == [[2, 4, 0], [2, 8, 0]]
    padded = op(dy, torch.tensor([[0, 1], [0, 1]]), 3, 1)
    assert [m.flatten().tolist() for m in padded] == [[2, 0, 0], [2, 0, 0]]


def test_order_of_examples_does_not_matter():
    dy, indices = torch.randint(-4, 5, (50, 20, 9)).float(), torch.randint(11, (50, 20))
    order = torch.randperm(50)
    for a, e in zip(embedding_moments(dy[order], indices[order], 11), embedding_moments(dy, indices, 11), strict=True):
        assert torch.equal(a, e)


DY, INDICES = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
WRONG = [
    ((DY[0], INDICES, 5), ValueError, "dy must be of shape (B, T, D), got (3, 4)"),
    ((DY.int(), INDICES, 5), TypeError, "dy must be float64, float32, bfloat16 or float16, got torch.int32"),
    ((DY, INDICES[:, :2], 5), ValueError, "indices must be (B=2, T=3), got (2, 2)"),
    ((DY, INDICES.float(), 5), TypeError, "indices must be int32 or int64, got torch.float32"),
    ((DY, INDICES + 5, 5), IndexError, "indices must be in [0, 5), got 5"),
    ((DY, INDICES - 1, 5), IndexError, "indices must be in [0, 5), got -1"),
    ((DY, INDICES, 0), IndexError, "indices must be in [0, 0), got 0"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=lambda value: None)
def test_errors_say_what_was_expected_and_what_came(arguments, error, message):
    with pytest.raises(error) as raised:
        embedding_moments(*arguments)
    assert str(raised.value) == f"embedding_moments: {message}"


@needs_extension
@pytest.mark.parametrize(
    "arguments", [row[0] for row in WRONG] + [(DY, INDICES, -1), (DY, INDICES + 2**40, 5)], ids=lambda value: None
)
def test_direct_call_with_wrong_arguments_raises(arguments):
    with pytest.raises(RuntimeError, match="embedding_moments: "):
        kernel("embedding_moments")(*arguments)
