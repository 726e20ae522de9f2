"""The Triton kernels of recurrent layers, with the cases and formulas of tests/ops/test_recurrent.py."""

import pytest
import test_recurrent as cases
import torch
from launching import launcher
from opchecks import relaid
from perexample.triton_kernels import _launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# T, B, H, P, how many are there at each step, reverse: blocks that one row, and that several, fill.
LSTMS = [s for s in cases.LSTMS if s[1] * s[2] < 200] + [(2, 7, 75, 9, [7, 2], True)]


@pytest.fixture(autouse=True)
def by_the_launcher(monkeypatch):
    monkeypatch.setattr(cases, "implementation", lambda name, which: launcher(name))


@every_dtype
@pytest.mark.parametrize("shape", LSTMS, ids=str)
def test_lstm(shape, dtype):
    cases.test_lstm_forward_cases_equal_the_formula("triton", dtype, shape)
    cases.test_lstm_backward_cases_equal_the_loop_of_autograd("triton", dtype, shape)


@every_dtype
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 4), (11, 40)], ids=str)
def test_gru(shape, dtype):
    cases.test_gru_cell_backward_cases_equal_the_formula("triton", dtype, shape)


def test_any_memory_layout():
    for layout in cases.LAYOUTS:
        dtype = torch.float32
        plain = [torch.rand(3, n * 5).to(dtype) for n in (3, 3, 1, 3, 1, 1)]
        odd = [relaid(t, layout) for t in plain]
        for tensors in (plain, odd):
            launcher("gru_cell_backward_")(*tensors)
        assert all(map(torch.equal, plain, odd))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_lstm_at_the_ends_of_the_range():
    values = torch.tensor([0.0, 1e-30, 1e-4, 0.2499, 0.2501, 0.45, 20.0, 50.0, 88.0, 1e4, 1e30, float("inf")])
    gates = torch.cat([values, -values])[None, None].repeat(1, 1, 4)
    expected = gates.double().view(4, -1)
    expected = torch.stack([x.tanh() if k == 2 else x.sigmoid() for k, x in enumerate(expected)]).view(1, 1, -1)
    states, cells, size = torch.zeros(2, 1, 24), torch.zeros(2, 1, 24), 24
    launcher("lstm_forward_")(gates, states, cells, torch.zeros(4 * size, size), None, [], False)
    # Relative, but for what is smaller than a sigmoid of -87. A GPU's exp multiplies with log2(e) in float32 first.
    most = 4.0 if _launch.INTERPRET else 8 + values.abs().clamp(max=88).repeat(8)
    assert ((gates - expected).abs() <= most * torch.finfo(torch.float32).eps * expected.abs() + 1e-37).all()
    gates = torch.full((1, 1, 4 * size), float("nan"))
    launcher("lstm_forward_")(gates, states, cells, torch.zeros(4 * size, size), None, [], False)
    assert gates.isnan().all() and states[1].isnan().all() and cells[1].isnan().all()


def test_wrong_arguments_raise():
    for function, arguments, _, message in cases.ERRORS:
        name = function.__name__
        defaults = {"lstm_forward_": (None, [], False), "lstm_backward_": (None, [], False)}.get(name, ())
        missing = {"lstm_forward_": 7, "lstm_backward_": 11, "gru_cell_backward_": 6}[name] - len(arguments)
        with pytest.raises(RuntimeError, match=f"{name}: "):
            launcher(name)(*arguments, *(defaults[-missing:] if missing else ()))
        assert message.startswith(name)
