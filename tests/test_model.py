"""Whole models: the oracle, checks that need no tolerance, nesting, and structures of inputs and outputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from models import Plain, adam, backward, converted_net, half_square_mean, mlp, net_data, randn, squares, weighted_sum
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import perexample as px
from perexample.testing import assert_moments, assert_within_budget, oracle


def sum_loss(output, target):
    return half_square_mean(output, target) * len(output)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss_fn", "reduction"), [(half_square_mean, "mean"), (sum_loss, "sum")], ids=["mean", "sum"])
@pytest.mark.parametrize("which", ["plain", "net"])
class TestOracle:
    """Against the loop over examples. Eight of them: a share of the batch is then exact in bfloat16 too."""

    def case(self, which, dtype):
        torch.manual_seed(0)
        if which == "plain":
            return px.convert(Plain().to(dtype)), (randn(8, 2, 6, 5, dtype=dtype),), randn(8, 6, 3, seed=1, dtype=dtype)
        x, tokens, y = net_data(8, dtype)
        return converted_net(dtype), (x, tokens), y

    def expected(self, model, inputs, y, loss_fn, reduction, dtype):
        exact = oracle(model, loss_fn, inputs, y, reduction=reduction)
        return exact, exact if dtype == torch.float64 else oracle(
            model, loss_fn, inputs, y, reduction=reduction, dtype=dtype
        )

    def test_one_backward(self, which, loss_fn, reduction, dtype):
        model, inputs, y = self.case(which, dtype)
        backward(model, *inputs, target=y, loss_fn=loss_fn)
        assert_moments(model, *self.expected(model, inputs, y, loss_fn, reduction, dtype))
        assert model._examples.total.item() == 8

    def test_two_unequal_micro_batches_are_one_batch(self, which, loss_fn, reduction, dtype):
        model, inputs, y = self.case(which, dtype)
        for rows in (slice(0, 5), slice(5, 8)):
            part = [t[rows] for t in inputs]
            share = len(y[rows]) / len(y) if reduction == "mean" else 1.0
            (loss_fn(model(*part), y[rows]) * share).backward()
        assert_moments(model, *self.expected(model, inputs, y, loss_fn, reduction, dtype))
        assert model._examples.total.item() == 8


class TestWithoutTolerance:
    """MATHS, 'Checks that need no tolerance to speak of'. Where a sum changes its order: that rounding, and no more."""

    def assert_same(self, actual: list[Tensor], expected: list[Tensor]):
        for a, e in zip(actual, expected, strict=True):
            assert_within_budget(a, e, e, a.dtype, "sum_grad_squared")

    def test_permuting_the_examples_changes_nothing(self):
        model, (x, tokens, y) = converted_net(), net_data(9)
        backward(model, x, tokens, target=y)
        expected = squares(model)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
        model.zero_grad()
        backward(model, x[order], tokens[order], target=y[order])
        self.assert_same(squares(model), expected)

    def test_second_moment_of_a_union_is_the_sum(self):
        model, (x, tokens, y) = converted_net(), net_data(9)
        parts = []
        for rows in (slice(0, 4), slice(4, 9), slice(0, 9)):
            model.zero_grad()
            backward(model, x[rows], tokens[rows], target=y[rows], loss_fn=sum_loss)
            parts.append(squares(model))
        self.assert_same(parts[2], [a + b for a, b in zip(parts[0], parts[1], strict=True)])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("power", [-3, 5])
    def test_scaling_the_loss_by_a_power_of_two_scales_the_moments_to_the_bit(self, power, dtype):
        model, (x, tokens, y) = converted_net(dtype), net_data(4, dtype)
        backward(model, x, tokens, target=y, loss_fn=weighted_sum)
        grads, expected = [p.grad.clone() for p in model.parameters()], squares(model)
        model.zero_grad()
        backward(model, x, tokens, target=y, loss_fn=lambda output, target: weighted_sum(output, target * 2.0**power))
        for p, grad, square in zip(model.parameters(), grads, expected, strict=True):
            assert torch.equal(p.grad, grad * 2.0**power) and torch.equal(p.sum_grad_squared, square * 4.0**power)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_one_example_gives_the_square_of_the_gradient(self, dtype):
        model, (x, tokens, y) = converted_net(dtype), net_data(1, dtype)
        backward(model, x, tokens, target=y)
        for name, p in model.named_parameters():
            assert torch.equal(p.sum_grad_squared, p.grad.square()), name

    def test_the_one_dimensional_example_of_the_slides(self):
        """½(β - y)²: c_b = (β - y_b) / B exactly, and at the optimum of the population the batch gradient is not 0."""
        beta = px.convert(nn.Linear(1, 1, bias=False).double())
        y = torch.tensor([[1.0], [2.0], [4.0], [9.0]], dtype=torch.float64)
        nn.init.constant_(beta.weight, 4.5)
        backward(beta, torch.ones_like(y), target=y)
        c = (4.5 - y) / 4
        assert beta.weight.grad.item() == c.sum().item() == 0.5
        assert beta.weight.sum_grad_squared.item() == c.square().sum().item()


class TestBits:
    """The same bits on every run."""

    def run(self, dtype):
        model, (x, tokens, y) = converted_net(dtype), net_data(33, dtype)
        backward(model, x, tokens, target=y)
        return [p.grad for p in model.parameters()], squares(model)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_two_runs(self, dtype):
        first, second = self.run(dtype), self.run(dtype)
        assert all(
            torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_one_thread_and_two(self, dtype):
        threads = torch.get_num_threads()
        results = []
        try:
            for n in (1, 2):
                torch.set_num_threads(n)
                model = px.convert(
                    nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(2), nn.Linear(36, 70)).to(dtype)
                )
                nn.init.ones_(model[0].weight), nn.init.ones_(model[3].weight)
                nn.init.ones_(model[0].bias), nn.init.ones_(model[3].bias)
                # The stock part of backward may depend on the threads: one gradient, set by hand, for every layer.
                for layer, shape in ((model[0], (40, 3, 8, 8)), (model[1], (40, 8, 6, 6)), (model[3], (40, 8, 36))):
                    x = randn(*shape, dtype=dtype)
                    y = layer(x)
                    y.backward(randn(*y.shape, seed=1, dtype=dtype))
                results.append([t for p in model.parameters() for t in (p.grad, p.sum_grad_squared)])
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Encoder(nn.Module):
    """A model of two parts that can be called by themselves."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = mlp(torch.float64), nn.Linear(3, 2).double()

    def forward(self, x):
        return self.head(self.encoder(x).tanh())


