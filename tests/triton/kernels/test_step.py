"""The Triton kernels of optimizer_step_, with the cases and the transcription of tests/ops/test_optimizer.py."""

import math
from unittest import mock

import pytest
import test_optimizer as cases
import torch
from launching import Launches, launcher
from opchecks import DTYPES, relaid
from perexample.triton_kernels import configs
from test_optimizer import DEGENERATE, KINDS, OPTIONS, Group, arguments, channels_last, check_step, joined

from perexample.ops import OPS

# Around a block, and with few elements: the interpreter takes milliseconds for every block.
SIZES = ((1,), (7, 9), (5, 0), (513,), ())
FEW = ((70,), (3,))
# Both sides of tl.where are computed; numpy, which the interpreter computes with, warns of what is then not taken.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
MOST = {"weight_decay": 0.1, "guard_rounds": 1}


@pytest.fixture(autouse=True)
def groups_step_by_the_launcher(monkeypatch):
    monkeypatch.setattr(cases, "implementation", lambda name, which: launcher(name))


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer(kind):
    check_step("triton", Group(SIZES, kind=kind))
    check_step("triton", Group(FEW, per_batch=True, kind=kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sgd", "centered over sigma squared", "adam"])
def test_every_dtype(kind, dtype):
    check_step("triton", Group(FEW, dtype, kind=kind), mean_reduction=False, **MOST)
    check_step("triton", Group(FEW, dtype, kind=kind, per_batch=True))


@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:]], ids=str)  # float64 parameters have float64 state
def test_every_dtype_of_gradients_in_one_call(dtypes):
    group = joined([Group(((3,), (40, 5)), dtype, grad) for dtype in dtypes for grad in DTYPES])
    check_step("triton", group, **MOST)


@pytest.mark.parametrize("options", OPTIONS + DEGENERATE, ids=str)
def test_options(options):
    check_step("triton", Group(FEW, kind="adam"), **options)
    if options not in DEGENERATE:
        check_step("triton", Group(((9,),), kind="centered", per_batch=True), **options)


@pytest.mark.parametrize("kind", ["centered", "centered over sigma squared"])
def test_a_variance_that_rounds_below_zero_counts_as_zero(kind):
    cases.test_a_variance_that_rounds_below_zero_counts_as_zero("triton", kind)


def test_the_power_form_is_exact_however_long_the_memory():
    """1 - (1 - 1 / N)**B without its cancellation, in float64: N from 1 to as good as infinite."""
    for horizon in (1.0, 1.5, 2.0, 1e3, 1e9, 1e15, math.inf):
        group = Group(((3,),), torch.float64, kind="momentum")
        group.exp_avg.zero_()
        group.step("triton", n_g=horizon, power=True, correct_g=False, batch_size=6.0)
        kappa = 1.0 if horizon == 1 else -math.expm1(6 * math.log1p(-1 / horizon))
        torch.testing.assert_close(group.exp_avg[:3], kappa * group.grads[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("found_inf", [1.0, math.inf, math.nan])
def test_found_inf_changes_nothing(found_inf):
    group = Group(FEW)
    group.grads[0].fill_(math.inf)
    group.grads[1].mul_(100)  # would be flagged
    before = group.clone()
    group.step("triton", found_inf=found_inf, grad_scale=2.0, **MOST)
    assert all(map(torch.equal, before.written(), group.written()))


@pytest.mark.parametrize("mean_reduction", [True, False])
@pytest.mark.parametrize("power", [True, False])
@pytest.mark.parametrize("seen", [0.0, 9.0])
def test_no_examples_change_nothing(mean_reduction, power, seen):
    group = Group(FEW, seen=seen)
    before = group.clone()
    group.step("triton", batch_size=0.0, mean_reduction=mean_reduction, power=power, **MOST)
    assert all(map(torch.equal, before.written(), group.written()))


def test_parameters_without_a_gradient_are_left_alone():
    group = Group(SIZES)
    for i in (0, 3):
        group.grads[i] = group.sums[i] = None
    group.violations[3] = 1
    check_step("triton", group, **MOST)
    assert group.violations.tolist() == [0, 0, 0, 1, 0]
    group.grads = group.sums = [None] * len(SIZES)
    check_step("triton", group)


@pytest.mark.parametrize("count", [0, 5, 8, 21])
def test_many_tensors_take_few_launches(count):
    group = Group([(1 + i % 5,) for i in range(count)])
    with mock.patch.object(configs, "STEP", configs.STEP._replace(rows=8)), Launches() as launches:
        check_step("triton", group, **MOST)
    tables = -(-count // 8)
    assert launches.names == (["_table"] * tables + ["_constants", "_step"] if count else [])


def test_a_tensor_of_several_chunks_and_vectors_that_are_not_aligned():
    with mock.patch.object(configs, "STEP", configs.STEP._replace(chunk=1024, block=512)):
        for layout in ("contiguous", "offset"):
            group = Group(((3,), (3 * 1024 + 700,), (1024,), (0,), (2048,), (0,)))
            group.grads[1][2500] *= 1000
            if layout == "offset":
                group.grads = [relaid(g, layout) for g in group.grads]
            with Launches() as launches:
                check_step("triton", group, **MOST)
            (step,) = (launch for launch in launches if launch[0] == "_step")
            assert step[1] == (1 + 4 + 1 + 2,)
            assert step[2]["ALIGNED"] == (layout == "contiguous")
            assert group.violations.tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["momentum", "centered", "adam"])
def test_state_in_bfloat16(dtype, kind):
    check_step("triton", Group(FEW, dtype, kind=kind, state=torch.bfloat16), **MOST)


def test_bfloat16_state_has_the_bits_of_the_reference():
    # kappa = 1: the averages are the new values, and scaling by powers of two is exact.
    ours = Group(((70, 3), (1200,)), batch=4, state=torch.bfloat16, seen=2.0**33)
    ours.grads[1][:3] = torch.tensor([math.inf, -math.inf, math.nan])
    reference = ours.clone()
    ours.step("triton", batch_size=4.0, n_g=4.0, n_s=4.0)
    with mock.patch.object(cases, "implementation", lambda name, which: OPS[name][0]):
        reference.step("reference", batch_size=4.0, n_g=4.0, n_s=4.0)
    for a, b in ((ours.exp_avg, reference.exp_avg), (ours.exp_avg_sq, reference.exp_avg_sq)):
        assert torch.equal(a.view(torch.int16)[a.isfinite()], b.view(torch.int16)[a.isfinite()])
        assert a.nan_to_num().equal(b.nan_to_num())


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "stepped", "offset"])
@pytest.mark.parametrize("moved", [("params",), ("grads",), ("params", "grads", "sums")], ids=str)
def test_any_memory_layout(layout, moved):
    group = Group(((2, 6, 3, 5), (8, 7), (1, 8, 1, 1)))
    group.grads[1][7, 5] *= 1000
    for name in moved:
        change = channels_last if layout == "channels_last" else lambda t: relaid(t, layout)
        setattr(group, name, [change(t) for t in getattr(group, name)])
    strides = [t.stride() for t in group.written()]
    check_step("triton", group, guard_rounds=1)
    assert [t.stride() for t in group.written()] == strides
    assert group.violations.tolist() == [0, 1, 0]


