"""The cells of recurrent layers against the same step in float64 and its gradients."""

import pytest
import torch
from opchecks import LAYOUTS, both, check_tensor, every_dtype, implementation, kernel, needs_extension, relaid, wide

from perexample import ops

SHAPES = [(0, 3), (1, 1), (3, 4), (5, 16), (2, 17), (4, 33), (60, 300), (900, 20)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def lstm(gates, cell):
    """Activated gates, the state after the step, h."""
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    state = f * cell + i * g
    return torch.cat((i, f, g, o), 1), state, o * state.tanh()


def gru(gates, hidden, state):
    """h from the sums of r and z, n's product with the input and with the state."""
    r, z, n = gates.chunk(3, 1)
    r, z = (r + hidden[0]).sigmoid(), (z + hidden[1]).sigmoid()
    n = (n + r * hidden[2]).tanh()
    return torch.cat((r, z, n), 1), (1 - z) * n + z * state


def randn(shape, dtype, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def poison(like):
    return torch.full_like(like, float("nan"))


@both
@every_dtype
@shapes
def test_lstm_cell_cases_equal_the_formula(which, dtype, shape):
    gates, cell = randn((shape[0], 4 * shape[1]), dtype, 3.0), randn(shape, dtype)
    exact, stock = (lstm(gates.to(d), cell.to(d)) for d in (torch.float64, wide(dtype)))
    results = gates.clone(), poison(cell), poison(cell)
    implementation("lstm_cell_", which)(results[0], cell, *results[1:])
    for what, result, e, s in zip(("gates", "state", "h"), results, exact, stock, strict=True):
        check_tensor(result, e, s, dtype, what)


@needs_extension
def test_lstm_cell_at_the_ends_of_the_range():
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-4, 1e-4, 0.3, -20.0, 50.0, -88.0, 90.0, 1e4, -1e30, float("inf")])
    gates, cell = torch.cat([values, -values])[None].repeat(1, 4), torch.zeros(1, 26)
    expected = lstm(gates.double(), cell.double())[0]
    state, h = poison(cell), poison(cell)
    kernel("lstm_cell_")(gates, cell, state, h)
    eps = torch.finfo(torch.float32).eps
    # Relative, but for what is smaller than a sigmoid of -87.
    assert ((gates - expected).abs() <= 4 * eps * expected.abs() + 1e-37).all()
    gates = torch.full((1, 4), float("nan"))
    kernel("lstm_cell_")(gates, cell[:, :1], state[:, :1], h[:, :1])
    assert gates.isnan().all() and state[0, 0].isnan() and h[0, 0].isnan()


@both
@every_dtype
@shapes
def test_lstm_cell_backward_cases_equal_the_formula(which, dtype, shape):
    before, cell, dh, dc = (randn((shape[0], n * shape[1]), dtype) for n in (4, 1, 1, 1))
    activated, state, _ = lstm(before.to(wide(dtype)), cell.to(wide(dtype)))
    activated, state = activated.to(dtype), state.to(dtype)

    def backward(d):
        i, f, g, o = activated.to(d).chunk(4, 1)
        squashed = state.to(d).tanh()
        dc_after = dc.to(d) + dh.to(d) * o * (1 - squashed.square())
        dgates = (dc_after * g * i * (1 - i), dc_after * cell.to(d) * f * (1 - f), dc_after * i * (1 - g.square()))
        return torch.cat((*dgates, dh.to(d) * squashed * o * (1 - o)), 1), dc_after * f

    exact, stock = backward(torch.float64), backward(wide(dtype))
    results = poison(activated), dc.clone()
    implementation("lstm_cell_backward_", which)(*results, dh, activated, state, cell)
    for what, result, e, s in zip(("dgates", "dc"), results, exact, stock, strict=True):
        check_tensor(result, e, s, dtype, what)


def test_lstm_cell_backward_is_the_gradient_of_the_cell():
    gates, cell = randn((3, 20), torch.float64).requires_grad_(), randn((3, 5), torch.float64).requires_grad_()
    dh, dc = randn((3, 5), torch.float64), randn((3, 5), torch.float64)
    activated, state, h = lstm(gates, cell)
    expected = torch.autograd.grad((h, state), (gates, cell), (dh, dc))
    dgates = poison(gates)
    ops.lstm_cell_backward_(dgates, dc, dh, activated.detach(), state.detach(), cell.detach())
    torch.testing.assert_close((dgates, dc), expected)