@pytest.mark.parametrize(
    "order", [("whole", "encoder"), ("encoder", "whole"), ("whole", "encoder", "whole")], ids="-".join
)
class TestNested:
    """A part that is converted as well, before or after the whole."""

    def model(self, order):
        torch.manual_seed(0)
        model = Encoder()
        for which in order:
            px.convert(model if which == "whole" else model.encoder)
        return model

    def test_the_whole_counts_each_example_once(self, order):
        model, x, y = self.model(order), randn(6, 5), randn(6, 2, seed=1)
        backward(model, x, target=y)
        assert_moments(model, oracle(model, half_square_mean, x, y))
        assert model._examples.total.item() == 6 and model.encoder._examples is model._examples

    def test_the_part_by_itself_counts_too(self, order):
        model, x, y = self.model(order), randn(6, 5), randn(6, 3, seed=1)
        backward(model.encoder, x, target=y)
        assert_moments(model.encoder, oracle(model.encoder, half_square_mean, x, y))
        assert model._examples.total.item() == 6

    def test_both_in_one_backward_count_as_separate_examples(self, order):
        model, x = self.model(order), randn(6, 5)
        y, z = randn(6, 2, seed=1), randn(6, 3, seed=2)
        (half_square_mean(model(x), y) + half_square_mean(model.encoder(x), z)).backward()
        whole = oracle(model, half_square_mean, x, y)
        part = oracle(model.encoder, half_square_mean, x, z)
        for name, p in model.encoder.named_parameters():
            expected = whole[f"encoder.{name}"].sum_grad_squared + part[name].sum_grad_squared
            assert_within_budget(p.sum_grad_squared, expected, expected, torch.float64, name)
        assert model._examples.total.item() == 12

    def test_a_step_knows_every_example_and_every_parameter_by_its_full_name(self, order):
        model, x = self.model(order), randn(6, 5)
        opt = adam(model)
        backward(model, x, target=randn(6, 2, seed=1))
        opt.step()
        assert all(opt.state[p]["examples"].item() == 6 for p in model.parameters())
        moments = [moment.name for ref in model._examples.moments if (moment := ref()) is not None]
        assert sorted(moments) == sorted(name for name, _ in model.named_parameters())

    def test_the_part_may_be_called_twice_inside_of_the_whole(self, order):
        model, x, y = self.model(order), randn(6, 3), randn(6, 2, seed=1)
        model.encoder[0].weight = nn.Parameter(randn(8, 3))
        call = type(model).forward
        try:
            type(model).forward = lambda self, x: self.head(self.encoder(self.encoder(x)))
            expected = oracle(model, half_square_mean, x, y)
            backward(model, x, target=y)
        finally:
            type(model).forward = call
        assert_moments(model, expected)
        assert model._examples.total.item() == 6

    def test_after_a_raise_in_the_whole_the_part_can_be_called(self, order):
        model, x, y = self.model(order), randn(6, 5), randn(6, 3, seed=1)
        model.head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x[:4])
        backward(model.encoder, x, target=y)
        assert_moments(model.encoder, oracle(model.encoder, half_square_mean, x, y))
        assert model._examples.total.item() == 6


