"""The step of all optimizers: what was collected goes through the fused op, under a GradScaler or not."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..moments import moment_of
from ._collect import Call, Collecting
from ._state import Block

__all__ = ["FusedOptimizer"]


class FusedOptimizer(Collecting):
    """Base of the optimizers. A subclass gives `_rule`, which says what its equations are, and checks its options."""

    # GradScaler then hands the scale over instead of dividing p.grad alone, which would leave the second moment scaled.
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, batch_size: int | Tensor | None = None) -> Any:
        """Perform one step.

        Args:
            closure: reevaluates the model and returns the loss.
            batch_size: number of examples in the gradients, instead of what the converted model counted: for layers
                used without px.convert, or on a stock model.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a second moment or the number of examples is missing, a forward pass had no backward, or
                the guard found a gradient that bypassed the layers. But for the guard nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step(self._as_batch_size(batch_size))
        except BaseException:
            # GradScaler sets these for one step and deletes them after it, but not where the step raises.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise
        return loss

    def _step(self, batch_size: Tensor | None) -> None:
        self._raise_flagged()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        calls = self._collect(batch_size)
        if found_inf is not None:
            self._check_unscaled(calls, grad_scale is None)
            if grad_scale is not None:
                found_inf = self._overflowed(calls, found_inf)
        for call in calls:
            self._update(call, grad_scale, found_inf)
        # Of gradients that are zero, and of no examples: tools that save and load make a state in this way.
        for plan in self._plans.values():
            for block in plan.blocks:
                self._allocate(block)
        self._raise_flagged()

    def _check_unscaled(self, calls: list[Call], unscaled: bool) -> None:
        """Raise unless the second moments are `unscaled` (`unscale_` has divided them) just as the gradients are."""
        for call in calls:
            for p, second in zip(call.block.params, call.sums, strict=False):
                moment = moment_of(p)
                if (
                    second is None
                    or moment is None
                    or moment.unscaled_rounds == (moment.leaf_rounds if unscaled else 0)
                ):
                    continue
                name = type(self).__name__
                if not unscaled:
                    raise RuntimeError(
                        f"{name}: px.unscale_ divided the second moments, but GradScaler.step takes the gradients for "
                        f"scaled; call both with the same GradScaler"
                    )
                if moment.unscaled_rounds:
                    raise RuntimeError(
                        f"{name}: a backward pass came after px.unscale_, so that scaled and unscaled gradients are "
                        f"mixed; call it when all gradients of the step are accumulated"
                    )
                raise RuntimeError(
                    f"{name}: GradScaler.unscale_(optimizer) divided the gradients, but not their second moments; use "
                    f"px.unscale_(scaler, optimizer), or leave it out: GradScaler.step(optimizer) hands the scale over"
                )

    def _overflowed(self, calls: list[Call], found_inf: Tensor) -> Tensor:
        """`found_inf`, also raised where squares overflow under a scale at which gradients do not; flags those."""
        for call in calls:
            chosen = [
                (p, second) for p, second in zip(call.block.params, call.sums, strict=False) if second is not None
            ]
            if chosen:
                params, sums = (list(column) for column in zip(*chosen, strict=True))
                found_inf = found_inf.to(sums[0].device, non_blocking=True)
                infinite = ~torch.stack(torch._foreach_norm(sums, math.inf)).isfinite() & (found_inf == 0)
                self._flags.note("overflow", infinite, params)
                found_inf = found_inf + infinite.any()
        return found_inf

    def _as_batch_size(self, batch_size: int | Tensor | None) -> Tensor | None:
        if batch_size is None:
            return None
        if isinstance(batch_size, Tensor) and batch_size.numel() == 1:
            return batch_size.detach().reshape(()).double()
        try:
            if isinstance(batch_size, (bool, Tensor)):
                raise TypeError
            batch_size = operator.index(batch_size)  # NumPy's integers as well
        except TypeError:
            raise TypeError(
                f"{type(self).__name__}.step: batch_size must be an int or a scalar tensor, got "
                f"{type(batch_size).__name__}"
            ) from None
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__}.step: batch_size must be at least 1, got {batch_size}")
        return torch.tensor(batch_size, dtype=torch.float64)

    def _allocate(self, block: Block) -> None:
        if block.examples is None:
            block.allocate(self.state)
            self._known = list(self.state.values())

    def _update(self, call: Call, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        group, block = call.group, call.block
        self._allocate(block)
        assert block.examples is not None
        rule, device = self._rule(group), block.examples.device
        guarded = bool(call.sums) and group["guard"]
        violations = torch.zeros(len(block.params), dtype=torch.int32, device=device)
        torch.ops.perexample.optimizer_step_(
            block.params,
            call.grads,
            call.sums,
            block.flat.get("exp_avg"),
            block.flat.get("exp_avg_sq"),
            block.examples,
            violations,
            call.batch_size.to(device, non_blocking=True),
            self._rate(group, device),
            rule.horizons.get("n_g", 1.0),
            rule.horizons.get("n_s", 1.0),
            rule.eps,
            float(group["weight_decay"]),
            rule.centered,
            rule.squared_denominator,
            rule.lr_times_eps,
            rule.correct_g,
            rule.correct_s,
            group["averaging"] == "power",
            group["loss_reduction"] == "mean",
            group["maximize"],
            max(1, call.rounds) if guarded else 0,
            None if grad_scale is None else grad_scale.to(device, non_blocking=True),
            None if found_inf is None else found_inf.to(device, non_blocking=True),
        )
        # The kernel writes through raw pointers; a graph that saved these parameters has to notice.
        changed = block.params
        if any(grad is None for grad in call.grads):
            changed = [p for p, grad in zip(block.params, call.grads, strict=True) if grad is not None]
        torch.autograd.graph.increment_version(changed)
        if guarded:
            self._flags.note("guard", violations, block.params)

    def _rate(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """The learning rate as a scalar on the device, made only where it has changed."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            return lr.to(device, torch.float64, non_blocking=True)
        known = self._rates.get((id(group), device))
        if known is None or known[0] != lr:
            known = lr, torch.full((), float(lr), dtype=torch.float64, device=device)
            self._rates[id(group), device] = known
        return known[1]
