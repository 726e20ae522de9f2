"""What the autograd Functions share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd import function as autograd_function

from ..moments.uses import Call
from ..ops._library import accumulate_dtype

__all__ = [
    "add_small",
    "add_uses",
    "apply",
    "autocast",
    "call_of",
    "cast",
    "check_dtype",
    "once_differentiable",
    "one_use",
    "ops",
    "owned",
    "rows",
    "shaped",
    "sum_positions",
]

ops = torch.ops.perexample


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's, of which nothing needs to run where gradients are off already, as in nearly every backward pass."""
    checked = autograd_function.once_differentiable(backward)

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> Any:
        return checked(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return once


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64 and x.is_floating_point()


def autocast(x: Tensor, *, low_precision: bool) -> tuple[torch.dtype, contextlib.AbstractContextManager[Any]]:
    """The dtype in which autocast would compute, and a context without autocast to do it in.

    Matrix products and convolutions run in the autocast dtype, norms on CUDA in float32. The cast of the weight is
    made inside the Function, so that the weight's gradient arrives in the weight's own dtype unrounded.
    """
    if not _autocasts(x):
        return x.dtype, contextlib.nullcontext()
    device = x.device.type
    if low_precision:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.float32 if device == "cuda" else x.dtype
    return dtype, torch.autocast(device, enabled=False)


def apply(
    function: type[Function], layer: str, x: Tensor, weight: Tensor | None, *rest: Any, low_precision: bool = True
) -> Tensor:
    """``function.apply(x, weight, *rest)``, in the dtype of autocast and without autocast inside, where that is on.

    With `low_precision`, raises in the name of `layer` where the dtypes differ and no autocast reconciles them.
    """
    if _autocasts(x):
        dtype, context = autocast(x, low_precision=low_precision)
        with context:
            return function.apply(x.to(dtype), weight, *rest)
    if low_precision and weight is not None:
        check_dtype(layer, x, weight, contextlib.nullcontext())
    return function.apply(x, weight, *rest)  # nearly always: an empty context would take some microseconds


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``; asking costs less than a call that does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x.reshape(shape)``, likewise."""
    return x if x.shape == shape else x.reshape(shape)


def check_dtype(layer: str, x: Tensor, weight: Tensor, context: object) -> None:
    """Raise where the input has another dtype than the weight and no autocast (`context`) reconciles them."""
    if x.dtype != weight.dtype and isinstance(context, contextlib.nullcontext):
        raise TypeError(f"{layer}: the input must be {weight.dtype} like the weight, got {x.dtype}")


def one_use(dy: Tensor, wanted: bool) -> Tensor | None:
    """The gradient of the leaf that counts uses: 1, or None where it is not wanted."""
    return torch.ones((), device=dy.device) if wanted else None


def call_of(uses: Tensor | Call | None, *kinds: str) -> Call | None:
    """In forward: the `Call` among what counts uses, with the uses of its parameters noted.

    `kinds` says for each parameter how it is used: "product" (``G_b = dy_b.T @ x_b``), "rows" (looked up), or "other".
    """
    if not isinstance(uses, Call):
        return None
    for use, kind in zip(uses.uses, kinds, strict=True):
        if use is not None:
            use.products += kind == "product"
            use.others += kind == "other"
    return uses


def add_uses(
    call: Call | None, which: int, sum_sq: Tensor | None, grad: Callable[..., Tensor], *tensors: Tensor | None
) -> Tensor | None:
    """In backward: what goes to the leaf of parameter number `which`, whose use by itself has the moment `sum_sq`.

    That is `sum_sq` where the forward pass used it once. Otherwise its uses are added per example first: `grad`
    is a function of slices ``tensor[b : b + 1]`` of `tensors`, and returns the gradient of that example.
    """
    uses = None if call is None or sum_sq is None else call.shared(which)
    return sum_sq if uses is None or sum_sq is None else uses.add_slices(grad, tensors, sum_sq)


def add_small(call: Call | None, which: int, sum_sq: Tensor | None, grads: Callable[[], Tensor]) -> Tensor | None:
    """As `add_uses`, for a parameter that is no larger than the activations of an example.

    `grads` returns the gradients of all examples, (B, O).
    """
    uses = None if call is None or sum_sq is None else call.shared(which)
    if call is None or uses is None or sum_sq is None:
        return sum_sq
    return uses.add_small(grads(), sum_sq, call.begins[which])


def owned(y: Tensor) -> Tensor:
    """In forward: `y` as an output that the caller may change in place, which autograd forbids for a view."""
    return y.detach() if torch.compiler.is_compiling() or y._is_view() else y


def sum_positions(dy: Tensor) -> Tensor:
    """(B, T, O) -> (B, O), the gradients of a bias."""
    return dy.sum(1, dtype=accumulate_dtype(dy.dtype))


def rows(x: Tensor, batch_dim: int = 0) -> Tensor:
    """(B, ..., D) -> (B, T, D), with the batch wherever `batch_dim` says; a view wherever the strides allow one."""
    if batch_dim:
        x = x.movedim(batch_dim, 0)
    return x.unsqueeze(1) if x.dim() == 2 else x if x.dim() == 3 else x.flatten(1, -2)
