"""The exact fallback: modules without a kernel, whose parameters get one copy per example (MATHS 8)."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ..autograd.expansion import Origin, PerExample, appearance, axis_of, batched, refuse
from ..moments import Call, ExampleCount, MomentModule, in_reentrant_checkpoint, moment_of
from ..moments.leaf import _Mode
from ..moments.module import REENTRANT, WITH, WITHOUT

__all__ = ["Fallback", "fallback_class", "follow_copies", "follow_copies_in"]

_LARGE = 256 << 20  # bytes of one copy per example from which on a warning is worth it


class Fallback(MomentModule):
    """Base of the modules that no kernel serves: each of its own parameters appears as a `PerExample` to its forward.

    That holds wherever it is read during a forward pass of the converted model, also by other modules.
    """

    _reusable = True
    _stock_class: type[nn.Module]
    _calls: list[dict[str, Tensor]]  # of forward calls under way: the parameters as they appear there

    def __getattr__(self, name: str) -> Any:
        parameters = self.__dict__.get("_parameters")
        if parameters and name in parameters:
            p = parameters[name]
            if p is not None and p.requires_grad and name in self.__dict__.get("_moments", ()):
                return self._appearance(name, p)
        return super().__getattr__(name)

    def _appearance(self, name: str, p: Tensor) -> Tensor:
        examples = self._examples
        inside = examples.batch is not None
        recording = _Mode.enabled and self._in_training()
        if torch.compiler.is_compiling():
            if inside and recording and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{self._label()}.{name}: parameters of the exact fallback cannot be used inside of compiled code; "
                    f"compile the parts of the model without them"
                )
            return p
        calls = self.__dict__.get("_calls")
        if not torch.is_grad_enabled():
            if inside and recording and not (calls and name in calls[-1]) and in_reentrant_checkpoint():
                self._note_use(name, REENTRANT)
                if calls:
                    calls[-1][name] = p
            return p
        if inside:
            if not recording:
                self._note_use(name, WITHOUT)
                return p
            return self._expanded(name, p)
        if not recording or not examples.rooted:
            return p
        if torch._C._current_graph_task_id() == -1:
            return self._uncounted(name, p) if calls else p
        return self._again(name, p, calls)  # in backward with gradients: checkpointing

    def _expanded(self, name: str, p: Tensor) -> Tensor:
        if moment_of(p) is not self._moments[name]:
            self._bind(name)
        moment, examples = self._moments[name], self._examples
        uses = examples.uses.get(moment)
        if uses is None or uses.expanded is None:
            uses = self._note_use(name, WITH)
            assert uses is not None and examples.batch is not None and moment.leaf is not None
            self._warn_if_large(name, p, examples.batch)
            origin = Origin(f"{self._label()}.{name}", examples.batch_dim, examples.input)
            uses.expanded = appearance(p, moment.leaf, Call((uses,)), examples.batch, origin)
        return uses.expanded

    def _again(self, name: str, p: Tensor, calls: list[dict[str, Tensor]] | None) -> Tensor:
        if calls and name in calls[-1]:
            return calls[-1][name]
        batch = self._examples.recomputed_batch(f"{self._label()}.{name}")
        leaf = self._moments[name].leaf
        assert leaf is not None
        value = appearance(p, leaf, None, batch, Origin(f"{self._label()}.{name}", self._examples.batch_dim))
        if calls:
            calls[-1][name] = value
        return value

    def _uncounted(self, name: str, p: Tensor) -> Tensor:
        """`p` for a use outside of any pass of the converted model: its backward leaves a note."""
        alias = p.view_as(p)
        alias.register_hook(self._moments[name]._note_uncounted)
        return alias

    def _warn_if_large(self, name: str, p: Tensor, batch: int) -> None:
        size = batch * p.numel() * p.element_size()
        if size >= _LARGE and not self.__dict__.get("_warned_large"):
            self.__dict__["_warned_large"] = True
            warnings.warn(
                f"{self._label()}.{name}: the exact fallback keeps one gradient per example of this parameter in "
                f"backward, {size / 2**20:.0f} MB for {batch} examples; a kernel or a recipe (px.register) for "
                f"{type(self).__name__} needs none of it",
                stacklevel=2,
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _make, (self._stock_class,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_calls", None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = new = _make(self._stock_class)
        state = {name: value for name, value in self.__dict__.items() if name not in ("_moments", "_calls")}
        new.__setstate__(copy.deepcopy(state, memo))
        return new


def _make(stock: type[nn.Module]) -> Any:
    made = fallback_class(stock)
    return made.__new__(made)


@functools.cache
def fallback_class(stock: type[nn.Module]) -> type[Fallback]:
    """The subclass of `stock` by which the fallback serves it."""

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = self.__dict__.setdefault("_calls", [])
        calls.append({})
        try:
            return super(made, self).forward(*args, **kwargs)
        finally:
            calls.pop()

    made: type[Fallback] = type(
        stock.__name__,
        (Fallback, stock),
        {
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "__doc__": stock.__doc__,
            "_stock_class": stock,
            # Which parameter meets what is looked at as it happens: torch.compile leaves this out (a graph break).
            "forward": torch.compiler.disable(forward),
        },
    )
    return made


def follow_copies(module: nn.Module) -> None:
    """Let a layer with a kernel take `PerExample` inputs (learned queries, say), as its forward hooks."""
    if "_follows_copies" not in module.__dict__:
        module.__dict__["_follows_copies"] = True
        module.register_forward_pre_hook(_take_copies, with_kwargs=True)
        module.register_forward_hook(_give_copies, with_kwargs=True, always_call=True)


def follow_copies_in(examples: ExampleCount) -> None:
    """The same for all layers whose examples are counted there, if there are new ones."""
    if examples.following != len(examples.moments):
        examples.following = len(examples.moments)
        for moment in [m for ref in examples.moments if (m := ref()) is not None]:
            for place in moment.places:
                owner = place.owner()
                if owner is not None and not isinstance(owner, Fallback):
                    follow_copies(owner)


def _by_rows(module: Any) -> bool:
    """Whether `module` takes any number of dimensions between the batch and its features."""
    return module._batch_at == "any" and not isinstance(module, nn.Embedding)


def _take_copies(module: Any, args: Any, kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor and module._examples.batch != 1:
        return None  # nearly always
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    found = [value for value in tensors if isinstance(value, PerExample)]
    if not found:
        return _take_lone(module, tensors, args, kwargs)
    first = found[0]
    if not _by_rows(module):
        return _take_rows(module, tensors, found, args, kwargs)
    vector = first.dim() == 1
    if all(value.dim() and value.shape[value.axis] == value.batch for value in found) and not vector:
        # So long by coincidence, perhaps; unless there are others, which have to be of the batch.
        if not _decided(tensors):
            bare = any(value._rows is None or value.origin.bare for value in found)
            known = len(tensors) == 1 and not first.batch_dim
            module.__dict__["_rows_of"] = first, first.origin._replace(bare=bare, grown=not bare), known
        return tree_map_only(PerExample, batched, (args, kwargs))
    if len(found) > 1 or not first.dim() or first.batch_dim:
        return tree_map_only(PerExample, batched, (args, kwargs))  # raises
    with torch._C.DisableTorchFunctionSubclass():
        copies = first.copies
        single = first.shape[0] == 1
        module.__dict__["_copies_of"] = first, single
        value = copies.squeeze(1) if single else copies
    return tree_map_only(PerExample, lambda _: value, (args, kwargs))


def _decided(tensors: list[Tensor]) -> bool:
    """Whether one of them is no function of parameters alone, so that a layer's results are the batch's."""
    return any(value.requires_grad and not isinstance(value, PerExample) for value in tensors)


def _take_rows(module: Any, tensors: list[Tensor], found: list[PerExample], args: Any, kwargs: Any) -> Any:
    """The same for a layer that has one place for the batch: as long, or of one row, of which each example has one."""
    first, says = found[0], module._batch_at == "says"
    axis = module.batch_dim if says else 0
    if len(found) == len(tensors) == 1 and not axis and not first.batch_dim and first.dim() and first.shape[0] == 1:
        if first.batch != 1:
            module.__dict__["_copies_of"] = first, True
            with torch._C.DisableTorchFunctionSubclass():
                value = first.copies.squeeze(1)
            return tree_map_only(PerExample, lambda _: value, (args, kwargs))
    if not _decided(tensors):
        if first.batch_dim != axis:
            refuse(first, type(module).__name__, f"which takes dimension {axis} for a batch")
        module.__dict__["_rows_of"] = first, first.origin._replace(bare=True, grown=False), False
    positional = [_rows_at(module, value, axis, says, number) for number, value in enumerate(args)]
    return tuple(positional), {name: _rows_at(module, value, axis, says, name) for name, value in kwargs.items()}


def _data(module: nn.Module) -> tuple[int | str, ...]:
    """Which arguments have the batch where `module` says: others are masks, or states."""
    if isinstance(module, nn.MultiheadAttention):
        return (0, 1, 2, "query", "key", "value")
    if isinstance(module, (nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer)):
        return (0, 1, "src", "tgt", "memory")
    return (0, "input", "src")


def _rows_at(module: Any, argument: Any, axis: int, says: bool, which: int | str) -> Any:
    """`argument`, which is number or name `which` of the layer's, with the rows of the batch for copies."""
    state = isinstance(module, nn.RNNBase) and which in (1, "hx")
    data = which in _data(module)

    def rows(value: PerExample) -> Tensor:
        place = 1 if state else axis
        if says and not (data or state):
            refuse(value, type(module).__name__, f"argument {which!r}")
        with torch._C.DisableTorchFunctionSubclass():
            if value.dim() <= max(place, 1) or value.shape[place] != value.batch:
                why = f"shape {tuple(value.shape)} in a batch of {value.batch} examples"
                refuse(value, "the place of a batch", why)
            return value.rows(place)

    return tree_map_only(PerExample, rows, argument)


