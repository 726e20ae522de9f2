"""What all optimizers share: they collect gradients, second moments and example counts, and call the fused step."""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..moments import ExampleCount, Moment, moment_of
from ..moments.count import version as version_of
from ._options import check_bool, check_choice, check_number, check_rate, check_state_dtype
from ._state import Block, Plan, state_dtype_of

__all__ = ["FusedOptimizer", "Rule"]


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


class _Gathered:
    """What some parameters bring to a step: one entry for each, None where it has no part.

    This is the part of a step that looks at every parameter, so it looks once, and calls nothing that it need not.
    """

    def __init__(self, params: list[Tensor], per_example: bool) -> None:
        self.params = params
        self.grads = [p.grad for p in params]
        self.moments: list[Moment | None] = [  # `moment_of`, spelled out
            moment if (moment := p.__dict__.get("_perexample_moment")) is None or moment.bound == id(p) else None
            for p in params
        ]
        self.sums: list[Tensor | None] = []  # second moments, as far as they are there and complete
        self.counts: dict[int, tuple[ExampleCount, int]] = {}  # example counts, and how many moments are of each
        self.stale = False  # whether some gradients were cleared, and their second moments were not yet
        self.live = False  # whether any second moment is there
        self.odd = False  # whether any gradient is sparse or lacks its second moment
        self.mixed = False  # whether example counts differ
        self.uses: list[Tensor] = []  # for each layer once: how often its parameters were used
        self.users: list[Tensor] = []  # a parameter of that layer
        first: Moment | None = None
        examples: ExampleCount | None = None
        strangers = False  # whether parameters without Moment have gradients
        number, last_uses, strided, add = 0, None, torch.strided, self.sums.append
        for p, grad, moment in zip(params, self.grads, self.moments, strict=True):
            second = None
            if grad is not None and grad.layout is not strided:
                self.odd = True
            if moment is None:
                if grad is not None:
                    strangers = True
                    self.odd = self.odd or per_example
                add(None)
                continue
            if moment.examples is not examples:
                if examples is not None:
                    self._count(examples, number)
                examples, number = moment.examples, 0
            number += 1
            if grad is None:
                if moment.live or moment.grad_rounds:
                    self.stale = True
                add(None)
                continue
            if first is None:
                first = moment
            elif moment.examples is not first.examples or moment.base is not first.base or moment.roots != first.roots:
                self.mixed = True
            live = moment.live
            if (live or moment.grad_rounds) and moment.version != version_of(grad):
                self.stale = True
            if live:
                self.live = True
                if per_example and moment.leaf_rounds == moment.grad_rounds and moment.leaf is not None:
                    second = moment.leaf.grad
                    if moment.uses is not last_uses and second is not None:
                        last_uses = moment.uses
                        uses = None if last_uses is None else last_uses.grad
                        if uses is not None:
                            # Beside uses in eager mode, these may have been in the same forward pass as well.
                            self.uses.append(uses + math.inf if moment.eager else uses)
                            self.users.append(p)
            if second is None and per_example:
                self.odd = True
            add(second)
        if examples is not None:
            self._count(examples, number)
        self.mixed = self.mixed or (strangers and first is not None)

    def _count(self, examples: ExampleCount, number: int) -> None:
        before = self.counts.get(id(examples), (examples, 0))[1]
        self.counts[id(examples)] = examples, before + number


class _Call(NamedTuple):
    """One call of the fused step: parameters of one block with one example count."""

    group: dict[str, Any]
    block: Block
    grads: list[Tensor | None]
    sums: list[Tensor | None]
    examples: ExampleCount | None
    batch_size: Tensor
    rounds: int  # backward passes that the gradients were accumulated over