def test_a_single_layer_converted_as_a_part_keeps_counting_with_the_whole():
    model, x, y = px.convert(mlp(torch.float64)), randn(6, 5), randn(6, 3, seed=1)
    px.convert(model[0])
    opt = adam(model)
    backward(model, x, target=y)
    assert model._examples is model[0]._examples and model._examples.total.item() == 6
    opt.step()
    opt.zero_grad()
    backward(model[0], x, target=randn(6, 8))
    assert model._examples.total.item() == 6


def test_a_raise_in_the_whole_leaves_its_parts_usable():
    model, x = px.convert(MayRaise()), randn(6, 5)
    with pytest.raises(ZeroDivisionError):
        model(x[:4])
    model.encoder(x)


class MayRaise(nn.Module):
    """Raises after its first part."""

    def __init__(self):
        super().__init__()
        self.encoder = mlp(torch.float64)

    def forward(self, x):
        return self.encoder(x) / (0 // 0)


@dataclass
class Output:
    """A model output that is no tensor, list, tuple or dict."""

    logits: Tensor
    hidden: Tensor | None = None


pytree.register_dataclass(
    Output, field_names=["logits", "hidden"], drop_field_names=[], serialized_type_name="tests.Output"
) if (hasattr(pytree, "register_dataclass")) else None


class Wrapped(nn.Module):
    """An MLP whose inputs and outputs are wrapped."""

    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = mlp(torch.float64), wrap

    def forward(self, x=None, *, batch=None):
        return self.wrap(self.net(batch["x"] if x is None else x))


WRAPS = {
    "dict": (lambda y: {"logits": y, "n": 3}, lambda out: out["logits"]),
    "tuple": (lambda y: (None, y, "text"), lambda out: out[1]),
    "nested": (lambda y: [{"a": (y,)}], lambda out: out[0]["a"][0]),
    "dataclass": (lambda y: Output(y), lambda out: out.logits),
    "two": (lambda y: (y[:, :1], y[:, 1:]), lambda out: torch.cat(out, 1)),
    "one of two": (lambda y: (y * 2, y), lambda out: out[1]),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("how", ["positional", "keyword", "inside a dict"])
def test_inputs_and_outputs_of_any_structure(wrap, how):
    pack, unpack = WRAPS[wrap]
    model, x, y = px.convert(Wrapped(pack)), randn(6, 5), randn(6, 3, seed=1)
    call = {
        "positional": lambda: model(x),
        "keyword": lambda: model(x=x),
        "inside a dict": lambda: model(batch={"x": x}),
    }
    half_square_mean(unpack(call[how]()), y).backward()
    assert_moments(model.net, oracle(model.net, half_square_mean, x, y))
    assert model._examples.total.item() == 6


@pytest.mark.parametrize("change", [lambda y: y.mul_(2), lambda y: y.add_(1), lambda y: F.relu(y, inplace=True)])
def test_the_output_may_be_changed_in_place(change):
    model, x, y = px.convert(mlp(torch.float64)), randn(6, 5), randn(6, 3, seed=1)

    def loss_fn(output, target):
        return half_square_mean(change(output), target)

    expected = oracle(model, loss_fn, x, y)
    backward(model, x, target=y, loss_fn=loss_fn)
    assert_moments(model, expected)
    assert model._examples.total.item() == 6


IN_PLACE = {
    "linear": (nn.Linear(5, 6), (4, 3, 5)),
    "linear without bias": (nn.Linear(5, 6, bias=False), (4, 2, 3, 5)),
    "conv": (nn.Conv1d(5, 6, 2), (4, 5, 3)),
    "transposed conv": (nn.ConvTranspose1d(5, 6, 2), (4, 5, 3)),
    "layer norm": (nn.LayerNorm(5), (4, 3, 5)),
    "group norm": (nn.GroupNorm(1, 3), (4, 3, 5)),
    "instance norm": (nn.InstanceNorm1d(3, affine=True), (4, 3, 5)),
    "RMS norm": (nn.RMSNorm(5), (4, 3, 5)),
    "PReLU": (nn.PReLU(), (4, 3, 5)),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_layer_output_may_be_changed_in_place(name, dtype):
    layer, shape = IN_PLACE[name]
    model = px.convert(nn.Sequential(copy.deepcopy(layer), nn.ReLU(inplace=True)).to(dtype))
    x = randn(*shape).to(dtype)
    y = torch.ones(model(x).shape, dtype=dtype)
    expected = oracle(model, half_square_mean, x, y)
    backward(model, x, target=y)
    assert_moments(model, expected, oracle(model, half_square_mean, x, y, dtype=dtype))


@pytest.mark.parametrize("change", [lambda y: y.mul_(2), lambda y: F.relu(y, inplace=True)])
def test_the_output_of_several_inputs_may_be_changed_in_place(change):
    def loss_fn(output, target):
        return half_square_mean(change(output), target)

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return self.layer(x, x, x)[0].mul_(2)

    for model, inputs in (
        (Attend().double(), [randn(4, 3, 6)]),
        (nn.Bilinear(6, 2, 5).double(), [randn(4, 3, 6), randn(4, 3, 2, seed=1)]),
    ):
        px.convert(model)
        y = torch.ones(model(*inputs).shape).double()
        expected = oracle(model, loss_fn, inputs, y)
        loss_fn(model(*inputs), y).backward()
        assert_moments(model, expected)


def test_dropout_draws_as_in_the_stock_model_and_examples_stay_separate():
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.Linear(8, 3)).double()
    model, x, y = px.convert(copy.deepcopy(stock)), randn(6, 5), randn(6, 3, seed=1)
    outputs = []
    for module in (stock, model):
        torch.manual_seed(7)
        outputs.append(module(x))
        half_square_mean(outputs[-1], y).backward()
    assert torch.equal(*outputs)
    mask = model[1](torch.ones(6, 8).double()) * 0
    hidden = stock[0](x)
    torch.manual_seed(7)
    mask = F.dropout(torch.ones_like(hidden))
    c = ((outputs[0] - y) / 6).detach()[:, :, None] * (hidden * mask).detach()[:, None, :]
    assert_within_budget(model[2].weight.sum_grad_squared, c.square().sum(0), c.square().sum(0), torch.float64, "head")
