"""Embedding and EmbeddingBag."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import autograd
from ..autograd.expansion import Origin, PerExample
from ..moments import MomentModule
from .fallback import follow_copies_in

__all__ = ["Embedding", "EmbeddingBag"]


class Embedding(MomentModule, nn.Embedding):
    """torch.nn.Embedding whose backward also computes ``p.sum_grad_squared`` (MATHS 6).

    Input: indices (B, ...). Of indices without a batch, ``[T]`` or ``[1, T]`` in a batch of another size (position
    ids), the output stands for one copy per example, as a parameter of the exact fallback does: a broadcast after the
    layer would add examples together before they can be squared. In compiled code they are expanded to the batch.

    Attributes:
        batched: None, to tell by the shape; True: dimension 0 is the batch; False: there is none, expand. Has to be
            set where one-dimensional indices are as many as the examples, or a multiple and not consecutive (inside
            torch.compile: any multiple), which could mean either. Indices (Q, K) that belong to no example (relative
            positions) need False too; the output then has no batch dimension until it is added to something that has.

    Raises:
        ValueError: for `max_norm`, `scale_grad_by_freq`, `sparse`, which have no per-example gradient here.
    """

    batched: bool | None = None
    _reusable = True
    _batch_at = "any"

    def __init__(self, *args: Any, batched: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batched = batched
        unsupported = unsupported_embedding(self)
        if unsupported:
            raise ValueError(f"Embedding: {unsupported}")

    def forward(self, input: Tensor) -> Tensor:
        if not self._recording("weight"):
            return super().forward(input)
        batch = self._batch_of(input)
        if batch is not None and self._bare(input, batch):
            return self._without_batch(input, batch)
        self._check_batch(input, 1)
        if not torch.is_grad_enabled():
            return super().forward(input)
        axis = self._axis(input, 1)
        if axis:
            return self._look_up(input.transpose(0, axis)).transpose(0, axis)
        return self._look_up(input)

    def _look_up(self, indices: Tensor) -> Tensor:
        return autograd.embedding(indices, self.weight, *self._leaves("weight"), self.padding_idx)

    def _batch_of(self, indices: Tensor) -> int | None:
        """The examples of the pass under way, or of the one that checkpointing repeats; None where there is none."""
        examples = self._examples
        if examples.batch is not None or torch.compiler.is_compiling() or not examples.rooted:
            return examples.batch
        clear = self.batched is None and indices.dim() > 1 and indices.shape[bool(examples.batch_dim)] != 1
        if self.batched or clear or not torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
            return None
        return examples.recomputed_batch(self._label())

    def _bare(self, indices: Tensor, batch: int) -> bool:
        """Whether the indices have no batch."""
        if self.batched is not None:
            return not self.batched
        if indices.dim() == 0:
            return True
        first = indices.shape[0]
        if indices.dim() > 1:
            return batch != 1 and indices.shape[bool(self._examples.batch_dim)] == 1
        if batch > 1 and first % batch == 0 and (first == batch or not _consecutive(indices)):
            raise ValueError(
                f"{self._label()} saw {first} indices in a batch of {batch} examples: do they belong to the examples, "
                f"or are they positions without a batch? Set its attribute: batched=True (dimension 0 is the batch) or "
                f"batched=False"
            )
        return first != batch

    def _without_batch(self, indices: Tensor, batch: int) -> Tensor:
        """The rows of indices that all examples have in common, one copy for each of them: no batch dimension."""
        if torch.compiler.is_compiling():
            return self._expanded(indices, batch)
        if not torch.is_grad_enabled() or batch == 0:
            with torch.no_grad():
                return super().forward(indices)
        copies = self._look_up(indices.expand(batch, *indices.shape))
        follow_copies_in(self._examples)
        if batch == 1:
            return copies[0]
        return PerExample(copies, Origin(self._label(), self._examples.batch_dim, self._examples.input))

    def _expanded(self, indices: Tensor, batch: int) -> Tensor:
        """The same in compiled code, which knows no copies: with a batch dimension."""
        if self._examples.batch_dim and indices.dim() > 1 and indices.shape[1] == 1:
            indices = indices.transpose(0, 1)
            expanded = indices.expand(batch, *indices.shape[1:])
            return (self._look_up(expanded) if torch.is_grad_enabled() else super().forward(expanded)).transpose(0, 1)
        bare = indices.squeeze(0) if indices.dim() > 1 and indices.shape[0] == 1 else indices
        if self._examples.batch_dim or bare.dim() == 0 or bare.dim() == indices.dim() > 1:
            raise RuntimeError(
                f"{self._label()}: indices without a batch (batched=False) cannot be used inside of compiled code; "
                f"compile the parts of the model without this layer"
            )
        expanded = bare.expand(batch, *bare.shape)
        return self._look_up(expanded) if torch.is_grad_enabled() else super().forward(expanded)


def _consecutive(indices: Tensor) -> bool:
    """Whether the indices are positions, a, a + 1, a + 2, ...; what compiled code cannot ask."""
    return not torch.compiler.is_compiling() and bool((indices.diff() == 1).all())


def unsupported_embedding(module: nn.Embedding | nn.EmbeddingBag) -> str:
    """Why this embedding cannot be served; empty if it can."""
    if module.max_norm is not None:
        return (
            "max_norm changes the weight in the forward pass, which no gradient sees; normalise after the step instead"
        )
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq divides by counts over the whole batch, which mixes examples; set it to False"
    if module.sparse:
        return "sparse gradients have no second moment here; set sparse=False"
    return ""


class EmbeddingBag(MomentModule, nn.EmbeddingBag):
    """torch.nn.EmbeddingBag whose backward also computes ``p.sum_grad_squared`` (MATHS 6). Each bag is an example.

    Input: indices (B, L), or (N,) with offsets (B,), or (B + 1,) with `include_last_offset`. The bags come first in any
    case, so that models that were converted with another `batch_dim` are refused.

    Raises:
        ValueError: for `max_norm`, `scale_grad_by_freq`, `sparse`, which have no per-example gradient here; in a
            converted model in training, if there are not as many bags as examples.
    """

    _reusable = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unsupported = unsupported_embedding(self)
        if unsupported:
            raise ValueError(f"EmbeddingBag: {unsupported}")

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        bags = input.shape[0]
        if input.dim() == 1 and offsets is not None:
            bags = offsets.shape[0] - int(self.include_last_offset)
        # A tensor that has as many rows as there are bags, for the check of the batch.
        if not self._tracking(input.new_empty(0).expand(bags, 0), 1, "weight"):
            return super().forward(input, offsets, per_sample_weights)
        if per_sample_weights is not None:
            if per_sample_weights.shape != input.shape or self.mode != "sum":
                return super().forward(input, offsets, per_sample_weights)  # raises
            per_sample_weights = per_sample_weights.reshape(-1)
        length = None
        if input.dim() == 2 and offsets is None:
            length = input.shape[1]
            offsets = torch.arange(bags, dtype=input.dtype, device=input.device) * input.shape[1]
            input = input.reshape(-1)
        elif input.dim() == 1 and offsets is not None and offsets.dim() == 1:
            offsets = offsets[:bags]
        else:
            return super().forward(input, offsets, per_sample_weights)  # raises
        leaves = self._leaves("weight")
        return autograd.embedding_bag(
            self.weight, per_sample_weights, *leaves, input, offsets, self.mode, self.padding_idx, length
        )
