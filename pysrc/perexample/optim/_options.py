"""Checks of the options of a group, which say what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_bool", "check_choice", "check_number", "check_rate", "check_state_dtype"]


def check_number(owner: str, name: str, value: Any, low: float, finite: bool = True) -> None:
    """Raise unless `value` is a number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    if not value >= low or (finite and math.isinf(value)):
        raise ValueError(f"{owner}: {name} must be at least {low:g}, got {value}")


def check_rate(owner: str, value: Any) -> None:
    """Raise unless `value` is a learning rate: a number of at least 0, or a scalar tensor."""
    if not isinstance(value, Tensor):
        check_number(owner, "lr", value, 0.0)
    elif value.numel() != 1:
        raise ValueError(f"{owner}: lr must be a scalar tensor, got shape {tuple(value.shape)}")


def check_choice(owner: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def check_bool(owner: str, name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")


def check_state_dtype(owner: str, value: Any) -> None:
    """Raise unless `value` is None or torch.bfloat16."""
    if value not in (None, torch.bfloat16):
        raise ValueError(f"{owner}: state_dtype must be None (float32) or torch.bfloat16, got {value!r}")
