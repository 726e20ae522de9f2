"""layer_norm_moments and group_norm_moments against the loop over examples (MATHS 7)."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from opchecks import (
    LAYOUTS,
    both,
    check_empty,
    check_moments,
    check_tensor,
    every_dtype,
    expanded,
    implementation,
    kernel,
    needs_extension,
    relaid,
    wide,
)

from perexample.ops import batch_norm_moments, group_norm_moments, layer_norm_moments, rms_norm_moments
from perexample.testing import NORM_CASES

# (B, T, D) of a LayerNorm, or (B, C, S), groups of a GroupNorm.
LAYER = [
    ((math.prod(c.shape[:1]), math.prod(c.shape[1 : -len(c.normalized)]), math.prod(c.normalized)), 0)
    for c in NORM_CASES
    if not c.groups
]
GROUP = [((*c.shape[:2], math.prod(c.shape[2:])), c.groups) for c in NORM_CASES if c.groups]
LARGE = [
    ((2, 300, 70), 0),
    ((1, 2000, 33), 0),
    ((700, 1, 20), 0),
    ((40, 17, 768), 0),
    ((3, 4, 3000), 0),
    ((64, 24, 49), 4),
    ((2, 96, 1000), 32),
    ((900, 6, 1), 2),
    ((2, 16, 4000), 16),
    ((3, 1100, 2), 1),
    ((2, 12, 130), 3),
    ((5, 44, 21), 2),
]
SHAPES = LAYER + GROUP
shapes = pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)


def name_of(groups):
    return "group_norm_moments" if groups else "layer_norm_moments"


def forward(x, groups, weight, bias, eps):
    if groups:
        return F.group_norm(x, groups, weight, bias, eps)
    return F.layer_norm(x, x.shape[2:], weight, bias, eps)


def statistics(x, groups, eps):
    """mean and rstd as the forward pass saves them: (B, groups) or (B, T), in the accumulation dtype."""
    rows = x.to(wide(x.dtype))
    rows = rows.unflatten(1, (groups, -1)).flatten(2) if groups else rows
    mean = rows.mean(2)
    return mean, ((rows - mean.unsqueeze(2)).square().mean(2) + eps).rsqrt()


# Where only one or two values are normalized together, dx is the difference of nearly equal numbers unless eps is
# large, and no error relative to dx could be promised: the tests that have such cases say eps=1.
def problem(shape, dtype=torch.float32):
    dy, x = torch.randn(shape), torch.randn(shape) * 2 + 0.5
    return dy.to(dtype), x.to(dtype)


def check(which, dy, x, groups, weight=None, saved=True, eps=1e-5, mask=(True, True, True)):
    mean, rstd = statistics(x, groups, eps) if saved else (None, None)
    arguments = (dy, x, mean, rstd, weight, *([groups] if groups else []), eps, mask)
    dx, dw, dw_sq, db, db_sq = implementation(name_of(groups), which)(*arguments)
    size = x.shape[1] if groups else x.shape[2]
    grad_dtype = x.dtype if weight is None else weight.dtype

    def backward(b, d):
        x_b = x[b : b + 1].to(d).requires_grad_()
        w = (torch.ones(size) if weight is None else weight).to(d).detach().requires_grad_()
        bias = torch.zeros(size, dtype=d, requires_grad=True)
        return torch.autograd.grad(forward(x_b, groups, w, bias, eps), (x_b, w, bias), dy[b : b + 1].to(d))

    expected, stock = ([backward(b, d) for b in range(x.shape[0])] for d in (torch.float64, wide(x.dtype)))
    if mask[0]:
        wanted = [
            torch.cat([row[0] for row in rows] or [torch.empty(x.shape, dtype=d)])
            for rows, d in ((expected, torch.float64), (stock, wide(x.dtype)))
        ]
        check_tensor(dx, *wanted, x.dtype, "dx")
    else:
        check_empty(dx)
    for index, (grad, square) in ((1, (dw, dw_sq)), (2, (db, db_sq))):
        if not mask[index]:
            check_empty(grad, square)
            continue
        check_moments(
            (grad, square),
            lambda b, d, index=index: (expected if d == torch.float64 else stock)[b][index],
            x.shape[0],
            (size,),
            x.dtype,
            grad_dtype,
            ("", "weight", "bias")[index],
        )


def weight_for(shape, groups, dtype):
    return (torch.rand(shape[1] if groups else shape[2]) + 0.5).to(dtype)


@both
@every_dtype
@shapes
def test_cases_equal_the_loop_over_examples(which, dtype, shape, groups):
    dy, x = problem(shape, dtype)
    check(which, dy, x, groups, weight_for(shape, groups, dtype), eps=1.0)
    check(which, dy, x, groups, eps=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "groups"), LARGE, ids=str)
def test_shapes_that_take_several_tasks(dtype, shape, groups):
    dy, x = problem(shape, dtype)
    check("public", dy, x, groups, weight_for(shape, groups, dtype))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 127, 129, 513, 1025])
def test_sizes_around_vectors(size):
    for shape, groups in (((3, 5, size), 0), ((3, 4, size), 2), ((2, 2 * size, 3), 2), ((2, 2 * size, 1), 1)):
        dy, x = problem(shape)
        mask = (groups > 0 or size > 1, True, True)  # of one value alone, dx is rounding error
        check("public", dy, x, groups, weight_for(shape, groups, torch.float32), eps=1.0, mask=mask)


@both
@pytest.mark.parametrize("mask", list(product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((3, 5, 33), 0), ((3, 6, 10), 2)], ids=str)
@pytest.mark.parametrize("saved", [True, False])
def test_output_mask_and_recomputed_statistics(which, mask, shape, groups, saved):
    dy, x = problem(shape)
    check(which, dy, x, groups, weight_for(shape, groups, torch.float32), saved, 1e-3, mask)


@both
@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((3, 5, 33), 0), ((3, 6, 10), 2)], ids=str)
def test_weight_in_another_dtype_than_the_input(which, weight_dtype, dtype, shape, groups):
    dy, x = problem(shape, dtype)
    check(which, dy, x, groups, weight_for(shape, groups, weight_dtype))


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [((3, 5, 33), 0), ((3, 6, 10), 2)], ids=str)
def test_any_memory_layout(which, layout, shape, groups):
    dy, x = problem(shape)
    weight = relaid(weight_for(shape, groups, torch.float32), "stepped")
    check(which, relaid(dy, layout), relaid(x, layout), groups, weight)
    mean, rstd = statistics(x, groups, 1e-5)
    arguments = [dy, x, mean, rstd, weight] + ([groups] if groups else [])
    op = implementation(name_of(groups), which)
    expected = op(*arguments, 1e-5, (True, True, True))
    arguments[2:4] = relaid(mean, layout), relaid(rstd, layout)
    for a, e in zip(op(*arguments, 1e-5, (True, True, True)), expected, strict=True):
        assert torch.equal(a, e)


@both
@pytest.mark.parametrize(("shape", "groups"), [((3, 5, 17), 0), ((3, 6, 7), 3)], ids=str)
def test_expanded_gradient(which, shape, groups):
    for dy in expanded(shape):
        check(which, dy, problem(shape)[1], groups, weight_for(shape, groups, torch.float32))


@both
@pytest.mark.parametrize(("shape", "groups"), [((2, 3, 16), 0), ((2, 4, 8), 2)], ids=str)
def test_constant_input_has_no_weight_moment(which, shape, groups):
    dy, x = torch.randn(shape), torch.full(shape, 3.0)
    arguments = (dy, x, None, None, None, *([groups] if groups else []), 1e-5, (True, True, True))
    _, dw, dw_sq, _, db_sq = implementation(name_of(groups), which)(*arguments)
    assert not dw.any()
    assert not dw_sq.any()
    assert (db_sq > 0).all()


@both
@pytest.mark.parametrize(("shape", "groups"), [((0, 3, 8), 0), ((2, 0, 8), 0), ((2, 3, 0), 0), ((2, 4, 0), 2)], ids=str)
def test_empty_dimensions_give_zeros(which, shape, groups):
    dy, x = problem(shape)
    mean, rstd = (torch.zeros(shape[0], groups or shape[1]) for _ in range(2))
    arguments = (dy, x, mean, rstd, None, *([groups] if groups else []), 1e-5, (True, True, True))
    dx, *moments = implementation(name_of(groups), which)(*arguments)
    assert dx.shape == shape
    for moment in moments:
        assert torch.equal(moment, torch.zeros(shape[1] if groups else shape[2]))


RMS = [shape for shape, groups in [*LAYER, *LARGE] if not groups]
BATCH = [shape for shape, groups in [*GROUP, *LARGE] if groups]


def check_rms(which, dy, x, weight, saved, mask=(True, True), eps=1e-3):
    size = x.shape[2]
    rstd = (x.to(wide(x.dtype)).square().mean(2) + eps).rsqrt() if saved else None
    dx, dw, dw_sq = implementation("rms_norm_moments", which)(dy, x, rstd, weight, eps, mask)

    def backward(b, d):
        x_b = x[b : b + 1].to(d).requires_grad_()
        w = (torch.ones(size) if weight is None else weight).to(d).detach().requires_grad_()
        y = F.rms_norm(x_b, (size,), w, eps)
        return torch.autograd.grad(y, (x_b, w), dy[b : b + 1].to(d))

    compare(x, weight, mask, backward, (dx, (dw, dw_sq)), size)


def check_batch(which, dy, x, weight, mask=(True, True, True)):
    size = x.shape[1]
    mean, rstd = torch.randn(size), torch.rand(size) + 0.5
    constants = [s.to(wide(x.dtype)) for s in (mean, rstd)]
    dx, dw, dw_sq, db, db_sq = implementation("batch_norm_moments", which)(dy, x, *constants, weight, mask)

    def backward(b, d):
        x_b = x[b : b + 1].to(d).requires_grad_()
        w = (torch.ones(size) if weight is None else weight).to(d).detach().requires_grad_()
        bias = torch.zeros(size, dtype=d, requires_grad=True)
        y = (x_b - mean.to(d)[:, None]) * rstd.to(d)[:, None] * w[:, None] + bias[:, None]
        return torch.autograd.grad(y, (x_b, w, bias), dy[b : b + 1].to(d))

    compare(x, weight, mask, backward, (dx, (dw, dw_sq), (db, db_sq)), size)


def compare(x, weight, mask, backward, results, size):
    """Hold dx and the pairs of moments to those of `backward`, example by example."""
    rows = {d: [backward(b, d) for b in range(x.shape[0])] for d in {torch.float64, wide(x.dtype)}}
    grad_dtype = x.dtype if weight is None else weight.dtype
    for index, result in enumerate(results):
        if not mask[index]:
            check_empty(*([result] if index == 0 else result))
        elif index == 0:
            exact, stock = (
                torch.cat([row[0] for row in rows[d]] or [torch.empty(x.shape, dtype=d)])
                for d in (torch.float64, wide(x.dtype))
            )
            check_tensor(result, exact, stock, x.dtype, "dx")
        else:
            contribution = lambda b, d, index=index: rows[d][b][index]  # noqa: E731
            check_moments(result, contribution, x.shape[0], (size,), x.dtype, grad_dtype)


@both
@every_dtype
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("shape", RMS, ids=str)
def test_rms_norm_cases_equal_the_loop_over_examples(which, dtype, saved, shape):
    dy, x = problem(shape, dtype)
    check_rms(which, dy, x, weight_for(shape, 0, dtype), saved)
    check_rms(which, dy, x, None, saved)


@both
@every_dtype
@pytest.mark.parametrize("shape", BATCH, ids=str)
def test_batch_norm_cases_equal_the_loop_over_examples(which, dtype, shape):
    dy, x = problem(shape, dtype)
    check_batch(which, dy, x, weight_for(shape, 1, dtype))
    check_batch(which, dy, x, None)


@both
@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
def test_rms_and_batch_norm_in_any_memory_layout_and_with_any_mask(which, layout):
    dy, x = problem((3, 6, 33))
    dy, x = (t if layout == "contiguous" else relaid(t, layout) for t in (dy, x))
    for mask in product([True, False], repeat=3):
        check_rms(which, dy, x, weight_for((3, 6, 33), 0, torch.float16), False, mask[:2])
        check_batch(which, dy, x, weight_for((3, 6, 33), 1, torch.float64), mask)


@both
def test_rms_and_batch_norm_of_an_expanded_gradient(which):
    for dy in expanded((3, 5, 17)):
        x = problem((3, 5, 17))[1]
        check_rms(which, dy, x, None, False)
        check_batch(which, dy, x, None)


X, S = torch.ones(2, 3, 4), torch.ones(2, 3)
LAYER_ERRORS = [
    ((1, X, S, S, None), TypeError, "dy must be a Tensor, got int"),
    ((X[0], X, S, S, None), ValueError, "dy must be of shape (B, T, D), got (3, 4)"),
    ((X, X[:1], S, S, None), ValueError, "x must be (2, 3, 4) like dy, got (1, 3, 4)"),
    ((X, X.double(), S, S, None), TypeError, "x must be torch.float32 like dy, got torch.float64"),
    ((X, X, S, None, None), ValueError, "mean and rstd must be given both or neither"),
    ((X, X, S.T, S, None), ValueError, "mean must be (B, T) = (2, 3), got (3, 2)"),
    ((X, X, S, S.double(), None), TypeError, "rstd must be torch.float32, got torch.float64"),
    ((X, X, S, S, torch.ones(3)), ValueError, "weight must be (D=4,), got (3,)"),
]
G = torch.ones(2, 4, 5)
GROUP_ERRORS = [
    ((G[0], G, S[:, :2], S[:, :2], None, 2), ValueError, "dy must be of shape (B, C, S), got (4, 5)"),
    ((G, G, None, None, None, 3), ValueError, "groups must divide C=4, got 3"),
    ((G, G, None, None, None, 0), ValueError, "groups must divide C=4, got 0"),
    ((G, G, S, S, None, 2), ValueError, "mean must be (B, groups) = (2, 2), got (2, 3)"),
    ((G, G, None, None, torch.ones(5), 2), ValueError, "weight must be (C=4,), got (5,)"),
]

RMS_ERRORS = [
    ((X[0], X, None, None, 1e-5), ValueError, "dy must be of shape (B, T, D), got (3, 4)"),
    ((X, X[:1], None, None, 1e-5), ValueError, "x must be (2, 3, 4) like dy, got (1, 3, 4)"),
    ((X, X, S.T, None, 1e-5), ValueError, "rstd must be (B, T) = (2, 3), got (3, 2)"),
    ((X, X, S.double(), None, 1e-5), TypeError, "rstd must be torch.float32, got torch.float64"),
    ((X, X, None, torch.ones(3), 1e-5), ValueError, "weight must be (D=4,), got (3,)"),
]
BATCH_ERRORS = [
    ((G, G[:, :2], S[0], S[0], None), ValueError, "x must be (2, 4, 5) like dy, got (2, 2, 5)"),
    ((G, G, S[0], S[0], None), ValueError, "mean must be (C,) = (4,), got (3,)"),
    ((G, G, G[0, :, 0], G[0, :, 0].double(), None), TypeError, "rstd must be torch.float32, got torch.float64"),
    ((G, G, G[0, :, 0], G[0, :, 0], torch.ones(5)), ValueError, "weight must be (C=4,), got (5,)"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [(layer_norm_moments, *row) for row in LAYER_ERRORS]
    + [(group_norm_moments, *row) for row in GROUP_ERRORS]
    + [(rms_norm_moments, *row) for row in RMS_ERRORS]
    + [(batch_norm_moments, *row) for row in BATCH_ERRORS],
    ids=lambda value: None,
)
def test_errors_say_what_was_expected_and_what_came(function, arguments, error, message):
    with pytest.raises(error) as raised:
        function(*arguments)
    assert str(raised.value) == f"{function.__name__}: {message}"


@needs_extension
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("layer_norm_moments", row[0]) for row in LAYER_ERRORS[1:]]
    + [("group_norm_moments", row[0]) for row in GROUP_ERRORS]
    + [
        ("layer_norm_moments", (X.int(), X.int(), None, None, None)),
        ("layer_norm_moments", (X, X, None, None, torch.ones(4).int())),
        ("group_norm_moments", (G, G[:, :2], None, None, None, 2)),
        ("group_norm_moments", (G, G, None, None, None, -2)),
    ],
    ids=lambda value: None,
)
def test_direct_call_with_wrong_arguments_raises(name, arguments):
    with pytest.raises(RuntimeError, match=f"{name}: "):
        kernel(name)(*arguments, 1e-5, [True, True, True])
