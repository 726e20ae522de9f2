"""conv_moments against the loop over examples (MATHS 5)."""

import pytest
import torch
import torch.nn.functional as F
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

from perexample.ops import conv_moments
from perexample.testing import CONV_CASES, ConvCase

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def each(value, spatial):
    return (value,) * spatial if isinstance(value, int) else tuple(value)


def problem(case, dtype=torch.float32):
    """dy, x and the op's arguments: the padding that the op does not know is applied to x."""
    spatial, arguments = case.spatial, case.arguments
    kernel_size = each(case.kernel_size, spatial)
    stride, dilation = (each(arguments.get(name, 1), spatial) for name in ("stride", "dilation"))
    padding, groups = arguments.get("padding", 0), arguments.get("groups", 1)
    if padding == "same":
        both_sides = [
            (d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for d, k in zip(dilation, kernel_size, strict=True)
        ]
    else:
        both_sides = [(p, p) for p in each(0 if padding == "valid" else padding, spatial)]
    mode = arguments.get("padding_mode", "zeros")
    x = torch.randn(case.batch, case.channels, *case.size)
    padding = tuple(left for left, _ in both_sides)
    if mode != "zeros" or any(left != right for left, right in both_sides):
        x = F.pad(x, [p for pair in reversed(both_sides) for p in pair], mode="constant" if mode == "zeros" else mode)
        padding = (0,) * spatial
    out = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel_size, stride, strict=True)
    ]
    dy = torch.randn(case.batch, case.outputs, *out)
    return dy.to(dtype), x.to(dtype), (kernel_size, stride, padding, dilation, groups), arguments.get("bias", True)


def check(which, dy, x, arguments, bias=True, dtype=None):
    kernel_size, stride, padding, dilation, groups = arguments
    dw, dw_sq, db, db_sq = implementation("conv_moments", which)(dy, x, *arguments, bias, dtype)
    shape = (dy.shape[1], x.shape[1] // groups, *kernel_size)

    def weight(b, d):
        w = torch.zeros(shape, dtype=d, requires_grad=True)
        y = CONV[dy.dim() - 2](x[b : b + 1].to(d), w, None, stride, padding, dilation, groups)
        return torch.autograd.grad(y, w, dy[b : b + 1].to(d))[0]

    check_moments((dw, dw_sq), weight, dy.shape[0], shape, dy.dtype, dtype, "weight")
    if bias:
        column = (dy.shape[1],)
        check_moments(
            (db, db_sq), lambda b, d: dy[b].to(d).flatten(1).sum(1), dy.shape[0], column, dy.dtype, dtype, "bias"
        )
    else:
        check_empty(db, db_sq)


@both
@every_dtype
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_cases_equal_the_loop_over_examples(which, dtype, case):
    dy, x, arguments, bias = problem(case, dtype)
    check(which, dy, x, arguments, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        ConvCase(40, 3, 16, (32, 32), 3, {"padding": 1}),  # examples split, positions in several boxes
        ConvCase(2, 2, 3, (97, 101), 3, {"padding": 1}),
        ConvCase(2, 3, 5, (9000,), 9, {"padding": 4}),
        ConvCase(1, 1, 1, (70, 400), (5, 1), {"stride": (1, 3), "dilation": (7, 1)}),
        ConvCase(600, 4, 6, (2, 2), 1),
        ConvCase(3, 130, 70, (5, 5), 3, {"padding": 1}),
        ConvCase(3, 70, 150, (4, 4), 1),
        ConvCase(12, 48, 48, (14, 14), 3, {"groups": 48, "padding": 1}),
        ConvCase(12, 24, 48, (14, 14), 3, {"groups": 24, "stride": 2, "padding": 1}),
        ConvCase(9, 32, 64, (8, 8), 3, {"groups": 4, "padding": 1}),
        ConvCase(3, 5, 7, (9, 8, 11), 3, {"padding": (2, 0, 1), "stride": (1, 2, 1), "dilation": (2, 1, 1)}),
        ConvCase(2, 6, 6, (12, 13, 14), 3, {"padding": 1, "groups": 6}),
        # Windows of 3 x 3 on rows of whole vectors; the last in several boxes.
        ConvCase(12, 40, 40, (10, 16), 3, {"padding": 1, "groups": 40}),
        ConvCase(3, 24, 12, (5, 32), 3, {"padding": (0, 1), "groups": 12}),
        ConvCase(2, 3, 3, (3, 96), 3, {"padding": (1, 2), "stride": (1, 3), "dilation": (1, 2), "groups": 3}),
        ConvCase(3, 4, 4, (3, 6, 16), 3, {"padding": (0, 1, 1), "groups": 4}),
        ConvCase(2, 2, 2, (300, 64), 3, {"padding": 1, "groups": 2}),
        ConvCase(3, 4, 6, (6, 6), 3, {"padding": 9, "stride": 4}),  # taps and positions in the padding alone
        ConvCase(4, 3, 8, (224, 3), (7, 2), {"stride": (4, 1), "padding": (3, 1)}),
    ],
    ids=str,
)
def test_shapes_that_take_several_boxes_blocks_and_splits(case, dtype):
    dy, x, arguments, bias = problem(case, dtype)
    check("public", dy, x, arguments, bias)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 66])