class FusedOptimizer(Optimizer):
    """Base of the optimizers. A subclass gives `_rule`, which says what its equations are, and checks its options."""

    # GradScaler then hands the scale over instead of dividing p.grad alone, which would leave the second moment scaled.
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._prepare()
        super().__init__(params, defaults)

    def _rule(self, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

    def _check_options(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _prepare(self) -> None:
        self._plans: dict[int, Plan] = {}
        self._known: list[dict[str, Any]] = []  # the states of the last step
        self._rates: dict[tuple[int, torch.device], tuple[float, Tensor]] = {}
        self._pending_flags: list[tuple[Tensor, Any, list[Tensor], str]] = []
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
        check_rate(name, group["lr"])
        check_number(name, "weight_decay", group["weight_decay"], 0.0)
        check_choice(name, "averaging", group["averaging"], ("linear", "power"))
        check_choice(name, "loss_reduction", group["loss_reduction"], ("mean", "sum"))
        check_bool(name, "maximize", group["maximize"])
        check_state_dtype(name, group["state_dtype"])
        self._check_options(group)
        for index, p in enumerate(group["params"]):
            if p.is_complex():
                raise TypeError(
                    f"{name}: {self._name_of(p, group, index)} is complex; only real parameters are supported"
                )
            if self._per_example(group) and p.requires_grad and moment_of(p) is None:
                raise ValueError(
                    f"{name}: {self._name_of(p, group, index)}, of shape {tuple(p.shape)}, has no second moment: no "
                    f"layer of perexample owns it; call px.convert(model) before making the optimizer, or use "
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

    # ---- The step -----------------------------------------------------------------------------------------------

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
        if found_inf is not None and grad_scale is None and any(call.sums for call in calls):
            raise RuntimeError(
                f"{type(self).__name__}: GradScaler.unscale_(optimizer) divided the gradients but cannot divide their "
                f"second moments; leave out unscale_, GradScaler.step(optimizer) hands the scale over"
            )
        for call in calls:
            self._update(call, grad_scale, found_inf)
        self._raise_flagged()

    def _as_batch_size(self, batch_size: int | Tensor | None) -> Tensor | None:
        if batch_size is None:
            return None
        if isinstance(batch_size, Tensor) and batch_size.numel() == 1:
            return batch_size.detach().reshape(()).double()
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(
                f"{type(self).__name__}.step: batch_size must be an int or a scalar tensor, got "
                f"{type(batch_size).__name__}"
            )
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__}.step: batch_size must be at least 1, got {batch_size}")
        return torch.tensor(batch_size, dtype=torch.float64)

    def _update(self, call: _Call, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        group, block = call.group, call.block
        if block.examples is None:
            block.allocate(self.state)
            self._known = list(self.state.values())
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
            group["weight_decay"],
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
            self._note_flags(violations, block.params, "guard")

    def _rate(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """The learning rate as a scalar on the device, made only where it has changed."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            return lr.to(device, torch.float64)
        known = self._rates.get((id(group), device))
        if known is None or known[0] != lr:
            known = lr, torch.full((), lr, dtype=torch.float64, device=device)
            self._rates[id(group), device] = known
        return known[1]

    # ---- What goes into the step --------------------------------------------------------------------------------

    def _collect(self, batch_size: Tensor | None) -> list[_Call]:
        """Find what every parameter brings; raises before anything is changed."""
        plans = [self._plan(number, group) for number, group in enumerate(self.param_groups)]
        gathered = [self._gather(plan) for plan in plans]
        if self._drop_cleared([part for parts in gathered for part in parts]):
            gathered = [self._gather(plan) for plan in plans]
        calls: list[_Call] = []
        for plan, parts in zip(plans, gathered, strict=True):
            for block, part in zip(plan.blocks, parts, strict=False):
                if part.odd:
                    self._complete(part, plan.group)
                calls += self._calls(plan.group, block, part, batch_size)
        everything = [count for parts in gathered for part in parts for count, _ in part.counts.values()]
        if not calls and any(count.forward_pending for count in everything):
            raise RuntimeError(
                f"{type(self).__name__}.step: a forward pass was made, but its backward never came, so no parameter "
                f"has a gradient; call loss.backward() before step()"
            )
        self._raise_flagged()
        self._warn_beyond_horizon(calls)
        return calls

    def _plan(self, number: int, group: dict[str, Any]) -> Plan:
        """The blocks of a group, as before where nothing has changed."""
        names = self._rule(group).averages
        plan = self._plans.get(number)
        states = list(self.state.values())
        same = len(states) == len(self._known) and all(map(operator.is_, states, self._known))
        if plan is None or plan.group is not group or not plan.fits(names, None if same else self.state):
            plan = self._plans[number] = Plan(group, names)
        plan.take_in(self.state)
        return plan

    def _gather(self, plan: Plan) -> list[_Gathered]:
        per_example = self._per_example(plan.group)
        parts = [_Gathered(block.params, per_example) for block in plan.blocks]
        return [*parts, _Gathered(plan.rest, per_example)] if plan.rest else parts

    def _drop_cleared(self, parts: list[_Gathered]) -> bool:
        """Drop second moments of gradients that were cleared, also of parameters that are not ours.

        Returns whether that may have changed something. Where ours are all that there are, they were all looked at.
        """
        counts = {key: count for part in parts for key, (count, _) in part.counts.items()}
        ours = sum(number for part in parts for _, number in part.counts.values())
        theirs = sum(len(count.moments) for count in counts.values())
        if ours == theirs and any(part.live for part in parts) and not any(part.stale for part in parts):
            return False
        for count in counts.values():
            count.drop_cleared()
        return True

    def _complete(self, part: _Gathered, group: dict[str, Any]) -> None:
        """Raise where a gradient has no second moment or is sparse."""
        for i, (p, grad, second) in enumerate(zip(part.params, part.grads, part.sums, strict=True)):
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}: {self._name_of(p, group)} has a sparse gradient; use a dense one"
                )
            if second is None and self._per_example(group):
                self._refuse_incomplete(p, grad, part.moments[i], group)
                part.grads[i] = None  # zero_grad(set_to_none=False), and no gradient since

    def _refuse_incomplete(self, p: Tensor, grad: Tensor, moment: Moment | None, group: dict[str, Any]) -> None:
        """Raise for a gradient without second moment, unless it is nothing but zeros."""
        if moment is not None and moment.ambiguous:
            raise RuntimeError(
                f"{type(self).__name__}.step: the gradient of {self._name_of(p, group)} is zero everywhere and was "
                f"changed in place while others were too, so whether it was cleared or clipped cannot be told; clear "
                f"gradients with set_to_none=True, and clip with px.clip_grad_norm_"
            )
        if moment is not None and moment.live and moment.leaf is not None and moment.leaf.grad is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step: the gradient of {self._name_of(p, group)} was accumulated in "
                f"{moment.grad_rounds} backward passes, its second moment in {moment.leaf_rounds}: some ran in "
                f"eval mode, under px.no_moments(), past the layer, with backward(inputs=...), or before a "
                f"change of dtype or device; clear the gradients and accumulate all in one way"
            )
        if moment is None or bool(grad.any()):
            raise RuntimeError(
                f"{type(self).__name__}.step: {self._name_of(p, group)} has a gradient but no second moment: its "
                f"forward pass ran in eval mode, under px.no_moments(), or outside of the layer that owns it (F.linear "
                f"on its weight, say); run the layer itself in training mode"
            )

    def _calls(
        self, group: dict[str, Any], block: Block, part: _Gathered, batch_size: Tensor | None
    ) -> Iterable[_Call]:
        """One call for each example count among the parameters of a block."""
        all_sums = part.sums if self._per_example(group) else []
        for chosen in self._by_count(part) if part.mixed else [None]:
            grads, sums = part.grads, all_sums
            if chosen is not None:
                grads = [grad if i in chosen else None for i, grad in enumerate(grads)]
                sums = [second if i in chosen else None for i, second in enumerate(sums)]
            first = next((i for i, grad in enumerate(grads) if grad is not None), None)
            if first is None:
                continue
            p, moment = part.params[first], part.moments[first]
            examples, base = (None, None) if moment is None else (moment.examples, moment.base)
            total = batch_size if batch_size is not None else self._counted(p, group, moment)
            rounds = 1 if examples is None else examples.rounds_since(base)
            yield _Call(group, block, grads, sums, examples, total, rounds)
        self._check_uses(part)

    @staticmethod
    def _by_count(part: _Gathered) -> list[set[int]]:
        """The numbers of the parameters that have gradients, by the examples that these come from."""
        members: dict[Any, set[int]] = {}
        for i, (grad, moment) in enumerate(zip(part.grads, part.moments, strict=True)):
            if grad is not None:
                key = None if moment is None else (id(moment.examples), moment.roots, id(moment.base))
                members.setdefault(key, set()).add(i)
        return list(members.values())

    def _check_uses(self, part: _Gathered) -> None:
        """Flag the layers that were used more often than there were passes, which only autograd could count."""
        by_count: dict[Any, list[int]] = {}
        for i, user in enumerate(part.users if part.mixed else part.users[:1]):
            moment = moment_of(user)
            assert moment is not None
            by_count.setdefault((id(moment.examples), moment.roots), []).append(i)
        for members in by_count.values():
            moment = moment_of(part.users[members[0]])
            assert moment is not None
            examples = moment.examples
            passes = examples.passes_of(moment.roots) if examples.roots else examples.rounds
            if not examples.uncounted and passes is not None:
                uses = [part.uses[i] for i in members] if part.mixed else part.uses
                users = [part.users[i] for i in members] if part.mixed else part.users
                if uses[0].device.type == "cpu":  # a tenth of the time where the layers are many and small
                    most = float(passes)
                    self._note_flags(torch.tensor([used.item() > most for used in uses]), users, "uses")
                else:
                    self._note_flags(torch.stack(uses) > passes, users, "uses")

    def _counted(self, p: Tensor, group: dict[str, Any], moment: Moment | None) -> Tensor:
        examples = None if moment is None else moment.examples
        base = None if moment is None else moment.base
        total = None if examples is None or moment is None else examples.total_of(moment.roots)
        if examples is not None and examples.uncounted and total is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step: '{examples.uncounted}' was backpropagated through outside of the "
                f"converted model as well as inside, so its examples were not all counted; convert the part that is "
                f"called by itself (px.convert(model.part)), or pass step(batch_size=...)"
            )
        if total is None:
            raise RuntimeError(
                f"{type(self).__name__}.step: no example was counted for {self._name_of(p, group)}: the backward pass "
                f"did not go through the output of a converted model (a sub-module was called directly, or px.convert "
                f"was not); call the model that was converted, convert the part that is called "
                f"(px.convert(model.part)), or pass step(batch_size=...)"
            )
        return total if base is None else total - base.total

    def _warn_beyond_horizon(self, calls: Iterable[_Call]) -> None:
        """MATHS (12): beyond N nothing is averaged, and batch-size invariance ends. Said once, from host values."""
        if self._warned:
            return
        for call in calls:
            horizons = self._rule(call.group).horizons
            if not horizons or call.group["averaging"] == "power":
                continue
            if call.batch_size.device.type == "cpu":
                size = int(call.batch_size)
            else:
                size = 0 if call.examples is None else call.examples.last_batch
            horizon = min(horizons.values())
            if size > horizon:
                self._warned = True
                warnings.warn(
                    f"{type(self).__name__}: the batch of {size} examples is larger than the averaging time of "
                    f"{horizon:g} examples ({', '.join(horizons)}): nothing is averaged, and from here on results "
                    f"depend on the batch size",
                    stacklevel=7,
                )
                return

    # ---- Flags that are raised on the device --------------------------------------------------------------------

    def _note_flags(self, flags: Tensor, params: list[Tensor], kind: str) -> None:
        """Remember to raise for the flagged ones of `params`; on an accelerator the flags travel without a sync."""
        if flags.device.type == "cpu":
            self._pending_flags.append((flags, None, params, kind))
        elif not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event()
            arriving = flags.to("cpu", non_blocking=True)
            event.record()
            self._pending_flags.append((arriving, event, params, kind))

    def _raise_flagged(self) -> None:
        """Raise for what was flagged; on an accelerator only once the flags have arrived, a step late."""
        waiting = []
        flagged: dict[str, list[Tensor]] = {}
        for entry in self._pending_flags:
            flags, event, params, kind = entry
            if event is not None and not event.query():
                waiting.append(entry)
            elif bool(flags.any()):
                flagged.setdefault(kind, []).extend(params[i] for i in flags.nonzero().flatten().tolist())
        self._pending_flags = [] if flagged else waiting
        for kind, params in flagged.items():
            groups = {id(p): group for group in self.param_groups for p in group["params"]}
            names = ", ".join(self._name_of(p, groups[id(p)]) for p in params[:5])
            more = f" and {len(params) - 5} more" if len(params) > 5 else ""
            if kind == "uses":
                raise RuntimeError(
                    f"{type(self).__name__}.step: {names}{more} was used more than once in one forward pass: its uses "
                    f"have to be added per example before squaring, which is not supported yet; use a layer of its own "
                    f"for each call"
                )
            raise RuntimeError(
                f"{type(self).__name__}.step: the gradient of {names}{more} is larger than its second moment allows "
                f"((sum_b c_b)**2 <= B sum_b c_b**2): part of it did not come through the layer. Usual causes: "
                f"F.linear or F.conv2d on the layer's weight, a hook or code that changed p.grad, a penalty on the "
                f"weights in the loss (use weight_decay, which is decoupled), a wrong batch_size. guard=False turns "
                f"this check off. The step has been applied"
            )

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
        """
        for group in state_dict["param_groups"]:
            missing = sorted(self.defaults.keys() - group.keys())
            if missing:
                raise ValueError(
                    f"{type(self).__name__}.load_state_dict: a group lacks {', '.join(missing)}: the state_dict must "
                    f"be of px.optim.{type(self).__name__}; px.optim.translate gives the settings of one of "
                    f"torch.optim"
                )
        super().load_state_dict(state_dict)
        self._prepare()
        groups = [(group, p) for group in self.param_groups for p in group["params"]]
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for (group, p), key in zip(groups, saved, strict=True):
            if key in state_dict["state"]:
                kept = state_dtype_of(p, group)
                self.state[p] = {
                    name: value.to(p.device, torch.float64 if name == "examples" else kept, copy=True)
                    for name, value in state_dict["state"][key].items()
                }
