"""What the op tests share: both implementations of an op, odd memory layouts, and the comparison with the oracle."""

from itertools import combinations

import pytest
import torch

from perexample import _extension, ops
from perexample.ops import OPS
from perexample.testing import assert_within_budget, moments_of_examples

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# dtype of the inputs, dtype of the gradient
DTYPE_PAIRS = [(a, b) for a in DTYPES for b in DTYPES if a != b]
# The op's Python reference, and the public function: validation, then the dispatcher's kernel (C++ where built).
IMPLEMENTATIONS = ("reference", "public")
LAYOUTS = ("transposed", "batch_last", "stepped", "offset")

both = pytest.mark.parametrize("which", IMPLEMENTATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
needs_extension = pytest.mark.skipif(
    _extension.info() is None, reason="the C++ kernels are not built: the reference serves every op"
)


def implementation(name, which):
    return OPS[name][0] if which == "reference" else getattr(ops, name)


def kernel(name):
    """The op as the dispatcher runs it, without validation in Python."""
    return getattr(torch.ops.perexample, name).default


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def relaid(tensor, layout):
    """The same values laid out differently in memory, with poison in every gap."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "batch_last":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    poison = float("nan") if tensor.is_floating_point() else -(10**6)
    if layout == "stepped":
        out = torch.full([2 * size + 1 for size in tensor.shape], poison, dtype=tensor.dtype)
        out = out[tuple(slice(1, None, 2) for _ in tensor.shape)]
    else:
        out = torch.full((tensor.numel() + 1,), poison, dtype=tensor.dtype)[1:].view(tensor.shape)
    return out.copy_(tensor)


def expanded(shape, dtype=torch.float32):
    """One tensor of `shape` for every non-empty set of dimensions, with stride 0 along these."""
    for count in range(1, len(shape) + 1):
        for dims in combinations(range(len(shape)), count):
            small = [1 if d in dims else size for d, size in enumerate(shape)]
            yield torch.randn(small, dtype=dtype).expand(shape)


def check_tensor(actual, expected, stock, dtype, what):
    """`dtype`: of `actual`; the budget is that of the less precise of it and the accumulation (stock's dtype)."""
    assert actual.dtype == dtype, f"{what}: {actual.dtype}"
    rounding = dtype if torch.finfo(dtype).eps > torch.finfo(stock.dtype).eps else stock.dtype
    assert_within_budget(actual, expected, stock, rounding, what)


def check_moments(actual, contribution, batch, shape, dtype, grad_dtype=None, what="weight"):
    """Hold (gradient, second moment) to the loop over examples.

    contribution: (b, dtype) -> c_b computed in that dtype; shape: of c_b; dtype: of the op's inputs.
    """
    grad, square = actual
    expected, stock = (
        moments_of_examples(lambda b, d=d: contribution(b, d), batch, torch.empty(shape, dtype=d))
        for d in (torch.float64, wide(dtype))
    )
    check_tensor(grad, expected.grad, stock.grad, grad_dtype or dtype, f"{what} gradient")
    check_tensor(square, expected.sum_grad_squared, stock.sum_grad_squared, wide(dtype), f"{what} second moment")


def check_empty(*tensors):
    """What was not asked for has no elements."""
    for tensor in tensors:
        assert tensor.shape == (0,)
