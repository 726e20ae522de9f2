"""Which dimension of a tensor is the batch, where another one is as long and the shape alone cannot tell.

The autograd graph knows: from a tensor one walks back, with the place of the dimension in question, to the output of
a layer of this library or to the input of the model, whose batch dimension is known. Operations that are not
understood end the walk, without a verdict; so does what has no gradient, but for views of the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["PassInput", "ambiguous", "moved_from"]

_LONGEST = 64  # nodes of a walk

# Functions of this library whose first output has the batch where they say (`batch_dim`), or first.
_LAYERS = frozenset(
    f"_{name}Backward"
    for name in (
        "BatchNorm Bilinear Conv ConvTranspose Embedding Expand GroupNorm InputMajorLinear InstanceNorm LayerNorm "
        "Linear PReLU RMSNorm"
    ).split()
)
_ELEMENTWISE = frozenset(  # of one tensor: passed by quickly
    f"{name}Backward0"
    for name in "Relu Gelu Silu Elu Tanh Sigmoid Softplus LeakyRelu Hardswish Neg Exp Sqrt Clone ToCopy NativeDropout "
    "Softmax LogSoftmax".split()
)
_MOVES = {"Permute": "permute", "Transpose": "transpose", "T": "t"}
_BROADCAST = tuple(
    "Add Sub Rsub Mul Div Where Maximum Minimum Pow Lerp Addcmul Addcdiv Expand Cat Slice ConstantPadNd Clamp "
    "MaskedFill Atan2 Xlogy Fmod Remainder".split()
)
_RESHAPES = ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias")
_UNCLEAR = ("Index", "CopySlices", "AsStrided", "Trilinear", "Cdist", "Repeat", "Roll", "Diagonal", "IndexSelect")


class PassInput(NamedTuple):
    """The input of the forward pass under way that its batch size was taken from, and which dimension that was."""

    tensor: Tensor
    axis: int


def ambiguous(shape: Sequence[int], axis: int, batch: int) -> bool:
    """Whether the batch could stand in `shape` elsewhere than as dimension `axis`, be it folded into another one."""
    if batch < 2:
        return False
    for i, size in enumerate(shape):
        if size % batch == 0 and i != axis:
            return True
    return False


def moved_from(tensor: Tensor, axis: int, batch: int, known: PassInput | None) -> str:
    """What shows that dimension `axis` of `tensor`, as long as the batch, is not the batch; "" where nothing does."""
    node: Any = tensor.grad_fn
    number = tensor.output_nr
    if node is None:
        return _moved_view(tensor, axis, batch, known)
    while node.name() in _ELEMENTWISE and node.next_functions[0][0] is not None:
        node, number = node.next_functions[0]
    if number == 0 and node.name() in _LAYERS and getattr(node, "batch_dim", 0) == axis:
        return ""  # nearly always
    seen: set[Any] = set()
    pending: list[tuple[Any, int, int, str]] = [(node, number, axis, "")]
    while pending and len(seen) < _LONGEST:
        node, number, place, last = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        name = node.name()
        true_place = _known(node, name, number, known)
        if true_place is not None:
            return "" if place == true_place else f"{last or 'an operation'} put another one there"
        operation = name.rstrip("0123456789").removesuffix("Backward")
        for following, index in node.next_functions:
            if following is not None:
                before = _before(node, operation, number, place, following, index, batch)
                if before is not None:
                    moved = last or ("" if before == place or operation not in _MOVES else f"'{_MOVES[operation]}'")
                    pending.append((following, index, before, moved))
    return ""


def _moved_view(tensor: Tensor, axis: int, batch: int, known: PassInput | None) -> str:
    """The same of a view of the model's input, by its strides."""
    if known is None or tensor is known.tensor or not tensor._is_view():
        return ""
    base = known.tensor._base if known.tensor._is_view() else known.tensor
    if tensor._base is not base:
        return ""
    stride = known.tensor.stride(known.axis)
    others = (i for i in range(tensor.dim()) if i != axis and tensor.shape[i] == batch)
    if tensor.stride(axis) != stride and any(tensor.stride(i) == stride for i in others):
        return "it is a view of the model's input in which the batch is another dimension"
    return ""


