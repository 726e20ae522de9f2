"""Every layer of the general case table against the oracle, and against its stock class."""

from __future__ import annotations

import copy
import io
import zlib

import pytest
import torch
from models import weighted_sum
from on_device import DEVICE, moved
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import perexample as px
from perexample.testing import LAYER_CASES, LayerCase, assert_moments, assert_within_budget, oracle, stock_moments

# Stock layers say so of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# One case of each class, the first; for what need not be tested at every shape.
FEW = list({case.name: case for case in reversed(LAYER_CASES) if case.batch > 1}.values())[::-1]
# What PyTorch does not run on this machine or in this dtype says so in one of these words.
NOT_IMPLEMENTED = ("not implemented", "could not create a primitive", "not supported")


class Batched(nn.Module):
    """The layer of a case as a model: inputs and the one output have the batch first, whatever the layer wants.

    All that the layer returns is laid out side by side, so that everything has a gradient.
    """

    def __init__(self, case: LayerCase) -> None:
        super().__init__()
        self.layer = getattr(nn, case.name)(*case.arguments, **case.keywords)
        self.batch_dim = case.batch_dim
        self.times = 3 if case.name == "MultiheadAttention" and len(case.shapes) == 1 else 1

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.layer(*[x.movedim(0, self.batch_dim) for x in inputs] * self.times)
        if isinstance(output, Tensor):
            return output.movedim(self.batch_dim, 0)
        first, *rest = pytree.tree_leaves(output)
        # Attention weights have the batch first, the states of recurrent layers second.
        dim = 0 if isinstance(self.layer, (nn.MultiheadAttention, nn.LSTMCell)) else 1
        parts = [first.movedim(self.batch_dim, 0), *(part.movedim(dim, 0) for part in rest)]
        return torch.cat([part.flatten(1) for part in parts], 1)


def build(case, dtype=torch.float64):
    """The stock layer as a model, with parameters away from their initial ones and zeros; inputs and a gradient."""
    torch.manual_seed(zlib.crc32(str(case).encode()))
    model = Batched(case)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            nn.init.normal_(buffer) if name.endswith("mean") else nn.init.uniform_(buffer, 0.5, 2)
    inputs = [
        torch.randint(0, case.rows, shape) if i == 0 and case.rows else torch.randn(shape).to(dtype).requires_grad_()
        for i, shape in enumerate(case.shapes)
    ]
    model = model.to(dtype)
    return model, inputs, torch.randn(copy.deepcopy(model)(*inputs).shape).to(dtype)


def runs(case, dtype):
    """Whether stock PyTorch has this case in this dtype on this machine."""
    try:
        model, inputs, target = build(case, dtype)
        weighted_sum(model(*inputs), target).backward()
    except RuntimeError as error:
        assert any(text in str(error) for text in NOT_IMPLEMENTED), error
        return False
    return True


def fresh(inputs, dtype):
    return [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]


