"""Undoing the scale of a GradScaler for gradients and their second moments alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from ..moments import moment_of
from ..moments.count import version

__all__ = ["unscale_"]


@torch.no_grad()
def unscale_(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Divide the gradients of `optimizer` by the scale of `scaler`, and their second moments by its square.

    Takes the place of ``scaler.unscale_(optimizer)``, which it calls, where gradients are looked at or clipped before
    the step::

        scaler.scale(loss).backward()
        px.unscale_(scaler, optimizer)
        px.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    As with torch's: once a step, when all gradients are accumulated. It does not wait for the device.

    Args:
        scaler: of torch.amp; one that is not enabled leaves all as it is.
        optimizer: of px.optim, or any other.

    Raises:
        TypeError: an argument of the wrong kind.
        RuntimeError: it was called already in this step (from torch).
    """
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"unscale_: scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"unscale_: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not scaler.is_enabled():
        return
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # Asked for before the gradients change: what belongs to gradients that were cleared is gone then.
    owned = [
        (p, moment, second) for p in params if (moment := moment_of(p)) and (second := moment.current()) is not None
    ]
    scaler.unscale_(optimizer)
    by_device: dict[torch.device, list[Tensor]] = {}
    for p, moment, second in owned:
        by_device.setdefault(second.device, []).append(second)
        moment.unscaled_rounds = moment.leaf_rounds
        if p.grad is not None:
            moment.version = version(p.grad)
    for device, squares in by_device.items():
        scale = scaler.scale(torch.ones((), dtype=torch.float64, device=device))
        # What torch multiplies the gradients by: the reciprocal, rounded to float32.
        torch._foreach_mul_(squares, scale.reciprocal().float().double().square())
