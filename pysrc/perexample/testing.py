"""The oracle, the error budget and the case tables, for this library's tests and for layers of your own.

The oracle is a loop over examples with plain autograd in float64; everything is held to it. The error budget is at most
twice the error that PyTorch's own computation makes in the same low precision, plus a floor from the dtype alone.

To check a layer of your own::

    model = px.convert(MyModel())
    expected = oracle(model, F.mse_loss, (x,), y)
    stock = oracle(model, F.mse_loss, (x,), y, dtype=torch.float32)
    F.mse_loss(model(x), y).backward()
    assert_moments(model, expected, stock)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .moments import accumulate_dtype, no_moments

__all__ = [
    "CONV_CASES",
    "EMBEDDING_CASES",
    "LINEAR_CASES",
    "NORM_CASES",
    "POSITIONS",
    "ConvCase",
    "EmbeddingCase",
    "LinearCase",
    "Moments",
    "NormCase",
    "assert_moments",
    "assert_within_budget",
    "budget",
    "moments_of_examples",
    "oracle",
]


@dataclass(frozen=True)
class Moments:
    """A gradient ``sum_b c_b`` and its second moment ``sum_b c_b**2``."""

    grad: Tensor
    sum_grad_squared: Tensor


def moments_of_examples(contribution: Callable[[int], Tensor], batch: int, like: Tensor) -> Moments:
    """Loop over examples: the sum, and the sum of squares, of ``contribution(b)``.

    Args:
        contribution: the gradient c_b of example b.
        batch: number of examples; 0 gives zeros.
        like: shape, dtype and device of the result; the sums are float32 for half precision.
    """
    wide = accumulate_dtype(like.dtype)
    grad = torch.zeros_like(like, dtype=wide, memory_format=torch.contiguous_format)
    square = torch.zeros_like(grad)
    for b in range(batch):
        c = contribution(b).to(wide)
        grad += c
        square += c.square()
    return Moments(grad, square)


def oracle(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Moments]:
    """The moments of every parameter of `model`, from a loop over examples with plain autograd.

    Args:
        model: stock or converted; copied, not changed. Must be deterministic (no dropout) and must not mix examples.
        loss_fn: ``loss_fn(output, target)``, the loss of a batch; called here with batches of one example.
        inputs: tensor, or tensors, with the batch as dimension 0.
        targets: batch as dimension 0.
        reduction: "mean" or "sum", how `loss_fn` combines examples: c_b is the loss' gradient over B, or itself.
        dtype: to compute in. float64 is the oracle; a lower one shows PyTorch's own error.

    Returns:
        name of the parameter -> `Moments`; parameters that do not require grad are left out.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"oracle: reduction must be 'mean' or 'sum', got {reduction!r}")
    tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    batch = tensors[0].shape[0]
    model = copy.deepcopy(model).to(dtype)
    model.zero_grad()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        return {}
    contributions = []
    with no_moments():
        for b in range(batch):
            # Contiguous: stock GroupNorm's backward reads a null pointer where a channels_last input needs no gradient.
            row = [_cast(t[b : b + 1], dtype).contiguous() for t in tensors]
            loss = loss_fn(model(*row), _cast(targets[b : b + 1], dtype))
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            scale = 1.0 / batch if reduction == "mean" else 1.0
            contributions.append([None if grad is None else grad * scale for grad in grads])
    result = {}
    for i, (name, p) in enumerate(named.items()):
        rows = [torch.zeros_like(p) if grads[i] is None else grads[i] for grads in contributions]
        result[name] = moments_of_examples(rows.__getitem__, batch, p)
    return result


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def budget(expected: Tensor, stock: Tensor, dtype: torch.dtype) -> float:
    """The error allowed against `expected`: twice that of `stock`, plus a floor.

    The floor is two roundings to `dtype` and 32 in the accumulation dtype, relative to the largest element.
    """
    if expected.numel() == 0:
        return 0.0
    largest = float(expected.abs().max())
    floor = 2 * torch.finfo(dtype).eps + 32 * torch.finfo(accumulate_dtype(dtype)).eps
    return 2 * float((stock.double() - expected).abs().max()) + floor * largest


