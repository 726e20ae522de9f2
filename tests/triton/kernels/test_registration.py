"""The kernels behind the dispatcher, in the interpreter in place of the CPU's: opcheck, compile, layers, the step."""

import copy
import warnings

import pytest
import torch
from launching import interpreted, launcher
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import perexample as px
from perexample import _triton
from perexample.ops import OPS
from perexample.testing import assert_moments, oracle

pytestmark = [
    interpreted,
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def triton_serves_the_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is registered over another
        _triton.register("CPU", override=True)


def step(sizes, dtype=torch.float32, **more):
    params, grads = ([torch.rand(size).to(dtype) for size in sizes] for _ in range(2))
    sums = [torch.rand(size) for size in sizes]
    state, count = [torch.rand(64 * len(sizes)) for _ in range(2)], len(sizes)
    scalars = dict(
        batch_size=torch.tensor(4.0), lr=torch.tensor(1e-3), n_g=10.0, n_s=20.0, eps=1e-8, weight_decay=0.1,
        centered=False, squared_denominator=False, lr_times_eps=False, correct_g=True, correct_s=True, power=False,
        mean_reduction=True, maximize=False, guard_rounds=1,
    )  # fmt: skip
    return (params, grads, sums, *state, torch.zeros(count).double(), torch.zeros(count).int()), scalars | more


def samples():
    rand = torch.randn
    return {
        "linear_moments": [
            ((rand(3, 5, 16), rand(3, 5, 8), True), {}),
            ((rand(3, 1, 5).bfloat16(), rand(3, 1, 3).bfloat16(), False), {"dtype": torch.float32}),
            ((rand(2, 3, 7).double(), rand(2, 3, 8).double(), True), {}),  # the reference's
        ],
        "conv_moments": [
            ((rand(2, 4, 6), rand(2, 3, 8), [3], [1], [0], [1], 1, True), {}),
            ((rand(2, 2, 3, 3), rand(2, 2, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1], 2, False, torch.float64), {}),
        ],
        "embedding_moments": [((rand(2, 3, 5), torch.randint(4, (2, 3)), 4), {})],
        "layer_norm_moments": [
            ((rand(2, 3, 8), rand(2, 3, 8), None, None, rand(8), 1e-5, [True, True, True]), {}),
            ((rand(2, 3, 8).half(), rand(2, 3, 8).half(), None, None, rand(8), 1e-5, [False, True, False]), {}),
        ],
        "rms_norm_moments": [((rand(2, 3, 8), rand(2, 3, 8), None, None, 1e-5, [True, True]), {})],
        "group_norm_moments": [((rand(2, 4, 5), rand(2, 4, 5), None, None, rand(4), 2, 1e-5, [True, True, True]), {})],
        "batch_norm_moments": [((rand(2, 4, 5), rand(2, 4, 5), rand(4), rand(4), rand(4), [True] * 3), {})],
        "optimizer_step_": [
            step([(3, 5), (7,)]),
            step([(3, 5), ()], torch.bfloat16, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0)),
        ],
        "lstm_forward_": [
            ((rand(2, 3, 20), rand(3, 3, 5), rand(3, 3, 5), rand(20, 5), None, [], False), {}),
            ((rand(2, 3, 20), rand(3, 3, 2), rand(3, 3, 5), rand(20, 2), rand(2, 5), [3, 1], True), {}),
        ],
        "lstm_backward_": [
            (
                (
                    rand(2, 3, 20),
                    None,
                    rand(3, 5),
                    rand(3, 5),
                    rand(2, 3, 5),
                    rand(2, 3, 20),
                    rand(3, 3, 5),
                    rand(20, 5),
                    None,
                    [3, 2],
                    False,
                ),
                {},
            ),
        ],
        "gru_cell_backward_": [(tuple(rand(3, size) for size in (15, 15, 5, 15, 5, 5)), {})],
        "bias_moments": [((rand(3, 4, 5),), {}), ((rand(2, 3, 4).bfloat16(), torch.float32), {})],
        "reduce_moments": [((rand(4, 2, 9),), {}), ((rand(9),), {}), ((rand(2, 9).half(), torch.float64), {})],
    }


def test_every_op_has_a_kernel_and_a_sample():
    assert set(samples()) == set(_triton.MODULES) == set(OPS)


every_sample = pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, rows in samples().items() for i in range(len(rows))]
)


@every_sample
def test_opcheck_and_the_reference(name, index):
    arguments, keywords = samples()[name][index]
    op = getattr(torch.ops.perexample, name).default
    assert _triton.source(name, "CPU") is not None
    torch.library.opcheck(op, arguments, keywords)
    copies = [copy.deepcopy((arguments, keywords)) for _ in range(2)]
    results = [run(*args, **words) for run, (args, words) in zip((op, OPS[name][0]), copies, strict=True)]
    for actual, expected in zip(*(tree_leaves(pair) for pair in zip(results, copies, strict=True)), strict=True):
        if isinstance(actual, torch.Tensor):
            assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())


# What would wait for a CUDA device, or copy to it from the host: neither can be captured in a graph.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero", "masked_select", "_unique2", "_to_copy"}


class Recording(TorchDispatchMode):
    """The names of the operators of PyTorch that run within it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@every_sample
def test_nothing_waits_for_the_device(name, index):
    arguments, keywords = samples()[name][index]
    if not _triton._served(name, tree_leaves(arguments)[0]):
        pytest.skip("served by the reference")
    with Recording() as ran:
        launcher(name)(*arguments, **keywords)
    assert ran.names and not ran.names & WAITING
    # The same mode sees what it is there to see.
    with Recording() as ran:
        torch.ones(3)[torch.ones(3) > 0].sum().item()
    assert ran.names & WAITING


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 5, bias=False))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(("compiled", "positions"), [(False, ()), (False, (4,)), (True, (4,))])
def test_layers_equal_the_loop_over_examples(compiled, positions):
    model, loss_fn = Net(), nn.functional.mse_loss
    x, y = torch.randn(3, *positions, 6), torch.randn(3, *positions, 5)
    expected, stock = oracle(model, loss_fn, x, y), oracle(model, loss_fn, x, y, dtype=torch.float32)
    px.convert(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    loss_fn(run(x), y).backward()
    assert_moments(model, expected, stock)