def _take_lone(module: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
    """Of a single example a parameter has no copies; without a batch dimension (Q, D), it gets one here."""
    examples = module._examples
    if not torch.is_grad_enabled():
        return None  # a reentrant checkpoint repeats it, when it is no longer known that there was one example
    if not (examples.lone and examples.batch == 1) or examples.batch_dim or not _by_rows(module) or len(tensors) != 1:
        return None
    if tensors[0].dim() > 1 and tensors[0].shape[0] == 1:
        return None
    module.__dict__["_was_lone"] = True
    return tree_map_only(Tensor, lambda x: x[None], (args, kwargs))


def _give_copies(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    state = module.__dict__
    lone, rows_of, found = state.pop("_was_lone", None), state.pop("_rows_of", None), state.pop("_copies_of", None)
    if output is None:  # it has raised
        return None
    if lone:
        return output.squeeze(0)
    if rows_of is not None:
        first, origin, known = rows_of

        def make() -> Tensor:
            if not known:
                refuse(first, type(module).__name__, "which takes it for a batch")
            made: Tensor = module(first.copies)
            return made

        def wrap(value: Tensor, batch_dim: int) -> Tensor:
            if not value.requires_grad:
                return value
            if batch_dim != axis_of(value, origin.batch_dim):
                return PerExample.unknown(value, first, make)
            return PerExample(None, origin, rows=value, make=make)

        if isinstance(output, Tensor):
            return wrap(output, axis_of(output, origin.batch_dim) if module._batch_at == "any" else module.batch_dim)
        y, others = output
        last = 1 if isinstance(module, nn.RNNBase) else 0  # of states, and of attention's weights
        return wrap(y, module.batch_dim), tree_map_only(Tensor, lambda value: wrap(value, last), others)
    if found is None:
        return None
    first, single = found
    if not isinstance(output, Tensor):
        batched(first)  # raises
    return PerExample(output.unsqueeze(1) if single else output, first.origin)
