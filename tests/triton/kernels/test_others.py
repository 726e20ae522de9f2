"""The Triton kernels of norms, embedding, convolution and plain sums, against their references in float64."""

import math

import pytest
import torch
from launching import DEVICE, Launches, interpreted, launcher, multiplying, pretend
from opchecks import check_tensor, relaid, wide
from perexample.triton_kernels import _launch
from test_conv import problem

from perexample.ops import OPS
from perexample.testing import CONV_CASES, EMBEDDING_CASES, NORM_CASES, ConvCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def float32_is_float32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def cast(arguments, dtype):
    return [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def check(name, *arguments, **keywords):
    """As good as the reference in the accumulation dtype, against the reference in float64."""
    dtype = next(a.dtype for a in arguments if isinstance(a, torch.Tensor))
    with Launches() as launches:
        results = launcher(name)(*arguments, **keywords)
    reference = OPS[name][0]
    expected = reference(*cast(arguments, torch.float64), **keywords)
    stock = reference(*cast(arguments, wide(dtype)), **keywords)
    assert len(results) == len(expected)
    assert [r.dtype for r in results] == [r.dtype for r in reference(*arguments, **keywords)]
    for i, (actual, e, s) in enumerate(zip(results, expected, stock, strict=True)):
        assert actual.shape == e.shape
        check_tensor(actual, e.double(), s, actual.dtype, f"{name}, result {i}")
    return launches


@every_dtype
@pytest.mark.parametrize("shape", [(3, 5, 33), (4, 1, 130), (2, 70, 8), (5, 9, 1)], ids=str)
@pytest.mark.parametrize("layout", [None, "stepped"])
def test_bias_and_any_gradient(shape, dtype, layout):
    dy = torch.randn(shape).to(dtype)
    dy = dy if layout is None else relaid(dy, layout)
    check("bias_moments", dy)
    check("reduce_moments", dy)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4,), (0,)], ids=str)
def test_gradients_of_odd_shapes(shape):
    check("reduce_moments", torch.randn(shape))
    check("reduce_moments", torch.randn(shape).double())


def norm_arguments(case, dtype):
    """(name, dy, x, weight, further arguments) of a case."""
    batch = case.shape[0]
    if case.groups:
        shape = (batch, case.shape[1], math.prod(case.shape[2:]))
        return "group_norm_moments", *torch.randn(2, *shape).to(dtype), torch.randn(shape[1]), [case.groups, 1e-5]
    width = math.prod(case.normalized)
    shape = (batch, math.prod(case.shape[1 : len(case.shape) - len(case.normalized)]), width)
    return "layer_norm_moments", *torch.randn(2, *shape).to(dtype), torch.randn(width), [1e-5]


SMALL_NORMS = [case for case in NORM_CASES if case.shape[0] and math.prod(case.shape) < 1500]


@every_dtype
@pytest.mark.parametrize("case", SMALL_NORMS, ids=str)
def test_norms(case, dtype):
    name, dy, x, weight, further = norm_arguments(case, dtype)
    check(name, dy, x, None, None, weight, *further, [True, True, case.bias])
    if name == "layer_norm_moments":
        check("rms_norm_moments", dy, x, None, weight, 1e-5, [True, True])


@pytest.mark.parametrize("case", [SMALL_NORMS[2], SMALL_NORMS[-2]], ids=str)
@pytest.mark.parametrize("mask", [[True, False, False], [False, True, False], [False, False, True]], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "stepped"])
def test_norms_with_statistics_and_without_weight(case, mask, layout):
    name, dy, x, weight, further = norm_arguments(case, torch.float32)
    dy = relaid(dy, layout)
    rows = x if name == "layer_norm_moments" else x.reshape(x.shape[0], further[0], -1)
    mean, rstd = rows.mean(2), (rows.var(2, correction=0) + 1e-5).rsqrt()
    check(name, dy, relaid(x, layout), mean, rstd, None, *further, mask)
    check(name, dy, x, None, None, weight, *further, mask)
    if name == "layer_norm_moments":
        check("rms_norm_moments", dy, x, (x.square().mean(2) + 1e-5).rsqrt(), None, 1e-5, mask[:2])


# Channels and positions around a block, rows of one position, more of each example than a block holds.
@every_dtype
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 3, 1), (2, 8, 300), (0, 4, 6), (2, 3, 0)], ids=str)
def test_batch_norm(shape, dtype):
    dy, x, statistics = *torch.randn(2, *shape).to(dtype), [torch.randn(shape[1]), torch.rand(shape[1]) + 0.5]
    check("batch_norm_moments", dy, x, *statistics, torch.randn(shape[1]), [True] * 3)
    check("batch_norm_moments", dy, x.mT.contiguous().mT, *statistics, None, [True] * 3)
    if dtype == torch.float32:
        for mask in ([True, False, False], [False, True, False], [False, False, True]):
            check("batch_norm_moments", relaid(dy, "stepped"), x, *statistics, torch.randn(shape[1]).double(), mask)


