"""State of an optimizer in one piece for each device and dtype, of which every parameter's state is a view."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops._library import accumulate_dtype
from ..ops.optimizer import state_starts, state_view
from ._options import CHECKS

__all__ = ["Block", "Plan", "check_saved", "restored", "state_dtype_of"]

MOST_BLOCKS = 8  # of a group and a kind of state; more are packed into one


def state_dtype_of(p: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype of the running averages of `p`."""
    wide = accumulate_dtype(p.dtype)
    return torch.bfloat16 if group["state_dtype"] == torch.bfloat16 and wide == torch.float32 else wide


def _layouts(params: list[Tensor]) -> tuple[list[Any], ...]:
    """What the places of the states of `params` depend on, besides their shapes."""
    return [p.stride() for p in params], [p.dtype for p in params], [p.device for p in params]


class Block:
    """Parameters whose state is one flat tensor for each running average.

    `examples`: (len(params),) float64, the examples that each parameter has seen.
    `flat`: name of the average -> (state_starts(params)[-1],)  state.
    """

    def __init__(self, params: list[Tensor], names: tuple[str, ...], dtype: torch.dtype) -> None:
        self.params = params
        self.names = names
        self.dtype = dtype
        self.layouts = _layouts(params)
        self.examples: Tensor | None = None  # until the first step, which may yet be refused
        self.flat: dict[str, Tensor] = {}
        self.states: list[dict[str, Any]] = []
        self.views: dict[str, list[Tensor]] = {}

    def intact(self, state: dict[Tensor, dict[str, Any]] | None) -> bool:
        """Whether the parameters still lie, and their states still refer, as when `allocate` was called."""
        if state is not None and not all(map(operator.is_, map(state.get, self.params), self.states)):
            return False
        return _layouts(self.params) == self.layouts and all(
            all(map(operator.is_, map(dict.get, self.states, [name] * len(views)), views))
            for name, views in self.views.items()
        )

    def allocate(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Make the flat state, with what `state` has of it or zeros, and let `state` refer to it."""
        device, params = self.params[0].device, self.params
        self.examples = torch.zeros(len(params), dtype=torch.float64, device=device)
        self.views = {"examples": list(self.examples.unbind())}
        starts = state_starts(params)
        for name in self.names:
            flat = self.flat[name] = torch.zeros(starts[-1], dtype=self.dtype, device=device)
            self.views[name] = [state_view(flat, start, p) for start, p in zip(starts, params, strict=False)]
        self.states = []
        for i, p in enumerate(params):
            own = state[p]
            for name, views in self.views.items():
                old = own.get(name)
                if old is not None:
                    if old.shape != views[i].shape:
                        raise ValueError(
                            f"state '{name}' of a parameter must be {tuple(views[i].shape)} like it, got "
                            f"{tuple(old.shape)}"
                        )
                    views[i].copy_(old)
                own[name] = views[i]
            self.states.append(own)


class Plan:
    """The blocks of one group, and its parameters that have had no gradient yet."""

    def __init__(self, group: dict[str, Any], names: tuple[str, ...]) -> None:
        self.group = group
        self.names = names
        self.params = list(group["params"])
        self.blocks: list[Block] = []
        self.rest = list(self.params)

    def fits(self, names: tuple[str, ...], state: dict[Tensor, dict[str, Any]] | None) -> bool:
        """Whether the group still has the parameters, and keeps the averages, that this plan was made for.

        `state`: of the optimizer, where it may refer to something else than before.
        """
        params, group = self.group["params"], self.group
        if names != self.names or len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        return all(
            block.examples is None or (block.dtype == state_dtype_of(block.params[0], group) and block.intact(state))
            for block in self.blocks
        )

    def take_in(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Put parameters that have a gradient, or a state, for the first time into blocks."""
        fresh = [p for p in self.rest if p.grad is not None or p in state] if self.rest else []
        if fresh:
            self._add(fresh)
            known = {id(p) for p in fresh}
            self.rest = [p for p in self.rest if id(p) not in known]

    def _add(self, params: Iterable[Tensor]) -> None:
        kinds: dict[tuple[Any, ...], list[Tensor]] = {}
        for p in params:
            kinds.setdefault((p.device, state_dtype_of(p, self.group)), []).append(p)
        for (_, dtype), members in kinds.items():
            self.blocks.append(Block(members, self.names, dtype))
        if len(self.blocks) > MOST_BLOCKS * len(kinds):
            everything = [p for block in self.blocks for p in block.params]
            self.blocks = []
            self._add(everything)


def _places(
    state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], int, Tensor, Any]]:
    """Saved group, number within it, parameter, and the key of its state, for each parameter of `groups`."""
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for i, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            yield saved, i, p, key


def check_saved(owner: str, state_dict: dict[str, Any], groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Raise unless `state_dict` is of an optimizer with the options `defaults`, over parameters like `groups`'."""
    name = f"{owner}.load_state_dict"
    for group in state_dict["param_groups"]:
        missing = sorted(defaults.keys() - group.keys())
        other = sorted(group.keys() & CHECKS.keys() - defaults.keys())
        if missing or other:
            what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(other)}"
            raise ValueError(
                f"{name}: a group {what}: the state_dict must be of px.optim.{owner}; px.optim.translate gives the "
                f"settings of one of torch.optim"
            )
    sizes = [len(group["params"]) for group in groups], [len(group["params"]) for group in state_dict["param_groups"]]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name}: groups must have {sizes[0]} parameters, got {sizes[1]}")
    for saved, i, p, key in _places(state_dict, groups):
        for average, value in state_dict["state"].get(key, {}).items():
            shape = () if average == "examples" else tuple(p.shape)
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                which = f"'{saved['param_names'][i]}'" if "param_names" in saved else f"{i} of its group"
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: {average} of parameter {which} must be {shape}, got {got}")


def restored(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[Tensor, dict[str, Tensor]]:
    """The state of each parameter of `groups` as it was saved, on its device, in the dtype that states have."""
    states: dict[Tensor, dict[str, Tensor]] = {}
    for saved, _, p, key in _places(state_dict, groups):
        if key in state_dict["state"]:
            kept = state_dtype_of(p, saved)
            states[p] = {
                name: value.to(p.device, torch.float64 if name == "examples" else kept, copy=True)
                for name, value in state_dict["state"][key].items()
            }
    return states
