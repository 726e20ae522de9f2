"""Registration: schema, reference and fake kernel of every op, through plain `torch.library`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "perexample"
_library = torch.library.Library(NAMESPACE, "DEF")

# name -> (reference, fake), in the order of definition; `python -m perexample` and the tests walk it.
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *, composed: bool = False) -> Any:
    """Define an op. `reference` is the dispatcher's default kernel; C++, CUDA and Triton fill the device keys.

    An op that is `composed` of others has no kernel of its own on any device, and is not among `OPS`.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if not composed:
        OPS[name] = (reference, fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of second moments and of every accumulation: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(batch: int, numel: int) -> int:
    """How many examples a reference kernel expands at once, so that a temporary stays near 4 M elements."""
    return max(1, min(batch, (1 << 22) // max(1, numel)))


class Moments:
    """Running ``sum_b G_b`` and ``sum_b G_b**2`` of a parameter, for the reference kernels."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        dtype = accumulate_dtype(like.dtype)
        self.sum = torch.zeros(shape, dtype=dtype, device=like.device)
        self.sum_sq = torch.zeros(shape, dtype=dtype, device=like.device)

    def add(self, per_example: Tensor) -> None:
        """Add G of shape (examples, *shape), in the accumulation dtype."""
        self.sum += per_example.sum(0)
        self.sum_sq += per_example.square().sum(0)

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.sum.to(dtype), self.sum_sq


def empty_moments(shape: tuple[Any, ...], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialised (gradient, second moment) of a parameter, for the fake kernels."""
    return (
        like.new_empty(shape, dtype=dtype),
        like.new_empty(shape, dtype=accumulate_dtype(like.dtype)),
    )


def check_tensor(op: str, name: str, value: Any, expected: str, ok: bool) -> None:
    """Raise the one kind of message that all ops use: what was expected, and what came."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if not ok:
        raise ValueError(f"{op}: {name} must be {expected}, got {tuple(value.shape)}")


def check_floating(op: str, dtype: torch.dtype | None = None, /, **tensors: Tensor) -> None:
    """Raise unless all tensors share one supported floating dtype and one device, and `dtype`, if given, is one too."""
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"{op}: dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    first_name, first = next(iter(tensors.items()))
    for name, value in tensors.items():
        if value.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
        if value.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must be {first.dtype} like {first_name}, got {value.dtype}")
        if value.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like {first_name}, got {value.device}")
