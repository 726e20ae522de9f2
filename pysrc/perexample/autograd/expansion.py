"""One copy of a parameter per example (MATHS 8), and what a model may do with it.

`PerExample` stands for a parameter while the module that owns it computes. It has the parameter's shape and values, and
carries ``copies`` (B, *shape), an expanded view with one copy per example, whose gradient arrives as (B, *shape). Every
torch function that it meets is replaced by the one that gives each example its own copy:

- of copies alone (and constants): the function is mapped over them, and the result is a `PerExample` again;
- with tensors that carry the batch and a gradient: elementwise, the copies are aligned with the batch dimension; for
  a layer's function it is mapped over the examples, each a batch of one. The result is a plain tensor. A `PerExample`
  that has grown a batch dimension itself (``cls.expand(B, -1, -1)``) gives row b of example b's copy.

Both are exact by construction, because each function in the tables below treats the rows of its batch apart. Any
other function is refused by name. A tensor without gradient may be the batch or a constant that happens to have as
many rows; so the result stays a `PerExample` until it meets a gradient or a layer, and only then its rows are taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..moments.uses import Call
from .reduce import expand

__all__ = ["PerExample", "appearance", "batched", "plain"]


def appearance(p: Tensor, leaf: Tensor, call: Call | None, batch: int, batch_dim: int, name: str) -> Tensor:
    """What stands for parameter `p` in a forward pass of `batch` examples: a `PerExample`, or plain for one example."""
    # Of one example (or none) the gradient is the example's own, whatever is computed.
    copies = expand(p, leaf, call, batch, batch <= 1)
    return copies if batch <= 1 else PerExample(copies, batch_dim, name)


class PerExample(torch.Tensor):
    """A tensor without batch of which each example has a copy of its own. See the module."""

    batch: int
    batch_dim: int
    owner: str
    _copies: Tensor | None
    _make: Callable[[], Tensor] | None
    _rows: Tensor | None

    @staticmethod
    def __new__(
        cls,
        copies: Tensor | None,
        batch_dim: int,
        owner: str,
        rows: Tensor | None = None,
        make: Callable[[], Tensor] | None = None,
    ) -> PerExample:
        """Of `copies` (B, *shape), or of its `rows` (row b of copy b) where the copies are made only when needed."""
        value = rows.detach() if copies is None and rows is not None else copies.detach()[0]  # type: ignore[union-attr]
        self = value.as_subclass(cls)
        self._copies, self._make, self._rows = copies, make, rows
        self.batch_dim, self.owner = batch_dim, owner
        if copies is not None:
            self.batch = copies.shape[0]
        elif rows is not None:
            self.batch = rows.shape[_axis(rows, batch_dim)]
        tracked = copies if rows is None else rows
        if tracked is not None and tracked.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.requires_grad_(True)
                self.register_hook(self._refuse_gradient)
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _call(func, tuple(args), kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return plain(self).clone()

    @property
    def axis(self) -> int:
        """The dimension that is the batch, where it has one."""
        with torch._C.DisableTorchFunctionSubclass():
            return _axis(self, self.batch_dim)

    @property
    def copies(self) -> Tensor:
        """(B, *shape)."""
        if self._copies is None:
            assert self._make is not None
            self._copies, self._make = self._make(), None
        return self._copies

    def rows(self, axis: int) -> Tensor:
        """Row b of copy b, where dimension `axis` is as long as the batch: a plain tensor with that batch."""
        if self._rows is not None and axis == _axis(self._rows, self.batch_dim):
            return self._rows
        with torch._C.DisableTorchFunctionSubclass():
            return self.copies.diagonal(0, 0, axis + 1).movedim(-1, axis)

    def _refuse_gradient(self, grad: Tensor) -> NoReturn:
        _refuse(self, "an autograd Function or another operation that torch functions do not see")


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
        axis = _axis(value, value.batch_dim)
        if value.dim() == 0 or value.shape[axis] != value.batch:
            _refuse(value, "the place of a batch", f"shape {tuple(value.shape)} in a batch of {value.batch} examples")
        return value.rows(axis)


def _refuse(culprit: PerExample, what: str, why: str = "") -> NoReturn:
    raise ValueError(
        f"{culprit.owner}: no way is known to give each example its own copy of it in {what}{why and f' ({why})'}; "
        f"compute this in a module with a kernel or a recipe (px.register), freeze the parameter "
        f"(requires_grad_(False)), or run this part under px.no_moments()"
    )


# Names of torch functions and methods; underscores around them, and the r and i of operators, are taken off before.

# Answered by shape and values: they have no gradient.
_CONSTANT = frozenset(
    "size dim ndimension numel nelement is_floating_point is_complex is_signed element_size itemsize stride "
    "is_contiguous get_device storage_offset data_ptr item tolist numpy __len__ __hash__ __repr__ __str__ __format__ "
    "__bool__ __int__ __float__ __index__ __contains__ "
    "eq ne lt le gt ge isnan isinf isfinite isclose allclose equal argmax argmin argsort sign detach is_same_size "
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor "
    "result_type can_cast is_tensor is_nonzero any all count_nonzero nonzero untyped_storage storage "
    "is_pinned is_shared is_inference broadcast_shapes is_storage register_hook".split()
)
_ATTRIBUTES_MAPPED = frozenset(("T", "mT", "H", "mH", "real", "imag"))

_ELEMENTWISE = frozenset(
    "add sub subtract mul multiply div divide truediv true_divide pow maximum minimum fmax fmin where lerp addcmul "
    "addcdiv atan2 hypot logaddexp logaddexp2 xlogy clamp clip clamp_min clamp_max copysign ldexp "
    "floor_divide floordiv remainder fmod mod masked_fill".split()
)

# Functions that treat the rows of their batch apart; which arguments carry it, by position or name.
_LAYERS: dict[str, tuple[int | str, ...]] = {
    "linear": (0, "input"),
    "bilinear": (0, 1, "input1", "input2"),
    "conv1d": (0, "input"),
    "conv2d": (0, "input"),
    "conv3d": (0, "input"),
    "conv_transpose1d": (0, "input"),
    "conv_transpose2d": (0, "input"),
    "conv_transpose3d": (0, "input"),
    "layer_norm": (0, "input"),
    "rms_norm": (0, "input"),
    "group_norm": (0, "input"),
    "batch_norm": (0, "input"),
    "instance_norm": (0, "input"),
    "prelu": (0, "input"),
    "embedding": (0, "input"),
    "matmul": (0, 1, "input", "other"),
    "scaled_dot_product_attention": (0, 1, 2, 3, "query", "key", "value", "attn_mask"),
    "lstm_cell": (0, 1),
    "gru_cell": (0, 1),
    "rnn_tanh_cell": (0, 1),
    "rnn_relu_cell": (0, 1),
    "cosine_similarity": (0, 1, "x1", "x2"),
    "cat": (0, "tensors"),
    "concat": (0, "tensors"),
    "concatenate": (0, "tensors"),
    "stack": (0, "tensors"),
}
_SEQUENCE_FIRST = frozenset(("linear", "layer_norm", "rms_norm", "embedding", "cat", "concat", "concatenate"))
_RANDOM = ("dropout", "rand", "bernoulli", "normal", "multinomial", "gumbel", "rrelu")


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # an attribute
        return f".{func.__self__.__name__}"  # type: ignore[attr-defined]
    if name in _CONSTANT:
        return name
    bare = name.strip("_")
    if name.startswith("__") and bare[:1] in ("r", "i") and bare[1:] in _ELEMENTWISE | {"matmul"}:
        return bare[1:]
    return bare


def _in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.strip("_")[:1] == "i" and name.strip("_")[1:] in _ELEMENTWISE
    return name.endswith("_")


_KEEPS_ROWS = frozenset(  # of functions of one tensor: those that work on elements, or on what a row contains
    "to float double half bfloat16 type type_as contiguous clone neg negative exp log sqrt rsqrt square abs sin cos "
    "tanh sigmoid relu gelu silu elu selu mish softplus leaky_relu reciprocal erf".split()
)
_RESHAPES = frozenset("view reshape flatten unflatten".split())
_NATIVE = frozenset("__len__ __hash__ register_hook size stride dim ndimension numel nelement".split())


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = _name(func)
    with torch._C.DisableTorchFunctionSubclass():
        if name in _NATIVE or (name.startswith(".") and name != ".data" and name[1:] not in _ATTRIBUTES_MAPPED):
            return func(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        if name in _CONSTANT or name in (".data", "requires_grad") or not torch.is_grad_enabled():
            args, kwargs = tree_unflatten([plain(value) for value in flat], spec)
            return func(*args, **kwargs)
        first = next(value for value in flat if isinstance(value, PerExample))
        return _Rule(func, name, args, kwargs, first).apply()


def _axis(tensor: Tensor, batch_dim: int) -> int:
    """The batch dimension of `tensor`: in sequence-first models, that of (B, D) is 0 and that of (T, B, D) 1."""
    features = 1 if tensor.is_floating_point() or tensor.is_complex() else 0
    return batch_dim if tensor.dim() > batch_dim + features else 0


class _Rule:
    """One torch function that has met a `PerExample`."""

    def __init__(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], first: PerExample
    ) -> None:
        self.func, self.name, self.args, self.kwargs, self.first = func, name, args, kwargs, first
        self.batch, self.batch_dim = first.batch, first.batch_dim

    def refuse(self, why: str = "") -> NoReturn:
        _refuse(self.first, f"'{self.name}'", why)

    def apply(self) -> Any:
        name = self.name
        if name == "setitem":
            return self.set_item()
        if _in_place(self.func) and isinstance(self.args[0], PerExample):
            self.refuse("in place")
        if name in ("to", "type_as", "view_as", "reshape_as", "expand_as"):
            self.resolve_like()
            name = self.name
            if not isinstance(self.args[0], PerExample):
                return self.func(*self.args, **self.kwargs)
        flat, _ = tree_flatten((self.args, self.kwargs))
        if any(value.batch != self.batch for value in flat if isinstance(value, PerExample)):
            self.refuse("of another forward pass")
        others = [t for t in flat if isinstance(t, Tensor) and not isinstance(t, PerExample)]
        carriers = [t for t in others if self.carries(t)]
        for other in others:
            if isinstance(other, torch.nn.Parameter) and other.requires_grad:
                self.refuse("with a parameter read from another layer")
            if other.requires_grad and not any(other is carrier for carrier in carriers):
                self.refuse(f"with a tensor of shape {tuple(other.shape)}, where the batch has {self.batch} examples")
        if not carriers:
            return self.alone(flat)
        if name in _ELEMENTWISE:
            return self.elementwise(carriers)
        if name in _LAYERS:
            return self.layer(carriers)
        if name == "einsum":
            return self.einsum(carriers)
        if name == "getitem" and isinstance(self.args[1], Tensor) and self.args[1].dtype != torch.bool:
            return self.rowwise({id(carriers[0])})
        if any(carrier.requires_grad for carrier in carriers):
            self.refuse()
        return self.mapped()  # constants, of as many rows as the batch has by coincidence

    def carries(self, tensor: Tensor) -> bool:
        """Whether `tensor` has as many rows as the batch."""
        return tensor.dim() > 0 and tensor.shape[_axis(tensor, self.batch_dim)] == self.batch

    # Copies alone.

    def alone(self, flat: list[Any]) -> Any:
        """The function of each copy; where it keeps the rows apart, of the rows, and of the copies only if needed."""
        first = self.first
        rows = first._rows
        if self.name in ("expand", "broadcast_to", "repeat", "tile"):
            grown = self.grown()
            if grown is not None:
                return PerExample(None, self.batch_dim, first.owner, rows=grown, make=self.map_later())
        elif rows is not None and sum(isinstance(value, PerExample) for value in flat) == 1:
            args, kwargs = self.replaced({id(first): rows})
            if self.name in _KEEPS_ROWS or (self.name in _ELEMENTWISE and self.narrow(flat, rows)):
                result = self.func(*args, **kwargs)
                return PerExample(None, self.batch_dim, first.owner, rows=result, make=self.map_later())
            if self.name in _RESHAPES and not self.batch_dim:
                result = self.func(*args, **kwargs)
                if result.dim() and result.shape[0] == self.batch:
                    return PerExample(None, self.batch_dim, first.owner, rows=result, make=self.map_later())
        return self.mapped()

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
        flat, spec = tree_flatten((self.args, self.kwargs))
        where = [i for i, value in enumerate(flat) if isinstance(value, PerExample)]
        one = self.with_parts(where, flat, spec)
        copies = self.over_examples(one, [flat[i].copies for i in where])
        return tree_map_only(Tensor, lambda part: PerExample(part, self.batch_dim, self.first.owner), copies)

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
        if any(word in self.name for word in _RANDOM):
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

    # Copies and the batch.

    def align(self, value: PerExample, dims: int, axis: int) -> Tensor:
        """The copies as a tensor of `dims` dimensions, of which `axis` is the batch."""
        shape = (1,) * (dims - value.dim()) + tuple(value.shape)
        if shape[axis] == self.batch and value.dim() == dims:
            return value.rows(axis)
        if shape[axis] != 1:
            self.refuse(f"its shape {tuple(value.shape)} does not fit a batch of {self.batch} examples")
        return value.copies.reshape(self.batch, *shape).movedim(0, axis).squeeze(axis + 1)

    def elementwise(self, carriers: list[Tensor]) -> Tensor:
        flat, _ = tree_flatten((self.args, self.kwargs))
        dims = max(value.dim() for value in flat if isinstance(value, Tensor))
        deciding = [carrier for carrier in carriers if carrier.requires_grad]
        if any(carrier.dim() < dims for carrier in deciding):
            self.refuse("the batch dimension of the other operand does not come first")
        aligned = deciding or [carrier for carrier in carriers if carrier.dim() == dims]
        if not aligned:
            return self.mapped()
        axis = _axis(aligned[0], self.batch_dim)
        fits = [value for value in flat if isinstance(value, PerExample)]
        if not deciding and any(v.dim() == dims and v.shape[axis] not in (1, self.batch) for v in fits):
            return self.mapped()
        args, kwargs = self.replaced({id(value): self.align(value, dims, axis) for value in fits})
        if not deciding and _in_place(self.func):
            self.refuse("in place into a tensor without gradient, which may be no batch")
        result = self.func(*args, **kwargs)
        if result.dim() != dims or result.shape[axis] != self.batch:
            self.refuse(f"gave shape {tuple(result.shape)} in a batch of {self.batch} examples")
        return self.finish(result, bool(deciding))

    def finish(self, result: Tensor, decided: bool) -> Tensor:
        """`result`, whose rows are the batch; or if only its shape says so, a `PerExample` that has such rows."""
        if decided:
            return result
        return PerExample(None, self.batch_dim, self.first.owner, rows=result, make=self.map_later())

    def layer(self, carriers: list[Tensor]) -> Any:
        name = self.name
        if self.batch_dim and name not in _SEQUENCE_FIRST:
            self.refuse("in a model whose batch is not dimension 0")
        carrying: dict[int, Tensor] = {}
        for position in _LAYERS[name]:
            value: Any = None
            if isinstance(position, str):
                value = self.kwargs.get(position)
            elif position < len(self.args):
                value = self.args[position]
            carrying.update({id(t): t for t in tree_flatten(value)[0] if isinstance(t, Tensor) and self.carries(t)})
        for carrier in carriers:
            if carrier.requires_grad and id(carrier) not in carrying:
                self.refuse("the batch stands where no example's data belongs")
        if name in ("cat", "concat", "concatenate", "stack"):
            self.check_joined(carriers[0])
        if name in ("matmul", "scaled_dot_product_attention"):
            self.check_products(carrying)
        if name == "batch_norm" and (self.kwargs.get("training") or (len(self.args) > 5 and self.args[5])):
            self.refuse("batch statistics mix the examples")
        if not any(id(carrier) in carrying for carrier in carriers):
            return self.mapped()
        return self.rowwise(set(carrying))

    def check_joined(self, carrier: Tensor) -> None:
        tensors = self.args[0] if self.args else self.kwargs["tensors"]
        dim = self.args[1] if len(self.args) > 1 else self.kwargs.get("dim", self.kwargs.get("axis", 0))
        axis = _axis(carrier, self.batch_dim)
        dim = dim % (tensors[0].dim() + (self.name == "stack"))
        if dim == axis or (self.name == "stack" and dim < axis):
            self.refuse("along the batch dimension")

    def check_products(self, carrying: dict[int, Tensor]) -> None:
        """The batch must not be a dimension that the product sums over; only of three dimensions on one is not."""
        most = max(t.dim() for t in self.args[:3] if isinstance(t, Tensor))
        for i, value in enumerate(self.args):
            if id(value) not in carrying or value.dim() == most >= 3:
                continue
            if self.name == "matmul" and i == 0 and value.dim() == 2 and not isinstance(value, PerExample):
                continue
            if value.requires_grad and not isinstance(value, PerExample):
                self.refuse("the product may sum over the batch")
            del carrying[id(value)]

    def rowwise(self, carrying: set[int]) -> Any:
        """The function of each example, a batch of one, and its copy. `carrying`: ids of arguments with the batch."""
        flat, spec = tree_flatten((self.args, self.kwargs))
        plain_carriers = [t for t in flat if id(t) in carrying and not isinstance(t, PerExample)]
        decided = any(carrier.requires_grad for carrier in plain_carriers)
        where, tensors, axes = [], [], []
        for i, value in enumerate(flat):
            rows = None
            if isinstance(value, PerExample):
                axis = _axis(value, self.batch_dim)
                if id(value) in carrying and any(c.dim() == value.dim() for c in plain_carriers):
                    rows = value.rows(axis)
                else:
                    where.append(i)
                    tensors.append(value.copies)
            elif isinstance(value, Tensor) and id(value) in carrying:
                axis = _axis(value, self.batch_dim)
                rows = value
            if rows is not None:
                where.append(i)
                axes.append(axis)
                tensors.append(rows.movedim(axis, 0).unsqueeze(axis + 1))
        out = max(axes)

        def merge(result: Tensor) -> Tensor:
            axis = out if result.dim() > out + 1 else 0
            if result.dim() < axis + 2 or result.shape[axis + 1] != 1:
                self.refuse(f"an example alone gave shape {tuple(result.shape[1:])}, which has no batch of one")
            return self.finish(result.movedim(0, axis).squeeze(axis + 1), decided)

        results = self.over_examples(self.with_parts(where, flat, spec), tensors)
        if not decided and not isinstance(results, Tensor):
            return self.mapped()
        return tree_map_only(Tensor, merge, results)

    def einsum(self, carriers: list[Tensor]) -> Any:
        """Where one letter is the first of every operand with a batch and of the result, and of no copy."""
        equation, *rest = self.args
        operands = tree_flatten(rest)[0]
        if not any(carrier.requires_grad for carrier in carriers):
            return self.mapped()
        if not isinstance(equation, str) or "->" not in equation or "." in equation or self.batch_dim:
            self.refuse("only an equation with -> and without ... is understood")
        left, result = equation.replace(" ", "").split("->")
        letter, carrying = result[:1], set()
        for letters, operand in zip(left.split(","), operands, strict=True):
            if isinstance(operand, PerExample) or letters[:1] != letter:
                if letter in letters or (operand.requires_grad and not isinstance(operand, PerExample)):
                    self.refuse(f"'{equation}'")
            elif letter in letters[1:] or not any(operand is carrier for carrier in carriers):
                self.refuse(f"'{equation}'")
            else:
                carrying.add(id(operand))
        return self.rowwise(carrying)

    # Single functions.

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


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
