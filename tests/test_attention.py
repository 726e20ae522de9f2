"""Attention and the Transformer's layers: masks, weights, where the batch is, and the fast path of inference."""

from __future__ import annotations

import copy

import pytest
import torch
from models import randn, weighted_sum
from torch import nn

import perexample as px
from perexample.testing import assert_moments, oracle

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]
CAUSAL = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
PADDING = torch.tensor([[False] * 4, [False, False, True, True], [False, True, False, True]])


class Attention(nn.Module):
    """x: (B, 4, 6), padding: (B, 4). The mask of each head of each example is made of x's batch size."""

    def __init__(self, mask=None, padding=False, need_weights=True, is_causal=False, heads=2, **keywords):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, heads, **keywords)
        self.mask, self.padding, self.need_weights, self.is_causal = mask, padding, need_weights, is_causal
        self.heads = heads

    def forward(self, x, padding):
        mask = self.mask
        if mask == "heads":
            bias = torch.linspace(-1, 1, self.heads * 16, dtype=x.dtype).view(self.heads, 4, 4)
            mask = bias.repeat(x.shape[0], 1, 1)
        x = x if self.attention.batch_first else x.transpose(0, 1)
        y, weights = self.attention(
            x,
            x,
            x,
            key_padding_mask=padding if self.padding else None,
            need_weights=self.need_weights,
            attn_mask=mask,
            average_attn_weights=self.heads == 2,
            is_causal=self.is_causal,
        )
        y = y if self.attention.batch_first else y.transpose(0, 1)
        return y if weights is None else torch.cat([y.flatten(1), weights.flatten(1)], 1)


VARIANTS = {
    "boolean mask": dict(mask=CAUSAL),
    "float mask": dict(mask=torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()),
    "mask for each head": dict(mask="heads"),
    "padding": dict(padding=True),
    "both": dict(mask=CAUSAL, padding=True),
    "both, no weights": dict(mask=CAUSAL, padding=True, need_weights=False),
    "causal": dict(mask=CAUSAL, is_causal=True, need_weights=False),
    "causal with weights": dict(mask=CAUSAL, is_causal=True),
    "causal with appended keys": dict(mask=CAUSAL, is_causal=True, need_weights=False, add_bias_kv=True),
    "appended keys, both masks": dict(mask="heads", padding=True, add_bias_kv=True, add_zero_attn=True),
    "three heads": dict(heads=3, mask=CAUSAL, add_zero_attn=True),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_and_weights(variant, batch_first):
    torch.manual_seed(0)
    model = Attention(**VARIANTS[variant], batch_first=batch_first).double()
    inputs = (randn(3, 4, 6), PADDING)
    stock = model(*inputs)
    target = randn(*stock.shape, seed=1)
    expected = oracle(model, weighted_sum, inputs, target, reduction="sum")
    converted = px.convert(copy.deepcopy(model))
    y = converted(*inputs)
    torch.testing.assert_close(y, stock)
    weighted_sum(y, target).backward()
    assert_moments(converted, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_in_training(need_weights):
    torch.manual_seed(0)
    layer = px.nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
    x = torch.randn(3, 4, 6)
    first, second = (layer(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    first, second = (layer(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": torch.zeros(4, 3)}, r"attn_mask must be \(4, 4\) or \(6, 4, 4\), got \(4, 3\)"),
        ({"key_padding_mask": torch.zeros(2, 3)}, r"key_padding_mask must be \(3, 4\), got \(2, 3\)"),
        ({"is_causal": True}, "is_causal is a hint about attn_mask, which is missing"),
    ],
)
def test_wrong_masks_are_refused_by_name(arguments, message):
    x = torch.randn(3, 4, 6)
    with pytest.raises(ValueError, match=f"^MultiheadAttention: {message}"):
        px.nn.MultiheadAttention(6, 2, batch_first=True)(x, x, x, **arguments)


def test_a_sequence_first_model_counts_its_examples_and_refuses_another_layout():
    torch.manual_seed(0)
    model = px.convert(nn.TransformerEncoderLayer(6, 2, 8, 0.0))
    x = torch.randn(4, 3, 6)  # 4 positions of 3 examples
    model(x).sum().backward()
    assert model._examples.total == 3
    assert model.linear1.batch_dim == 1

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0)

        def forward(self, x):
            return self.layer(x)

    with pytest.raises(ValueError, match=r"layer.self_attn saw 3 rows, the batch has 4 examples.*not dimension 1"):
        px.convert(Wrapped())(x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoders_and_decoders_with_a_last_norm(batch_first):
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            keywords = dict(batch_first=batch_first, dtype=torch.float64, dropout=0.0)
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(6, 2, 7, **keywords), 2, nn.LayerNorm(6).double()
            )
            self.decoder = nn.TransformerDecoder(
                nn.TransformerDecoderLayer(6, 2, 7, norm_first=True, **keywords), 2, nn.LayerNorm(6).double()
            )

        def forward(self, source, target):
            if not batch_first:
                source, target = source.transpose(0, 1), target.transpose(0, 1)
            y = self.decoder(target, self.encoder(source))
            return y if batch_first else y.transpose(0, 1)

    model = Model()
    inputs, target = (randn(3, 5, 6), randn(3, 4, 6, seed=1)), randn(3, 4, 6, seed=2)
    expected = oracle(model, weighted_sum, inputs, target, reduction="sum")
    converted = px.convert(copy.deepcopy(model))
    weighted_sum(converted(*inputs), target).backward()
    assert_moments(converted, expected)
    assert converted.encoder.norm.batch_dim == converted.decoder.norm.batch_dim == (0 if batch_first else 1)


def test_in_eval_mode_the_fast_path_is_taken_as_in_the_stock_layer():
    torch.manual_seed(0)
    stock = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).eval()
    converted = px.convert(copy.deepcopy(stock)).eval()
    x, padding = torch.randn(3, 4, 8), PADDING[:, :4]
    with torch.no_grad(), torch.profiler.profile() as profile:
        y = converted(x, src_key_padding_mask=padding)
    names = {event.name for event in profile.events()}
    assert "aten::_transformer_encoder_layer_fwd" in names
    with torch.no_grad():
        assert torch.equal(y, stock(x, src_key_padding_mask=padding))
