"""What the CUDA launchers are given: every op on memory of any layout and on nothing at all, run on the CPU.

As in tests/test_cuda_emulation.py nothing here runs on a GPU; that what runs there is guarded by `check` is read from
the sources.
"""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from perexample.ops import OPS

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import emulated
from emulated import check, check_linear, guarded, within
from test_cuda_emulation_ops import KINDS, check_step, options, step_arguments

CSRC = Path(__file__).parents[1] / "csrc"
emulation = pytest.mark.skipif(not emulated.CXX, reason="no C++ compiler")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # one of each width
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def lib(emulated_library):
    return emulated.Emulated(emulated_library)


def laid_out(tensor, strides, offset, room=None):
    """The same values at these strides, with NaN between them; `room` to take, if not as much as they need."""
    last = offset + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    block = torch.full((last + 1 + emulated.GUARD,), float("nan"), dtype=tensor.dtype) if room is None else room
    return block.as_strided(tensor.shape, strides, offset).copy_(tensor)


def odd(n):
    return n + 1 + n % 2


# Views of a tensor of three dimensions, whose values they keep.
DENSE_ROWS = {
    "one element off": lambda t: laid_out(t, (t.shape[1] * t.shape[2], t.shape[2], 1), 1),
    "rows an odd number of elements apart": lambda t: laid_out(
        t, (t.shape[1] * odd(t.shape[2]), odd(t.shape[2]), 1), 3
    ),
    "examples an odd number of elements apart": lambda t: laid_out(t, (t.shape[1] * 64 + 1, 64, 1), 0),
    "positions outside of examples": lambda t: laid_out(t, (t.shape[2], t.shape[0] * t.shape[2], 1), 0),
}
VIEWS = DENSE_ROWS | {
    "every third element": lambda t: laid_out(t, (t.shape[1] * t.shape[2] * 3, t.shape[2] * 3, 3), 1),
    "backwards": lambda t: laid_out(t, (1, t.shape[0], t.shape[0] * t.shape[1]), 5),
}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def far(tensor):
    """Examples more than 2**31 elements apart, in memory that is taken only where it is written to."""
    apart = 2**31 + 64
    size = (apart * (tensor.shape[0] - 1) + tensor[0].numel() + 64) * tensor.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    room = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=tensor.dtype)
    return laid_out(tensor, (apart, *tensor[0].contiguous().stride()), 0, room)


def randn(*shape, dtype=torch.float32):
    return guarded(torch.randn(shape).to(dtype))


@emulation
@every_dtype
@every_view
@pytest.mark.parametrize(("positions", "capability"), [(1, 80), (18, 80), (18, 90)])
def test_linear(lib, dtype, view, positions, capability):
    dy, x = randn(3, positions, 24, dtype=dtype), randn(3, positions, 16, dtype=dtype)
    check_linear(lib, view(dy), x, capability=capability)
    check_linear(lib, dy, view(x), capability=capability)


@emulation
@every_dtype
@every_view
def test_bias_and_reduce(lib, dtype, view):
    for positions in (1, 3, 12):
        dy = view(randn(9, positions, 40, dtype=dtype))
        check(lib.bias_moments(dy), lambda b, d, v=dy: v[b].to(d).sum(0), 9, (40,), dtype)
    grad = view(randn(9, 1, 40, dtype=dtype))[:, 0]
    check(lib.reduce_moments(grad), lambda b, d: grad[b].to(d), 9, (40,), dtype)


