"""Every op: opcheck, fake against real, the same bits on every run and any number of threads, and who serves it."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from opchecks import kernel, needs_extension
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import perexample
from perexample import _extension
from perexample.ops import NAMESPACE, OPS
from perexample.ops.optimizer import state_starts


def optimizer(sizes, dtype=torch.float32, average=True, square=True, state=torch.float32, **changes):
    params, grads = ([torch.rand(size).to(dtype) for size in sizes] for _ in range(2))
    sums = [torch.rand(size) for size in sizes] if square else []
    averages = [torch.rand(state_starts(params)[-1]).to(state) if kept else None for kept in (average, square)]
    scalars = dict(
        batch_size=torch.tensor(4.0), lr=torch.tensor(1e-3), n_g=10.0, n_s=20.0, eps=1e-8, weight_decay=0.1,
        centered=False, squared_denominator=False, lr_times_eps=False, correct_g=True, correct_s=True, power=False,
        mean_reduction=True, maximize=False, guard_rounds=1,
    )  # fmt: skip
    if square and len(sizes) > 1:
        grads[1] = sums[1] = None
    seen, violations = torch.zeros(len(sizes)).double(), torch.zeros(len(sizes)).int()
    return (params, grads, sums, *averages, seen, violations), scalars | changes


def samples(name, scale=1):
    """(arguments, keyword arguments) of an op; with a `scale` so large that kernels split their work."""
    s, rand = scale, torch.randn
    indices = torch.randint(9, (4 * s, 6))
    table = {
        "linear_moments": lambda: [
            ((rand(12 * s, 6, 5), rand(12 * s, 6, 3), True), {}),
            ((rand(70 * s, 1, 5).bfloat16(), rand(70 * s, 1, 3).bfloat16(), False), {"dtype": torch.float32}),
            ((rand(2, 3, 7 * s).double(), rand(2, 3, 8 * s).double(), True, torch.float32), {}),
            ((rand(2, 1, 6 * s), rand(2, 1, 9 * s), True), {}),
            ((rand(2, 40 * s, 7), rand(2, 40 * s, 8), True), {}),
        ],
        "conv_moments": lambda: [
            ((rand(2 * s, 4, 6), rand(2 * s, 3, 8), [3], [1], [0], [1], 1, True), {}),
            ((rand(2 * s, 4, 6, 5), rand(2 * s, 2, 6, 5), [3, 3], [1, 1], [1, 1], [1, 1], 2, False), {}),
            ((rand(2, 2 * s, 4, 4), rand(2, 3 * s, 4, 4), [1, 1], [1, 1], [0, 0], [1, 1], 1, True), {}),
            ((rand(2, 2 * s, 9, 9), rand(2, 2 * s, 9, 9), [3, 3], [1, 1], [1, 1], [1, 1], 2 * s, True), {}),
            ((rand(2, 4, 20 * s, 3), rand(2, 3, 20 * s, 3), [3, 3], [1, 1], [1, 1], [1, 1], 1, True), {}),
            (
                (rand(2, 4, 2, 3, 2), rand(2, 2, 5, 4, 3), [2, 2, 2], [2, 1, 1], [0, 0, 0], [1, 1, 1], 1, True),
                {"dtype": torch.float64},
            ),
        ],
        "bias_moments": lambda: [
            ((rand(30 * s, 6, 5),), {}),
            ((rand(2, 70 * s, 5).bfloat16(),), {"dtype": torch.float32}),
            ((rand(2, 5, 90 * s).mT,), {}),
            ((rand(2, 3, 40 * s),), {}),
        ],
        "reduce_moments": lambda: [
            ((rand(40 * s, 2, 9),), {}),
            ((rand(900 * s),), {}),
            ((rand(2, 90 * s).half(), torch.float64), {}),
        ],
        "embedding_moments": lambda: [
            ((rand(4 * s, 6, 50), indices, 9), {}),
            ((rand(4 * s, 6, 40).bfloat16(), indices.int(), 9 * s, 2), {"dtype": torch.float32}),
            ((rand(4 * s, 6, 300), torch.zeros_like(indices), 9), {}),
        ],
        "layer_norm_moments": lambda: [
            ((rand(4 * s, 6, 40), rand(4 * s, 6, 40), None, None, rand(40), 1e-5, [True, True, True]), {}),
            (
                (rand(2, 9 * s, 8), rand(2, 9 * s, 8), rand(2, 9 * s), rand(2, 9 * s), None, 1e-5, [True, True, False]),
                {},
            ),
            ((rand(2, 3, 8).half(), rand(2, 3, 8).half(), None, None, rand(8), 1e-5, [False, True, True]), {}),
        ],
        "group_norm_moments": lambda: [
            ((rand(4 * s, 6, 40), rand(4 * s, 6, 40), None, None, rand(6), 2, 1e-5, [True, True, True]), {}),
            ((rand(2, 8, 90 * s), rand(2, 8, 90 * s), rand(2, 4), rand(2, 4), None, 4, 1e-5, [True, True, False]), {}),
            ((rand(2, 8, 3).half(), rand(2, 8, 3).half(), None, None, rand(8), 2, 1e-5, [False, True, True]), {}),
        ],
        "rms_norm_moments": lambda: [
            ((rand(4 * s, 6, 40), rand(4 * s, 6, 40), None, rand(40), 1e-5, [True, True]), {}),
            ((rand(9 * s, 2, 8).mT.contiguous().mT, rand(9 * s, 2, 8), rand(9 * s, 2), None, 1e-5, [True, False]), {}),
            ((rand(2, 3, 8).half(), rand(2, 3, 8).half(), None, rand(8), 1e-5, [False, True]), {}),
        ],
        "batch_norm_moments": lambda: [
            ((rand(4 * s, 6, 40), rand(4 * s, 6, 40), rand(6), rand(6), rand(6), [True, True, True]), {}),
            ((rand(90 * s, 8, 1), rand(90 * s, 8, 1), rand(8), rand(8), None, [True, True, False]), {}),
            ((rand(2, 8, 3).half(), rand(2, 8, 3).half(), rand(8), rand(8), rand(8), [False, True, True]), {}),
        ],
        "lstm_forward_": lambda: [
            ((rand(4, 2 * s, 36), rand(5, 2 * s, 9), rand(5, 2 * s, 9), rand(36, 9), None, [], False), {}),
            (
                (
                    rand(3, 5, 4 * s).double(),
                    rand(4, 5, 2).double(),
                    rand(4, 5, s).double(),
                    rand(4 * s, 2).double(),
                    rand(2, s).double(),
                    [5, 4, 2],
                    True,
                ),
                {},
            ),
        ],
        "lstm_backward_": lambda: [
            (
                (
                    rand(3, 5, 4 * s),
                    rand(3, 5, 2),
                    rand(5, 2),
                    rand(5, s),
                    rand(3, 5, 2),
                    rand(3, 5, 4 * s),
                    rand(4, 5, s),
                    rand(4 * s, 2),
                    rand(2, s),
                    [5, 4, 2],
                    True,
                ),
                {},
            ),
            (
                (
                    rand(2, 3 * s, 8).half(),
                    None,
                    rand(3 * s, 2).half(),
                    rand(3 * s, 2).half(),
                    rand(2, 3 * s, 2).half(),
                    rand(2, 3 * s, 8).half(),
                    rand(3, 3 * s, 2).half(),
                    rand(8, 2).half(),
                    None,
                    [],
                    False,
                ),
                {},
            ),
        ],
        "gru_cell_backward_": lambda: [
            (tuple(rand(40 * s, size) for size in (27, 27, 9, 27, 9, 9)), {}),
            (tuple(rand(3, size).half() for size in (6, 6, 2, 6, 2, 2)), {}),
        ],
        "optimizer_step_": lambda: [
            optimizer([(700 * s,), (3, 5), ()]),
            optimizer([(7000 * s,), (3, 5), (9000 * s,)], torch.bfloat16),
            optimizer([(900 * s,), (3, 5)], torch.bfloat16, state=torch.bfloat16, centered=True, eps=0.1),
            optimizer([(700 * s,), (3, 5)], average=False, square=False),
            optimizer([(3,)] * (9 * s), maximize=True, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0)),
        ],
    }
    torch.manual_seed(1)
    return table[name]()


every_op = pytest.mark.parametrize("name", OPS)
every_sample = pytest.mark.parametrize(
    ("name", "index"), [(name, index) for name in OPS for index in range(len(samples(name)))]
)


def clone(tree):
    return tree_map_only(torch.Tensor, lambda t: t.clone(memory_format=torch.preserve_format), tree)


def run(op, arguments, keywords):
    """All that the op gives or changes, from fresh copies of its arguments."""
    arguments, keywords = clone((arguments, keywords))
    results = op(*arguments, **keywords)
    return [t for t in tree_leaves((results, arguments)) if isinstance(t, torch.Tensor)]


@every_sample
def test_opcheck(name, index):
    arguments, keywords = samples(name)[index]
    torch.library.opcheck(kernel(name), arguments, keywords)


@every_sample
def test_fake_kernel_gives_the_shapes_dtypes_and_strides_of_the_real_one(name, index):
    arguments, keywords = samples(name)[index]
    for op in (OPS[name][0], kernel(name)):
        copies = clone((arguments, keywords))
        real = op(*copies[0], **copies[1])
        with FakeTensorMode() as mode:
            fakes = tree_map_only(torch.Tensor, mode.from_tensor, (arguments, keywords))
            fake = kernel(name)(*fakes[0], **fakes[1])
        if real is None:
            assert fake is None
            continue
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@every_sample
def test_same_bits_on_every_run_and_any_number_of_threads(name, index):
    arguments, keywords = samples(name, 60)[index]
    expected = run(kernel(name), arguments, keywords)
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        for a, e in zip(run(kernel(name), arguments, keywords), expected, strict=True):
            assert torch.equal(a, e), f"{threads} threads"


@every_op
def test_every_op_has_a_reference_a_fake_and_the_tag_of_compilers(name):
    qualified = f"{NAMESPACE}::{name}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeExplicitAutograd")
    assert torch.Tag.pt2_compliant_tag in kernel(name).tags
    assert torch._library.simple_registry.singleton.find(qualified).fake_impl.kernel is not None
    assert callable(getattr(perexample.ops, name))


@pytest.mark.parametrize(
    "name", ["linear_moments", "conv_moments", "embedding_moments", "bias_moments", "reduce_moments"]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, "float32"])
def test_a_gradient_of_another_dtype_is_refused(name, dtype):
    arguments, keywords = samples(name)[0]
    message = f"{name}: dtype must be float64, float32, bfloat16 or float16, got {dtype}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        getattr(perexample.ops, name)(*arguments, **keywords, dtype=dtype)


@every_op
@needs_extension
def test_compiled_kernel_serves_every_op(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")


def test_extension_is_built_where_there_is_a_compiler():
    # Without this, a build that silently left the kernels out would only skip tests.
    compilers = [*shlex.split(os.environ.get("CXX", ""))[:1], "c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        pytest.skip("no C++ compiler here")
    assert _extension.info() is not None, "run `pip install --no-build-isolation -e .`"
    assert Path(_extension.LIBRARY).exists()
    assert _extension.info().capability() in _extension.info().capabilities()
