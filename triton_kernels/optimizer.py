"""The fused step of every optimizer over many tensors (MATHS 2, 9-19), with the Cauchy-Schwarz guard.

With B examples in the step and n so far, ``ghat = grad`` and ``s = B sum_grad_squared`` (2; for a sum-reduced loss
``grad / B`` and ``sum_grad_squared / B``; ``s = ghat**2`` per batch), a new value weighs ``kappa = min(1, B / N)`` (9,
12) or ``1 - (1 - 1 / N)**B`` (19), at least ``B / n`` where corrected (10, 11)::

    m = (1 - kappa_g) m + kappa_g ghat          v = (1 - kappa_s) v + kappa_s s
    p = (1 - B lr weight_decay) p - B lr u / (d + eps)          (13)-(16), (18)

u is m, or ghat without; d is sqrt(v), or v; centered, v - m**2 in place of v, and u = ghat.

Three kernels. What is to be known of the tensors reaches the device in the arguments of `_table`, so that there is no
copy from the host; `_constants` counts the examples and turns the scalars, which are on the device, into the factors of
each tensor; `_step` takes all tensors of the same dtypes at once, a chunk of one tensor for each program.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, configs

# A row of the table: three addresses, elements, where its state begins, its number among the parameters, first chunk.
COLUMNS = tl.constexpr(7)
# A row of the constants, in float64, in the order in which `_constants` stores them.
FACTORS = tl.constexpr(14)
# Added to every word on its way: whatever an argument holds, it is then a 64-bit one, and needs no other kernel.
LIFT = tl.constexpr(1 << 62)


@triton.jit(do_not_specialize=["words"])
def _table(table, words):
    """Write the words, which travel as arguments, to the table."""
    for k in tl.static_range(len(words)):
        tl.store(table + k, words[k] - LIFT)


@triton.jit
def weight_of_new(batch, seen, horizon, log_keep, CORRECTED: tl.constexpr, POWER: tl.constexpr):
    """kappa = min(1, B / N) or 1 - (1 - 1 / N)**B, at least B / n where CORRECTED, at most 1  (MATHS 9-12, 19).

    `batch` is B, `horizon` N, `seen` n, this step included; log_keep = log(1 - 1 / N).
    """
    if POWER:
        # -expm1(x) by way of exp and log: their errors cancel (Kahan).
        x = batch * log_keep
        kept = tl.exp(x)
        weight = tl.where(kept == 1, -x, tl.where(kept == 0, 1.0, (1 - kept) * x / tl.log(kept)))
    else:
        weight = batch / horizon
    weight = tl.zeros_like(seen) + weight
    if CORRECTED:
        weight = tl.maximum(weight, batch / tl.maximum(seen, 2.2250738585072014e-308))
    return tl.minimum(weight, 1.0)


@triton.jit(do_not_specialize=["rows"])
def _constants(
    table, constants, examples_seen, seen_stride, batch_size, lr, grad_scale, found_inf, rows,
    n_g: tl.float64, n_s: tl.float64, log_keep_g: tl.float64, log_keep_s: tl.float64, eps: tl.float64,
    weight_decay: tl.float64, slack: tl.float64, slack_of_example: tl.float64, tiny: tl.float64, absolute: tl.float64,
    SCALED: tl.constexpr, FOUND: tl.constexpr, CENTERED: tl.constexpr, LR_TIMES_EPS: tl.constexpr,
    CORRECT_G: tl.constexpr, CORRECT_S: tl.constexpr, POWER: tl.constexpr, MEAN: tl.constexpr, MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """n += B, unless the step is none, and of every row of the table the factors in `update` (MATHS 2, 9-19).

    ghat = grad / grad_scale, of a sum-reduced loss over B too; of s = B sum_grad_squared the same squared.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    batch = tl.load(batch_size).to(tl.float64)
    rate = batch * tl.load(lr).to(tl.float64)
    proceed = batch > 0
    if FOUND:
        proceed = proceed & (tl.load(found_inf).to(tl.float64) == 0)
    inverse = batch * 0 + 1
    if SCALED:
        inverse = 1 / tl.load(grad_scale).to(tl.float64)
    index = tl.load(table + row * COLUMNS + 5, mask=inside, other=0)
    seen = tl.load(examples_seen + index * seen_stride, mask=inside, other=1.0) + tl.where(proceed, batch, 0.0)
    tl.store(examples_seen + index * seen_stride, seen, mask=inside)
    kappa_s = weight_of_new(batch, seen, n_s, log_keep_s, CORRECT_S, POWER)
    kappa_g = kappa_s if CENTERED else weight_of_new(batch, seen, n_g, log_keep_g, CORRECT_G, POWER)
    scale = inverse if MEAN else inverse / batch
    square_scale = inverse * inverse * batch if MEAN else inverse * inverse / batch
    # How far rounding alone can carry |grad| beyond sqrt(B sum_grad_squared).
    most = 1 + slack + (batch + 16) * slack_of_example
    one = tl.zeros_like(seen) + 1
    c = constants + row * FACTORS
    tl.store(c, 1 - kappa_g, mask=inside)
    tl.store(c + 1, kappa_g, mask=inside)
    tl.store(c + 2, 1 - kappa_s, mask=inside)
    tl.store(c + 3, kappa_s, mask=inside)
    tl.store(c + 4, one * (-scale if MAXIMIZE else scale), mask=inside)
    tl.store(c + 5, one * square_scale, mask=inside)
    tl.store(c + 6, one * (1 - rate * weight_decay), mask=inside)
    tl.store(c + 7, one * (rate * eps if LR_TIMES_EPS else rate), mask=inside)
    tl.store(c + 8, one * (most * most * batch), mask=inside)
    tl.store(c + 9, one * (batch * tiny), mask=inside)
    tl.store(c + 10, one * eps, mask=inside)
    tl.store(c + 11, one * absolute, mask=inside)
    tl.store(c + 12, seen, mask=inside)
    tl.store(c + 13, tl.where(proceed, one, 0.0), mask=inside)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded: of float32 Triton's own is not."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def root(x):
    """sqrt(x), correctly rounded: of float32 Triton's own is not."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """`value` in another dtype; to half precision by way of float32, also from float64."""
    if DTYPE != tl.float64:
        value = value.to(tl.float32)
    return value.to(DTYPE)


@triton.jit
def in_state(value, i, seed, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """`value` in the dtype of the state: to bfloat16 stochastically, so that small changes add up.

    Element i is rounded up where the bits that are cut off exceed 16, from SHIFT on, of a hash of i and of the number
    of examples seen: the same in every run.
    """
    if DTYPE == tl.bfloat16:
        x = i.to(tl.uint32) * 0x9E3779B1 + seed
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        quiet = tl.where((bits & 0x7FFFFF) != 0, bits | 0x400000, bits)  # a NaN must not become an infinity
        bits = tl.where(finite, bits + ((x >> SHIFT) & 0xFFFF), quiet)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return narrow(value, DTYPE)


@triton.jit
def read(data, i, n, WIDE: tl.constexpr, MASKED: tl.constexpr):
    """Elements i of an array of n, widened."""
    if MASKED:
        return tl.load(data + i, mask=i < n, other=0).to(WIDE)
    else:
        return tl.load(data + i).to(WIDE)


@triton.jit
def update(
    p, grad, total, m, v, i, n, factors, seed, SUMS: tl.constexpr, GUARD: tl.constexpr, AVERAGE: tl.constexpr,
    SQUARE: tl.constexpr, CENTERED: tl.constexpr, SQUARED_DENOMINATOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """m = keep_g m + take_g ghat,  v = keep_s v + take_s s,  p = keep p - step_size u / (d + eps)  (MATHS 9, 13-18).

    Of elements i of one tensor. Returns 1 where the guard sees more than examples can have brought: |grad|**2 must not
    exceed B sum_grad_squared (Cauchy-Schwarz) by more than rounding does.
    """
    keep_g, take_g, keep_s, take_s, scale, square_scale, keep, step_size, guard, tiny, eps, absolute = factors
    wide: tl.constexpr = eps.dtype
    inside = i < n if MASKED else None
    g = read(grad, i, n, wide, MASKED)
    mean = scale * g
    square = mean * mean
    flagged = tl.zeros_like(i).to(tl.int32)
    if SUMS:
        q = read(total, i, n, wide, MASKED)
        square = square_scale * q
        if GUARD:
            excess = tl.abs(g) - absolute
            wrong = (g - g == 0) & (excess > 0) & (excess * excess > guard * (q + tiny))
            flagged = wrong.to(tl.int32)
    along = mean
    if AVERAGE:
        average = keep_g * read(m, i, n, wide, MASKED) + take_g * mean
        tl.store(m + i, in_state(average, i, seed, 0, m.dtype.element_ty), mask=inside)
        if not CENTERED:
            along = average
    if SQUARE:
        d = keep_s * read(v, i, n, wide, MASKED) + take_s * square
        tl.store(v + i, in_state(d, i, seed, 16, v.dtype.element_ty), mask=inside)
        if CENTERED:
            d -= average * average
            d = tl.where(d < 0, 0.0, d)  # rounding can make it negative
        along = divide(along, (d if SQUARED_DENOMINATOR else root(d)) + eps)
    value = keep * read(p, i, n, wide, MASKED) - step_size * along
    tl.store(p + i, narrow(value, p.dtype.element_ty), mask=inside)
    return flagged


@triton.jit(do_not_specialize=["rows"])
def _step(
    table, constants, exp_avg, exp_avg_sq, violations, flag_stride, rows,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, SUMS: tl.constexpr, GUARD: tl.constexpr,
    AVERAGE: tl.constexpr, SQUARE: tl.constexpr, CENTERED: tl.constexpr, SQUARED_DENOMINATOR: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p = keep p - step_size u / (d + eps), and m and v, by `update`  (MATHS 9, 13-18), of one chunk of a tensor.

    All tensors have the dtypes PARAM and GRAD.
    """
    double: tl.constexpr = PARAM == tl.float64 or GRAD == tl.float64
    wide: tl.constexpr = tl.float64 if double else tl.float32
    chunk = tl.program_id(0)
    # The tensor: the last one whose first chunk is not after this one.
    low = chunk * 0
    high = low + rows
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * COLUMNS + 6) <= chunk
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    row = table + low * COLUMNS
    p = tl.load(row).to(tl.pointer_type(PARAM))
    grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
    total = tl.load(row + 2).to(tl.pointer_type(tl.float64 if PARAM == tl.float64 else tl.float32))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
        grad = tl.multiple_of(grad, 16)
        total = tl.multiple_of(total, 16)
    start = tl.multiple_of(tl.load(row + 4), 64)
    m = exp_avg + start
    v = exp_avg_sq + start
    c = constants + low * FACTORS
    factors = (
        tl.load(c).to(wide), tl.load(c + 1).to(wide), tl.load(c + 2).to(wide), tl.load(c + 3).to(wide),
        tl.load(c + 4).to(wide), tl.load(c + 5).to(wide), tl.load(c + 6).to(wide), tl.load(c + 7).to(wide),
        tl.load(c + 8).to(wide), tl.load(c + 9).to(wide), tl.load(c + 10).to(wide), tl.load(c + 11).to(wide),
    )  # fmt: skip
    seed = tl.load(c + 12).to(tl.int64).to(tl.uint32)
    n = tl.where(tl.load(c + 13) != 0, tl.load(row + 3), 0)  # of a step that is none, no elements
    begin = (chunk - tl.load(row + 6)) * CHUNK
    lane = tl.arange(0, BLOCK).to(tl.int64)
    flagged = tl.zeros((BLOCK,), tl.int32)
    left = tl.minimum(n - begin, CHUNK).to(tl.int32)
    if left == CHUNK:  # without a mask, so that loads come in whole vectors
        for first in range(0, CHUNK, BLOCK):
            flagged |= update(
                p, grad, total, m, v, begin + first + lane, n, factors, seed, SUMS, GUARD, AVERAGE, SQUARE, CENTERED,
                SQUARED_DENOMINATOR, False,
            )  # fmt: skip
    else:
        for first in range(0, left, BLOCK):
            flagged |= update(
                p, grad, total, m, v, begin + first + lane, n, factors, seed, SUMS, GUARD, AVERAGE, SQUARE, CENTERED,
                SQUARED_DENOMINATOR, True,
            )  # fmt: skip
    if GUARD:  # all that write it write the same
        tl.store(violations + tl.load(row + 5) * flag_stride, 1, mask=tl.max(flagged, 0) > 0)


