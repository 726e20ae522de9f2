"""Each layer against the oracle, over the case tables, and against its stock class."""

from __future__ import annotations

import copy
import zlib

import pytest
import torch
from models import randn, weighted_sum
from torch import nn

import perexample as px
from perexample import autograd, testing
from perexample.testing import assert_moments, assert_within_budget, oracle

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = [*testing.LINEAR_CASES, *testing.CONV_CASES, *testing.NORM_CASES, *testing.EMBEDDING_CASES]
FEW = [
    testing.LinearCase(4, (3,), 5, 6),
    testing.ConvCase(3, 4, 6, (7,), 3, {"groups": 2}),
    testing.ConvCase(3, 4, 6, (7, 5), 3, {"padding": 1}),
    testing.ConvCase(2, 2, 3, (4, 5, 4), 2),
    testing.NormCase((4, 3, 6), (6,)),
    testing.NormCase((3, 6, 5, 4), groups=3),
]


def build(case, dtype=torch.float64):
    """The stock layer of `case` with parameters away from their initial ones and zeros, its input and a gradient."""
    torch.manual_seed(zlib.crc32(str(case).encode()))
    if isinstance(case, testing.LinearCase):
        layer = nn.Linear(case.inputs, case.outputs, bias=case.bias)
        x = torch.randn(case.batch, *case.positions, case.inputs)
    elif isinstance(case, testing.ConvCase):
        layer = CONV[case.spatial](case.channels, case.outputs, case.kernel_size, **case.arguments)
        x = torch.randn(case.batch, case.channels, *case.size)
    elif isinstance(case, testing.NormCase):
        x = torch.randn(case.shape) * 2 + 1
        if case.groups:
            layer = nn.GroupNorm(case.groups, case.shape[1])
        else:
            layer = nn.LayerNorm(case.normalized, bias=case.bias)
    else:
        layer = nn.Embedding(case.rows, case.width, padding_idx=case.padding_idx)
        x = torch.randint(0, case.rows, (case.batch, *case.positions))
    for p in layer.parameters():
        nn.init.normal_(p)
    layer = layer.to(dtype)
    x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
    return layer, x, torch.randn(layer(x).shape).to(dtype)


def ours(layer):
    """A copy of a stock layer as ours, by the other door than px.convert: the class itself."""
    twin = copy.deepcopy(layer)
    twin.__class__ = getattr(px.nn, type(layer).__name__)
    twin._join(px.moments.ExampleCount(), "")
    return twin


