"""Weights that are used more than once in one forward pass: equal to the loop over examples."""

from __future__ import annotations

import copy

import pytest
import torch
from models import adam, assert_nothing_lost, backward, half_square_mean, randn, weighted_sum
from torch import nn
from torch.utils.checkpoint import checkpoint

import perexample as px
from perexample.testing import assert_moments, oracle


class Tied(nn.Module):
    """Tied embedding and head, and a linear layer and norm that are called twice. tokens (B, T)."""

    def __init__(self, bias=False, scale=1.0):
        super().__init__()
        self.token, self.fc, self.ln = nn.Embedding(11, 6, padding_idx=3), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head, self.scale = nn.Linear(6, 11, bias=bias), scale
        self.head.weight = self.token.weight

    def forward(self, tokens):
        h = self.token(tokens)
        for _ in range(2):
            h = h + self.ln(self.fc(h)).tanh()
        return self.scale * self.head(h)


class Loop(nn.Module):
    """`layer` three times, on rows of different numbers of positions."""

    def __init__(self, layer, *shapes):
        super().__init__()
        self.layer, self.shapes = layer, shapes

    def forward(self, x):
        parts = x.flatten(1).split([int(torch.tensor(s).prod()) for s in self.shapes], 1)
        outputs = [self.layer(part.unflatten(1, shape)) for part, shape in zip(parts, self.shapes, strict=True)]
        return torch.cat([(1 + i) * output.sin().flatten(1) for i, output in enumerate(outputs)], 1)


def loop_case(layer, *shapes, batch=4):
    torch.manual_seed(0)
    model = px.convert(Loop(layer, *shapes).double())
    x = randn(batch, sum(int(torch.tensor(s).prod()) for s in shapes))
    return model, x, randn(*model(x).shape, seed=1)


def check(model, x, y, loss_fn=weighted_sum, reduction="sum"):
    expected = oracle(model, loss_fn, x, y, reduction=reduction)
    model.zero_grad()
    loss_fn(model(*x) if isinstance(x, tuple) else model(x), y).backward()
    assert_moments(model, expected)
    assert all(not m.waiting for ref in model._examples.moments if (m := ref()) is not None)


LOOPS = {
    "Linear": (lambda: nn.Linear(3, 2), (3,), (4, 3), (2, 1, 3)),
    "Linear without bias": (lambda: nn.Linear(3, 2, bias=False), (3,), (3,), (3,)),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 5), (2, 4), (2, 3)),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3, groups=2), (2, 5, 4), (2, 3, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 3, 2), (2, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm((2, 3)), (2, 3), (4, 2, 3)),
    "RMSNorm": (lambda: nn.RMSNorm(3), (3,), (4, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 5), (4, 3, 2)),
    "InstanceNorm": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5), (4, 3)),
    "LSTMCell": (lambda: Cell(nn.LSTMCell), (3, 3), (2, 3)),
    "GRUCell": (lambda: Cell(nn.GRUCell), (3, 3), (2, 3)),
    "RNNCell": (lambda: Cell(nn.RNNCell, bias=False), (3, 3), (2, 3)),
    "PReLU": (lambda: nn.PReLU(), (3,), (4, 3), (2, 1, 3)),
    "PReLU of channels": (lambda: nn.PReLU(3), (3,), (3, 4), (3, 2, 2)),
    "Bilinear": (lambda: Pair(), (3,), (4, 3), (2, 1, 3)),
    "Bilinear without bias": (lambda: Pair(bias=False), (3,), (3,)),
    "LSTM": (lambda: First(nn.LSTM(3, 2, batch_first=True)), (3, 3), (2, 3)),
    "LSTM of all kinds": (
        lambda: First(nn.LSTM(3, 3, num_layers=2, bidirectional=True, proj_size=2, batch_first=True)),
        (3, 3),
        (2, 3),
    ),
    "GRU": (lambda: First(nn.GRU(3, 2, num_layers=2, batch_first=True)), (3, 3), (2, 3)),
    "RNN": (lambda: First(nn.RNN(3, 2, bias=False, batch_first=True)), (3, 3), (1, 3), (2, 3)),
    "MultiheadAttention to itself": (lambda: Attention(), (3, 4), (2, 4)),
    "MultiheadAttention to others": (lambda: Attention(memory=True), (3, 4), (2, 4)),
    "MultiheadAttention of all kinds": (
        lambda: Attention(memory=True, both=True, add_bias_kv=True, add_zero_attn=True),
        (3, 4),
        (2, 4),
    ),
    "MultiheadAttention of other widths": (lambda: Attention(memory=True, kdim=3, vdim=2, bias=False), (3, 4), (2, 4)),
}


