"""The autograd Functions by themselves: their first gradients."""

from __future__ import annotations

import pytest
import torch
from models import randn

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


def test_a_second_differentiation_raises():
    x, w = randn(3, 2, 2).requires_grad_(), randn(2, 2).requires_grad_()
    y = autograd.linear(x, w, None, leaf_of(w), None, None)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
