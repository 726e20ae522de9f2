"""The fused step of every optimizer over many tensors (MATHS 2, 9-19), with the Cauchy-Schwarz guard."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import FLOATING, accumulate_dtype, register

__all__ = ["memory_order", "optimizer_step_", "state_starts", "state_view"]

STATE_PADDING = 64  # elements to which the state of each parameter is rounded up


def state_starts(params: Sequence[Tensor]) -> list[int]:
    """Where the state of each of `params` begins in the flat state of the step, and last the length of that state.

    Each begins a multiple of 64 elements after the start; a parameter of n elements takes n rounded up to that.
    """
    starts = [0]
    for p in params:
        starts.append(starts[-1] + -(-p.numel() // STATE_PADDING) * STATE_PADDING)
    return starts


def memory_order(p: Tensor) -> tuple[int, ...]:
    """The strides in which the step walks `p`: its own if its elements fill one block of memory, else row-major."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size != 1):
        if stride != expected:
            break
        expected *= size
    else:
        return p.stride()
    strides, expected = [], 1
    for size in reversed(p.shape):
        strides.append(expected)
        expected *= max(size, 1)
    return tuple(reversed(strides))


def state_view(flat: Tensor, start: int, p: Tensor) -> Tensor:
    """The part of the flat state that belongs to `p`, in its shape; in memory it lies as `p` does."""
    return flat.as_strided(p.shape, memory_order(p), flat.storage_offset() + start)


def _weight_of_new(batch: Tensor, seen: Tensor, horizon: float, corrected: bool, power: bool) -> Tensor:
    """MATHS (9)-(12), (19): the weight of the new value in a running average, `seen` counting this step."""
    if power:
        log_keep = -math.inf if horizon == 1 else math.log1p(-1 / horizon)
        weight = -torch.expm1(batch * log_keep)
    else:
        weight = (batch / horizon).clamp(max=1)
    if corrected:
        weight = torch.maximum(weight, (batch / seen.clamp(min=torch.finfo(seen.dtype).tiny)).clamp(max=1))
    return weight