def test_norms_with_weights_and_statistics_that_are_not_dense():
    def sparse(*shape):
        return (torch.rand(*shape, 3) + 0.5)[..., 1]

    dy, x = torch.randn(2, 3, 4, 6)
    check("layer_norm_moments", dy, x, sparse(3, 4), sparse(3, 4), sparse(6), 1e-5, [True] * 3)
    check("layer_norm_moments", dy, x, None, None, sparse(6), 1e-5, [True] * 3)
    check("rms_norm_moments", dy, x, sparse(4, 3).T, sparse(6), 1e-5, [True] * 2)
    check("group_norm_moments", dy, x, sparse(3, 2), sparse(3, 2), sparse(4), 2, 1e-5, [True] * 3)
    check("batch_norm_moments", dy, x, sparse(4), sparse(4), sparse(4), [True] * 3)


@interpreted  # which multiplies in float32 whatever it is told
@pytest.mark.parametrize("allowed", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_convolutions_are_as_precise_as_asked_for(dtype, allowed):
    dy, x = torch.randn(2, 2, 3, 5).to(dtype)
    with multiplying("ieee" if allowed == "tf32" else "tf32", allowed):
        launches = check("conv_moments", dy, x, [1], [1], [0], [1], 1, False)
    assert launches[0][2]["PRECISION"] == (allowed if dtype == torch.float32 else "ieee")


@pytest.mark.parametrize("name", ["layer_norm_moments", "group_norm_moments"])
def test_norms_without_examples(name):
    empty, further = torch.empty(0, 4, 6), [2] if name == "group_norm_moments" else []
    results = launcher(name)(empty, empty, None, None, torch.ones(4 if further else 6), *further, 1e-5, [True] * 3)
    assert results[0].shape == (0, 4, 6)
    assert all(not r.any() for r in results[1:])


@every_dtype
@pytest.mark.parametrize("case", EMBEDDING_CASES, ids=str)
def test_embedding(case, dtype):
    if case.rows > 50 and DEVICE == "cpu" and dtype != torch.float32:
        pytest.skip("one program for every row of the table")
    indices = torch.randint(case.rows, (case.batch, math.prod(case.positions)))
    padding = -1 if case.padding_idx is None else case.padding_idx % case.rows
    dy = torch.randn(*indices.shape, case.width).to(dtype)
    check("embedding_moments", dy, indices, case.rows, padding)
    check("embedding_moments", relaid(dy, "transposed"), indices.int(), case.rows, padding, torch.float64)


def test_wide_embedding_and_float64():
    check("embedding_moments", torch.randn(3, 4, 300).double(), torch.randint(2, (3, 4)), 2)


def test_embedding_adds_within_an_example_before_and_between_examples_after_squaring():
    dy = torch.tensor([1.0, 2.0]).repeat(2, 1).unsqueeze(2)
    op = launcher("embedding_moments")
    within = op(dy, torch.tensor([[0, 0], [1, 1]]), 3)
    assert [m.flatten().tolist() for m in within] == [[3, 3, 0], [9, 9, 0]]
    between = op(dy, torch.tensor([[0, 1], [0, 1]]), 3)
    assert [m.flatten().tolist() for m in between] == [[2, 4, 0], [2, 8, 0]]


def conv_arguments(case, dtype):
    dy, x, geometry, bias = problem(case, dtype)
    return dy, x, *geometry, bias


CONVS = [
    case
    for case in CONV_CASES
    if not isinstance(case.arguments.get("padding", 0), str) and "padding_mode" not in case.arguments
]


# Of a depthwise convolution the interpreter takes a program for every output and tap.
@pytest.mark.parametrize("case", [c for c in CONVS if DEVICE == "cuda" or c.arguments.get("groups") != 5], ids=str)
def test_convolution(case):
    launches = check("conv_moments", *conv_arguments(case, torch.float32))
    depthwise = case.arguments.get("groups", 1) == case.channels
    assert case.batch == 0 or ("_depthwise" if depthwise else "_implicit_gemm") in launches.names


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CONVS if c.batch in (2, 3) and max(c.size) < 9 and c.outputs < 64], ids=str
)
def test_convolution_in_half_precision_and_channels_last(case, dtype):
    dy, x, *further = conv_arguments(case, dtype)
    check("conv_moments", dy.movedim(1, -1).contiguous().movedim(-1, 1), x, *further)
    if case.channels > 4:
        check("conv_moments", dy, x.movedim(1, -1).contiguous().movedim(-1, 1), *further, torch.float32)


# No two dimensions have the same kernel, stride, padding or dilation; then no padding where taps need it least.
@pytest.mark.parametrize(("groups", "padding"), [(1, (3, 1, 2)), (2, (0, 0, 1)), (4, (3, 1, 2))], ids=str)
def test_convolution_of_dimensions_that_differ(groups, padding):
    given = {"stride": (1, 2, 3), "padding": padding, "dilation": (3, 2, 1), "groups": groups, "bias": False}
    arguments = conv_arguments(ConvCase(3, 4, 4, (4, 7, 8), (2, 3, 2), given), torch.float32)
    with pretend(90, processors=1):  # several examples for each program
        check("conv_moments", *arguments)