def assert_within_budget(actual: Tensor, expected: Tensor, stock: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise AssertionError unless `actual` is as close to `expected` as `budget` allows.

    Args:
        actual: to be checked.
        expected: the oracle's, float64.
        stock: PyTorch's own, computed in the low precision in question.
        dtype: of the result (float32 for second moments of half-precision inputs).
        what: named in the message.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return
    error = float((actual.double() - expected.double()).abs().max())
    allowed = budget(expected.double(), stock, dtype)
    if not error <= allowed:
        raise AssertionError(
            f"{what}: error {error:.3g} exceeds the budget {allowed:.3g} (PyTorch's own error "
            f"{float((stock.double() - expected).abs().max()):.3g}, largest element {float(expected.abs().max()):.3g})"
        )


def assert_moments(model: nn.Module, expected: dict[str, Moments], stock: dict[str, Moments] | None = None) -> None:
    """Raise AssertionError unless ``p.grad`` and ``p.sum_grad_squared`` of every parameter are within the budget.

    Args:
        model: converted, after backward.
        expected: from `oracle`.
        stock: from `oracle` in the model's own dtype; `expected` where the model is float64.
    """
    stock = expected if stock is None else stock
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if named.keys() != expected.keys():
        raise AssertionError(f"parameters differ: {sorted(named.keys() ^ expected.keys())}")
    for name, p in named.items():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        square = p.sum_grad_squared  # type: ignore[attr-defined]
        if square is None:
            square = torch.zeros_like(p, dtype=accumulate_dtype(p.dtype))
        if square.dtype != accumulate_dtype(p.dtype):
            raise AssertionError(f"{name}: sum_grad_squared must be {accumulate_dtype(p.dtype)}, got {square.dtype}")
        assert_within_budget(grad, expected[name].grad, stock[name].grad, p.dtype, f"{name}.grad")
        assert_within_budget(
            square,
            expected[name].sum_grad_squared,
            stock[name].sum_grad_squared,
            accumulate_dtype(p.dtype),
            f"{name}.sum_grad_squared",
        )


# The case tables. Shapes are small and odd on purpose; the op, layer and model tests and the correctness gate
# of every benchmark draw on them.

POSITIONS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (3,), (17,), (64,), (300,), (3, 5), (2, 1, 4))


@dataclass(frozen=True)
class LinearCase:
    """Linear: x is (batch, *positions, inputs)."""

    batch: int
    positions: tuple[int, ...]
    inputs: int
    outputs: int
    bias: bool = True

    def __str__(self) -> str:
        positions = "x".join(map(str, self.positions)) or "none"
        return f"B{self.batch}-T{positions}-I{self.inputs}-O{self.outputs}-b{int(self.bias)}"


LINEAR_CASES: tuple[LinearCase, ...] = (
    *(LinearCase(5, positions, 19, 13) for positions in POSITIONS),
    LinearCase(0, (), 7, 5),
    LinearCase(0, (3,), 7, 5),
    LinearCase(1, (), 7, 5),
    LinearCase(1, (9,), 33, 1),
    LinearCase(3, (4,), 1, 40),
    LinearCase(3, (4,), 1, 1),
    LinearCase(2, (7,), 64, 64, bias=False),
    LinearCase(130, (), 65, 33),
    LinearCase(70, (2,), 129, 67),
    LinearCase(9, (40,), 40, 130, bias=False),
)


@dataclass(frozen=True)
class ConvCase:
    """Convolution: x is (batch, channels, *size); the arguments are torch.nn.ConvNd's."""

    batch: int
    channels: int
    outputs: int
    size: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def spatial(self) -> int:
        return len(self.size)

    def __str__(self) -> str:
        arguments = "-".join(f"{name}={value}" for name, value in self.arguments.items())
        size = "x".join(map(str, self.size))
        return f"B{self.batch}-{self.channels}to{self.outputs}-{size}-k{self.kernel_size}-{arguments}".replace(" ", "")


