"""Adam and AdamW on per-example second moments (MATHS 10, 11, 16-18)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._base import Rule
from ._fused import FusedOptimizer
from ._options import CHECKS, check_bool_or_pair

__all__ = ["Adam", "AdamW"]


class Adam(FusedOptimizer):
    """Adam whose second moment averages squared *per-example* gradients.

    All hyper-parameters are values for batch size 1. With B examples in the step, n examples seen so far, ``ghat``
    the mean gradient and ``s`` the mean over examples of the squared per-example gradient (MATHS 2, 11, 16-18)::

        kappa      = min(1, B / min(n, N))                                   # N = n_g, and N = n_s
        exp_avg    = (1 - kappa_g) exp_avg + kappa_g ghat
        exp_avg_sq = (1 - kappa_s) exp_avg_sq + kappa_s s
        p          = (1 - B lr weight_decay) p - B lr exp_avg / (sqrt(exp_avg_sq) + eps)

    B is what was backpropagated since the gradients were cleared: micro-batches add up, and it may change from step
    to step. An LR scheduler acts on `lr`.

    Args:
        params: parameters (or named parameters, or groups) of a converted model, or of px.nn layers.
        lr: learning rate for batch size 1 (eta_0). A float or a scalar tensor.
        n_g: averaging time of the gradient, in examples (N0_g); 1 / (1 - beta1) steps of batch size 1.
        n_s: averaging time of the second moment, in examples (N0_s).
        eps: added to the root.
        weight_decay: decoupled, per example: independent of B (MATHS 18).
        second_moment: "per_example" (MATHS 17), or "per_batch" for the square of the mean gradient (MATHS 16), which
            also works on a model that is not converted; `step` then needs its `batch_size`.
        lr_times_eps: the step is ``eps B lr`` instead of ``B lr``: for large eps this is SGD at `lr`. The decay stays.
        bias_correction: whether the averages start as plain means over the examples seen (MATHS 10, 11); otherwise
            kappa is ``min(1, B / N)`` from the first step (MATHS 9). One bool, or one each for gradient and second
            moment.
        averaging: "linear", or "power" for ``1 - (1 - 1 / N)**B`` in place of ``min(1, B / N)`` (MATHS 19).
        loss_reduction: "mean" or "sum", how the loss combines the examples of a batch. Micro-batches of a mean-reduced
            loss have to be weighted by their share of the batch, as with any optimizer.
        maximize: ascend.
        guard: raise where a gradient is larger than its second moment allows, that is, where part of it did not
            come through the layers (Cauchy-Schwarz).
        state_dtype: None for float32 (float64 for float64 parameters), or torch.bfloat16, rounded stochastically but
            the same in every run: half the memory of the state, and averages with 8 bits.

    Raises:
        TypeError, ValueError: for arguments out of range, or a parameter without second moment.

    Equivalent, for batch size 1 and without averaging-time limits, to torch.optim.AdamW with betas
    ``(1 - 1 / min(t, n_g), 1 - 1 / min(t, n_s))`` and no bias correction.
    """

    _checks = {**CHECKS, "bias_correction": check_bool_or_pair}  # noqa: RUF012  (never changed)

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        n_g: float,
        n_s: float,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        second_moment: str = "per_example",
        lr_times_eps: bool = False,
        bias_correction: bool | tuple[bool, bool] = True,
        averaging: str = "linear",
        loss_reduction: str = "mean",
        maximize: bool = False,
        guard: bool = True,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        options = dict(
            lr=lr,
            n_g=n_g,
            n_s=n_s,
            eps=eps,
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
        correct = group["bias_correction"]
        return Rule(
            averages=("exp_avg", "exp_avg_sq"),
            horizons={"n_g": float(group["n_g"]), "n_s": float(group["n_s"])},
            eps=float(group["eps"]),
            lr_times_eps=group["lr_times_eps"],
            correct_g=correct if isinstance(correct, bool) else correct[0],
            correct_s=correct if isinstance(correct, bool) else correct[1],
        )


class AdamW(Adam):
    """`Adam` with weight decay: the same equations and arguments, with torch.optim.AdamW's default `weight_decay`."""

    def __init__(
        self, params: Any, *, lr: float | Tensor, n_g: float, n_s: float, weight_decay: float = 1e-2, **options: Any
    ) -> None:
        super().__init__(params, lr=lr, n_g=n_g, n_s=n_s, weight_decay=weight_decay, **options)
