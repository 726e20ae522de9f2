"""Elements 2**31 elements apart, where 32-bit distances overflow. The memory between them is never touched."""

import copy
import mmap
import sys

import pytest
import torch
from launching import interpreted, launcher, pretend

pytestmark = [
    interpreted,  # on a GPU, tests/test_devices.py has tensors of 2**31 elements
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory that it does not need"),
]


def far(tensor, dim):
    """The same values; the last along `dim` is more than 2**31 elements from the first, its neighbour less."""
    strides = list(tensor.contiguous().stride())
    strides[dim] = 8 * 2**31 // (5 * (tensor.shape[dim] - 1))
    size = tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)))
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def cases():
    """(op, how many tensors are moved, its arguments, those tensors first)"""

    def r(*shape):
        return torch.rand(shape).half()

    statistics = torch.rand(2, 3, 3)
    geometry = [1] * 3, [0] * 3, [1] * 3
    return {
        "linear": ("linear_moments", 2, r(3, 4, 65), r(3, 4, 65), True),
        "linear, several blocks": ("linear_moments", 2, r(3, 33, 5), r(3, 33, 6), False),
        "linear, one position": ("linear_moments", 2, r(33, 1, 65), r(33, 1, 65), False),
        "bias": ("bias_moments", 1, r(3, 4, 5)),
        "convolution": ("conv_moments", 2, r(3, 3, 3, 3, 3), r(3, 3, 4, 3, 4), [2, 1, 2], *geometry, 1, False),
        "groups of a convolution": ("conv_moments", 2, r(3, 6, 3), r(3, 6, 4), [2], [1], [0], [1], 3, False),
        "depthwise": ("conv_moments", 2, r(3, 3, 3, 3, 3), r(3, 3, 4, 3, 3), [2, 1, 1], *geometry, 3, False),
        "layer norm": ("layer_norm_moments", 2, r(3, 3, 5), r(3, 3, 5), None, None, r(5), 1e-5, [True] * 3),
        "group norm": ("group_norm_moments", 2, r(3, 6, 3), r(3, 6, 3), None, None, r(6), 2, 1e-5, [True] * 3),
        "given": ("layer_norm_moments", 1, r(3, 3, 5), r(3, 3, 5), *statistics, r(5), 1e-5, [True] * 3),
        "batch norm": ("batch_norm_moments", 2, r(3, 3, 5), r(3, 3, 5), r(3), r(3), r(3), [True] * 3),
        "embedding": ("embedding_moments", 1, r(3, 3, 5), torch.randint(4, (3, 3)), 4),
        "lstm": ("lstm_forward_", 3, r(1, 3, 12), r(2, 3, 3), r(2, 3, 3), r(12, 3), None, [], False),
        "gru": ("gru_cell_backward_", 6, r(3, 9), r(3, 9), r(3, 3), r(3, 9), r(3, 3), r(3, 3)),
    }  # fmt: skip


@pytest.mark.parametrize("case", cases())
def test_far_elements_are_found(case):
    torch.use_deterministic_algorithms(False)  # which would write to all of what is new
    name, moved, *arguments = cases()[case]

    def run(arguments):
        """What the op returns, and what it may have changed."""
        return *(launcher(name)(*arguments) or ()), *arguments[:moved]

    with pretend(80, processors=1):
        expected = run(copy.deepcopy(arguments))
        for k in range(moved):
            for dim in (d for d, n in enumerate(arguments[k].shape) if n > 2):
                given = copy.deepcopy(arguments)
                given[k] = far(given[k], dim)
                for result, same in zip(run(given), expected, strict=True):
                    torch.testing.assert_close(result, same, rtol=1e-5, atol=1e-5)
