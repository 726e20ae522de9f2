"""The norms (MATHS 7): the affine part's moments, with the input gradient in the same pass.

``G_b = sum_t dy xhat`` (weight), ``sum_t dy`` (bias), and with ``h = dy weight`` and means over what was normalized
together, ``dx = rstd (h - mean(h) - xhat mean(h xhat))``. RMSNorm has no means of x and h; with the running statistics
of batch norm, which are constants, ``dx = rstd h``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import Moments, accumulate_dtype, check_floating, check_tensor, empty_moments, register

__all__ = ["batch_norm_moments", "group_norm_moments", "layer_norm_moments", "rms_norm_moments"]

Three = tuple[Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _normalize(
    x: Tensor, mean: Tensor | None, rstd: Tensor | None, eps: float, dims: list[int]
) -> tuple[Tensor, Tensor]:
    """(xhat, rstd) of the widened `x`; the statistics, where given, already broadcast against it."""
    if mean is None or rstd is None:
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        rstd = (variance + eps).rsqrt()
    return (x - mean) * rstd, rstd


def _input_grad(h: Tensor, xhat: Tensor, rstd: Tensor, dims: list[int]) -> Tensor:
    return rstd * (h - h.mean(dims, keepdim=True) - xhat * (h * xhat).mean(dims, keepdim=True))


def _outputs(
    dx: Tensor | None, xhat_dy: Tensor | None, dy: Tensor | None, size: int, like: Tensor, weight: Tensor | None
) -> Five:
    """Assemble the five results; `xhat_dy` and `dy` are per-example sums (B, size), None for what is not wanted."""
    dtype = like.dtype if weight is None else weight.dtype
    pairs: list[Tensor] = []
    for per_example in (xhat_dy, dy):
        moments = Moments((0 if per_example is None else size,), like)
        if per_example is not None:
            moments.add(per_example)
        pairs += moments.result(dtype)
    return (like.new_empty(0) if dx is None else dx.to(like.dtype).contiguous(), *pairs)  # type: ignore[return-value]


def _fake_outputs(dy: Tensor, size: int, weight: Tensor | None, output_mask: Sequence[bool]) -> Five:
    dtype = dy.dtype if weight is None else weight.dtype
    dx = dy.new_empty(dy.shape if output_mask[0] else (0,))
    return (
        dx,
        *empty_moments((size if output_mask[1] else 0,), dy, dtype),
        *empty_moments((size if output_mask[2] else 0,), dy, dtype),
    )


def _layer_norm_reference(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    eps: float,
    output_mask: Sequence[bool],
) -> Five:
    wide = accumulate_dtype(dy.dtype)
    g = dy.to(wide)
    mean, rstd = (None if s is None else s.unsqueeze(2) for s in (mean, rstd))
    xhat, scale = _normalize(x.to(wide), mean, rstd, eps, [2])
    h = g if weight is None else g * weight.to(wide)
    return _outputs(
        _input_grad(h, xhat, scale, [2]) if output_mask[0] else None,
        (g * xhat).sum(1) if output_mask[1] else None,
        g.sum(1) if output_mask[2] else None,
        dy.shape[2],
        dy,
        weight,
    )


def _layer_norm_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    eps: float,
    output_mask: Sequence[bool],
) -> Five:
    return _fake_outputs(dy, dy.shape[2], weight, output_mask)


_RESULTS = " -> (Tensor dx, Tensor dw, Tensor dw_sq, Tensor db, Tensor db_sq)"

_layer_norm_op = register(
    "layer_norm_moments(Tensor dy, Tensor x, Tensor? mean, Tensor? rstd, Tensor? weight, float eps,"
    " bool[3] output_mask)" + _RESULTS,
    _layer_norm_reference,
    _layer_norm_fake,
)


def layer_norm_moments(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-5,
    output_mask: Sequence[bool] = (True, True, True),
) -> Five:
    """Backward of LayerNorm with the per-example second moments of its weight and bias (MATHS 7).

    Args:
        dy: (B, T, D)  gradient with respect to the output.
        x: (B, T, D)  input; dtype and device of `dy`.
        mean, rstd: (B, T)  statistics of the forward pass, float32 (float64 for float64 inputs); None for both
            computes them again from `x` and `eps`.
        weight: (D,)  or None for ones.
        eps: as in the forward pass.
        output_mask: whether dx, the weight's moments and the bias' moments are wanted.

    Returns:
        dx (B, T, D), dw (D,), dw_sq (D,), db (D,), db_sq (D,); no elements where not wanted. dw and db have the
        dtype of `weight`, or of `dy` without one.
    """
    name = "layer_norm_moments"
    check_tensor(name, "dy", dy, "of shape (B, T, D)", isinstance(dy, Tensor) and dy.dim() == 3)
    check_tensor(name, "x", x, f"{tuple(dy.shape)} like dy", isinstance(x, Tensor) and x.shape == dy.shape)
    check_floating(name, dy=dy, x=x)
    _check_statistics(name, dy, (dy.shape[0], dy.shape[1]), "(B, T)", mean=mean, rstd=rstd)
    if weight is not None:
        check_tensor(name, "weight", weight, f"(D={dy.shape[2]},)", weight.shape == dy.shape[2:])
    return _layer_norm_op(dy, x, mean, rstd, weight, eps, list(output_mask))


def _check_statistics(name: str, dy: Tensor, shape: tuple[int, ...], letters: str, **statistics: Tensor | None) -> None:
    given = [value is not None for value in statistics.values()]
    if any(given) and not all(given):
        raise ValueError(f"{name}: mean and rstd must be given both or neither")
    for label, value in statistics.items():
        if value is not None:
            check_tensor(name, label, value, f"{letters} = {shape}", tuple(value.shape) == shape)
            if value.dtype != accumulate_dtype(dy.dtype):
                raise TypeError(f"{name}: {label} must be {accumulate_dtype(dy.dtype)}, got {value.dtype}")


def _rms_norm_reference(
    dy: Tensor, x: Tensor, rstd: Tensor | None, weight: Tensor | None, eps: float, output_mask: Sequence[bool]
) -> Three:
    wide = accumulate_dtype(dy.dtype)
    g, value = dy.to(wide), x.to(wide)
    scale = (value.square().mean(2, keepdim=True) + eps).rsqrt() if rstd is None else rstd.unsqueeze(2)
    xhat = value * scale
    h = g if weight is None else g * weight.to(wide)
    return _outputs(
        scale * (h - xhat * (h * xhat).mean(2, keepdim=True)) if output_mask[0] else None,
        (g * xhat).sum(1) if output_mask[1] else None,
        None,
        dy.shape[2],
        dy,
        weight,
    )[:3]


def _rms_norm_fake(
    dy: Tensor, x: Tensor, rstd: Tensor | None, weight: Tensor | None, eps: float, output_mask: Sequence[bool]
) -> Three:
    return _fake_outputs(dy, dy.shape[2], weight, [*output_mask, False])[:3]


_rms_norm_op = register(
    "rms_norm_moments(Tensor dy, Tensor x, Tensor? rstd, Tensor? weight, float eps, bool[2] output_mask)"
    " -> (Tensor dx, Tensor dw, Tensor dw_sq)",
    _rms_norm_reference,
    _rms_norm_fake,
)


def rms_norm_moments(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor | None,
    weight: Tensor | None,
    eps: float,
    output_mask: Sequence[bool] = (True, True),
) -> Three:
    """Backward of RMSNorm with the per-example second moment of its weight (MATHS 7).

    Args:
        dy: (B, T, D)  gradient with respect to the output.
        x: (B, T, D)  input; dtype and device of `dy`.
        rstd: (B, T)  ``1 / sqrt(mean(x**2) + eps)`` of the forward pass, float32 (float64 for float64 inputs); None
            computes it again from `x` and `eps`.
        weight: (D,)  or None for ones.
        eps: as in the forward pass.
        output_mask: whether dx and the weight's moments are wanted.

    Returns:
        dx (B, T, D), dw (D,), dw_sq (D,); no elements where not wanted. dw has the dtype of `weight`, or of `dy`
        without one.
    """
    name = "rms_norm_moments"
    check_tensor(name, "dy", dy, "of shape (B, T, D)", isinstance(dy, Tensor) and dy.dim() == 3)
    check_tensor(name, "x", x, f"{tuple(dy.shape)} like dy", isinstance(x, Tensor) and x.shape == dy.shape)
    check_floating(name, dy=dy, x=x)
    _check_statistics(name, dy, (dy.shape[0], dy.shape[1]), "(B, T)", rstd=rstd)
    if weight is not None:
        check_tensor(name, "weight", weight, f"(D={dy.shape[2]},)", weight.shape == dy.shape[2:])
    return _rms_norm_op(dy, x, rstd, weight, eps, list(output_mask))


def _group_norm_reference(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    groups: int,
    eps: float,
    output_mask: Sequence[bool],
) -> Five:
    batch, channels, positions = dy.shape
    wide = accumulate_dtype(dy.dtype)
    grouped = (batch, groups, channels // groups, positions)
    g = dy.to(wide).reshape(grouped)
    mean, rstd = (None if s is None else s[:, :, None, None] for s in (mean, rstd))
    xhat, scale = _normalize(x.to(wide).reshape(grouped), mean, rstd, eps, [2, 3])
    h = g if weight is None else g * weight.to(wide).reshape(1, groups, -1, 1)
    return _outputs(
        _input_grad(h, xhat, scale, [2, 3]).reshape(dy.shape) if output_mask[0] else None,
        (g * xhat).sum(3).flatten(1) if output_mask[1] else None,
        g.sum(3).flatten(1) if output_mask[2] else None,
        channels,
        dy,
        weight,
    )


def _group_norm_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    groups: int,
    eps: float,
    output_mask: Sequence[bool],
) -> Five:
    return _fake_outputs(dy, dy.shape[1], weight, output_mask)


_group_norm_op = register(
    "group_norm_moments(Tensor dy, Tensor x, Tensor? mean, Tensor? rstd, Tensor? weight, SymInt groups, float eps,"
    " bool[3] output_mask)" + _RESULTS,
    _group_norm_reference,
    _group_norm_fake,
)


def group_norm_moments(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    output_mask: Sequence[bool] = (True, True, True),
) -> Five:
    """Backward of GroupNorm with the per-example second moments of its weight and bias (MATHS 7).

    Args:
        dy: (B, C, S)  gradient with respect to the output, spatial dimensions flattened.
        x: (B, C, S)  input; dtype and device of `dy`.
        mean, rstd: (B, groups)  statistics of the forward pass, float32 (float64 for float64 inputs); None for
            both computes them again from `x` and `eps`.
        weight: (C,)  or None for ones.
        groups: divides C.
        eps: as in the forward pass.
        output_mask: whether dx, the weight's moments and the bias' moments are wanted.

    Returns:
        dx (B, C, S), dw (C,), dw_sq (C,), db (C,), db_sq (C,); no elements where not wanted. dw and db have the
        dtype of `weight`, or of `dy` without one.
    """
    name = "group_norm_moments"
    check_tensor(name, "dy", dy, "of shape (B, C, S)", isinstance(dy, Tensor) and dy.dim() == 3)
    check_tensor(name, "x", x, f"{tuple(dy.shape)} like dy", isinstance(x, Tensor) and x.shape == dy.shape)
    check_floating(name, dy=dy, x=x)
    if groups < 1 or dy.shape[1] % groups:
        raise ValueError(f"{name}: groups must divide C={dy.shape[1]}, got {groups}")
    _check_statistics(name, dy, (dy.shape[0], groups), "(B, groups)", mean=mean, rstd=rstd)
    if weight is not None:
        check_tensor(name, "weight", weight, f"(C={dy.shape[1]},)", weight.shape == dy.shape[1:2])
    return _group_norm_op(dy, x, mean, rstd, weight, groups, eps, list(output_mask))


def _batch_norm_reference(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, output_mask: Sequence[bool]
) -> Five:
    wide = accumulate_dtype(dy.dtype)
    g = dy.to(wide)
    scale = rstd[:, None]
    h = g if weight is None else g * weight.to(wide)[:, None]
    return _outputs(
        h * scale if output_mask[0] else None,
        (g * ((x.to(wide) - mean[:, None]) * scale)).sum(2) if output_mask[1] else None,
        g.sum(2) if output_mask[2] else None,
        dy.shape[1],
        dy,
        weight,
    )


def _batch_norm_fake(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, output_mask: Sequence[bool]
) -> Five:
    return _fake_outputs(dy, dy.shape[1], weight, output_mask)


_batch_norm_op = register(
    "batch_norm_moments(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, bool[3] output_mask)" + _RESULTS,
    _batch_norm_reference,
    _batch_norm_fake,
)


def batch_norm_moments(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool] = (True, True, True),
) -> Five:
    """Backward of batch norm with fixed statistics, with the per-example moments of weight and bias (MATHS 7).

    Args:
        dy: (B, C, S)  gradient with respect to the output, spatial dimensions flattened.
        x: (B, C, S)  input; dtype and device of `dy`.
        mean, rstd: (C,)  constants, float32 (float64 for float64 inputs).
        weight: (C,)  or None for ones.
        output_mask: whether dx, the weight's moments and the bias' moments are wanted.

    Returns:
        dx (B, C, S), dw (C,), dw_sq (C,), db (C,), db_sq (C,); no elements where not wanted. dw and db have the
        dtype of `weight`, or of `dy` without one.
    """
    name = "batch_norm_moments"
    check_tensor(name, "dy", dy, "of shape (B, C, S)", isinstance(dy, Tensor) and dy.dim() == 3)
    check_tensor(name, "x", x, f"{tuple(dy.shape)} like dy", isinstance(x, Tensor) and x.shape == dy.shape)
    check_floating(name, dy=dy, x=x)
    _check_statistics(name, dy, (dy.shape[1],), "(C,)", mean=mean, rstd=rstd)
    if weight is not None:
        check_tensor(name, "weight", weight, f"(C={dy.shape[1]},)", weight.shape == dy.shape[1:2])
    return _batch_norm_op(dy, x, mean, rstd, weight, list(output_mask))
