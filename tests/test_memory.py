"""Memory: for layers with a kernel nothing grows as examples times parameters (the peak, against the batch)."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_layer_cases import Batched
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import perexample as px
from perexample.convert import LAYERS
from perexample.testing import LayerCase

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

# Parameters large beside what one example brings along.
LARGE = (
    LayerCase("Linear", (96, 96), ((2, 96),)),
    LayerCase("Conv1d", (48, 48, 5), ((2, 48, 6),)),
    LayerCase("Conv2d", (32, 32, 3), ((2, 32, 4, 4),)),
    LayerCase("Conv3d", (16, 16, 3), ((2, 16, 3, 3, 3),)),
    LayerCase("ConvTranspose1d", (48, 48, 5), ((2, 48, 3),)),
    LayerCase("ConvTranspose2d", (32, 32, 3), ((2, 32, 2, 2),)),
    LayerCase("ConvTranspose3d", (16, 16, 3), ((2, 16, 2, 2, 2),)),
    LayerCase("Embedding", (512, 16), ((2, 3),), rows=512),
    LayerCase("EmbeddingBag", (512, 16), ((2, 3),), {"mode": "sum"}, rows=512),
    LayerCase("EmbeddingBag", (512, 16), ((2, 3),), {"mode": "max"}, rows=512),
    LayerCase("Bilinear", (24, 24, 24), ((2, 24), (2, 24))),
    LayerCase("MultiheadAttention", (64, 4), ((2, 2, 64),), batch_dim=1),
    LayerCase("TransformerEncoderLayer", (48, 4, 96, 0.0), ((2, 2, 48),), batch_dim=1),
    LayerCase("TransformerDecoderLayer", (48, 4, 96, 0.0), ((2, 2, 48), (2, 2, 48)), batch_dim=1),
    LayerCase("Transformer", (32, 4, 1, 1, 64, 0.0), ((2, 2, 32), (2, 2, 32)), batch_dim=1),
    LayerCase("LSTM", (48, 48), ((2, 3, 48),), batch_dim=1),
    LayerCase("GRU", (48, 48), ((2, 3, 48),), batch_dim=1),
    LayerCase("RNN", (96, 96), ((2, 3, 96),), batch_dim=1),
    LayerCase("LSTMCell", (48, 48), ((2, 48),)),
    LayerCase("GRUCell", (48, 48), ((2, 48),)),
    LayerCase("RNNCell", (96, 96), ((2, 96),)),
)
# Each channel has one parameter of a kind, so that the activations are never small beside them: at twice the positions
# what grows with the positions is told from what does not.
PER_CHANNEL = (
    (LayerCase("LayerNorm", (1024,), ((2, 4, 1024),)), ((2, 8, 1024),)),
    (LayerCase("RMSNorm", (1024,), ((2, 4, 1024),)), ((2, 8, 1024),)),
    (LayerCase("GroupNorm", (4, 256), ((2, 256, 4, 8),)), ((2, 256, 8, 8),)),
    (LayerCase("InstanceNorm1d", (256,), ((2, 256, 32),), {"affine": True}), ((2, 256, 64),)),
    (LayerCase("InstanceNorm2d", (256,), ((2, 256, 4, 8),), {"affine": True}), ((2, 256, 8, 8),)),
    (LayerCase("InstanceNorm3d", (256,), ((2, 256, 2, 4, 4),), {"affine": True}), ((2, 256, 4, 4, 4),)),
    (LayerCase("BatchNorm1d", (256,), ((2, 256, 32),)), ((2, 256, 64),)),
    (LayerCase("BatchNorm2d", (256,), ((2, 256, 4, 8),)), ((2, 256, 8, 8),)),
    (LayerCase("BatchNorm3d", (256,), ((2, 256, 2, 4, 4),)), ((2, 256, 4, 4, 4),)),
    (LayerCase("SyncBatchNorm", (256,), ((2, 256, 4, 8),)), ((2, 256, 8, 8),)),
    (LayerCase("PReLU", (256,), ((2, 256, 4, 8),)), ((2, 256, 8, 8),)),
)
# These are in the tables as parts: of a Transformer, and an attention's projection.
INSIDE = {"TransformerEncoder", "TransformerDecoder", "NonDynamicallyQuantizableLinear"}


class Conv1D(nn.Module):
    """GPT-2's linear layer, recognised by what it computes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(x.shape)