def test_gru_cell_backward_is_the_gradient_of_the_cell():
    gates, hidden = (randn((3, 15), torch.float64).requires_grad_() for _ in range(2))
    state, dh = randn((3, 5), torch.float64).requires_grad_(), randn((3, 5), torch.float64)
    activated, h = gru(gates, hidden.chunk(3, 1), state)
    expected = torch.autograd.grad(h, (gates, hidden, state), dh)
    dgates, dhidden = poison(gates), poison(gates)
    ops.gru_cell_backward_(dgates, dhidden, dh, activated.detach(), hidden.detach()[:, 10:], state.detach())
    torch.testing.assert_close((dgates, dhidden, dh), expected)


@both
@every_dtype
@shapes
def test_gru_cell_backward_cases_equal_the_formula(which, dtype, shape):
    activated = torch.rand(shape[0], 3 * shape[1]).to(dtype)
    hidden, state, dh = (randn(shape, dtype) for _ in range(3))

    def backward(d):
        r, z, n = activated.to(d).chunk(3, 1)
        new = dh.to(d) * (1 - z) * (1 - n.square())
        new_r, new_z = new * hidden.to(d) * r * (1 - r), dh.to(d) * (state.to(d) - n) * z * (1 - z)
        return torch.cat((new_r, new_z, new), 1), torch.cat((new_r, new_z, new * r), 1), dh.to(d) * z

    exact, stock = backward(torch.float64), backward(wide(dtype))
    results = poison(activated), poison(activated), dh.clone()
    implementation("gru_cell_backward_", which)(*results, activated, hidden, state)
    for what, result, e, s in zip(("dgates", "dhidden", "dh"), results, exact, stock, strict=True):
        check_tensor(result, e, s, dtype, what)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout):
    def run(lay):
        torch.manual_seed(0)
        tensors = [lay(torch.rand(3, n * 5)) for n in (4, 1, 1, 4, 1, 1)]
        forward = [lay(torch.rand(3, n * 5)) for n in (4, 1, 1, 1)]
        gated = [lay(torch.rand(3, n * 5)) for n in (3, 3, 1, 3, 1, 1)]
        ops.lstm_cell_backward_(*tensors)
        ops.lstm_cell_(*forward)
        ops.gru_cell_backward_(*gated)
        return [*tensors, *forward, *gated]

    for odd, plain in zip(run(lambda t: relaid(t, layout)), run(lambda t: t), strict=True):
        assert torch.equal(odd, plain)


S = torch.ones(2, 3)
ERRORS = [
    (ops.lstm_cell_, (S.repeat(1, 3), S, S, S), ValueError, "lstm_cell_: gates must be (2, 12), got (2, 9)"),
    (ops.lstm_cell_, (S.repeat(1, 4), S[0], S, S), ValueError, "lstm_cell_: cell must be of shape (B, H), got (3,)"),
    (
        ops.lstm_cell_backward_,
        (S.repeat(1, 4), S, S, S.repeat(1, 4), S, S.double()),
        TypeError,
        "lstm_cell_backward_: cell must be torch.float32 like dh, got torch.float64",
    ),
    (
        ops.gru_cell_backward_,
        (S.repeat(1, 3), S, S, S.repeat(1, 3), S, S),
        ValueError,
        "gru_cell_backward_: dhidden must be (2, 9), got (2, 3)",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), ERRORS, ids=lambda value: None)
def test_errors_say_what_was_expected_and_what_came(function, arguments, error, message):
    with pytest.raises(error) as raised:
        function(*arguments)
    assert str(raised.value) == message


@needs_extension
@pytest.mark.parametrize(("function", "arguments"), [row[:2] for row in ERRORS], ids=lambda value: None)
def test_direct_call_with_wrong_arguments_raises(function, arguments):
    with pytest.raises(RuntimeError, match=f"{function.__name__}: "):
        kernel(function.__name__)(*arguments)
