"""The oracle and the error budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..moments import accumulate_dtype, no_moments

__all__ = [
    "Moments",
    "assert_moments",
    "assert_within_budget",
    "budget",
    "moments_of_examples",
    "oracle",
    "stock_moments",
]


@dataclass(frozen=True)
class Moments:
    """A gradient ``sum_b c_b`` and its second moment ``sum_b c_b**2``."""

    grad: Tensor
    sum_grad_squared: Tensor


def moments_of_examples(contribution: Callable[[int], Tensor], batch: int, like: Tensor) -> Moments:
    """Loop over examples: the sum, and the sum of squares, of ``contribution(b)``.

    Args:
        contribution: the gradient c_b of example b.
        batch: number of examples; 0 gives zeros.
        like: shape, dtype and device of the result; the sums are float32 for half precision.
    """
    wide = accumulate_dtype(like.dtype)
    grad = torch.zeros_like(like, dtype=wide, memory_format=torch.contiguous_format)
    square = torch.zeros_like(grad)
    for b in range(batch):
        c = contribution(b).to(wide)
        grad += c
        square += c.square()
    return Moments(grad, square)


def oracle(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Moments]:
    """The moments of every parameter of `model`, from a loop over examples with plain autograd.

    Args:
        model: stock or converted; copied, not changed. Must be deterministic (no dropout) and must not mix examples.
        loss_fn: ``loss_fn(output, target)``, the loss of a batch; called here with batches of one example.
        inputs: tensor, or tensors, with the batch as dimension 0.
        targets: batch as dimension 0.
        reduction: "mean" or "sum", how `loss_fn` combines examples: c_b is the loss' gradient over B, or itself.
        dtype: to compute in. float64 is the oracle; a lower one shows PyTorch's own error.

    Returns:
        name of the parameter -> `Moments`; parameters that do not require grad are left out.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"oracle: reduction must be 'mean' or 'sum', got {reduction!r}")
    tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    batch = tensors[0].shape[0]
    model = copy.deepcopy(model).to(dtype)
    model.zero_grad()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        return {}
    contributions = []
    with no_moments():
        for b in range(batch):
            # Contiguous: stock GroupNorm's backward reads a null pointer where a channels_last input needs no gradient.
            row = [_cast(t[b : b + 1], dtype).contiguous() for t in tensors]
            loss = loss_fn(model(*row), _cast(targets[b : b + 1], dtype))
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            scale = 1.0 / batch if reduction == "mean" else 1.0
            contributions.append([None if grad is None else grad * scale for grad in grads])
    result = {}
    for i, (name, p) in enumerate(named.items()):
        rows = [torch.zeros_like(p) if grads[i] is None else grads[i] for grads in contributions]
        result[name] = moments_of_examples(rows.__getitem__, batch, p)
    return result


def stock_moments(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    reduction: str = "mean",
    dtype: torch.dtype,
    samples: int = 8,
) -> dict[str, Moments]:
    """What PyTorch itself makes of `oracle` in a low precision, as far off as in the worst of several samples.

    One run in `dtype` has one rounding error, which in a parameter of few elements, or where all errors hang together
    (deep models), may be small by luck; a budget made of it would turn down computations that are as good. So the
    error of each element is the largest of `samples` problems close by: this one, and others whose parameters, inputs
    and targets are a few percent off, each with an oracle of its own. Their roundings are all new, and their condition
    is nearly the same.

    Args:
        model, loss_fn, inputs, targets, reduction: as in `oracle`.
        dtype: the low precision; under autocast float32, and the call inside of the context (float64 is left alone).
        samples: how many problems; with 1 the errors are those of ``oracle(..., dtype=dtype)``.

    Returns:
        name of the parameter -> `Moments` in float64: the oracle's, plus that error.
    """
    if samples < 1:
        raise ValueError(f"stock_moments: samples must be at least 1, got {samples}")
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    generator = torch.Generator().manual_seed(0)
    largest: dict[str, Moments] = {}
    for sample in range(samples):
        near, near_tensors, near_targets = model, tensors, targets
        if sample:
            near = copy.deepcopy(model)
            with torch.no_grad():
                for p in near.parameters():
                    p.copy_(_nearby(p, generator))
            near_tensors, near_targets = [_nearby(t, generator) for t in tensors], _nearby(targets, generator)
        exact = oracle(near, loss_fn, near_tensors, near_targets, reduction=reduction)
        low = oracle(near, loss_fn, near_tensors, near_targets, reduction=reduction, dtype=dtype)
        for name, m in exact.items():
            errors = Moments((low[name].grad - m.grad).abs(), (low[name].sum_grad_squared - m.sum_grad_squared).abs())
            if sample:
                before = largest[name]
                errors = Moments(
                    torch.maximum(before.grad, errors.grad),
                    torch.maximum(before.sum_grad_squared, errors.sum_grad_squared),
                )
            largest[name] = errors
        if not sample:
            expected = exact
    return {
        name: Moments(m.grad + largest[name].grad, m.sum_grad_squared + largest[name].sum_grad_squared)
        for name, m in expected.items()
    }


