"""Which dimension of a tensor is the batch, where another one is as long and the shape alone cannot tell.

The autograd graph knows: from a tensor one walks back, with the place of the dimension in question, to the output of
a layer of this library or to the input of the model, whose batch dimension is known. What `places` does not know ends
the walk, without a verdict; so does what has no gradient, but for views and copies of the model's input.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .places import MOVES, Place, before, joins_data, operation_of

__all__ = ["PassInput", "Seen", "ambiguous", "moved_from", "without_history"]

_LONGEST = 64  # nodes of a walk

# Functions of this library whose first output has the batch where they say (`batch_dim`), or first.
_LAYERS = frozenset(
    f"_{name}Backward"
    for name in (
        "BatchNorm Bilinear Conv ConvTranspose Embedding EmbeddingBag Expand GroupNorm InputMajorLinear InstanceNorm "
        "LayerNorm Linear PReLU RMSNorm Recurrent"
    ).split()
)
_ELEMENTWISE = frozenset(  # of one tensor: passed by quickly
    f"{name}Backward0"
    for name in "Relu Gelu Silu Elu Tanh Sigmoid Softplus LeakyRelu Hardswish Neg Exp Sqrt Clone ToCopy NativeDropout "
    "Softmax LogSoftmax".split()
)


class Seen(NamedTuple):
    """What a layer has seen: its name, which dimension it takes for the batch, and a copy of its input."""

    name: str
    axis: int
    tensor: Tensor


@dataclass(slots=True, eq=False)
class PassInput:
    """The input of the forward pass under way that its batch size was taken from, and which dimension that was.

    `met` is how many tensors with a batch each parameter of the fallback has met. `unclear` are the layers, or
    parameters of the fallback (True), whose inputs do not show where their batch is; `data` counts those among them
    that no parameter was used for. Where `watched` is set, it is filled with the inputs of those layers, and nothing
    else is done.
    """

    tensor: Tensor
    axis: int
    met: dict[str, int] = field(default_factory=dict)
    unclear: dict[str, bool] = field(default_factory=dict)
    data: dict[str, int] = field(default_factory=dict)
    watched: tuple[dict[str, bool], list[Seen]] | None = None

    def note(self, name: str, tensor: Tensor, batch: int, fallback: bool) -> None:
        """Note that it is unclear where `tensor` has its batch, if another dimension is as long."""
        if max(tensor.shape.count(batch), self.tensor.shape.count(batch)) > 1:
            self.unclear[name] = fallback
            if not fallback and type(tensor) is Tensor and not tensor.requires_grad:
                self.data[name] = self.data.get(name, 0) + 1


def ambiguous(shape: Sequence[int], axis: int, batch: int) -> bool:
    """Whether the batch could stand in `shape` elsewhere than as dimension `axis`, be it folded into another one."""
    if batch < 2:
        return False
    for i, size in enumerate(shape):
        if size % batch == 0 and i != axis:
            return True
    return False


def without_history(tensor: Tensor, batch: int, known: PassInput | None) -> bool:
    """Whether `tensor` may be data of as many rows as the batch that belong to no example.

    It is asked only where a dimension of the model's input besides the batch is as long.
    """
    return (
        known is not None
        and known.tensor.shape.count(batch) > 1
        and tensor.grad_fn is None
        and tensor is not known.tensor
    )


def moved_from(
    tensor: Tensor, axis: int, batch: int, known: PassInput | None, name: str, *, fallback: bool = False
) -> str:
    """What shows that dimension `axis` of `tensor`, as long as the batch, is not the batch; "" where nothing does.

    `name` is that of the layer, or of the parameter of the `fallback`, which sees `tensor`; it is noted down where
    nothing shows that the dimension is the batch, either.
    """
    if known is not None and known.watched is not None:
        if name in known.watched[0]:
            known.watched[1].append(Seen(name, axis, tensor.detach().clone()))
        return ""
    found = _moved(tensor, axis, batch, known)
    if found is None and known is not None:
        known.note(name, tensor, batch, fallback)
    return found or ""


def _moved(tensor: Tensor, axis: int, batch: int, known: PassInput | None) -> str | None:
    """What shows that the dimension is not the batch, "" where it is known to be, None if unknown."""
    node: Any = tensor.grad_fn
    if node is None:
        if known is None or tensor is known.tensor:
            return ""
        return _moved_view(tensor, axis, batch, known) or _moved_copy(tensor, axis, batch, known)
    number = tensor.output_nr
    while node.name() in _ELEMENTWISE and node.next_functions[0][0] is not None:
        node, number = node.next_functions[0]
    if number == 0 and node.name() in _LAYERS and getattr(node, "batch_dim", 0) == axis:
        return ""  # nearly always
    is_batch, last, alone = _walk(node, number, axis, batch, known)
    if is_batch is None:
        # Nothing is known of this dimension; but of another one it may be, that it is the batch.
        others = (i for i, size in enumerate(tensor.shape) if size == batch and i != axis)
        if any(_walk(node, number, i, batch, known)[0] for i in others):
            return "another dimension is"
        return None
    if is_batch:
        return "" if alone else None
    return f"{last or 'an operation'} put another one there"


def _moved_view(tensor: Tensor, axis: int, batch: int, known: PassInput) -> str:
    """The same of a view of the model's input, by its strides."""
    if not tensor._is_view():
        return ""
    base = known.tensor._base if known.tensor._is_view() else known.tensor
    if tensor._base is not base:
        return ""
    stride = known.tensor.stride(known.axis)
    others = (i for i in range(tensor.dim()) if i != axis and tensor.shape[i] == batch)
    if tensor.stride(axis) != stride and any(tensor.stride(i) == stride for i in others):
        return "it is a view of the model's input in which the batch is another dimension"
    return ""