def check(model, inputs, target, loss_fn=weighted_sum):
    """Output, input gradients and moments of our version of `model`."""
    dtype = target.dtype
    detached = [x.detach() for x in inputs]
    expected = oracle(model, loss_fn, detached, target, reduction="sum")
    low = dtype if dtype != torch.float64 else torch.float32
    several = 1 if low == torch.float32 else 8  # errors of a few coarse roundings are chance
    stock = stock_moments(model, loss_fn, detached, target, reduction="sum", dtype=low, samples=several)
    results = {}
    for which, module, d in (
        ("exact", copy.deepcopy(model).double(), torch.float64),
        ("stock", copy.deepcopy(model).to(low), low),
        ("ours", px.convert(copy.deepcopy(model)), dtype),
    ):
        leaves = [x.to(d).detach().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
        target_there = target.to(d)
        if DEVICE and which == "ours":
            module, target_there = module.to(DEVICE), target_there.to(DEVICE)
            leaves = [moved(leaf.detach()).requires_grad_(leaf.requires_grad) for leaf in leaves]
        y = module(*leaves)
        loss_fn(y, target_there).backward()
        grads = [leaf.grad if leaf.grad is None else leaf.grad.cpu() for leaf in leaves if leaf.is_floating_point()]
        results[which] = module, [y.detach().cpu(), *grads]
    if dtype == torch.float64:
        # Nothing is more exact here; PyTorch's own rounding error, which scales with eps, is read off in float32.
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        scaled = [e + (s.double() - e) * ratio for e, s in zip(results["exact"][1], results["stock"][1], strict=True)]
        results["stock"] = None, scaled
        stock = {
            name: type(m)(*(
                e + (s.double() - e) * ratio
                for e, s in ((m.grad, stock[name].grad), (m.sum_grad_squared, stock[name].sum_grad_squared))
            ))
            for name, m in expected.items()
        }  # fmt: skip
    for what, ours, exact, theirs in zip(
        ["output", *(f"gradient of input {i}" for i in range(len(inputs)))],
        results["ours"][1],
        results["exact"][1],
        results["stock"][1],
        strict=False,
    ):
        assert ours.dtype == dtype
        # Where a ReLU inside rounds to the other side of zero, all that depends on it jumps: chance, in bfloat16.
        if not (dtype == torch.bfloat16 and any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules())):
            assert_within_budget(ours, exact, theirs, dtype, what)
    assert_moments(results["ours"][0], expected, stock)
    return results["ours"][0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_layer_equals_stock_forward_and_oracle_moments(case, dtype):
    if not runs(case, dtype):
        pytest.skip(f"stock PyTorch has no {dtype} here")
    model = check(*build(case, dtype))
    assert type(model.layer) is getattr(px.nn, case.name)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_frozen_parameters_get_nothing_and_the_others_stay_exact(case):
    kinds: dict[str, list[str]] = {}  # a Transformer's layers freeze alike
    for name, _ in build(case)[0].named_parameters():
        kinds.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    for frozen in kinds.values() if len(kinds) > 1 else []:
        model, inputs, target = build(case)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        model = check(model, inputs, target)
        assert all(model.get_parameter(name).grad is None for name in frozen)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_inputs_that_need_no_gradient(case):
    model, inputs, target = build(case)
    converted = px.convert(copy.deepcopy(model))
    detached = [x.detach() for x in inputs]
    weighted_sum(converted(*detached), target).backward()
    assert_moments(converted, oracle(model, weighted_sum, detached, target, reduction="sum"))


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
class TestMemory:
    """Layouts other than contiguous."""

    def test_transposed_inputs(self, case, dtype):
        model, inputs, target = build(case, dtype)
        for i, x in enumerate(inputs):
            y = x.detach().transpose(0, -1).contiguous().transpose(0, -1)
            inputs[i] = y.requires_grad_(x.requires_grad)
        check(model, inputs, target)

    def test_every_other_element_of_larger_inputs(self, case, dtype):
        model, inputs, target = build(case, dtype)
        for i, x in enumerate(inputs):
            y = torch.stack([x.detach(), torch.full_like(x, float("nan") if x.is_floating_point() else 0)], -1)[..., 0]
            inputs[i] = y.requires_grad_(x.requires_grad)
        check(model, inputs, target)

    def test_expanded_inputs_and_expanded_gradient(self, case, dtype):
        model, inputs, target = build(case, dtype)
        inputs = [x.detach()[:1].expand_as(x).requires_grad_(x.requires_grad) for x in inputs]
        row = target[0]
        check(model, inputs, target, loss_fn=lambda output, _: (output.sum(0) * row.to(output)).sum())


@pytest.mark.parametrize("case", FEW, ids=str)
def test_in_eval_without_grad_and_without_moments_the_layer_is_the_stock_layer(case):
    model, inputs, target = build(case)
    stock, converted = copy.deepcopy(model), px.convert(copy.deepcopy(model))
    for context in ("eval", "no_moments", "no_grad"):
        for module in (stock, converted):
            module.train(context != "eval").zero_grad()
        with {"no_grad": torch.no_grad, "no_moments": px.no_moments}.get(context, torch.enable_grad)():
            y, expected = (m(*(x.detach() for x in inputs)) for m in (converted, stock))
        assert torch.equal(y, expected) and y.requires_grad == (context != "no_grad")
        if y.requires_grad:
            weighted_sum(y, target).backward()
            weighted_sum(expected, target).backward()
            for p, q in zip(converted.parameters(), stock.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)
        assert all(p.sum_grad_squared is None for p in converted.parameters())


@pytest.mark.parametrize("case", FEW, ids=str)
def test_state_dict_repr_deepcopy_and_pickle(case):
    model, inputs, target = build(case)
    converted = px.convert(copy.deepcopy(model))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert repr(converted) == repr(model)
    converted.load_state_dict(model.state_dict())
    model.load_state_dict(converted.state_dict())
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    expected = oracle(model, weighted_sum, [x.detach() for x in inputs], target, reduction="sum")
    for twin in (copy.deepcopy(converted), torch.load(buffer, weights_only=False)):
        weighted_sum(twin(*fresh(inputs, torch.float64)), target).backward()
        assert_moments(twin, expected)
        assert all(p.sum_grad_squared is None for p in converted.parameters())


@pytest.mark.parametrize("case", FEW, ids=str)
def test_built_directly_a_layer_starts_from_the_stock_initialisation(case):
    torch.manual_seed(0)
    expected = getattr(nn, case.name)(*case.arguments, **case.keywords).double()
    torch.manual_seed(0)
    layer = getattr(px.nn, case.name)(*case.arguments, **case.keywords).double()
    for (name, value), (other, stock) in zip(layer.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, stock)
    model, inputs, target = build(case)
    model.layer = layer
    weighted_sum(model(*inputs), target).backward()
    assert_moments(model, oracle(model, weighted_sum, [x.detach() for x in inputs], target, reduction="sum"))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_checkpointing(case, use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *inputs):
            return checkpoint(self.inner, *inputs, use_reentrant=use_reentrant)

    model, inputs, target = build(case)
    expected = oracle(model, weighted_sum, [x.detach() for x in inputs], target, reduction="sum")
    converted = px.convert(Checkpointed(copy.deepcopy(model)))
    if use_reentrant and not any(x.requires_grad for x in inputs):
        pytest.skip("reentrant checkpointing needs an input with a gradient")
    weighted_sum(converted(*inputs), target).backward()
    assert_moments(converted.inner, expected)


# A whole Transformer is made of the two layers before it.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in FEW if c.name != "Transformer"], ids=str)
def test_autocast_moments_within_a_budget_that_notices_a_missing_example(case, dtype):
    torch.set_num_threads(1)
    model, inputs, target = build(case, torch.float32)
    inputs, converted = [x.detach() for x in inputs], px.convert(copy.deepcopy(model))
    with torch.autocast("cpu", dtype):
        try:
            stock = stock_moments(model, weighted_sum, inputs, target, reduction="sum", dtype=torch.float32)
            expected_dtype = model(*inputs).dtype
        except RuntimeError as error:
            assert any(text in str(error) for text in NOT_IMPLEMENTED), error
            pytest.skip(f"stock PyTorch has no {dtype} here")
        output = converted(*inputs)
        assert output.dtype == expected_dtype
        weighted_sum(output, target).backward()
    assert all(p.grad.dtype == p.sum_grad_squared.dtype == torch.float32 for p in converted.parameters())
    expected = oracle(model, weighted_sum, inputs, target, reduction="sum")
    assert_moments(converted, expected, stock)
    if dtype == torch.bfloat16:
        return  # deep down, its own errors are as large as a third of an example
    rows = [slice(b, b + 1) for b in range(case.batch)]
    apart = [oracle(model, weighted_sum, [x[b] for x in inputs], target[b], reduction="sum") for b in rows]
    for name, p in converted.named_parameters():
        missing = max((one[name].sum_grad_squared.float() for one in apart), key=lambda square: square.max())
        if missing.any():  # a cell's first state is zero, and so is the gradient of its weight
            p.sum_grad_squared.sub_(missing)
            with pytest.raises(AssertionError, match=f"{name}.sum_grad_squared: error"):
                assert_moments(converted, expected, stock)
            p.sum_grad_squared.add_(missing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", [nn.Linear(5, 6), nn.LayerNorm(5), nn.Bilinear(5, 5, 4)], ids=lambda m: m._get_name())
def test_the_budget_under_autocast_notices_positions_that_are_squared_apart(layer, dtype):
    torch.manual_seed(0)
    x = [torch.randn(4, 2, 5)] * (1 + isinstance(layer, nn.Bilinear))
    target = torch.randn(layer(*x).shape)
    with torch.autocast("cpu", dtype):
        expected = oracle(layer, weighted_sum, x, target, reduction="sum")
        stock = stock_moments(layer, weighted_sum, x, target, reduction="sum", dtype=torch.float32)
        right, wrong = (px.convert(copy.deepcopy(layer)) for _ in range(2))
        weighted_sum(right(*x), target).backward()
        weighted_sum(wrong(*(t.flatten(0, 1) for t in x)), target.flatten(0, 1)).backward()
    assert_moments(right, expected, stock)
    with pytest.raises(AssertionError, match=r"sum_grad_squared: error"):
        assert_moments(wrong, expected, stock)


class TestStockMoments:
    """The low-precision run that a budget is made of."""

    def test_with_one_sample_the_error_is_that_of_the_oracle_in_that_dtype(self):
        model, inputs, target = build(FEW[1], torch.float32)
        x = [t.detach() for t in inputs]
        expected = oracle(model, weighted_sum, x, target, reduction="sum")
        low = oracle(model, weighted_sum, x, target, reduction="sum", dtype=torch.float32)
        stock = stock_moments(model, weighted_sum, x, target, reduction="sum", dtype=torch.float32, samples=1)
        for name, m in expected.items():
            assert torch.equal(stock[name].grad, m.grad + (low[name].grad - m.grad).abs())

    def test_more_samples_bring_larger_errors_the_same_each_time_and_leave_the_generator_alone(self):
        model, inputs, target = build(FEW[1], torch.float32)
        before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        runs = [
            stock_moments(model, weighted_sum, [x.detach() for x in inputs], target, dtype=torch.float32, samples=n)
            for n in (1, 4, 4)
        ]
        for name in runs[0]:
            one, four, again = (run[name].sum_grad_squared for run in runs)
            assert (four >= one).all() and (four > one).any() and torch.equal(four, again)
        assert torch.equal(torch.get_rng_state(), before[1])
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before[0].items())

    def test_no_samples_are_refused(self):
        model, inputs, target = build(FEW[0], torch.float32)
        with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
            stock_moments(model, weighted_sum, [x.detach() for x in inputs], target, dtype=torch.float32, samples=0)


COMPILED = ["EmbeddingBag", "Bilinear", "PReLU", "GRUCell", "InstanceNorm1d", "ConvTranspose2d"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.parametrize("case", [c for c in FEW if c.name in [*COMPILED, "LSTM"]], ids=str)
def test_compiled_moments_equal_the_oracle(case):
    torch.compiler.reset()
    model, inputs, target = build(case)
    inputs, converted = [x.detach() for x in inputs], px.convert(copy.deepcopy(model))
    # Recurrent layers, which Dynamo leaves to eager mode, break the graph.
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=case.name in COMPILED)
    weighted_sum(compiled(*inputs), target).backward()
    assert_moments(converted, oracle(model, weighted_sum, inputs, target, reduction="sum"))
    torch.compiler.reset()
