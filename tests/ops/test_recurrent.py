"""An LSTM over time, and the cell of a GRU, against the same in float64 and its gradients."""

import pytest
import torch
from opchecks import LAYOUTS, both, check_tensor, every_dtype, implementation, kernel, needs_extension, relaid, wide

from perexample import ops

SHAPES = [(0, 3), (1, 1), (3, 4), (5, 16), (2, 17), (4, 33), (60, 300), (900, 20)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def lstm(gates, states, cells, weight_hh, weight_hr, active, reverse):
    """Activated gates, all h, all c: the loop over time, out of place. `states` and `cells`: before the first step."""
    steps, results = len(gates), []
    h, c = states[steps if reverse else 0], cells[steps if reverse else 0]
    first = (None, h, c)
    for t in reversed(range(steps)) if reverse else range(steps):
        there = (torch.arange(len(h)) < (active[t] if active else len(h)))[:, None]
        i, f, g, o = (gates[t] + h @ weight_hh.t()).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        new = f * c + i * g
        out = o * new.tanh()
        out = out if weight_hr is None else out @ weight_hr.t()
        h, c = torch.where(there, out, h), torch.where(there, new, c)
        results.append((torch.where(there, torch.cat((i, f, g, o), 1), 0), h, c))
    results = [first, *results][:: -1 if reverse else 1]
    gates = [gate for gate, _, _ in results if gate is not None]
    return (torch.stack(gates) if gates else torch.zeros_like(weight_hh.new_empty(0, len(h), 4 * c.shape[1]))), *(
        torch.stack([result[k] for result in results]) for k in (1, 2)
    )


def lstm_inputs(shape, dtype):
    steps, batch, size, width, active, reverse = shape
    # As an initialization draws them: with larger ones the recurrence is chaotic, also in float64.
    gates, scale = randn((steps, batch, 4 * size), dtype, 2.0), (width or size) ** -0.5
    weight_hh = randn((4 * size, width or size), dtype, scale)
    states, cells = (poison(torch.empty(steps + 1, batch, n, dtype=dtype)) for n in (width or size, size))
    for s in (states, cells):
        s[steps if reverse else 0] = randn(s.shape[1:], dtype)
    weight_hr = randn((width, size), dtype, size**-0.5) if width else None
    return gates, states, cells, weight_hh, weight_hr, active, reverse


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


# T, B, H, P of a projection or 0, how many are there at each step, backward in time. The last two make several tasks.
LSTMS = [
    (0, 3, 2, 0, [], False),
    (2, 0, 3, 0, [], False),
    (1, 1, 1, 0, [], False),
    (4, 2, 5, 0, [], True),
    (3, 3, 17, 2, [], False),
    (5, 7, 16, 0, [7, 7, 4, 1, 0], False),
    (4, 9, 9, 33, [9, 5, 5, 2], True),
    (3, 13, 40, 0, [], False),
    (2, 101, 33, 0, [101, 60], True),
    (6, 25, 70, 9, [], False),
]
lstms = pytest.mark.parametrize("shape", LSTMS, ids=str)


def without_the_absent(tensor, active):
    """With 0 where an example is not there."""
    for t, n in enumerate(active):
        tensor[t, n:] = 0
    return tensor


@both
@every_dtype
@lstms
def test_lstm_forward_cases_equal_the_formula(which, dtype, shape):
    inputs = lstm_inputs(shape, dtype)
    exact, stock = (
        lstm(*(t.to(d) if isinstance(t, torch.Tensor) else t for t in inputs)) for d in (torch.float64, dtype)
    )
    implementation("lstm_forward_", which)(*inputs)
    results = without_the_absent(inputs[0], shape[4]), *inputs[1:3]
    for what, result, e, s in zip(("gates", "states", "cells"), results, exact, stock, strict=True):
        check_tensor(result, e, s, dtype, what)


@needs_extension
def test_lstm_forward_at_the_ends_of_the_range():
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-4, 1e-4, 0.3, -20.0, 50.0, -88.0, 90.0, 1e4, -1e30, float("inf")])

    def run(gates):
        size = gates.shape[2] // 4
        states, cells = torch.zeros(2, 1, size), torch.zeros(2, 1, size)
        expected = lstm(
            gates.double(), *(t.double() for t in (states, cells, torch.zeros(4 * size, size))), None, [], False
        )
        kernel("lstm_forward_")(gates, states, cells, torch.zeros(4 * size, size), None, [], False)
        return expected[0], states[1], cells[1]

    gates = torch.cat([values, -values])[None, None].repeat(1, 1, 4)
    expected, _, _ = run(gates)
    eps = torch.finfo(torch.float32).eps
    # Relative, but for what is smaller than a sigmoid of -87.
    assert ((gates - expected).abs() <= 4 * eps * expected.abs() + 1e-37).all()
    gates = torch.full((1, 1, 4), float("nan"))
    _, h, c = run(gates)
    assert gates.isnan().all() and h.isnan().all() and c.isnan().all()


