"""Where a dimension of the output of an operation was in its input, by what autograd remembers of the operation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["MOVES", "Place", "before", "history", "joins_data", "may_reorder", "operation_of"]

MOVES = {"Permute": "'permute'", "Transpose": "'transpose'", "T": "'t'"}

_RESHAPES = ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias")
_UNCLEAR = ("CopySlices", "AsStrided", "Trilinear", "Cdist")
_BROADCAST = tuple(
    "Add Sub Rsub Mul Div Where Maximum Minimum Pow Lerp Addcmul Addcdiv Expand Repeat Copy Clamp MaskedFill Atan2 "
    "Xlogy Fmod Remainder".split()
)
_JOINS = frozenset("Add Sub Mul Div Where Maximum Minimum Lerp Addcmul Addcdiv Cat Stack Copy CopySlices".split())
_REORDERS = frozenset(
    "Index IndexSelect IndexPut IndexAdd IndexCopy Gather Scatter ScatterAdd Take TakeAlongDim Flip Roll Sort Topk "
    "Cat Stack CopySlices".split()
)
_SUMS = frozenset(("Add", "Mul"))
_PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Linear")


class Place(NamedTuple):
    """The batch within a tensor: index b is ``(i // step) % B``, with i the index along dimension `dim`.

    `step` is 1 but where the batch is folded into a longer dimension.
    """

    dim: int
    step: int


def history(tensors: Iterable[Tensor], end: str = "") -> Iterator[Any]:
    """The nodes of autograd's graph that `tensors` hang on, each once; none called `end`, nor what is behind."""
    pending: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if end and node.name() == end:
            continue
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


def operation_of(name: str) -> str:
    """What the node called `name` differentiates: "View" of "ViewBackward0"."""
    return name.rstrip("0123456789").removesuffix("Backward")


def before(node: Any, number: int, place: Place, following: Any, index: int, batch: int) -> Place | None:
    """Where `place` of output `number` of `node` was in its input, output `index` of `following`; None if unknown."""
    after, shape = _shape(node, number), _shape(following, index)
    if after is None or shape is None:
        return None
    operation = operation_of(node.name())
    if operation in _RESHAPES:
        return _reshaped(place, after, shape, batch)
    dim = _dim(node, operation, place.dim, after, shape, following)
    if dim is None or not 0 <= dim < len(shape) or shape[dim] != after[place.dim]:
        return None
    return Place(dim, place.step)


def joins_data(node: Any) -> bool:
    """Whether `node` may have joined its input with data that has no history; or with a number, which does not show."""
    return any(following is None for following, _ in node.next_functions) and operation_of(node.name()) in _JOINS


def may_reorder(node: Any, batch: int) -> bool:
    """Whether `node` may have put the rows of a batch into another order."""
    operation = operation_of(node.name())
    function = getattr(type(node), "_forward_cls", None)
    if operation not in _REORDERS and (function is None or function.__module__.startswith("perexample.")):
        return False
    dim = getattr(node, "_saved_dim", None)
    shapes = _shapes(node)
    if isinstance(dim, int) and shapes and shapes[0]:
        return shapes[0][_signed(dim) % len(shapes[0])] == batch
    return any(batch in shape for shape in shapes)


def _shapes(node: Any) -> list[Sequence[int]]:
    """The shapes of what `node` made in the forward pass."""
    if hasattr(node, "variable"):
        return [node.variable.shape]
    return [metadata.shape for metadata in node._input_metadata]


def _shape(node: Any, number: int) -> Sequence[int] | None:
    """That of its output `number`, if there is one."""
    variable = getattr(node, "variable", None)
    if variable is not None:
        return variable.shape if number == 0 else None
    metadata = node._input_metadata
    return metadata[number].shape if number < len(metadata) else None


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value  # autograd hands out negative numbers so


def _reshaped(place: Place, after: Sequence[int], shape: Sequence[int], batch: int) -> Place | None:
    """The place with as many elements between one example and the next."""
    stride = math.prod(after[place.dim + 1 :]) * place.step
    for dim, size in enumerate(shape):
        inner = math.prod(shape[dim + 1 :])
        if inner and inner <= stride < inner * size:
            step = stride // inner
            return Place(dim, step) if stride % inner == 0 and size % (step * batch) == 0 else None
    return None


def _dim(node: Any, operation: str, dim: int, after: Sequence[int], shape: Sequence[int], following: Any) -> int | None:
    dims = len(shape)
    if operation in _SUMS:
        return dim - (len(after) - dims)  # nearly always: a residual sum
    if operation in MOVES:
        return _permutation(node, operation, dims)[dim]
    if operation in _UNCLEAR:
        return None
    if operation in ("Select", "Unbind"):
        return dim + (dim >= _signed(node._saved_dim) % dims)
    if operation == "Stack":
        stacked = _signed(node._saved_dim) % len(after)
        return None if dim == stacked else dim - (dim > stacked)
    if operation in _PRODUCTS:
        return _multiplied(node, operation, dim, len(after), following)
    if operation.endswith("Convolution") or "Attention" in operation:
        return dim if dim == 0 and following is node.next_functions[0][0] else None
    if operation == "Index":
        return _indexed(node._saved_indices, dim, dims)
    if operation == "Diagonal":
        return _remaining((node._saved_dim1, node._saved_dim2), dim, dims)
    if len(after) < dims and hasattr(node, "_saved_keepdim"):
        saved = node._saved_dim
        return None if saved is None else _remaining((saved,) if isinstance(saved, int) else saved, dim, dims)
    if operation == "Sum":
        return None  # of everything
    if operation == "Unfold":
        return dim
    if operation.startswith(_BROADCAST):
        return dim - (len(after) - dims)
    # Whatever else it is, it does not move dimensions, if it is PyTorch's own (their names end in a number).
    return dim if len(shape) == len(after) and node.name()[-1:].isdigit() else None


def _permutation(node: Any, operation: str, dims: int) -> list[int]:
    order = list(range(dims))
    if operation == "Permute":
        return [_signed(dim) % dims for dim in node._saved_dims]
    first, second = (0, dims - 1) if operation == "T" else (_signed(node._saved_dim0), _signed(node._saved_dim1))
    order[first % dims], order[second % dims] = order[second % dims], order[first % dims]
    return order


def _remaining(gone: Sequence[int], dim: int, dims: int) -> int | None:
    """What number `dim` is of the dimensions that are not `gone`."""
    without = {_signed(d) % dims for d in gone}
    left = [i for i in range(dims) if i not in without]
    return left[dim] if dim < len(left) else None


def _indexed(indices: Sequence[torch.Tensor | None], dim: int, dims: int) -> int | None:
    """Of ``x[indices]``: what tensors have indexed stands where the first of them is, or first if they are apart."""
    where = [i for i, index in enumerate(indices) if index is not None]
    size = max(index.dim() for index in indices if index is not None)
    begin = where[0] if where[-1] - where[0] + 1 == len(where) else 0
    if begin <= dim < begin + size:
        return where[0] if len(where) == 1 and size == 1 else None  # rows in another order, or which not is known
    left = [i for i in range(dims) if i not in where]
    number = dim if dim < begin else dim - size
    return left[number] if number < len(left) else None


def _multiplied(node: Any, operation: str, dim: int, dims: int, following: Any) -> int | None:
    """Of ``self @ other``: rows come from the first, columns from the second, and what precedes them from both."""
    factors = [item for item, _ in node.next_functions][1 if operation in ("Addmm", "Baddbmm") else 0 :]
    if operation == "Linear":
        return dim if dim < dims - 1 and following is factors[0] else None
    if dim == dims - 1:
        return dim if following is factors[1] and following is not factors[0] else None
    if dim == dims - 2:
        return dim if following is factors[0] else None
    return dim
