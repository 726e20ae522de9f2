"""Where autograd's graph does not show the batch another example in the input does, and nobody notices the trial."""

from __future__ import annotations

import contextlib
import importlib
import random
import threading

import numpy
import pytest
import torch
import torch.nn.functional as F
from models import Turn, randn, weighted_sum
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import perexample as px
from perexample.testing import assert_moments, oracle

SAME = 4  # examples, positions and features alike
X = randn(SAME, SAME, SAME)


class Model(nn.Module):
    """A first layer, and a second one or a parameter of its own, as `body` uses them."""

    def __init__(self, body, fallback=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.first = nn.Linear(SAME, SAME)
        self.layer = nn.Linear(SAME, 3)
        self.scale = nn.Parameter(randn(SAME, seed=2).float()) if fallback else None
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []

    def second(self, x):
        return self.layer(x) if self.scale is None else x * self.scale

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        FORWARDS.append(x)
        return self.body(self, x)


FORWARDS: list[torch.Tensor] = []


@pytest.fixture(autouse=True)
def count_forwards():
    FORWARDS.clear()


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def columns(h):
    y = h.new_empty(h.shape[1], h.shape[0], *h.shape[2:])
    for i, row in enumerate(h):
        y[:, i] = row
    return y


def rows(h):
    y = h.new_empty(h.shape)
    for i, row in enumerate(h):
        y[i] = row.tanh()
    return y


def positions(m, x):
    return m.first(torch.eye(SAME).to(x).expand(len(x), -1, -1))


MOVED = {
    "joined": lambda m, x: m.second(positions(m, x) + (2 * x).transpose(0, 1)),
    "joined by a product": lambda m, x: m.second((positions(m, x) + 2) * x.transpose(0, 1).exp()),
    "joined behind another": lambda m, x: m.second(torch.cat([positions(m, x), x.transpose(0, 1)], 2)[..., 2:6]),
    "changed": lambda m, x: m.second((2 * x).transpose(0, 1).contiguous()),
    "standardised": lambda m, x: m.second(((x - 0.2) / 0.3).permute(2, 0, 1).clone()),
    "dropped out": lambda m, x: m.second(F.dropout(x).transpose(0, 1).contiguous()),
    "folded": lambda m, x: m.second((2 * x).transpose(0, 1).reshape(SAME, -1)[:, ::SAME]),
    "one-hot": lambda m, x: m.second(F.one_hot(x.argsort(-1)[..., 0].t(), SAME).to(x)),
    "detached": lambda m, x: m.second(2 * m.first(x).detach().transpose(0, 1)),
    "without gradients": lambda m, x: m.second(torch.no_grad()(m.first)(x).transpose(0, 1).contiguous()),
    "a custom function": lambda m, x: m.second(Turn.apply(m.first(x))),
    "columns written": lambda m, x: m.second(columns(m.first(x))),
    "columns of the input written": lambda m, x: m.second(columns(2 * x)),
    "two index tensors": lambda m, x: m.second(m.first(x)[torch.arange(SAME)[None], torch.arange(SAME)[:, None]]),
}
KEPT = {
    "joined": lambda m, x: m.second(positions(m, x) + (2 * x)),
    "changed": lambda m, x: m.second(2 * x),
    "other dimensions": lambda m, x: m.second((2 * x).transpose(1, 2)),
    "there and back": lambda m, x: m.second((2 * x).transpose(0, 1).contiguous().cumsum(0).transpose(0, 1)),
    "detached": lambda m, x: m.second(2 * m.first(x).detach()) + m.first(x)[..., :1],
    "a custom function": lambda m, x: m.second(Twice.apply(m.first(x))),
    "there and back by a custom function": lambda m, x: m.second(Turn.apply(m.first(x).transpose(0, 1))),
    "rows written": lambda m, x: m.second(rows(m.first(x))),
    "two index tensors": lambda m, x: m.second(
        m.first(x)[torch.arange(len(x))[:, None], torch.arange(SAME)[None].expand(len(x), -1)]
    ),
    "positions mixed": lambda m, x: m.second((2 * x).softmax(1) @ x.mT),
    "nothing of the input": lambda m, x: m.second(torch.eye(SAME).to(x).expand(len(x), -1, -1)) + m.first(x)[..., :1],
}


def convert(body, fallback=False):
    return px.convert(Model(body, fallback).double())


@pytest.mark.parametrize("fallback", [False, True], ids=["kernel", "fallback"])
class TestTheBatch:
    @pytest.mark.parametrize("how", MOVED)
    def test_moved_is_refused(self, how, fallback):
        model = convert(MOVED[how], fallback)
        name = "Model.scale" if fallback else "layer"
        with pytest.raises(
            ValueError, match=f"^{name} saw 4 rows, .* but dimension 0 is not the batch: another example"
        ):
            model(X)
        assert model._examples.batch is None  # the pass is over
        assert len(model.seen) == 1

    @pytest.mark.parametrize("how", KEPT)
    def test_kept_is_exact(self, how, fallback):
        model = convert(KEPT[how], fallback)
        output = model(X)
        weights = randn(*output.shape, seed=3)
        weighted_sum(output, weights).backward()
        looked = len(FORWARDS)
        assert_moments(model, oracle(model, weighted_sum, X, weights, reduction="sum"))
        # What no example changes a layer sees with fewer as well.
        alone = how == "joined" or (how == "nothing of the input" and not fallback)
        assert looked == 4 + alone  # it was not clear


def state(m, x):
    """Of the pass before: the examples' own rows, of as many as there were then."""
    m.state = m.second(getattr(m, "state", x.new_zeros(len(x), SAME)).detach() + 1)[:, :1].expand(-1, SAME)
    return m.state


WITHOUT_BATCH = {
    "a table": lambda m, x: m.second(torch.eye(SAME).to(x)),
    "a table of another width": lambda m, x: m.wide(torch.ones(SAME, 3).to(x)),
    "pairs of positions": lambda m, x: m.pairs((torch.arange(SAME)[:, None] - torch.arange(SAME)).abs()).squeeze(-1),
}
ROWS_OF_THE_BATCH = {
    "zeros": lambda m, x: m.second(x.new_zeros(len(x), SAME))[:, None],
    "noise": lambda m, x: m.second(torch.randn(len(x), SAME, generator=torch.Generator().manual_seed(0)).to(x))[
        :, None
    ],
    "kept": lambda m, x: state(m, x)[: len(x), None],
}


class WithTables(Model):
    """What it computes of x, plus what is computed of something else."""

    def __init__(self, body):
        super().__init__(body)
        self.wide, self.pairs = nn.Linear(3, 3), nn.Embedding(SAME, 1)

    def forward(self, x):
        return self.first(x)[..., :1] + self.body(self, x)


class TestWhatNoExampleChanges:
    @pytest.mark.parametrize("how", WITHOUT_BATCH)
    def test_rows_that_are_no_examples_are_refused(self, how):
        model = px.convert(WithTables(WITHOUT_BATCH[how]).double())
        with pytest.raises(
            ValueError, match=r"^\w+ saw 4 rows, .* with one example fewer they are as many; expand them"
        ):
            model(X)

    def test_pairs_of_positions_are_exact_where_it_is_said_that_they_have_no_batch(self):
        model = px.convert(WithTables(WITHOUT_BATCH["pairs of positions"]).double())
        model.pairs.batched = False
        self.check(model)

    def test_rows_that_follow_the_batch_are_exact(self):
        self.check(px.convert(WithTables(ROWS_OF_THE_BATCH["zeros"]).double()))

    @pytest.mark.parametrize("how", ["noise", "kept"])
    def test_what_follows_the_batch_and_what_is_kept_from_pass_to_pass_are_left_alone(self, how):
        model = px.convert(WithTables(ROWS_OF_THE_BATCH[how]).double())
        for _ in range(3):
            model(X).sum().backward()

    def test_objects_that_may_hold_examples_are_left_alone(self):
        class Rows:
            def __init__(self, rows):
                self.rows = rows

        class Net(WithTables):
            def forward(self, x, held):
                return self.first(x) + self.layer(held.rows)[: len(x), None, :1]

        px.convert(Net(None).double())(X, Rows(randn(SAME, SAME)))

    @staticmethod
    def check(model):
        output = model(X)
        weights = randn(*output.shape, seed=3)
        weighted_sum(output, weights).backward()
        assert_moments(model, oracle(model, weighted_sum, X, weights, reduction="sum"))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class TestNobodyNotices:
    def test_random_numbers_and_state(self, monkeypatch):
        def body(m, x):
            factor = random.random() + numpy.random.rand() + torch.rand(()).item()
            return m.second(F.dropout(factor * x.mul_(2)))

        results = []
        for look in (True, False):
            if not look:
                passes = importlib.import_module("perexample.convert.passes")
                monkeypatch.setattr(passes, "refuse_moved_batch", lambda *_: None)
            random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
            model, x = convert(body), X.clone()
            output = model(x)
            output.sum().backward()
            assert model.calls == 1 and len(model.seen) == 1 and torch.equal(x, 2 * X)
            after = random.random(), numpy.random.rand(), torch.rand(()).item()
            results.append(
                [after, output, model._examples.total, *(p.sum_grad_squared for p in model.layer.parameters())]
            )
        assert len(FORWARDS) == 4 + 1
        assert results[0][0] == results[1][0]
        for one, other in zip(*(result[1:] for result in results), strict=True):
            assert torch.equal(one, other)

    def test_large_tensors_are_not_copied_and_not_written_to(self, monkeypatch):
        influence = importlib.import_module("perexample.convert.influence")
        monkeypatch.setattr(influence, "_LARGE", 8 * 100)
        places = []

        def body(m, x):
            places.append(m.table.data_ptr())
            if m.writes:
                m.table += 1
            return m.second(2 * x + m.table.sum())

        for writes, forwards in ((False, 4), (True, 2)):  # the second one ends where it would write
            model = convert(body)
            model.table = torch.zeros(100, dtype=torch.float64)
            model.writes = writes
            model(X)
            assert len(set(places)) == 1 and len(places) == forwards
            assert model.table.eq(writes).all()
            places.clear()

    def test_it_is_tried_ever_more_rarely_and_only_where_it_is_unclear(self):
        model = convert(KEPT["changed"])
        for _ in range(9):
            model(X)
        assert len(FORWARDS) == 9 + 3 * 4
        FORWARDS.clear()
        model.body = lambda m, x: m.second(m.first(x).tanh() + 1)
        model(X)
        model.body = KEPT["changed"]
        model(randn(3, SAME, SAME))
        with torch.no_grad():
            model(X)
        with px.no_moments():
            model(X)
        assert len(FORWARDS) == 4

    def test_hooks_and_modes_of_others_are_left_alone(self):
        seen = []
        model = convert(MOVED["changed"])
        handle = model.layer.register_forward_hook(lambda *_: seen.append(1))
        model(X)
        assert len(seen) == len(FORWARDS) == 1
        handle.remove()
        for i, mode in enumerate((Dispatches(), torch.device("cpu"))):
            model._examples.unclear = 0
            with mode:
                model(X)
            assert len(FORWARDS) == 2 + i
        FORWARDS.pop()
        for _ in range(2):  # one more, and the pass after it
            with contextlib.suppress(ValueError):
                model(X)
        assert len(FORWARDS) == 4 + 3

    def test_what_cannot_be_repeated_gets_no_verdict(self):
        def once(m, x):
            if len(FORWARDS) > 1:
                raise RuntimeError("once only")
            return MOVED["changed"](m, x)

        assert convert(once)(X).shape == (SAME, SAME, 3)
        assert len(FORWARDS) == 2
        locked = convert(MOVED["changed"])
        locked.lock = threading.Lock()  # cannot be copied
        locked(X)
        assert len(FORWARDS) == 3

    @pytest.mark.parametrize("data", [False, True])
    @pytest.mark.parametrize("what", ["parameter", "buffer"])
    def test_what_forward_writes_to_the_model_itself_is_written_once(self, what, data):
        def body(m, x):
            target = m.first.bias if what == "parameter" else model.calls  # shared with copies; reached by a closure
            with torch.no_grad():
                torch._foreach_add_([target.data if data else target], 1)
            return m.second(2 * x)

        model = convert(body)
        target = model.first.bias if what == "parameter" else model.calls
        expected = 1 + target.detach() + (what == "buffer")
        model(X).sum().backward()
        assert len(FORWARDS) == 2  # the repetition ended where it would have written
        assert torch.equal(target, expected)

    def test_results_that_forward_keeps_do_no_harm(self):
        def body(m, x):
            m.kept = {"h": [m.first(x)]}
            return MOVED["changed"](m, x)

        model = convert(body)
        with pytest.raises(ValueError, match="another example"):
            model(X)
        assert model.kept["h"][0].grad_fn is not None

    def test_batches_that_interact_get_no_verdict(self):
        convert(lambda m, x: m.second((x - x.mean()).transpose(0, 1).contiguous()))(X)
        assert len(FORWARDS) == 4


class Several(nn.Module):
    """Of inputs in whatever structure."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second = body, nn.Linear(SAME, SAME), nn.Linear(SAME, SAME)

    def forward(self, *args, **kwargs):
        return self.body(self, *args, **kwargs)


Y = randn(SAME, SAME, SAME, seed=5)


class TestOtherInputs:
    @pytest.mark.parametrize("structure", ["positional", "by name", "nested"])
    def test_moved_is_refused(self, structure):
        def body(m, x, y):
            x, y = (x[0]["a"], y[0]) if structure == "nested" else (x, y)
            return m.first(x) + m.second(y.transpose(0, 1).contiguous()).transpose(0, 1)

        model = px.convert(Several(body).double())
        given = {"x": [{"a": X}], "y": (Y,)} if structure == "nested" else {"x": X, "y": Y}
        with pytest.raises(
            ValueError, match=r"^second saw 4 rows, .* but dimension 0 is not the batch: another example"
        ):
            model(*given.values()) if structure == "positional" else model(**given)

    def test_what_is_not_of_examples_may_be_anywhere(self):
        def body(m, x, y):  # a table of positions
            return m.first(x) * m.second((2 * y).expand(len(x), -1, -1))

        model = px.convert(Several(body).double())
        weights = randn(SAME, SAME, SAME, seed=3)
        (model(X, Y[0]) * weights).sum().backward()
        grad = model.second.weight.sum_grad_squared
        c = torch.einsum("bto,ti->boi", weights * model.first(X), 2 * Y[0])
        torch.testing.assert_close(grad, c.square().sum(0))


def shuffled(h):
    return h[torch.arange(len(h)).roll(1)]


def by_sum(h):
    order = h.detach().flatten(1).sum(1).argsort()
    return h[order]


REORDERED = {
    "indexed": lambda m, h: m.second(shuffled(m.second(h))),
    "sorted": lambda m, h: m.second(by_sum(m.second(h))),
    "flipped": lambda m, h: m.second(m.second(h).flip(0)),
    "rolled": lambda m, h: m.second(h) + m.second(h.roll(1, 0)),
    "selected": lambda m, h: m.second(torch.index_select(m.second(h), 0, torch.arange(len(h)).flip(0))),
    "joined": lambda m, h: m.second(torch.cat([(y := m.second(h))[1:], y[:1]])),
    "stacked": lambda m, h: m.second(torch.stack(list(m.second(h))[::-1])),
}
IN_ORDER = {
    "before the first use": lambda m, h: m.second(m.second(shuffled(h)).tanh()),
    "and back": lambda m, h: m.second(m.second(h).flip(0).tanh().flip(0)),
    "after the last use": lambda m, h: shuffled(m.second(m.second(h))),
    "of positions": lambda m, h: m.second(m.second(h)[:, torch.arange(SAME).flip(0)]),
    "by itself": lambda m, h: m.second(shuffled(h)),
    "of neighbours": lambda m, h: m.second(h) + m.second(h + shuffled(h.detach())),
}


class Reused(nn.Module):
    def __init__(self, body, fallback):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.fc = body, nn.Linear(SAME, SAME), nn.Linear(SAME, SAME)
        self.scale = nn.Parameter(randn(SAME, seed=2).float()) if fallback else None

    def second(self, h):
        return self.fc(h) if self.scale is None else h * self.scale

    def forward(self, x):
        FORWARDS.append(x)
        return self.body(self, self.first(x))


@pytest.mark.parametrize("fallback", [False, True], ids=["kernel", "fallback"])
class TestOrders:
    @pytest.mark.parametrize("batch", [3, SAME, 7])
    @pytest.mark.parametrize("how", REORDERED)
    def test_two_orders_are_refused(self, how, batch, fallback):
        model = px.convert(Reused(REORDERED[how], fallback).double())
        name = "Reused.scale" if fallback else "fc"
        with pytest.raises(ValueError, match=f"^{name}: .* uses its weight with the examples in different orders"):
            model(randn(batch, SAME, SAME))

    @pytest.mark.parametrize("batch", [3, SAME])
    @pytest.mark.parametrize("how", IN_ORDER)
    def test_one_order_is_exact(self, how, batch, fallback):
        model = px.convert(Reused(IN_ORDER[how], fallback).double())
        x, weights = randn(batch, SAME, SAME), randn(batch, SAME, SAME, seed=3)
        (model(x) * weights).sum().backward()
        if how in ("and back", "of positions"):
            assert_moments(model, oracle(model, weighted_sum, x, weights, reduction="sum"))


def test_orders_of_a_weight_in_two_layers():
    class Tied(nn.Module):
        def __init__(self, turn):
            super().__init__()
            self.turn, self.table, self.head = turn, nn.Embedding(9, SAME), nn.Linear(SAME, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            FORWARDS.append(tokens)
            return self.head(self.turn(self.table(tokens))).flip(0)

    tokens = torch.arange(15).view(3, 5) % 9
    with pytest.raises(ValueError, match=r"^head: .* \(one example is in row 2 here, in row 0 in table\), so that"):
        px.convert(Tied(lambda h: h.flip(0)).double())(tokens)
    FORWARDS.clear()
    px.convert(Tied(lambda h: h.flip(1)).double())(tokens)
    assert len(FORWARDS) == 4
    FORWARDS.clear()
    model = px.convert(Tied(lambda h: h).double())
    model.head.weight = nn.Parameter(torch.ones(9, SAME).double())  # a weight of its own
    model(tokens)
    assert len(FORWARDS) == 1


def test_the_copies_share_their_parameters():
    places = set()

    def body(m, x):
        places.add(m.layer.weight.data_ptr())
        return KEPT["changed"](m, x)

    convert(body)(X)
    assert len(FORWARDS) == 4 and len(places) == 1
