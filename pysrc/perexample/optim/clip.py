"""Clipping gradients together with their second moments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..moments import accumulate_dtype, moment_of
from ..moments.count import version
from ._options import check_bool, check_number

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients by ``c = min(1, max_norm / (norm + 1e-6))``, and their second moments by ``c**2``.

    What remains is what the clipped loss ``c * loss`` would have given: contributions ``c * c_b`` of all examples
    (MATHS 1). On the gradients it does exactly what torch.nn.utils.clip_grad_norm_ does. That one leaves the second
    moments as they are: with it, only the running average of the gradient takes in less, that of the squares does not.

    Args:
        parameters: of a converted model, or any others; those without gradient are skipped.
        max_norm: the largest norm to allow; a number, or a scalar tensor. Under a GradScaler call `px.unscale_` first,
            or multiply it by the scale.
        norm_type: p of the norm; inf for the largest element.
        error_if_nonfinite: raise where the norm is not finite. It has to look at the norm: the only thing here that
            waits for the device.
        foreach: as in torch, for the norm.

    Returns:
        the norm of all gradients as one vector, before clipping: a scalar tensor on their device.

    Raises:
        TypeError, ValueError: an argument of the wrong kind.
        RuntimeError: the norm is not finite and `error_if_nonfinite`.
    """
    name = "clip_grad_norm_"
    if not isinstance(max_norm, Tensor):
        check_number(name, "max_norm", max_norm, 0.0, finite=False)
    elif max_norm.numel() != 1:
        raise ValueError(f"{name}: max_norm must be a number or a scalar tensor, got shape {tuple(max_norm.shape)}")
    check_number(name, "norm_type", norm_type, 0.0, finite=False)
    check_bool(name, "error_if_nonfinite", error_if_nonfinite)
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}: parameters[{i}] must be a Tensor, got {type(p).__name__}")
    owners = {p: moment_of(p) for p in params if p.grad is not None}
    grads = [p.grad for p in owners if p.grad is not None]
    norm = get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    limit = max_norm.to(norm.device, non_blocking=True).reshape(()) if isinstance(max_norm, Tensor) else max_norm
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    # Asked for before the gradients change: what belongs to gradients that were cleared is gone then.
    squares = [second for moment in owners.values() if moment and (second := moment.current()) is not None]
    wide = factor.to(accumulate_dtype(factor.dtype))
    for tensors, scale in ((grads, factor), (squares, wide.square())):
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            by_device.setdefault(tensor.device, []).append(tensor)
        for device, members in by_device.items():
            torch._foreach_mul_(members, scale.to(device))
    for p, moment in owners.items():
        if moment is not None and p.grad is not None:
            moment.version = version(p.grad)  # or a factor of 0 would pass for zero_grad(set_to_none=False)
    return norm
