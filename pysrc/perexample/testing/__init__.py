"""The oracle, the error budget and the case tables, for this library's tests and for layers of your own.

The oracle is a loop over examples with plain autograd in float64; everything is held to it. The error budget is at most
twice the error that PyTorch's own computation makes in the same low precision, plus a floor from the dtype alone.
Where few roundings make that error (half precision, few elements) `stock_moments` looks at several draws of it.

To check a layer of your own::

    model = px.convert(MyModel())
    expected = oracle(model, F.mse_loss, (x,), y)
    stock = stock_moments(model, F.mse_loss, (x,), y, dtype=torch.float32)
    F.mse_loss(model(x), y).backward()
    assert_moments(model, expected, stock)
"""

from .cases import (
    CONV_CASES,
    EMBEDDING_CASES,
    LAYER_CASES,
    LINEAR_CASES,
    NORM_CASES,
    POSITIONS,
    ConvCase,
    EmbeddingCase,
    LayerCase,
    LinearCase,
    NormCase,
)
from .check import check
from .oracle import Moments, assert_moments, assert_within_budget, budget, moments_of_examples, oracle, stock_moments

__all__ = [
    "CONV_CASES",
    "EMBEDDING_CASES",
    "LAYER_CASES",
    "LINEAR_CASES",
    "NORM_CASES",
    "POSITIONS",
    "ConvCase",
    "EmbeddingCase",
    "LayerCase",
    "LinearCase",
    "Moments",
    "NormCase",
    "assert_moments",
    "assert_within_budget",
    "budget",
    "check",
    "moments_of_examples",
    "oracle",
    "stock_moments",
]
