"""Bad input to the layers and models: each message word for word, and training that goes on afterwards."""

from __future__ import annotations

import pytest
import torch
from models import X, adam, assert_nothing_lost, backward, mlp, raises, randn
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import perexample as px

# torch.compile itself does these while it traces an autograd Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]


class Net(nn.Module):
    """Two linear layers, and whatever `forward_fn` does with them. x (B, 4, 5)."""

    def __init__(self, forward_fn=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.forward_fn = nn.Linear(5, 5), nn.Linear(5, 3), forward_fn
        self.double()

    def forward(self, x):
        return self.b(self.a(x)) if self.forward_fn is None else self.forward_fn(self, x)


FOLDED = (
    "{} saw {} rows, the batch has {} examples: a view folded the batch away, or the batch is not dimension 0; keep "
    "the batch as dimension 0 up to this layer (extra dimensions are fine: (batch, positions, features)), pass "
    "px.convert(batch_dim=...) where the whole model has it elsewhere, or run this part under px.no_moments()"
)
REENTRANT = (
    "a was called twice in one forward pass: the uses of its 'weight' have to be added per example before squaring, "
    "at least one of them in torch.utils.checkpoint(use_reentrant=True), whose backward pass is apart; use "
    "use_reentrant=False"
)
WITHOUT = (
    "a was called twice in one forward pass: the uses of its 'weight' have to be added per example before squaring, "
    "one of them without second moments (in eval mode, or under px.no_moments()), so that its part would be missing; "
    "make both alike, or that one under torch.no_grad()"
)
FEW_DIMS = (
    "a: expected an input of at least 2 dimensions with the batch first, got shape (5,); add the batch dimension, or "
    "use px.no_moments()"
)
FORWARDS = {
    "folded batch": (lambda net, x: net.b(net.a(x.flatten(0, 1))).unflatten(0, x.shape[:2]), FOLDED.format("a", 8, 2)),
    "batch not first": (lambda net, x: net.b(net.a(x.transpose(0, 1))).transpose(0, 1), FOLDED.format("a", 4, 2)),
    "batch lost later": (
        lambda net, x: net.b(net.a(x).flatten(0, 1)).unflatten(0, x.shape[:2]),
        FOLDED.format("b", 8, 2),
    ),
    "one use without moments": (lambda net, x: net.b(net.a(without_moments(net.a, x))), WITHOUT),
    "no batch dimension": (lambda net, x: net.b(net.a(x[0, 0]))[None, None], FEW_DIMS),
}


def without_moments(layer, x):
    with px.no_moments():
        return layer(x)


def twice(net, x):
    return net.b(net.a(net.a(x)))


X4, Y4 = randn(2, 4, 5), randn(2, 4, 3, seed=1)


@pytest.mark.parametrize("which", FORWARDS)
class TestForward:
    """What a layer refuses in the forward pass."""

    def test_raises_and_nothing_is_lost(self, which):
        forward_fn, message = FORWARDS[which]
        model = px.convert(Net(forward_fn))
        opt = adam(model)
        with raises(ValueError, message):
            model(X4)
        model.forward_fn = None
        assert_nothing_lost(model, opt, X4, Y4)

    def test_no_moments_and_eval_are_the_way_out(self, which):
        model = px.convert(Net(FORWARDS[which][0]))
        with px.no_moments():
            model(X4)
        model.eval()
        model(X4)


def test_called_twice_under_compile_is_caught_in_step():
    torch.compiler.reset()
    model = px.convert(Net(twice))
    opt = adam(model)
    weights = [p.detach().clone() for p in model.parameters()]
    backward(torch.compile(model, backend="aot_eager", fullgraph=True), X4, target=Y4)
    message = (
        "Adam.step: parameter 'a.weight' was used more than once in one forward pass: its uses have to be added per "
        "example before squaring, which is not supported yet; use a layer of its own for each call"
    )
    with raises(RuntimeError, message):
        opt.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True)) and not opt.state
    with raises(RuntimeError, message):  # whichever of the layer's parameters the optimizer has
        px.optim.Adam([model.a.weight], lr=1e-3, n_g=10, n_s=10).step()
    model.forward_fn = None
    assert_nothing_lost(model, opt, X4, Y4)


