"""The fused Adam step over many tensors (MATHS 2, 11, 16-18), with the Cauchy-Schwarz guard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import FLOATING, accumulate_dtype, register

__all__ = ["adam_step_"]


def _weight_of_new(batch: Tensor, seen: Tensor, horizon: float) -> Tensor:
    """MATHS (11): ``min(1, B / min(n, N0))``, n counting this step; 0 where nothing was seen yet."""
    return (batch / seen.clamp(max=horizon).clamp(min=torch.finfo(seen.dtype).tiny)).clamp(max=1)


def _reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    sums_grad_squared: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    examples_seen: Tensor,
    violations: Tensor,
    batch_size: Tensor,
    lr: Tensor,
    n_g: float,
    n_s: float,
    eps: float,
    weight_decay: float,
    mean_reduction: bool,
    maximize: bool,
    guard_rounds: int,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    proceed = torch.ones((), dtype=torch.bool, device=examples_seen.device)
    if found_inf is not None:
        proceed = found_inf.reshape(()).to(examples_seen.device) == 0
    batch = batch_size.reshape(()).double()
    proceed = proceed & (batch > 0)  # a step on no examples is none
    examples_seen.add_(torch.where(proceed, batch, torch.zeros_like(batch)))
    inverse = 1.0 if grad_scale is None else 1.0 / grad_scale.reshape(()).double()
    step_size = batch * lr.reshape(()).double()
    for i, (p, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        wide = exp_avg.dtype
        kappa_g = _weight_of_new(batch, examples_seen[i], n_g).to(wide)
        kappa_s = _weight_of_new(batch, examples_seen[i], n_s).to(wide)
        # MATHS (2): the mean gradient, and the mean of the squared per-example gradients.
        raw = grad.to(wide)
        mean = raw * torch.as_tensor(inverse if mean_reduction else inverse / batch, dtype=wide, device=p.device)
        if maximize:
            mean = -mean
        if sums_grad_squared:
            factor = inverse * inverse * (batch if mean_reduction else 1.0 / batch)
            square = sums_grad_squared[i] * factor.to(wide)
            if guard_rounds > 0:
                bound = batch * (sums_grad_squared[i].double() + batch * torch.finfo(sums_grad_squared[i].dtype).tiny)
                slack = _guard_slack(grad.dtype, batch, guard_rounds)
                excess = (raw.double().abs() - _guard_absolute(grad.dtype, guard_rounds)).clamp(min=0)
                wrong = (excess.square() > (1 + slack) ** 2 * bound) & raw.isfinite()
                violations[i].copy_((violations[i] != 0) | (wrong.any() & proceed))
        else:
            square = mean.square()
        new_avg = (1 - kappa_g) * exp_avg + kappa_g * mean
        new_avg_sq = (1 - kappa_s) * exp_avg_sq + kappa_s * square
        wide_p = p.to(wide)
        new_p = (1 - step_size * weight_decay).to(wide) * wide_p - step_size.to(wide) * new_avg / (
            new_avg_sq.sqrt() + eps
        )
        exp_avg.copy_(torch.where(proceed, new_avg, exp_avg))
        exp_avg_sq.copy_(torch.where(proceed, new_avg_sq, exp_avg_sq))
        p.copy_(torch.where(proceed, new_p, wide_p))


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
    "adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor[] sums_grad_squared, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!) examples_seen, Tensor(e!) violations, Tensor batch_size, Tensor lr,"
    " float n_g, float n_s, float eps, float weight_decay, bool mean_reduction, bool maximize, int guard_rounds,"
    " Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    _reference,
    _fake,
)


def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    sums_grad_squared: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    examples_seen: Tensor,
    violations: Tensor,
    *,
    batch_size: Tensor,
    lr: Tensor,
    n_g: float,
    n_s: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mean_reduction: bool = True,
    maximize: bool = False,
    guard_rounds: int = 0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One Adam step of many tensors, in place (MATHS 2, 11, 16-18).

    With ``n`` the examples seen including this step, ``kappa = min(1, B / min(n, N0))`` and, for a mean-reduced loss,
    ``ghat = grad`` and ``s = B sum_grad_squared`` (for a sum-reduced one ``grad / B`` and ``sum_grad_squared / B``)::

        exp_avg    = (1 - kappa_g) exp_avg + kappa_g ghat
        exp_avg_sq = (1 - kappa_s) exp_avg_sq + kappa_s s
        param      = (1 - B lr weight_decay) param - B lr exp_avg / (sqrt(exp_avg_sq) + eps)

    Args:
        params: to update; any floating dtype, dense.
        grads: of the shapes of `params`.
        sums_grad_squared: float32 (float64 for float64 parameters); empty: s is ghat squared (per batch).
        exp_avgs, exp_avg_sqs: state, float32 (float64 for float64 parameters).
        examples_seen: (len(params),) float64  advanced by `batch_size`.
        violations: (len(params),) int32  set to 1 where ``grad**2 > B sum_grad_squared`` beyond rounding
            (Cauchy-Schwarz), which shows that part of the gradient did not pass through the layers.
        batch_size, lr: scalars on the device; `lr` is the one for batch size 1.
        n_g, n_s: averaging times in examples.
        guard_rounds: backward passes accumulated in `grads`, for the guard's allowance; 0: no guard.
        grad_scale, found_inf: scalars of torch.amp.GradScaler; gradients are divided by `grad_scale`, second
            moments by its square, and nothing changes where `found_inf` is not 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    name = "adam_step_"
    count = len(params)
    for label, values in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        if len(values) != count:
            raise ValueError(f"{name}: {label} must have {count} tensors like params, got {len(values)}")
    if len(sums_grad_squared) not in (0, count):
        raise ValueError(f"{name}: sums_grad_squared must have 0 or {count} tensors, got {len(sums_grad_squared)}")
    for label, values in (
        ("grads", grads),
        ("sums_grad_squared", sums_grad_squared),
        ("exp_avgs", exp_avgs),
        ("exp_avg_sqs", exp_avg_sqs),
    ):
        for i, (p, value) in enumerate(zip(params, values, strict=False)):
            if value.shape != p.shape:
                raise ValueError(
                    f"{name}: {label}[{i}] must be {tuple(p.shape)} like params[{i}], got {tuple(value.shape)}"
                )
            if value.dtype not in FLOATING or p.dtype not in FLOATING:
                raise TypeError(f"{name}: {label}[{i}] and params[{i}] must be floating, got {value.dtype}, {p.dtype}")
            if label != "grads" and value.dtype != accumulate_dtype(p.dtype):
                raise TypeError(f"{name}: {label}[{i}] must be {accumulate_dtype(p.dtype)}, got {value.dtype}")
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
        list(exp_avgs),
        list(exp_avg_sqs),
        examples_seen,
        violations,
        batch_size,
        lr,
        n_g,
        n_s,
        eps,
        weight_decay,
        mean_reduction,
        maximize,
        guard_rounds,
        grad_scale,
        found_inf,
    )
