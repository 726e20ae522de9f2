"""Sizes that the compiler treats in a way of their own: 1, which becomes a constant, and those that need 64 bits."""

import pytest
import torch
import triton
from perexample.triton_kernels import ahead, conv, embedding, linear, norm, recurrent, reduce


@pytest.fixture(autouse=True)
def made():
    """What is compiled; new tensors take no memory."""
    with torch.device("meta"), ahead.compiling(90) as made:
        yield made


def norms(dy, x, groups):
    """All kernels of norms on (B, T, D), and on the same as (B, C, S)."""
    mask, weight, channels = [True] * 3, torch.empty(dy.shape[2]), torch.empty(dy.shape[1])
    norm.layer_norm_moments(dy, x, None, None, weight, 1e-5, mask)
    norm.rms_norm_moments(dy, x, None, weight, 1e-5, mask[:2])
    norm.group_norm_moments(dy, x, None, None, channels, groups, 1e-5, mask)
    norm.batch_norm_moments(dy, x, channels, channels, channels, mask)


def test_everything_is_one(made):
    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16)

    one = empty(1, 1, 1)
    linear.linear_moments(one, one, True)
    linear.linear_moments(empty(1, 2, 1), empty(1, 2, 1), True)
    norms(one, one, 1)
    for channels in (1, 2):
        image, ones = empty(1, channels, 1, 1, 1), [1] * 3
        conv.conv_moments(image[:, :1], image, ones, ones, [0] * 3, ones, 1, True)
    embedding.embedding_moments(one, torch.empty(1, 1, dtype=torch.long), 1, 1)
    reduce.add_parts(torch.empty(2, 2, 1), torch.empty(1), torch.empty(1))
    recurrent.lstm_forward_(empty(1, 1, 4), empty(2, 1, 1), empty(2, 1, 1), empty(4, 1), None, [], False)
    recurrent.lstm_backward_(
        empty(1, 1, 4), None, *empty(2, 1, 1), one, empty(1, 1, 4), empty(2, 1, 1), empty(4, 1), None, [], False
    )
    recurrent.gru_cell_backward_(*(empty(1, n) for n in (3, 3, 1, 3, 1, 1)))
    modules = conv, embedding, norm, recurrent, reduce
    kernels = {
        name for module in modules for name, value in vars(module).items() if isinstance(value, triton.JITFunction)
    }
    assert {c.name for c in made} >= {name for name in kernels if name.startswith("_")}
    for compiled in made:
        assert not compiled.problems(), compiled


HUGE = 2**31 + 16


@pytest.mark.parametrize("shape", [(HUGE, 1, 16), (3, HUGE, 16), (3, 2, HUGE)], ids=str)
def test_sizes_of_64_bits(shape):
    dy, x = torch.empty(shape, dtype=torch.bfloat16), torch.empty(*shape[:2], 32, dtype=torch.bfloat16)
    linear.linear_moments(dy, x, True)
    norm.layer_norm_moments(dy, dy, None, None, None, 1e-5, [True] * 3)
    norm.batch_norm_moments(dy, dy, *torch.empty(3, shape[1]), [True] * 3)
    embedding.embedding_moments(dy, torch.empty(shape[:2], dtype=torch.long), 100)
