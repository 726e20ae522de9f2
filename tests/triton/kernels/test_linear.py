"""The Triton kernels of linear_moments against the loop over examples (MATHS 3, 4)."""

import math
from unittest import mock

import pytest
import torch
import triton.language as tl
from launching import DEVICE, Launches, every_arch, interpreted, launcher, multiplying, pretend
from opchecks import LAYOUTS, check_empty, check_moments, expanded, relaid
from perexample.triton_kernels import linear

from perexample.testing import LINEAR_CASES

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


def check(dy, x, bias=True, dtype=None):
    with Launches() as launches:
        dw, dw_sq, db, db_sq = launcher("linear_moments")(dy, x, bias, dtype)
    batch, outputs, inputs = dy.shape[0], dy.shape[2], x.shape[2]
    check_moments(
        (dw, dw_sq), lambda b, d: dy[b].to(d).T @ x[b].to(d), batch, (outputs, inputs), dy.dtype, dtype, "weight"
    )
    if bias:
        check_moments((db, db_sq), lambda b, d: dy[b].to(d).sum(0), batch, (outputs,), dy.dtype, dtype, "bias")
    else:
        check_empty(db, db_sq)
    return launches


def pair(batch, positions, outputs, inputs, dtype=torch.float32):
    return torch.randn(batch, positions, outputs).to(dtype), torch.randn(batch, positions, inputs).to(dtype)


# The interpreter takes milliseconds for every example of every tile: the largest batches are left to the GPU.
@pytest.mark.parametrize("case", [c for c in LINEAR_CASES if DEVICE == "cuda" or c.batch <= 9], ids=str)
def test_cases_equal_the_loop_over_examples(case):
    check(*pair(case.batch, math.prod(case.positions), case.outputs, case.inputs), case.bias)


# Rows of 16 elements and of others; T of one block and of several, with and without a tail; sizes around a tile.
SHAPES = {
    (40, 1, 16, 144): "_one_position",
    (37, 1, 65, 31): "_one_position",
    (3, 16, 80, 144): "_descriptor",
    (7, 5, 48, 80): "_descriptor",
    (2, 100, 80, 16): "_descriptor",
    (2, 200, 80, 144): "_descriptor",
    (3, 130, 16, 272): "_descriptor",
    (5, 37, 33, 50): "_pointer",
    (2, 70, 65, 131): "_pointer",
    (5, 2, 8, 7): "_pointer",
    (1, 3, 600, 70): "_pointer",  # more than one group of tiles (`tile_of`)
    (1, 3, 70, 600): "_pointer",
}


@every_arch
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_around_tiles_and_blocks(shape, dtype, arch):
    with pretend(arch):
        launches = check(*pair(*shape, dtype), bias=False)
    if arch is not None:
        expected = "_pointer" if arch == 80 and SHAPES[shape] == "_descriptor" else SHAPES[shape]
        assert launches.names[0] == expected


@interpreted
@every_arch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 20, 16, 32), (70, 1, 16, 32), (3, 300, 16, 16)], ids=str)
def test_parts_of_the_batch_add_up(shape, dtype, arch):
    with pretend(arch, processors=2):
        launches = check(*pair(*shape, dtype), bias=True, dtype=torch.float32)
    assert "_add_parts" in launches.names
    assert next(grid for name, grid, _ in launches if name not in ("_add_parts", "_bias"))[1] > 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 1, 17, 20), (4, 6, 33, 16), (2, 150, 16, 7)], ids=str)
def test_any_memory_layout(layout, shape):
    dy, x = pair(*shape, torch.float16)
    check(dy, relaid(x, layout))
    check(relaid(dy, layout), x, False)


@pytest.mark.parametrize("positions", [1, 4])
def test_expanded_gradient(positions):
    x = torch.randn(3, positions, 16).bfloat16()
    for dy in expanded((3, positions, 32), torch.bfloat16):
        check(dy, x, False)
    check(x, torch.randn(1, positions, 32).bfloat16().expand(3, positions, 32))


@pytest.mark.parametrize("shape", [(3, 40, 17, 20), (40, 1, 17, 20)], ids=str)
def test_long_distances_inside_a_tile_are_counted_in_64_bits(shape):
    assert linear.offset_dtype(5, 2**31 - 1) == tl.int32
    assert linear.offset_dtype(5, 2**31) == tl.int64
    with mock.patch.object(linear, "offset_dtype", lambda *reaches: tl.int64):
        launches = check(*pair(*shape), bias=False)
    assert launches[0][2]["OFFSET"] == tl.int64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradient_in_another_dtype_than_the_inputs(dtype, grad_dtype):
    check(*pair(3, 5, 33, 16, dtype), True, grad_dtype)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)], ids=str)
