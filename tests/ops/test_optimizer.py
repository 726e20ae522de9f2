"""optimizer_step_ against a transcription of MATHS 2, 9-19 in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opchecks import DTYPES, both, check_tensor, every_dtype, implementation, kernel, needs_extension, relaid, wide

from perexample.ops import optimizer_step_
from perexample.ops.optimizer import state_starts, state_view

SIZES = ((1,), (3,), (7, 9), (64,), (65,), (5, 0), (511,), (1025,), (313, 321), ())
SCALARS = dict(batch_size=6.0, lr=1e-3, n_g=20.0, n_s=100.0, eps=1e-8)
# What is kept, and how it is used: every optimizer is one of these.
KINDS = {
    "sgd": {},
    "momentum": {"average": True},
    "rmsprop": {"square": True},
    "rmsprop over sigma squared": {"square": True, "squared_denominator": True, "eps": 1e-3},
    "centered": {"average": True, "square": True, "centered": True, "eps": 1e-3},
    "centered over sigma squared": {
        "average": True,
        "square": True,
        "centered": True,
        "squared_denominator": True,
        "eps": 1e-2,
    },
    "adam": {"average": True, "square": True},
    "adam over sigma squared": {"average": True, "square": True, "squared_denominator": True, "eps": 1e-3},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Group:
    """The arguments of one step: tensors and everything else, and how to run it."""

    def __init__(self, sizes=SIZES, dtype=torch.float32, grad_dtype=None, batch=6, per_batch=False, kind="adam", **o):
        seen, state = o.get("seen", 3.0), o.get("state") or wide(dtype)
        # Contributions of `batch` examples, so that grad**2 <= B sum_grad_squared holds as in a real step.
        rows = [torch.randn(batch, *size) for size in sizes]
        self.params = [torch.randn(size).to(dtype) for size in sizes]
        self.grads = [c.sum(0).to(grad_dtype or dtype) for c in rows]
        self.sums = [] if per_batch else [c.square().sum(0).to(wide(dtype)) for c in rows]
        self.kind = kind
        self.exp_avg = self.exp_avg_sq = None
        length = state_starts(self.params)[-1]
        if KINDS[kind].get("average"):
            self.exp_avg = torch.randn(length).to(state)
        if KINDS[kind].get("square"):
            # Above the square of exp_avg, as in a real run.
            least = 0 if self.exp_avg is None else self.exp_avg.double().square()
            self.exp_avg_sq = (torch.rand(length) + 0.1 + least).to(state)
        self.seen = torch.full((len(sizes),), seen, dtype=torch.float64) + torch.arange(len(sizes))
        self.violations = torch.zeros(len(sizes), dtype=torch.int32)

    def written(self):
        return [
            *self.params,
            *(t for t in (self.exp_avg, self.exp_avg_sq) if t is not None),
            self.seen,
            self.violations,
        ]

    def read(self):
        return [t for t in (*self.grads, *self.sums) if t is not None]

    def views(self, flat):
        """The state of each parameter, copied."""
        if flat is None:
            return [None] * len(self.params)
        starts = state_starts(self.params)
        return [state_view(flat, start, p).clone() for start, p in zip(starts, self.params, strict=False)]

    def map(self, change):
        """Another group whose parameters, gradients and sums are changed one by one, into new memory."""
        other = Group((), kind=self.kind)
        for name in ("params", "grads", "sums"):
            setattr(other, name, [None if t is None else change(t) for t in getattr(self, name)])
        for name in ("exp_avg", "exp_avg_sq", "seen", "violations"):
            value = getattr(self, name)
            setattr(other, name, None if value is None else value.clone())
        return other

    def clone(self):
        return self.map(torch.clone)

    def step(self, which="public", **changes):
        use = {name: value for name, value in KINDS[self.kind].items() if name not in ("average", "square")}
        arguments = {**SCALARS, **use, **changes}
        for name in ("batch_size", "lr"):
            arguments[name] = torch.tensor(arguments[name], dtype=torch.float64)
        for name in ("grad_scale", "found_inf"):
            if name in arguments:
                arguments[name] = torch.tensor(arguments[name])
        defaults = {"weight_decay": 0.0, "centered": False, "squared_denominator": False, "lr_times_eps": False}
        defaults |= {"correct_g": True, "correct_s": True, "power": False, "mean_reduction": True, "maximize": False}
        call = implementation("optimizer_step_", which)
        tensors = (self.params, self.grads, self.sums, self.exp_avg, self.exp_avg_sq, self.seen, self.violations)
        call(*tensors, **{**defaults, "guard_rounds": 0, **arguments})
        return self


def weight_of_new(B, n, N, corrected, power):
    weight = 1 - (1 - 1 / N) ** B if power else min(1, B / N)
    return max(weight, min(1, B / n)) if corrected else weight


def transcription(p, grad, total, m, v, n, dtype, o):
    """One parameter's step in `dtype`; n: examples seen, this step's included; o: options by name."""
    B, scale = o["batch_size"], o.get("grad_scale", 1.0)
    p, grad, m, v = (None if t is None else t.to(dtype) for t in (p, grad, m, v))
    mean = o.get("mean_reduction", True)
    g_hat = grad / scale / (1 if mean else B)
    if o.get("maximize"):
        g_hat = -g_hat
    s_hat = g_hat**2 if total is None else total.to(dtype) / scale**2 * (B if mean else 1 / B)
    kappa_g = weight_of_new(B, n, o["n_g"], o.get("correct_g", True), o.get("power", False))
    kappa_s = weight_of_new(B, n, o["n_s"], o.get("correct_s", True), o.get("power", False))
    u = g_hat
    if m is not None:
        kappa = kappa_s if o.get("centered") else kappa_g
        m = (1 - kappa) * m + kappa * g_hat
        u = g_hat if o.get("centered") else m
    if v is not None:
        v = (1 - kappa_s) * v + kappa_s * s_hat
        d = (v - m**2).clamp(min=0) if o.get("centered") else v
        u = u / ((d if o.get("squared_denominator") else d.sqrt()) + o["eps"])
    eta = B * o["lr"] * (o["eps"] if o.get("lr_times_eps") else 1)
    return p - B * o["lr"] * o.get("weight_decay", 0.0) * p - eta * u, m, v


def check_step(which, group, **options):
    """Run one step and hold every parameter and state to the transcription."""
    before = group.clone()
    group.step(which, **options)
    o = {**SCALARS, **KINDS[group.kind], **options}
    has = [grad is not None for grad in before.grads]
    assert torch.equal(group.seen, before.seen + o["batch_size"] * torch.tensor(has, dtype=torch.float64))
    old = list(zip(before.views(before.exp_avg), before.views(before.exp_avg_sq), strict=True))
    new = list(zip(group.views(group.exp_avg), group.views(group.exp_avg_sq), strict=True))
    for i, p in enumerate(before.params):
        if before.grads[i] is None:
            assert torch.equal(group.params[i], p)
            assert all(a is None or torch.equal(a, b) for a, b in zip(new[i], old[i], strict=True))
            continue
        total = before.sums[i] if before.sums else None
        arguments = (p, before.grads[i], total, *old[i], float(group.seen[i]))
        expected, stock = (transcription(*arguments, d, o) for d in (torch.float64, wide(p.dtype)))
        results = (group.params[i], *new[i])
        for what, actual, e, s in zip(("param", "exp_avg", "exp_avg_sq"), results, expected, stock, strict=True):
            if actual is not None:
                dtype = p.dtype if what == "param" else old[i][0 if what == "exp_avg" else 1].dtype
                check_tensor(actual, e, s, dtype, f"{what}[{i}] of {tuple(p.shape)}")
    for before_, after in zip(before.read(), group.read(), strict=True):
        assert torch.equal(before_, after)


@both
@every_dtype
@every_kind
@pytest.mark.parametrize("per_batch", [False, True])
def test_step_equals_the_transcription(which, dtype, kind, per_batch):
    group = Group(dtype=dtype, per_batch=per_batch, kind=kind)
    for mean_reduction in (True, False):
        check_step(which, group, mean_reduction=mean_reduction)


@both
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@every_dtype
def test_gradient_in_another_dtype_than_the_parameter(which, dtype, grad_dtype):
    check_step(which, Group(((5,), (70, 9)), dtype, grad_dtype), guard_rounds=1)


OPTIONS = [
    {"weight_decay": 0.1},
    {"maximize": True},
    {"maximize": True, "weight_decay": 0.1, "mean_reduction": False},
    {"eps": 0.5},
    {"eps": 0.5, "lr_times_eps": True, "weight_decay": 0.1},
    {"grad_scale": 3.0},
    {"grad_scale": 1024.0, "mean_reduction": False, "found_inf": 0.0},
    {"n_g": math.inf, "n_s": math.inf},
    {"n_g": math.inf, "n_s": math.inf, "power": True, "correct_g": False, "correct_s": False},
    {"correct_g": False},
    {"correct_s": False},
    {"correct_g": False, "correct_s": False, "power": True},
    {"power": True},
    {"guard_rounds": 3},
    {"lr": 0.0},
]
# Not for the variance in the denominator: there it is the rounding of 0.
DEGENERATE = [
    {"batch_size": 1.0},
    {"batch_size": 1000.0},  # beyond n_g and n_s: nothing is averaged
    {"batch_size": 1000.0, "power": True},
    {"n_g": 1.0, "n_s": 1.0},
    {"n_g": 1.0, "n_s": 1.0, "power": True},
]


@both
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (kind, options)
        for kind in ("adam", "centered", "momentum")
        for options in OPTIONS + (DEGENERATE if kind != "centered" else [])
    ],
    ids=str,
)
def test_options_equal_the_transcription(which, kind, options):
    check_step(which, Group(kind=kind), **options)
    check_step(which, Group(((70,),), kind=kind, per_batch=True), **options)


@both
@every_kind
def test_parameters_without_a_gradient_are_left_alone(which, kind):
    group = Group(kind=kind)
    for i in (0, 3, 8):
        group.grads[i] = group.sums[i] = None
    group.violations[3] = 1
    check_step(which, group, guard_rounds=1, weight_decay=0.1)
    assert group.violations.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def joined(groups):
    """The parameters of `groups` in one call."""
    group = Group((), kind=groups[0].kind)
    for name in ("params", "grads", "sums"):
        setattr(group, name, [t for g in groups for t in getattr(g, name)])
    for name in ("exp_avg", "exp_avg_sq", "seen", "violations"):
        setattr(group, name, torch.cat([getattr(g, name) for g in groups]))
    return group


@both
def test_mixed_dtypes_in_one_call(which):
    for dtypes in (DTYPES[:1], DTYPES[1:]):  # float64 parameters have float64 state
        pairs = [(dtype, grad) for dtype in dtypes for grad in (dtype, torch.float32, torch.float64)]
        group = joined([Group(((3,), (40, 5), (2000,)), dtype, grad) for dtype, grad in pairs])
        check_step(which, group, guard_rounds=1)


@both
@pytest.mark.parametrize("count", [0, 1, 1500])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_many_tiny_tensors(which, count, kind):
    check_step(which, Group([(1 + i % 5,) for i in range(count)], kind=kind), guard_rounds=1)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_large_tensor_among_others(kind):
    check_step("public", Group(((3,), (10**7,), (9,)), kind=kind), guard_rounds=1)


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
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("seen", [0.0, 9.0])
def test_no_examples_change_nothing(which, mean_reduction, kind, seen):
    group = Group(kind=kind, seen=seen)
    before = group.clone()
    group.step(which, batch_size=0.0, mean_reduction=mean_reduction, guard_rounds=1, weight_decay=0.1, power=True)
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
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].get("square")])
def test_one_example_is_the_simplified_optimizer(which, kind):
    # MATHS, last section: with B = 1 the per-example squares are the squares of the gradient.
    ours = Group(batch=1, kind=kind)
    ours.sums = [g.square() for g in ours.grads]
    per_batch = ours.clone()
    per_batch.sums = []
    for a, e in zip(
        ours.step(which, batch_size=1.0).written(), per_batch.step(which, batch_size=1.0).written(), strict=True
    ):
        assert torch.equal(a, e)


@both
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].get("centered")])
def test_a_variance_that_rounds_below_zero_counts_as_zero(which, kind):
    group = Group(((70,), (3,)), kind=kind)
    group.grads = group.views(group.exp_avg)  # so that the averages stay what they are
    group.sums = [g.square() * ((1 - 2**-10) / 6) for g in group.grads]
    group.exp_avg_sq = group.exp_avg.square() * (1 - 2**-10)
    check_step(which, group)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["reference", "public"]),
)
def test_state_is_the_plain_mean_over_examples_until_the_averaging_time(batches, mean_reduction, power, which):
    generator = torch.Generator().manual_seed(sum(batches))
    group = Group(((7,),), torch.float64, seen=0.0)
    every = []
    for batch in batches:
        examples = torch.randn(batch, 7, generator=generator, dtype=torch.float64)
        every.append(examples)
        contributions = examples / max(batch, 1) if mean_reduction else examples
        group.grads, group.sums = [contributions.sum(0)], [contributions.square().sum(0)]
        options = {"n_g": 480.0, "n_s": 480.0, "mean_reduction": mean_reduction, "power": power}
        group.step(which, batch_size=float(batch), **options)
    every = torch.cat(every)
    if len(every):
        m, v = group.views(group.exp_avg)[0], group.views(group.exp_avg_sq)[0]
        check_tensor(m, every.mean(0), every.mean(0), torch.float64, "exp_avg")
        check_tensor(v, every.square().mean(0), every.square().mean(0), torch.float64, "exp_avg_sq")
    assert group.seen.item() == sum(batches)


@both
def test_the_power_form_keeps_the_same_fraction_of_the_past_in_one_step_or_many(which):
    """MATHS (19): nothing but the old state is left where the gradients are 0, however the examples are cut."""
    kept = []
    for batches in ([64], [1] * 64, [3, 60, 1]):
        torch.manual_seed(0)
        group = Group(((9,),), torch.float64, per_batch=True)
        group.grads = [torch.zeros(9, dtype=torch.float64)]
        for batch in batches:
            group.step(which, batch_size=float(batch), power=True, correct_g=False, correct_s=False)
        kept.append((group.views(group.exp_avg)[0], group.views(group.exp_avg_sq)[0]))
    for m, v in kept[1:]:
        check_tensor(m, kept[0][0], kept[0][0], torch.float64, "exp_avg")
        check_tensor(v, kept[0][1], kept[0][1], torch.float64, "exp_avg_sq")


# State in bfloat16


@both
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sgd"])
def test_state_in_bfloat16(which, dtype, kind):
    group = Group(dtype=dtype, kind=kind, state=torch.bfloat16)
    check_step(which, group, guard_rounds=1)


@both
def test_bfloat16_state_is_rounded_to_a_neighbour_and_right_on_average(which):
    group = Group(((40_000,),), state=torch.bfloat16, seen=100.0)
    exact = group.map(torch.clone)
    exact.exp_avg, exact.exp_avg_sq = group.exp_avg.float(), group.exp_avg_sq.float()
    options = {"n_g": 1000.0, "n_s": 100_000.0, "correct_g": False, "correct_s": False}  # changes below half a unit
    group.step(which, **options)
    exact.step(which, **options)
    for rounded, right in ((group.exp_avg, exact.exp_avg), (group.exp_avg_sq, exact.exp_avg_sq)):
        unit = torch.finfo(torch.bfloat16).eps * 2.0 ** right.abs().log2().floor()
        error = (rounded.float() - right) / unit
        assert error.abs().max() <= 1
        # Each error has variance at most 1/4: the mean of n is within 5 / (2 sqrt(n)) but for one in a million.
        assert error.mean().abs() < 2.5 / math.sqrt(len(error))
        assert not torch.equal(rounded.float(), right.bfloat16().float())


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_state_has_the_bits_of_the_reference_where_the_arithmetic_has(dtype):
    # kappa = 1: the averages are the new values, and scaling by powers of two is exact.
    ours = Group(((700, 3), (20_000,)), dtype, batch=4, state=torch.bfloat16)
    reference = ours.clone()
    for group, which in ((ours, "public"), (reference, "reference")):
        group.step(which, batch_size=4.0, n_g=4.0, n_s=4.0)
    assert torch.equal(ours.exp_avg, reference.exp_avg)
    assert torch.equal(ours.exp_avg_sq, reference.exp_avg_sq)


@both
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_bfloat16_state_keeps_what_is_not_finite(which, bad):
    group = Group(((600,),), state=torch.bfloat16)
    group.grads[0][17] = bad
    group.sums[0][17] = abs(bad)
    group.step(which)
    for flat in (group.exp_avg, group.exp_avg_sq):
        value = flat[17].item()
        assert math.isnan(value) if math.isnan(bad) else value in (bad, abs(bad))
        assert flat[:17].isfinite().all() and flat[18:600].isfinite().all()


# Memory layouts


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.clone()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "stepped", "offset"])
@pytest.mark.parametrize("moved", [("params",), ("grads",), ("params", "grads", "sums")], ids=str)
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
        params=[torch.ones(3)], grads=[torch.ones(3)], sums_grad_squared=[torch.ones(3)], exp_avg=torch.ones(64),
        exp_avg_sq=torch.ones(64), examples_seen=torch.zeros(1).double(), violations=torch.zeros(1).int(),
        batch_size=torch.tensor(1.0), lr=torch.tensor(0.1),
    )  # fmt: skip
    return good | changes


FLAT = "must be (64,) and contiguous, got"
WRONG = [
    ({"grads": []}, ValueError, "grads must have 1 tensors like params, got 0"),
    ({"sums_grad_squared": [torch.ones(3)] * 2}, ValueError, "sums_grad_squared must have 0 or 1 tensors, got 2"),
    ({"grads": [torch.ones(4)]}, ValueError, "grads[0] must be (3,) like params[0], got (4,)"),
    ({"grads": [torch.ones(1, 3)]}, ValueError, "grads[0] must be (3,) like params[0], got (1, 3)"),
    ({"sums_grad_squared": [torch.ones(())]}, ValueError, "sums_grad_squared[0] must be (3,) like params[0], got ()"),
    (
        {"grads": [torch.ones(3).int()]},
        TypeError,
        "grads[0] and params[0] must be floating, got torch.int32, torch.float32",
    ),
    (
        {"sums_grad_squared": [None]},
        ValueError,
        "sums_grad_squared[0] must be None where grads[0] is, and only there",
    ),
    (
        {"sums_grad_squared": [torch.ones(3).half()]},
        TypeError,
        "sums_grad_squared[0] must be torch.float32, got torch.float16",
    ),
    ({"exp_avg": torch.ones(3)}, ValueError, f"exp_avg {FLAT} (3,), strides (1,)"),
    ({"exp_avg_sq": torch.ones(128)[::2]}, ValueError, f"exp_avg_sq {FLAT} (64,), strides (2,)"),
    ({"exp_avg": torch.ones(64).half()}, TypeError, "exp_avg must be torch.float32 for params[0], got torch.float16"),
    (
        {"exp_avg": torch.ones(64).bfloat16()},
        TypeError,
        "exp_avg_sq must be torch.bfloat16 like exp_avg, got torch.float32",
    ),
    (
        {"centered": True, "exp_avg": None},
        ValueError,
        "centered=True needs exp_avg and exp_avg_sq, got None for one of them",
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
        optimizer_step_(**arguments(**changes))
    assert str(raised.value) == f"optimizer_step_: {message}"


@needs_extension
@pytest.mark.parametrize(
    "changes",
    [row[0] for row in WRONG if "got (1, 3)" not in row[2]]  # as many elements: harmless
    + [{name: torch.ones(size)} for name in ("batch_size", "lr", "found_inf", "grad_scale") for size in (0, 2)],
    ids=lambda value: None,
)
def test_direct_call_with_wrong_arguments_raises_and_changes_nothing(changes):
    given = dict(
        n_g=10.0, n_s=10.0, eps=1e-8, weight_decay=0.0, centered=False, squared_denominator=False, lr_times_eps=False,
        correct_g=True, correct_s=True, power=False, mean_reduction=True, maximize=False, guard_rounds=1,
    )  # fmt: skip
    given |= arguments(**changes)
    before = [t.clone() for value in given.values() if isinstance(value, list) for t in value if t is not None]
    with pytest.raises(RuntimeError, match="optimizer_step_: "):
        kernel("optimizer_step_")(**given)
    after = [t for value in given.values() if isinstance(value, list) for t in value if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
