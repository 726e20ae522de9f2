"""The number of examples as a gradient, and the forward pass under way."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from .layout import PassInput, Seen
from .uses import Uses

if TYPE_CHECKING:
    from .leaf import Moment

__all__ = ["Base", "ExampleCount", "in_reentrant_checkpoint", "overlap"]


def version(grad: Tensor) -> tuple[int, int]:
    """Differs where `grad` was changed in place, or is another tensor."""
    return grad._version, grad.data_ptr() if grad.layout == torch.strided else 0


class Base(NamedTuple):
    """What the count stood at when some gradients were cleared while others went on accumulating."""

    total: Tensor
    rounds: int


class ExampleCount:
    """Counts the examples backpropagated through one model, and knows the forward pass under way."""

    def __init__(self) -> None:
        self.batch: int | None = None  # examples of the forward pass under way; None outside of one
        self.batch_dim = 0  # which dimension of the layers' inputs it is
        self.input: PassInput | None = None  # of the pass under way, in eager mode
        self.watched: tuple[dict[str, bool], list[Seen]] | None = None  # in a copy that only looks (see `PassInput`)
        self.unclear = 0  # passes in which some layer's input did not show where its batch is
        self.lone = False  # whether it is of one example, and every input says so
        self.training = False  # whether the model that began the pass is in training
        self.used: dict[str, str] = {}  # the parameters that it has used so far, and how (see `MomentModule`)
        self.uses: dict[Moment, Uses] = {}  # of those, the uses in eager mode with second moments
        self.root = ""  # name of the module that began the pass
        self.rooted = False  # whether a converted model counts here at all
        self.nested: dict[str, int] = {}  # converted parts that were called inside of a pass
        self.unnoticed = False  # whether a pass was made that counts nothing, though its output has gradients
        self.missed = False  # whether such a one was backpropagated through, to parameters
        self._missed_task = -1  # the backward pass that went through the output of such a one
        self.uncounted = ""  # a parameter that was backpropagated through outside of any pass
        self.last_batch = 0
        self.passes = 0  # forward passes in eager mode, since the last conversion
        self.processes = 1  # over how many DistributedDataParallel averages the gradients of the last pass
        self.unfinished: list[Uses] = []  # with pieces that the backward pass under way has not contracted
        self.backward: dict[int, set[int]] = {}  # the examples of the forward passes that are being backpropagated
        self.rounds = 0  # backward passes since the count was cleared
        self.forward_pending = False
        self.following = 0  # of how many moments the layers take copies (see `nn.fallback.follow_copies`)
        self._reset()

    def _reset(self) -> None:
        # By the name of each converted model or part: leaves whose gradients are the number of examples, and the
        # number of forward passes that they came in.
        self.roots: dict[str, tuple[Tensor, Tensor]] = {}
        self.root_names: list[str] = []
        self.touched = ""  # a parameter that the backward pass under way has reached
        self.counted = False  # whether that pass has reached a count
        self._task = -1
        self.moments: list[weakref.ref[Moment]] = []
        self._in_round = False

    def __getstate__(self) -> dict[str, Any]:
        return {"rooted": self.rooted, "root_names": self.root_names, "batch_dim": self.batch_dim}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.rooted = state["rooted"]
        self.root_names = state["root_names"]
        self.batch_dim = state.get("batch_dim", 0)

    def add(self, moment: Moment) -> None:
        self.moments = [ref for ref in self.moments if ref() not in (None, moment)]
        self.moments.append(weakref.ref(moment))
        self._place(moment)

    def add_root(self, name: str) -> None:
        """Count what passes through the converted model or part called `name`."""
        self.rooted, self.passes = True, 0
        if name not in self.root_names:
            self.root_names = [*self.root_names, name]
        for ref in self.moments:
            moment = ref()
            if moment is not None:
                self._place(moment)
                if moment.leaf is not None:
                    self.follow(moment.leaf.device)

    def _place(self, moment: Moment) -> None:
        moment.roots = tuple(root for root in self.root_names if any(overlap(root, name) for name in moment.names))

    def follow(self, device: torch.device) -> None:
        """Keep the counts where the parameters are."""
        for name in self.root_names:
            old = self.roots.get(name)
            if old is None or (old[0].device != device and old[0].grad is None):
                # MPS has no float64; float32 counts exactly up to 2**24 examples a step.
                dtype = torch.float32 if device.type == "mps" else torch.float64
                leaf = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
                leaf.register_hook(self._before_count)
                self.roots[name] = leaf, torch.zeros((), device=device, requires_grad=True)

    def _before_count(self, grad: Tensor) -> None:
        self.begin_round()
        self.counted = True
        self.forward_pending = False

    def begin_round(self) -> None:
        """Called by every hook of a backward pass; acts in the first one only.

        A pass lasts until the engine says so: reentrant checkpointing runs backward passes inside of one. One that
        raised never says so; then the next forward pass of the model does, or without a model the next backward pass.
        """
        if self._in_round and self.rooted:
            return
        task = torch._C._current_graph_task_id()
        if self._in_round and task == self._task:
            return
        self._in_round, self._task, self.touched, self.counted = True, task, "", False
        torch.autograd.Variable._execution_engine.queue_callback(self._end_round)
        self.drop_cleared()
        self.rounds += 1

    def _end_round(self) -> None:
        self._in_round = False
        if self.rooted and self._missed_task == self._task:
            self.missed = True
        elif self.rooted and not self.counted:
            if self.touched:
                self.uncounted = self.touched
            elif self.unnoticed:
                self.missed, self.unnoticed = True, False

    def alive(self) -> list[Moment]:
        return [m for ref in self.moments if (m := ref()) is not None and m.live]

    def drop_cleared(self, candidates: Iterable[Moment] | None = None) -> None:
        """Drop the second moments (of `candidates`, or all) whose ``p.grad`` was cleared since they were made."""
        cleared, changed = [], []
        everything = candidates is None
        for moment in [m for ref in self.moments if (m := ref()) is not None] if candidates is None else candidates:
            if moment.live or moment.grad_rounds:
                owner = moment.owner()  # spelled out: this runs for every parameter in every step
                p = None if owner is None else owner._parameters.get(moment.parameter_name)
                if len(moment.places) > 1:
                    p = moment.parameter  # type: ignore[assignment]
                grad = None if p is None else p.grad
                if grad is None:
                    cleared.append(moment)
                elif version(grad) != moment.version:
                    changed.append((moment, grad))
        if changed and not everything:
            return self.drop_cleared()  # what happened to one gradient shows in all
        if changed:
            # zero_grad(set_to_none=False) is an in-place change that leaves nothing but zeros.
            norms = torch._foreach_norm([g._values() if g.is_sparse else g for _, g in changed], math.inf)
            zero = [norm.item() == 0 for norm in norms]
            scaled = not all(zero)  # clipping, say, which leaves alone what was zero before
            for (moment, grad), is_zero in zip(changed, zero, strict=True):
                moment.version = version(grad)
                if not is_zero:
                    continue
                if scaled and moment.live and moment.leaf is not None and moment.leaf.grad is not None:
                    if moment.leaf.grad.any():  # a sum of zeros may stay: it adds nothing
                        moment.ambiguous, moment.leaf_rounds = True, -1
                else:
                    cleared.append(moment)
        if not self.drop(cleared) and everything and not self.alive():
            self.clear()

    def drop(self, moments: Iterable[Moment]) -> bool:
        """Drop `moments`; the count goes with the last one, and till then is remembered as their base.

        Returns whether it went.
        """
        dropped = []
        for moment in moments:
            moment.live = moment.eager = moment.ambiguous = False
            moment.leaf_rounds = moment.grad_rounds = moment.unscaled_rounds = 0
            if moment.leaf is not None and moment.uses is not None:
                moment.leaf.grad = moment.uses.grad = None
            dropped.append(moment)
        if not dropped:
            return False
        if self.alive():
            bases: dict[tuple[str, ...], Base | None] = {}
            for moment in dropped:
                if moment.roots not in bases:
                    total = self.total_of(moment.roots)
                    bases[moment.roots] = None if total is None else Base(total.clone(), self.rounds)
                moment.base = bases[moment.roots]
            return False
        self.clear()
        return True

    def clear(self) -> None:
        for leaf, passes in self.roots.values():
            leaf.grad = passes.grad = None
        self.rounds = 0
        self.uncounted = ""
        self.missed = False
        for ref in self.moments:
            moment = ref()
            if moment is not None:
                moment.base = None

    def end_pass(self) -> None:
        """The forward pass under way is over, or none was."""
        self.batch = self.input = None
        self.used = {}
        for uses in self.uses.values():
            uses.expanded = None
        self.uses = {}

    def forget_backward(self) -> None:
        """No backward pass is under way; the last one may have raised."""
        self._in_round = False
        self.backward = {}
        for uses in self.unfinished:
            uses.pieces = None
            uses.moment.waiting.clear()
        self.unfinished = []

    def note_backward(self, batch: int) -> None:
        """A backward pass has begun to go through the output of a forward pass of `batch` examples."""
        task = torch._C._current_graph_task_id()
        if task not in self.backward:
            self.backward = {task: {batch}}
        else:
            self.backward[task].add(batch)

    def note_missed(self, *_: object) -> None:
        """A backward pass goes through the output of a forward pass that used parameters and counted no examples."""
        self._missed_task = torch._C._current_graph_task_id()

    def recomputed_batch(self, who: str) -> int:
        """The examples of the forward pass that checkpointing repeats in the backward pass under way."""
        batches: set[int] = set().union(*self.backward.values())
        if len(batches) != 1:
            raise RuntimeError(
                f"{who}: checkpointing repeats a forward pass of one of {sorted(batches)} examples, and which cannot "
                f"be told; run the backward of each micro-batch by itself, or keep this module out of the checkpoint"
            )
        return next(iter(batches))

    def rounds_since(self, base: Base | None) -> int:
        return self.rounds - (0 if base is None else base.rounds)

    def leaves(self) -> tuple[Tensor, Tensor]:
        """What `autograd.count_examples` takes: the leaves of the model whose pass is under way."""
        return self.roots[self.root]

    def total_of(self, roots: Iterable[str]) -> Tensor | None:
        """The examples that passed through any of `roots` since the last clearing: a scalar on the device, or None."""
        return _sum_or_none(self.roots[root][0].grad for root in roots if root in self.roots)

    def passes_of(self, roots: Iterable[str]) -> Tensor | None:
        return _sum_or_none(self.roots[root][1].grad for root in roots if root in self.roots)

    @property
    def total(self) -> Tensor | None:
        """The examples counted since the last clearing, wherever: a scalar on the device, or None."""
        return self.total_of(self.root_names)


def _sum_or_none(values: Iterable[Tensor | None]) -> Tensor | None:
    total = None
    for value in values:
        if value is not None:
            total = value if total is None else total + value
    return total


def overlap(first: str, second: str) -> bool:
    """Whether one of two dotted names is inside of the other; "" is the whole."""
    short, long = sorted((first, second), key=len)
    return not short or short == long or long.startswith(f"{short}.")


def in_reentrant_checkpoint() -> bool:
    """Whether torch.utils.checkpoint(use_reentrant=True) is running the caller, without gradients."""
    code = CheckpointFunction.forward.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
