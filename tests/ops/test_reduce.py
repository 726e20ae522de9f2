"""bias_moments and reduce_moments against the loop over examples (MATHS 3, 8)."""

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

from perexample.ops import bias_moments, reduce_moments

BIAS_SHAPES = [
    (5, 1, 13),
    (5, 2, 1),
    (4, 3, 17),
    (3, 17, 33),
    (2, 64, 7),
    (2, 300, 40),
    (1, 5000, 9),
    (3, 7, 2100),
    (2000, 1, 19),
    (60, 1, 1064),
    (300, 30, 5),
    (0, 3, 4),
    (2, 0, 4),
    (2, 3, 0),
    (1, 1, 1),
]
REDUCE_SHAPES = [
    (5,),
    (5, 1),
    (4, 7),
    (3, 5, 6),
    (2, 3, 4, 5),
    (1, 65),
    (3000, 17),
    (7, 9000),
    (60, 1064),
    (33, 40, 50),
    (0, 4),
    (0,),
    (3, 0, 2),
]


def check_bias(which, dy, dtype=None):
    result = implementation("bias_moments", which)(dy, dtype)
    check_moments(result, lambda b, d: dy[b].to(d).sum(0), dy.shape[0], dy.shape[2:], dy.dtype, dtype, "bias")


def check_reduce(which, grad, dtype=None):
    result = implementation("reduce_moments", which)(grad, dtype)
    check_moments(result, lambda b, d: grad[b].to(d), grad.shape[0], grad.shape[1:], grad.dtype, dtype, "reduce")


CHECKS = {"bias_moments": check_bias, "reduce_moments": check_reduce}


@both
@every_dtype
@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias_equals_the_loop_over_examples(which, dtype, shape):
    dy = torch.randn(shape).to(dtype)
    check_bias(which, dy)
    # As a convolution hands it over: positions innermost.
    check_bias(which, relaid(dy, "transposed"))


@both
@every_dtype
@pytest.mark.parametrize("shape", REDUCE_SHAPES, ids=str)
def test_reduce_equals_the_loop_over_examples(which, dtype, shape):
    check_reduce(which, torch.randn(shape).to(dtype))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3, 17), (3, 300, 21), (5, 40, 1), (2000, 2, 3), (1, 4097, 2)], ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_any_memory_layout(name, which, dtype, layout, shape):
    CHECKS[name](which, relaid(torch.randn(shape).to(dtype), layout))


@both
@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 40, 1100), (600, 3, 33)], ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_expanded_gradient(name, which, shape):
    for dy in expanded(shape):
        CHECKS[name](which, dy)


@both
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_gradient_in_another_dtype_than_the_inputs(name, which, dtype, grad_dtype):
    CHECKS[name](which, torch.randn(6, 5, 37).to(dtype), grad_dtype)
    CHECKS[name](which, torch.randn(0, 5, 37).to(dtype), grad_dtype)


@pytest.mark.parametrize("size", [*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1023, 1024, 1025])
def test_widths_around_vectors_and_blocks(size):
    for dtype in (torch.float32, torch.float16):
        check_bias("public", torch.randn(3, 11, size).to(dtype))
        check_bias("public", torch.randn(3, size, 5).mT.contiguous().mT.to(dtype))
        check_reduce("public", torch.randn(9, size).to(dtype))


def test_integers_are_exact_in_any_order():
    dy = torch.randint(-4, 5, (500, 6, 70)).float()
    G = dy.sum(1).double()
    for order in (torch.arange(500), torch.randperm(500)):
        db, db_sq = bias_moments(dy[order])
        assert torch.equal(db.double(), G.sum(0))
        assert torch.equal(db_sq.double(), G.square().sum(0))
        total, total_sq = reduce_moments(dy[order])
        assert torch.equal(total.double(), dy.double().sum(0))
        assert torch.equal(total_sq.double(), dy.double().square().sum(0))


@pytest.mark.parametrize(
    ("function", "argument", "error", "message"),
    [
        (bias_moments, 1.0, TypeError, "bias_moments: dy must be a Tensor, got float"),
        (bias_moments, torch.ones(2, 3), ValueError, "bias_moments: dy must be of shape (B, T, O), got (2, 3)"),
        (
            bias_moments,
            torch.ones(2, 3, 4).long(),
            TypeError,
            "bias_moments: dy must be float64, float32, bfloat16 or float16, got torch.int64",
        ),
        (reduce_moments, None, TypeError, "reduce_moments: grad must be a Tensor, got NoneType"),
        (reduce_moments, torch.ones(()), ValueError, "reduce_moments: grad must be of shape (B, *shape), got ()"),
        (
            reduce_moments,
            torch.ones(2).bool(),
            TypeError,
            "reduce_moments: grad must be float64, float32, bfloat16 or float16, got torch.bool",
        ),
    ],
    ids=lambda value: None,
)
def test_errors_say_what_was_expected_and_what_came(function, argument, error, message):
    with pytest.raises(error) as raised:
        function(argument)
    assert str(raised.value) == message


@needs_extension
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bias_moments", (torch.ones(2, 3),)),
        ("bias_moments", (torch.ones(2, 3, 4).int(),)),
        ("bias_moments", (torch.ones(2, 3, 4), torch.int8)),
        ("reduce_moments", (torch.ones(()),)),
        ("reduce_moments", (torch.ones(2, 3).int(),)),
        ("reduce_moments", (torch.ones(2, 3), torch.bool)),
    ],
    ids=lambda value: None,
)
def test_direct_call_with_wrong_arguments_raises(name, arguments):
    with pytest.raises(RuntimeError, match=f"{name}: "):
        kernel(name)(*arguments)