def test_channels_around_vectors_and_panels(size):
    for channels, outputs in ((size, 5), (5, size), (size, size)):
        check("public", *problem(ConvCase(2, channels, outputs, (4, 5), 3, {"padding": 1}))[:3])
    check("public", *problem(ConvCase(2, size, size, (7,), 3, {"groups": size}))[:3])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [CONV_CASES[0], *(c for c in CONV_CASES[5:] if c.batch and c.size != (32, 32))], ids=str
)
def test_any_memory_layout(which, dtype, case):
    dy, x, arguments, bias = problem(case, dtype)
    for layout in LAYOUTS:
        check(which, relaid(dy, layout), relaid(x, layout), arguments, bias)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(dy.dim())
    if last is not None:
        check(which, dy.contiguous(memory_format=last), x.contiguous(memory_format=last), arguments, bias)
        check(which, dy, x.contiguous(memory_format=last), arguments, bias)
        check(which, dy.contiguous(memory_format=last), x, arguments, bias)


@both
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_expanded_gradient(which, groups):
    for dy in expanded((3, 12, 5, 4)):
        check(which, dy, torch.randn(3, 6, 7, 6), ((3, 3), (1, 1), (0, 0), (1, 1), groups))
    for x in expanded((3, 6, 7, 6)):
        check(which, torch.randn(3, 12, 5, 4), x, ((3, 3), (1, 1), (0, 0), (1, 1), groups))


@both
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_gradient_in_another_dtype_than_the_inputs(which, dtype, grad_dtype, groups):
    dy, x, arguments, _ = problem(ConvCase(3, 4, 12, (8, 9), 3, {"padding": 1, "groups": groups}), dtype)
    check(which, dy, x, arguments, True, grad_dtype)


@both
@pytest.mark.parametrize("shapes", [((2, 0, 4, 4), (2, 3, 6, 6)), ((2, 4, 4, 4), (2, 0, 6, 6))], ids=str)
def test_no_channels(which, shapes):
    dy, x = (torch.randn(shape) for shape in shapes)
    dw, dw_sq, db, db_sq = implementation("conv_moments", which)(dy, x, (3, 3), (1, 1), (0, 0), (1, 1), 1, True)
    assert dw.shape == dw_sq.shape == (dy.shape[1], x.shape[1], 3, 3)
    check_moments((db, db_sq), lambda b, d: dy[b].to(d).flatten(1).sum(1), 2, (dy.shape[1],), dy.dtype, None, "bias")