def test_padding_around_taps_of_one_position():
    case = ConvCase(2, 3, 4, (2, 3, 4), 1, {"padding": (1, 2, 0), "bias": False})
    check("conv_moments", *conv_arguments(case, torch.float32))


def test_several_outputs_of_one_channel():
    x, dy = torch.randn(3, 2, 6, 5), torch.randn(3, 4, 4, 4)
    check("conv_moments", dy, x, [3, 2], [1, 1], [0, 0], [1, 1], 2, True)


@interpreted
@pytest.mark.parametrize("processors", [1, 40])  # several examples in a part, and one
def test_parts_of_the_batch_add_up(processors):
    with pretend(90, processors):
        x = torch.randn(2, 3, 12, 6)
        for launches in (
            check("layer_norm_moments", *x, None, None, torch.randn(6), 1e-5, [True] * 3),
            check("group_norm_moments", *x, None, None, torch.randn(12), 3, 1e-5, [True] * 3),
            check("batch_norm_moments", *x, torch.randn(12), torch.rand(12), torch.randn(12), [True] * 3),
            check("conv_moments", x[0], x[1], [1], [1], [0], [1], 1, True),
            check("conv_moments", x[0], x[1], [1], [1], [0], [1], 12, False),
            check("bias_moments", x[0]),
        ):
            assert "_add_parts" in launches.names or processors == 1


@interpreted
def test_the_last_part_of_the_batch_may_be_shorter():
    with pretend(90, processors=1):
        launches = check("layer_norm_moments", *torch.randn(2, 7, 12, 6), None, None, torch.randn(6), 1e-5, [True] * 3)
    assert next(grid for kernel, grid, _ in launches if kernel == "_affine")[1] == 4  # 2, 2, 2 and 1


@interpreted
def test_nothing_is_written_behind_an_output(monkeypatch):
    blocks = []

    def guarded(shape, like, dtype):
        count, dtypes = math.prod(shape), (dtype, _launch.accumulate_dtype(like.dtype))
        blocks.extend((count, torch.full((count + 64,), 7, dtype=d)) for d in dtypes)
        return tuple(block[:count].view(shape) for count, block in blocks[-2:])

    monkeypatch.setattr(_launch, "empty_moments", guarded)
    check("embedding_moments", torch.randn(3, 4, 5), torch.randint(6, (3, 4)), 6)
    check("bias_moments", torch.randn(3, 4, 5))
    check("linear_moments", torch.randn(3, 4, 5), torch.randn(3, 4, 7), True)
    check("conv_moments", torch.randn(3, 5, 4), torch.randn(3, 3, 6), [3], [1], [0], [1], 1, True)
    check("layer_norm_moments", *torch.randn(2, 3, 4, 5), None, None, torch.randn(5), 1e-5, [True] * 3)
    assert len(blocks) > 12 and all((block[count:] == 7).all() for count, block in blocks)


def test_wrong_arguments_raise():
    ones, zeros = torch.ones(2, 4, 6), torch.zeros(2, 4, dtype=torch.long)
    for name, arguments, message in (
        ("bias_moments", (ones[0],), "dy must be of shape"),
        ("layer_norm_moments", (ones, ones[:1], None, None, None, 1e-5, [True] * 3), "x must be"),
        ("layer_norm_moments", (ones, ones, None, None, ones[0, 0, :5], 1e-5, [True] * 3), "weight must be"),
        ("layer_norm_moments", (ones, ones, ones[0], ones[0], None, 1e-5, [True] * 3), "mean must be"),
        ("group_norm_moments", (ones, ones, None, None, None, 3, 1e-5, [True] * 3), "groups must divide C=4"),
        ("batch_norm_moments", (ones, ones[:1], ones[0, :, 0], ones[0, :, 0], None, [True] * 3), "x must be"),
        ("batch_norm_moments", (ones, ones, ones[0, 0], ones[0, :, 0], None, [True] * 3), "mean must be"),
        ("batch_norm_moments", (ones, ones, *ones[0, :, :2].T, ones[0, 0], [True] * 3), "weight must be"),
        ("rms_norm_moments", (ones.double(), ones.double(), None, None, 1e-5, [True] * 2), "float64 is not supported"),
        ("embedding_moments", (ones, zeros[:, :3], 5), "indices must be"),
        ("embedding_moments", (ones, zeros.float(), 5), "indices must be"),
        ("conv_moments", (ones, ones, [3], [1], [0], [1], 1, True), "dy must be"),
        ("conv_moments", (ones, ones, [1], [0], [0], [1], 1, True), "stride must be"),
        ("conv_moments", (ones, ones, [1], [1], [0], [1], 3, True), "groups must divide"),
        ("conv_moments", (ones, ones[0], [1], [1], [0], [1], 1, True), "dy and x must be"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: {message}"):
            launcher(name)(*arguments)