class RMSNorm(nn.Module):
    """Llama's norm, recognised likewise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def stock_of(case: LayerCase) -> nn.Module:
    """The layer of `case` as a model; a BatchNorm in the mode in which it is served."""
    model = Batched(case)
    if isinstance(model.layer, nn.modules.batchnorm._BatchNorm):
        model.layer.eval()
    return model


def peak(model: nn.Module, case: LayerCase, batch: int) -> int:
    """The most bytes that a forward and backward pass of `batch` examples have at one time, beyond their inputs."""
    inputs = [
        torch.randint(0, case.rows, (batch, *shape[1:]))
        if i == 0 and case.rows
        else torch.randn(batch, *shape[1:]).requires_grad_()
        for i, shape in enumerate(case.shapes)
    ]
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(*inputs).sum().backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def growth(model: nn.Module, case: LayerCase) -> float:
    """The bytes by which the peak grows with each example."""
    few, many = 8, 24
    peak(model, case, few)  # what is made once
    return (peak(model, case, many) - peak(model, case, few)) / (many - few)


def bytes_of_parameters(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_no_temporary_grows_as_examples_times_parameters(case):
    stock = stock_of(case)
    more = growth(px.convert(copy.deepcopy(stock)), case) - growth(stock, case)
    assert more < bytes_of_parameters(stock) / 4


@pytest.mark.parametrize(("case", "longer"), PER_CHANNEL, ids=lambda value: str(value) if "(" in str(value)[1:] else "")
def test_no_temporary_grows_as_examples_times_channels(case, longer):
    stock = stock_of(case)
    ours = px.convert(copy.deepcopy(stock))
    twice = dataclasses.replace(case, shapes=longer)
    fixed = [2 * growth(model, case) - growth(model, twice) for model in (ours, stock)]
    assert fixed[0] - fixed[1] < bytes_of_parameters(stock) / 4


def test_every_class_with_a_kernel_is_in_the_tables():
    classes = {stock.__name__ for stock in LAYERS}
    assert classes == INSIDE | {case.name for case in (*LARGE, *(case for case, _ in PER_CHANNEL))}


def test_no_temporary_grows_in_lookalikes():
    linear = nn.Sequential(Conv1D(96))
    norms = [nn.Sequential(RMSNorm(1024)) for _ in range(2)]
    for model in (linear, norms[0]):
        assert px.convert(model, dry_run=True)[0].how == "kernel"
    case = LayerCase("Linear", (96, 96), ((2, 4, 96),))
    more = growth(px.convert(copy.deepcopy(linear)), case) - growth(linear, case)
    assert more < bytes_of_parameters(linear) / 4
    (case, longer) = next(row for row in PER_CHANNEL if row[0].name == "RMSNorm")
    px.convert(norms[0])
    twice = dataclasses.replace(case, shapes=longer)
    fixed = [2 * growth(model, case) - growth(model, twice) for model in norms]
    assert fixed[0] - fixed[1] < bytes_of_parameters(norms[0]) / 4


def test_where_a_temporary_does_grow_it_is_measured():
    class Linear(nn.Linear):  # a class of its own goes to the exact fallback
        pass

    model = nn.Sequential(Linear(96, 96))
    assert px.convert(copy.deepcopy(model), dry_run=True)[0].how == "exact fallback"
    assert growth(px.convert(copy.deepcopy(model)), LARGE[0]) - growth(model, LARGE[0]) > bytes_of_parameters(model)
