"""The kernels of norms, embedding, convolution and the step, compiled for every architecture."""

from unittest import mock

import pytest
import torch
from perexample.triton_kernels import ahead, configs, conv, embedding, norm, optimizer, recurrent

every_target = pytest.mark.parametrize(
    ("arch", "target"), [(arch, target) for arch in configs.CONV for target in ahead.TARGETS[arch]]
)


@every_target
@pytest.mark.parametrize("kind", configs.CONV[90])
@pytest.mark.parametrize(("kernel_size", "odd"), ahead.CONVOLUTIONS)
def test_convolution(arch, target, kind, kernel_size, odd):
    compiled = ahead.compile_conv(arch, kind, kernel_size, odd=odd, target=target)
    assert compiled.name == "_implicit_gemm"
    found = ahead.conv_problems(compiled, kind, kernel_size, configs.CONV[arch][kind], odd=odd)
    assert not found, (found, compiled)


@every_target
def test_what_only_adds_up(arch, target):
    x = torch.empty(16, 64, 768, dtype=torch.bfloat16)
    image = torch.empty(16, 96, 32, 32, dtype=torch.bfloat16)
    with ahead.compiling(arch, target) as made:
        norm.layer_norm_moments(x, x, None, None, torch.empty(768), 1e-5, [True] * 3)
        norm.rms_norm_moments(x, x, torch.empty(16, 64), torch.empty(768), 1e-5, [True] * 2)
        norm.group_norm_moments(image.flatten(2), image.flatten(2), None, None, torch.empty(96), 8, 1e-5, [True] * 3)
        norm.batch_norm_moments(image.flatten(2), image.flatten(2), *torch.empty(3, 96), [True] * 3)
        embedding.embedding_moments(x, torch.zeros(16, 64, dtype=torch.long), 1000)
        conv.conv_moments(image, image, [3, 3], [1, 1], [1, 1], [1, 1], 96, False)
    assert {c.name for c in made} >= {"_normalized", "_affine", "_scaled", "_table_row", "_depthwise", "_bias"}
    for compiled in made:
        assert not compiled.problems(), compiled


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cells(arch, target, dtype):
    with ahead.compiling(arch, target) as made:
        gates, states, weight = (torch.zeros(size, dtype=dtype) for size in ((1, 8, 64), (2, 8, 16), (64, 16)))
        recurrent.lstm_forward_(gates, states, states, weight, None, [], False)
        recurrent.lstm_backward_(gates, None, states[0], states[1], states[:1], gates, states, weight, None, [], False)
        recurrent.gru_cell_backward_(*(torch.zeros(8, n * 16, dtype=dtype) for n in (3, 3, 1, 3, 1, 1)))
    assert {c.name for c in made} == {"_lstm_cell", "_lstm_cell_backward", "_gru_cell_backward"}
    for compiled in made:
        assert not compiled.problems(), compiled


HALF = torch.bfloat16
STEPS = {  # dtypes of parameters, gradients and state; exp_avg, exp_avg_sq, centered
    "adam": (torch.float32, torch.float32, torch.float32, True, True, False),
    "adam, half": (HALF, HALF, HALF, True, True, False),
    "adam, half gradients": (torch.float32, HALF, torch.float32, True, True, False),
    "adam, float64": (torch.float64, torch.float64, torch.float64, True, True, False),
    "centered": (torch.float32, torch.float32, torch.float32, True, True, True),
    "momentum": (torch.float32, torch.float32, torch.float32, True, False, False),
    "sgd": (torch.float32, torch.float32, torch.float32, False, False, False),
}


def step(dtype, grad_dtype, state, average, square, centered):
    """The kernels of a step over a tensor of many chunks and a small one; all options that add work are on."""
    shapes = [(1 << 20,), (70,)]
    params, grads = ([torch.empty(shape, dtype=d) for shape in shapes] for d in (dtype, grad_dtype))
    sums = [torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32)) for shape in shapes]
    averages = [torch.empty((1 << 20) + 128, dtype=state) if kept else None for kept in (average, square)]
    scalar, seen = torch.tensor(2.0), torch.empty(2, dtype=torch.float64)
    optimizer.optimizer_step_(
        params, grads, sums, *averages, seen, torch.empty(2, dtype=torch.int32), scalar, scalar.double(), 10.0, 100.0,
        1e-8, 0.1, centered, False, False, True, True, False, True, False, 1, scalar, scalar,
    )  # fmt: skip


@every_target
@pytest.mark.parametrize("kind", STEPS)
def test_step(arch, target, kind):
    with ahead.compiling(arch, target) as made:
        step(*STEPS[kind])
    assert [c.name for c in made] == ["_table", "_constants", "_step"]
    for compiled in made:
        assert not compiled.problems(), compiled
    # 4 elements of each array at once, which for all but half precision is a vector of 16 bytes.
    dtype, grad_dtype, state, average, square, _ = STEPS[kind]
    accesses = [dtype, grad_dtype, torch.float32, dtype, *[state] * 2 * (average + square)]
    assert made[-1].vectors >= sum(accessed != HALF for accessed in accesses), made[-1]
    assert made[-1].resident * made[-1].warps >= 32, made[-1]


def test_a_step_that_spills_is_caught():
    with mock.patch.object(configs, "STEP", configs.STEP._replace(registers=24)), ahead.compiling(90) as made:
        step(*STEPS["adam"])
    assert any("spills" in problem for problem in made[-1].problems()), made[-1]
