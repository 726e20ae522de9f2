"""What becomes of copies that meet the batch: each example's row its own copy."""

from __future__ import annotations

import string
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from . import names
from .mapping import Mapping
from .per_example import PerExample, axis_of


class Meeting(Mapping):
    """One torch function that has met copies and the batch."""

    def carries(self, tensor: Tensor) -> bool:
        """Whether `tensor` has as many rows as the batch."""
        return tensor.dim() > 0 and tensor.shape[axis_of(tensor, self.batch_dim)] == self.batch

    def elementwise(self, carriers: list[Tensor]) -> Tensor:
        flat, _ = tree_flatten((self.args, self.kwargs))
        dims = max(value.dim() for value in flat if isinstance(value, Tensor))
        deciding = [carrier for carrier in carriers if carrier.requires_grad]
        if any(carrier.dim() < dims for carrier in deciding):
            self.refuse("the batch dimension of the other operand does not come first")
        aligned = deciding or [carrier for carrier in carriers if carrier.dim() == dims]
        if not aligned:
            return self.mapped()
        axis = axis_of(aligned[0], self.batch_dim)
        fits = [value for value in flat if isinstance(value, PerExample)]
        if not deciding and any(v.dim() == dims and v.shape[axis] not in (1, self.batch) for v in fits):
            return self.mapped()
        args, kwargs = self.replaced({id(value): self.align(value, dims, axis) for value in fits})
        if not deciding and names.in_place(self.func):
            self.refuse("in place into a tensor without gradient, which may be no batch")
        result = self.func(*args, **kwargs)
        if result.dim() != dims or result.shape[axis] != self.batch:
            self.refuse(f"gave shape {tuple(result.shape)} in a batch of {self.batch} examples")
        return self.finish(result, bool(deciding))

    def finish(self, result: Tensor, decided: bool) -> Tensor:
        """`result`, whose rows are the batch; or if only its shape says so, a `PerExample` that has such rows."""
        if decided:
            return result
        return PerExample(None, self.origin, rows=result, make=self.map_later())

    def layer(self, carriers: list[Tensor]) -> Any:
        name = self.name
        if self.batch_dim and name not in names.SEQUENCE_FIRST:
            self.refuse("in a model whose batch is not dimension 0")
        carrying: dict[int, Tensor] = {}
        for position in names.LAYERS[name]:
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
        axis = axis_of(carrier, self.batch_dim)
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
                axis = axis_of(value, self.batch_dim)
                if id(value) in carrying and any(c.dim() == value.dim() for c in plain_carriers):
                    rows = value.rows(axis)
                else:
                    where.append(i)
                    tensors.append(value.copies)
            elif isinstance(value, Tensor) and id(value) in carrying:
                axis = axis_of(value, self.batch_dim)
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
        if not isinstance(equation, str) or "->" not in equation or self.batch_dim:
            self.refuse("only an equation with -> is understood")
        left, result = _without_ellipsis(equation.replace(" ", ""), [operand.dim() for operand in operands])
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


def _without_ellipsis(equation: str, dims: list[int]) -> tuple[str, str]:
    """The two sides of an einsum's equation, the dimensions that ... stands for named by letters of their own."""
    left, result = equation.split("->")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    parts, most = left.split(","), 0
    for i, (part, count) in enumerate(zip(parts, dims, strict=True)):
        if "..." in part:
            own = count - len(part) + 3
            most = max(most, own)
            parts[i] = part.replace("...", "".join(free[:own][::-1]))
    return ",".join(parts), result.replace("...", "".join(free[:most][::-1]))
