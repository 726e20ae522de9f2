"""Norms with an affine part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import autograd
from ..moments import MomentModule

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "SyncBatchNorm",
]


class LayerNorm(MomentModule, nn.LayerNorm):
    """torch.nn.LayerNorm whose backward also computes ``p.sum_grad_squared`` (MATHS 7).

    Input (B, ..., *normalized_shape).
    """

    _reusable = True
    _batch_at = "any"

    def forward(self, input: Tensor) -> Tensor:
        if not self._tracking(input, len(self.normalized_shape) + 1, "weight", "bias"):
            return super().forward(input)
        return autograd.layer_norm(
            input,
            self.weight,
            self.bias,
            *self._leaves("weight", "bias"),
            self.normalized_shape,
            self.eps,
            self._axis(input, len(self.normalized_shape) + 1),
        )


class RMSNorm(MomentModule, nn.RMSNorm):
    """torch.nn.RMSNorm whose backward also computes ``p.sum_grad_squared`` (MATHS 7).

    Input (B, ..., *normalized_shape).
    """

    _reusable = True
    _batch_at = "any"

    def forward(self, x: Tensor) -> Tensor:
        if not self._tracking(x, len(self.normalized_shape) + 1, "weight"):
            return super().forward(x)
        axis = self._axis(x, len(self.normalized_shape) + 1)
        return autograd.rms_norm(x, self.weight, *self._leaves("weight"), self.normalized_shape, self.eps, axis)


class GroupNorm(MomentModule, nn.GroupNorm):
    """torch.nn.GroupNorm whose backward also computes ``p.sum_grad_squared`` (MATHS 7). Input (B, C, ...)."""

    _reusable = True
    _batch_at = "first"

    def forward(self, input: Tensor) -> Tensor:
        if not self._tracking(input, 2, "weight", "bias"):
            return super().forward(input)
        return autograd.group_norm(
            input, self.weight, self.bias, *self._leaves("weight", "bias"), self.num_groups, self.eps
        )


class _WithRunningStatistics(MomentModule):
    """What instance norm and batch norm share: in eval mode their running statistics are constants.

    Such a layer also records while it is in eval mode itself, in the forward pass of a converted model in training.
    """

    _reusable = True
    _batch_at = "first"

    def _in_training(self) -> bool:
        return self.training or (self.running_mean is not None and self._examples.training)

    def _by_constants(self, input: Tensor) -> Tensor:
        leaves = self._leaves("weight", "bias")
        return autograd.batch_norm(
            input, self.weight, self.bias, *leaves, self.running_mean, self.running_var, self.eps
        )


class _InstanceNorm(_WithRunningStatistics):
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[operator]
        if not self._tracking(input, self._get_no_batch_dim() + 1, "weight", "bias"):  # type: ignore[operator]
            return super().forward(input)
        if self.track_running_stats and not self.training:
            return self._by_constants(input)
        if self.running_mean is not None:
            # Only to bring the running statistics up to date, which nothing here depends on.
            with torch.no_grad():
                momentum = self.momentum if self.momentum is not None else 0.0
                F.instance_norm(input, self.running_mean, self.running_var, None, None, True, momentum, self.eps)
        return autograd.instance_norm(input, self.weight, self.bias, *self._leaves("weight", "bias"), self.eps)


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d whose backward also computes ``p.sum_grad_squared`` (MATHS 7). Input (B, C, L)."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d whose backward also computes ``p.sum_grad_squared`` (MATHS 7). Input (B, C, H, W)."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d whose backward also computes ``p.sum_grad_squared`` (MATHS 7). Input (B, C, D, H, W)."""


class _BatchNorm(_WithRunningStatistics):
    """In eval mode only: in training mode the statistics of the batch mix the examples."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[operator]
        if not self._tracking(input, 2, "weight", "bias"):
            return super().forward(input)
        if self.training or self.running_mean is None:
            raise ValueError(
                f"{self._label()}: {type(self).__name__} with the statistics of the batch mixes the examples, so no "
                f"per-example gradient exists; after model.train() call .eval() on this layer (its running statistics "
                f"are constants, and exact), or use torch.nn.GroupNorm in its place"
            )
        return self._by_constants(input)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d in eval mode whose backward also computes ``p.sum_grad_squared`` (MATHS 7).

    Input (B, C) or (B, C, L). Recorded while the layer is in eval mode in a converted model in training.

    Raises:
        ValueError: in training mode, where the statistics are those of the batch.
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d in eval mode, as `BatchNorm1d`. Input (B, C, H, W)."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d in eval mode, as `BatchNorm1d`. Input (B, C, D, H, W)."""


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm in eval mode, where nothing is synchronised: as `BatchNorm1d`. Input (B, C, ...)."""