@both
@every_dtype
@lstms
def test_lstm_backward_cases_equal_the_loop_of_autograd(which, dtype, shape):
    inputs = lstm_inputs(shape, dtype)
    steps, batch, size, width, active, reverse = shape
    gates, _, cells = lstm(*inputs)
    dy, dh, dc = (
        randn((steps, batch, width or size), dtype),
        randn((batch, width or size), dtype),
        randn(cells[0].shape, dtype),
    )
    weights = inputs[3:5]

    def backward(d):
        """From the same activated gates and cells, step by step: what autograd gives, in `d`."""
        w_hh, w_hr = (None if w is None else w.to(d) for w in weights)
        back = {k: torch.zeros(steps, batch, n).to(d) for k, n in (("gates", 4 * size), ("states", width or size))}
        h_grad, c_grad = dh.to(d), dc.to(d)
        for t in range(steps) if reverse else reversed(range(steps)):
            after, before = (cells[t], cells[t + 1]) if reverse else (cells[t + 1], cells[t])
            there = (torch.arange(batch) < (active[t] if active else batch))[:, None]
            i, f, g, o = gates[t].to(d).chunk(4, 1)
            total = h_grad + dy[t].to(d)
            dm = total if w_hr is None else total @ w_hr
            squashed = after.to(d).tanh()
            c_total = c_grad + dm * o * (1 - squashed.square())
            parts = c_total * g * i * (1 - i), c_total * before.to(d) * f * (1 - f), c_total * i * (1 - g.square())
            dgates = torch.cat((*parts, dm * squashed * o * (1 - o)), 1)
            back["gates"][t], back["states"][t] = torch.where(there, dgates, 0), torch.where(there, total, 0)
            h_grad, c_grad = torch.where(there, dgates @ w_hh, h_grad), torch.where(there, c_total * f, c_grad)
        return (back["gates"], *([back["states"]] if width else []), h_grad, c_grad)

    exact, stock = backward(torch.float64), backward(dtype)
    dgates, dstates = poison(gates), poison(dy) if width else None
    results = dgates, dstates, dh.clone(), dc.clone()
    implementation("lstm_backward_", which)(*results, dy, gates, cells, *weights, active, reverse)
    names = ("dgates", "dstates", "dh", "dc") if width else ("dgates", "dh", "dc")
    for what, result, e, s in zip(names, (r for r in results if r is not None), exact, stock, strict=True):
        check_tensor(result, e, s, dtype, what)