CONV_CASES: tuple[ConvCase, ...] = (
    ConvCase(3, 4, 5, (11,), 3),
    ConvCase(3, 4, 6, (11,), 4, {"stride": 2, "padding": 3, "groups": 2}),
    ConvCase(2, 3, 4, (12,), 3, {"padding": "same", "dilation": 2}),
    ConvCase(2, 3, 4, (12,), 4, {"padding": "same"}),
    ConvCase(2, 3, 4, (9,), 3, {"padding": 2, "padding_mode": "circular"}),
    ConvCase(4, 3, 8, (9, 7), 3),
    ConvCase(4, 3, 8, (9, 7), 3, {"bias": False, "padding": 1}),
    ConvCase(2, 3, 17, (9, 9), (3, 2), {"stride": (2, 1), "padding": (1, 2)}),
    ConvCase(2, 3, 4, (8, 9), (2, 3), {"padding": "same"}),
    ConvCase(2, 3, 4, (8, 9), (3, 5), {"padding": "same"}),
    ConvCase(2, 3, 4, (8, 9), 3, {"padding": 1, "padding_mode": "reflect"}),
    ConvCase(2, 3, 4, (8, 9), 3, {"padding": "same", "padding_mode": "replicate"}),
    ConvCase(2, 3, 4, (8, 9), 3, {"padding": "valid", "dilation": (2, 1)}),
    ConvCase(3, 6, 9, (7, 7), 3, {"groups": 3, "padding": 1}),
    ConvCase(3, 6, 6, (10, 10), 3, {"groups": 6, "padding": 1}),
    ConvCase(3, 5, 10, (9, 9), 5, {"groups": 5, "padding": 2, "stride": 2}),
    ConvCase(2, 33, 35, (5, 6), 1),
    ConvCase(2, 40, 70, (3, 3), 3, {"padding": 1}),
    ConvCase(2, 3, 20, (32, 32), 7, {"stride": 2, "padding": 3}),
    ConvCase(1, 2, 3, (5, 5), 5),
    ConvCase(0, 3, 4, (6, 6), 3),
    ConvCase(2, 2, 3, (5, 6, 4), 3, {"padding": 1}),
    ConvCase(2, 4, 4, (5, 4, 6), (1, 2, 3), {"stride": (1, 2, 1), "groups": 4}),
    ConvCase(2, 2, 4, (5, 5, 5), 2, {"padding": "same", "dilation": 2, "bias": False}),
)


@dataclass(frozen=True)
class NormCase:
    """A norm: LayerNorm over the last dimensions `normalized`, or GroupNorm of `groups` where that is set."""

    shape: tuple[int, ...]
    normalized: tuple[int, ...] = ()
    groups: int = 0
    bias: bool = True

    def __str__(self) -> str:
        kind = f"G{self.groups}" if self.groups else f"N{'x'.join(map(str, self.normalized))}"
        return f"{'x'.join(map(str, self.shape))}-{kind}-b{int(self.bias)}"


NORM_CASES: tuple[NormCase, ...] = (
    NormCase((4, 7), (7,)),
    NormCase((3, 5, 33), (33,)),
    NormCase((2, 3, 4, 6), (4, 6)),
    NormCase((5, 64, 48), (48,), bias=False),
    NormCase((1, 3, 8), (8,)),
    NormCase((0, 3, 8), (8,)),
    NormCase((4, 6), groups=3),
    NormCase((3, 6, 5), groups=2),
    NormCase((3, 8, 5, 7), groups=8),
    NormCase((2, 4, 3, 4, 2), groups=1),
    NormCase((1, 12, 9, 9), groups=4),
    NormCase((0, 4, 3), groups=2),
)


@dataclass(frozen=True)
class EmbeddingCase:
    """Embedding: indices are (batch, *positions), of `rows` rows, few enough to repeat within one example."""

    batch: int
    positions: tuple[int, ...]
    rows: int
    width: int
    padding_idx: int | None = None

    def __str__(self) -> str:
        positions = "x".join(map(str, self.positions)) or "none"
        return f"B{self.batch}-T{positions}-V{self.rows}-D{self.width}-p{self.padding_idx}"


EMBEDDING_CASES: tuple[EmbeddingCase, ...] = (
    EmbeddingCase(4, (6,), 5, 7),
    EmbeddingCase(4, (6,), 5, 7, padding_idx=2),
    EmbeddingCase(3, (2, 5), 4, 16, padding_idx=-1),
    EmbeddingCase(8, (), 3, 33),
    EmbeddingCase(2, (50,), 2, 1),
    EmbeddingCase(1, (9,), 100, 12),
    EmbeddingCase(0, (4,), 6, 3),
)
