"""One torch function that has met a `PerExample`: which rule applies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...moments.layout import ambiguous, moved_from
from . import names
from .meeting import Meeting
from .per_example import PerExample, axis_of, plain

__all__ = ["call"]


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives where a `PerExample` is among its arguments."""
    name = names.name_of(func)
    with torch._C.DisableTorchFunctionSubclass():
        if name in names.NATIVE or (
            name.startswith(".") and name != ".data" and name[1:] not in names.ATTRIBUTES_MAPPED
        ):
            return func(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        if name in names.CONSTANT or name in (".data", "requires_grad") or not torch.is_grad_enabled():
            args, kwargs = tree_unflatten([plain(value) for value in flat], spec)
            return func(*args, **kwargs)
        first = next(value for value in flat if isinstance(value, PerExample))
        if (names.in_place(func) or name == "setitem") and _from_layer(args[0]):
            return _change(func, name, args, kwargs)
        return Rule(func, name, args, kwargs, first).apply()


def _from_layer(value: Any) -> bool:
    """Whether `value` has rows that a layer has made."""
    return isinstance(value, PerExample) and value._rows is not None and (value.origin.grown or value.origin.bare)


def _change(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func`, which changes the rows of ``args[0]`` in place; these are the batch's for certain where one joins it."""
    changed = args[0]
    args = (changed.settle(), *args[1:])
    others = [value for value in tree_flatten((args[1:], kwargs))[0] if isinstance(value, Tensor)]
    left = next((value for value in others if isinstance(value, PerExample)), None)
    result = func(*args, **kwargs) if left is None else Rule(func, name, args, kwargs, left).apply()
    decided = any(value.requires_grad and not isinstance(value, PerExample) for value in others)
    return result if decided or result is not args[0] else changed


class Rule(Meeting):
    """Which of the ways a torch function that has met a `PerExample` goes."""

    def apply(self) -> Any:
        name = self.name
        self.args, self.kwargs = names.in_order(name, self.args, self.kwargs)
        if name == "setitem":
            return self.set_item()
        if names.in_place(self.func) and isinstance(self.args[0], PerExample):
            self.refuse("in place")
        if name.startswith("as_strided"):
            self.refuse("which reads memory by its strides; the copies share theirs")
        if name == "register_hook":
            self.refuse("which would have to see the gradients of all examples together")
        if name == "masked_fill" and not names.in_place(self.func) and isinstance(self.args[2], PerExample):
            x, mask, value = self.args  # a scalar, of which each example has one
            return call(torch.where, (mask, value, x), {})
        if name in ("to", "type_as", "view_as", "reshape_as", "expand_as"):
            self.resolve_like()
            name = self.name
            if not isinstance(self.args[0], PerExample):
                return self.func(*self.args, **self.kwargs)
        if name == "embedding":
            self.resolve_embedding()
        if name in ("mm", "bmm"):
            self.func, self.name = torch.matmul, "matmul"
            name = self.name
        if name in ("addmm", "baddbmm") and not names.in_place(self.func) and self.kwargs.keys() <= {"beta", "alpha"}:
            return self.add_product(*self.args, **self.kwargs)
        flat, _ = tree_flatten((self.args, self.kwargs))
        if any(value.batch != self.batch for value in flat if isinstance(value, PerExample)):
            self.refuse("of another forward pass")
        others = [t for t in flat if isinstance(t, Tensor) and not isinstance(t, PerExample)]
        carriers = [t for t in others if self.carries(t)]
        for carrier in carriers:
            self.refuse_moved(carrier)
        for other in others:
            if isinstance(other, torch.nn.Parameter) and other.requires_grad:
                self.refuse("with a parameter read from another layer")
            if other.requires_grad and not any(other is carrier for carrier in carriers):
                self.refuse(f"with a tensor of shape {tuple(other.shape)}, where the batch has {self.batch} examples")
        if not carriers:
            return self.alone(flat)
        if name in names.ELEMENTWISE:
            return self.elementwise(carriers)
        if name in names.LAYERS:
            return self.layer(carriers)
        if name == "einsum":
            return self.einsum(carriers)
        if name == "getitem" and isinstance(self.args[1], Tensor) and self.args[1].dtype != torch.bool:
            return self.rowwise({id(carriers[0])})
        if any(carrier.requires_grad for carrier in carriers):
            self.refuse()
        return self.mapped()  # constants, of as many rows as the batch has by coincidence

    def refuse_moved(self, carrier: Tensor) -> None:
        """Raise where it is known that another dimension than the batch stands in the place of the batch."""
        axis = axis_of(carrier, self.batch_dim)
        origin = self.first.origin
        watched = False
        if origin.input is not None:
            watched = origin.input.watched is not None
            origin.input.met[origin.name] = origin.input.met.get(origin.name, 0) + 1
        if watched or ambiguous(carrier.shape, axis, self.batch):
            moved = moved_from(carrier, axis, self.batch, origin.input, origin.name, fallback=True)
            if moved:
                self.refuse(
                    f"with a tensor of shape {tuple(carrier.shape)} whose dimension {axis} is as long as the batch but "
                    f"not the batch: {moved}; keep the batch first"
                )

    def resolve_like(self) -> None:
        """``p.to(x)`` and the like use x for its dtype, device or shape alone."""
        first, *rest = self.args
        other = rest[0] if rest else self.kwargs.pop("other", None)
        if not isinstance(other, Tensor):
            return
        if self.name in ("view_as", "reshape_as"):
            self.func, self.name, self.args = Tensor.reshape, "reshape", (first, tuple(other.shape))
        elif self.name == "expand_as":
            self.func, self.name, self.args = Tensor.expand, "expand", (first, tuple(other.shape))
        else:
            self.func, self.name, self.args = Tensor.to, "to", (first, other.device, other.dtype)

    def resolve_embedding(self) -> None:
        """Vectorised over copies of the weight, PyTorch's look-up forgets the padding: done apart here."""
        by_torch = self.func is torch.embedding
        first = ("weight", "indices", "padding_idx") if by_torch else ("input", "weight", "padding_idx", "max_norm", "")
        given = dict(zip((*first, "scale_grad_by_freq", "sparse"), self.args, strict=False)) | self.kwargs
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if given.get(option):
                self.refuse(f"with {option}")
        padding, rows = given.get("padding_idx"), given["weight"].shape[0]
        if padding is not None and padding < 0:
            padding = None if by_torch else padding + rows
        self.func, self.args, self.kwargs = look_up, (given["indices" if by_torch else "input"], given["weight"]), {}
        if padding is not None:
            self.kwargs = {"padding": padding}

    def add_product(self, summand: Any, first: Any, second: Any, beta: float = 1, alpha: float = 1) -> Any:
        """``beta summand + alpha (first @ second)``, one after the other."""
        terms = []
        for value, factor in ((summand, beta), (_again(torch.matmul, first, second), alpha)):
            terms.append(value if factor == 1 else _again(torch.mul, value, factor))
        return _again(torch.add, *terms)

    def set_item(self) -> None:
        """``x[:, i] = p``, and ``x[mask] = p`` with a mask (B, ...)."""
        target, index, value = self.args
        if isinstance(target, PerExample) or not isinstance(value, PerExample) or self.batch_dim:
            self.refuse("in place")
        if target.dim() == 0 or target.shape[0] != self.batch:
            self.refuse(f"into a tensor of shape {tuple(target.shape)}, where the batch has {self.batch} examples")
        if not target.requires_grad:
            self.refuse("into a tensor without gradient, which may be no batch")
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) == 1 and isinstance(parts[0], Tensor) and parts[0].dtype == torch.bool:
            mask = parts[0]
            rest = target.dim() - mask.dim()
            if mask.dim() == 0 or mask.shape[0] != self.batch or value.dim() > rest:
                self.refuse("with this index")
            copies = value.copies[mask.nonzero()[:, 0]]
            target[mask] = copies.reshape(copies.shape[0], *(1,) * (rest - value.dim()), *value.shape)
            return
        if not (isinstance(parts[0], slice) and parts[0] == slice(None)) or any(isinstance(p, Tensor) for p in parts):
            self.refuse("with an index that does not keep the batch dimension first")
        target[index] = self.align(value, target[index].dim(), 0)


def look_up(indices: Tensor, weight: Tensor, padding: int | None = None) -> Tensor:
    """The rows `indices` of `weight`; that of `padding` without gradient."""
    rows = F.embedding(indices, weight)
    return rows if padding is None else torch.where((indices == padding).unsqueeze(-1), rows.detach(), rows)


def _again(func: Callable[..., Any], *args: Any) -> Any:
    return call(func, args, {}) if any(isinstance(value, PerExample) for value in args) else func(*args)
