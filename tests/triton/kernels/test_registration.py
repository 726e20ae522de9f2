"""The kernels behind the dispatcher, in the interpreter in place of the CPU's: opcheck, compile, layers, the step."""

import warnings

import pytest
import torch
from launching import interpreted
from torch import nn

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
            ((rand(2, 4, 4, 4), rand(2, 4, 4, 4), [3, 3], [1, 1], [1, 1], [1, 1], 4, False, torch.float64), {}),
        ],
        "embedding_moments": [((rand(2, 3, 5), torch.randint(4, (2, 3)), 4), {})],
        "layer_norm_moments": [
            ((rand(2, 3, 8), rand(2, 3, 8), None, None, rand(8), 1e-5, [True, True, True]), {}),
            ((rand(2, 3, 8).half(), rand(2, 3, 8).half(), None, None, rand(8), 1e-5, [False, True, False]), {}),
        ],
        "rms_norm_moments": [((rand(2, 3, 8), rand(2, 3, 8), None, None, 1e-5, [True, True]), {})],
        "group_norm_moments": [((rand(2, 4, 5), rand(2, 4, 5), None, None, rand(4), 2, 1e-5, [True, True, True]), {})],
        "bias_moments": [((rand(3, 4, 5),), {}), ((rand(2, 3, 4).bfloat16(), torch.float32), {})],
        "reduce_moments": [((rand(4, 2, 9),), {}), ((rand(9),), {}), ((rand(2, 9).half(), torch.float64), {})],
    }


def test_every_op_has_a_sample():
    assert set(samples()) == set(_triton.MODULES)


@pytest.mark.parametrize(("name", "index"), [(name, i) for name, rows in samples().items() for i in range(len(rows))])
def test_opcheck_and_the_reference(name, index):
    arguments, keywords = samples()[name][index]
    op = getattr(torch.ops.perexample, name).default
    assert _triton.source(name, "CPU") is not None
    torch.library.opcheck(op, arguments, keywords)
    for actual, expected in zip(op(*arguments, **keywords), OPS[name][0](*arguments, **keywords), strict=True):
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 5, bias=False))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("positions", [(), (4,)])
def test_layers_equal_the_loop_over_examples(compiled, positions):
    model, loss_fn = Net(), nn.functional.mse_loss
    x, y = torch.randn(3, *positions, 6), torch.randn(3, *positions, 5)
    expected, stock = oracle(model, loss_fn, x, y), oracle(model, loss_fn, x, y, dtype=torch.float32)
    px.convert(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    loss_fn(run(x), y).backward()
    assert_moments(model, expected, stock)
