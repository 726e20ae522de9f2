"""SGD, plain and with momentum as a running average (MATHS 9, 13, 14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._base import Rule
from ._fused import FusedOptimizer
from ._options import CHECKS, check_horizon_or_none

__all__ = ["SGD"]


class SGD(FusedOptimizer):
    """SGD whose learning rate and momentum are values for batch size 1.

    With B examples in the step and ``ghat`` the mean gradient (MATHS 2, 9, 13, 14, 18)::

        kappa   = min(1, B / n_g)
        exp_avg = (1 - kappa) exp_avg + kappa ghat                           # without n_g: exp_avg = ghat
        p       = (1 - B lr weight_decay) p - B lr exp_avg

    Needs no second moments: it works on any model, where `step` is given its `batch_size`, and on a converted one,
    which counts its examples.

    Args:
        params: parameters (or named parameters, or groups).
        lr: learning rate for batch size 1 (eta_0). A float or a scalar tensor.
        n_g: averaging time of the gradient, in examples (N0_g); None: no momentum.
        weight_decay: decoupled, per example: independent of B (MATHS 18).
        bias_correction: whether the average starts as the plain mean over the n examples seen: kappa is then
            ``min(1, B / min(n, n_g))`` (MATHS 11).
        averaging: "linear", or "power" for ``1 - (1 - 1 / n_g)**B`` in place of ``min(1, B / n_g)`` (MATHS 19).
        loss_reduction, maximize, state_dtype: as in `Adam`.

    Raises:
        TypeError, ValueError: for arguments out of range.

    Equivalent, at one batch size B, to torch.optim.SGD with ``lr=B * lr``, or with ``momentum=1 - B / n_g`` and
    ``lr=B * lr * B / n_g``.
    """

    _checks = {**CHECKS, "n_g": check_horizon_or_none}  # noqa: RUF012  (never changed)

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        n_g: float | None = None,
        weight_decay: float = 0.0,
        bias_correction: bool = False,
        averaging: str = "linear",
        loss_reduction: str = "mean",
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        options = dict(
            lr=lr,
            n_g=n_g,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            averaging=averaging,
            loss_reduction=loss_reduction,
            maximize=maximize,
            state_dtype=state_dtype,
        )
        super().__init__(params, options)

    def _rule(self, group: dict[str, Any]) -> Rule:
        if group["n_g"] is None:
            return Rule(averages=())
        horizons = {"n_g": float(group["n_g"])}
        return Rule(averages=("exp_avg",), horizons=horizons, correct_g=group["bias_correction"])