class First(nn.Module):
    """All that a recurrent layer returns."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y, states = self.layer(x)
        states = states if isinstance(states, tuple) else (states,)
        return torch.cat([y.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


class Pair(nn.Module):
    """A bilinear layer. x (B, ..., 3)."""

    def __init__(self, bias=True):
        super().__init__()
        self.layer = nn.Bilinear(3, 2, 2, bias=bias)

    def forward(self, x):
        return self.layer(x, x[..., :2].cos())


class Attention(nn.Module):
    """Attention to the input, to something else, or first to one and then to the other. x (B, T, 4)."""

    def __init__(self, memory=False, both=False, **keywords):
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True, **keywords)
        self.memory, self.both = memory, both

    def forward(self, x):
        y = x
        if self.both or not self.memory:
            y, _ = self.layer(x, x, x, need_weights=False)
        if self.memory:
            key, value = x.cos()[..., : self.layer.kdim], x.sin()[..., : self.layer.vdim]
            y, _ = self.layer(y, key, value)
        return y


class Cell(nn.Module):
    """A recurrent cell in a loop. x (B, T, 3)."""

    def __init__(self, kind, **keywords):
        super().__init__()
        self.cell = kind(3, 2, **keywords)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("which", LOOPS)
@pytest.mark.parametrize("batch", [4, 1, 0])
def test_a_layer_called_several_times(which, batch):
    if which == "InstanceNorm" and batch == 0:
        pytest.skip("the stock layer takes no empty batch")
    make, *shapes = LOOPS[which]
    model, x, y = loop_case(make(), *shapes, batch=batch)
    check(model, x, y)


def tied_case(batch=5, **options):
    torch.manual_seed(0)
    model = px.convert(Tied(**options).double())
    return model, torch.randint(0, 11, (batch, 7)), randn(batch, 7, 11, seed=1)


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_tied_embedding_and_head(batch, bias):
    model, tokens, y = tied_case(batch, bias=bias)
    check(model, tokens, y)
    check(model, tokens, y)


def test_the_head_of_a_language_model_keeps_no_gradient_of_its_output():
    model, tokens, y = tied_case()
    kept = []

    def look(grad):
        waiting = [uses for waiting in model.token._moments["weight"].waiting.values() for uses in waiting]
        kept.extend(piece for uses in waiting for pieces in uses.pieces.values() for piece in pieces)

    model.ln.register_forward_hook(lambda module, args, output: output.register_hook(look) and None)
    weighted_sum(model(tokens), y).backward()
    assert kept
    for piece in kept:
        tensors = [t for value in vars(piece).values() for t in (value if isinstance(value, list) else [value])]
        assert all(t.numel() < y.numel() for t in tensors)


def test_several_heads_and_several_tables():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(9, 4), nn.Embedding(9, 4, padding_idx=2)
            self.c, self.d = nn.Linear(4, 9), nn.Linear(4, 9, bias=False)
            self.b.weight = self.c.weight = self.d.weight = self.a.weight

        def forward(self, tokens):
            h = self.a(tokens[:, :4]) + self.b(tokens[:, 4:])
            return torch.cat([self.c(h), self.d(h.tanh())[:, :3]], 1)

    torch.manual_seed(0)
    model, tokens = px.convert(Net().double()), torch.randint(0, 9, (5, 8))
    check(model, tokens, randn(5, 7, 9))


def test_a_weight_shared_with_a_module_of_the_fallback():
    class Scale(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x @ self.weight.t().exp() + x * self.weight[0]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.scale = Scale(self.fc.weight)

        def forward(self, x):
            return self.scale(self.fc(x)) + self.fc(x).sin()

    torch.manual_seed(0)
    check(px.convert(Net().double()), randn(3, 2, 4), randn(3, 2, 4, seed=1))


class Bags(nn.Module):
    """Three bags of one table, the last one weighted, beside what `partner` does with that table. indices (B, 9)."""

    def __init__(self, mode, partner=None, padding_idx=None):
        super().__init__()
        self.bag, self.partner = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=padding_idx), None
        if partner is not None:
            self.partner = nn.Embedding(7, 3) if partner == "look-up" else nn.Linear(3, 7)
            self.partner.weight = self.bag.weight

    def forward(self, indices, lengths):
        first, second = indices[:, :3], indices[:, 3:]
        inside = torch.arange(6) < lengths[:, None]  # some bags are empty
        offsets = lengths.cumsum(0) - lengths
        h = self.bag(first) + 2 * self.bag(second[inside], offsets)
        if self.bag.mode == "sum":
            h = h + self.bag(first, per_sample_weights=first.to(h.dtype).sin())
        if isinstance(self.partner, nn.Linear):
            return torch.cat([h, self.partner(h.sin())], 1)
        return h if self.partner is None else h + self.partner(second).sin().sum(1)


@pytest.mark.parametrize("batch", [5, 0])
@pytest.mark.parametrize("partner", [None, "look-up", "head"])
@pytest.mark.parametrize(("mode", "padding_idx"), [("sum", None), ("sum", 2), ("mean", 6), ("max", None), ("max", 2)])
def test_bags_of_one_table(mode, padding_idx, partner, batch):
    torch.manual_seed(0)
    model = px.convert(Bags(mode, partner, padding_idx).double())
    nn.init.normal_(model.bag.weight)
    inputs = torch.randint(0, 7, (batch, 9)), torch.randint(0, 7, (batch,))
    check(model, inputs, randn(*model(*inputs).shape, seed=1))


def test_one_activation_and_one_attention_throughout_a_net():
    class Net(nn.Module):
        """x (B, C, T)."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Conv1d(2, 4, 3), nn.Linear(3, 4), nn.PReLU()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.out = nn.Linear(4, 4)
            self.out.weight = self.attention.out_proj.weight
            self.twin = nn.Linear(4, 12)
            self.twin.weight = self.attention.in_proj_weight

        def forward(self, x):
            h = self.act(self.b(self.act(self.a(x))))
            h, _ = self.attention(h, h.sin(), h.cos())
            return self.twin(self.act(self.out(h)))

    torch.manual_seed(0)
    model = px.convert(Net().double())
    check(model, randn(3, 2, 5), randn(3, 4, 12, seed=1))
    stock = Net()
    stock.load_state_dict(model.state_dict())
    twin = px.convert(stock.bfloat16())
    x, y = randn(3, 2, 5, dtype=torch.bfloat16), randn(3, 4, 12, seed=1, dtype=torch.bfloat16)
    exact, rounded = (oracle(twin, weighted_sum, x, y, reduction="sum", dtype=d) for d in (torch.float64, x.dtype))
    backward(twin, x, target=y, loss_fn=weighted_sum)
    assert_moments(twin, exact, rounded)


