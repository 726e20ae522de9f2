"""The CUDA kernels of convolution, norms, embedding and the step, run on the CPU like tests/test_cuda_emulation.py."""

import sys
from pathlib import Path

import pytest
import torch

from perexample import ops
from perexample.ops import OPS
from perexample.ops.optimizer import state_starts
from perexample.testing import assert_within_budget

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import emulated
from emulated import check, guarded, padded, wide, within

pytestmark = pytest.mark.skipif(not emulated.CXX, reason="no C++ compiler")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def lib(emulated_library):
    return emulated.Emulated(emulated_library)


def randn(*shape, dtype=torch.float32):
    return guarded(torch.randn(shape).to(dtype))


# (channels, outputs, size, kernel, stride, padding, dilation, groups)
CONVOLUTIONS = {
    "1d": (4, 5, (11,), (3,), (1,), (0,), (1,), 1),
    "1d, groups and stride": (4, 6, (11,), (4,), (2,), (3,), (1,), 2),
    "2d, vectors in channels_last": (16, 24, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2d, a large tile": (16, 72, (5, 4), (3, 2), (2, 1), (1, 2), (1, 2), 1),
    "2d, odd": (3, 17, (9, 9), (3, 2), (2, 1), (1, 2), (2, 1), 1),
    "2d, groups": (16, 18, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": (6, 6, (10, 9), (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "depthwise, two outputs each": (5, 10, (9, 9), (5, 5), (2, 2), (2, 2), (1, 1), 5),
    "1x1": (24, 16, (5, 6), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1, stride": (16, 8, (5, 6), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "3d": (2, 4, (4, 5, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    "one position": (8, 16, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: guarded(t.movedim(1, -1).contiguous()).movedim(-1, 1),
    "padded": padded,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@every_dtype
def test_conv(lib, name, layout, dtype):
    channels, outputs, size, kernel, stride, padding, dilation, groups = CONVOLUTIONS[name]
    batch = 3
    x = randn(batch, channels, *size, dtype=dtype)
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    dy = randn(batch, outputs, *out, dtype=dtype)
    # What does not lie evenly over the positions, the binding copies.
    x, dy = LAYOUTS[layout](x), LAYOUTS[layout](dy) if layout != "padded" else dy
    arguments = (kernel, stride, padding, dilation, groups)
    got = lib.conv_moments(dy, x, *arguments, capability=90, multiprocessors=2)

    def contribution(b, d):
        like = torch.empty(outputs, channels // groups, *kernel, dtype=d)
        sides = [list(side) for side in (stride, padding, dilation)]
        return torch.ops.aten.convolution_backward(
            dy[b : b + 1].to(d), x[b : b + 1].to(d), like, None, *sides, False, [0] * len(kernel), groups,
            [False, True, False],
        )[1]  # fmt: skip

    check(got[:2], contribution, batch, (outputs, channels // groups, *kernel), dtype)
    check(got[2:], lambda b, d: dy[b].to(d).flatten(1).sum(1), batch, (outputs,), dtype)


def test_division_by_multiplication(lib):
    most = 2**31 - 1
    edges = torch.tensor([1, 2, 3, 5, 7, 9, 640, 641, 2**16 - 1, 2**16, 2**16 + 1, 2**30 - 1, 2**30, 2**30 + 1, most])
    divisors = torch.cat([edges, torch.randint(1, 2**31, (100,)), torch.randint(1, 3000, (100,))])
    # Around multiples of the divisor.
    multiples = divisors[:, None] * torch.cat([torch.arange(4), torch.randint(0, 2**31, (20,))])
    numbers = torch.cat([multiples + shift for shift in (-1, 0, 1)] + [torch.full_like(divisors, most)[:, None]], 1)
    numbers = numbers.clamp(0, most)
    divisors = divisors[:, None].expand_as(numbers).contiguous()
    quotient, remainder = torch.empty_like(numbers), torch.empty_like(numbers)
    lib.call("divide", [numbers.numel()], [numbers, divisors, quotient, remainder])
    assert torch.equal(quotient, numbers // divisors) and torch.equal(remainder, numbers % divisors)


def test_conv_of_no_examples(lib):
    got = lib.conv_moments(torch.randn(0, 4, 3, 3), torch.randn(0, 3, 5, 5), (3, 3), (1, 1), (0, 0), (1, 1), 1)
    assert all((t == 0).all() for t in got)


@every_dtype
@pytest.mark.parametrize("given", [False, True], ids=["recomputed", "given"])
@pytest.mark.parametrize("shape", [(3, 5, 33), (4, 1, 7), (2, 40, 200), (1, 3, 300)], ids=str)
def test_layer_norm(lib, shape, given, dtype):
    dy, x, weight = padded(randn(*shape, dtype=dtype)), padded(randn(*shape, dtype=dtype)), randn(shape[2], dtype=dtype)
    mean = rstd = None
    if given:
        variance, mean = torch.var_mean(x.to(wide(dtype)), 2, correction=0)
        rstd = (variance + 1e-5).rsqrt()
    got = lib.layer_norm_moments(dy, x, mean, rstd, weight, 1e-5, multiprocessors=2)
    mask = [True, True, True]
    within(got, (dy, x, mean, rstd, weight, 1e-5, mask), OPS["layer_norm_moments"][0], dtype, "layer_norm")


@every_dtype
def test_layer_norm_without_weight_and_rms_norm(lib, dtype):
    dy, x, weight = randn(3, 6, 40, dtype=dtype), randn(3, 6, 40, dtype=dtype), randn(40, dtype=torch.float32)
    got = lib.layer_norm_moments(dy, x, None, None, None, 1e-5)
    reference = OPS["layer_norm_moments"][0]
    within(got, (dy, x, None, None, None, 1e-5, [True, True, True]), reference, dtype, "layer_norm")
    got = lib.layer_norm_moments(dy, x, None, None, weight, 1e-5, False, (True, True, False))
    reference = OPS["rms_norm_moments"][0]
    within(got[:3], (dy, x, None, weight, 1e-5, [True, True]), reference, dtype, "rms_norm")


def test_layer_norm_of_rows_too_long_for_shared_memory(lib):
    dy, x = randn(2, 3, 13000), randn(2, 3, 13000)
    got = lib.layer_norm_moments(dy, x, None, None, None, 1e-5)
    reference = OPS["layer_norm_moments"][0]
    within(got, (dy, x, None, None, None, 1e-5, [True, True, True]), reference, torch.float32, "layer_norm")


@every_dtype
@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 6, 5), 2), ((2, 4, 1100), 1), ((2, 8, 35), 8), ((4, 6, 1), 3)], ids=str
)
def test_group_norm(lib, shape, groups, dtype):
    dy, x, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype)
    variance, mean = torch.var_mean(x.to(wide(dtype)).reshape(shape[0], groups, -1), 2, correction=0)
    for statistics in ((None, None), (mean, (variance + 1e-5).rsqrt())):
        got = lib.group_norm_moments(dy, x, *statistics, weight, groups, 1e-5)
        arguments = (dy, x, *statistics, weight, groups, 1e-5, [True, True, True])
        within(got, arguments, OPS["group_norm_moments"][0], dtype, "group_norm")


def test_batch_norm(lib):
    dy, x = randn(3, 4, 7), randn(3, 4, 7)
    mean, rstd, weight = torch.randn(4), torch.rand(4) + 0.5, torch.randn(4)
    got = lib.group_norm_moments(dy, x, mean, rstd, weight, 4, 0.0, True)
    arguments = (dy, x, mean, rstd, weight, [True, True, True])
    within(got, arguments, OPS["batch_norm_moments"][0], torch.float32, "batch_norm")


def check_embedding(lib, dy, indices, rows, padding_idx=-1, **where):
    got = lib.embedding_moments(dy, indices, rows, padding_idx, **where)
    within(got, (dy, indices, rows, padding_idx), OPS["embedding_moments"][0], dy.dtype, "embedding")


@every_dtype
@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_embedding(lib, dtype, padding_idx):
    for batch, positions, rows, width in ((4, 6, 5, 7), (2, 50, 3, 150), (1, 9, 100, 12), (7, 3, 4, 33)):
        check_embedding(
            lib, padded(randn(batch, positions, width, dtype=dtype)), torch.randint(rows, (batch, positions)), rows,
            padding_idx,
        )  # fmt: skip


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_embedding_of_runs_over_several_chunks(lib, multiprocessors):
    # Chunks of 64 positions and of 8: runs that begin and end within, at the edges of, and over many chunks; examples
    # that go over several, and many examples in one.
    runs = [8, 56, 1, 63, 64, 3, 5, 130, 8, 7, 1, 700]
    sorted_rows = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))
    for batch in (1, 3, 149, len(sorted_rows)):
        indices = sorted_rows[: len(sorted_rows) // batch * batch]
        for order in (torch.arange(len(indices)), torch.randperm(len(indices))):
            dy = randn(batch, len(indices) // batch, 5)
            for seed in (1, 2):
                check_embedding(
                    lib, dy, indices[order].view(batch, -1), len(runs), multiprocessors=multiprocessors, seed=seed
                )


def test_embedding_of_one_row_for_all_takes_several_rounds_of_pieces(lib):
    indices = torch.ones(3, 300, dtype=torch.long)  # 113 chunks of 8
    check_embedding(lib, randn(3, 300, 4), indices, 2, multiprocessors=132)
    dy = randn(3, 300, 4)
    lib.embedding_moments(dy, indices, 2, multiprocessors=132)
    assert lib.workspace == 113 * 8 * 4 * 4
    got = lib.embedding_moments(dy, indices, 2, 1, multiprocessors=132)  # the row is padding
    assert all((t == 0).all() for t in got)


def test_embedding_of_a_row_that_does_not_exist_fails(lib):
    with pytest.raises(RuntimeError, match="trap"):
        lib.embedding_moments(torch.randn(1, 3, 4), torch.tensor([[0, 7, 1]]), 5)


KINDS = {
    "sgd": {},
    "momentum": {"average": True},
    "rmsprop": {"square": True},
    "centered": {"average": True, "square": True, "centered": True, "eps": 1e-3},
    "adam": {"average": True, "square": True},
    "adam over sigma squared": {"average": True, "square": True, "squared_denominator": True, "eps": 1e-3},
}
STEPS = {
    "plain": {},
    "decay, sum-reduced, maximize": {"weight_decay": 0.1, "mean_reduction": False, "maximize": True},
    "scaled": {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)},
    "skipped": {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(1.0)},
    "no examples": {"batch_size": torch.tensor(0.0)},
    "power": {"power": True, "correct_g": False, "correct_s": False},
    "eps": {"lr_times_eps": True, "eps": 0.5},
    "guard": {"guard_rounds": 1},
}
SIZES = ((1,), (7, 9), (64,), (5, 0), (9001,), ())


def step_arguments(kind, dtype=torch.float32, grad_dtype=None, state=None, sizes=SIZES):
    rows = [torch.randn(6, *size) for size in sizes]
    params = [torch.randn(size).to(dtype) for size in sizes]
    grads = [c.sum(0).to(grad_dtype or dtype) for c in rows]
    sums = [c.square().sum(0).to(wide(dtype)) for c in rows]
    length, state = state_starts(params)[-1], state or wide(dtype)
    average = torch.randn(length).to(state) if kind.get("average") else None
    square = (torch.rand(length) + 0.1 + (0 if average is None else average.double().square())).to(state)
    seen = torch.arange(3.0, 3 + len(sizes), dtype=torch.float64)
    violations = torch.zeros(len(sizes), dtype=torch.int32)
    return [params, grads, sums, average, square if kind.get("square") else None, seen, violations]


def options(kind, **changes):
    own = {k: v for k, v in kind.items() if k in ("centered", "squared_denominator", "eps")}
    numbers = {"batch_size": torch.tensor(6.0), "lr": torch.tensor(1e-3), "n_g": 20.0, "n_s": 100.0, "eps": 1e-8}
    return numbers | own | changes


def clone(tree):
    return [clone(t) if isinstance(t, list) else None if t is None else t.clone() for t in tree]


def cast(tree, dtype):
    """A copy whose floating tensors have the dtype (the counts stay float64)."""
    return [
        cast(t, dtype)
        if isinstance(t, list)
        else t.to(dtype, copy=True)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else None
        if t is None
        else t.clone()
        for t in tree
    ]


def leaves(tree):
    for t in tree:
        yield from leaves(t) if isinstance(t, list) else () if t is None else (t,)


def check_step(lib, arguments, dtype, place=lambda tree: tree, **o):
    """`place`: moves what the kernel is given."""
    got = place(clone(arguments))
    lib.optimizer_step_(*got, **o)
    expected, stock = (
        [*cast(arguments[:5], d), arguments[5].clone(), arguments[6].clone()] for d in (torch.float64, wide(dtype))
    )
    for tree in (expected, stock):
        ops.optimizer_step_(*tree, **o)
    for g, e, s in zip(leaves(got), leaves(expected), leaves(stock), strict=True):
        if g.dtype in (torch.int32,) or g is got[5]:
            assert torch.equal(g, e)
        elif g.numel():
            assert_within_budget(
                g, e.double(), s, g.dtype if g.dtype in (torch.bfloat16, torch.float16) else wide(dtype), "step"
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_step(lib, kind, step):
    check_step(lib, step_arguments(KINDS[kind]), torch.float32, **options(KINDS[kind], **STEPS[step]))


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(a, b) for a in DTYPES for b in DTYPES if (a, b) != (torch.float32,) * 2], ids=str
)
def test_step_of_other_dtypes(lib, dtype, grad_dtype):
    kind = KINDS["adam"]
    check_step(lib, step_arguments(kind, dtype, grad_dtype), dtype, **options(kind))


def test_step_of_more_tensors_than_one_launch_takes(lib):
    kind = KINDS["adam"]
    arguments = step_arguments(kind, sizes=((3,),) * 520)
    arguments[1][5] = arguments[2][5] = None  # left alone
    got, expected = clone(arguments), clone(arguments)
    lib.optimizer_step_(*got, **options(kind))
    ops.optimizer_step_(*expected, **options(kind))
    for g, e in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(g, e)


def test_step_per_batch(lib):
    kind = KINDS["adam"]
    arguments = step_arguments(kind)
    arguments[2] = []
    check_step(lib, arguments, torch.float32, **options(kind))


def test_state_that_vectors_cannot_read(lib):
    kind = KINDS["adam"]
    arguments = step_arguments(kind)
    for i in (3, 4):
        arguments[i] = torch.cat([torch.zeros(1), arguments[i]])[1:]
    got, expected = [[*arguments], clone(arguments)]
    lib.optimizer_step_(*got, **options(kind))
    ops.optimizer_step_(*expected, **options(kind))
    for g, e in zip(got[3:5], expected[3:5], strict=True):
        torch.testing.assert_close(g, e)


def test_bfloat16_state_is_rounded_as_by_the_reference(lib):
    kind = KINDS["adam"]
    arguments = step_arguments(kind, state=torch.bfloat16)
    got, expected = clone(arguments), clone(arguments)
    lib.optimizer_step_(*got, **options(kind))
    OPS["optimizer_step_"][0](*expected, **options(kind) | REST)
    for g, e in zip(got[3:5], expected[3:5], strict=True):
        assert (g != e).float().mean() < 1e-3  # where the last bit of the float32 differs


REST = {
    "weight_decay": 0.0, "centered": False, "squared_denominator": False, "lr_times_eps": False, "correct_g": True,
    "correct_s": True, "power": False, "mean_reduction": True, "maximize": False, "guard_rounds": 0,
}  # fmt: skip


def test_the_guard_flags_what_no_examples_explain(lib):
    kind = KINDS["sgd"]
    arguments = step_arguments(kind)
    arguments[1][1][2, 3] += 1e3
    lib.optimizer_step_(*arguments, **options(kind, guard_rounds=1))
    assert arguments[6].tolist() == [0, 1, 0, 0, 0, 0]
