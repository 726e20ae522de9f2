"""Linear: both moments of the weight against torch.mm's weight gradient. `python -m bench.linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _gate, _kernels, _report

TITLE = "Linear weight, both moments ÷ torch.mm's weight gradient"
_op = torch.ops.perexample.linear_moments


def _reach(positions: int, dtype: torch.dtype) -> float | None:
    """What has been set as the goal, by what the kernels run on."""
    capability = _report.capability()
    if dtype == torch.bfloat16:
        steps = {32: 1.10}
    elif capability.startswith("avx512"):
        steps = {16: 1.10, 8: 1.2, 2: 1.5, 1: 1.9}
    else:
        steps = {32: 1.15, 8: 1.4} if capability == "avx2" else {}
    return next((ratio for least, ratio in steps.items() if positions >= least), None)


def _mm(dy: Tensor, x: Tensor) -> Tensor:
    return torch.mm(dy.flatten(0, 1).t(), x.flatten(0, 1))


def _two_mm(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return _mm(dy, x), _mm(dy.square(), x.square())


def _loop(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over examples, in place."""
    grad = dy.new_zeros(dy.shape[2], x.shape[2])
    square, one = torch.zeros_like(grad), torch.empty_like(grad)
    for dy_b, x_b in zip(dy, x, strict=True):
        torch.mm(dy_b.t(), x_b, out=one)
        grad += one
        square.addcmul_(one, one)
    return grad, square


def _check(dy: Tensor, x: Tensor) -> None:
    """At full size, on some of the output rows."""
    outputs = dy.shape[2]
    rows = torch.arange(0, outputs, max(1, outputs // 48))
    narrowed = (dy[:, :, rows].contiguous(), x, False)
    _gate.kernel_gate("linear_moments", (dy, x, False), narrowed, lambda results: [results[0][rows], results[1][rows]])


def _case(batch: int, positions: int, inputs: int, outputs: int, dtype: torch.dtype, peers: bool) -> _kernels.Case:
    others = {}
    if peers:
        others = {"loop": _loop, "two mm": _two_mm} if positions == 1 else {"loop": _loop}
    return _kernels.Case(
        f"{'' if dtype == torch.float32 else 'bf16 '}B={batch} T={positions} {inputs}→{outputs}",
        lambda: (torch.randn(batch, positions, outputs).to(dtype), torch.randn(batch, positions, inputs).to(dtype)),
        _mm,
        lambda dy, x: _op(dy, x, False),
        _check,
        _reach(positions, dtype),
        others,
    )


def cases(full: bool) -> list[_kernels.Case]:
    """The default shapes, and with `full` more of them."""
    shapes = [(128, 1), (128, 8), (32, 32), (8, 64), (8, 128)]
    sizes = [(768, 768)]
    if full:
        shapes = [(128, 1), (512, 1), (128, 2), (128, 4), (128, 8), (64, 16), (32, 32), (16, 64), (8, 128), (2, 1024)]
        sizes = [(768, 768), (768, 3072), (3072, 768), (1024, 1024), (512, 1536)]
    wide = [(shape, (768, 3072)) for shape in shapes] if full else [((8, 64), (768, 768))]
    half = [_case(*shape, *size, torch.bfloat16, peers=False) for shape, size in wide]
    # A width that the threads cannot share as evenly as 768.
    uneven = [] if full else [_case(8, 64, 1024, 1024, torch.float32, peers=False)]
    single = [
        _case(*shape, *size, torch.float32, peers=full and size == (768, 768)) for size in sizes for shape in shapes
    ]
    return half + single + uneven


if __name__ == "__main__":
    _kernels.main("linear", TITLE, cases)