def test_two_passes_before_one_backward_are_separate_examples():
    model, tokens, y = tied_case()
    once = oracle(model, weighted_sum, tokens, y, reduction="sum")
    (weighted_sum(model(tokens), y) + weighted_sum(model(tokens[:2]), y[:2])).backward()
    part = oracle(model, weighted_sum, tokens[:2], y[:2], reduction="sum")
    for name, p in model.named_parameters():
        expected = once[name].sum_grad_squared + part[name].sum_grad_squared
        torch.testing.assert_close(p.sum_grad_squared, expected, rtol=1e-12, atol=1e-12)
    assert model._examples.total.item() == 7


class Exits(nn.Module):
    """Three uses of one layer, of which the loss sees those that `seen` names."""

    def __init__(self, seen):
        super().__init__()
        self.fc, self.seen = nn.Linear(4, 4), seen

    def forward(self, x):
        outputs = [self.fc(x), self.fc(x.sin()), self.fc(x.cos())]
        return torch.stack([outputs[i] * (i + 1) for i in self.seen], 1)


@pytest.mark.parametrize("seen", [(0,), (2,), (0, 2), (2, 1), (0, 1, 2)])
def test_uses_without_a_gradient_add_nothing(seen):
    torch.manual_seed(0)
    model = px.convert(Exits(seen).double())
    check(model, randn(3, 4), randn(3, len(seen), 4, seed=1))


