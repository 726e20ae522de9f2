"""Modules without a kernel: served exactly by one copy of the parameter per example, or refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import adam, backward, randn, weighted_sum
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import perexample as px
from perexample.testing import assert_moments, oracle


class Own(nn.Module):
    """Parameters of the given shapes, a layer beside them, and whatever `compute(self, x, *parameters)` does."""

    def __init__(self, compute, *shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.fc, self.compute, self.n = nn.Linear(3, 3), compute, len(shapes)
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator)))
        self.register_buffer("index", torch.randint(0, 9, (5, 5), generator=generator))

    def forward(self, x):
        return self.compute(self, self.fc(x), *(getattr(self, f"p{i}") for i in range(self.n)))


def set_item(net, x, p):
    x = x * 1
    x[:, 0] = p
    x[x.detach()[..., 0] > 1] = p
    return x


def in_place(net, x, p):
    return x.mul(2).add_(p).mul_(p.sigmoid())


def mask_token(net, x, p):
    mask = (x.detach()[..., :1] > 0).to(x.dtype)
    return x * (1 - mask) + p.expand(len(x), x.shape[1], -1) * mask


def queries(net, x, p):
    q = net.fc(p).expand(len(x), -1, -1)
    return (q @ x.transpose(1, 2)).softmax(-1) @ x


def tokens(x):
    return (x.detach()[..., 0] * 3).long() % 5


def positions(x):
    return torch.arange(25.0, dtype=x.dtype).sin().view(5, 5)


# x is (B, 5, 3) and comes out of a layer.
CASES = {
    "cls and positions": (lambda n, x, c, p: torch.cat([c.expand(len(x), -1, -1), x], 1) + p, (1, 1, 3), (1, 6, 3)),
    "cls repeated": (lambda n, x, c: torch.cat([c.repeat(len(x), 1, 1), x], 1), (1, 1, 3)),
    "layer scale": (lambda n, x, g: x + g * x.sin(), (3,)),
    "layer scale by hand": (lambda n, x, g: x + g.view(1, 1, 3).exp() * x.sin(), (3,)),
    "positions without batch": (lambda n, x, p: x + p[: x.shape[1]], (7, 3)),
    "temperature": (lambda n, x, t: x / t.exp().clamp(max=100), ()),
    "linear": (lambda n, x, w, b: F.linear(x, w, b), (2, 3), (2,)),
    "low rank": (lambda n, x, a, b: x @ (a @ b), (3, 2), (2, 4)),
    "used twice": (lambda n, x, w: (x @ w).tanh() @ w.t(), (3, 4)),
    "einsum": (lambda n, x, w: torch.einsum("bti,oi->bto", x, w), (2, 3)),
    "einsum with an ellipsis": (lambda n, x, w: torch.einsum("...i,oi->...o", x, w), (2, 3)),
    "einsum of positions": (lambda n, x, w: torch.einsum("b...i,st->bs", x, w), (2, 4)),
    "matrix product": (lambda n, x, w: torch.mm(x[:, 1], w), (3, 2)),
    "matrix product and bias": (lambda n, x, w, b: torch.addmm(b, x[:, 1], w, beta=0.5, alpha=2), (3, 2), (2,)),
    "products of batches": (lambda n, x, w: torch.bmm(x, w.expand(len(x), 3, 2)), (3, 2)),
    "products of batches and bias": (lambda n, x, w, b: torch.baddbmm(b, x, w.expand(len(x), 3, 2)), (3, 2), (2,)),
    "look-up": (lambda n, x, w: x + F.embedding(tokens(x), w), (5, 3)),
    "look-up with padding": (lambda n, x, w: x + F.embedding(tokens(x), w, 2), (5, 3)),
    "look-up with padding from the end": (lambda n, x, w: x + F.embedding(tokens(x), w, padding_idx=-1), (5, 3)),
    "look-up by torch": (lambda n, x, w: x + torch.embedding(w, tokens(x), 4), (5, 3)),
    "look-up by torch without padding": (lambda n, x, w: x + torch.embedding(w, tokens(x)), (5, 3)),
    "bags": (lambda n, x, w: x + F.embedding_bag(tokens(x), w, mode="sum", padding_idx=2)[:, None], (5, 3)),
    "softmax mix": (lambda n, x, a: x * a.softmax(0)[0] + x.sin() * a.softmax(0)[1], (2,)),
    "chunks": (lambda n, x, a: (lambda s, t: x * s + t)(*a.chunk(2, -1)), (6,)),
    "relative positions": (
        lambda n, x, t: (x @ x.transpose(1, 2) + t[n.index].permute(2, 0, 1)[0]).softmax(-1) @ x,
        (9, 2),
    ),
    "attention bias": (
        lambda n, x, t: F.scaled_dot_product_attention(*[x[:, None]] * 3, attn_mask=t)[:, 0],
        (1, 1, 5, 5),
    ),
    "attention with a mask by name": (
        lambda n, x, q: F.scaled_dot_product_attention(q.expand(len(x), -1, -1), x, x, attn_mask=positions(x)),
        (5, 3),
    ),
    "attention by names": (
        lambda n, x, q: F.scaled_dot_product_attention(
            query=q.expand(len(x), 1, -1, -1), key=x[:, None], value=x[:, None], attn_mask=positions(x)
        )[:, 0],
        (5, 3),
    ),
    "product by names": (lambda n, x, w: torch.matmul(input=x, other=w), (3, 4)),
    "products of batches by name": (lambda n, x, w: torch.bmm(x, mat2=w.expand(len(x), 3, 2)), (3, 2)),
    "filled": (lambda n, x, p: x.masked_fill(x.detach() > 0, p), ()),
    "where": (lambda n, x, p: torch.where(x.detach()[..., :1] > 0, p, x), (3,)),
    "set item": (set_item, (3,)),
    "in place": (in_place, (3,)),
    "mask token": (mask_token, (1, 1, 3)),
    "learned queries": (queries, (1, 2, 3)),
    "a constant of as many rows as the batch": (
        lambda n, x, p: x + torch.arange(5.0, dtype=x.dtype)[:, None] * p,
        (3,),
    ),
    "row expanded to as many rows as the batch": (lambda n, x, p: x + p.expand(5, 3), (1, 3)),
    "dropout of the parameter": (lambda n, x, p: x * F.dropout(p, 0.0), (3,)),
    "control flow": (lambda n, x, p: x * p if float(p.detach().sum()) > 0 else x - p, (3,)),
    "statistics": (lambda n, x, p: x * (p - p.mean()) / (p.var() + 1), (3,)),
    "checkpoint": (lambda n, x, p: checkpoint(lambda h: (h * p).sin() * n.p0, x, use_reentrant=False), (3,)),
}


def check(model, x, y=None):
    y = randn(*model(x).shape, seed=1) if y is None else y
    expected = oracle(model, weighted_sum, x, y, reduction="sum")
    model.zero_grad()
    weighted_sum(model(x), y).backward()
    assert_moments(model, expected)


@pytest.mark.parametrize("which", CASES)
def test_what_a_module_does_with_its_parameters(which):
    compute, *shapes = CASES[which]
    model = px.convert(Own(compute, *shapes).double())
    for batch in (4, 5, 3, 2, 1):  # also as many as there are positions, or features
        check(model, randn(batch, 5, 3))


LEARNED = {
    "added": lambda n, x, q: n.pre(x) + n.fc(q),
    "added to data": lambda n, x, q: x + n.fc(q)[None],
    "through two layers": lambda n, x, q: n.ln(n.fc(q).tanh()) * n.pre(x),
    "through three": lambda n, x, q: n.ln(n.fc(n.ln(q)))[None] - n.pre(x),
    "product with data": lambda n, x, q: x @ n.fc(q).t(),
    "attended": lambda n, x, q: n.pre((n.fc(q).softmax(0) @ x.transpose(1, 2)) @ x),
    "expanded": lambda n, x, q: n.fc(n.ln(q).expand(len(x), -1, -1)).softmax(-1) * n.pre(x),
    "transposed": lambda n, x, q: n.fc(n.fc(q).t() @ q)[: x.shape[1]] + n.pre(x)[:, :3],
    "one row": lambda n, x, q: n.fc(q[0]) * n.pre(x),
    "row grown to positions": lambda n, x, q: n.pre(x) * n.fc(q[:1].expand(x.shape[1], 3)),
    "row repeated": lambda n, x, q: n.ln(n.fc(q[:1].repeat(x.shape[1], 1)).tanh()) + x,
    "scaled positions": lambda n, x, q: n.pre(x) - n.fc(torch.arange(x.shape[1], dtype=x.dtype)[:, None] * q[0]),
    "places in a plane": lambda n, x, q: n.pre(x) + n.fc(q[None].repeat(x.shape[1], 1, 1)).tanh().sum(1),
    "columns of a plane": lambda n, x, q: n.pre(x) + n.fc(q[None].repeat(x.shape[1], 1, 1)).permute(0, 2, 1)[:, 1, :],
    "attended in heads": lambda n, x, q: (
        n.fc(n.ln(q.expand(len(x), -1, -1))).view(len(x), 3, 3, 1).transpose(1, 2) * n.pre(x)[:, None]
    ).softmax(-1),
    "changed in place": lambda n, x, q: n.fc(q.expand(len(x), -1, -1)).add_(n.pre(x)),
    "cut in parts": lambda n, x, q: n.fc(q.expand(len(x), -1, -1)).chunk(3, -1)[1] * n.pre(x),
    "residual": lambda n, x, q: (lambda h: h + n.pre(n.ln(h).tanh()))(n.fc(q.expand(len(x), -1, -1))) * n.pre(x),
    "residual in a plane": lambda n, x, q: (
        n.pre(x) * (lambda h: h + n.pre(n.ln(h).tanh()))(n.fc(q[None].repeat(x.shape[1], 1, 1))).sum(1)
    ),
    "folded": lambda n, x, q: n.fc(q.expand(len(x), -1, -1)).view(-1, 3).view(len(x), -1, 3) * n.pre(x),
    "taken for the batch": lambda n, x, q: n.pre(x)[:, 0] + n.fc(q)[:1],
}


@pytest.mark.parametrize("which", LEARNED)
def test_a_parameter_without_batch_goes_through_layers_also_where_it_is_as_long_as_the_batch(which):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Parameter(torch.randn(3, 3))
            self.fc, self.pre, self.ln = nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3)

        def forward(self, x):
            return LEARNED[which](self, x, self.q)

    torch.manual_seed(0)
    model = px.convert(Net().double())
    for batch in (3, 1, 2, 4):
        check(model, randn(batch, 3, 3))


def test_what_was_changed_in_place_stays_the_batch():
    def compute(n, x, q):
        h = n.fc(q.expand(len(x), 3))
        h.mul_(2)
        h[:, 0] = 1
        return h * x.detach()[:, 0] if x.shape[1] == 4 else x + h

    model = px.convert(Own(compute, (1, 3)).double())
    check(model, randn(3, 4, 3))
    with pytest.raises(ValueError, match=r"p0: .*another place than the batch's \(it was changed in place\)"):
        model(randn(3, 3, 3))


class Fixed(nn.Module):
    """Layers that have one place for the batch; x comes out of a layer, and `q` is a parameter."""

    def __init__(self, compute, *shape):
        super().__init__()
        torch.manual_seed(0)
        self.compute, self.q = compute, nn.Parameter(torch.randn(shape))
        self.pre, self.conv, self.norm = nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4)
        self.mha, self.flat = nn.MultiheadAttention(4, 2, batch_first=True), nn.MultiheadAttention(4, 2)
        self.encode = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)
        self.rnn, self.cell = nn.GRU(4, 4, 2, batch_first=True), nn.LSTMCell(4, 4)
        self.pair, self.act = nn.Bilinear(4, 4, 4), nn.PReLU(4)

    def forward(self, x):
        return self.compute(self, self.pre(x), self.q)


ONE_PLACE = {
    "conv": lambda n, h: n.conv(h),
    "group norm": lambda n, h: n.norm(h),
    "attention": lambda n, h: n.mha(h, h, h)[0],
    "attention under a mask": lambda n, h: n.mha(h, h, h, attn_mask=torch.zeros(4, 4, dtype=h.dtype))[0],
    "attention's weights": lambda n, h: n.mha(h, h, h)[1],
    "encoder": lambda n, h: n.encode(h),
    "recurrent": lambda n, h: n.rnn(h)[0],
    "its state": lambda n, h: n.rnn(h)[1].transpose(0, 1),
    "cell": lambda n, h: n.cell(h[:, 0])[0][:, None],
    "its other state": lambda n, h: n.cell(h[:, 0])[1][:, None],
    "bilinear": lambda n, h: n.pair(h, h),
    "bilinear with data": lambda n, h: n.pair(h, torch.ones_like(h)),
    "prelu": lambda n, h: n.act(h),
}
SETS = {  # of three, whatever the batch
    "bare": ((3, 4, 4), lambda q: q),
    "expanded": ((1, 4, 4), lambda q: q.expand(3, -1, -1)),
    "repeated": ((4, 4), lambda q: q[None].repeat(3, 1, 1)),
    "scaled": ((1, 4, 4), lambda q: q * torch.arange(1.0, 4.0, dtype=q.dtype)[:, None, None]),
}
MIXED = {
    "mean": lambda x, o: x * o.mean(0).mean(),
    "one": lambda x, o: x * o[1].mean(),
    "folded": lambda x, o: x * o.flatten(0, 1).sum(0).mean(),
    "changed in place": lambda x, o: x * F.relu(o, inplace=True).mul_(2).mean(0).mean(),
    "changed in place before": lambda x, o: (o.mul_(2), x * o.mean(0).mean())[1],
}


@pytest.mark.parametrize("layer", ONE_PLACE)
@pytest.mark.parametrize("which", SETS)
def test_a_set_of_parameters_that_is_as_long_as_the_batch_is_not_taken_for_it(layer, which):
    shape, make = SETS[which]
    for mix in MIXED.values():
        model = px.convert(Fixed(lambda n, x, q, mix=mix: mix(x, ONE_PLACE[layer](n, make(q))), *shape).double())
        with pytest.raises(ValueError, match=r"^Fixed\.q: no way is known to give each example its own copy"):
            model(randn(3, 4, 4))


@pytest.mark.parametrize("layer", ["conv", "group norm", "attention", "encoder", "recurrent", "bilinear", "prelu"])
def test_a_parameter_expanded_to_the_batch_goes_through_layers_with_one_place_for_it(layer):
    def compute(n, x, q):
        return F.leaky_relu(ONE_PLACE[layer](n, q.expand(len(x), -1, -1)), inplace=True) * x

    model = px.convert(Fixed(compute, 1, 4, 4).double())
    for batch in (4, 3, 1):
        check(model, randn(batch, 4, 4))


STANDS = {  # where the batch is not the first dimension of the parameter
    "memory": (lambda n, x, q: n.flat(x[:, :2].transpose(0, 1), *[q.expand(-1, len(x), -1)] * 2)[0][0], (4, 1, 4)),
    "queries": (
        lambda n, x, q: n.flat(q.expand(-1, len(x), -1), *[x.transpose(0, 1)] * 2)[0].sum(0),
        (4, 1, 4),
    ),
    "initial state": (lambda n, x, q: n.rnn(x, q.expand(-1, len(x), -1))[0], (2, 1, 4)),
}


@pytest.mark.parametrize("which", STANDS)
@pytest.mark.parametrize("batch", [2, 3, 4])  # also as many as there are layers, or positions
def test_copies_are_given_to_a_layer_where_it_has_the_batch(which, batch):
    compute, shape = STANDS[which]
    check(px.convert(Fixed(compute, *shape).double()), randn(batch, 4, 4))


@pytest.mark.parametrize("attend", [lambda n, x, q: n.mha(x, x, x, attn_mask=q)[0], lambda n, x, q: n.encode(x, q)])
def test_a_mask_with_a_row_for_each_position_is_not_taken_for_the_batch(attend):
    model = px.convert(Fixed(attend, 4, 4).double())
    for batch in (4, 3):
        with pytest.raises(ValueError, match=r"^Fixed\.q: .* in (MultiheadAttention|Transformer\w+) \(argument"):
            model(randn(batch, 4, 4))


def test_a_layer_that_has_raised_forgets_the_copies_that_it_was_given():
    model = px.convert(Own(lambda n, x, p: x + n.fc(p), (3, 3)).double())
    with pytest.raises(RuntimeError):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(px.nn.linear.autograd, "linear", lambda *_: torch.empty(()).expand(2, 2).view(5))
            model(randn(2, 3, 3))
    assert not {"_copies_of", "_rows_of", "_was_lone"} & model.fc.__dict__.keys()
    check(model, randn(2, 3, 3))


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    def forward(self, tokens):
        return super().forward(tokens) * 3.0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_subclass_of_embedding_with_padding(tied, batch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = ScaledEmbedding(4, 5, padding_idx=1), nn.Linear(5, 4)
            if tied:
                self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens).tanh())

    model = px.convert(Net().double())
    check(model, torch.randint(0, 4, (batch, 6), generator=torch.Generator().manual_seed(0)))


def test_no_examples():
    model = px.convert(Own(*CASES["cls and positions"]).double())
    weighted_sum(model(randn(0, 5, 3)), randn(0, 6, 3)).backward()
    assert all(p.sum_grad_squared is None or not p.sum_grad_squared.any() for p in model.parameters())


REFUSED = {
    "sum over the batch": (lambda n, x, p: torch.cat([x, p[None, None].expand(1, 5, 3)], 0), "'cat'"),
    "folded": (lambda n, x, p: x.flatten(0, 1) * p, "in a batch of 4|where the batch has 4 examples"),
    "unknown": (lambda n, x, p: torch.kron(x, p), "'kron'"),
    "autograd function": (lambda n, x, p: Times.apply(x, p), "an autograd Function"),
    "look-up that mixes": (lambda n, x, p: F.embedding(tokens(x), p, scale_grad_by_freq=True), "scale_grad_by_freq"),
    "a product in place": (lambda n, x, p: x[:, 1].clone().addmm_(x[:, 0], p.expand(3, 3)), "'addmm'"),
    "by strides": (lambda n, x, p: x * p.as_strided((3,), (1,)), "'as_strided'"),
    "another layer's weight": (lambda n, x, p: (x * p) + p @ n.fc.weight, "a parameter read from another layer"),
    "copied into a tensor": (lambda n, x, p: x + torch.zeros(4, 5, 3, dtype=x.dtype).copy_(p), "in place"),
    "added to a tensor in place": (lambda n, x, p: x + torch.zeros(3, dtype=x.dtype).add_(p), "in place"),
    "a hook on its gradient": (lambda n, x, p: (p.register_hook(lambda grad: 2 * grad), x * p)[1], "'register_hook'"),
    "batch second": (lambda n, x, p: x.transpose(0, 1) * p, "where the batch has 4 examples"),
}


class Times(torch.autograd.Function):
    """A product that torch functions do not see."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return x * p

    @staticmethod
    def backward(ctx, grad):
        x, p = ctx.saved_tensors
        return grad * p, (grad * x).sum((0, 1))


