"""Bad input to the optimizer and its step: each message word for word, and training that goes on afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from models import X, Y, adam, assert_nothing_lost, backward, half_square_mean, mlp, raises
from torch import nn

import perexample as px

OPTIONS = {
    "lr negative": (ValueError, {"lr": -1.0}, "Adam: lr must be at least 0, got -1.0"),
    "lr nan": (ValueError, {"lr": float("nan")}, "Adam: lr must be at least 0, got nan"),
    "lr inf": (ValueError, {"lr": float("inf")}, "Adam: lr must be finite, got inf"),
    "lr text": (TypeError, {"lr": "1e-3"}, "Adam: lr must be a number, got str"),
    "lr bool": (TypeError, {"lr": True}, "Adam: lr must be a number, got bool"),
    "lr shape": (ValueError, {"lr": torch.ones(2)}, "Adam: lr must be a scalar tensor, got shape (2,)"),
    "n_g": (ValueError, {"n_g": 0.5}, "Adam: n_g must be at least 1, got 0.5"),
    "n_s": (ValueError, {"n_s": 0}, "Adam: n_s must be at least 1, got 0"),
    "n_s none": (TypeError, {"n_s": None}, "Adam: n_s must be a number, got NoneType"),
    "eps": (ValueError, {"eps": -1e-8}, "Adam: eps must be at least 0, got -1e-08"),
    "weight_decay": (ValueError, {"weight_decay": -0.1}, "Adam: weight_decay must be at least 0, got -0.1"),
    "second_moment": (
        ValueError,
        {"second_moment": "both"},
        "Adam: second_moment must be one of per_example, per_batch, got 'both'",
    ),
    "loss_reduction": (
        ValueError,
        {"loss_reduction": "none"},
        "Adam: loss_reduction must be one of mean, sum, got 'none'",
    ),
}


@pytest.mark.parametrize("which", OPTIONS)
def test_optimizer_arguments(which):
    error, options, message = OPTIONS[which]
    model = px.convert(mlp(torch.float64))
    with raises(error, message):
        adam(model, **options)
    with raises(error, message):  # and in a group of its own, which is then not added
        opt = px.optim.Adam(model[0].parameters(), lr=1e-3, n_g=10, n_s=10)
        opt.add_param_group({"params": list(model[2].parameters()), **options})
    assert len(opt.param_groups) == 1
    assert_nothing_lost(model)


@pytest.mark.parametrize("missing", ["lr", "n_g", "n_s"])
def test_the_three_values_for_batch_size_one_have_no_default(missing):
    options = {name: 1.0 for name in ("lr", "n_g", "n_s") if name != missing}
    with pytest.raises(TypeError, match=missing):
        px.optim.Adam([], **options)


NO_LAYER = (
    "Adam: {}, of shape {}, has no second moment: no layer of perexample owns it; call px.convert(model) before "
    "making the optimizer, or use second_moment='per_batch'"
)


def test_optimizer_of_a_parameter_without_second_moment():
    model = mlp(torch.float64)
    with raises(ValueError, NO_LAYER.format("parameter 0 of its group", (8, 5))):
        adam(model)
    with raises(ValueError, NO_LAYER.format("parameter '0.weight'", (8, 5))):
        px.optim.Adam(model.named_parameters(), lr=1e-3, n_g=10, n_s=10)
    px.convert(model[0])
    with raises(ValueError, NO_LAYER.format("parameter 2 of its group", (3, 8))):
        adam(model)
    px.convert(model)
    assert_nothing_lost(model)


def test_complex_parameters():
    with raises(TypeError, "Adam: parameter 0 of its group is complex; only real parameters are supported"):
        px.optim.Adam(
            [nn.Parameter(torch.zeros(2, dtype=torch.complex64))], lr=1e-3, n_g=10, n_s=10, second_moment="per_batch"
        )


@pytest.mark.parametrize(
    ("error", "value", "message"),
    [
        (ValueError, 0, "Adam.step: batch_size must be at least 1, got 0"),
        (ValueError, -3, "Adam.step: batch_size must be at least 1, got -3"),
        (TypeError, 2.0, "Adam.step: batch_size must be an int or a scalar tensor, got float"),
        (TypeError, True, "Adam.step: batch_size must be an int or a scalar tensor, got bool"),
        (TypeError, torch.ones(2), "Adam.step: batch_size must be an int or a scalar tensor, got Tensor"),
    ],
)
def test_batch_size_of_the_step(error, value, message):
    model = px.convert(mlp(torch.float64))
    opt = adam(model)
    backward(model, X, target=Y)
    with raises(error, message):
        opt.step(batch_size=value)
    assert not opt.state
    opt.step()


def no_example(name):
    return (
        f"Adam.step: no example was counted for {name}: the backward pass did not go through the output of a "
        f"converted model (a sub-module was called directly, or px.convert was not); call the model that was "
        f"converted, convert the part that is called (px.convert(model.part)), or pass step(batch_size=...)"
    )


def no_second(name):
    return (
        f"Adam.step: {name} has a gradient but no second moment: its forward pass ran in eval mode, under "
        f"px.no_moments(), or outside of the layer that owns it (F.linear on its weight, say); run the layer itself "
        f"in training mode"
    )


def through_parts(model):
    backward(model[2], model[1](model[0](X)), target=Y)


def in_eval(model):
    model.eval()
    backward(model, X, target=Y)
    model.train()


def in_no_moments(model):
    with px.no_moments():
        backward(model, X, target=Y)


STEPS = {
    "sub-modules called directly": (through_parts, no_example("parameter '0.weight'")),
    "eval": (in_eval, no_second("parameter '0.weight'")),
    "no_moments": (in_no_moments, no_second("parameter '0.weight'")),
    "F.linear on its weight only": (
        lambda model: backward(lambda x: (x @ model[0].weight.t())[:, :3], X, target=Y),
        no_second("parameter '0.weight'"),
    ),
    "backward never came": (
        lambda model: model(X),
        "Adam.step: a forward pass was made, but its backward never came, so no parameter has a gradient; call "
        "loss.backward() before step()",
    ),
    "sparse gradient": (
        lambda model: (
            backward(model, X, target=Y),
            setattr(model[0].weight, "grad", model[0].weight.grad.to_sparse()),
        ),
        "Adam: parameter '0.weight' has a sparse gradient; use a dense one",
    ),
}


@pytest.mark.parametrize("which", STEPS)
def test_step_raises_before_it_changes_anything(which):
    act, message = STEPS[which]
    model = px.convert(mlp(torch.float64))
    opt = adam(model)
    assert_nothing_lost(model, opt)
    before = [p.detach().clone() for p in model.parameters()]
    state = [t.clone() for p in model.parameters() for t in opt.state[p].values()]
    act(model)
    with raises(RuntimeError, message):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(
        torch.equal(s, t)
        for s, t in zip(state, (t for p in model.parameters() for t in opt.state[p].values()), strict=True)
    )
    assert_nothing_lost(model, opt)


def test_layers_without_a_converted_model_need_a_batch_size():
    layer = px.nn.Linear(5, 3, dtype=torch.float64)
    opt = adam(layer)
    backward(layer, X, target=Y)
    with raises(RuntimeError, no_example("parameter 'weight'")):
        opt.step()
    opt.step(batch_size=6)
    assert opt.state[layer.weight]["examples"].item() == 6


PLAIN_UNSCALE = (
    "Adam: GradScaler.unscale_(optimizer) divided the gradients, but not their second moments; use "
    "px.unscale_(scaler, optimizer), or leave it out: GradScaler.step(optimizer) hands the scale over"
)
LATE_BACKWARD = (
    "Adam: a backward pass came after px.unscale_, so that scaled and unscaled gradients are mixed; call it when all "
    "gradients of the step are accumulated"
)
OTHER_SCALER = (
    "Adam: px.unscale_ divided the second moments, but GradScaler.step takes the gradients for scaled; call both with "
    "the same GradScaler"
)


@pytest.mark.parametrize(
    ("way", "message"), [("plain", PLAIN_UNSCALE), ("late", LATE_BACKWARD), ("other", OTHER_SCALER)]
)
def test_grad_scaler_unscale(way, message):
    model = px.convert(mlp())
    opt, scaler = adam(model), torch.amp.GradScaler("cpu")

    def scaled_backward():
        scaler.scale(half_square_mean(model(X.float()), Y.float())).backward()

    scaled_backward()
    if way == "plain":
        scaler.unscale_(opt)
    else:
        px.unscale_(scaler, opt)
    if way == "late":
        scaled_backward()
    stepping = scaler
    if way == "other":
        stepping = torch.amp.GradScaler("cpu")
        stepping.scale(torch.ones(()))
    with raises(RuntimeError, message):
        stepping.step(opt)
    assert not opt.state
    opt.zero_grad()
    scaler.update()
    scaled_backward()
    scaler.step(opt)
    assert opt.state[model[0].weight]["examples"].item() == 6


@pytest.mark.parametrize("how", ["eval", "no_moments"])
@pytest.mark.parametrize("kind", ["SGD", "per batch"])
def test_examples_of_a_pass_that_counts_none_are_missed(how, kind):
    """SGD and per_batch need no second moments, but B: part of the gradient came from examples that nobody counted."""
    model = px.convert(mlp(torch.float64))
    opt = px.optim.SGD(model.parameters(), lr=1e-3) if kind == "SGD" else adam(model, second_moment="per_batch")
    name = type(opt).__name__
    message = (
        f"{name}.step: part of the gradient of parameter '0.weight' came from a forward pass in eval mode or under "
        f"px.no_moments(), whose examples are not counted; make all alike, or pass step(batch_size=...)"
    )
    backward(model, X, target=Y)
    (in_eval if how == "eval" else in_no_moments)(model)
    with raises(RuntimeError, message):
        opt.step()
    assert not opt.state
    opt.step(batch_size=12)
    opt.zero_grad()
    with torch.no_grad():
        model.eval()(X)
    model.train()
    backward(model, X, target=Y)
    opt.step()
    assert opt.state[model[0].weight]["examples"].item() == 18


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_a_pass_in_eval_mode_beside_one_in_training_in_one_backward_pass(kind):
    model = px.convert(mlp(torch.float64))
    opt = px.optim.SGD(model.parameters(), lr=1e-3) if kind == "SGD" else adam(model)
    loss = half_square_mean(model(X), Y)
    loss = loss + 1e-3 * half_square_mean(model.eval()(X[:2]), Y[:2])  # too little for the guard
    model.train()
    loss.backward()
    message = (
        f"{kind}.step: part of the gradient of parameter '0.weight' came from a forward pass in eval mode or under "
        f"px.no_moments(), whose examples are not counted; make all alike"
    )
    with raises(RuntimeError, message + (", or pass step(batch_size=...)" if kind == "SGD" else "")):
        opt.step()
    assert not opt.state
    # Where nothing of it reaches the parameters, it is no business of the step's.
    opt.zero_grad()
    x = X.clone().requires_grad_()
    model.eval()
    torch.autograd.grad(half_square_mean(model(x), Y), x)
    with torch.no_grad():
        target = model(X)
    model.train()
    (half_square_mean(model(X), target) + half_square_mean(model(X), Y)).backward()
    opt.step()
    assert opt.state[model[0].weight]["examples"].item() == 12


def test_a_penalty_that_is_backpropagated_by_itself_is_no_pass():
    model = px.convert(mlp(torch.float64))
    opt = px.optim.SGD(model.parameters(), lr=1e-3)
    backward(model, X, target=Y)
    sum(p.square().sum() for p in model.parameters()).backward()
    opt.step()
    assert opt.state[model[0].weight]["examples"].item() == 6


def test_a_copy_of_the_optimizer_alone_has_parameters_of_no_layer():
    opt = copy.deepcopy(adam(px.convert(mlp(torch.float64))))
    opt.param_groups[0]["params"][0].grad = torch.ones(8, 5, dtype=torch.float64)
    with raises(RuntimeError, NO_LAYER.format("parameter 0 of its group", (8, 5))):
        opt.step()


def test_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    model, twin = px.convert(mlp(torch.float64)), px.convert(mlp(torch.float64))
    opt = adam(model, lr=numpy.float32(0.125), n_g=numpy.int64(50), weight_decay=numpy.float32(0.5))
    other = adam(twin, lr=0.125, n_g=50, weight_decay=0.5)
    for m, o in ((model, opt), (twin, other)):
        backward(m, X, target=Y)
        o.step(batch_size=numpy.int64(6) if o is opt else 6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
