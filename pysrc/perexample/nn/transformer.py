"""The Transformer's layers: they compute by their parts, which they tell where the batch is."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..moments import ExampleCount, MomentModule
from .attention import MultiheadAttention, NonDynamicallyQuantizableLinear
from .linear import Linear
from .norm import LayerNorm, RMSNorm

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


class _Assembled(MomentModule):
    """What all have in common: no parameter of their own, and parts that see the batch where they do."""

    _batch_at = "says"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if type(module) in _PARTS:
                module.__class__ = _PARTS[type(module)]
            if isinstance(module, MomentModule):
                module.__dict__.setdefault("_examples", ExampleCount())
                module._bind_all()
            if isinstance(module, _Assembled):
                module._place_batch()

    @property
    def batch_dim(self) -> int:  # type: ignore[override]
        """Which dimension of the inputs is the batch."""
        attention = next((m for m in self.modules() if isinstance(m, nn.MultiheadAttention)), None)
        return 0 if attention is None or attention.batch_first else 1

    def _place_batch(self) -> None:
        for child in self.children():
            if isinstance(child, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
                child.batch_dim = self.batch_dim

    def _join(self, examples: ExampleCount, name: str) -> None:
        super()._join(examples, name)
        self._place_batch()


class TransformerEncoderLayer(_Assembled, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer of layers that compute ``p.sum_grad_squared``.

    Input (B, S, E) with `batch_first`, else (S, B, E). In eval mode the stock layer, its fast path included.
    """


class TransformerDecoderLayer(_Assembled, nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer of layers that compute ``p.sum_grad_squared``.

    Target (B, T, E) and memory (B, S, E) with `batch_first`, else (T, B, E) and (S, B, E).
    """


class TransformerEncoder(_Assembled, nn.TransformerEncoder):
    """torch.nn.TransformerEncoder of layers that compute ``p.sum_grad_squared``; input as its layers'."""


class TransformerDecoder(_Assembled, nn.TransformerDecoder):
    """torch.nn.TransformerDecoder of layers that compute ``p.sum_grad_squared``; inputs as its layers'."""


class Transformer(_Assembled, nn.Transformer):
    """torch.nn.Transformer of layers that compute ``p.sum_grad_squared``; inputs as its layers'."""


_PARTS: dict[type[nn.Module], type[MomentModule]] = {
    nn.Linear: Linear,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.modules.linear.NonDynamicallyQuantizableLinear: NonDynamicallyQuantizableLinear,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
}
