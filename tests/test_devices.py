"""Ops, layers and models on every device there is, against the oracle in float64 on the CPU.

On the CPU this repeats, on few cases, what other files test in full; the rows for cuda run where a GPU is. All cases of
the ops and of the layers run there with PEREXAMPLE_TEST_DEVICE=cuda (tests/on_device.py).
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import perexample as px
from perexample import ops, testing
from perexample.ops import OPS
from perexample.ops.optimizer import state_starts
from perexample.testing import assert_moments, assert_within_budget, moments_of_examples, oracle

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# On the CPU float32 alone: the rest is tested elsewhere.
WHERE = [pytest.param("cpu", torch.float32, id="cpu-float32")]
WHERE += [pytest.param("cuda", dtype, id=f"cuda-{str(dtype).removeprefix('torch.')}") for dtype in DTYPES]
everywhere = pytest.mark.parametrize(("device", "dtype"), WHERE)


@pytest.fixture(autouse=True)
def skipped_without_a_gpu(request):
    parameters = getattr(request.node, "callspec", None)
    wanted = "gpu" in request.fixturenames or (parameters and parameters.params.get("device") == "cuda")
    if wanted and not torch.cuda.is_available():
        pytest.skip("no GPU here")


@pytest.fixture
def gpu():
    return "cuda"


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(got, contribution, batch, shape, dtype):
    """Hold (gradient, second moment), of any device, to the loop over examples."""
    expected, stock = (
        moments_of_examples(lambda b, d=d: contribution(b, d), batch, torch.empty(shape, dtype=d))
        for d in (torch.float64, wide(dtype))
    )
    assert_within_budget(got[0].cpu(), expected.grad, stock.grad, dtype, "gradient")
    assert_within_budget(got[1].cpu(), expected.sum_grad_squared, stock.sum_grad_squared, wide(dtype), "second moment")


def check_linear(device, dtype, batch, positions, outputs, inputs, view=lambda t: t):
    dy, x = (view(torch.randn(batch, positions, n).to(dtype)) for n in (outputs, inputs))
    got = ops.linear_moments(view(dy.to(device)), view(x.to(device)), True)
    check(got[:2], lambda b, d: dy[b].to(d).T @ x[b].to(d), batch, (outputs, inputs), dtype)
    check(got[2:], lambda b, d: dy[b].to(d).sum(0), batch, (outputs,), dtype)


@everywhere
@pytest.mark.parametrize("case", testing.LINEAR_CASES[::2], ids=str)
def test_linear(device, dtype, case):
    check_linear(device, dtype, case.batch, math.prod(case.positions), case.outputs, case.inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (4, 256, 768, 512), (3, 197, 264, 136), (40, 16, 256, 256), (9, 30, 136, 72), (2, 4096, 128, 128),
        (1, 2048, 64, 320), (300, 1, 256, 128), (64, 2, 128, 128), (5, 33, 129, 65),
    ],
    ids=str,
)  # fmt: skip
def test_linear_of_real_sizes(gpu, dtype, shape):
    check_linear(gpu, dtype, *shape)


@everywhere
@pytest.mark.parametrize("positions", [1, 20])
def test_linear_of_any_memory_layout(device, dtype, positions):
    for view in (
        lambda t: t.mT.contiguous().mT,
        lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
        lambda t: t[:, :1].expand(-1, positions, -1),
        lambda t: t[:, :, :1].expand_as(t),
    ):
        check_linear(device, dtype, 4, positions, 24, 40, view)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@everywhere
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", testing.CONV_CASES[::2], ids=str)
def test_conv(device, dtype, channels_last, case):
    layer = CONV[case.spatial](case.channels, case.outputs, case.kernel_size, **case.arguments)
    layer = layer.to(dtype=torch.float64).to(dtype)
    x = torch.randn(case.batch, case.channels, *case.size).to(dtype)
    check_layer(device, layer, x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x, dtype)


@everywhere
@pytest.mark.parametrize("case", testing.NORM_CASES, ids=str)
def test_norm(device, dtype, case):
    x = torch.randn(case.shape) * 2 + 1
    layer = nn.GroupNorm(case.groups, case.shape[1]) if case.groups else nn.LayerNorm(case.normalized, bias=case.bias)
    check_layer(device, layer.to(dtype), x.to(dtype), dtype)


@everywhere
@pytest.mark.parametrize("case", [case for case in testing.EMBEDDING_CASES if case.positions], ids=str)
def test_embedding(device, dtype, case):
    layer = nn.Embedding(case.rows, case.width, padding_idx=case.padding_idx).to(dtype)
    check_layer(device, layer, torch.randint(0, case.rows, (case.batch, *case.positions)), dtype)


def weighted_sum(output, target):
    return (output * target).sum()


def check_layer(device, layer, x, dtype):
    """Gradient and second moment of every parameter, and the gradient of the input, of a converted layer."""
    target = torch.randn(layer(x).shape).to(dtype)
    expected = oracle(layer, weighted_sum, x, target, reduction="sum")
    stock = oracle(layer, weighted_sum, x, target, reduction="sum", dtype=wide(dtype))
    model = px.convert(nn.Sequential(copy.deepcopy(layer))).to(device)
    weighted_sum(model(x.to(device)), target.to(device)).backward()
    named = ({f"0.{name}": moments for name, moments in of.items()} for of in (expected, stock))
    assert_moments(model, *named)  # not moved: that would drop the second moments


def small_gpt():
    from bench.models import GPT

    return GPT(32, 2, 2, 17, 23)


def cross_entropy(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


@everywhere
def test_model(device, dtype):
    model = small_gpt().to(dtype)
    x, y = torch.randint(23, (5, 17)), torch.randint(23, (5, 17))
    expected, stock = (oracle(model, cross_entropy, x, y, dtype=d) for d in (torch.float64, dtype))
    converted = px.convert(copy.deepcopy(model)).to(device)
    cross_entropy(converted(x.to(device)), y.to(device)).backward()
    assert_moments(converted, expected, stock)


def step_arguments(sizes=((7, 9), (64,), (9001,), ())):
    rows = [torch.randn(6, *size) for size in sizes]
    params, grads = [torch.randn(size) for size in sizes], [c.sum(0) for c in rows]
    sums, length = [c.square().sum(0) for c in rows], state_starts(params)[-1]
    average, seen = torch.randn(length), torch.full((len(sizes),), 3.0, dtype=torch.float64)
    return [params, grads, sums, average, average.square() + 0.1, seen, torch.zeros(len(sizes), dtype=torch.int32)]


def moved(tree, device):
    return [moved(t, device) if isinstance(t, list) else t.to(device, copy=True) for t in tree]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["plain", "centered", "power"])
def test_step(device, kind, found_inf):
    arguments = step_arguments()
    on = dict(batch_size=6.0, lr=1e-3, grad_scale=2.0, found_inf=found_inf)
    options = dict(n_g=20.0, n_s=100.0, eps=1e-3, weight_decay=0.1, guard_rounds=1, centered=kind == "centered")
    options["power"] = kind == "power"
    got, expected = moved(arguments, device), moved(arguments, "cpu")
    ops.optimizer_step_(*got, **options, **{k: torch.tensor(v, device=device) for k, v in on.items()})
    full = dict(squared_denominator=False, lr_times_eps=False, correct_g=True, correct_s=True)
    full |= dict(mean_reduction=True, maximize=False)
    OPS["optimizer_step_"][0](*expected, **options, **full, **{k: torch.tensor(v) for k, v in on.items()})
    for g, e in zip(got, expected, strict=True):
        for a, b in zip(g if isinstance(g, list) else [g], e if isinstance(e, list) else [e], strict=True):
            torch.testing.assert_close(a.cpu(), b)


# ---- What only a GPU can show --------------------------------------------------------------------


@pytest.mark.parametrize("which", range(7))
def test_a_step_on_two_devices_is_refused(gpu, which):
    arguments = moved(step_arguments(), gpu)
    (arguments[which],) = moved([arguments[which]], "cpu")
    scalars = {name: torch.tensor(1.0, device=gpu) for name in ("batch_size", "lr")}
    with pytest.raises((RuntimeError, ValueError), match="device"):
        ops.optimizer_step_(*arguments, **scalars, n_g=20.0, n_s=100.0, eps=1e-3, guard_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_rows_that_fill_the_shared_memory(gpu, dtype):
    check_layer(gpu, nn.LayerNorm(6144).to(dtype), torch.randn(3, 5, 6144).to(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(32, 128, 768, 768), (2, 4096, 128, 256), (512, 1, 256, 256)], ids=str)
def test_the_same_bits_in_twenty_runs(gpu, dtype, shape):
    dy, x = (torch.randn(*shape[:2], n, device=gpu).to(dtype) for n in shape[2:])
    first = ops.linear_moments(dy, x, True)
    for _ in range(19):
        for a, b in zip(ops.linear_moments(dy, x, True), first, strict=True):
            assert torch.equal(a, b)


class SmallConvNet(nn.Sequential):
    """Convolutions of every kind (dense, grouped, depthwise, 1×1, strided), and norms."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(),
            nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 3, 2, groups=3), nn.Flatten(), nn.LayerNorm(24 * 25),
            nn.Linear(24 * 25, 10),
        )  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("which", ["gpt", "convolutions"])
