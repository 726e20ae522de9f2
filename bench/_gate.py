"""The correctness gate: nothing is timed that was not found right in the same run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import perexample as px
from perexample.ops._library import OPS
from perexample.ops.optimizer import state_starts
from perexample.testing import (
    CONV_CASES,
    EMBEDDING_CASES,
    LINEAR_CASES,
    NORM_CASES,
    assert_moments,
    assert_within_budget,
    oracle,
)

from .models import Workload, loss_fn

# Arguments of optimizer_step_ from n_g on, for Adam with weight decay.
ADAM = (6.0, 40.0, 1e-8, 0.1, False, False, False, True, True, False, True, False, 1, None, None)
Pick = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class RedGate(Exception):
    """Something is wrong, so nothing is timed."""


def kernel_gate(op: str, args: Sequence[Any], narrowed: Sequence[Any] | None = None, pick: Pick | None = None) -> None:
    """Raise `RedGate` unless `op` on `args` is as good as its reference in the same precision, against float64.

    Args:
        op: name of an op that returns tensors.
        args: its arguments.
        narrowed, pick: where the whole result would take too long: the arguments of the part to check, and that part
            of the results.
    """
    reference = OPS[op][0]
    narrowed = args if narrowed is None else narrowed
    actual = getattr(torch.ops.perexample, op)(*args)
    actual = actual if pick is None else pick(actual)
    expected = reference(*(_double(a) for a in narrowed))
    stock = reference(*narrowed)
    for i, result in enumerate(actual):
        try:
            assert_within_budget(result, expected[i], stock[i], result.dtype, f"{op}, result {i}")
        except AssertionError as error:
            shapes = ", ".join(str(tuple(a.shape)) for a in args if isinstance(a, Tensor))
            raise RedGate(f"{error} (inputs {shapes})") from error


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def case_tables() -> Iterable[Callable[[], None]]:
    """The kernels on the small and odd shapes of `perexample.testing`'s tables."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for linear in LINEAR_CASES:
        rows = (linear.batch, int(torch.tensor(linear.positions).prod()))
        yield lambda c=linear, r=rows: kernel_gate(
            "linear_moments", (randn(*r, c.outputs), randn(*r, c.inputs), c.bias)
        )
        yield lambda c=linear, r=rows: kernel_gate("bias_moments", (randn(*r, c.outputs),))
    for conv in CONV_CASES:
        if isinstance(conv.arguments.get("padding", 0), str) or "padding_mode" in conv.arguments:
            continue  # the layers make these from the others
        yield lambda c=conv: kernel_gate("conv_moments", _conv_arguments(c, randn))
    for norm in NORM_CASES:
        if norm.shape[0] == 0:
            continue  # the reference warns of a variance of nothing
        yield lambda c=norm: kernel_gate(*_norm_arguments(c, randn))
    for table in EMBEDDING_CASES:
        shape = (table.batch, int(torch.tensor(table.positions).prod()))
        indices = torch.randint(table.rows, shape, generator=generator)
        padding = -1 if table.padding_idx is None else table.padding_idx % table.rows
        yield lambda c=table, i=indices, p=padding: kernel_gate(
            "embedding_moments", (randn(*i.shape, c.width), i, c.rows, p)
        )
    yield optimizer_gate


def _conv_arguments(case: Any, randn: Callable[..., Tensor]) -> tuple[Any, ...]:
    def per_dimension(value: int | tuple[int, ...]) -> list[int]:
        return [value] * case.spatial if isinstance(value, int) else list(value)

    kernel = per_dimension(case.kernel_size)
    stride, padding, dilation = (
        per_dimension(case.arguments.get(name, default))
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    out = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(case.size, kernel, stride, padding, dilation, strict=True)
    ]
    dy = randn(case.batch, case.outputs, *out)
    x = randn(case.batch, case.channels, *case.size)
    return dy, x, kernel, stride, padding, dilation, case.arguments.get("groups", 1), case.arguments.get("bias", True)


def _norm_arguments(case: Any, randn: Callable[..., Tensor]) -> tuple[str, tuple[Any, ...]]:
    batch, mask = case.shape[0], [True, True, True]
    if case.groups:
        shape = (batch, case.shape[1], int(torch.tensor(case.shape[2:]).prod()))
        return "group_norm_moments", (
            randn(*shape),
            randn(*shape),
            None,
            None,
            randn(shape[1]),
            case.groups,
            1e-5,
            mask,
        )
    width = int(torch.tensor(case.normalized).prod())
    shape = (batch, int(torch.tensor(case.shape[1 : len(case.shape) - len(case.normalized)]).prod()), width)
    return "layer_norm_moments", (randn(*shape), randn(*shape), None, None, randn(width), 1e-5, mask)


def optimizer_gate() -> None:
    """Raise `RedGate` unless two steps of the update op are as good as the reference's."""
    shapes = [(), (1,), (7, 3), (130, 65), (0, 4)]
    generator = torch.Generator().manual_seed(0)
    values = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    length = state_starts(values[0])[-1]

    def run(step: Callable[..., None], dtype: torch.dtype) -> list[Tensor]:
        params, grads = ([t.to(dtype, copy=True) for t in tensors] for tensors in values)
        averages = [torch.full((length,), value, dtype=dtype) for value in (0.1, 0.3)]
        seen, flags = torch.zeros(len(shapes), dtype=torch.float64), torch.zeros(len(shapes), dtype=torch.int32)
        for batch in (3.0, 5.0):
            scalars = (torch.tensor(batch, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64))
            step(params, grads, [g.square() for g in grads], *averages, seen, flags, *scalars, *ADAM)
        return [*params, *averages]

    reference = OPS["optimizer_step_"][0]
    actual, expected = run(torch.ops.perexample.optimizer_step_, torch.float32), run(reference, torch.float64)
    for i, (result, right, stock) in enumerate(zip(actual, expected, run(reference, torch.float32), strict=True)):
        try:
            assert_within_budget(result, right, stock, result.dtype, f"optimizer_step_, tensor {i}")
        except AssertionError as error:
            raise RedGate(str(error)) from error


def model_gate(work: Workload) -> None:
    """Raise `RedGate` unless a small version of the model has the moments of the oracle."""
    torch.manual_seed(0)
    model = work.small()
    x, y = work.small_batch()
    expected = oracle(model, loss_fn, x, y)
    stock = oracle(model, loss_fn, x, y, dtype=torch.float32)
    converted = px.convert(copy.deepcopy(model))
    loss_fn(converted(x), y).backward()
    try:
        assert_moments(converted, expected, stock)
    except AssertionError as error:
        raise RedGate(f"{work.name} (small version): {error}") from error
