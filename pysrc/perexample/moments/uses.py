"""Weights that are used more than once in one forward pass: their uses are added per example BEFORE squaring.

In a forward pass of a converted model, in eager mode, each parameter has one `Uses`. Where it turns out to have been
used once, nothing of this file runs in backward. Otherwise each use's backward hands in a *piece* of the second
moment in place of a second moment: what is needed to form its per-example gradient ``G_b``. The leaf's hook runs when
all uses that this backward pass reaches have done so, and contracts the pieces together::

    sum_b (sum_uses G_b)**2

A use that receives no gradient hands in nothing, as its ``G_b`` is zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._library import accumulate_dtype, chunk_rows

if TYPE_CHECKING:
    from .leaf import Moment

__all__ = ["Call", "Uses"]

_ops = torch.ops.perexample


@dataclass
class _Product:
    """A use of the rows from `begin` on as a matrix: ``G_b = dy_b.T @ x_b``. dy: (B, T, O), x: (B, T, I)."""

    dy: Tensor
    x: Tensor
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.dy.shape[2]

    def example(self, b: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        grad = self.dy[b].to(dtype).t().mm(self.x[b].to(dtype))
        return F.pad(grad, (0, 0, self.begin, shape[0] - self.end))


@dataclass
class _Contracted:
    """The only use as a matrix beside look-ups of rows: contracted at once, and ``G_b`` kept for those rows alone.

    So that the gradient of a tied head's output, the largest tensor of a language model, need not be kept.
    """

    sum_sq: Tensor
    rows: list[Tensor]  # for each look-up (B, T, D): G_b at the rows looked up


@dataclass
class _Rows:
    """A look-up of rows: ``G_b`` is the sum of dy over equal indices. dy: (B, T, D), indices: (B, T)."""

    dy: Tensor
    indices: Tensor
    number: int | None

    def example(self, b: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        grad = torch.zeros(tuple(shape), dtype=dtype, device=self.dy.device)
        return grad.index_add_(0, self.indices[b], self.dy[b].to(dtype))


@dataclass
class _Small:
    """A use of a parameter that is no larger than the activations of an example: all ``G_b``, (B, O).

    They stand at the places from `begin` on.
    """

    grads: Tensor
    begin: int

    def example(self, b: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        grad = torch.zeros(math.prod(shape), dtype=dtype, device=self.grads.device)
        grad[self.begin : self.begin + self.grads.shape[1]] = self.grads[b]
        return grad.view(tuple(shape))


@dataclass
class _Slices:
    """Any other use: `grad` is the gradient of what it is given slices of one example of `tensors` for."""

    grad: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]

    def example(self, b: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        one = [None if tensor is None else tensor[b : b + 1] for tensor in self.tensors]
        return self.grad(*one).reshape(tuple(shape)).to(dtype)


_Piece = _Product | _Contracted | _Rows | _Small | _Slices


class Uses:
    """The uses of one parameter in one forward pass."""

    __slots__ = (
        "batch",
        "count",
        "expanded",
        "indices",
        "moment",
        "others",
        "pieces",
        "products",
        "reusable",
    )

    def __init__(self, moment: Moment, batch: int, reusable: bool) -> None:
        self.moment = moment
        self.batch = batch
        self.reusable = reusable  # whether the use so far hands in pieces
        self.count = 0
        self.products = 0  # how many uses are matrix products, as in a linear layer
        self.others = 0  # and how many neither those nor look-ups
        self.indices: tuple[Tensor, ...] = ()  # of each look-up (B, T)
        self.expanded: Any = None  # what `expansion` made of the parameter in this pass
        # By the number of the backward pass. Made for the first piece: nearly every parameter is used once.
        self.pieces: dict[int, list[_Piece]] | None = None

    @property
    def shared(self) -> bool:
        return self.count > 1

    # In forward: of what kind a use is.

    def look_up(self, indices: Tensor) -> int:
        """Note a look-up of rows; returns its number. indices: (B, T)."""
        self.indices = (*self.indices, indices)
        return len(self.indices) - 1

    # In backward: a piece in place of a second moment. Each returns what stands for the leaf's gradient.

    def add_product(self, dy: Tensor, x: Tensor, sum_sq: Tensor, begin: int = 0) -> Tensor | None:
        """Of ``G_b = dy_b.T @ x_b``, whose own second moment is `sum_sq`. dy: (B, T, O), x: (B, T, I).

        With `begin`, O rows of the parameter from there on; its other rows are used by others of the same layer.
        """
        if self.products == 1 and not self.others:
            found = [_rows_of_product(dy, x, indices) for indices in self.indices]
            return self._add(_Contracted(sum_sq, found), sum_sq)
        return self._add(_Product(dy, x, begin), sum_sq)

    def add_rows(
        self, number: int | None, dy: Tensor, indices: Tensor, padding_idx: int, sum_sq: Tensor
    ) -> Tensor | None:
        """Of the look-up that `look_up` numbered, or None, of one that was noted as "other".

        dy: (B, T, D), indices: (B, T).
        """
        if padding_idx >= 0:
            dy = dy.masked_fill((indices == padding_idx)[..., None], 0)
        return self._add(_Rows(dy, indices, number), sum_sq)

    def add_small(self, grads: Tensor, sum_sq: Tensor, begin: int = 0) -> Tensor | None:
        """Of a parameter no larger than the activations. grads: (B, O)  all ``G_b``, at the places from `begin` on."""
        return self._add(_Small(grads, begin), sum_sq)

    def add_slices(
        self, grad: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], sum_sq: Tensor
    ) -> Tensor | None:
        """Of any use: `grad` maps slices ``tensor[b : b + 1]`` of `tensors` to ``G_b``."""
        return self._add(_Slices(grad, tensors), sum_sq)

    def _add(self, piece: _Piece, like: Tensor) -> Tensor | None:
        task = torch._C._current_graph_task_id()
        if self.pieces is None:
            self.pieces = {}
        pieces = self.pieces.get(task)
        if pieces is not None:
            pieces.append(piece)
            return None
        self.pieces[task] = [piece]
        self.moment.waiting.setdefault(task, []).append(self)
        self.moment.examples.unfinished.append(self)
        # Where this backward pass does not go to the leaf (torch.autograd.grad), the pieces go with it.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self.forget(task))
        return _zero(like.dtype, like.device).expand(like.shape)

    def forget(self, task: int) -> None:
        if self.pieces is not None:
            self.pieces.pop(task, None)
        self.moment.waiting.pop(task, None)

    def contract(self, task: int, like: Tensor) -> Tensor:
        """``sum_b (sum_uses G_b)**2`` of the pieces of backward pass `task`; shape and dtype of `like`."""
        assert self.pieces is not None  # made by the uses that wait for this
        pieces = self.pieces.pop(task)
        products = [piece for piece in pieces if isinstance(piece, _Product)]
        rows = [piece for piece in pieces if isinstance(piece, _Rows)]
        done = [piece for piece in pieces if isinstance(piece, _Contracted)]
        small = [piece for piece in pieces if isinstance(piece, _Small)]
        if len(small) == len(pieces):
            return self._contract_small(small, like)
        numbered = [piece for piece in rows if piece.number is not None]
        whole = all(piece.dy.shape[2] == like.shape[0] for piece in products)
        cross = bool(rows and (products or done)) and not (whole and len(numbered) == len(rows))
        if cross or len(products) + len(rows) + len(done) < len(pieces):
            return self._contract_examples(pieces, like)
        sum_sq = done[0].sum_sq if done else None
        if products:
            sum_sq = _contract_products(products, like)
        if not rows:
            assert sum_sq is not None
            return sum_sq
        dy, indices = _positions([piece.dy for piece in rows]), _positions([piece.indices for piece in rows])
        looked_up = _ops.embedding_moments(dy, indices, like.shape[0], -1, None)[1]
        if sum_sq is None:
            return looked_up
        if products:
            joined = _join(products)
            found = [_rows_of_product(*joined, self.indices[i]) for i in range(len(self.indices))]
        else:
            found = done[0].rows
        # (H + E)**2 = H**2 + E**2 + 2 H E, where H E lives only on the rows that the example looked up.
        both = _positions([found[piece.number] for piece in numbered if piece.number is not None]) * dy.to(like.dtype)
        cross_term = _ops.embedding_moments(both, indices, like.shape[0], -1, None)[0]
        return sum_sq.add(looked_up).add_(cross_term, alpha=2).clamp_(min=0)

    def _contract_small(self, pieces: list[_Small], like: Tensor) -> Tensor:
        total = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
        step = chunk_rows(self.batch, like.numel())
        for b in range(0, self.batch, step):
            grad = torch.zeros(min(step, self.batch - b), like.numel(), dtype=like.dtype, device=like.device)
            for piece in pieces:
                grad[:, piece.begin : piece.begin + piece.grads.shape[1]] += piece.grads[b : b + step]
            total += grad.square_().sum(0)
        return total.view(like.shape)

    def _contract_examples(self, pieces: list[_Piece], like: Tensor) -> Tensor:
        total = torch.zeros_like(like, memory_format=torch.contiguous_format)
        for b in range(self.batch):
            grad = torch.zeros_like(total)
            for piece in pieces:
                grad += piece.example(b, like.shape, like.dtype)  # type: ignore[union-attr]
            total += grad.square_()
        return total


def _join(products: list[_Product]) -> tuple[Tensor, Tensor]:
    """dy and x of products of the same rows, along the positions."""
    dy, x = _positions([piece.dy for piece in products]), _positions([piece.x for piece in products])
    wide = torch.promote_types(dy.dtype, x.dtype)  # under autocast uses may differ
    return dy.to(wide), x.to(wide)


def _contract_products(products: list[_Product], like: Tensor) -> Tensor:
    """Each part of the rows that the same products use by itself."""
    bounds = sorted({0, like.shape[0], *(p.begin for p in products), *(p.end for p in products)})
    parts = []
    for begin, end in itertools.pairwise(bounds):
        own = [
            _Product(p.dy[:, :, begin - p.begin : end - p.begin], p.x, begin)
            for p in products
            if p.begin <= begin and end <= p.end
        ]
        if own:
            parts.append(_ops.linear_moments(*_join(own), False, None)[1])
        else:
            parts.append(torch.zeros(end - begin, *like.shape[1:], dtype=like.dtype, device=like.device))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _positions(parts: list[Tensor]) -> Tensor:
    """(B, T_1, ...), (B, T_2, ...), ... -> (B, T_1 + T_2 + ..., ...)."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _rows_of_product(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` (B, S) of ``G_b = dy_b.T @ x_b``: (B, S, I)."""
    wide = accumulate_dtype(dy.dtype)
    chosen = dy.gather(2, indices.long()[:, None, :].expand(-1, dy.shape[1], -1))  # (B, T, S)
    return chosen.to(wide).transpose(1, 2).bmm(x.to(wide))


_zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    key = dtype, device
    if key not in _zeros:
        _zeros[key] = torch.zeros((), dtype=dtype, device=device)
    return _zeros[key]


def is_placeholder(grad: Tensor) -> bool:
    """Whether nothing but pieces stands behind the leaf's gradient `grad`."""
    zero = _zeros.get((grad.dtype, grad.device))
    return zero is not None and grad.data_ptr() == zero.data_ptr() and math.prod(grad.shape) > 0


class Call:
    """One call of a layer in a forward pass: the `Uses` of the parameters that it names, None for what is frozen.

    Goes to the layer's Function in the place of the leaf that counts uses.
    """

    __slots__ = ("begins", "uses")

    def __init__(self, uses: Sequence[Uses | None], begins: Sequence[int] | None = None) -> None:
        self.uses = tuple(uses)
        # The first of the rows that the Function sees of each parameter, where it is given a part of them.
        self.begins = (0,) * len(self.uses) if begins is None else tuple(begins)

    def take(self, which: Sequence[int | None], begins: Sequence[int] | None = None) -> Call:
        """The same call for a Function that takes these of its parameters, or the rows from `begins` on of them."""
        return Call([None if i is None else self.uses[i] for i in which], begins)

    def shared(self, which: int) -> Uses | None:
        """In backward: the `Uses` of parameter number `which` where it was used more than once."""
        uses = self.uses[which]
        if uses is None:
            return None
        uses.moment.eager = True
        return uses if uses.count > 1 else None