def in_one_checkpoint(net, x, reentrant):
    return net.b(checkpoint(lambda h: net.a(net.a(h)), x, use_reentrant=reentrant))


def in_two_checkpoints(net, x, reentrant):
    return net.b(checkpoint(net.a, checkpoint(net.a, x, use_reentrant=reentrant), use_reentrant=reentrant))


@pytest.mark.parametrize("where", [in_one_checkpoint, in_two_checkpoints])
def test_called_twice_under_checkpointing(where):
    model = px.convert(Net(lambda net, x: where(net, x, True)))
    with raises(ValueError, REENTRANT):
        backward(model, X4.clone().requires_grad_(), target=Y4)
    model.forward_fn = lambda net, x: where(net, x, False)
    assert_nothing_lost(model, x=X4, y=Y4)


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (nn.Linear(5, 3), X, "Linear: the input must be torch.float32 like the weight, got torch.float64"),
        (nn.Conv1d(5, 3, 1), X[..., None], "Conv: the input must be torch.float32 like the weight, got torch.float64"),
    ],
)
def test_wrong_dtype(layer, x, message):
    model = px.convert(layer)
    with raises(TypeError, message):
        model(x)
    y = torch.zeros_like(model(x.float()))
    backward(model, x.float(), target=y)
    adam(model).step()


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(5), lambda: nn.GroupNorm(1, 5)])
def test_norms_refuse_what_the_stock_norms_refuse(make):
    layer = make()
    with pytest.raises(RuntimeError) as stock:
        layer(X)
    with pytest.raises(RuntimeError) as ours:
        px.convert(layer)(X)
    assert str(ours.value) == str(stock.value)


def test_inputs_without_a_batch():
    model = px.convert(Net(lambda net, x: net.b(net.a(X4))))
    message = (
        "Net: its inputs hold no tensor whose dimension 0 could be the batch; pass one, or call the model under "
        "px.no_moments()"
    )
    for x in (None, torch.tensor(1.0), "text"):
        with raises(TypeError, message):
            model(x)
    model.forward_fn = None
    assert_nothing_lost(model, x=X4, y=Y4)


def test_an_output_without_tensors_that_can_be_found():
    class Opaque:
        def __init__(self, value):
            self.value = value

    model = px.convert(Net(lambda net, x: Opaque(net.b(net.a(x)))))
    message = (
        "Net returned Opaque, in which no tensor was found to count the examples with; return tensors, lists, tuples "
        "or dicts of them, or register the class with torch.utils._pytree"
    )
    with raises(TypeError, message):
        model(X4)
    model.forward_fn = None
    assert_nothing_lost(model, x=X4, y=Y4)


def test_a_parametrized_weight():
    model = px.convert(mlp(torch.float64))
    parametrizations.weight_norm(model[0])
    message = (
        "0: 'weight' is no longer a plain parameter (a parametrization, or a tensor put in its place); remove it, or "
        "use px.no_moments()"
    )
    with raises(ValueError, message):
        model(X)


def test_a_weight_of_another_converted_model():
    model, other = px.convert(nn.Sequential(nn.Linear(4, 4)).double()), px.convert(nn.Sequential(nn.Linear(4, 4)))
    message = (
        "0.weight: this parameter already belongs to another converted model (as '0.weight'), which counts its "
        "examples by itself; convert one module that contains both"
    )
    with raises(ValueError, message):
        model[0].weight = other[0].weight
    assert_nothing_lost(model, x=randn(6, 4), y=randn(6, 4, seed=1))


@pytest.mark.parametrize("between", [nn.Identity, nn.ReLU])
def test_double_backward(between):
    """Also where nothing between the layers would notice: the penalty's part of the gradient would be missing."""
    model = px.convert(nn.Sequential(nn.Linear(5, 5), between(), nn.Linear(5, 3)).double())
    x = X.clone().requires_grad_()
    message = (
        "a backward pass with create_graph=True went to a converted model, whose layers have no double backward; make "
        "a gradient that is differentiated again (a gradient penalty, say) of a forward pass under px.no_moments()"
    )
    with raises(RuntimeError, message):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with px.no_moments():
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert model[0].weight.grad.any()
    model.zero_grad()
    assert_nothing_lost(model, x=X, y=torch.zeros_like(model(X)))