def _known(node: Any, name: str, number: int, known: PassInput | None) -> int | None:
    """Which dimension of what `node` made is the batch, where that is known."""
    if number == 0 and name in _LAYERS:
        return int(getattr(node, "batch_dim", 0))
    if known is None:
        return None
    if node is known.tensor.grad_fn:
        return known.axis if number == known.tensor.output_nr else None
    return known.axis if getattr(node, "variable", None) is known.tensor else None


def _shapes(node: Any) -> list[Sequence[int]]:
    """The shapes of what `node` made in the forward pass."""
    if hasattr(node, "variable"):
        return [node.variable.shape]
    return [metadata.shape for metadata in node._input_metadata]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value  # autograd hands out negative numbers so


def _before(node: Any, operation: str, number: int, place: int, following: Any, index: int, batch: int) -> int | None:
    """Where dimension `place` of the output of `node` was in its input that `following` made; None if unknown."""
    outputs, inputs = _shapes(node), _shapes(following)
    if number >= len(outputs) or index >= len(inputs):
        return None
    after, shape = outputs[number], inputs[index]
    found = _place(node, operation, place, after, shape, following)
    return found if found is not None and 0 <= found < len(shape) and shape[found] == batch else None


def _place(
    node: Any, operation: str, place: int, after: Sequence[int], shape: Sequence[int], following: Any
) -> int | None:
    dims = len(shape)
    if operation in _MOVES:
        return _permutation(node, operation, dims)[place]
    if operation in _UNCLEAR:
        return None
    if operation in _RESHAPES:
        return _reshaped(place, after, shape)
    if operation in ("Select", "Unbind"):
        return place + (place >= _signed(node._saved_dim) % dims)
    if operation == "Stack":
        dim = _signed(node._saved_dim) % len(after)
        return None if place == dim else place - (place > dim)
    if operation in ("Sum", "Mean", "Amax", "Amin", "Logsumexp"):
        return place if len(after) == dims else _reduced(node, place, dims)
    if operation in ("Mm", "Addmm", "Bmm", "Baddbmm", "Linear"):
        return _multiplied(node, operation, place, len(after), following)
    if operation.endswith("Convolution") or "Attention" in operation:
        return place if place == 0 and following is node.next_functions[0][0] else None
    if tuple(shape) == tuple(after):
        return place  # whatever it is, it does not move dimensions
    if operation.startswith(_BROADCAST):
        return place - (len(after) - dims)
    return None


def _permutation(node: Any, operation: str, dims: int) -> list[int]:
    order = list(range(dims))
    if operation == "Permute":
        return [_signed(dim) % dims for dim in node._saved_dims]
    first, second = (0, dims - 1) if operation == "T" else (_signed(node._saved_dim0), _signed(node._saved_dim1))
    order[first % dims], order[second % dims] = order[second % dims], order[first % dims]
    return order


def _reshaped(place: int, after: Sequence[int], shape: Sequence[int]) -> int | None:
    """The dimension of the same length that has as many elements before it."""
    before, size = math.prod(after[:place]), after[place]
    return next((i for i in range(len(shape)) if shape[i] == size and math.prod(shape[:i]) == before), None)


def _reduced(node: Any, place: int, dims: int) -> int | None:
    saved = getattr(node, "_saved_dim", None)
    if saved is None:
        return None
    gone = {_signed(dim) % dims for dim in ([saved] if isinstance(saved, int) else saved)}
    left = [i for i in range(dims) if i not in gone]
    return left[place] if place < len(left) else None


def _multiplied(node: Any, operation: str, place: int, dims: int, following: Any) -> int | None:
    """Of ``self @ other``: rows come from the first, columns from the second, and what precedes them from both."""
    factors = [item for item, _ in node.next_functions][1 if operation in ("Addmm", "Baddbmm") else 0 :]
    if operation == "Linear":
        return place if place < dims - 1 and following is factors[0] else None
    if place == dims - 1:
        return place if following is factors[1] and following is not factors[0] else None
    if place == dims - 2:
        return place if following is factors[0] else None
    return place
