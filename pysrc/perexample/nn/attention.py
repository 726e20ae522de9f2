"""Multi-head attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import autograd
from ..moments import Call, MomentModule
from .linear import Linear

__all__ = ["MultiheadAttention", "NonDynamicallyQuantizableLinear"]


class NonDynamicallyQuantizableLinear(Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The output projection of `MultiheadAttention`: a `Linear`."""


class MultiheadAttention(MomentModule, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention whose backward also computes ``p.sum_grad_squared`` (MATHS 3, 8).

    Query, key and value are (B, L, E) with `batch_first`, else (L, B, E); arguments, masks and results are the stock
    ones, and so is the computation but for rounding: the projections are linear layers, ``bias_k`` and ``bias_v`` are
    expanded to the batch. In eval mode the layer is the stock layer, its fast path included.
    """

    _batch_at = "says"
    _reusable = True
    out_proj: NonDynamicallyQuantizableLinear

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.out_proj.__class__ = NonDynamicallyQuantizableLinear
        self.out_proj._bind_all()

    @property
    def batch_dim(self) -> int:  # type: ignore[override]
        """Which dimension of the inputs is the batch."""
        return 0 if self.batch_first else 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        own = self._recording(*self._parameters)
        if self.out_proj._recording("weight", "bias") or own:
            for x in (query, key, value):
                self._check_batch(x, 3)
            if torch.is_grad_enabled():
                mask, is_causal = self._mask(query, key, key_padding_mask, need_weights, attn_mask, is_causal)
                return self._attend(query, key, value, mask, need_weights, average_attn_weights, is_causal)
        return super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        need_weights: bool,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        batch = q.shape[0]
        if self.bias_k is not None:
            k_leaf, v_leaf, uses = self._leaves("bias_k", "bias_v")
            k = torch.cat([k, self._bias(self.bias_k, k_leaf, _part(uses, [0]), batch).to(k.dtype)], 2)
            v = torch.cat([v, self._bias(self.bias_v, v_leaf, _part(uses, [1]), batch).to(v.dtype)], 2)
        if self.add_zero_attn:
            zero = k.new_zeros(batch, self.num_heads, 1, self.head_dim)
            k, v = torch.cat([k, zero], 2), torch.cat([v, zero], 2)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(2, 3)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = (y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        out = self.out_proj
        return autograd.linear(y, out.weight, out.bias, *out._leaves("weight", "bias"), self.batch_dim), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias, dim = self.in_proj_bias, self.batch_dim
        if self._qkv_same_embed_dim:
            weight = self.in_proj_weight
            weight_leaf, bias_leaf, uses = self._leaves("in_proj_weight", "in_proj_bias")
            if query is key and key is value:
                return autograd.linear(query, weight, bias, weight_leaf, bias_leaf, uses, dim).chunk(3, -1)
            weights, weight_leaves = weight.chunk(3), _chunk(weight_leaf)
            parts = [([0, 1], [i * self.embed_dim] * 2) for i in range(3)]
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            weights = tuple(getattr(self, name) for name in names)
            *weight_leaves, bias_leaf, uses = self._leaves(*names, "in_proj_bias")
            parts = [([i, 3], [0, i * self.embed_dim]) for i in range(3)]
        biases, bias_leaves = _chunk(bias), _chunk(bias_leaf)
        # One scalar counts the uses of the whole layer: once is enough.
        calls = [_part(uses, *part) for part in parts] if isinstance(uses, Call) else [uses, None, None]
        return tuple(
            autograd.linear(*one, dim)
            for one in zip((query, key, value), weights, biases, weight_leaves, bias_leaves, calls, strict=True)
        )

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, E) or (L, B, E) -> (B, heads, L, head_dim), a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _bias(self, bias: Tensor, leaf: Tensor | None, uses: Call | None, batch: int) -> Tensor:
        """(1, 1, E) -> (B, heads, 1, head_dim)."""
        return autograd.expand(bias, leaf, uses, batch).view(batch, self.num_heads, 1, self.head_dim)

    def _mask(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor | None, bool]:
        """Both masks as one to add to the scores (B, heads, L, S), and whether is_causal stands for it."""
        if is_causal and attn_mask is None:
            raise ValueError(f"{self._label()}: is_causal is a hint about attn_mask, which is missing")
        if is_causal and key_padding_mask is None and not need_weights:
            return None, True
        batch, source = key.shape[self.batch_dim], key.shape[1 - self.batch_dim]
        target = query.shape[1 - self.batch_dim]
        masks = []
        if attn_mask is not None:
            shapes = ((target, source), (batch * self.num_heads, target, source))
            if tuple(attn_mask.shape) not in shapes:
                raise ValueError(
                    f"{self._label()}: attn_mask must be {shapes[0]} or {shapes[1]}, got {tuple(attn_mask.shape)}"
                )
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.view(batch, -1, target, source))
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (batch, source):
                raise ValueError(
                    f"{self._label()}: key_padding_mask must be {(batch, source)}, got {tuple(key_padding_mask.shape)}"
                )
            masks.append(key_padding_mask[:, None, None, :])
        # What bias_k and add_zero_attn append is never masked.
        appended = (self.bias_k is not None) + self.add_zero_attn
        total = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, -math.inf)
            mask = F.pad(mask.to(query.dtype), (0, appended)) if appended else mask.to(query.dtype)
            total = mask if total is None else total + mask
        return total, False


def _part(uses: Tensor | Call | None, which: Sequence[int], begins: Sequence[int] | None = None) -> Call | None:
    """Of what counts uses, the `Call` for a Function that takes these of the parameters, or rows of them."""
    return uses.take(which, begins) if isinstance(uses, Call) else None


def _chunk(tensor: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if tensor is None else tensor.chunk(3)
