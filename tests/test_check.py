"""`px.check`: a model that is served exactly passes, one whose second moments are silently wrong is found."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from models import Net, Turn, mlp, net_data, randn
from torch import nn

import perexample as px

SAME = 4  # examples, positions and features alike


class Model(nn.Module):
    def __init__(self, forward, layers=2, size=SAME):
        super().__init__()
        torch.manual_seed(0)
        self.body = forward
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(layers))

    def forward(self, *inputs):
        return self.body(*self.layers, *inputs)


def in_slices(first, second, x):
    h = first(x)
    y = h.new_empty(h.shape[1], h.shape[0], SAME)
    for i, row in enumerate(h):
        y[:, i] = row
    return second(y).transpose(0, 1)


def sorted_between(first, second, x):
    h = first(x).tanh()
    order = h.detach().flatten(1).sum(1).argsort()
    return first(h[order])[order.argsort()]


# What no layer notices, of inputs as many and as long as a batch has examples.
SILENT = {
    "changed and moved": lambda first, second, x, y: first((2 * x).transpose(0, 1).contiguous()).transpose(0, 1),
    "another input": lambda first, second, x, y: first(x) + second(y.transpose(0, 1).contiguous()).transpose(0, 1),
    "detached": lambda first, second, x, y: second(2 * first(x).detach().transpose(0, 1)).transpose(0, 1),
    "a custom function": lambda first, second, x, y: second(Turn.apply(first(x))).transpose(0, 1),
    "written into slices": lambda first, second, x, y: in_slices(first, second, x),
    "sorted between two uses": lambda first, second, x, y: sorted_between(first, second, x),
}
INPUTS = randn(SAME, SAME, SAME), randn(SAME, SAME, SAME, seed=1)


def summed(output):
    return (output * randn(*output.shape, seed=3)).square().sum()


@pytest.mark.parametrize("how", SILENT)
def test_what_no_layer_notices_is_found(how):
    model = px.convert(Model(SILENT[how]).double())
    model.register_forward_hook(lambda *_: None)  # else most of these are refused by forward
    summed(model(*INPUTS)).backward()  # nobody says a word
    text = r"(?s)moments of 2 of 4 .* loop over the 4 examples:\n  layers\.\d\.weight: [\d.]+ times.*gradients agree"
    with pytest.raises(ValueError, match=text):
        px.check(model, lambda m: summed(m(*INPUTS)))


def passes(model, loss, **options):
    found = px.check(model, loss, **options)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(difference < 1e-9 for difference in found.values()), found


class TestExactModels:
    def test_layers_of_all_kinds(self):
        x, tokens, y = net_data(3)
        passes(px.convert(Net().double()), lambda m: F.mse_loss(m(x, tokens), y.double()))

    def test_in_another_dtype(self):
        x, tokens, y = net_data(3, torch.float32)
        model = px.convert(Net())
        px.check(model, lambda m: F.mse_loss(m(x, tokens), y))
        passes(model, lambda m: F.mse_loss(m(x, tokens), y.double()), dtype=torch.float64)
        px.check(model.bfloat16(), lambda m: F.mse_loss(m(x.bfloat16(), tokens), y.bfloat16()))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_a_loss_made_in_the_model_and_other_outputs(self, reduction):
        def forward(first, second, x, y):
            h = second(first(x).tanh())
            return {"loss": F.mse_loss(h[:, 0], y[:, 0], reduction=reduction), "logits": h, "name": "a"}

        model = px.convert(Model(forward).double())
        passes(model, lambda m: m(*INPUTS)["loss"], reduction=reduction)
        with pytest.raises(ValueError, match="gradients differ too"):
            px.check(model, lambda m: m(*INPUTS)["loss"], reduction={"mean": "sum", "sum": "mean"}[reduction])

    def test_a_mean_over_tokens_of_unequal_numbers(self):
        labels = torch.tensor([[0, 1, 2, 3], [1, -100, -100, -100], [2, 2, -100, -100], [3, 0, 1, -100]])
        model = px.convert(Model(lambda first, second, x: second(first(x).tanh())).double())
        passes(model, lambda m: F.cross_entropy(m(INPUTS[0]).flatten(0, 1), labels.flatten()))

    def test_two_calls_and_parts_called_by_themselves(self):
        pair = px.convert(mlp(torch.float64))
        x, y = randn(4, 5), randn(3, 5, seed=1)
        passes(pair, lambda m: summed(m(x)) * summed(m(y)))
        whole = nn.ModuleDict({"encoder": mlp(torch.float64), "decoder": nn.Linear(3, 2).double()})
        for part in px.convert(whole).values():
            px.convert(part)
        passes(whole, lambda m: summed(m["decoder"](m["encoder"](x))))

    def test_sequences_first(self):
        model = px.convert(nn.LSTM(3, 4, bidirectional=True).double())
        passes(model, lambda m: sum(summed(part) for part in (m(randn(5, 3, 3))[0], *m(randn(5, 3, 3))[1])))

    def test_weights_that_change_in_forward_and_norms_in_eval_mode(self):
        model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)), nn.BatchNorm1d(5).eval())
        passes(px.convert(model.double()), lambda m: summed(m(randn(4, 5))))

    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    def test_weights_that_are_computed_in_forward(self):
        model = px.convert(nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 5)), nn.Tanh()).double())
        summed(model(randn(4, 5))).backward()
        passes(model, lambda m: summed(m(randn(4, 5))))

    def test_dropout_is_left_out(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.TransformerEncoderLayer(6, 2, 7, batch_first=True))
        passes(px.convert(model.double()), lambda m: summed(m(randn(3, 4, 6))))
        # A key's bias has no gradient but rounding errors, which are compared with the others' moments.
        px.check(model.float(), lambda m: summed(m(randn(3, 4, 6).float()).double()))


def test_the_model_is_left_as_it_is():
    model = px.convert(nn.Sequential(nn.Linear(5, 5), nn.Dropout(), nn.utils.spectral_norm(nn.Linear(5, 3))))
    x = randn(4, 5, dtype=torch.float32)
    summed(model(x).double()).backward()
    before = copy.deepcopy(model.state_dict())
    grads = [(p.grad.clone(), p.sum_grad_squared.clone()) for p in model.parameters()]
    random = torch.get_rng_state()
    px.check(model, lambda m: summed(m(x)))
    assert torch.equal(random, torch.get_rng_state()) and model[1].p == 0.5
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for p, (grad, square) in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad) and torch.equal(p.sum_grad_squared, square)


class TestErrors:
    def raises(self, text, model, loss, error=ValueError, **options):
        with pytest.raises(error, match=re.escape(text)):
            px.check(model, loss, **options)

    def test_arguments(self):
        model = px.convert(mlp())
        self.raises("must be converted (px.convert), got Linear", nn.Linear(2, 2), None, TypeError)
        self.raises("must be converted (px.convert), got int", 3, None, TypeError)
        self.raises("reduction must be 'mean' or 'sum', got 'max'", model, None, reduction="max")
        self.raises("model is in eval mode", copy.deepcopy(model).eval(), None)
        self.raises("did not call the model that it was given", model, lambda m: summed(model(torch.ones(3, 5))))

    def test_what_a_loop_cannot_follow(self):
        model, x = px.convert(mlp()), randn(4, 5, dtype=torch.float32)
        self.raises("at least 2 examples, the first input has 1 rows", model, lambda m: summed(m(x[:1])))
        self.raises("depends on 0.weight besides", model, lambda m: summed(m(x)) + m[0].weight.norm())
        rows = iter(range(2, 5))
        self.raises("had 2 examples, then 3", model, lambda m: summed(m(x[: next(rows)])))
        folded = px.convert(Model(lambda first, second, x: first(x) if len(x) > 1 else first(x)[:, :2]))
        self.raises("has shape (3, 4) for 3 examples, and (1, 2)", folded, lambda m: summed(m(torch.ones(3, SAME))))
        other = px.convert(Model(lambda first, second, x: [first(x)] * min(2, len(x))))
        self.raises("something else for one example", other, lambda m: summed(m(torch.ones(3, SAME))[0]))

    def test_random_numbers(self):
        model = px.convert(Model(lambda first, second, x: F.dropout(first(x))))
        self.raises("Model draws random numbers", model, lambda m: summed(m(torch.ones(3, SAME))))

    def test_interactions(self):
        model = px.convert(Model(lambda first, second, x: second(first(x) - first(x).mean(0))).double())
        self.raises("gradients differ too: the examples interact", model, lambda m: summed(m(INPUTS[0])))

    def test_what_the_layers_refuse(self):
        model = px.convert(Model(lambda first, second, x: second(first(x).flatten(0, 1))).double())
        self.raises("layers.1 saw 16 rows", model, lambda m: summed(m(INPUTS[0])))

    def test_a_note_where_the_model_cannot_run_on_one_example(self):
        model = px.convert(Model(lambda first, second, x: first(x).view(SAME, SAME)))
        with pytest.raises(RuntimeError) as raised:
            px.check(model, lambda m: summed(m(torch.ones(SAME, SAME))))
        assert "one example at a time" in raised.value.__notes__[0]


def test_a_forward_that_holds_on_to_the_model_is_refused():
    model = px.convert(Model(lambda first, second, x: second(first(x))).double())
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)  # of a copy it is still that of the model
    with pytest.raises(ValueError, match=r"px.check: the loss depends on layers\.0\.weight of the model itself"):
        px.check(model, lambda m: summed(m(INPUTS[0])))
    assert all(p.grad is None for p in model.parameters())
