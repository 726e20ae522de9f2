"""linear_moments against the loop over examples (MATHS 3, 4)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opchecks import (
    DTYPE_PAIRS,
    LAYOUTS,
    both,
    check_empty,
    check_moments,
    every_dtype,
    expanded,
    implementation,
    kernel,
    needs_extension,
    relaid,
)

from perexample.ops import linear_moments
from perexample.testing import LINEAR_CASES

# Around every multiple of a vector and of a register tile, on any of the capabilities.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 130)


def check(which, dy, x, bias=True, dtype=None):
    dw, dw_sq, db, db_sq = implementation("linear_moments", which)(dy, x, bias, dtype)
    batch, outputs, inputs = dy.shape[0], dy.shape[2], x.shape[2]
    check_moments(
        (dw, dw_sq), lambda b, d: dy[b].to(d).T @ x[b].to(d), batch, (outputs, inputs), dy.dtype, dtype, "weight"
    )
    if bias:
        check_moments((db, db_sq), lambda b, d: dy[b].to(d).sum(0), batch, (outputs,), dy.dtype, dtype, "bias")
    else:
        check_empty(db, db_sq)


def pair(batch, positions, outputs, inputs, dtype=torch.float32):
    return torch.randn(batch, positions, outputs).to(dtype), torch.randn(batch, positions, inputs).to(dtype)


@both
@every_dtype
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_cases_equal_the_loop_over_examples(which, dtype, case):
    check(which, *pair(case.batch, math.prod(case.positions), case.outputs, case.inputs, dtype), case.bias)


@pytest.mark.parametrize("positions", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_vectors_and_tiles(size, positions):
    check("public", *pair(3, positions, size, 19))
    check("public", *pair(3, positions, 19, size))
    check("public", *pair(2, positions, size, size, torch.float64), False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1100, 1, 70, 33),
        (2500, 1, 9, 11),
        (700, 2, 33, 40),
        (600, 3, 12, 50),
        (130, 17, 20, 20),
        (40, 64, 31, 65),
        (9, 300, 40, 24),
        (2, 1030, 13, 19),
        (3, 2500, 5, 70),
        (5, 3, 1100, 30),
        (5, 3, 30, 1100),
        (300, 2, 1030, 130),
        (2, 1025, 130, 1030),
        (3, 2, 900, 700),
        (2, 600, 900, 700),
        (6, 5, 90, 7),
    ],
    ids=str,
)
def test_shapes_that_take_several_groups_blocks_and_splits(shape, dtype):
    check("public", *pair(*shape, dtype))


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 1, 17, 20), (4, 7, 33, 9), (2, 1029, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_memory_layout(which, layout, shape, dtype):
    dy, x = pair(*shape, dtype)
    check(which, dy, relaid(x, layout))
    check(which, relaid(dy, layout), x)
    check(which, relaid(dy, layout), relaid(x, layout))


@both
@pytest.mark.parametrize("positions", [1, 4, 1030])
def test_expanded_gradient(which, positions):
    x = torch.randn(3, positions, 11)
    for dy in expanded((3, positions, 21)):
        check(which, dy, x)
        check(which, torch.randn(3, positions, 8), dy)


@both
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPE_PAIRS, ids=str)
def test_gradient_in_another_dtype_than_the_inputs(which, dtype, grad_dtype):
    check(which, *pair(6, 5, 37, 21, dtype), True, grad_dtype)


@both
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("grad_dtype", [None, torch.bfloat16], ids=str)
def test_empty_dimensions_give_zeros(which, shape, grad_dtype):
    check(which, *pair(*shape), True, grad_dtype)


@both
def test_no_inputs_leave_the_bias(which):
    check(which, *pair(2, 3, 4, 0))


def test_bfloat16_contribution_is_not_rounded_before_it_is_squared():
    # G = 1 + 2**-9 is no bfloat16 number: its square is, to float32, 1 + 2**-8 + 2**-18.
    dy = torch.tensor([[[1.0], [2.0**-9]]], dtype=torch.bfloat16)
    dw, dw_sq, _, db_sq = linear_moments(dy, torch.ones_like(dy), bias=True)
    assert dw_sq.item() == db_sq.item() == (1 + 2.0**-9) ** 2
    assert dw.item() == 1


# Small integers: every sum is exact in float32, so these hold to the last bit in every dtype and order.


@st.composite
def integers(draw, max_batch=70):
    batch = draw(st.integers(0, max_batch))
    positions, outputs, inputs = (draw(st.integers(1, most)) for most in (9, 40, 40))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dy, x = (
        torch.randint(-4, 5, (batch, positions, size), generator=generator).to(dtype) for size in (outputs, inputs)
    )
    return dy, x, generator


def moments(dy, x):
    """In a dtype that holds the integers exactly."""
    return linear_moments(dy, x, True, torch.float64)


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.double(), e.double())


properties = settings(deadline=None, derandomize=True, max_examples=60)


@properties
@given(integers())
def test_integers_are_exact(case):
    dy, x, _ = case
    G, column = torch.einsum("bto,bti->boi", dy.double(), x.double()), dy.double().sum(1)
    assert_same(moments(dy, x), (G.sum(0), G.square().sum(0), column.sum(0), column.square().sum(0)))


@properties
@given(integers())
def test_order_of_examples_does_not_matter(case):
    dy, x, generator = case
    order = torch.randperm(dy.shape[0], generator=generator)
    assert_same(moments(dy[order], x[order]), moments(dy, x))


@properties
@given(integers(), st.integers(0, 70))
def test_moments_of_a_union_are_the_sum_of_moments(case, cut):
    dy, x, _ = case
    parts = [moments(dy[part], x[part]) for part in (slice(None, cut), slice(cut, None))]
    assert_same(moments(dy, x), [a.double() + b.double() for a, b in zip(*parts, strict=True)])


@properties
@given(integers())
def test_one_position_is_the_product_of_squares(case):
    dy, x, _ = case
    dy, x = dy[:, :1], x[:, :1]
    expected = dy[:, 0].double().square().T @ x[:, 0].double().square()
    assert torch.equal(moments(dy, x)[1].double(), expected)


@properties
@given(integers(), st.integers(-20, 20))
def test_powers_of_two_scale_exactly(case, exponent):
    dy, x, generator = case
    dy = torch.randn(dy.shape, generator=generator)
    x = torch.randn(x.shape, generator=generator)
    scale = 2.0**exponent
    dw, dw_sq, db, db_sq = linear_moments(dy, x, True)
    scaled = linear_moments(scale * dy, x, True)
    assert_same(scaled, (scale * dw, scale**2 * dw_sq, scale * db, scale**2 * db_sq))


ONES = torch.ones


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, ONES(2, 3, 4)), TypeError, "linear_moments: dy must be a Tensor, got int"),
        ((ONES(2, 3, 4), None), TypeError, "linear_moments: x must be a Tensor, got NoneType"),
        ((ONES(2, 4), ONES(2, 4)), ValueError, "linear_moments: dy must be of shape (B, T, O), got (2, 4)"),
        ((ONES(2, 3, 4), ONES(2, 4)), ValueError, "linear_moments: x must be (B=2, T=3, I), got (2, 4)"),
        ((ONES(2, 3, 4), ONES(7, 3, 5)), ValueError, "linear_moments: x must be (B=2, T=3, I), got (7, 3, 5)"),
        ((ONES(2, 3, 4), ONES(2, 1, 5)), ValueError, "linear_moments: x must be (B=2, T=3, I), got (2, 1, 5)"),
        (
            (ONES(2, 3, 4), ONES(2, 3, 5).double()),
            TypeError,
            "linear_moments: x must be torch.float32 like dy, got torch.float64",
        ),
        (
            (ONES(2, 3, 4).int(), ONES(2, 3, 5)),
            TypeError,
            "linear_moments: dy must be float64, float32, bfloat16 or float16, got torch.int32",
        ),
        (
            (ONES(2, 3, 4), ONES(2, 3, 5, device="meta")),
            ValueError,
            "linear_moments: x must be on cpu like dy, got meta",
        ),
    ],
    ids=lambda value: None,
)
def test_errors_say_what_was_expected_and_what_came(arguments, error, message):
    with pytest.raises(error) as raised:
        linear_moments(*arguments)
    assert str(raised.value) == message


@needs_extension
@pytest.mark.parametrize(
    "arguments",
    [
        (ONES(2, 4), ONES(2, 4), True),
        (ONES(2, 3, 4), ONES(2, 4), True),
        (ONES(2, 3, 4), ONES(7, 3, 5), True),
        (ONES(2, 3, 4), ONES(2, 1, 5), True),
        (ONES(2, 3, 4), ONES(2, 3, 5).double(), True),
        (ONES(2, 3, 4).int(), ONES(2, 3, 5).int(), True),
        (ONES(2, 3, 4), ONES(2, 3, 5), True, torch.int32),
        (ONES(2, 3, 4, dtype=torch.complex64), ONES(2, 3, 5, dtype=torch.complex64), True),
    ],
    ids=lambda value: None,
)
def test_direct_call_with_wrong_arguments_raises(arguments):
    with pytest.raises(RuntimeError, match="linear_moments: "):
        kernel("linear_moments")(*arguments)