def test_empty_dimensions_give_zeros(shape):
    check(*pair(*shape), True, torch.bfloat16)


def test_bfloat16_contribution_is_not_rounded_before_it_is_squared():
    dy = torch.tensor([[[1.0], [2.0**-9]]], dtype=torch.bfloat16)
    dw, dw_sq, _, db_sq = launcher("linear_moments")(dy, torch.ones_like(dy), True)
    assert dw_sq.item() == db_sq.item() == (1 + 2.0**-9) ** 2
    assert dw.item() == 1


def test_squares_of_one_bfloat16_position_keep_all_their_bits():
    # (1 + 2**-7)**2 has 15 bits: rounded to bfloat16 it would be 1 + 2**-6.
    dy = torch.full((3, 1, 2), 1 + 2.0**-7, dtype=torch.bfloat16)
    for x in (torch.ones(3, 1, 5).bfloat16(), dy):
        expected = 3 * dy[0, 0, 0].double() ** 2 * x[0, 0, 0].double() ** 2
        assert (launcher("linear_moments")(dy, x, False)[1].double() == expected.float()).all()
        assert (launcher("linear_moments")(x, dy, False)[1].double() == expected.float()).all()


@interpreted  # which multiplies in float32 whatever it is told
@pytest.mark.parametrize("allowed", ["ieee", "tf32"])
@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_as_precise_as_asked_for(dtype, positions, allowed):
    with multiplying(allowed, "ieee" if allowed == "tf32" else "tf32"):
        launches = check(*pair(3, positions, 16, 16, dtype), False)
    squared_half = dtype == torch.float16 and positions == 1  # 22 bits
    expected = "tf32x3" if squared_half else allowed if dtype == torch.float32 else "ieee"
    assert launches[0][2]["PRECISION"] == expected


def test_the_same_bits_on_every_run():
    dy, x = pair(9, 150, 48, 80, torch.bfloat16)
    with pretend(90, processors=3):
        first, second = (launcher("linear_moments")(dy, x, True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@interpreted
def test_descriptors_describe_only_what_tma_can_load():
    def kernel(dy, x):
        with pretend(90):
            return linear.choose(dy, x)[0].removesuffix(", unaligned")

    x = torch.zeros(4, 6, 32, dtype=torch.bfloat16)
    assert kernel(x, x) == "descriptor"
    assert kernel(x.float(), x.float()) == "pointer"
    assert kernel(x, x[:, :, :8]) == "descriptor"  # 16-byte rows of a wider matrix
    assert kernel(x, x[:, :, 1:9]) == "pointer"  # does not begin on 16 bytes
    assert kernel(x[:, :, ::2], x) == kernel(x.mT.contiguous().mT, x) == "pointer"
    assert kernel(x[:1].expand(4, 6, 32), x) == kernel(x[:, :1].expand(4, 6, 32), x) == "pointer"
    assert kernel(x[:1], x[:1]) == "descriptor"
    assert kernel(x[:1].transpose(0, 1)[:, :1].transpose(0, 1), x[:1]) == "descriptor"  # any stride of a batch of one
    assert kernel(torch.zeros(4, 6, 12).bfloat16(), x) == "pointer"  # rows of 24 bytes
    assert kernel(x[:, :1], x[:, :1]) == "one position"
    assert kernel(torch.zeros(1000).bfloat16().as_strided((4, 6, 32), (200, 32, 1)), x) == "pointer"
    assert kernel(x, torch.zeros(4, 7, 40).bfloat16()[:, 1:, 8:]) == "descriptor"
    huge = torch.empty(2**31, 2, 32, dtype=torch.bfloat16, device="meta")
    assert kernel(huge[1:], huge[1:]) == "descriptor" and kernel(huge, huge) == "pointer"


def test_wrong_arguments_raise():
    ones = torch.ones
    for dy, x, message in (
        (ones(2, 4), ones(2, 4), r"dy must be of shape \(B, T, O\), got \(2, 4\)"),
        (ones(2, 3, 4), ones(2, 4, 5), r"x must be \(B=2, T=3, I\), got \(2, 4, 5\)"),
        (ones(2, 3, 4), ones(2, 3, 5).half(), "x must be torch.float32, got torch.float16"),
        (ones(2, 3, 4).int(), ones(2, 3, 5).int(), "inputs must be floating, got torch.int32"),
        (ones(2, 3, 4).double(), ones(2, 3, 5).double(), "float64 is not supported"),
    ):
        with pytest.raises(RuntimeError, match=f"linear_moments: {message}"):
            launcher("linear_moments")(dy.to(DEVICE), x.to(DEVICE), True)
