"""What would make a second moment or an example count silently wrong raises, also where the guard could not see it.

The loss has gradients of mean zero, so that sums over examples stay far below what Cauchy and Schwarz allow.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import perexample as px
from perexample.testing import assert_moments, oracle

X, Y = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, 5, dtype=torch.float64)


def noise(output, target):
    return (output * target).sum(-1).mean()


class Parts(nn.Module):
    def __init__(self, forward=None):
        super().__init__()
        self.enc, self.dec = nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 5)
        self.call = forward or (lambda net, x: net.dec(net.enc(x)))

    def forward(self, x):
        return self.call(self, x)


def parts(forward=None):
    torch.manual_seed(0)
    return px.convert(Parts(forward).double())


def adam(model):
    return px.optim.Adam(model.parameters(), lr=1e-4, n_g=1000, n_s=1000)


@pytest.mark.parametrize("order", ["whole first", "parts first"])
def test_parts_called_one_after_another_count_each_example_once(order):
    torch.manual_seed(0)
    model = Parts().double()
    expected = oracle(model, noise, X, Y)
    steps = [lambda: px.convert(model), lambda: px.convert(model.enc), lambda: px.convert(model.dec)]
    for step in steps if order == "whole first" else steps[::-1]:
        step()
    noise(model.dec(model.enc(X)), Y).backward()
    assert_moments(model, expected)
    opt = adam(model)
    opt.step()
    assert {state["examples"].item() for state in opt.state.values()} == {16}


def test_examples_seen_follow_each_parameter_whatever_the_others_do():
    model = parts(lambda net, x: x)
    model.call = lambda net, x: sum(getattr(net, name)(x) for name in net.now)
    opt = adam(model)
    for now in (("enc", "dec"), ("dec",), ("enc", "dec"), ("enc",), ("dec",), ("enc", "dec")):
        model.now = now
        noise(model(X), Y).backward()
        opt.step()
        opt.zero_grad()
    assert opt.state[model.enc[0].weight]["examples"].item() == 4 * 16
    assert opt.state[model.dec.weight]["examples"].item() == 5 * 16


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part_converted", [True, False])
def test_checkpointing_a_part_or_the_whole_counts_once(reentrant, part_converted):
    inside = parts(lambda net, x: net.dec(checkpoint(net.enc, x, use_reentrant=reentrant)))
    whole = parts()
    if part_converted:
        px.convert(inside.enc)
        px.convert(whole.enc)
    for model, call in ((inside, inside), (whole, lambda x: checkpoint(whole, x, use_reentrant=reentrant))):
        x = X.clone().requires_grad_()
        for rows in (slice(0, 6), slice(6, 16)):
            (noise(call(x[rows]), Y[rows]) * len(x[rows]) / 16).backward()
        assert_moments(model, oracle(parts(), noise, X, Y))
        opt = adam(model)
        opt.step()
        assert {state["examples"].item() for state in opt.state.values()} == {16}


def eval_once(model):
    model.eval()
    noise(model(X), Y).backward()
    model.train()


def without_moments_once(model):
    with px.no_moments():
        noise(model(X), Y).backward()


def only_parameters_once(model):
    noise(model(X), Y).backward(inputs=list(model.parameters()))


def past_the_layer_once(model):
    noise(nn.functional.linear(model.enc(X), model.dec.weight), Y).backward()


@pytest.mark.parametrize(
    "other", [eval_once, without_moments_once, only_parameters_once, past_the_layer_once], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("first", [True, False])
def test_micro_batches_without_second_moments_raise(other, first):
    model = parts()
    opt = adam(model)
    if first:
        other(model)
    noise(model(X), Y).backward()
    if not first:
        other(model)
    with pytest.raises(RuntimeError, match=r"backward passes, its second moment in|backpropagated through outside"):
        opt.step()
    opt.zero_grad()
    noise(model(X), Y).backward()
    opt.step()


def test_a_change_of_dtype_between_micro_batches_raises():
    model = parts()
    noise(model(X), Y).backward()
    model.float().double()
    noise(model(X), Y).backward()
    with pytest.raises(RuntimeError, match="was accumulated in 2 backward passes, its second moment in 1"):
        adam(model).step()


def second_use_without_moments(net, x):
    h = net.dec(x)
    with px.no_moments():
        return net.dec(h)


def second_use_in_eval_mode(net, x):
    h = net.dec(x)
    net.dec.eval()
    h = net.dec(h)
    net.dec.train()
    return h


def second_use_in_a_reentrant_checkpoint(net, x):
    return checkpoint(net.dec, net.dec(x), use_reentrant=True)


def two_uses_in_a_reentrant_checkpoint(net, x):
    return checkpoint(lambda h: net.dec(net.dec(h)), x.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize(
    "forward",
    [
        second_use_without_moments,
        second_use_in_eval_mode,
        second_use_in_a_reentrant_checkpoint,
        two_uses_in_a_reentrant_checkpoint,
    ],
    ids=lambda f: f.__name__,
)
def test_a_second_use_is_refused_however_it_is_made(forward):
    with pytest.raises(ValueError, match=r"^dec was called twice in one forward pass"):
        parts(forward)(X.clone())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_second_use_in_compiled_code_is_refused_in_the_step():
    model = parts()
    compiled = torch.compile(model.dec, backend="aot_eager")
    model.call = lambda net, x: compiled(net.dec(x))
    noise(model(X), Y).backward()
    with pytest.raises(RuntimeError, match="was used more than once in one forward pass"):
        adam(model).step()


def test_a_use_without_gradients_beside_one_with_is_fine():
    def forward(net, x):
        with torch.no_grad():
            target = net.dec(x)
            target = target + net.dec(x)
        return net.dec(x) - target + 0 * net.enc(x)

    model = parts(forward)
    noise(model(X), Y).backward()
    adam(model).step()


def test_a_model_that_calls_itself_is_refused_and_can_be_called_again():
    model = parts(lambda net, x: net(x))
    with pytest.raises(RuntimeError, match=r"^Parts was called inside of its own forward pass"):
        model(X)
    model.call = lambda net, x: net.dec(net.enc(x))
    noise(model(X), Y).backward()
    adam(model).step()


@pytest.mark.parametrize("again", ["whole", "part"])
def test_an_input_from_an_earlier_pass_is_refused(again):
    model = parts()
    px.convert(model.dec)
    with pytest.raises(ValueError, match="an input was computed by an earlier forward pass through the same weights"):
        (model if again == "whole" else model.dec)(torch.tanh(model(X)))
    model(torch.tanh(model(X)).detach())


def test_an_unconverted_layer_used_twice_is_refused():
    layer = px.nn.Linear(5, 5).double()
    noise(layer(layer(X)), Y).backward()
    with pytest.raises(RuntimeError, match="was used more than once in one forward pass"):
        adam(layer).step(batch_size=16)


def test_an_unconverted_layer_goes_on_after_a_backward_that_raised():
    layer = px.nn.Linear(5, 5).double()
    expected = oracle(layer, noise, X, Y)

    def fail(grad):
        raise RuntimeError("stop")

    handle = layer.bias.register_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        noise(layer(X), Y).backward()
    handle.remove()
    for _ in range(2):
        layer.zero_grad()
        noise(layer(X), Y).backward()
        assert_moments(layer, expected)


def test_a_tensor_in_place_of_the_weight_is_refused():
    layer = nn.Linear(5, 5).double()
    weight = layer.weight.detach().clone().requires_grad_()
    del layer.weight
    layer.weight = weight
    with pytest.raises(ValueError, match="its weight is a tensor that is no parameter"):
        px.convert(nn.Sequential(layer))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_functional_call_is_refused(compiled):
    model = parts()
    doubled = {name: 2 * p for name, p in model.named_parameters()}

    def call(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))

    with pytest.raises(Exception, match="'weight' is no longer a plain parameter"):
        (torch.compile(call, backend="aot_eager") if compiled else call)(doubled, X)


def test_flattened_indices_are_asked_about_and_positions_are_not():
    tokens = torch.randint(50, (4, 6))

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 4)

        def forward(self, x, positions):
            return self.table(positions).expand(len(x), -1, -1)

    model = px.convert(Flat())
    with pytest.raises(ValueError, match=r"^table saw 24 indices in a batch of 4 examples: do they belong"):
        model(tokens, tokens.reshape(-1))
    assert model(tokens, torch.arange(8)).shape == (4, 8, 4)
    model.table.batched = False
    assert model(tokens, tokens.reshape(-1)).shape == (4, 24, 4)


def test_a_loss_that_bypasses_the_output_raises():
    model = parts()

    def forward(net, x):
        net.hidden = net.enc(x)
        return net.dec(net.hidden)

    model.call = forward
    opt = adam(model)
    noise(model(X), Y).backward()
    model(X)
    noise(model.hidden, Y).backward()
    with pytest.raises(
        RuntimeError, match="was backpropagated through outside of the converted model as well as inside"
    ):
        opt.step()


def test_the_warning_counts_accumulated_micro_batches():
    model = parts()
    opt = px.optim.Adam(model.parameters(), lr=1e-4, n_g=20, n_s=20)
    for _ in range(2):
        (noise(model(X), Y) / 2).backward()
    with pytest.warns(UserWarning, match="the batch of 32 examples is larger than the averaging time of 20"):
        opt.step()
