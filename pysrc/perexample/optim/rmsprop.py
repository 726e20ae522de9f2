"""RMSprop on per-example second moments (MATHS 9, 15, 17)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._base import Rule
from ._fused import FusedOptimizer

__all__ = ["RMSprop"]


class RMSprop(FusedOptimizer):
    """RMSprop whose second moment averages squared *per-example* gradients.

    All hyper-parameters are values for batch size 1. With B examples in the step, ``ghat`` the mean gradient and ``s``
    the mean over examples of the squared per-example gradient (MATHS 2, 9, 15, 17, 18)::

        kappa      = min(1, B / n_s)
        exp_avg_sq = (1 - kappa) exp_avg_sq + kappa s
        d          = exp_avg_sq                                              # sigma**2
        p          = (1 - B lr weight_decay) p - B lr ghat / (sqrt(d) + eps)

    With `centered`, ``exp_avg = (1 - kappa) exp_avg + kappa ghat`` and ``d = exp_avg_sq - exp_avg**2``: the variance of
    the per-example gradient in place of its second moment.

    Args:
        params: parameters (or named parameters, or groups) of a converted model, or of px.nn layers.
        lr: learning rate for batch size 1 (eta_0). A float or a scalar tensor.
        n_s: averaging time of the second moment, in examples (N0_s); 1 / (1 - alpha) steps of batch size 1.
        eps: added to the denominator.
        centered: the variance in the denominator.
        denominator: "sigma", or "sigma_squared" for ``d + eps`` in place of ``sqrt(d) + eps``, with which lr has the
            units of the parameter's square over the loss.
        weight_decay: decoupled, per example: independent of B (MATHS 18).
        second_moment: "per_example" (MATHS 17), or "per_batch" for the square of the mean gradient (MATHS 15), which
            also works on a model that is not converted; `step` then needs its `batch_size`.
        lr_times_eps: the step is ``eps B lr`` instead of ``B lr``: for large eps this is SGD at `lr`. The decay stays.
        bias_correction: whether the average starts as the plain mean over the n examples seen: kappa is then
            ``min(1, B / min(n, n_s))`` (MATHS 11). Not with `centered`: the variance of one value is 0.
        averaging: "linear", or "power" for ``1 - (1 - 1 / n_s)**B`` in place of ``min(1, B / n_s)`` (MATHS 19).
        loss_reduction, maximize, guard, state_dtype: as in `Adam`.

    Raises:
        TypeError, ValueError: for arguments out of range, or a parameter without second moment.

    Equivalent, per batch, to torch.optim.RMSprop with ``lr=B * lr`` and ``alpha=1 - B / n_s``.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        n_s: float,
        eps: float = 1e-8,
        centered: bool = False,
        denominator: str = "sigma",
        weight_decay: float = 0.0,
        second_moment: str = "per_example",
        lr_times_eps: bool = False,
        bias_correction: bool = False,
        averaging: str = "linear",
        loss_reduction: str = "mean",
        maximize: bool = False,
        guard: bool = True,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        options = dict(
            lr=lr,
            n_s=n_s,
            eps=eps,
            centered=centered,
            denominator=denominator,
            weight_decay=weight_decay,
            second_moment=second_moment,
            lr_times_eps=lr_times_eps,
            bias_correction=bias_correction,
            averaging=averaging,
            loss_reduction=loss_reduction,
            maximize=maximize,
            guard=guard,
            state_dtype=state_dtype,
        )
        super().__init__(params, options)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            averages=("exp_avg", "exp_avg_sq") if group["centered"] else ("exp_avg_sq",),
            horizons={"n_s": float(group["n_s"])},
            eps=float(group["eps"]),
            centered=group["centered"],
            squared_denominator=group["denominator"] == "sigma_squared",
            lr_times_eps=group["lr_times_eps"],
            correct_s=group["bias_correction"],
        )

    def _check_options(self, group: dict[str, Any]) -> None:
        if group["centered"] and group["bias_correction"]:
            raise ValueError(
                f"{type(self).__name__}: bias_correction must be False with centered=True, got True: the variance of "
                f"the first value is 0, and would be the denominator of the first step"
            )
