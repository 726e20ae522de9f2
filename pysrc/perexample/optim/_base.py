"""What all optimizers share outside of the step: their groups and options, clearing, saving and loading."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..moments import ExampleCount, Moment, moment_of
from ._flags import Flags
from ._options import CHECKS
from ._state import Plan, check_saved, restored

__all__ = ["Base", "Rule"]


class Rule(NamedTuple):
    """What the fused step computes for a group: see `perexample.ops.optimizer_step_`."""

    averages: tuple[str, ...]  # those of "exp_avg", "exp_avg_sq" that are kept
    horizons: dict[str, float] = {}  # noqa: RUF012  (never changed)  n_g, n_s, as far as they are used
    eps: float = 0.0
    centered: bool = False
    squared_denominator: bool = False
    lr_times_eps: bool = False
    correct_g: bool = False
    correct_s: bool = False


FLAGGED = {
    "uses": (
        "{} was used more than once in one forward pass: its uses have to be added per example before squaring, which "
        "is not supported yet; use a layer of its own for each call"
    ),
    "guard": (
        "the gradient of {} is larger than its second moment allows ((sum_b c_b)**2 <= B sum_b c_b**2): part of it did "
        "not come through the layer. Usual causes: F.linear or F.conv2d on the layer's weight, a hook or code that "
        "changed p.grad, a penalty on the weights in the loss (use weight_decay, which is decoupled), a wrong "
        "batch_size. guard=False turns this check off. The step has been applied"
    ),
    "overflow": (
        "the second moment of {} is not finite, though its gradient is: the scale of GradScaler has grown until the "
        "squares overflowed. Only float16 needs a GradScaler: use GradScaler(enabled=False), or one whose growth is "
        "limited. The step has not been applied"
    ),
}


class Base(Optimizer):
    """An optimizer without its step. A subclass gives `_rule`, which says what its equations are."""

    _checks = CHECKS  # of the options

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._prepare()
        super().__init__(params, defaults)

    def _rule(self, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise where options, each of them right, do not go together."""

    def _prepare(self) -> None:
        self._plans: dict[int, Plan] = {}
        self._known: list[dict[str, Any]] = []  # the states of the last step
        self._rates: dict[tuple[int, torch.device], tuple[float, Tensor]] = {}
        self._flags = Flags()
        self._warned = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    # ---- Groups and their options -------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked here, and that its parameters have a second moment where needed."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        for option, check in self._checks.items():
            if option in self.defaults:
                check(name, option, group[option])
        rule = self._rule(group)
        for horizon, corrected in (("n_g", rule.correct_g), ("n_s", rule.correct_s)):
            if math.isinf(rule.horizons.get(horizon, 1.0)) and not corrected:
                raise ValueError(
                    f"{name}: {horizon} must be finite without bias_correction, got inf: the average would take in "
                    f"nothing"
                )
        self._check_options(group)
        for index, p in enumerate(group["params"]):
            if p.is_complex():
                raise TypeError(
                    f"{name}: {self._name_of(p, group, index)} is complex; only real parameters are supported"
                )
            if self._per_example(group) and p.requires_grad and moment_of(p) is None:
                raise ValueError(self._no_moment(p, group, index))

    def _no_moment(self, p: Tensor, group: dict[str, Any], index: int | None = None) -> str:
        return (
            f"{type(self).__name__}: {self._name_of(p, group, index)}, of shape {tuple(p.shape)}, has no second "
            f"moment: no layer of perexample owns it; call px.convert(model) before making the optimizer, or use "
            f"second_moment='per_batch'"
        )

    @staticmethod
    def _per_example(group: dict[str, Any]) -> bool:
        return group.get("second_moment") == "per_example"

    def _name_of(self, p: Tensor, group: dict[str, Any], index: int | None = None) -> str:
        moment = moment_of(p)
        if moment is not None and moment.name:
            return f"parameter '{moment.name}'"
        if index is None:
            index = next(i for i, q in enumerate(group["params"]) if q is p)
        if "param_names" in group:
            return f"parameter '{group['param_names'][index]}'"
        return f"parameter {index} of its group"

    # ---- Flags that are raised on the device --------------------------------------------------------------------

    def _raise_flagged(self) -> None:
        """Raise for what was flagged; on an accelerator only once the flags have arrived, a step late."""
        for kind, params in self._flags.arrived().items():
            groups = {id(p): group for group in self.param_groups for p in group["params"]}
            names = ", ".join(self._name_of(p, groups[id(p)]) for p in params[:5])
            more = f" and {len(params) - 5} more" if len(params) > 5 else ""
            raise RuntimeError(f"{type(self).__name__}.step: {FLAGGED[kind].format(names + more)}")

    # ---- Clearing and loading -----------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, the second moments and the example count."""
        super().zero_grad(set_to_none)
        touched: dict[int, tuple[ExampleCount, list[Moment]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                moment = moment_of(p)
                if moment is not None:
                    touched.setdefault(id(moment.examples), (moment.examples, []))[1].append(moment)
        for examples, moments in touched.values():
            examples.drop(moments)
            if not examples.alive():
                examples.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, bit for bit, onto the devices of the parameters.

        The state keeps its own dtype, whatever the parameter's.

        Raises:
            ValueError: it is of another optimizer, or does not fit the parameters; nothing has changed then.
        """
        saved: dict[str, Any] = {}

        def check(_: Optimizer, final: dict[str, Any]) -> None:  # what the hooks that came before have made of it
            saved.update(final)
            check_saved(type(self).__name__, final, self.param_groups, self.defaults)
            if any(self._per_example(group) for group in final["param_groups"]):
                self._check_owned(final)

        def restore(_: Optimizer) -> None:  # torch has cast the state to the parameters' dtypes
            self._prepare()
            self.state.update(restored(saved, self.param_groups))

        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_owned(self, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for index, p in enumerate(group["params"]):
                if self._per_example(saved) and p.requires_grad and moment_of(p) is None:
                    raise ValueError(self._no_moment(p, group, index))