@pytest.mark.parametrize("shape", [s for s in LSTMS if s[0] and s[1]], ids=str)
def test_lstm_backward_is_the_gradient_of_the_forward(shape):
    gates, states, cells, weight_hh, weight_hr, active, reverse = lstm_inputs(shape, torch.float64)
    steps, first = shape[0], shape[0] if reverse else 0
    sums, h, c = (t.clone().requires_grad_() for t in (gates, states[first], cells[first]))
    before = {first: h}, {first: c}
    padded = ([s.get(t, h.detach()) for t in range(steps + 1)] for s, h in zip(before, (h, c), strict=True))
    activated, h_all, c_all = lstm(sums, *padded, weight_hh, weight_hr, active, reverse)
    outputs, last = (h_all[:-1], 0) if reverse else (h_all[1:], steps)
    dy, dh, dc = randn(outputs.shape, torch.float64), randn(h.shape, torch.float64), randn(c.shape, torch.float64)
    without_the_absent(dy, active)  # they have no output
    expected = torch.autograd.grad((outputs, h_all[last], c_all[last]), (sums, h, c), (dy, dh, dc))
    dgates, dstates = poison(gates), None if weight_hr is None else poison(dy)
    ops.lstm_backward_(
        dgates, dstates, dh, dc, dy, activated.detach(), c_all.detach(), weight_hh, weight_hr, active, reverse
    )
    torch.testing.assert_close((dgates, dh, dc), expected)


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
        sizes = [(4, 3, 20), (5, 3, 2), (5, 3, 5), (20, 2), (2, 5)]
        forward = [lay(torch.rand(size)) for size in sizes]
        sizes = [(4, 3, 20), (4, 3, 2), (3, 2), (3, 5), (4, 3, 2), (4, 3, 20), (5, 3, 5), (20, 2), (2, 5)]
        backward = [lay(torch.rand(size)) for size in sizes]
        gated = [lay(torch.rand(3, n * 5)) for n in (3, 3, 1, 3, 1, 1)]
        ops.lstm_forward_(*forward)
        ops.lstm_backward_(*backward)
        ops.gru_cell_backward_(*gated)
        return [*forward, *backward, *gated]

    for odd, plain in zip(run(lambda t: relaid(t, layout)), run(lambda t: t), strict=True):
        assert torch.equal(odd, plain)


S, G = torch.ones(2, 3), torch.ones(4, 2, 12)
ALL, W = torch.ones(5, 2, 3), torch.ones(12, 3)
ERRORS = [
    (ops.lstm_forward_, (G[:3], ALL, ALL, W), ValueError, "lstm_forward_: gates must be (4, 2, 12), got (3, 2, 12)"),
    (
        ops.lstm_forward_,
        (G, ALL, ALL[0], W),
        ValueError,
        "lstm_forward_: cells must be of shape (T + 1, B, H), got (2, 3)",
    ),
    (
        ops.lstm_forward_,
        (G, ALL, ALL, W, None, [2, 2, 3, 1]),
        ValueError,
        "lstm_forward_: active must be 4 numbers from 0 to 2, or none, got [2, 2, 3, 1]",
    ),
    (
        ops.lstm_backward_,
        (G, None, S, S, ALL[1:], G, ALL.double(), W),
        TypeError,
        "lstm_backward_: cells must be torch.float32 like gates, got torch.float64",
    ),
    (
        ops.lstm_backward_,
        (G, ALL[1:], S, S, ALL[1:], G, ALL, W),
        ValueError,
        "lstm_backward_: dstates must be given where weight_hr is, and only there",
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


DEFAULTS = {"lstm_forward_": (None, [], False), "lstm_backward_": (None, [], False), "gru_cell_backward_": ()}


@needs_extension
@pytest.mark.parametrize(("function", "arguments"), [row[:2] for row in ERRORS], ids=lambda value: None)
def test_direct_call_with_wrong_arguments_raises(function, arguments):
    name = function.__name__
    schema = torch.ops.perexample.__getattr__(name).default._schema
    missing = len(schema.arguments) - len(arguments)
    with pytest.raises(RuntimeError, match=f"{name}: "):
        kernel(name)(*arguments, *DEFAULTS[name][len(DEFAULTS[name]) - missing :])
