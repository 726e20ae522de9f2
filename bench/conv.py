"""Convolution: both moments of the weight against the stock weight gradient. `python -m bench.conv`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _gate, _kernels

TITLE = "Conv2d weight, both moments ÷ aten.convolution_backward's weight gradient"
_op = torch.ops.perexample.conv_moments
_stock = torch.ops.aten.convolution_backward


def _case(
    batch: int,
    channels: int,
    outputs: int,
    size: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    last: bool = False,
) -> _kernels.Case:
    padding = kernel // 2
    out = (size + 2 * padding - kernel) // stride + 1
    geometry = ([stride] * 2, [padding] * 2, [1, 1])
    weight = torch.empty(outputs, channels // groups, kernel, kernel)
    layout = torch.channels_last if last else torch.contiguous_format
    if last:
        weight = weight.to(memory_format=layout)

    def make() -> tuple[Tensor, Tensor]:
        dy, x = torch.randn(batch, outputs, out, out), torch.randn(batch, channels, size, size)
        return dy.to(memory_format=layout), x.to(memory_format=layout)

    def arguments(dy: Tensor, x: Tensor) -> tuple[object, ...]:
        return dy, x, [kernel] * 2, *geometry, groups, False

    depthwise = groups == channels > 1
    name = f"{kernel}×{kernel}{f'/{stride}' if stride > 1 else ''} {channels}→{outputs}@{size} B={batch}"
    return _kernels.Case(
        f"{name}{' depthwise' if depthwise else ''}{' NHWC' if last else ''}",
        make,
        lambda dy, x: _stock(dy, x, weight, None, *geometry, False, [0, 0], groups, [False, True, False])[1],
        lambda dy, x: _op(*arguments(dy, x)),
        lambda dy, x: _gate.kernel_gate("conv_moments", arguments(dy[:4], x[:4])),
        0.7 if depthwise else 1.0 if out * out >= 64 else 1.2 if out * out <= 49 else None,
    )


def cases(full: bool) -> list[_kernels.Case]:
    """The default shapes, and with `full` more of them."""
    small = [
        _case(16, 64, 64, 32, 3),
        _case(16, 128, 128, 16, 3),
        _case(16, 256, 256, 8, 3),
        _case(16, 64, 128, 32, 1, stride=2),
        _case(16, 512, 512, 4, 3),
        _case(16, 128, 128, 16, 3, groups=128),
    ]
    large = [
        _case(16, 3, 64, 32, 3),
        _case(16, 16, 16, 32, 3),
        _case(8, 3, 64, 64, 7, stride=2),
        _case(16, 64, 128, 32, 3, stride=2),
        _case(16, 256, 64, 16, 1),
        _case(16, 512, 2048, 7, 1),
        _case(16, 64, 64, 7, 3),
        _case(16, 256, 256, 16, 3, groups=8),
        _case(16, 96, 96, 28, 7, groups=96),
        _case(16, 64, 64, 32, 3, last=True),
        _case(16, 256, 256, 8, 3, last=True),
        _case(16, 128, 128, 16, 3, groups=128, last=True),
    ]
    return small + large if full else small


if __name__ == "__main__":
    _kernels.main("conv", TITLE, cases)
