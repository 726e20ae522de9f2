"""What happens to a converted model apart from training: copies, files, dtypes, state_dicts, conversion again."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from models import Net, backward, converted_net, half_square_mean, mlp, net_data, randn, squares
from torch import nn

import perexample as px
from perexample.testing import assert_moments, oracle


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class TestCopies:
    """What happens to a converted model apart from training."""

    @pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_file], ids=lambda f: f.__name__)
    @pytest.mark.parametrize("before_backward", [True, False])
    def test_a_copy_has_moments_of_its_own(self, copy_of, before_backward):
        model, (x, tokens, y) = converted_net(), net_data(5)
        expected = oracle(model, half_square_mean, (x, tokens), y)
        if not before_backward:
            backward(model, x, tokens, target=y)
        kept = None if before_backward else squares(model)
        twin = copy_of(model)
        assert all(p.sum_grad_squared is None for p in twin.parameters())
        twin.zero_grad()  # deepcopy copies p.grad
        backward(twin, x, tokens, target=y)
        assert_moments(twin, expected)
        assert twin._examples.total.item() == 5 and twin._examples is not model._examples
        if kept is not None:
            assert all(torch.equal(a, b) for a, b in zip(squares(model), kept, strict=True))
            assert model._examples.total.item() == 5
        model.zero_grad()
        backward(model, x, tokens, target=y)
        assert_moments(model, expected)

    def test_a_layer_copied_without_its_model(self):
        model = px.convert(mlp(torch.float64))
        layer = copy.deepcopy(model[2])
        x, y = randn(4, 8), randn(4, 3, seed=1)
        backward(layer, x, target=y)
        assert_moments(layer, oracle(layer, half_square_mean, x, y))

    @pytest.mark.parametrize("first", [False, True])
    def test_to_dtype(self, first):
        model = converted_net(torch.float32)
        if first:
            backward(model, *net_data(3, torch.float32)[:2], target=net_data(3, torch.float32)[2])
            model.zero_grad()
        model.double()
        x, tokens, y = net_data(5)
        backward(model, x, tokens, target=y)
        assert all(p.sum_grad_squared.dtype == torch.float64 for p in model.parameters())
        assert_moments(model, oracle(model, half_square_mean, (x, tokens), y))

    def test_to_device_meta_and_empty(self):
        model = px.convert(mlp()).to("meta").to_empty(device="cpu")
        model.load_state_dict(mlp(seed=3).state_dict())
        x, y = randn(5, 5, dtype=torch.float32), randn(5, 3, seed=1, dtype=torch.float32)
        backward(model, x, target=y)
        exact = oracle(model, half_square_mean, x, y)
        assert_moments(model, exact, oracle(model, half_square_mean, x, y, dtype=torch.float32))

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("first", [False, True], ids=["fresh", "used"])
    def test_load_state_dict(self, assign, first):
        model, source, (x, tokens, y) = converted_net(), converted_net(seed=1), net_data(5)
        if first:
            backward(model, x, tokens, target=y)
            model.zero_grad()
        model.load_state_dict(source.state_dict(), assign=assign)
        for p in model.parameters():
            p.requires_grad_()
        backward(model, x, tokens, target=y)
        assert_moments(model, oracle(source, half_square_mean, (x, tokens), y))

    def test_state_dict_interchange_with_the_stock_model(self):
        torch.manual_seed(5)
        stock, model = Net().double(), converted_net()
        assert list(stock.state_dict()) == list(model.state_dict())
        model.load_state_dict(stock.state_dict())
        x, tokens, _ = net_data(3)
        assert torch.equal(model(x, tokens), stock(x, tokens))
        other = converted_net(seed=6)
        stock.load_state_dict(other.state_dict())
        assert torch.equal(other(x, tokens), stock(x, tokens))

    def test_state_dict_loads_with_weights_only(self):
        model = converted_net()
        backward(model, *net_data(3)[:2], target=net_data(3)[2])
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())

    def test_converting_again_changes_nothing(self):
        model, (x, tokens, y) = converted_net(), net_data(5)
        hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
        assert px.convert(model) is model
        assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks
        backward(model, x, tokens, target=y)
        assert_moments(model, oracle(model, half_square_mean, (x, tokens), y))
        assert model._examples.total.item() == 5

    def test_parameters_and_hooks_stay_the_objects_that_they_are(self):
        model, calls = Net(), []
        parameters = list(model.parameters())
        model.fc.register_forward_hook(lambda *_: calls.append("fc"))
        px.convert(model)
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
        x, tokens, _ = net_data(2, torch.float32)
        model(x, tokens)
        assert calls == ["fc"]

    def test_a_parameter_put_in_place_of_another(self):
        model, x, y = px.convert(mlp(torch.float64)), randn(5, 5), randn(5, 3, seed=1)
        backward(model, x, target=y)
        model.zero_grad()
        model[0].weight = nn.Parameter(randn(8, 5, seed=2))
        backward(model, x, target=y)
        assert_moments(model, oracle(model, half_square_mean, x, y))
