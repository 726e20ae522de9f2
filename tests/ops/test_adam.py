"""adam_step_ against a transcription of MATHS 2, 11, 16-18 in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opchecks import DTYPES, both, check_tensor, every_dtype, implementation, kernel, needs_extension, relaid, wide

from perexample.ops import adam_step_

SIZES = ((1,), (3,), (7, 9), (64,), (65,), (5, 0), (511,), (1025,), (313, 321), ())
LISTS = ("params", "grads", "sums", "exp_avgs", "exp_avg_sqs")
SCALARS = dict(batch_size=6.0, lr=1e-3, n_g=20.0, n_s=100.0)


class Group:
    """The arguments of one step: tensors and everything else, and how to run it."""

    def __init__(self, sizes=SIZES, dtype=torch.float32, grad_dtype=None, batch=6, seen=3.0, per_batch=False):
        state = wide(dtype)
        # Contributions of `batch` examples, so that grad**2 <= B sum_grad_squared holds as in a real step.
        rows = [torch.randn(batch, *size) for size in sizes]
        self.params = [torch.randn(size).to(dtype) for size in sizes]
        self.grads = [c.sum(0).to(grad_dtype or dtype) for c in rows]
        self.sums = [] if per_batch else [c.square().sum(0).to(state) for c in rows]
        self.exp_avgs = [torch.randn(size).to(state) for size in sizes]
        self.exp_avg_sqs = [torch.rand(size).to(state) + 0.1 for size in sizes]
        self.seen = torch.full((len(sizes),), seen, dtype=torch.float64) + torch.arange(len(sizes))
        self.violations = torch.zeros(len(sizes), dtype=torch.int32)

    def lists(self):
        return self.params, self.grads, self.sums, self.exp_avgs, self.exp_avg_sqs

    def written(self):
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, self.seen, self.violations]

    def read(self):
        return [*self.grads, *self.sums]

    def map(self, change):
        """Another group whose tensors are changed one by one, into new memory."""
        other = Group(())
        for name in LISTS:
            setattr(other, name, [change(t) for t in getattr(self, name)])
        other.seen, other.violations = self.seen.clone(), self.violations.clone()
        return other

    def clone(self):
        return self.map(torch.clone)

    def step(self, which="public", **changes):
        arguments = {**SCALARS, "eps": 1e-8, "weight_decay": 0.0, "mean_reduction": True, "maximize": False}
        arguments |= {"guard_rounds": 0, **changes}
        for name in ("batch_size", "lr"):
            arguments[name] = torch.tensor(arguments[name], dtype=torch.float64)
        for name in ("grad_scale", "found_inf"):
            if name in arguments:
                arguments[name] = torch.tensor(arguments[name])
        implementation("adam_step_", which)(*self.lists(), self.seen, self.violations, **arguments)
        return self


def transcription(p, grad, total, m, v, n, dtype, *, batch_size, lr, n_g, n_s, eps=1e-8, weight_decay=0.0, **options):
    """One parameter's step in `dtype`; n: examples seen, this step's included."""
    B, scale = batch_size, options.get("grad_scale", 1.0)
    p, grad, m, v = (t.to(dtype) for t in (p, grad, m, v))
    mean = options.get("mean_reduction", True)
    g_hat = grad / scale / (1 if mean else B)
    if options.get("maximize"):
        g_hat = -g_hat
    s_hat = g_hat**2 if total is None else total.to(dtype) / scale**2 * (B if mean else 1 / B)
    kappa_g, kappa_s = min(1, B / min(n, n_g)), min(1, B / min(n, n_s))
    m = (1 - kappa_g) * m + kappa_g * g_hat
    v = (1 - kappa_s) * v + kappa_s * s_hat
    return p - B * lr * weight_decay * p - B * lr * m / (v.sqrt() + eps), m, v


def check_step(which, group, seen_after=None, **options):
    """Run one step and hold every parameter and state to the transcription."""
    before = group.clone()
    group.step(which, **options)
    scalars = SCALARS | options
    assert torch.equal(group.seen, before.seen + scalars["batch_size"])
    for i, p in enumerate(before.params):
        total = before.sums[i] if before.sums else None
        arguments = (p, before.grads[i], total, before.exp_avgs[i], before.exp_avg_sqs[i], float(group.seen[i]))
        state = wide(p.dtype)
        expected, stock = (transcription(*arguments, d, **scalars) for d in (torch.float64, state))
        results = (group.params[i], group.exp_avgs[i], group.exp_avg_sqs[i])
        for what, actual, e, s in zip(("param", "exp_avg", "exp_avg_sq"), results, expected, stock, strict=True):
            check_tensor(actual, e, s, p.dtype if what == "param" else state, f"{what}[{i}] of {tuple(p.shape)}")
    for old, new in zip(before.read(), group.read(), strict=True):
        assert torch.equal(old, new)


@both
@every_dtype
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("mean_reduction", [True, False])
def test_step_equals_the_transcription(which, dtype, per_batch, mean_reduction):
    group = Group(dtype=dtype, per_batch=per_batch)
    for _ in range(3):
        check_step(which, group, mean_reduction=mean_reduction)


@both
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@every_dtype
def test_gradient_in_another_dtype_than_the_parameter(which, dtype, grad_dtype):
    check_step(which, Group(((5,), (70, 9)), dtype, grad_dtype), guard_rounds=1)


@both
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"maximize": True},
        {"maximize": True, "weight_decay": 0.1, "mean_reduction": False},
        {"eps": 0.5},
        {"grad_scale": 3.0},
        {"grad_scale": 1024.0, "mean_reduction": False, "found_inf": 0.0},
        {"batch_size": 1.0},
        {"batch_size": 1000.0},  # beyond n_g and n_s: nothing is averaged
        {"n_g": 1.0, "n_s": 1.0},
        {"n_g": math.inf, "n_s": math.inf},
        {"guard_rounds": 3},
        {"lr": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("per_batch", [False, True])
def test_options_equal_the_transcription(which, options, per_batch):
    check_step(which, Group(per_batch=per_batch), **options)


@both
def test_mixed_dtypes_in_one_call(which):
    groups = [Group(((3,), (40, 5), (2000,)), dtype, grad) for dtype in DTYPES for grad in (dtype, torch.float32)]
    joined = Group(())
    for name in LISTS:
        setattr(joined, name, [t for group in groups for t in getattr(group, name)])
    count = len(joined.params)
    joined.seen, joined.violations = torch.zeros(count).double(), torch.zeros(count).int()
    check_step(which, joined, guard_rounds=1)


@both
@pytest.mark.parametrize("count", [0, 1, 1500])
def test_many_tiny_tensors(which, count):
    check_step(which, Group([(1 + i % 5,) for i in range(count)]), guard_rounds=1)


@both
@pytest.mark.parametrize("found_inf", [1.0, 2.0, math.inf, math.nan])
def test_found_inf_changes_nothing(which, found_inf):
    group = Group()
    group.grads[3].fill_(math.inf)
    group.grads[6].mul_(100)  # would be flagged
    before = group.clone()
    group.step(which, found_inf=found_inf, grad_scale=2.0, guard_rounds=1, weight_decay=0.1)
    for old, new in zip(before.written(), group.written(), strict=True):
        assert torch.equal(old, new)


@both
@pytest.mark.parametrize("mean_reduction", [True, False])
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("seen", [0.0, 9.0])
def test_no_examples_change_nothing(which, mean_reduction, per_batch, seen):
    group = Group(per_batch=per_batch, seen=seen)
    before = group.clone()
    group.step(which, batch_size=0.0, mean_reduction=mean_reduction, guard_rounds=1, weight_decay=0.1)
    for old, new in zip(before.written(), group.written(), strict=True):
        assert torch.equal(old, new)


@both
@pytest.mark.parametrize("per_batch", [False, True])
def test_power_of_two_grad_scale_changes_no_bit(which, per_batch):
    plain = Group(per_batch=per_batch)
    scaled = plain.clone()
    scaled.grads = [g * 2.0**12 for g in plain.grads]
    scaled.sums = [s * 2.0**24 for s in plain.sums]
    for a, e in zip(scaled.step(which, grad_scale=2.0**12).written(), plain.step(which).written(), strict=True):
        assert torch.equal(a, e)


@both
def test_one_example_is_the_simplified_adam(which):
    # MATHS, last section: with B = 1 the per-example squares are the squares of the gradient.
    ours = Group(batch=1)
    ours.sums = [g.square() for g in ours.grads]
    per_batch = ours.clone()
    per_batch.sums = []
    for a, e in zip(
        ours.step(which, batch_size=1.0).written(), per_batch.step(which, batch_size=1.0).written(), strict=True
    ):
        assert torch.equal(a, e)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.booleans(), st.sampled_from(["reference", "public"]))
def test_state_is_the_plain_mean_over_examples_until_the_averaging_time(batches, mean_reduction, which):
    generator = torch.Generator().manual_seed(sum(batches))
    group = Group(((7,),), torch.float64, seen=0.0)
    every = []
    for batch in batches:
        examples = torch.randn(batch, 7, generator=generator, dtype=torch.float64)
        every.append(examples)
        contributions = examples / max(batch, 1) if mean_reduction else examples
        group.grads, group.sums = [contributions.sum(0)], [contributions.square().sum(0)]
        group.step(which, batch_size=float(batch), n_g=480.0, n_s=480.0, mean_reduction=mean_reduction)
    every = torch.cat(every)
    if len(every):
        check_tensor(group.exp_avgs[0], every.mean(0), every.mean(0), torch.float64, "exp_avg")
        check_tensor(group.exp_avg_sqs[0], every.square().mean(0), every.square().mean(0), torch.float64, "exp_avg_sq")
    assert group.seen.item() == sum(batches)


# Memory layouts


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.clone()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "stepped", "offset"])
@pytest.mark.parametrize("moved", [("params",), ("grads",), LISTS], ids=str)
def test_any_memory_layout(which, dtype, layout, moved):
    sizes = ((4, 6, 3, 5), (40, 30), (1, 8, 1, 1))
    plain = Group(sizes, dtype)
    plain.grads[1][7, 5] *= 1000
    other = plain.clone()
    for name in moved:
        change = channels_last if layout == "channels_last" else lambda t: relaid(t, layout)
        setattr(other, name, [change(t) for t in getattr(plain, name)])
    strides = [t.stride() for t in other.written()]
    plain.step(which, guard_rounds=1)
    check_step(which, other, guard_rounds=1)
    assert [t.stride() for t in other.written()] == strides
    assert other.violations.tolist() == plain.violations.tolist() == [0, 1, 0]


@both
def test_expanded_gradient(which):
    group = Group(((6, 7),), per_batch=True)
    group.grads = [torch.randn(7).expand(6, 7)]
    check_step(which, group)


# The guard: (sum_b c_b)**2 <= B sum_b c_b**2


@both
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 7, 300])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_guard_accepts_what_rounding_alone_does(which, grad_dtype, batch, spread):
    # spread 0: all contributions equal, where Cauchy-Schwarz is an equality.
    state = wide(grad_dtype)
    contributions = (torch.randn(5000) + spread * torch.randn(batch, 5000)).to(state)
    group = Group(((5000,),), grad_dtype)
    group.grads = [contributions.sum(0).to(grad_dtype)]
    group.sums = [contributions.square().sum(0)]
    assert group.step(which, batch_size=float(batch), guard_rounds=1).violations.item() == 0
    group.grads = [2 * group.grads[0]]
    assert group.step(which, batch_size=float(batch), guard_rounds=0).violations.item() == 0


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 129, 512, 513, 100_003])
@pytest.mark.parametrize("mean_reduction", [True, False])
def test_guard_flags_the_violating_tensors_and_no_others(which, dtype, size, mean_reduction):
    batch, rounds = 6, 2
    positions = sorted({0, size // 2, size - 1})
    group = Group([(size,)] * (2 * len(positions) + 1), dtype, batch=batch)
    # A little more than the bound and the guard's allowance for rounding: one element of every second tensor.
    allowance = (2 + rounds + 2) * torch.finfo(dtype).eps + (batch + 16) * torch.finfo(wide(dtype)).eps
    for i, position in enumerate(positions):
        bound = math.sqrt(batch * float(group.sums[2 * i + 1][position]))
        group.grads[2 * i + 1][position] = bound * (1 + allowance) * (-1) ** i
    group.step(which, batch_size=float(batch), guard_rounds=rounds, mean_reduction=mean_reduction)
    assert group.violations.tolist() == [i % 2 for i in range(2 * len(positions) + 1)]


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponent", [-45, -30, -23, -22, -21, -20, -19, -18, 15, 18])
def test_guard_survives_underflow_and_overflow_of_squares(which, dtype, exponent):
    contributions = 10.0**exponent * (1 + torch.rand(8, 600)).to(wide(dtype))
    group = Group(((600,),), dtype)
    group.grads, group.sums = [contributions.sum(0).to(dtype)], [contributions.square().sum(0)]
    group.step(which, batch_size=8.0, guard_rounds=1)
    assert group.violations.item() == 0


@both
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_guard_leaves_infinite_gradients_to_others(which, bad):
    group = Group(((600,), (3,), (600,)))
    group.grads[0][17] = bad
    group.grads[2][17] = bad
    group.grads[2][300] = 1e6  # flagged all the same
    group.step(which, guard_rounds=1)
    assert group.violations.tolist() == [0, 0, 1]


@both
def test_guard_flags_a_gradient_without_any_second_moment(which):
    group = Group(((3,), (600,)))
    group.sums = [torch.zeros_like(s) for s in group.sums]
    group.grads = [torch.zeros(3), torch.full((600,), 1e-3)]
    assert group.step(which, guard_rounds=1).violations.tolist() == [0, 1]


@both
def test_flags_stay_raised_and_untouched_without_a_guard(which):
    group = Group(((3,), (9,)))
    group.violations[1] = 1
    assert group.step(which, guard_rounds=1).violations.tolist() == [0, 1]
    group.grads[0] *= 1000
    assert group.step(which, guard_rounds=0).violations.tolist() == [0, 1]


# Errors


def arguments(**changes):
    good = dict(
        params=[torch.ones(3)], grads=[torch.ones(3)], sums_grad_squared=[torch.ones(3)], exp_avgs=[torch.ones(3)],
        exp_avg_sqs=[torch.ones(3)], examples_seen=torch.zeros(1).double(), violations=torch.zeros(1).int(),
        batch_size=torch.tensor(1.0), lr=torch.tensor(0.1), n_g=10.0, n_s=10.0,
    )  # fmt: skip
    return good | changes


WRONG = [
    ({"grads": []}, ValueError, "grads must have 1 tensors like params, got 0"),
    ({"exp_avgs": [torch.ones(3)] * 2}, ValueError, "exp_avgs must have 1 tensors like params, got 2"),
    ({"exp_avg_sqs": []}, ValueError, "exp_avg_sqs must have 1 tensors like params, got 0"),
    ({"sums_grad_squared": [torch.ones(3)] * 2}, ValueError, "sums_grad_squared must have 0 or 1 tensors, got 2"),
    ({"grads": [torch.ones(4)]}, ValueError, "grads[0] must be (3,) like params[0], got (4,)"),
    ({"grads": [torch.ones(1, 3)]}, ValueError, "grads[0] must be (3,) like params[0], got (1, 3)"),
    ({"exp_avg_sqs": [torch.ones(2)]}, ValueError, "exp_avg_sqs[0] must be (3,) like params[0], got (2,)"),
    ({"sums_grad_squared": [torch.ones(())]}, ValueError, "sums_grad_squared[0] must be (3,) like params[0], got ()"),
    (
        {"grads": [torch.ones(3).int()]},
        TypeError,
        "grads[0] and params[0] must be floating, got torch.int32, torch.float32",
    ),
    ({"exp_avgs": [torch.ones(3).half()]}, TypeError, "exp_avgs[0] must be torch.float32, got torch.float16"),
    (
        {"sums_grad_squared": [torch.ones(3).half()]},
        TypeError,
        "sums_grad_squared[0] must be torch.float32, got torch.float16",
    ),
    (
        {"examples_seen": torch.zeros(1)},
        ValueError,
        "examples_seen must be (1,) torch.float64, got (1,) torch.float32",
    ),
    ({"violations": torch.zeros(2).int()}, ValueError, "violations must be (1,) torch.int32, got (2,) torch.int32"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=lambda value: None)
def test_errors_say_what_was_expected_and_what_came(changes, error, message):
    with pytest.raises(error) as raised:
        adam_step_(**arguments(**changes))
    assert str(raised.value) == f"adam_step_: {message}"


@needs_extension
@pytest.mark.parametrize(
    "changes",
    [row[0] for row in WRONG if "got (1, 3)" not in row[2]]  # as many elements: harmless
    + [{name: torch.ones(size)} for name in ("batch_size", "lr", "found_inf", "grad_scale") for size in (0, 2)],
    ids=lambda value: None,
)
def test_direct_call_with_wrong_arguments_raises_and_changes_nothing(changes):
    given = arguments(**changes)
    given |= dict(eps=1e-8, weight_decay=0.0, mean_reduction=True, maximize=False, guard_rounds=1)
    before = [t.clone() for value in given.values() if isinstance(value, list) for t in value]
    with pytest.raises(RuntimeError, match="adam_step_: "):
        kernel("adam_step_")(**given)
    after = [t for value in given.values() if isinstance(value, list) for t in value]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