def test_the_same_bits_in_twenty_runs_of_a_model(gpu, which, dtype, channels_last):
    if which == "gpt":
        model, x, y = small_gpt(), torch.randint(23, (5, 17), device=gpu), torch.randint(23, (5, 17), device=gpu)
    else:
        model, y = SmallConvNet(), torch.randint(10, (8,), device=gpu)
        x = torch.randn(8, 3, 14, 14, device=gpu, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
    model = px.convert(model).to(gpu, dtype)
    runs = []
    torch.backends.cudnn.deterministic = True  # the gradients that are PyTorch's own
    try:
        for _ in range(20):
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            runs.append([p.sum_grad_squared.clone() for p in model.parameters()])
    finally:
        torch.backends.cudnn.deterministic = False
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_long_run_of_one_row_of_an_embedding(gpu):
    # Position by position, and over many chunks; a row that no position has stays zero.
    indices = torch.zeros(16, 1000, dtype=torch.long)
    indices[:, ::3] = 2
    dy = torch.randn(16, 1000, 300)
    got = ops.embedding_moments(dy.to(gpu), indices.to(gpu), 4)
    expected, stock = (OPS["embedding_moments"][0](dy.to(d), indices, 4) for d in (torch.float64, torch.float32))
    for g, e, s in zip(got, expected, stock, strict=True):
        assert_within_budget(g.cpu(), e, s, torch.float32, "embedding")


@pytest.mark.parametrize("positions", [1, 20])
def test_tf32_only_where_it_is_allowed(gpu, positions):
    dy, x = torch.randn(64, positions, 96), torch.randn(64, positions, 80)
    expected = OPS["linear_moments"][0](dy.double(), x.double(), False)[1]
    before, errors = torch.backends.cuda.matmul.fp32_precision, {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            got = ops.linear_moments(dy.to(gpu), x.to(gpu))[1]
            errors[precision] = float((got.cpu() - expected).abs().max() / expected.abs().max())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 1e-2


def test_another_stream_gives_the_same(gpu):
    dy, x = torch.randn(8, 64, 128, device=gpu), torch.randn(8, 64, 128, device=gpu)
    expected = ops.linear_moments(dy, x, True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.linear_moments(dy, x, True)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_another_device_than_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    dy, x = torch.randn(8, 64, 128, device="cuda:1"), torch.randn(8, 64, 128, device="cuda:1")
    expected = OPS["linear_moments"][0](dy.double(), x.double(), False)
    got = ops.linear_moments(dy, x)
    assert got[0].device == dy.device and torch.cuda.current_device() == 0
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-4, atol=1e-4)
    check_layer("cuda:1", nn.LayerNorm(40), torch.randn(6, 5, 40), torch.float32)
    check_layer("cuda:1", nn.Conv2d(8, 16, 3), torch.randn(6, 8, 9, 9), torch.float32)
    check_layer("cuda:1", nn.Embedding(9, 40), torch.randint(9, (6, 50)), torch.float32)
    arguments = step_arguments()
    options = dict(n_g=20.0, n_s=100.0, eps=1e-3, weight_decay=0.1)
    scalars = dict(batch_size=torch.tensor(6.0), lr=torch.tensor(1e-3))
    there, here = moved(arguments, "cuda:1"), moved(arguments, "cpu")
    ops.optimizer_step_(*there, **options, **{k: v.to("cuda:1") for k, v in scalars.items()})
    ops.optimizer_step_(*here, **options, **scalars)
    for a, b in zip(there[0], here[0], strict=True):
        torch.testing.assert_close(a.cpu(), b)
    assert torch.cuda.current_device() == 0


def test_more_than_two_to_the_31_elements(gpu):
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free memory")
    grad = torch.ones(3, 1 << 30, device=gpu, dtype=torch.bfloat16)
    total, squares = ops.reduce_moments(grad)
    assert total.eq(3).all() and squares.eq(3).all()
    dy = torch.ones(2, 1 << 20, 1100, device=gpu, dtype=torch.bfloat16)
    assert ops.bias_moments(dy, torch.float32)[1].eq(2.0 * (1 << 40)).all()
    assert ops.linear_moments(dy, dy[:, :, :64])[1].eq(2.0 * (1 << 40)).all()
    assert (
        ops.embedding_moments(dy, torch.ones(2, 1 << 20, dtype=torch.long, device=gpu), 3)[1][1]
        .eq(2.0 * (1 << 40))
        .all()
    )


def test_a_captured_training_step_is_the_eager_one(gpu):
    torch.manual_seed(0)
    model = px.convert(small_gpt()).to(gpu)
    twin = px.convert(small_gpt()).to(gpu)
    twin.load_state_dict(model.state_dict())
    batches = [(torch.randint(23, (5, 17), device=gpu), torch.randint(23, (5, 17), device=gpu)) for _ in range(5)]

    def step(model, optimizer, x, y):
        optimizer.zero_grad(set_to_none=False)
        cross_entropy(model(x), y).backward()
        optimizer.step()

    optimizers = [
        px.optim.Adam(m.parameters(), lr=torch.tensor(1e-4, device=gpu), n_g=50, n_s=500) for m in (model, twin)
    ]
    x, y = (t.clone() for t in batches[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in batches[:2]:  # warm up
            x.copy_(batch[0]), y.copy_(batch[1])
            step(model, optimizers[0], x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizers[0], x, y)
    for batch in batches[2:]:
        x.copy_(batch[0]), y.copy_(batch[1])
        graph.replay()
    for batch in batches:
        step(twin, optimizers[1], *batch)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
