"""The autograd Functions by themselves: their first gradients, and how large what they make in backward is."""

from __future__ import annotations

import pytest
import torch
from models import randn
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import perexample as px
from perexample import autograd
from perexample.autograd import Parameters

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def leaf_of(p):
    return torch.zeros((), dtype=p.dtype).expand(p.shape).requires_grad_()


def recurrent(mode, gates, projection=0):
    """Four steps of three examples, of which the last ends early, backwards in time."""
    size = projection or 2
    shapes = [(gates * 2, 2), (gates * 2, size), (gates * 2,), (gates * 2,), (size, 2) if projection else None]

    def call(x, h, c, *parameters):
        given = [*parameters, None][:5]
        leaves = Parameters(*(None if p is None else leaf_of(p) for p in given))
        c = c if mode == "LSTM" else None
        y, *last = autograd.recurrent(mode, x, h, c, Parameters(*given), leaves, None, True, [3, 3, 2, 2])
        # What is carried on after the end is no output: nothing may send a gradient there.
        return [y[:2].clone(), y[2:, :2].clone(), *last]

    return call, ((4, 3, 2), (3, size), (3, 2), *(shape for shape in shapes if shape is not None))


BAG = torch.tensor([0, 1, 1, 4, 2, 4]), torch.tensor([0, 3, 3])
FUNCTIONS = {
    "input-major linear": (
        lambda x, w, b: autograd.input_major_linear(x, w, b, leaf_of(w), leaf_of(b), None),
        ((2, 2, 3), (3, 2), (2,)),
    ),
    "conv_transpose": (
        lambda x, w, b: autograd.conv_transpose(
            x, w, b, leaf_of(w), leaf_of(b), None, (2, 1), (1, 0), (1, 0), (1, 2), 2
        ),
        ((2, 2, 3, 2), (2, 1, 2, 2), (2,)),
    ),
    "rms_norm": (lambda x, w: autograd.rms_norm(x, w, leaf_of(w), None, (3,), 1e-5), ((2, 2, 3), (3,))),
    "instance_norm": (
        lambda x, w, b: autograd.instance_norm(x, w, b, leaf_of(w), leaf_of(b), None, 1e-5),
        ((2, 2, 4), (2,), (2,)),
    ),
    "batch_norm": (
        lambda x, w, b: autograd.batch_norm(
            x, w, b, leaf_of(w), leaf_of(b), None, randn(2), randn(2, seed=1).square() + 0.5, 1e-5
        ),
        ((3, 2, 2), (2,), (2,)),
    ),
    "bilinear": (
        lambda x, y, w, b: autograd.bilinear(x, y, w, b, leaf_of(w), leaf_of(b), None),
        ((3, 2, 2), (3, 2, 3), (2, 2, 3), (2,)),
    ),
    "prelu": (lambda x, w: autograd.prelu(x, w, leaf_of(w), None), ((3, 2, 2), (2,))),
    "expand": (lambda w: autograd.expand(w, leaf_of(w), None, 3), ((2, 2),)),
    "bag, weighted": (
        lambda w, factors: autograd.embedding_bag(w, factors, leaf_of(w), None, *BAG, "sum", 2),
        ((5, 2), (6,)),
    ),
    "bag, mean": (lambda w: autograd.embedding_bag(w, None, leaf_of(w), None, *BAG, "mean", None), ((5, 2),)),
    "bag, max": (lambda w: autograd.embedding_bag(w, None, leaf_of(w), None, *BAG, "max", None), ((5, 2),)),
    "LSTM": recurrent("LSTM", 4),
    "LSTM with projections": recurrent("LSTM", 4, projection=1),
    "GRU": recurrent("GRU", 3),
    "RNN": recurrent("RNN_TANH", 1),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function):
    call, shapes = FUNCTIONS[function]
    inputs = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    if function in ("GRU", "RNN"):
        inputs[2].requires_grad_(False)  # they have no cells
    assert torch.autograd.gradcheck(call, inputs)


class Largest(TorchDispatchMode):
    """The size in bytes of the largest storage that any operator returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


def plain(layer):
    """`layer` as a class that no kernel serves."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = layer.weight, layer.bias

        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    return Plain()


# (B, T) positions of 32 features; "channels" where T comes last, "indices" where they are look-ups.
LAYERS = {
    "Linear": (lambda: nn.Linear(32, 32), "positions"),
    "Conv1d": (lambda: nn.Conv1d(32, 32, 3, padding=1), "channels"),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(32, 32, 3, padding=1), "channels"),
    "LayerNorm": (lambda: nn.LayerNorm(32), "positions"),
    "RMSNorm": (lambda: nn.RMSNorm(32), "positions"),
    "GroupNorm": (lambda: nn.GroupNorm(4, 32), "channels"),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(32, affine=True), "channels"),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(32).eval(), "channels"),
    "PReLU": (lambda: nn.PReLU(32), "channels"),
    "Embedding": (lambda: nn.Embedding(100, 32), "indices"),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(100, 32), "indices"),
    "Bilinear": (lambda: nn.Bilinear(32, 32, 32), "twice"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(32, 2, batch_first=True), "three times"),
    "LSTM": (lambda: nn.LSTM(32, 32, batch_first=True), "positions"),
    "LSTM with projections": (lambda: nn.LSTM(32, 32, proj_size=16, batch_first=True), "positions"),
    "GRU": (lambda: nn.GRU(32, 32, batch_first=True), "positions"),
    "RNN": (lambda: nn.RNN(32, 32, batch_first=True), "positions"),
    "exact fallback": (lambda: plain(nn.Linear(32, 32)), "positions"),
}


class Model(nn.Module):
    def __init__(self, layer, kind):
        super().__init__()
        self.layer, self.times = layer, {"twice": 2, "three times": 3}.get(kind, 1)

    def forward(self, x):
        y = self.layer(*[x] * self.times)
        return y if isinstance(y, torch.Tensor) else y[0]


def largest(make, kind, batch, positions):
    torch.manual_seed(0)
    layer = make()
    model = px.convert(Model(layer, kind))
    if isinstance(layer, nn.BatchNorm1d):
        model.layer.eval()
    shape = (batch, 32, positions) if kind == "channels" else (batch, positions, 32)
    x = torch.randint(100, shape[:2]) if kind == "indices" else torch.randn(shape).requires_grad_()
    y = model(x)
    dy = torch.randn_like(y)
    with Largest() as seen:
        y.backward(dy)
    assert all(p.sum_grad_squared is not None for p in model.parameters())
    return seen.nbytes


@pytest.mark.parametrize("which", LAYERS)
def test_nothing_in_backward_grows_as_examples_times_parameters(which):
    make, kind = LAYERS[which]
    few, many = largest(make, kind, 2, 64), largest(make, kind, 64, 2)
    parameter = max(p.nbytes for p in make().parameters())
    if which == "exact fallback":
        assert many >= 64 * parameter  # it does, so that this test can tell
    else:
        assert many <= 2 * max(few, parameter)
