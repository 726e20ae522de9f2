"""Whole models from transformers, tiny and with random weights: every second moment, and the table of `dry_run`."""

from __future__ import annotations

import collections
import logging

import pytest
import torch
from golden_files import assert_golden
from models import randn, weighted_sum
from torch import nn

import perexample as px
from perexample.testing import assert_moments, oracle

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

BERT = {
    "vocab_size": 37,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VIT = {**BERT, "image_size": 8, "patch_size": 4, "num_labels": 5}
LLAMA = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "use_cache": False,
}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=37,
        n_positions=16,
        n_embd=12,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def t5():
    config = transformers.T5Config(
        vocab_size=37,
        d_model=12,
        d_kv=4,
        d_ff=20,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        dropout_rate=0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def convnext():
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
        image_size=16,
        num_labels=5,
        layer_scale_init_value=0.3,
    )
    return transformers.ConvNextForImageClassification(config)


# How the modules of each class are served, and how many there are. In float32 where the model itself rounds to it.
MODELS = {
    "GPT-2": (
        gpt2,
        "tokens",
        torch.float64,
        "Conv1D kernel 8, Embedding kernel 2, LayerNorm kernel 5, Linear kernel 1",
    ),
    "Llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
        "tokens",
        torch.float32,
        "Embedding kernel 1, Linear kernel 15, LlamaRMSNorm kernel 5",
    ),
    "Llama, tied": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
        "tokens",
        torch.float32,
        "Embedding kernel 1, Linear kernel 15, LlamaRMSNorm kernel 5",
    ),
    "BERT": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        "tokens",
        torch.float64,
        "BertLMPredictionHead exact fallback 1, Embedding kernel 3, LayerNorm kernel 4, Linear kernel 8",
    ),
    "BERT, classifier": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
        "tokens",
        torch.float64,
        "Embedding kernel 3, LayerNorm kernel 3, Linear kernel 8",
    ),
    "T5": (t5, "pairs", torch.float32, "Embedding kernel 5, Linear kernel 33, T5LayerNorm kernel 12"),
    "ViT": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)),
        "images",
        torch.float64,
        "Conv2d kernel 1, LayerNorm kernel 3, Linear kernel 7, ViTEmbeddings exact fallback 1",
    ),
    "ConvNeXt": (
        convnext,
        "images",
        torch.float64,
        "Conv2d kernel 4, ConvNextLayer exact fallback 2, ConvNextLayerNorm exact fallback 4, LayerNorm kernel 1, "
        "Linear kernel 5",
    ),
}


class Called(nn.Module):
    """The model as a function of one tensor."""

    def __init__(self, model, kind):
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x):
        if self.kind == "images":
            return self.model(pixel_values=x).logits
        if self.kind == "pairs":
            return self.model(input_ids=x[:, 0], decoder_input_ids=x[:, 1]).logits
        return self.model(input_ids=x).logits


def model_of(name):
    make, kind, dtype, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype).train()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.1)
            # Softmax takes no notice of it: its gradient is zero but for rounding.
            p.requires_grad_("k_proj.bias" not in parameter_name and "key.bias" not in parameter_name)
    return model, kind, dtype


@pytest.mark.parametrize("name", MODELS)
def test_how_each_module_is_served(name):
    table = px.convert(model_of(name)[0], dry_run=True)
    assert_golden(name, str(table))
    counts = collections.Counter(f"{row.class_name} {row.how}" for row in table)
    assert ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())) == MODELS[name][3]


@pytest.mark.parametrize("batch", [3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_every_second_moment_equals_the_loop_over_examples(name, batch):
    model, kind, dtype = model_of(name)
    if kind == "images":
        size = model.config.image_size
        x = randn(batch, 3, size, size, dtype=dtype)
    else:
        x = torch.randint(1, 37, (batch, 2, 5) if kind == "pairs" else (batch, 5))
    call = Called(px.convert(model), kind)
    output = call(x)  # with batches of 5 there are as many positions as examples
    y = randn(*output.shape, seed=1, dtype=dtype)
    exact, stock = (oracle(call, weighted_sum, x, y, reduction="sum", dtype=d) for d in (torch.float64, dtype))
    weighted_sum(output, y).backward()
    assert_moments(call, exact, stock)
    assert model._examples.total.item() == batch