@pytest.mark.parametrize("which", REFUSED)
def test_what_has_no_rule_is_refused_by_name(which):
    compute, message = REFUSED[which]
    model = px.convert(Own(compute, (3,)).double())
    with pytest.raises(ValueError, match=rf"^Own\.p0: no way is known to give each example .*({message})"):
        model(randn(4, 5, 3)).sum().backward()


def lora(layer):
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 3))

        def forward(self, weight):
            return weight + self.a @ self.b

    parametrize.register_parametrization(layer, "weight", Lora())
    return layer


COMPUTED = {
    "weight_norm, old": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm, old": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "lora": lora,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", COMPUTED)
def test_computed_weights(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), COMPUTED[wrap](nn.Linear(3, 3))).double()
    px.convert(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def forward(x):
        model.load_state_dict(buffers, strict=False)  # a power iteration moves on with each pass
        return model(x)

    x, y = randn(4, 3), randn(4, 3, seed=1)
    with px.no_moments():  # a loop by hand: modules that hold a computed tensor cannot be copied
        expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for b in range(4):
            model.zero_grad()
            weighted_sum(forward(x[b : b + 1]), y[b : b + 1]).backward()
            for name, p in model.named_parameters():
                expected[name] += p.grad.square()
    model.zero_grad()
    weighted_sum(forward(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.sum_grad_squared, expected[name])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_over_unequal_micro_batches(reentrant):
    class Net(nn.Module):
        def __init__(self, repeat=True):
            super().__init__()
            torch.manual_seed(0)
            self.own, self.repeat = Own(CASES["layer scale"][0], (3,)), repeat

        def forward(self, x):
            return checkpoint(self.own, x, use_reentrant=reentrant) if self.repeat else self.own(x)

    model = px.convert(Net().double())
    x, y = randn(6, 5, 3), randn(6, 5, 3, seed=1)
    expected = oracle(Net(False), weighted_sum, x, y, reduction="sum")
    for rows in (slice(0, 1), slice(1, 6)):
        weighted_sum(model(x[rows].requires_grad_()), y[rows]).backward()
    assert_moments(model, expected)
    losses = [weighted_sum(model(x[rows].requires_grad_()), y[rows]) for rows in (slice(0, 1), slice(1, 6))]
    with pytest.raises(RuntimeError, match=r"checkpointing repeats a forward pass of one of \[1, 5\] examples"):
        sum(losses).backward()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how):
    model = px.convert(nn.Sequential(nn.Linear(3, 3), nn.PReLU(), Scale()).double())
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    for net in (model, twin):
        check(net, randn(4, 3))
    assert type(twin[2]).__name__ == "Scale" and isinstance(twin[2], Scale)


class Scale(nn.Module):
    """A scale for each feature."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, 3))

    def forward(self, x):
        return x * self.weight


def test_a_part_called_by_itself_is_noticed_by_the_step():
    model = px.convert(nn.Sequential(nn.Linear(3, 3), Scale()).double())
    opt = adam(model)
    model[1](model(randn(4, 3))).sum().backward()
    with pytest.raises(RuntimeError, match="outside of the converted model as well as inside"):
        opt.step()


def test_eval_and_no_moments_leave_parameters_as_they_are():
    model = px.convert(nn.Sequential(nn.Linear(3, 3), Scale()).double())
    assert type(model[1].weight) is nn.Parameter
    for context in (px.no_moments(), torch.no_grad()):
        with context:
            assert type(model(randn(2, 3))) is torch.Tensor
    model.eval()
    model(randn(2, 3)).sum().backward()
    assert model[1].weight.sum_grad_squared is None


def test_large_copies_are_announced_once(monkeypatch):
    monkeypatch.setattr(px.nn.fallback, "_LARGE", 64)
    model = px.convert(nn.Sequential(nn.Linear(3, 3), Scale()).double())
    with pytest.warns(
        UserWarning, match=r"^1\.weight: the exact fallback keeps one gradient per example.*0 MB for 4 ex"
    ):
        model(randn(4, 3))
    model(randn(4, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_around_the_fallback():
    torch.compiler.reset()
    model = px.convert(nn.Sequential(nn.Linear(3, 3), Scale(), nn.Linear(3, 2)).double())
    x, y = randn(4, 3), randn(4, 2, seed=1)
    expected = oracle(model, weighted_sum, x, y, reduction="sum")
    backward(torch.compile(model, backend="aot_eager"), x, target=y, loss_fn=weighted_sum)
    assert_moments(model, expected)


class TestBatchNorm:
    """Refused, replaced, or in eval mode served."""

    @pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
    def test_group_norm_in_its_place(self, norm):
        model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm(6), nn.Flatten(), nn.BatchNorm1d(54, affine=False))
        weight = model[1].weight
        assert [str(row) for row in px.convert(model, dry_run=True, batchnorm="group")][1:] == [
            f"1 ({norm.__name__}): 3 groups; running statistics dropped",
            "3 (BatchNorm1d): 27 groups; running statistics dropped",
        ]
        px.convert(model.double(), batchnorm="group")
        assert isinstance(model[1], nn.GroupNorm) and model[1].weight is weight
        assert set(model.state_dict()) == {"0.weight", "1.weight", "1.bias"}
        check(model, randn(3, 3, 5, 5))


SEQUENCE_FIRST = {
    "embeddings": lambda n, h: n.own(h)[0],
    "bilinear": lambda n, h: n.own(n.pair(h.sin(), h.cos()).tanh())[1],
    "bilinear of rows": lambda n, h: n.pair(h[0], h[2]),
    "bilinear of more positions": lambda n, h: n.pair(h[:, :, None].sin(), h[:, :, None]).sum(2)[1],
    "prelu": lambda n, h: n.act(h).sin().sum(0),
    "prelu of rows": lambda n, h: n.act(h[1]),
    "prelu of channels, batch first": lambda n, h: n.acts(h.permute(1, 2, 0)).sum(2),
}


@pytest.mark.parametrize("which", SEQUENCE_FIRST)
@pytest.mark.parametrize("batch", [4, 5, 1, 3])
def test_sequence_first_models(batch, which):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.place = nn.Embedding(9, 3), nn.Embedding(5, 3)
            self.fc, self.ln, self.own, self.head = nn.Linear(3, 3), nn.LayerNorm(3), Scale(), nn.Linear(3, 2)
            self.pair, self.act, self.acts = nn.Bilinear(3, 3, 3), nn.PReLU(), nn.PReLU(3)

        def forward(self, tokens):
            h = self.token(tokens) + self.place(torch.arange(5)[:, None])
            return self.head(SEQUENCE_FIRST[which](self, self.ln(self.fc(h).tanh())))

    torch.manual_seed(0)
    model = px.convert(Net().double(), batch_dim=1)
    tokens, y = torch.randint(0, 9, (5, batch)), randn(batch, 2)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with px.no_moments():
        for b in range(batch):
            model.zero_grad()
            weighted_sum(model(tokens[:, b : b + 1]), y[b : b + 1]).backward()
            for name, p in model.named_parameters():
                expected[name] += 0 if p.grad is None else p.grad.square()
    model.zero_grad()
    weighted_sum(model(tokens), y).backward()
    for name, p in model.named_parameters():
        square = p.sum_grad_squared
        torch.testing.assert_close(torch.zeros_like(p) if square is None else square, expected[name])
    assert model._examples.total.item() == batch


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.EmbeddingBag(5, 3), (4, 2), r"EmbeddingBag\): is served with the batch as dimension 0 only.*batch_dim=1"),
        (nn.PReLU(2), (4, 2, 3), r"saw 4 rows, the batch has 2 examples.*the batch is not dimension 0"),
        (nn.PReLU(), (2, 4, 3), r"saw 4 rows, the batch has 2 examples.*the batch is not dimension 1"),
    ],
)
def test_what_has_the_batch_first_in_any_case_is_refused_in_a_sequence_first_model(layer, shape, message):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, time_first, x):
            return self.layer(x)

    model = px.convert(Net().double(), batch_dim=1)
    x = torch.zeros(shape, dtype=torch.long) if isinstance(layer, nn.EmbeddingBag) else randn(*shape)
    with pytest.raises(ValueError, match=message):
        model(randn(4, 2, 3), x)


def test_a_recipe_for_a_class_of_ones_own():
    class Project(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))

        def forward(self, x):
            return F.linear(x, self.weight)

    class MomentProject(px.nn.MomentModule, Project):
        def forward(self, x):
            if not self._tracking(x, 2, "weight"):
                return super().forward(x)
            return px.autograd.linear(x, self.weight, None, *self._leaves("weight", "bias"))

    assert px.convert(Project(), dry_run=True)[0].how == "exact fallback"
    px.register(Project, MomentProject)
    model = px.convert(Project().double())
    assert type(model) is MomentProject
    check(model, randn(4, 3))
    for arguments in ((Project, Project), (Project, px.nn.Linear), (3, MomentProject)):
        with pytest.raises(TypeError, match=r"^px\.register: "):
            px.register(*arguments)


class RootNorm(nn.Module):
    """Named like a norm by the root of the mean square, and one in eval mode."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(3)), 1e-6

    def forward(self, x):
        y = self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return y.relu() if self.training else y


RootNorm.__name__ = "DropRMSNorm"


def test_a_lookalike_in_eval_mode_alone_gets_no_kernel():
    for training in (True, False):
        model = nn.Sequential(RootNorm()).train(training)
        assert px.convert(model, dry_run=True)[0].how == "exact fallback"
        assert model[0].training is training


class PlainNorm(RootNorm):
    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


PlainNorm.__name__ = "PlainRMSNorm"


def test_a_lookalike_converted_by_itself_gets_its_kernel_and_its_hooks_see_no_probe():
    model, seen = PlainNorm().double(), []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    model.register_forward_hook(lambda *_: seen.append(2))
    for _ in range(2):  # before and after
        assert px.convert(model, dry_run=True)[0].how == "kernel"
        px.convert(model)
    assert not seen
    check(model, randn(4, 3))
    assert seen[:2] == [1, 2]


class TimesInput(nn.Module):
    """A parameter of the fallback, and a first input that need not have the batch."""

    def __init__(self, loss=False, embed=None):
        super().__init__()
        self.weight = nn.Parameter(randn(5, 3))
        self.loss, self.embed = loss, embed

    def forward(self, scale, x):
        y = x @ self.weight * (scale if self.embed is None else self.embed(scale))
        return y.sum() if self.loss else y


def test_a_first_input_of_one_row_beside_a_batch_is_refused():
    model, x = px.convert(TimesInput().double()), randn(4, 5)
    with pytest.raises(ValueError, match=r"^TimesInput: its first input has 1 row, .* output have 4; pass"):
        model(torch.ones(1, dtype=x.dtype), x)
    model(torch.ones(4, 1, dtype=x.dtype), x).sum().backward()
    expected = x.square().T @ torch.ones(4, 3, dtype=x.dtype)
    torch.testing.assert_close(model.weight.sum_grad_squared, expected)
    with pytest.raises(ValueError, match=r"^TimesInput: its first input has 1 row, .* another input has 4; pass"):
        px.convert(TimesInput(loss=True).double())(torch.ones(1, dtype=x.dtype), x)
    with pytest.raises(ValueError, match=r"^TimesInput: its first input has 1 row, .* output have 4; pass"):
        px.convert(TimesInput(embed=nn.Embedding(2, 3)).double())(torch.ones(1, dtype=torch.long), x)
    model.zero_grad()
    model(torch.ones(1, dtype=x.dtype), x[:1]).sum().backward()  # one example
    torch.testing.assert_close(model.weight.sum_grad_squared, x[:1].square().T.expand(5, 3))