@emulation
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@every_view
@pytest.mark.parametrize("groups", [1, 16])
def test_conv(lib, dtype, view, groups):
    dy, x = randn(2, 16, 7, dtype=dtype), randn(2, 16, 9, dtype=dtype)
    # The convolution of x as it is, and of channels_last.
    for channels_last in (False, True):
        a, b = (view(t.mT.contiguous()).mT if channels_last else view(t) for t in (dy, x))
        got = lib.conv_moments(a, b, (3,), (1,), (0,), (1,), groups)

        def contribution(i, d, a=a, b=b):
            like = torch.empty(16, 16 // groups, 3, dtype=d)
            sides = ([1], [0], [1], False, [0], groups, [False, True, False])
            return torch.ops.aten.convolution_backward(a[i : i + 1].to(d), b[i : i + 1].to(d), like, None, *sides)[1]

        check(got[:2], contribution, 2, (16, 16 // groups, 3), dtype)


@emulation
@every_dtype
@every_view
def test_embedding(lib, dtype, view):
    dy, indices = view(randn(4, 6, 20, dtype=dtype)), torch.randint(5, (4, 6))
    got = lib.embedding_moments(dy, indices, 5)
    within(got, (dy, indices, 5, -1), OPS["embedding_moments"][0], dtype, "embedding")


@emulation
@every_dtype
@pytest.mark.parametrize("view", DENSE_ROWS.values(), ids=DENSE_ROWS)
def test_layer_norm(lib, dtype, view):
    dy, x, weight = view(randn(3, 5, 20, dtype=dtype)), view(randn(3, 5, 20, dtype=dtype)), randn(21, dtype=dtype)[1:]
    got = lib.layer_norm_moments(dy, x, None, None, weight, 1e-5)
    within(got, (dy, x, None, None, weight, 1e-5, [True] * 3), OPS["layer_norm_moments"][0], dtype, "layer_norm")


@emulation
@every_dtype
def test_group_norm(lib, dtype):
    off = DENSE_ROWS["one element off"]
    dy, x, weight = off(randn(3, 6, 5, dtype=dtype)), off(randn(3, 6, 5, dtype=dtype)), randn(7, dtype=dtype)[1:]
    got = lib.group_norm_moments(dy, x, None, None, weight, 2, 1e-5)
    within(got, (dy, x, None, None, weight, 2, 1e-5, [True] * 3), OPS["group_norm_moments"][0], dtype, "group_norm")


@emulation
def test_group_norm_of_more_groups_than_run_at_once(lib):
    dy, x, weight = randn(17, 4, 3), randn(17, 4, 3), randn(4)
    got = lib.group_norm_moments(dy, x, None, None, weight, 4, 1e-5, multiprocessors=1)
    arguments = (dy, x, None, None, weight, 4, 1e-5, [True] * 3)
    within(got, arguments, OPS["group_norm_moments"][0], torch.float32, "group_norm")


@emulation
@every_dtype
@pytest.mark.parametrize("moved", range(4), ids=["params", "grads", "sums_grad_squared", "state"])
def test_step(lib, dtype, moved):
    def place(tree):
        if moved == 3:
            tree[3:5] = (laid_out(t, (1,), 1) for t in tree[3:5])
        else:
            tree[moved] = [laid_out(t, t.stride(), 1) if t.numel() else t for t in tree[moved]]
        return tree

    check_step(lib, step_arguments(KINDS["adam"], dtype), dtype, place, **options(KINDS["adam"]))


@emulation
@pytest.mark.parametrize("capability", [80, 90])
def test_more_than_two_to_the_31_elements_apart(lib, capability):
    dtype = torch.bfloat16
    for positions in (1, 18):
        dy, x = far(randn(2, positions, 24, dtype=dtype)), far(randn(2, positions, 16, dtype=dtype))
        check_linear(lib, dy, x, capability=capability)
    dy, x = far(randn(2, 7, 16, dtype=dtype)), far(randn(2, 7, 16, dtype=dtype))
    indices = torch.randint(3, (2, 7))
    within(lib.embedding_moments(dy, indices, 3), (dy, indices, 3, -1), OPS["embedding_moments"][0], dtype, "embedding")
    got = lib.layer_norm_moments(dy, x, None, None, None, 1e-5)
    within(got, (dy, x, None, None, None, 1e-5, [True] * 3), OPS["layer_norm_moments"][0], dtype, "layer_norm")
    got = lib.conv_moments(dy.mT, x.mT, (1,), (1,), (0,), (1,), 16)
    check(got[2:], lambda b, d: dy[b].to(d).sum(0), 2, (16,), dtype)
    grad = far(randn(2, 40, dtype=dtype))
    check(lib.reduce_moments(grad), lambda b, d: grad[b].to(d), 2, (40,), dtype)


# Each dimension of each op without elements.
NOTHING = {
    "linear": lambda lib, n: lib.linear_moments(torch.randn(n[:3]), torch.randn(*n[:2], n[3]), True),
    "linear on Hopper": lambda lib, n: lib.linear_moments(
        torch.randn(n[:3]).bfloat16(), torch.randn(*n[:2], n[3]).bfloat16(), True, capability=90
    ),
    "bias": lambda lib, n: lib.bias_moments(torch.randn(n[:3])),
    "reduce": lambda lib, n: lib.reduce_moments(torch.randn(n[:2])),
    "conv": lambda lib, n: lib.conv_moments(
        torch.randn(n[0], n[2], n[1]), torch.randn(n[0], n[3], n[1]), (1,), (1,), (0,), (1,), 1
    ),
    "depthwise": lambda lib, n: lib.conv_moments(
        torch.randn(n[0], n[2], n[1]), torch.randn(n[0], n[2], n[1]), (1,), (1,), (0,), (1,), max(n[2], 1)
    ),
    "embedding": lambda lib, n: lib.embedding_moments(torch.randn(n[:3]), torch.randint(4, n[:2]), 4),
    "layer norm": lambda lib, n: lib.layer_norm_moments(
        torch.randn(n[:3]), torch.randn(n[:3]), None, None, torch.randn(n[2]), 1e-5
    )[1:],
    "group norm": lambda lib, n: lib.group_norm_moments(
        torch.randn(n[:3]), torch.randn(n[:3]), None, None, torch.randn(n[1]), 1, 1e-5
    )[1:],
}


DIMENSIONS = {"linear": 4, "linear on Hopper": 4, "reduce": 2, "conv": 4}  # three, if not here


@emulation
@pytest.mark.parametrize(("name", "dimension"), [(n, d) for n in NOTHING for d in range(DIMENSIONS.get(n, 3))])
def test_no_elements(lib, name, dimension):
    sizes = [2, 3, 8, 16]
    sizes[dimension] = 0
    got = NOTHING[name](lib, sizes)
    if dimension == 3:  # no inputs: a weight without elements, but a bias
        assert got[0].numel() == got[1].numel() == 0 and (got[3] > 0).all()
    else:
        assert all((t == 0).all() for t in got)


@emulation
def test_step_of_nothing(lib):
    for sizes in ([], [(0,)], [(0, 3)] * 600):
        arguments = step_arguments(KINDS["adam"], sizes=sizes)
        seen = arguments[5].clone()
        lib.optimizer_step_(*arguments, **options(KINDS["adam"]))
        assert torch.equal(arguments[5], seen + 6)


def test_every_call_of_the_runtime_is_checked():
    calls = []
    for path in sorted((CSRC / "cuda").glob("*.cu*")):
        text = re.sub(r"//.*", "", path.read_text())
        calls += re.findall(r"([\w(=? ]*)\b(cuda[A-Z]\w*)\(", text)
        assert "<<<" not in text, f"{path.name}: a launch past `launch`, which checks"
    assert {name for _, name in calls} >= {"cudaSetDevice", "cudaLaunchKernelEx", "cudaMemsetAsync"}
    unchecked = [name for before, name in calls if "check(" not in before and name != "cudaGetErrorString"]
    assert not unchecked


def test_every_launcher_gets_the_current_device_and_stream():
    # Only OnCuda makes a cuda::Device that has a stream.
    makers = [
        p.name
        for p in sorted((CSRC / "bindings").glob("*"))
        if re.search(r"cuda::Device \w+[;{(]|cuda::device\(", p.read_text())
    ]
    assert makers == ["cuda.cpp", "cuda.h"]
    for path in sorted((CSRC / "bindings").glob("*.cpp")):
        for call in re.findall(
            r"\bcuda(?:::\w+_moments|::optimizer_step|_kernel)\((.*?)\);", path.read_text(), re.DOTALL
        ):
            assert "OnCuda(where)" in call, f"{path.name}: {call}"
