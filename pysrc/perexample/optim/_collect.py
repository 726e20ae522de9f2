"""What goes into a step: found, completed and checked before anything is changed."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..moments import ExampleCount, Moment, moment_of
from ._base import Base
from ._gather import Gathered
from ._state import Block, Plan

__all__ = ["Call", "Collecting"]


class Call(NamedTuple):
    """One call of the fused step: parameters of one block with one example count."""

    group: dict[str, Any]
    block: Block
    grads: list[Tensor | None]
    sums: list[Tensor | None]
    examples: ExampleCount | None
    batch_size: Tensor
    rounds: int  # backward passes that the gradients were accumulated over


class Collecting(Base):
    """An optimizer that collects gradients, second moments and example counts into calls of the fused step."""

    def _collect(self, batch_size: Tensor | None) -> list[Call]:
        """Find what every parameter brings; raises before anything is changed."""
        plans = [self._plan(number, group) for number, group in enumerate(self.param_groups)]
        gathered = [self._gather(plan) for plan in plans]
        if self._drop_cleared([part for parts in gathered for part in parts]):
            gathered = [self._gather(plan) for plan in plans]
        calls: list[Call] = []
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

    def _gather(self, plan: Plan) -> list[Gathered]:
        per_example = self._per_example(plan.group)
        parts = [Gathered(block.params, per_example) for block in plan.blocks]
        return [*parts, Gathered(plan.rest, per_example)] if plan.rest else parts

    def _drop_cleared(self, parts: list[Gathered]) -> bool:
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

    def _complete(self, part: Gathered, group: dict[str, Any]) -> None:
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
        if "_perexample_moment" not in p.__dict__:
            raise RuntimeError(self._no_moment(p, group))
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

    def _calls(self, group: dict[str, Any], block: Block, part: Gathered, batch_size: Tensor | None) -> Iterable[Call]:
        """One call for each example count among the parameters of a block."""
        all_sums = part.sums if self._per_example(group) else []
        for chosen in part.by_count() if part.mixed else [None]:
            grads, sums = part.grads, all_sums
            if chosen is not None:
                grads = [grad if i in chosen else None for i, grad in enumerate(grads)]
                sums = [second if i in chosen else None for i, second in enumerate(sums)]
            first = next((i for i, grad in enumerate(grads) if grad is not None), None)
            if first is None:
                continue
            p, moment = part.params[first], part.moments[first]
            examples, base = (None, None) if moment is None else (moment.examples, moment.base)
            if examples is not None and examples.missed and (batch_size is None or all_sums):
                raise RuntimeError(
                    f"{type(self).__name__}.step: part of the gradient of {self._name_of(p, group)} came from a "
                    f"forward pass in eval mode or under px.no_moments(), whose examples are not counted; make all "
                    f"alike{'' if all_sums else ', or pass step(batch_size=...)'}"
                )
            if examples is not None and examples.processes > 1 and (batch_size is None or all_sums):
                raise RuntimeError(
                    f"{type(self).__name__}.step: DistributedDataParallel averaged the gradients over "
                    f"{examples.processes} processes, but second moments and examples are those of this process; "
                    f"train in one process{'' if all_sums else ', or pass step(batch_size=...) of all together'}"
                )
            total = batch_size
            if total is None:
                total = self._counted(p, group, moment, grads)
            rounds = 1 if examples is None else examples.rounds_since(base)
            yield Call(group, block, grads, sums, examples, total, rounds)
        self._check_uses(part)

    def _check_uses(self, part: Gathered) -> None:
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
                    self._flags.note("uses", torch.tensor([used.item() > most for used in uses]), users)
                else:
                    self._flags.note("uses", torch.stack(uses) > passes, users)

    def _counted(self, p: Tensor, group: dict[str, Any], moment: Moment | None, grads: list[Tensor | None]) -> Tensor:
        """The number of examples in `grads`, of which the first is of `p`."""
        examples = None if moment is None else moment.examples
        base = None if moment is None else moment.base
        total = None if examples is None or moment is None else examples.total_of(moment.roots)
        if examples is not None and examples.uncounted and total is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step: '{examples.uncounted}' was backpropagated through outside of the "
                f"converted model as well as inside, so its examples were not all counted; convert the part that is "
                f"called by itself (px.convert(model.part)), or pass step(batch_size=...)"
            )
        if total is None and not self._per_example(group):
            zeros = [not grad.any() for grad in grads if grad is not None]
            if all(zeros):
                return torch.zeros((), dtype=torch.float64)
        if total is None:
            raise RuntimeError(
                f"{type(self).__name__}.step: no example was counted for {self._name_of(p, group)}: the backward pass "
                f"did not go through the output of a converted model (a sub-module was called directly, or px.convert "
                f"was not); call the model that was converted, convert the part that is called "
                f"(px.convert(model.part)), or pass step(batch_size=...)"
            )
        return total if base is None else total - base.total

    def _warn_beyond_horizon(self, calls: Iterable[Call]) -> None:
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
