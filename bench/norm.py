"""LayerNorm, GroupNorm and bias against their stock backward. `python -m bench.norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _gate, _kernels

TITLE = "Norms and bias, both moments (norms: and dx) ÷ stock backward"
_ops, _aten = torch.ops.perexample, torch.ops.aten
_ALL = [True, True, True]


def _layer_norm(batch: int, positions: int, width: int) -> _kernels.Case:
    def make() -> tuple[Tensor, ...]:
        x, weight, bias = torch.randn(batch, positions, width), torch.randn(width), torch.randn(width)
        _, mean, rstd = torch.native_layer_norm(x, [width], weight, bias, 1e-5)
        return torch.randn_like(x), x, mean.squeeze(2), rstd.squeeze(2), weight, bias

    return _kernels.Case(
        f"LayerNorm B={batch} T={positions} D={width}",
        make,
        lambda dy, x, mean, rstd, weight, bias: _aten.native_layer_norm_backward(
            dy, x, [width], mean[..., None], rstd[..., None], weight, bias, _ALL
        ),
        lambda dy, x, mean, rstd, weight, bias: _ops.layer_norm_moments(dy, x, mean, rstd, weight, 1e-5, _ALL),
        lambda dy, x, mean, rstd, weight, bias: _gate.kernel_gate(
            "layer_norm_moments", (dy, x, mean, rstd, weight, 1e-5, _ALL), (dy, x, None, None, weight, 1e-5, _ALL)
        ),
        1.1,
    )


def _group_norm(batch: int, channels: int, size: int, groups: int) -> _kernels.Case:
    positions = size * size

    def make() -> tuple[Tensor, ...]:
        x, weight, bias = torch.randn(batch, channels, positions), torch.randn(channels), torch.randn(channels)
        _, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, positions, groups, 1e-5)
        return torch.randn_like(x), x, mean, rstd, weight

    return _kernels.Case(
        f"GroupNorm B={batch} C={channels}@{size} G={groups}",
        make,
        lambda dy, x, mean, rstd, weight: _aten.native_group_norm_backward(
            dy, x, mean, rstd, weight, batch, channels, positions, groups, _ALL
        ),
        lambda dy, x, mean, rstd, weight: _ops.group_norm_moments(dy, x, mean, rstd, weight, groups, 1e-5, _ALL),
        lambda dy, x, mean, rstd, weight: _gate.kernel_gate(
            "group_norm_moments",
            (dy, x, mean, rstd, weight, groups, 1e-5, _ALL),
            (dy, x, None, None, weight, groups, 1e-5, _ALL),
        ),
        1.1,
    )


def _bias(batch: int, positions: int, outputs: int) -> _kernels.Case:
    return _kernels.Case(
        f"bias B={batch} T={positions} O={outputs}",
        lambda: (torch.randn(batch, positions, outputs),),
        lambda dy: dy.sum((0, 1)),
        lambda dy: _ops.bias_moments(dy),
        lambda dy: _gate.kernel_gate("bias_moments", (dy,)),
        1.1,
    )


def cases(full: bool) -> list[_kernels.Case]:
    """The default shapes, and with `full` more of them."""
    small = [_layer_norm(8, 128, 768), _group_norm(16, 64, 32, 32), _group_norm(16, 256, 8, 32), _bias(8, 128, 3072)]
    large = [
        _layer_norm(8, 64, 512),
        _layer_norm(128, 1, 1024),
        _layer_norm(2, 1024, 768),
        _group_norm(16, 128, 16, 32),
        _group_norm(16, 512, 4, 32),
        _group_norm(16, 64, 32, 1),
        _bias(128, 1, 2048),
        _bias(2, 1024, 768),
    ]
    return small + large if full else small


if __name__ == "__main__":
    _kernels.main("norm", TITLE, cases)