NAME = "optimizer_step_"
STATE_PADDING = 64  # elements to which the state of each parameter is rounded up: see perexample.ops.optimizer
Row = tuple[int, ...]


def _check(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], sums_grad_squared: Sequence[Tensor | None],
    exp_avg: Tensor | None, exp_avg_sq: Tensor | None, examples_seen: Tensor, violations: Tensor, centered: bool,
) -> None:  # fmt: skip
    """Raise RuntimeError where the kernels would read or write what they must not."""
    count, device = len(params), examples_seen.device
    right = len(grads) == count and len(sums_grad_squared) in (0, count)
    _launch.check(NAME, right, "all lists must be of one length")
    for name, vector, dtype in (
        ("examples_seen", examples_seen, torch.float64), ("violations", violations, torch.int32),
    ):  # fmt: skip
        right = vector.shape == (count,) and vector.dtype == dtype and vector.device == device
        _launch.check(NAME, right, f"{name} must be ({count},) {dtype} on {device}")
    length = sum(-(-p.numel() // STATE_PADDING) * STATE_PADDING for p in params)
    state = [t for t in (exp_avg, exp_avg_sq) if t is not None]
    for t in state:
        right = t.shape == (length,) and t.is_contiguous() and t.dtype == state[0].dtype and t.device == device
        _launch.check(NAME, right, f"exp_avg and exp_avg_sq must be ({length},), contiguous, of one dtype, on {device}")
    _launch.check(NAME, not centered or len(state) == 2, "centered needs exp_avg and exp_avg_sq")
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        wide = _launch.accumulate_dtype(p.dtype)
        for t in state:
            right = t.dtype == wide or (t.dtype == torch.bfloat16 and wide == torch.float32)
            _launch.check(NAME, right, f"exp_avg and exp_avg_sq must be {wide} or bfloat16 for params[{i}]")
        if grad is None:
            continue
        total = sums_grad_squared[i] if sums_grad_squared else None
        right = not sums_grad_squared or (total is not None and total.dtype == wide)
        _launch.check(NAME, right, f"sums_grad_squared[{i}] must be {wide}")
        for t in (p, grad, total):
            right = t is None or (t.is_floating_point() and t.shape == p.shape and t.device == device)
            _launch.check(NAME, right, f"all tensors of params[{i}] must be floating, {tuple(p.shape)}, on {device}")


def _scalar(name: str, value: Tensor | None, device: torch.device) -> Tensor | None:
    """A scalar where the kernels can read it; one on the CPU reaches the device as an argument."""
    if value is None:
        return None
    _launch.check(NAME, value.numel() == 1, f"{name} must have one element, got {tuple(value.shape)}")
    return value if value.device == device else torch.full((), value.item(), dtype=torch.float64, device=device)


def _in_one_order(p: Tensor, others: list[Tensor | None]) -> list[Tensor | None]:
    """`p` and `others` as contiguous tensors in which equal places belong together, copied only where they have to be.

    The order is that of `p` in memory if its elements fill one block, else row-major; the state lies in it too.
    """
    tensors = [p.detach(), *(None if t is None else t.detach() for t in others)]
    if not p.is_contiguous():
        order = sorted(range(p.dim()), key=p.stride, reverse=True)
        if p.permute(order).is_contiguous():
            tensors = [None if t is None else t.permute(order) for t in tensors]
    return [None if t is None else t.contiguous() for t in tensors]


def _write_table(rows: list[Row], device: torch.device) -> Tensor:
    """The rows as a tensor on the device, without a copy from the host, which could not be captured in a CUDA graph."""
    most = configs.STEP.rows
    size = most if len(rows) > most else _launch.power_of_two(len(rows))  # few lengths, each a kernel of its own
    table = torch.empty((_launch.cdiv(len(rows), size) * size, COLUMNS.value), dtype=torch.int64, device=device)
    for first in range(0, len(rows), size):
        words = [word + LIFT.value for row in rows[first : first + size] for word in row]
        words += [LIFT.value] * (size * COLUMNS.value - len(words))
        _launch.launch(_table, (1,), table[first:], tuple(words), num_warps=1)
    return table


def optimizer_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    sums_grad_squared: Sequence[Tensor | None],
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    examples_seen: Tensor,
    violations: Tensor,
    batch_size: Tensor,
    lr: Tensor,
    n_g: float,
    n_s: float,
    eps: float,
    weight_decay: float,
    centered: bool,
    squared_denominator: bool,
    lr_times_eps: bool,
    correct_g: bool,
    correct_s: bool,
    power: bool,
    mean_reduction: bool,
    maximize: bool,
    guard_rounds: int,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The dispatcher's kernel of `perexample.ops.optimizer_step_`: SGD, momentum, RMSprop, Adam and their relatives."""
    _check(params, grads, sums_grad_squared, exp_avg, exp_avg_sq, examples_seen, violations, centered)
    device, config = examples_seen.device, configs.STEP
    batch_size, lr, grad_scale, found_inf = (
        _scalar(name, value, device)
        for name, value in zip(
            ("batch_size", "lr", "grad_scale", "found_inf"), (batch_size, lr, grad_scale, found_inf), strict=True
        )
    )
    # One launch for all tensors of one kind: dtypes of parameter and gradient, whether addresses are aligned.
    kinds: defaultdict[tuple[torch.dtype, torch.dtype, bool], list[Row]] = defaultdict(list)
    chunks: defaultdict[tuple[torch.dtype, torch.dtype, bool], int] = defaultdict(int)
    walked, start = [], 0
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        n, own = p.numel(), start
        start += -(-n // STATE_PADDING) * STATE_PADDING
        if grad is None:
            continue
        tensors = _in_one_order(p, [grad, sums_grad_squared[i] if sums_grad_squared else None])
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        kind = (p.dtype, grad.dtype, all(address % 16 == 0 for address in addresses))
        kinds[kind].append((*addresses, n, own, i, chunks[kind]))
        chunks[kind] += _launch.cdiv(n, config.chunk)
        walked.append((p, tensors))  # copies have to live until their kernels are on their way
    guard = guard_rounds > 0 and bool(sums_grad_squared)
    for kind, rows in kinds.items():
        dtype, grad_dtype, aligned = kind
        rounding, table = torch.finfo(grad_dtype), _write_table(rows, device)
        wide = torch.finfo(_launch.accumulate_dtype(grad_dtype))
        constants = torch.empty((len(rows), FACTORS.value), dtype=torch.float64, device=device)
        _launch.launch(
            _constants, (_launch.cdiv(len(rows), config.rows),), table, constants, examples_seen,
            examples_seen.stride(0), batch_size, lr, lr if grad_scale is None else grad_scale,
            lr if found_inf is None else found_inf, len(rows), n_g, n_s, _log_keep(n_g), _log_keep(n_s), eps,
            weight_decay, (2 + guard_rounds) * rounding.eps, wide.eps,
            torch.finfo(_launch.accumulate_dtype(dtype)).tiny,
            (1 + guard_rounds) * rounding.smallest_normal * rounding.eps / 2, SCALED=grad_scale is not None,
            FOUND=found_inf is not None, CENTERED=centered, LR_TIMES_EPS=lr_times_eps, CORRECT_G=correct_g,
            CORRECT_S=correct_s, POWER=power, MEAN=mean_reduction, MAXIMIZE=maximize, BLOCK=config.rows,
        )  # fmt: skip
        if chunks[kind] == 0:
            continue
        unused = violations if exp_avg_sq is None else exp_avg_sq
        _launch.launch(
            _step, (chunks[kind],), table, constants, unused if exp_avg is None else exp_avg, unused, violations,
            violations.stride(0), len(rows),
            PARAM=_triton_dtype(dtype), GRAD=_triton_dtype(grad_dtype), ALIGNED=aligned, SUMS=bool(sums_grad_squared),
            GUARD=guard, AVERAGE=exp_avg is not None, SQUARE=exp_avg_sq is not None, CENTERED=centered,
            SQUARED_DENOMINATOR=squared_denominator, CHUNK=config.chunk, BLOCK=config.block, num_warps=config.warps,
            maxnreg=config.registers,
        )  # fmt: skip
    for p, tensors in walked:
        if tensors[0].data_ptr() != p.data_ptr():
            p.detach().copy_(tensors[0])


def _log_keep(horizon: float) -> float:
    """log(1 - 1 / N), by which the power form (19) forgets with every example."""
    return -math.inf if horizon == 1 else math.log1p(-1 / horizon)


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))
