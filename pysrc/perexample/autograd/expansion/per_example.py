"""The tensor that stands for a parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ...moments.layout import PassInput
from ...moments.uses import Call
from ..reduce import expand

__all__ = ["Origin", "PerExample", "appearance", "axis_of", "batched", "plain", "refuse"]


class Origin(NamedTuple):
    """Where copies come from: the parameter's full name, and the forward pass."""

    name: str
    batch_dim: int
    input: PassInput | None = None
    bare: bool = False  # whether a layer has seen them as long as the batch, perhaps by coincidence
    grown: bool = False  # likewise where they had grown so long (``p.expand(n, ...)``), most likely to the batch


def appearance(p: Tensor, leaf: Tensor, call: Call | None, batch: int, origin: Origin) -> Tensor:
    """What stands for parameter `p` in a forward pass of `batch` examples: a `PerExample`, or plain for one example."""
    # Of one example (or none) the gradient is the example's own, whatever is computed.
    copies = expand(p, leaf, call, batch, batch <= 1)
    return copies if batch <= 1 else PerExample(copies, origin)


class PerExample(torch.Tensor):
    """A tensor without batch of which each example has a copy of its own. See the module."""

    batch: int
    origin: Origin
    _copies: Tensor | None
    _make: Callable[[], Tensor] | None
    _rows: Tensor | None

    @staticmethod
    def __new__(
        cls,
        copies: Tensor | None,
        origin: Origin,
        rows: Tensor | None = None,
        make: Callable[[], Tensor] | None = None,
    ) -> PerExample:
        """Of `copies` (B, *shape), or of its `rows` (row b of copy b) where the copies are made only when needed."""
        value = rows.detach() if copies is None and rows is not None else copies.detach()[0]  # type: ignore[union-attr]
        self = value.as_subclass(cls)
        self._copies, self._make, self._rows = copies, make, rows
        self.origin = origin
        if copies is not None:
            self.batch = copies.shape[0]
        elif rows is not None:
            self.batch = rows.shape[axis_of(rows, origin.batch_dim)]
        tracked = copies if rows is None else rows
        if tracked is not None and tracked.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.requires_grad_(True)
                self.register_hook(self._refuse_gradient)
        return self

    @classmethod
    def unknown(cls, value: Tensor, source: PerExample, make: Callable[[], Tensor]) -> PerExample:
        """`value`, made of `source` by what cannot tell its rows: whoever needs its copies calls `make`."""
        with torch._C.DisableTorchFunctionSubclass():
            self = cls(value.detach()[None], source.origin)
            self._copies, self._make, self.batch = None, make, source.batch
            if value.requires_grad:
                self.requires_grad_(True)
                self.register_hook(self._refuse_gradient)
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from .rules import call  # which needs this class

        return call(func, tuple(args), kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return plain(self).clone()

    @property
    def batch_dim(self) -> int:
        """Which dimension of the layers' inputs is the batch in this model."""
        return self.origin.batch_dim

    @property
    def axis(self) -> int:
        """The dimension that is the batch, where it has one."""
        with torch._C.DisableTorchFunctionSubclass():
            return axis_of(self, self.batch_dim)

    @property
    def copies(self) -> Tensor:
        """(B, *shape)."""
        if self._copies is None:
            assert self._make is not None
            self._copies, self._make = self._make(), None
        return self._copies

    def settle(self) -> Tensor:
        """The rows, which are the batch's from now on: they are about to be changed in place."""
        assert self._rows is not None

        def make() -> NoReturn:
            refuse(self, "another place than the batch's", "it was changed in place")

        self._copies, self._make = None, make
        return self._rows

    def rows(self, axis: int) -> Tensor:
        """Row b of copy b, where dimension `axis` is as long as the batch: a plain tensor with that batch."""
        if self._rows is not None and axis == axis_of(self._rows, self.batch_dim):
            return self._rows
        with torch._C.DisableTorchFunctionSubclass():
            return self.copies.diagonal(0, 0, axis + 1).movedim(-1, axis)

    def _refuse_gradient(self, grad: Tensor) -> NoReturn:
        refuse(self, "an autograd Function or another operation that torch functions do not see")


def plain(value: Any) -> Any:
    """A `PerExample` as its values, without gradient; anything else as it is."""
    if not isinstance(value, PerExample):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor).detach()


def batched(value: Tensor) -> Tensor:
    """A `PerExample` that has a batch dimension as the plain tensor that it is to a layer; anything else as it is."""
    if not isinstance(value, PerExample):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        axis = axis_of(value, value.batch_dim)
        if value.dim() == 0 or value.shape[axis] != value.batch:
            refuse(value, "the place of a batch", f"shape {tuple(value.shape)} in a batch of {value.batch} examples")
        return value.rows(axis)


def axis_of(tensor: Tensor, batch_dim: int) -> int:
    """The batch dimension of `tensor`: in sequence-first models, that of (B, D) is 0 and that of (T, B, D) 1."""
    features = 1 if tensor.is_floating_point() or tensor.is_complex() else 0
    return batch_dim if tensor.dim() > batch_dim + features else 0


def refuse(culprit: PerExample, what: str, why: str = "") -> NoReturn:
    """Raise ValueError: `culprit` cannot be given to each example in `what`, because of `why`."""
    because = f" ({why})" if why else ""
    raise ValueError(
        f"{culprit.origin.name}: no way is known to give each example its own copy of it in {what}{because}; "
        f"compute this in a module with a kernel or a recipe (px.register), freeze the parameter "
        f"(requires_grad_(False)), or run this part under px.no_moments()"
    )
