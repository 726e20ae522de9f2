"""As many positions as examples: a tensor whose batch stands elsewhere is refused, and nothing else is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import randn, weighted_sum
from torch import nn

import perexample as px
from perexample.testing import assert_moments, oracle

SAME = 4  # examples, positions and features alike
ORDER = torch.tensor([2, 0, 3, 1])


class Model(nn.Module):
    """A layer, then what is to be looked at, with a layer or a parameter of its own to meet it."""

    def __init__(self, forward, second=None):
        super().__init__()
        self.body = forward
        self.first = nn.Linear(SAME, SAME)
        self.second = second
        self.scale = nn.Parameter(randn(SAME, seed=2)) if second is None else None

    def forward(self, x):
        return self.body(self, self.first(x))


def convert(forward, second=None):
    torch.manual_seed(0)
    return px.convert(Model(forward, second).double())


MOVED = {
    "transpose": lambda h: h.transpose(0, 1),
    "permute": lambda h: h.permute(1, 0, 2),
    "permute after others": lambda h: (h.relu() + 1).permute(2, 0, 1).contiguous(),
    "movedim": lambda h: F.gelu(h.movedim(0, -1)),
    "einsum": lambda h: torch.einsum("btd->tbd", h),
    "residual": lambda h: h.transpose(0, 1) + h.transpose(0, 1).tanh(),
    "folded": lambda h: h.transpose(0, 1).reshape(SAME, SAME * SAME)[:, :SAME],
    "reduced": lambda h: h.transpose(0, 1).mean(2, keepdim=True).expand(-1, -1, SAME),
    "selected": lambda h: h.transpose(0, 1)[:, :, 0],
    "products": lambda h: (h @ h.mT).transpose(0, 2),
    "joined": lambda h: torch.cat([h.transpose(0, 1), h.transpose(0, 1)], 2)[..., :SAME],
    "stacked": lambda h: torch.stack([h[:, 0].t(), h[:, 1].t()], 1),
    "split": lambda h: h.transpose(0, 1).unbind(1)[0],
    "halves": lambda h: h.transpose(0, 1).chunk(2, 1)[0],
    "rolled": lambda h: h.transpose(0, 1).roll(1, 1),
    "indexed": lambda h: h.transpose(0, 1)[:, ORDER],
    "rows by index": lambda h: h.transpose(0, 1)[ORDER],
    "index_select": lambda h: h.transpose(0, 1).index_select(1, ORDER),
    "topk": lambda h: h.transpose(0, 1).topk(2, 1)[0],
    "maximum": lambda h: h.transpose(0, 1).max(1)[0],
    "deviation": lambda h: h.transpose(0, 1).std(1),
    "repeated": lambda h: h.transpose(0, 1).repeat(1, 2, 1),
    "pooled": lambda h: F.max_pool1d(h.transpose(0, 1), 1, stride=2).repeat(1, 1, 2),
    "enlarged": lambda h: F.interpolate(h.transpose(0, 1), scale_factor=2)[:, :, :SAME],
    "diagonal": lambda h: h.transpose(0, 1).diagonal(0, 1, 2),
    "windows": lambda h: h.transpose(0, 1).unfold(1, 2, 2)[..., 0],
    "positions stacked": lambda h: torch.stack([h[:, t] for t in range(SAME)]),
    "product of folded": lambda h: torch.tensordot(h.transpose(0, 1), torch.eye(SAME).double(), 1),
}
KEPT = {
    "as it is": lambda h: h,
    "there and back": lambda h: h.transpose(0, 1).tanh().transpose(0, 1),
    "other dimensions": lambda h: h.transpose(1, 2).contiguous(),
    "heads": lambda h: h.unflatten(2, (2, -1)).transpose(1, 2).softmax(-1).transpose(1, 2).flatten(2),
    "attention": lambda h: (
        F.scaled_dot_product_attention(*(h.unflatten(2, (2, 2)).transpose(1, 2),) * 3).transpose(1, 2).flatten(2)
    ),
    "scores": lambda h: (h @ h.mT).softmax(-1) @ h,
    "folded and back": lambda h: (h.flatten(0, 1).tanh() @ torch.eye(SAME).double()).view_as(h),
    "first position": lambda h: h[:, 0],
    "mean": lambda h: h.mean(1),
    "loop over positions": lambda h: torch.stack([row.tanh() for row in h.unbind(1)], 1),
    "joined": lambda h: torch.cat([h[:, :2], h[:, 2:].flip(1)], 1),
    "broadcast": lambda h: h + h.mean((1, 2))[:, None, None] + h[:, :1].squeeze(1).unsqueeze(1),
    "einsum": lambda h: torch.einsum("bij,bkj->bik", h, h),
    "padded": lambda h: F.pad(h, (0, 0, 1, 0))[:, :-1],
    "rows by index": lambda h: h[torch.arange(len(h))],
    "last positions": lambda h: h[torch.arange(len(h)), -1 * torch.ones(len(h)).long()],
    "examples stacked": lambda h: torch.stack([row.tanh() for row in h]),
    "product of folded": lambda h: torch.tensordot(h, torch.eye(SAME).double(), 1),
    "windows": lambda h: h.unfold(1, 2, 2).transpose(2, 3).flatten(1, 2),
}


class TestWithAKernel:
    @pytest.mark.parametrize("how", MOVED)
    def test_moved_is_refused(self, how):
        model = convert(lambda m, h: m.second(MOVED[how](h)), nn.Linear(SAME, 3))
        with pytest.raises(
            ValueError, match=r"second saw 4 rows, as many as the batch has examples, but dimension 0 is not the batch"
        ):
            model(randn(SAME, SAME, SAME))
        with px.no_moments():
            model(randn(SAME, SAME, SAME))

    @pytest.mark.parametrize("how", KEPT)
    def test_kept_is_exact(self, how):
        model = convert(lambda m, h: m.second(KEPT[how](h)), nn.Linear(SAME, 3))
        exact(model, randn(SAME, SAME, SAME))

    def test_the_message_says_what_moved_it(self):
        model = convert(lambda m, h: m.second(h.relu().permute(1, 0, 2).tanh()), nn.LayerNorm(SAME))
        with pytest.raises(ValueError, match="'permute' put another one there; keep the batch as dimension 0"):
            model(randn(SAME, SAME, SAME))

    def test_the_input_itself(self):
        layer = px.convert(nn.Sequential(Turned(), nn.Linear(SAME, 3)).double())
        for x in (randn(SAME, SAME, SAME), randn(SAME, SAME, SAME).requires_grad_(), randn(SAME, SAME, SAME) * 2):
            with pytest.raises(ValueError, match="as many as the batch has examples"):
                layer(x)
        tokens = torch.arange(SAME * SAME).view(SAME, SAME)
        with pytest.raises(ValueError, match="the batch is another dimension"):
            px.convert(nn.Sequential(Turned(), nn.Embedding(SAME * SAME, 3)))(tokens)

    def test_a_batch_second_model(self):
        model = px.convert(nn.Sequential(nn.Linear(SAME, SAME), Turned(), nn.Linear(SAME, 3)), batch_dim=1)
        with pytest.raises(ValueError, match="dimension 1 is not the batch: 'transpose' put another one there"):
            model(torch.randn(SAME, SAME, SAME))

    def test_recurrent_layers_and_bags_say_where_their_batch_is(self):
        model = convert(lambda m, h: m.second(m.scan(h)[0].transpose(0, 1)), nn.Linear(3, 3))
        model.scan = nn.GRU(SAME, 3, batch_first=True)
        with pytest.raises(ValueError, match="dimension 0 is not the batch"):
            px.convert(model.double())(randn(SAME, SAME, SAME))
        bags = px.convert(nn.Sequential(nn.EmbeddingBag(9, SAME), Turned(), nn.Linear(SAME, 3)))
        with pytest.raises(ValueError, match="dimension 0 is not the batch"):
            bags(torch.arange(8).view(SAME, 2))

    def test_sequence_first_recurrence_turns_its_input_by_right(self):
        model = convert(
            lambda m, h: m.second(h.transpose(0, 1))[0].transpose(0, 1), nn.LSTM(SAME, SAME, batch_first=False)
        )
        exact(model, randn(SAME, SAME, SAME))


COPIES = {
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "permuted": lambda x: x.permute(2, 0, 1).clone(),
    "einsum": lambda x: torch.einsum("btd->tbd", x).clone(),
    "stacked": lambda x: torch.stack([x[:, t] for t in range(SAME)]),
    "another dtype": lambda x: x.transpose(0, 1).float(),
    "without gradients": torch.no_grad()(lambda x: x.transpose(0, 1).contiguous()),
}


class Prepared(nn.Module):
    """Data in another order, and what meets it."""

    def __init__(self, order, layer):
        super().__init__()
        self.order, self.layer = order, layer

    def forward(self, x):
        return self.layer(self.order(x))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(SAME, seed=2).float())

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("layer", [nn.Linear(SAME, 3), Scaled()], ids=["kernel", "fallback"])
class TestCopiesOfTheInput:
    @pytest.mark.parametrize("how", COPIES)
    def test_moved_is_refused(self, how, layer):
        model = px.convert(Prepared(COPIES[how], copy.deepcopy(layer).to(COPIES[how](randn(SAME, SAME, SAME)).dtype)))
        with pytest.raises(ValueError, match="it is a copy of the model's input with its dimensions moved"):
            model(randn(SAME, SAME, SAME)).sum()

    @pytest.mark.parametrize("x", [randn(SAME, SAME, SAME), torch.ones(SAME, SAME, SAME).double()], ids=["any", "ones"])
    def test_kept_is_exact(self, x, layer):
        for order in (torch.clone, lambda x: x.transpose(1, 2).contiguous(), lambda x: 2 * x):
            exact(px.convert(Prepared(order, copy.deepcopy(layer).double())), x)


def test_indices_in_another_order_are_refused():
    tokens = torch.arange(SAME * SAME).view(SAME, SAME)
    with pytest.raises(ValueError, match="it is a copy of the model's input with its dimensions moved"):
        px.convert(Prepared(lambda x: x.t().contiguous(), nn.Embedding(SAME * SAME, 3)))(tokens)


class TestTheFallback:
    @pytest.mark.parametrize("how", MOVED)
    def test_moved_is_refused(self, how):
        model = convert(lambda m, h: MOVED[how](h) * m.scale)
        with pytest.raises(ValueError, match="as long as the batch but not the batch"):
            model(randn(SAME, SAME, SAME))

    @pytest.mark.parametrize("how", [how for how in KEPT if how not in ("rows by index", "last positions")])
    def test_kept_is_exact(self, how):
        exact(convert(lambda m, h: KEPT[how](h) * m.scale), randn(SAME, SAME, SAME))

    def test_a_view_of_the_input(self):
        class First(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale, self.fc = nn.Parameter(torch.ones(SAME)), nn.Linear(SAME, 3)

            def forward(self, x):
                return self.fc(x.transpose(0, 1) * self.scale)

        with pytest.raises(ValueError, match="the batch is another dimension"):
            px.convert(First())(torch.randn(SAME, SAME, SAME))


class Turned(nn.Module):
    """Exchanges the first two dimensions."""

    def forward(self, x):
        return x.transpose(0, 1)


def exact(model, x):
    output = model(x)
    weights = randn(*output.shape, seed=3)
    weighted_sum(output, weights).backward()
    assert_moments(model, oracle(model, weighted_sum, x, weights, reduction="sum"))