def check(layer, x, target, loss_fn=weighted_sum):
    """Output, input gradient and moments of our version of `layer`."""
    dtype = layer.weight.dtype
    expected = oracle(layer, loss_fn, x.detach(), target, reduction="sum")
    stock = (
        expected if dtype == torch.float64 else oracle(layer, loss_fn, x.detach(), target, reduction="sum", dtype=dtype)
    )
    results = []
    for module in (copy.deepcopy(layer).double(), copy.deepcopy(layer), ours(layer)):
        cast = x.detach().to(module.weight.dtype) if x.is_floating_point() else x
        leaf = cast.requires_grad_() if x.requires_grad else cast
        y = module(leaf)
        loss_fn(y, target.to(y.dtype)).backward()
        results.append((module, y, leaf.grad))
    (_, _, exact_dx), (_, stock_y, stock_dx), (module, y, dx) = results
    assert y.stride() == stock_y.stride()
    if isinstance(layer, nn.Linear) and dtype == torch.bfloat16 and not x.is_contiguous():
        stock_y = layer(x.contiguous())  # of other layouts stock PyTorch rounds the product, and then the sum
    assert torch.equal(y, stock_y)
    if x.requires_grad:
        assert dx.dtype == dtype
        if dtype == torch.float64:
            # Nothing is more exact here; PyTorch's own rounding error, which scales with eps, is read off in float32.
            single, leaf = copy.deepcopy(layer).float(), x.detach().float().requires_grad_()
            loss_fn(single(leaf), target.float()).backward()
            stock_dx = exact_dx + (leaf.grad - exact_dx) * (torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
        assert_within_budget(dx, exact_dx, stock_dx, dtype, "input gradient")
    assert_moments(module, expected, stock)
    return module


def runs(case, dtype):
    """Whether stock PyTorch has this case in this dtype on this machine."""
    try:
        layer, x, target = build(case, dtype)
        weighted_sum(layer(x), target).backward()
    except RuntimeError as error:
        assert "not implemented" in str(error)
        return False
    return True


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_stock_forward_and_oracle_moments(case, dtype):
    if not runs(case, dtype):
        pytest.skip(f"stock PyTorch has no {dtype} here")
    check(*build(case, dtype))


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
def test_frozen_parameters_get_nothing_and_the_others_stay_exact(case, frozen):
    layer, x, target = build(case)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    module = check(layer, x, target)
    for name in frozen:
        assert getattr(module, name).grad is None and getattr(module, name).sum_grad_squared is None


@pytest.mark.parametrize("case", FEW, ids=str)
def test_freezing_and_thawing_after_the_fact(case):
    layer, x, target = build(case)
    module = ours(layer)
    for requires_grad in (True, False, True):
        module.zero_grad()
        module.weight.requires_grad_(requires_grad)
        weighted_sum(module(x.detach()), target).backward()
        assert (module.weight.sum_grad_squared is not None) == requires_grad
        assert module.bias.sum_grad_squared is not None


@pytest.mark.parametrize("case", [*FEW, testing.LinearCase(4, (3, 5), 5, 6), testing.LinearCase(4, (), 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
class TestMemory:
    """Layouts other than contiguous."""

    def test_transposed_input(self, case, dtype):
        layer, x, target = build(case, dtype)
        x = x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        assert not x.is_contiguous()
        check(layer, x, target)

    def test_every_other_element_of_a_larger_input(self, case, dtype):
        layer, x, target = build(case, dtype)
        x = torch.stack([x.detach(), torch.full_like(x, float("nan"))], -1)[..., 0].requires_grad_()
        check(layer, x, target)

    def test_expanded_input_and_expanded_gradient(self, case, dtype):
        layer, x, target = build(case, dtype)
        x = x.detach()[:1].expand_as(x).requires_grad_()
        check(layer, x, target, loss_fn=lambda output, _: output.sum())

    def test_gradient_expanded_over_positions(self, case, dtype):
        layer, x, target = build(case, dtype)
        check(layer, x, target, loss_fn=lambda output, y: (output.flatten(1).sum(1) * y.flatten(1)[:, 0]).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [FEW[2], FEW[3], FEW[5]], ids=str)
def test_channels_last(case, dtype):
    layer, x, target = build(case, dtype)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    assert not x.is_contiguous()
    check(layer.to(memory_format=layout), x, target.contiguous(memory_format=layout))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_autocast_moments_within_budget_and_gradients_float32(case):
    layer, x, target = build(case, torch.float32)
    x, module = x.detach(), ours(layer)
    with torch.autocast("cpu", torch.bfloat16):
        stock_y, y = layer(x), module(x)
        weighted_sum(y, target).backward()
    if y.dtype == torch.bfloat16:
        x, target = x.bfloat16(), target.bfloat16()  # what the layer saw; from there on nothing is rounded to bfloat16
    expected = oracle(layer, weighted_sum, x, target, reduction="sum")
    stock = oracle(layer, weighted_sum, x, target, reduction="sum", dtype=torch.float32)
    assert y.dtype == stock_y.dtype and torch.equal(y, stock_y)
    assert all(p.grad.dtype == p.sum_grad_squared.dtype == torch.float32 for p in module.parameters())
    assert_moments(module, expected, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 8), (0, 5, 8), (3, 4, 2, 8)], ids=str)
def test_linear_rounds_once_whatever_the_layout_of_its_input(shape, dtype):
    layer = nn.Linear(8, 7).to(dtype)
    x = torch.randn(shape).to(dtype)
    y = ours(layer)(x.transpose(0, 1))
    assert torch.equal(y, layer(x.transpose(0, 1).contiguous())) and y.requires_grad
    y.add_(1)  # autograd forbids it for a view
    y.sum().backward()


def test_autocast_of_a_model_whose_norm_sees_bfloat16():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4)
    )
    px.convert(model)
    x, target = randn(5, 3, 8, dtype=torch.float32), randn(5, 6, 4, seed=1, dtype=torch.float32)
    expected = oracle(model, weighted_sum, x, target, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        stock = oracle(model, weighted_sum, x, target, reduction="sum", dtype=torch.float32)
        weighted_sum(model(x), target).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert_moments(model, expected, stock)


@pytest.mark.parametrize("case", [*FEW, testing.EmbeddingCase(4, (6,), 5, 7)], ids=str)
def test_state_dict_repr_and_arguments_are_the_stock_ones(case):
    layer, _, _ = build(case)
    converted = px.convert(copy.deepcopy(layer))
    assert list(converted.state_dict()) == list(layer.state_dict())
    assert repr(converted) == repr(layer)
    assert isinstance(converted, type(layer)) and type(converted) is getattr(px.nn, type(layer).__name__)


@pytest.mark.parametrize(
    ("stock", "name", "arguments"),
    [
        (nn.Linear, "Linear", (3, 4)),
        (nn.Conv1d, "Conv1d", (2, 3, 3)),
        (nn.Conv2d, "Conv2d", (2, 3, 3)),
        (nn.Conv3d, "Conv3d", (2, 3, 3)),
        (nn.LayerNorm, "LayerNorm", (4,)),
        (nn.GroupNorm, "GroupNorm", (2, 4)),
        (nn.Embedding, "Embedding", (5, 3)),
    ],
)
def test_built_directly_a_layer_starts_from_the_stock_initialisation(stock, name, arguments):
    torch.manual_seed(0)
    expected = stock(*arguments, dtype=torch.float64).state_dict()
    torch.manual_seed(0)
    layer = getattr(px.nn, name)(*arguments, dtype=torch.float64)
    assert all(torch.equal(value, expected[key]) for key, value in layer.state_dict().items())
    x = torch.randint(0, 5, (4, 6)) if name == "Embedding" else randn(4, *{"Conv": (2, 5, 5, 5)}.get(name[:4], (4,)))
    if name.startswith("Conv"):
        x = x[(..., *[0] * (3 - int(name[4])))]
    if name == "Linear":
        x = x[:, :3]
    y = layer(x)
    target = randn(*y.shape, seed=1)
    weighted_sum(y, target).backward()
    assert_moments(layer, oracle(layer, weighted_sum, x, target, reduction="sum"))


def leaf_of(p):
    return torch.zeros((), dtype=p.dtype).expand(p.shape).requires_grad_()


FUNCTIONS = {
    "linear": lambda x, w, b, *leaves: autograd.linear(x, w, b, *leaves),
    "conv": lambda x, w, b, *leaves: autograd.conv(x, w, b, *leaves, (2, 1), (1, 0), (1, 2), 2),
    "layer_norm": lambda x, w, b, *leaves: autograd.layer_norm(x, w, b, *leaves, w.shape, 1e-5),
    "group_norm": lambda x, w, b, *leaves: autograd.group_norm(x, w, b, *leaves, 3, 1e-5),
}
SHAPES = {
    "linear": ((2, 2, 3), (2, 3), (2,)),
    "conv": ((2, 2, 3, 3), (2, 1, 2, 2), (2,)),
    "layer_norm": ((2, 2, 2, 2), (2, 2), (2, 2)),
    "group_norm": ((2, 3, 2, 2), (3,), (3,)),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function):
    x, w, b = (randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(SHAPES[function]))
    uses = torch.zeros((), requires_grad=True)
    call = FUNCTIONS[function]
    assert torch.autograd.gradcheck(lambda x, w, b: call(x, w, b, leaf_of(w), leaf_of(b), uses), (x, w, b))
    assert torch.autograd.gradcheck(lambda x, w: call(x, w, None, leaf_of(w), None, None), (x, w))
    assert torch.autograd.gradcheck(lambda x, b: call(x, w.detach(), b, None, leaf_of(b), None), (x, b))


def test_gradcheck_embedding():
    w, indices = randn(5, 3).requires_grad_(), torch.tensor([[0, 1, 1], [4, 2, 4]])
    assert torch.autograd.gradcheck(lambda w: autograd.embedding(indices, w, leaf_of(w), None, None), (w,))


def test_gradcheck_count_examples():
    count, passes = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    x, y = randn(3, 2).requires_grad_(), randn(3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: autograd.count_examples(count, passes, 3, [x, y]), (x, y))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_in_eval_without_grad_and_without_moments_the_layer_is_the_stock_layer(case):
    layer, x, target = build(case)
    module = ours(layer)
    for context in ("eval", "no_moments", "no_grad"):
        module.train(context != "eval").zero_grad()
        layer.zero_grad()
        with {"no_grad": torch.no_grad, "no_moments": px.no_moments}.get(context, torch.enable_grad)():
            y, expected = module(x.detach()), layer(x.detach())
        assert torch.equal(y, expected) and y.requires_grad == (context != "no_grad")
        if y.requires_grad:
            weighted_sum(y, target).backward()
            weighted_sum(expected, target).backward()
            assert all(
                torch.equal(p.grad, q.grad) for p, q in zip(module.parameters(), layer.parameters(), strict=True)
            )
        assert all(p.sum_grad_squared is None for p in module.parameters())