def test_one_by_one_convolution_is_a_linear_layer():
    dy, x = torch.randint(-4, 5, (7, 40, 5, 3)).float(), torch.randint(-4, 5, (7, 23, 5, 3)).float()
    conv = conv_moments(dy, x, (1, 1), (1, 1), (0, 0), (1, 1), 1, True)
    linear = torch.ops.perexample.linear_moments(dy.flatten(2).mT, x.flatten(2).mT, True)
    for c, line in zip(conv, linear, strict=True):
        assert torch.equal(c.flatten(), line.flatten())


ONES = torch.ones
DY, X = ONES(2, 4, 6, 6), ONES(2, 3, 8, 8)
GOOD = dict(kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1))


@pytest.mark.parametrize(
    ("dy", "x", "changes", "error", "message"),
    [
        (None, X, {}, TypeError, "dy must be a Tensor, got NoneType"),
        (ONES(2, 4), X, {}, ValueError, "dy must be of shape (B, O, *out), 3 to 5 dimensions, got (2, 4)"),
        (DY, ONES(2, 3, 8), {}, ValueError, "x must be (B=2, C, *in) of 4 dimensions, got (2, 3, 8)"),
        (DY, ONES(3, 3, 8, 8), {}, ValueError, "x must be (B=2, C, *in) of 4 dimensions, got (3, 3, 8, 8)"),
        (DY, X.double(), {}, TypeError, "x must be torch.float32 like dy, got torch.float64"),
        (DY, X, {"kernel_size": (3,)}, ValueError, "kernel_size must be 2 integers >= 1, got (3,)"),
        (DY, X, {"stride": (0, 1)}, ValueError, "stride must be 2 integers >= 1, got (0, 1)"),
        (DY, X, {"padding": (0, -1)}, ValueError, "padding must be 2 integers >= 0, got (0, -1)"),
        (DY, X, {"dilation": (1, 0)}, ValueError, "dilation must be 2 integers >= 1, got (1, 0)"),
        (DY, X, {"groups": 2}, ValueError, "groups must divide C=3 and O=4, got 2"),
        (DY, X, {"groups": 0}, ValueError, "groups must divide C=3 and O=4, got 0"),
        (DY, X, {"padding": (1, 0)}, ValueError, "dy must be (B=2, O=4, *out=(8, 6)), got (2, 4, 6, 6)"),
    ],
    ids=lambda value: None,
)
def test_errors_say_what_was_expected_and_what_came(dy, x, changes, error, message):
    with pytest.raises(error) as raised:
        conv_moments(dy, x, **(GOOD | changes))
    assert str(raised.value) == f"conv_moments: {message}"


@needs_extension
@pytest.mark.parametrize(
    ("dy", "x", "changes"),
    [
        (ONES(2, 4), X, {}),
        (DY, ONES(2, 3, 8), {}),
        (DY, ONES(3, 3, 8, 8), {}),
        (ONES(2, 4, 1, 1, 1, 1), ONES(2, 3, 1, 1, 1, 1), {}),
        (DY, X.double(), {}),
        (DY.int(), X.int(), {}),
        (DY, X, {"kernel_size": (3,)}),
        (DY, X, {"padding": ()}),
        (DY, X, {"stride": (0, 1)}),
        (DY, X, {"padding": (0, -1)}),
        (DY, X, {"dilation": (1, 0)}),
        (DY, X, {"kernel_size": (0, 3)}),
        (DY, X, {"groups": 2}),
        (DY, X, {"groups": 0}),
        (DY, X, {"groups": -1}),
        (DY, X, {"padding": (1, 0)}),
        (DY, X, {"kernel_size": (9, 9)}),
        (DY, X, {"kernel_size": (3, 2**62), "dilation": (1, 2**62)}),
        (DY, X, {"padding": (2**62, 2**62)}),
        (DY, X, {"dtype": torch.int64}),
    ],
    ids=lambda value: None,
)
def test_direct_call_with_wrong_arguments_raises(dy, x, changes):
    arguments = {**GOOD, "groups": 1, "bias": True, **changes}
    with pytest.raises(RuntimeError, match="conv_moments: "):
        kernel("conv_moments")(dy, x, **arguments)