def test_parameters_that_require_grad_outside_of_no_grad():
    group = Group(((8, 7), (3,)))
    group.params = [relaid(p, "stepped").requires_grad_() for p in group.params]
    before = [p.clone() for p in group.params]
    group.step("triton", **MOST)
    assert all(p.is_leaf and not torch.equal(p, old) for p, old in zip(group.params, before, strict=True))


def test_expanded_gradient():
    group = Group(((6, 7),), per_batch=True)
    group.grads = [torch.randn(7).expand(6, 7)]
    check_step("triton", group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 7])
def test_guard_accepts_what_rounding_does_and_flags_a_little_more(dtype, batch):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    group = Group(((700,), (513,)), dtype)
    # All contributions equal: Cauchy-Schwarz is an equality.
    rows = [torch.randn(n).to(wide).expand(batch, n) for n in (700, 513)]
    group.grads, group.sums = [r.sum(0).to(dtype) for r in rows], [r.square().sum(0) for r in rows]
    assert group.step("triton", batch_size=float(batch), guard_rounds=1).violations.tolist() == [0, 0]
    allowance = 6 * torch.finfo(dtype).eps + (batch + 16) * torch.finfo(wide).eps
    group.grads[1][512] = -math.sqrt(batch * float(group.sums[1][512])) * (1 + allowance)
    assert group.step("triton", batch_size=float(batch), guard_rounds=1).violations.tolist() == [0, 1]
    group.grads[1][512] = math.inf
    group.grads[0] *= 2
    assert group.step("triton", batch_size=float(batch), guard_rounds=0).violations.tolist() == [0, 1]


def test_guard_allows_for_the_rounding_of_many_examples_and_of_the_smallest_numbers():
    group = Group(((9,), (9,)), torch.float32)
    of_many = torch.full((9,), 1000 * (1 + 900 * torch.finfo(torch.float32).eps))
    group.grads, group.sums = [of_many, torch.ones(9)], [torch.full((9,), 1000.0), torch.ones(9)]
    assert not group.step("triton", batch_size=1000.0, guard_rounds=1).violations.any()
    group = Group(((9,),), torch.float16)
    group.grads, group.sums = [torch.full((9,), 4e-8).half()], [torch.full((9,), 4e-8**2)]
    assert float(group.grads[0][0]) > 5.9e-8  # rounded up by half
    assert not group.step("triton", batch_size=1.0, guard_rounds=1).violations.any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_guard_leaves_infinite_gradients_to_others(bad):
    cases.test_guard_leaves_infinite_gradients_to_others("triton", bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_guard_survives_underflow_and_overflow_of_squares(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = (-45, -30, -23, -22, -21, -20, -19, -18, 15, 18)
    group = Group([(60,)] * len(exponents), dtype)
    rows = [10.0**e * (1 + torch.rand(8, 60)).to(wide) for e in exponents]
    group.grads, group.sums = [r.sum(0).to(dtype) for r in rows], [r.square().sum(0) for r in rows]
    group.step("triton", batch_size=8.0, guard_rounds=1)
    assert not group.violations.any()


@pytest.mark.parametrize(
    "changes",
    [row[0] for row in cases.WRONG]
    + [{name: torch.ones(size)} for name in ("batch_size", "lr", "found_inf", "grad_scale") for size in (0, 2)],
    ids=lambda value: None,
)
def test_wrong_arguments_raise_and_change_nothing(changes):
    given = dict(
        n_g=10.0, n_s=10.0, eps=1e-8, weight_decay=0.0, centered=False, squared_denominator=False, lr_times_eps=False,
        correct_g=True, correct_s=True, power=False, mean_reduction=True, maximize=False, guard_rounds=1,
    )  # fmt: skip
    given |= arguments(**changes)
    before = [t.clone() for value in given.values() if isinstance(value, list) for t in value if t is not None]
    with pytest.raises(RuntimeError, match="optimizer_step_: "):
        launcher("optimizer_step_")(**given)
    after = [t for value in given.values() if isinstance(value, list) for t in value if t is not None]
    assert all(map(torch.equal, after, before))
