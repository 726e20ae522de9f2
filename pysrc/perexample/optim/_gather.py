"""What the parameters bring to a step: gradients, second moments, and the counts of their examples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..moments import ExampleCount, Moment

__all__ = ["Gathered"]


class Gathered:
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
            dense = grad is None or grad.layout is strided
            if not dense:
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
            if live or moment.grad_rounds:  # and then `version`, spelled out
                if moment.version != (grad._version, grad.data_ptr() if dense else 0):
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

    def by_count(self) -> list[set[int]]:
        """The numbers of the parameters that have gradients, by the examples that these come from."""
        members: dict[Any, set[int]] = {}
        for i, (grad, moment) in enumerate(zip(self.grads, self.moments, strict=True)):
            if grad is not None:
                key = None if moment is None else (id(moment.examples), moment.roots, id(moment.base))
                members.setdefault(key, set()).add(i)
        return list(members.values())
