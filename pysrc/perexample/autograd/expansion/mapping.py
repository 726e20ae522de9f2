"""What becomes of copies that meet nothing but each other and constants: the function of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from . import names
from .per_example import PerExample, plain, refuse


class Mapping:
    """One torch function that has met a `PerExample`."""

    def __init__(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], first: PerExample
    ) -> None:
        self.func, self.name, self.args, self.kwargs, self.first = func, name, args, kwargs, first
        self.batch, self.batch_dim = first.batch, first.batch_dim
        origins = [v.origin for v in tree_flatten((args, kwargs))[0] if isinstance(v, PerExample)]
        self.origin = first.origin
        if len(origins) > 1:  # as open a question as any of them
            bare, grown = any(origin.bare for origin in origins), all(origin.grown for origin in origins)
            self.origin = first.origin._replace(bare=bare, grown=grown)

    def refuse(self, why: str = "") -> NoReturn:
        refuse(self.first, f"'{self.name}'", why)

    def alone(self, flat: list[Any]) -> Any:
        """The function of each copy; where it keeps the rows apart, of the rows, and of the copies only if needed."""
        first = self.first
        rows = first._rows
        if self.name in ("expand", "broadcast_to", "repeat", "tile"):
            grown = self.grown()
            if grown is not None:
                return PerExample(None, self.origin, rows=grown, make=self.map_later())
        elif rows is not None and self.row_by_row(flat, rows):
            args, kwargs = self.replaced({id(value): value._rows for value in flat if isinstance(value, PerExample)})
            result = self.func(*args, **kwargs)
            if self.name not in names.RESHAPES or result.shape[:1] == rows.shape[:1]:
                return PerExample(None, self.origin, rows=result, make=self.map_later())
        return self.mapped()

    def row_by_row(self, flat: list[Any], rows: Tensor) -> bool:
        """Whether the function may treat the `rows` of its arguments apart (if it reshapes, its result has to tell)."""
        found = [value for value in flat if isinstance(value, PerExample)]
        if self.name in names.ELEMENTWISE:
            same = all(value._rows is not None and value.dim() == rows.dim() for value in found)
            return same and self.narrow(flat, rows)
        if len(found) > 1:
            return False
        if self.name in names.KEEPS_ROWS:
            return True
        if self.batch_dim:
            return False
        own = bool(self.args) and self.args[0] is self.first
        return self.name in names.RESHAPES or (own and names.keeps_rows(self.name, self.args, self.kwargs))

    def grown(self) -> Tensor | None:
        """The rows of ``p.expand(B, ...)`` and ``p.repeat(B, ...)``. None where no dimension becomes the batch."""
        first, *rest = self.args
        if not rest:
            rest = [self.kwargs.get("size", self.kwargs.get("repeats", self.kwargs.get("dims")))]
        sizes = list(rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest)
        dims = len(sizes)
        if dims == 0 or dims < first.dim():
            return None
        axis = self.batch_dim if dims > self.batch_dim + 1 else 0
        shape = (1,) * (dims - first.dim()) + tuple(first.shape)
        if sizes[axis] != self.batch or shape[axis] != 1:
            return None
        rows = self.align(first, dims, axis)
        if self.name in ("repeat", "tile"):
            sizes[axis] = 1
            return rows.repeat(sizes)
        return rows.expand(sizes)

    def align(self, value: PerExample, dims: int, axis: int) -> Tensor:
        """The copies as a tensor of `dims` dimensions, of which `axis` is the batch."""
        shape = (1,) * (dims - value.dim()) + tuple(value.shape)
        if shape[axis] == self.batch and value.dim() == dims:
            return value.rows(axis)
        if shape[axis] != 1:
            self.refuse(f"its shape {tuple(value.shape)} does not fit a batch of {self.batch} examples")
        return value.copies.reshape(self.batch, *shape).movedim(0, axis).squeeze(axis + 1)

    @staticmethod
    def narrow(flat: list[Any], rows: Tensor) -> bool:
        """Whether every other tensor is broadcast within the rows, and not they over it."""
        return all(t.dim() < rows.dim() for t in flat if isinstance(t, Tensor) and not isinstance(t, PerExample))

    def replaced(self, by: dict[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        flat, spec = tree_flatten((self.args, self.kwargs))
        return tree_unflatten([by.get(id(value), plain(value)) for value in flat], spec)

    def map_later(self) -> Callable[[], Tensor]:
        def make() -> Tensor:
            with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
                return self.mapped().copies

        return make

    def mapped(self) -> Any:
        """The function of each copy."""
        if names.in_place(self.func) or self.kwargs.get("out") is not None:
            self.refuse("in place, into one tensor for all examples")
        flat, spec = tree_flatten((self.args, self.kwargs))
        where = [i for i, value in enumerate(flat) if isinstance(value, PerExample)]
        one = self.with_parts(where, flat, spec)
        copies = self.over_examples(one, [flat[i].copies for i in where])
        return tree_map_only(Tensor, lambda part: PerExample(part, self.origin), copies)

    def with_parts(self, where: list[int], flat: list[Any], spec: Any) -> Callable[..., Any]:
        """The function of what stands at the places `where` among the arguments."""
        fixed = [plain(value) for value in flat]

        def one(*parts: Tensor) -> Any:
            filled = list(fixed)
            for i, part in zip(where, parts, strict=True):
                filled[i] = part
            args, kwargs = tree_unflatten(filled, spec)
            return self.func(*args, **kwargs)

        return one

    def over_examples(self, one: Callable[..., Any], tensors: list[Tensor]) -> Any:
        """`one` of each example's part of `tensors`, stacked."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                return torch.func.vmap(one, randomness="same")(*tensors)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = _first_line(error)
        if any(word in self.name for word in names.RANDOM):
            self.refuse(reason)
        try:  # what cannot be vectorised: one example after the other
            results = [one(*(tensor[b] for tensor in tensors)) for b in range(self.batch)]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            self.refuse(_first_line(error))
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        if isinstance(results[0], (tuple, list)) and all(isinstance(part, Tensor) for part in results[0]):
            return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        self.refuse(reason)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