def _moved_copy(tensor: Tensor, axis: int, batch: int, known: PassInput) -> str | None:
    """The same of a copy, by its values: those of the input with its dimensions in another order."""
    source = known.tensor.detach()
    dims = source.dim()
    if (
        tensor.shape.count(batch) < 2  # else a batch elsewhere has raised by its length
        or sorted(tensor.shape) != sorted(source.shape)
        or tensor.device != source.device
        or tensor.device.type == "meta"
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return None
    orders = [order for order in itertools.permutations(range(dims)) if source.permute(order).shape == tensor.shape]
    # Where it is the same in both orders nothing has moved.
    for order in sorted(orders, key=lambda order: order[axis] != known.axis):
        if torch.equal(tensor.detach(), source.permute(order).to(tensor.dtype)):
            return "" if order[axis] == known.axis else "it is a copy of the model's input with its dimensions moved"
    return None


def _walk(node: Any, number: int, axis: int, batch: int, known: PassInput | None) -> tuple[bool | None, str, bool]:
    """Whether dimension `axis` of what `node` made is the batch, None if unknown; and the last that moved it.

    And whether it met nothing on the way that has no history, and might have its batch elsewhere.
    """
    seen: set[Any] = set()
    pending: list[tuple[Any, int, Place, str, bool]] = [(node, number, Place(axis, 1), "", True)]
    while pending and len(seen) < _LONGEST:
        node, number, place, last, alone = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        name = node.name()
        true_axis = _known(node, name, number, known)
        if true_axis is not None:
            return place == (true_axis, 1), last, alone
        alone = alone and not joins_data(node)
        for following, index in node.next_functions:
            if following is not None:
                found = before(node, number, place, following, index, batch)
                if found is not None:
                    moved = last or ("" if found == place else MOVES.get(operation_of(name), ""))
                    pending.append((following, index, found, moved, alone))
    return None, "", False


def _known(node: Any, name: str, number: int, known: PassInput | None) -> int | None:
    """Which dimension of what `node` made is the batch, where that is known."""
    if number == 0 and name in _LAYERS:
        return int(getattr(node, "batch_dim", 0))
    if known is None:
        return None
    if node is known.tensor.grad_fn:
        return known.axis if number == known.tensor.output_nr else None
    return known.axis if getattr(node, "variable", None) is known.tensor else None