def _nearby(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """`tensor`, with each number off by a sixteenth of itself or so: some roundings of bfloat16."""
    if not tensor.is_floating_point():
        return tensor
    factor = 1 + torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 16
    return (tensor.detach() * factor.to(tensor.device)).to(tensor.dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def budget(expected: Tensor, stock: Tensor, dtype: torch.dtype) -> float:
    """The error allowed against `expected`: twice that of `stock`, plus a floor.

    The floor is two roundings to `dtype` and 32 in the accumulation dtype, relative to the largest element. Where the
    error of `stock` is one draw of a few roundings, and might be small by luck, take `stock_moments`.
    """
    if expected.numel() == 0:
        return 0.0
    largest = float(expected.abs().max())
    floor = 2 * torch.finfo(dtype).eps + 32 * torch.finfo(accumulate_dtype(dtype)).eps
    return 2 * float((stock.double() - expected).abs().max()) + floor * largest


def assert_within_budget(actual: Tensor, expected: Tensor, stock: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise AssertionError unless `actual` is as close to `expected` as `budget` allows.

    Args:
        actual: to be checked.
        expected: the oracle's, float64.
        stock: PyTorch's own, computed in the low precision in question.
        dtype: of the result (float32 for second moments of half-precision inputs).
        what: named in the message.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return
    error = float((actual.double() - expected.double()).abs().max())
    allowed = budget(expected.double(), stock, dtype)
    if not error <= allowed:
        raise AssertionError(
            f"{what}: error {error:.3g} exceeds the budget {allowed:.3g} (PyTorch's own error "
            f"{float((stock.double() - expected).abs().max()):.3g}, largest element {float(expected.abs().max()):.3g})"
        )


def assert_moments(model: nn.Module, expected: dict[str, Moments], stock: dict[str, Moments] | None = None) -> None:
    """Raise AssertionError unless ``p.grad`` and ``p.sum_grad_squared`` of every parameter are within the budget.

    Args:
        model: converted, after backward; on any device.
        expected: from `oracle`, on the CPU.
        stock: from `stock_moments`, or `oracle`, in the model's own dtype; `expected` where the model is float64.
    """
    stock = expected if stock is None else stock
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if named.keys() != expected.keys():
        raise AssertionError(f"parameters differ: {sorted(named.keys() ^ expected.keys())}")
    for name, p in named.items():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        square = p.sum_grad_squared  # type: ignore[attr-defined]
        if square is None:
            square = torch.zeros_like(p, dtype=accumulate_dtype(p.dtype))
        if square.dtype != accumulate_dtype(p.dtype):
            raise AssertionError(f"{name}: sum_grad_squared must be {accumulate_dtype(p.dtype)}, got {square.dtype}")
        assert_within_budget(grad.cpu(), expected[name].grad, stock[name].grad, p.dtype, f"{name}.grad")
        assert_within_budget(
            square.cpu(),
            expected[name].sum_grad_squared,
            stock[name].sum_grad_squared,
            accumulate_dtype(p.dtype),
            f"{name}.sum_grad_squared",
        )
