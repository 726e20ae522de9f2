"""The case tables, small and odd on purpose. Tests and the correctness gate of every benchmark draw on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
    "NormCase",
]

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


@dataclass(frozen=True)
class LayerCase:
    """Any other layer: ``torch.nn.<name>(*arguments, **keywords)`` of inputs with `shapes`, the batch first in each.

    The layer sees its inputs with the batch as dimension `batch_dim`. Where `rows` is not 0, the first input is indices
    below it.
    """

    name: str
    arguments: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    keywords: dict[str, Any] = field(default_factory=dict, hash=False)
    batch_dim: int = 0
    rows: int = 0

    @property
    def batch(self) -> int:
        return self.shapes[0][0]

    def __str__(self) -> str:
        arguments = ",".join([*map(str, self.arguments), *(f"{name}={value}" for name, value in self.keywords.items())])
        shapes = "-".join("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.name}({arguments})-{shapes}".replace(" ", "")


LAYER_CASES: tuple[LayerCase, ...] = (
    LayerCase("RMSNorm", (7,), ((4, 7),)),
    LayerCase("RMSNorm", (33,), ((3, 5, 33),), {"eps": 1e-3}),
    LayerCase("RMSNorm", ((4, 6),), ((2, 3, 4, 6),)),
    LayerCase("RMSNorm", (48,), ((3, 40, 48),)),
    LayerCase("RMSNorm", (6,), ((0, 3, 6),)),
    LayerCase("MultiheadAttention", (8, 2), ((3, 5, 8), (3, 4, 8), (3, 4, 8)), batch_dim=1),
    LayerCase("MultiheadAttention", (8, 2), ((3, 5, 8),), batch_dim=1),
    LayerCase("MultiheadAttention", (6, 3), ((4, 3, 6),), {"batch_first": True, "bias": False}),
    LayerCase("MultiheadAttention", (6, 1), ((2, 3, 6),), {"batch_first": True, "add_bias_kv": True}),
    LayerCase(
        "MultiheadAttention",
        (8, 4),
        ((2, 3, 8), (2, 6, 5), (2, 6, 7)),
        {"kdim": 5, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True},
        batch_dim=1,
    ),
    LayerCase("TransformerEncoderLayer", (8, 2, 12, 0.0), ((3, 5, 8),), batch_dim=1),
    LayerCase("TransformerEncoderLayer", (8, 2, 12, 0.0), ((3, 5, 8),), {"batch_first": True, "norm_first": True}),
    LayerCase("TransformerEncoderLayer", (6, 3, 7, 0.0, "gelu"), ((1, 4, 6),), {"bias": False}, batch_dim=1),
    LayerCase("TransformerDecoderLayer", (8, 2, 12, 0.0), ((3, 5, 8), (3, 4, 8)), batch_dim=1),
    LayerCase("TransformerDecoderLayer", (8, 2, 12, 0.0), ((3, 5, 8), (3, 4, 8)), {"batch_first": True}),
    LayerCase("Transformer", (8, 2, 2, 1, 12, 0.0), ((3, 5, 8), (3, 4, 8)), batch_dim=1),
    LayerCase("Transformer", (8, 2, 1, 2, 12, 0.0), ((3, 5, 8), (3, 4, 8)), {"batch_first": True}),
    LayerCase("EmbeddingBag", (5, 7), ((4, 6),), {"mode": "sum"}, rows=5),
    LayerCase("EmbeddingBag", (5, 7), ((4, 6),), {"mode": "sum", "padding_idx": 2}, rows=5),
    LayerCase("EmbeddingBag", (5, 7), ((4, 6),), {"mode": "mean", "padding_idx": -1}, rows=5),
    LayerCase("EmbeddingBag", (9, 3), ((3, 5),), rows=9),
    LayerCase("EmbeddingBag", (4, 33), ((3, 5),), {"mode": "max"}, rows=4),
    LayerCase("EmbeddingBag", (4, 6), ((3, 2),), {"mode": "max", "padding_idx": 1}, rows=4),
    LayerCase("EmbeddingBag", (4, 6), ((0, 2),), {"mode": "sum"}, rows=4),
    LayerCase("Bilinear", (5, 4, 3), ((6, 5), (6, 4))),
    LayerCase("Bilinear", (5, 4, 3), ((3, 7, 5), (3, 7, 4))),
    LayerCase("Bilinear", (2, 3, 17, False), ((2, 2, 3, 2), (2, 2, 3, 3))),
    LayerCase("Bilinear", (2, 3, 1), ((0, 2), (0, 3))),
    LayerCase("PReLU", (), ((4, 6),)),
    LayerCase("PReLU", (), ((5,),)),
    LayerCase("PReLU", (6,), ((3, 6, 5, 4),)),
    LayerCase("PReLU", (33,), ((7, 33),)),
    LayerCase("PReLU", (3,), ((0, 3, 2),)),
    LayerCase("LSTM", (5, 4), ((3, 6, 5),), batch_dim=1),
    LayerCase("LSTM", (5, 4), ((3, 6, 5),), {"batch_first": True, "bias": False}),
    LayerCase("LSTM", (3, 6, 2), ((4, 5, 3),), {"bidirectional": True}, batch_dim=1),
    LayerCase("LSTM", (3, 6), ((2, 4, 3),), {"proj_size": 2, "bidirectional": True, "batch_first": True}),
    LayerCase("LSTM", (7, 33), ((1, 1, 7),), batch_dim=1),
    LayerCase("GRU", (5, 4), ((3, 6, 5),), batch_dim=1),
    LayerCase("GRU", (5, 4, 2), ((3, 4, 5),), {"batch_first": True, "bias": False, "bidirectional": True}),
    LayerCase("GRU", (2, 17), ((1, 3, 2),), batch_dim=1),
    LayerCase("RNN", (5, 4), ((3, 6, 5),), batch_dim=1),
    LayerCase("RNN", (5, 4, 2), ((3, 4, 5),), {"nonlinearity": "relu", "bidirectional": True, "batch_first": True}),
    LayerCase("RNN", (3, 9, 1, "tanh", False), ((2, 3, 3),), batch_dim=1),
    LayerCase("LSTMCell", (5, 4), ((3, 5),)),
    LayerCase("LSTMCell", (5, 4, False), ((3, 5),)),
    LayerCase("GRUCell", (5, 4), ((3, 5), (3, 4))),
    LayerCase("RNNCell", (5, 4), ((3, 5), (3, 4))),
    LayerCase("RNNCell", (5, 4, False, "relu"), ((3, 5),)),
    LayerCase("MultiheadAttention", (8, 2), ((0, 5, 8),), batch_dim=1),
    LayerCase("TransformerEncoderLayer", (8, 2, 12, 0.0), ((0, 5, 8),), {"batch_first": True}),
    LayerCase("TransformerDecoderLayer", (8, 2, 12, 0.0), ((0, 5, 8), (0, 4, 8)), {"batch_first": True}),
    LayerCase("LSTM", (5, 4), ((0, 6, 5),), batch_dim=1),
    LayerCase("GRU", (5, 4), ((0, 6, 5),), batch_dim=1),
    LayerCase("RNN", (5, 4), ((0, 6, 5),), {"batch_first": True}),
    LayerCase("LSTMCell", (5, 4), ((0, 5),)),
    LayerCase("GRUCell", (5, 4), ((0, 5), (0, 4))),
    LayerCase("RNNCell", (5, 4), ((0, 5), (0, 4))),
    LayerCase("InstanceNorm1d", (4,), ((3, 4, 9),), {"affine": True}),
    LayerCase("ConvTranspose2d", (3, 8, 3), ((0, 3, 6, 5),)),
    LayerCase("ConvTranspose3d", (2, 3, 3), ((0, 2, 4, 3, 5),)),
    LayerCase("InstanceNorm1d", (4,), ((3, 4, 9),), {"affine": True, "track_running_stats": True, "momentum": 0.3}),
    LayerCase("InstanceNorm2d", (5,), ((2, 5, 6, 7),), {"affine": True, "eps": 1e-3}),
    LayerCase("InstanceNorm2d", (3,), ((1, 3, 20, 20),), {"affine": True}),
    LayerCase("InstanceNorm3d", (2,), ((3, 2, 3, 4, 5),), {"affine": True}),
    LayerCase("ConvTranspose1d", (4, 5, 3), ((3, 4, 7),)),
    LayerCase(
        "ConvTranspose1d", (4, 6, 4), ((3, 4, 6),), {"stride": 2, "padding": 2, "groups": 2, "output_padding": 1}
    ),
    LayerCase("ConvTranspose1d", (2, 3, 3), ((2, 2, 5),), {"dilation": 4, "stride": 2, "output_padding": 3}),
    LayerCase("ConvTranspose1d", (2, 3, 2), ((0, 2, 5),)),
    LayerCase("ConvTranspose2d", (3, 8, 3), ((4, 3, 6, 5),)),
    LayerCase("ConvTranspose2d", (3, 8, 3), ((4, 3, 6, 5),), {"bias": False, "padding": 1}),
    LayerCase("ConvTranspose2d", (3, 17, (3, 2)), ((2, 3, 5, 5),), {"stride": (2, 1), "padding": (1, 0)}),
    LayerCase("ConvTranspose2d", (6, 9, 3), ((3, 6, 4, 4),), {"groups": 3, "dilation": (1, 2)}),
    LayerCase("ConvTranspose2d", (6, 6, 4), ((2, 6, 5, 5),), {"groups": 6, "stride": 2, "padding": 1}),
    LayerCase("ConvTranspose2d", (20, 35, 1), ((2, 20, 4, 5),)),
    LayerCase("ConvTranspose2d", (2, 4, 2), ((1, 2, 9, 9),), {"stride": 2}),
    LayerCase("ConvTranspose3d", (2, 3, 3), ((2, 2, 4, 3, 5),), {"padding": 1}),
    LayerCase("ConvTranspose3d", (4, 4, (1, 2, 3)), ((2, 4, 3, 4, 3),), {"stride": (1, 2, 1), "groups": 4}),
    LayerCase("ConvTranspose3d", (2, 4, 2), ((2, 2, 3, 3, 3),), {"dilation": 2, "bias": False}),
)