@pytest.mark.parametrize("inside", ["one", "each", "part"])
def test_checkpointing(inside):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.linspace(1, 2, 4))

        def forward(self, x):
            def block(h):
                return self.fc(h).sin() * self.scale

            if inside == "one":
                return checkpoint(lambda h: block(block(h)), x, use_reentrant=False)
            if inside == "each":
                return checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False)
            return block(checkpoint(block, x, use_reentrant=False))

    torch.manual_seed(0)
    model = px.convert(Net().double())
    for batch in (3, 1, 2):
        check(model, randn(batch, 2, 4), randn(batch, 2, 4, seed=1))


def test_accumulation_and_retained_graphs():
    model, tokens, y = tied_case()
    expected = oracle(model, weighted_sum, tokens, y, reduction="sum")
    for rows in (slice(0, 2), slice(2, 5)):
        weighted_sum(model(tokens[rows]), y[rows]).backward()
    assert_moments(model, expected)
    model.zero_grad()
    loss = weighted_sum(model(tokens), y)
    loss.backward(retain_graph=True)
    once = {name: p.sum_grad_squared.clone() for name, p in model.named_parameters()}
    loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.sum_grad_squared, 2 * once[name])


def test_autograd_grad_and_a_backward_that_raises_leave_nothing_behind():
    model, tokens, y = tied_case()
    loss = weighted_sum(model(tokens), y)
    torch.autograd.grad(loss, [model.fc.weight], retain_graph=True)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)

    def fail(grad):
        raise ArithmeticError

    handle = model.fc.bias.register_hook(fail)
    with pytest.raises(ArithmeticError):
        loss.backward()
    handle.remove()
    model.zero_grad()
    check(model, tokens, y)


def test_frozen_members():
    model, tokens, y = tied_case(bias=True)
    model.token.weight.requires_grad_(False)
    check(model, tokens, y)
    assert model.token.weight.sum_grad_squared is None


def test_half_precision_of_a_tied_model_is_within_the_budget():
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = px.convert(Tied().to(dtype))
        tokens, y = torch.randint(0, 11, (5, 7)), randn(5, 7, 11, dtype=dtype)
        exact, stock = (
            oracle(model, weighted_sum, tokens, y, reduction="sum", dtype=d) for d in (torch.float64, dtype)
        )
        backward(model, tokens, target=y, loss_fn=weighted_sum)
        assert_moments(model, exact, stock)


def test_copies_and_untying():
    model, tokens, y = tied_case()
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.token.weight
    check(twin, tokens, y)
    twin.head.weight = nn.Parameter(randn(11, 6))
    check(twin, tokens, y)
    check(model, tokens, y)
    model.token.weight = nn.Parameter(randn(11, 6, seed=2))
    check(model, tokens, y)
    model.head.weight = model.token.weight
    check(model, tokens, y)
    model.to(torch.float32).to(torch.float64)
    check(model, tokens, y)


def test_a_step_counts_each_example_once():
    model, tokens, y = tied_case()
    opt = adam(model)
    backward(model, tokens, target=y)
    opt.step()
    assert {state["examples"].item() for state in opt.state.values()} == {5}
    assert_nothing_lost(model, opt, tokens, y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
def test_in_compiled_code_a_shared_weight_is_refused():
    torch.compiler.reset()
    model, tokens, _ = tied_case()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="compiled code cannot add the uses of a shared weight per example"):
        compiled(tokens)


def test_a_loss_that_cancels_between_the_uses_gives_no_negative_moments():
    model, tokens, _ = tied_case(scale=1e-3)
    y = torch.zeros(5, 7, 11, dtype=torch.float64)
    half_square_mean(model(tokens), y).backward()
    assert all((p.sum_grad_squared >= 0).all() for p in model.parameters())