def _round_state(value: Tensor, like: Tensor, seen: Tensor, shift: int) -> Tensor:
    """`value` in the dtype of the state `like`: to bfloat16 stochastically, so that small changes add up.

    Element j of the state is rounded up where the bits that are cut off exceed 16 bits of a hash of j and of the
    number of examples seen: the same in every run. `shift` tells which 16 of the hash's 32.
    """
    if like.dtype != torch.bfloat16:
        return value.to(like.dtype)
    mask = 0xFFFFFFFF
    index = state_view(torch.arange(like.numel(), device=like.device), 0, like)
    x = (index * 0x9E3779B1 + seen.to(torch.int64)) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    x = x ^ (x >> 16)
    wide = value.to(torch.float32)
    bits = (wide.view(torch.int32).to(torch.int64) & mask) + ((x >> shift) & 0xFFFF)
    rounded = (bits & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(wide.isfinite(), rounded, wide).to(torch.bfloat16)


def _reference(
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
    device = examples_seen.device
    batch = batch_size.reshape(()).to(device, torch.float64)
    proceed = batch > 0  # a step on no examples is none
    if found_inf is not None:
        proceed = proceed & (found_inf.reshape(()).to(device) == 0)
    inverse = torch.ones_like(batch) if grad_scale is None else 1.0 / grad_scale.reshape(()).to(device, torch.float64)
    rate = batch * lr.reshape(()).to(device, torch.float64)
    step_size = rate * eps if lr_times_eps else rate
    starts = state_starts(params)
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None:
            continue
        seen = examples_seen[i]
        seen.add_(torch.where(proceed, batch, torch.zeros_like(batch)))
        wide = torch.promote_types(accumulate_dtype(p.dtype), accumulate_dtype(grad.dtype))
        kappa_g = _weight_of_new(batch, seen, n_g, correct_g, power)
        kappa_s = _weight_of_new(batch, seen, n_s, correct_s, power)
        # MATHS (2): the mean gradient, and the mean of the squared per-example gradients.
        raw = grad.to(wide)
        mean = raw * (inverse if mean_reduction else inverse / batch).to(wide)
        if maximize:
            mean = -mean
        total = sums_grad_squared[i] if sums_grad_squared else None
        if total is None:
            square = mean.square()
        else:
            square = total.to(wide) * (inverse * inverse * (batch if mean_reduction else 1.0 / batch)).to(wide)
            if guard_rounds > 0:
                bound = batch * (total.double() + batch * torch.finfo(total.dtype).tiny)
                slack = _guard_slack(grad.dtype, batch, guard_rounds)
                excess = (raw.double().abs() - _guard_absolute(grad.dtype, guard_rounds)).clamp(min=0)
                wrong = (excess.square() > (1 + slack) ** 2 * bound) & raw.isfinite()
                violations[i].copy_((violations[i] != 0) | (wrong.any() & proceed))
        update = mean
        average = None
        if exp_avg is not None:
            state = state_view(exp_avg, starts[i], p)
            kappa = kappa_s if centered else kappa_g
            average = (1 - kappa).to(wide) * state.to(wide) + kappa.to(wide) * mean
            state.copy_(torch.where(proceed, _round_state(average, state, seen, 0), state))
            if not centered:
                update = average
        if exp_avg_sq is not None:
            state = state_view(exp_avg_sq, starts[i], p)
            average_sq = (1 - kappa_s).to(wide) * state.to(wide) + kappa_s.to(wide) * square
            state.copy_(torch.where(proceed, _round_state(average_sq, state, seen, 16), state))
            denominator = average_sq
            if centered and average is not None:
                denominator = (average_sq - average.square()).clamp(min=0)
            update = update / ((denominator if squared_denominator else denominator.sqrt()) + eps)
        new_p = (1 - rate * weight_decay).to(wide) * p.to(wide) - step_size.to(wide) * update
        p.copy_(torch.where(proceed, new_p.to(p.dtype), p))


def _guard_slack(dtype: torch.dtype, batch: Tensor, rounds: int) -> Tensor:
    """How far rounding alone can carry |grad| beyond ``sqrt(B sum_grad_squared)``, relatively.

    A sum over B examples in the accumulation dtype, and for a half-precision gradient one rounding a backward pass.
    """
    accumulated = (batch + 16) * torch.finfo(accumulate_dtype(dtype)).eps
    return accumulated + (2 + rounds) * torch.finfo(dtype).eps


def _guard_absolute(dtype: torch.dtype, rounds: int) -> float:
    """The same where the gradient is subnormal: half of the smallest number for every rounding."""
    return (1 + rounds) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def _fake(*args: object, **kwargs: object) -> None:
    return None


_op = register(
    "optimizer_step_(Tensor(a!)[] params, Tensor?[] grads, Tensor?[] sums_grad_squared, Tensor(b!)? exp_avg,"
    " Tensor(c!)? exp_avg_sq, Tensor(d!) examples_seen, Tensor(e!) violations, Tensor batch_size, Tensor lr,"
    " float n_g, float n_s, float eps, float weight_decay, bool centered, bool squared_denominator, bool lr_times_eps,"
    " bool correct_g, bool correct_s, bool power, bool mean_reduction, bool maximize, int guard_rounds,"
    " Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    _reference,
    _fake,
)


def optimizer_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    sums_grad_squared: Sequence[Tensor | None],
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    examples_seen: Tensor,
    violations: Tensor,
    *,
    batch_size: Tensor,
    lr: Tensor,
    n_g: float = 1.0,
    n_s: float = 1.0,
    eps: float = 0.0,
    weight_decay: float = 0.0,
    centered: bool = False,
    squared_denominator: bool = False,
    lr_times_eps: bool = False,
    correct_g: bool = True,
    correct_s: bool = True,
    power: bool = False,
    mean_reduction: bool = True,
    maximize: bool = False,
    guard_rounds: int = 0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of many tensors, in place (MATHS 2, 9-19): SGD, momentum, RMSprop, Adam and their relatives.

    For a mean-reduced loss ``ghat = grad`` and ``s = B sum_grad_squared`` (for a sum-reduced one ``grad / B`` and
    ``sum_grad_squared / B``; ``s = ghat**2`` where no `sums_grad_squared` are given; ``-ghat`` for ghat where
    `maximize`). With n the examples seen including this step, the weight of a new value in a running average is
    ``kappa = min(1, B / N)``, or ``1 - (1 - 1 / N)**B`` where `power`, and at least ``B / n`` where corrected::

        exp_avg    = (1 - kappa_g) exp_avg + kappa_g ghat            # if there is an exp_avg
        exp_avg_sq = (1 - kappa_s) exp_avg_sq + kappa_s s            # if there is an exp_avg_sq
        u          = exp_avg, or ghat without
        d          = sqrt(exp_avg_sq), or exp_avg_sq where squared_denominator
        param      = (1 - B lr weight_decay) param - B lr u / (d + eps)        # - B lr u without exp_avg_sq

    `centered`: exp_avg has the weights of exp_avg_sq, ``exp_avg_sq - exp_avg**2`` takes the place of exp_avg_sq in d,
    and ``u = ghat``.

    Args:
        params: to update; any floating dtype, dense.
        grads: of the shapes of `params`; a parameter whose gradient is None is left alone, with all that is its own.
        sums_grad_squared: float32 (float64 for float64 parameters), None where the gradient is; empty: per batch.
        exp_avg, exp_avg_sq: None, or state: (state_starts(params)[-1],) float32 or bfloat16 (float64 where parameters
            are), in which parameter i has the part `state_view(exp_avg, state_starts(params)[i], params[i])`.
            bfloat16 is rounded stochastically, by a hash of the element's number and of `examples_seen`.
        examples_seen: (len(params),) float64  advanced by `batch_size`.
        violations: (len(params),) int32  set to 1 where ``grad**2 > B sum_grad_squared`` beyond rounding
            (Cauchy-Schwarz), which shows that part of the gradient did not pass through the layers.
        batch_size, lr: scalars on the device; `lr` is the one for batch size 1.
        n_g, n_s: averaging times in examples.
        lr_times_eps: the step is ``eps B lr`` instead of ``B lr`` (the decay is not scaled).
        correct_g, correct_s: whether the averages start as plain means (bias correction).
        guard_rounds: backward passes accumulated in `grads`, for the guard's allowance; 0: no guard.
        grad_scale, found_inf: scalars of torch.amp.GradScaler; gradients are divided by `grad_scale`, second
            moments by its square, and nothing changes where `found_inf` is not 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    name = "optimizer_step_"
    count = len(params)
    if len(grads) != count:
        raise ValueError(f"{name}: grads must have {count} tensors like params, got {len(grads)}")
    if len(sums_grad_squared) not in (0, count):
        raise ValueError(f"{name}: sums_grad_squared must have 0 or {count} tensors, got {len(sums_grad_squared)}")
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        total = sums_grad_squared[i] if sums_grad_squared else None
        for label, value in (("grads", grad), ("sums_grad_squared", total)):
            if value is None:
                continue
            if value.shape != p.shape:
                raise ValueError(
                    f"{name}: {label}[{i}] must be {tuple(p.shape)} like params[{i}], got {tuple(value.shape)}"
                )
            if value.dtype not in FLOATING or p.dtype not in FLOATING:
                raise TypeError(f"{name}: {label}[{i}] and params[{i}] must be floating, got {value.dtype}, {p.dtype}")
        if sums_grad_squared and (grad is None) != (total is None):
            raise ValueError(f"{name}: sums_grad_squared[{i}] must be None where grads[{i}] is, and only there")
        if total is not None and total.dtype != accumulate_dtype(p.dtype):
            raise TypeError(f"{name}: sums_grad_squared[{i}] must be {accumulate_dtype(p.dtype)}, got {total.dtype}")
    length = state_starts(params)[-1]
    for label, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if value is None:
            continue
        if value.shape != (length,) or not value.is_contiguous():
            raise ValueError(
                f"{name}: {label} must be ({length},) and contiguous, got {tuple(value.shape)}, strides "
                f"{value.stride()}"
            )
        for i, p in enumerate(params):
            wide = accumulate_dtype(p.dtype)
            if value.dtype != wide and not (value.dtype == torch.bfloat16 and wide == torch.float32):
                raise TypeError(f"{name}: {label} must be {wide} for params[{i}], got {value.dtype}")
    if exp_avg is not None and exp_avg_sq is not None and exp_avg.dtype != exp_avg_sq.dtype:
        raise TypeError(f"{name}: exp_avg_sq must be {exp_avg.dtype} like exp_avg, got {exp_avg_sq.dtype}")
    if centered and (exp_avg is None or exp_avg_sq is None):
        raise ValueError(f"{name}: centered=True needs exp_avg and exp_avg_sq, got None for one of them")
    for label, value, dtype in (
        ("examples_seen", examples_seen, torch.float64),
        ("violations", violations, torch.int32),
    ):
        if value.shape != (count,) or value.dtype != dtype:
            raise ValueError(f"{name}: {label} must be ({count},) {dtype}, got {tuple(value.shape)} {value.dtype}")
    _op(
        list(params),
        list(grads),
        list(sums_grad_squared),
        exp_avg,
        exp_avg_sq,
        examples_seen,
        violations,
        batch_size,
        lr,
        n_g,
        n_s,
        eps,
        weight_decay,
        centered,
        squared_denominator,
        lr_times_eps,
        correct_g,
        correct_s,
        power,
        mean_reduction,
        maximize,
        guard_rounds,
        grad_scale,
        found_inf,
    )
