"""Checks of the options of a group, which say what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CHECKS",
    "Check",
    "check_bool",
    "check_bool_or_pair",
    "check_choice",
    "check_horizon_or_none",
    "check_number",
]

Check = Callable[[str, str, Any], None]  # of (owner, name, value)


def check_number(owner: str, name: str, value: Any, low: float, finite: bool = True) -> None:
    """Raise unless `value` is a number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    if not float(value) >= low:
        raise ValueError(f"{owner}: {name} must be at least {low:g}, got {value}")
    if finite and math.isinf(value):
        raise ValueError(f"{owner}: {name} must be finite, got {value}")


def check_choice(owner: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def check_bool(owner: str, name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")


def _rate(owner: str, name: str, value: Any) -> None:
    """A learning rate: a number of at least 0, or a scalar tensor."""
    if not isinstance(value, Tensor):
        check_number(owner, name, value, 0.0)
    elif value.numel() != 1:
        raise ValueError(f"{owner}: {name} must be a scalar tensor, got shape {tuple(value.shape)}")


def _at_least_0(owner: str, name: str, value: Any) -> None:
    check_number(owner, name, value, 0.0)


def _horizon(owner: str, name: str, value: Any) -> None:
    check_number(owner, name, value, 1.0, finite=False)


def check_horizon_or_none(owner: str, name: str, value: Any) -> None:
    """Raise unless `value` is an averaging time in examples, or None for no average."""
    if value is not None:
        _horizon(owner, name, value)


def _one_of(*allowed: str) -> Check:
    return lambda owner, name, value: check_choice(owner, name, value, allowed)


def check_bool_or_pair(owner: str, name: str, value: Any) -> None:
    """Raise unless `value` is a bool, or a pair of them."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(one, bool) for one in value)
    if not isinstance(value, bool) and not pair:
        raise TypeError(f"{owner}: {name} must be a bool or a pair of them, got {value!r}")


def _state_dtype(owner: str, name: str, value: Any) -> None:
    if value not in (None, torch.bfloat16):
        raise ValueError(f"{owner}: {name} must be None (float32) or torch.bfloat16, got {value!r}")


# Every option that an optimizer may have, and how its values are checked where the optimizer does not say otherwise.
CHECKS: dict[str, Check] = {
    "lr": _rate,
    "n_g": _horizon,
    "n_s": _horizon,
    "eps": _at_least_0,
    "weight_decay": _at_least_0,
    "averaging": _one_of("linear", "power"),
    "loss_reduction": _one_of("mean", "sum"),
    "second_moment": _one_of("per_example", "per_batch"),
    "denominator": _one_of("sigma", "sigma_squared"),
    "centered": check_bool,
    "lr_times_eps": check_bool,
    "bias_correction": check_bool,
    "maximize": check_bool,
    "guard": check_bool,
    "state_dtype": _state_dtype,
}
