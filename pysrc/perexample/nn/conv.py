"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .. import autograd
from ..moments import MomentModule

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


class _Conv(MomentModule):
    """What the three have in common. Every padding that is not symmetric zeros is applied to the input first."""

    _reusable = True
    _batch_at = "first"

    def forward(self, input: Tensor) -> Tensor:
        spatial = len(self.kernel_size)
        if not self._tracking(input, spatial + 2, "weight", "bias"):
            return super().forward(input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0,) * spatial
        elif padding == "valid":
            padding = (0,) * spatial
        elif padding == "same":
            # Stock PyTorch too puts the odd element of the padding on the right.
            both = self._reversed_padding_repeated_twice
            left, right = both[0::2][::-1], both[1::2][::-1]
            if left == right:
                padding = tuple(left)
            else:
                input, padding = F.pad(input, both), (0,) * spatial
        return autograd.conv(
            input,
            self.weight,
            self.bias,
            *self._leaves("weight", "bias"),
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )


class Conv1d(_Conv, nn.Conv1d):
    """torch.nn.Conv1d whose backward also computes ``p.sum_grad_squared`` (MATHS 5). Input (B, C, L)."""


class Conv2d(_Conv, nn.Conv2d):
    """torch.nn.Conv2d whose backward also computes ``p.sum_grad_squared`` (MATHS 5). Input (B, C, H, W)."""


class Conv3d(_Conv, nn.Conv3d):
    """torch.nn.Conv3d whose backward also computes ``p.sum_grad_squared`` (MATHS 5). Input (B, C, D, H, W)."""


class _ConvTranspose(MomentModule):
    """What the three have in common."""

    _reusable = True
    _batch_at = "first"

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        spatial = len(self.kernel_size)
        if not self._tracking(input, spatial + 2, "weight", "bias"):
            return super().forward(input, output_size)
        output_padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        return autograd.conv_transpose(
            input,
            self.weight,
            self.bias,
            *self._leaves("weight", "bias"),
            self.stride,
            self.padding,
            output_padding,
            self.dilation,
            self.groups,
        )


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d whose backward also computes ``p.sum_grad_squared`` (MATHS 5). Input (B, C, L)."""


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d whose backward also computes ``p.sum_grad_squared`` (MATHS 5). Input (B, C, H, W)."""


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d whose backward also computes ``p.sum_grad_squared`` (MATHS 5). Input (B, C, D, H, W)."""
