"""A user's own model and loss against a loop over their examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from ..convert.influence import copy_of, cuda_devices
from ..convert.passes import batch_of
from ..moments import accumulate_dtype, no_moments

__all__ = ["check"]


def check(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Raise unless ``p.sum_grad_squared`` of every parameter is what a loop over the examples gives.

    The loop runs the model on one example at a time. So it finds also what no layer can see, like a batch that was
    moved where another dimension is as long, or examples in another order between two uses of one weight::

        px.check(model, lambda model: F.cross_entropy(model(x), y))

    Check with as many examples as there are positions (B = T), if training may meet that: where the numbers differ,
    layers notice by themselves. For B examples the time is that of B passes with gradients and some without, of one
    example each.

    Args:
        model: converted, in training mode. A copy is checked, without dropout, and the model is left as it is; but its
            hooks, and whatever else its forward changes outside of itself, see those passes.
        loss: gives the loss of a batch of a few examples, at least 2, by the copy that it is called with, and the
            same each time. Tensors among the inputs of the model that have as many rows as the batch are taken for
            examples, others to be the same for all of them. Outputs have their rows in the order of the inputs.
        reduction: "mean" or "sum", how a loss that the model itself returns combines examples.
        dtype: to compute in, copy and inputs (float64 is the sharpest); None: the model's own.
        tolerance: the difference allowed in a second moment, relative to its largest element. None: half of the
            digits of the dtype or of float32, ``eps ** 0.5``. Where less precision is used inside (autocast), say 0.1.

    Returns:
        name of the parameter -> the difference in its second moment, relative to the largest element; 0 where rounding
        explains it beside the moments of other parameters.

    Raises:
        ValueError: some second moments, or gradients, differ, which are listed; the loss changes from call to call; or
            what the layers themselves refuse.
        TypeError: `model` is not converted.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"px.check: reduction must be 'mean' or 'sum', got {reduction!r}")
    roots = [m for m in model.modules() if "_perexample_root" in m.__dict__] if isinstance(model, nn.Module) else []
    if not roots:
        raise TypeError(f"px.check: model must be converted (px.convert), got {type(model).__name__}")
    if not model.training:
        raise ValueError("px.check: the model is in eval mode, which makes no second moments; call model.train()")
    originals = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model = copy_of(model)
    model.zero_grad()
    if dtype is not None:
        model.to(dtype)
    for module in model.modules():
        _without_dropout(module)
    loop = _Loop(model, loss, reduction, dtype, originals)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(cuda_devices(model)):
        try:
            expected, examples = loop.moments(named)
            loop.restore()
            with loop.cast_inputs():
                loss(model).backward()
        except RuntimeError as error:
            error.add_note("(in px.check, which runs the model on one example at a time)")
            raise
    return _compare(named, expected, examples, tolerance)


@dataclass
class _Expected:
    """Of one parameter: ``sum_b c_b`` and ``sum_b c_b**2``."""

    grad: Tensor
    sum_sq: Tensor

    def add(self, c: Tensor) -> None:
        self.grad += c
        self.sum_sq += c.to(self.sum_sq.dtype).square()


def _without_dropout(module: nn.Module) -> None:
    if isinstance(module, _DropoutNd):
        module.p = 0.0
    for name, value in module.__dict__.items():
        if "drop" in name and isinstance(value, float):  # of attention and recurrent layers
            module.__dict__[name] = 0.0


def _random_state(model: nn.Module) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in cuda_devices(model))]


@torch.no_grad()
def _set(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in buffers:
        if not torch.equal(buffer, value):  # else autograd may have saved it
            buffer.copy_(value)


@dataclass
class _Loop:
    """Runs each call of a converted module on one example at a time, and the loss on all their outputs together.

    The contribution of an example is the gradient of that loss by the parameters as used for this example; so
    the loss may be anything: averaged over tokens, say, of which examples have different numbers.
    """

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    reduction: str
    dtype: torch.dtype | None
    originals: dict[str, nn.Parameter]  # of the model that `model` is a copy of
    batches: list[int] = field(default_factory=list)  # of the calls in one pass
    call: int = 0  # of the pass under way
    inside: bool = False  # of a call
    chosen: tuple[int, int] | None = None  # call and row whose contribution is wanted
    known: dict[tuple[int, int], Any] = field(default_factory=dict)  # outputs of rows, where they have no gradient

    def __post_init__(self) -> None:
        self.buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    @property
    def roots(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if "_perexample_root" in module.__dict__]

    def moments(self, named: dict[str, nn.Parameter]) -> tuple[dict[str, _Expected], int]:
        """What the loop gives for the parameters, and the number of examples."""
        result = {
            name: _Expected(torch.zeros_like(p), torch.zeros_like(p, dtype=accumulate_dtype(p.dtype)))
            for name, p in named.items()
        }
        penalty = self.gradients(named, None)
        if not self.batches:
            raise ValueError("px.check: the function did not call the model that it was given; use its argument")
        for name, grad in penalty.items():
            if grad is not None and grad.count_nonzero():
                raise ValueError(
                    f"px.check: the loss depends on {name} besides what the model computed for the examples (a "
                    f"penalty?); leave that out, or give the part that was called px.convert too"
                )
        for call, batch in enumerate(self.batches):
            for row in range(batch):
                for name, grad in self.gradients(named, (call, row)).items():
                    if grad is not None:
                        result[name].add(grad)
        return result, sum(self.batches)

    def gradients(self, named: dict[str, nn.Parameter], chosen: tuple[int, int] | None) -> dict[str, Tensor | None]:
        """The gradients of the loss where the parameters count as used for the `chosen` row alone."""
        self.restore()
        self.call, self.chosen = 0, chosen
        with self.cast_inputs(), self.by_rows(), no_moments():
            loss = self.loss(self.model)
            if not loss.requires_grad:
                return {}
            if chosen is None and self.batches:
                self.refuse_originals(loss)
            return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))

    def refuse_originals(self, loss: Tensor) -> None:
        """Raise where the loss comes from the original model, of which nothing would be checked."""
        grads = torch.autograd.grad(loss, list(self.originals.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(self.originals, grads, strict=True):
            if grad is not None:
                raise ValueError(
                    f"px.check: the loss depends on {name} of the model itself, not of the copy that is checked: the "
                    f"function, or a function that the model keeps (a closure, a replaced forward), holds on to the "
                    f"model; use the argument of the one, and self in the other"
                )

    def restore(self) -> None:
        _set(self.buffers)

    @contextmanager
    def cast_inputs(self) -> Iterator[None]:
        def cast(value: Tensor) -> Tensor:
            return value.to(self.dtype) if value.is_floating_point() else value

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return pytree.tree_map_only(Tensor, cast, (args, kwargs))

        handles = []
        if self.dtype is not None:
            handles = [m.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for m in self.roots]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def by_rows(self) -> Iterator[None]:
        roots = self.roots
        own = [module.__dict__.get("forward") for module in roots]
        for module in roots:
            module.forward = partial(self.forward, module, module.forward)
        try:
            yield
        finally:
            self.inside = False
            for module, forward in zip(roots, own, strict=True):
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward

    def forward(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.inside:
            return forward(*args, **kwargs)
        self.inside = True
        found = batch_of(module, args, kwargs)
        if found is None or found.tensor.shape[found.axis] < 2:
            rows = 0 if found is None else found.tensor.shape[found.axis]
            raise ValueError(f"px.check: needs a batch of at least 2 examples, the first input has {rows} rows")
        batch, call = found.tensor.shape[found.axis], self.call
        self.call += 1
        if len(self.batches) < self.call:
            self.batches.append(batch)
        elif self.batches[call] != batch:
            raise ValueError(
                f"px.check: call {call} of the model had {self.batches[call]} examples, then {batch}; the function has "
                f"to do the same each time"
            )
        before = [(buffer, buffer.clone()) for buffer, _ in self.buffers]
        random = _random_state(module)
        with torch.no_grad():
            whole = forward(*args, **kwargs)
        if not all(map(torch.equal, random, _random_state(module))):
            raise ValueError(
                f"px.check: {type(module).__name__} draws random numbers (as dropout in a function does), so that no "
                f"two passes are alike; switch that off"
            )
        outputs = []
        for row in range(batch):
            _set(before)
            cut = partial(_row, row=row, batch=batch, axis=found.axis)
            given = pytree.tree_map_only(Tensor, cut, (args, kwargs))
            outputs.append(self.one(forward, given, (call, row)))
        self.inside = False
        return self.joined(whole, outputs)

    def one(self, forward: Callable[..., Any], given: tuple[Any, Any], which: tuple[int, int]) -> Any:
        """The output for one example, by which the parameters get a gradient only if it is the chosen one."""
        fixed = not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(given))
        if fixed and which in self.known and which != self.chosen:
            return self.known[which]
        for p in self.parameters:
            p.requires_grad_(which == self.chosen)
        try:
            output = forward(*given[0], **given[1])
        finally:
            for p in self.parameters:
                p.requires_grad_(True)
        if fixed and which != self.chosen:
            self.known[which] = output
        return output

    def joined(self, whole: Any, rows: list[Any]) -> Any:
        """The outputs for single examples as the output for the batch, whose shapes are those of `whole`."""
        leaves, spec = pytree.tree_flatten(whole)
        columns = list(zip(*(pytree.tree_leaves(row) for row in rows), strict=True))
        if len(columns) != len(leaves):
            raise ValueError("px.check: the model returns something else for one example than for several")
        return pytree.tree_unflatten([self.column(*pair) for pair in zip(leaves, columns, strict=True)], spec)

    def column(self, whole: Any, parts: tuple[Any, ...]) -> Any:
        if not isinstance(whole, Tensor):
            return parts[0]
        shape = parts[0].shape
        if whole.shape == shape:  # a loss, or what has no batch
            if not whole.is_floating_point():
                return parts[0]
            together = torch.stack(parts)
            return together.mean(0) if self.reduction == "mean" else together.sum(0)
        longer = [i for i, size in enumerate(whole.shape) if len(shape) > i and size != shape[i]]
        if len(shape) == whole.dim() and len(longer) == 1 and whole.shape[longer[0]] == len(parts) * shape[longer[0]]:
            return torch.cat(parts, longer[0])
        raise ValueError(
            f"px.check: an output has shape {tuple(whole.shape)} for {len(parts)} examples, and {tuple(shape)} for one "
            f"of them alone: not their number of rows"
        )


def _row(tensor: Tensor, row: int, batch: int, axis: int) -> Tensor:
    """Row `row` of what has as many as the batch; anything else whole."""
    for dim in (axis, 0):
        if tensor.dim() > dim and tensor.shape[dim] == batch:
            # Contiguous: stock GroupNorm's backward reads a null pointer where a channels_last input has no gradient.
            return tensor.narrow(dim, row, 1).contiguous()
    return tensor


def _compare(
    named: dict[str, nn.Parameter], expected: dict[str, _Expected], examples: int, tolerance: float | None
) -> dict[str, float]:
    found, lines, mixed = {}, [], False
    # A gradient that is zero but for rounding (of a key's bias, say) is measured by those of other parameters.
    largest = max((float(e.sum_sq.max()) for e in expected.values() if e.sum_sq.numel()), default=0.0)
    for name, p in named.items():
        e = expected[name]
        if not e.sum_sq.numel():
            continue
        eps = max(torch.finfo(p.dtype).eps, torch.finfo(torch.float32).eps)  # models round to float32 inside
        allowed = eps**0.5 if tolerance is None else tolerance
        floor = eps**1.5 * largest
        square = p.sum_grad_squared  # type: ignore[attr-defined]
        square = torch.zeros_like(e.sum_sq) if square is None else square
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        top = float(e.sum_sq.max())
        difference = float((square - e.sum_sq).abs().max())
        found[name] = max(difference - floor, 0.0) / top if top else float(difference > floor)
        # |sum c| of rounding errors is measured like c, by the root of the sum of squares.
        wrong = float((grad - e.grad).abs().max()) > allowed * float(e.grad.abs().max()) + (floor * examples) ** 0.5
        if wrong or not difference <= allowed * top + floor:
            mixed = mixed or wrong
            ratio = float(square.sum()) / float(e.sum_sq.sum()) if top else float("inf")
            lines.append(f"  {name}: {ratio:.4g} times that of the loop{', and the gradient differs' if wrong else ''}")
    if lines:
        raise ValueError(
            f"px.check: the second moments of {len(lines)} of {len(named)} parameters are not those of a loop over the "
            f"{examples} examples:\n" + "\n".join(lines) + "\n" + (_MIXED if mixed else _MOVED)
        )
    return found


_MOVED = (
    "The gradients agree, so a layer has taken another dimension for the batch (with a batch as long as no other "
    "dimension it says so itself), or one weight is used with the examples in different orders. Keep the batch first, "
    "and its order, freeze the parameters, or run this part under px.no_moments()."
)
_MIXED = (
    "The gradients differ too: the examples interact in this model, so that there is no gradient of a single one; the "
    "model returns them in another order; the loss is not the same each time; or an input that is the same for all of "
    "them has as many rows as the batch."
)
