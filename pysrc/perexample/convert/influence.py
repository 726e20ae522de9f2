"""Where the batch is in what a layer sees, found by another example in its place.

Where another dimension is as long as the batch and autograd's graph does not tell (`moments.layout`), the model's
forward runs again, on a copy: first on the same input, then with one row of it replaced by another row. What a layer
sees may then differ in that row only. If instead it differs in other rows too, but in that one place only along another
dimension, then that one is the batch. All runs take the same random numbers, and are compared to the bit. What differs
nowhere is run with one example fewer: where it has as many rows as before, they are no examples.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..moments import ExampleCount, MomentModule, Uses
from ..moments.layout import PassInput, Seen
from ..moments.places import history, may_reorder
from ..nn.fallback import Fallback

_LARGE = 16 << 20  # bytes of a tensor that a trial does not copy

__all__ = ["copy_of", "cuda_devices", "refuse_moved_batch", "refuse_other_orders"]


def refuse_moved_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: PassInput) -> None:
    """Raise where one of the layers in `known.unclear` has seen another dimension in the place of the batch.

    Nothing of `module`, its inputs or the random numbers changes. Where something might (hooks, other processes, a
    forward that writes to parameters), or where forward cannot be repeated on a copy, no verdict is made.
    """
    if known.tensor.shape[known.axis] < 2 or not _repeatable(module, known.tensor):
        return
    try:
        with _restored(module):
            found = _Trials(module, args, kwargs, known).moved()
    except Exception:
        return
    if found is not None:
        (name, axis, tensor), dim = found
        if dim is None:
            raise ValueError(
                f"{name} saw {tensor.shape[axis]} rows, as many as the batch has examples, but these belong to no "
                f"example: with one example fewer they are as many; expand them to the batch before this layer "
                f"(rows.expand(batch, *rows.shape)), set batched=False if it is an Embedding, or run this part under "
                f"px.no_moments()"
            )
        raise ValueError(
            f"{name} saw {tensor.shape[axis]} rows, as many as the batch has examples, but dimension {axis} is not the "
            f"batch: another example in the model's input changes dimension {dim} there; keep the batch as dimension "
            f"{axis} up to this layer, or run this part under px.no_moments()"
        )


def refuse_other_orders(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: PassInput,
    outputs: list[Tensor],
    uses: list[Uses],
) -> None:
    """Raise where one weight was used with the examples in different orders; there may be no verdict, as above.

    This is tried only where the graph of the `outputs` has an operation that could change the order.
    """
    batch = known.tensor.shape[known.axis]
    users = [names for use in uses if (names := _users(use, known.met))]
    may = batch >= 2 and bool(users) and any(may_reorder(node, batch) for node in history(outputs))
    if not may or not _repeatable(module, known.tensor):
        return
    wanted = {name: fallback for names in users for name, fallback in names.items()}
    known = PassInput(known.tensor, known.axis, unclear=wanted)
    try:
        with _restored(module):
            found = _Trials(module, args, kwargs, known).reordered(users)
    except Exception:
        return
    if found is not None:
        name, row, other, other_row = found
        where = "in another use" if name == other else f"in {other}"
        raise ValueError(
            f"{name}: this forward pass uses its weight with the examples in different orders (one example is in row "
            f"{row} here, in row {other_row} {where}), so that their parts cannot be added per example before "
            f"squaring; keep one order from the first use on, or give each use a weight of its own"
        )


def _users(uses: Uses, met: dict[str, int]) -> dict[str, bool]:
    """What uses a weight several times, by the names as in `PassInput.unclear`; {} where it is used once."""
    names: dict[str, bool] = {}
    for place in uses.moment.places:
        owner = place.owner()
        if isinstance(owner, Fallback):
            name = f"{owner._label()}.{place.parameter_name}"
            if uses.shared or met.get(name, 0) > 1:
                names[name] = True
        # Those with several inputs may have them in whatever order.
        elif (
            isinstance(owner, MomentModule)
            and uses.shared
            and not isinstance(owner, (nn.MultiheadAttention, nn.Bilinear))
        ):
            names[owner._label()] = False
    return names


def _repeatable(module: nn.Module, x: Tensor) -> bool:
    """Whether forward may run again: nobody but the model itself would notice, and a copy tells what the model does."""
    hooks = [*_global._global_forward_hooks.values(), *_global._global_forward_pre_hooks.values()]
    for part in module.modules():
        hooks += [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if hasattr(part, "_orig_mod") or isinstance(part, torch.jit.ScriptModule):
            return False
    for p in module.parameters():
        if type(p) is not nn.Parameter or p.device.type == "meta":
            return False
    distributed = torch.distributed
    return (
        all(_belongs(hook) for hook in hooks)
        and not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None
        and x.device.type in ("cpu", "cuda")  # whose random numbers are restored
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _belongs(hook: Callable[..., Any]) -> bool:
    """Whether a hook is this library's, or one of PyTorch's that computes a weight."""
    name = getattr(hook, "__module__", None) or type(hook).__module__
    return name.split(".")[0] == __name__.split(".")[0] or name.startswith("torch.nn.utils.")


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Leave the streams of random numbers, autocast's cache and the warnings as they are."""
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_autocast_cache_enabled(cache)
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def copy_of(module: nn.Module, instead: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, with other objects `instead` of some, by their id; results that forward left in it as values."""
    memo = dict(instead or {})
    memo |= {id(value): value.detach().clone() for value in _held(module) if value.grad_fn is not None}
    return copy.deepcopy(module, memo)


def cuda_devices(module: nn.Module) -> list[int]:
    """The numbers of the CUDA devices that `module` has parameters on."""
    return sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda})


class _Trial(NamedTuple):
    """What the layers in question saw in one run, and what the model returned."""

    seen: list[Seen]
    outputs: list[Tensor]


class _ReadOnly(TorchDispatchMode):
    """Raise before anything is written to parameters and buffers of `module` itself, which a copy may reach.

    And to what the copy has in common with it, `shared`.
    """

    def __init__(self, module: nn.Module, shared: list[Tensor]) -> None:
        super().__init__()
        held = (*module.parameters(), *module.buffers(), *shared)
        tensors = (t for t in held if t.layout == torch.strided and t.numel())
        self.storages = {t.untyped_storage().data_ptr() for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = {**kwargs, **{a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}}
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for value in pytree.tree_leaves(given.get(argument.name)):
                        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self.storages:
                            raise RuntimeError(f"{func} writes to the model")
        return func(*args, **kwargs)


class _Trials:
    """Repetitions of one forward pass, with other examples."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: PassInput) -> None:
        self.module, self.known = module, known
        self.flat, self.spec = pytree.tree_flatten((args, kwargs))
        self.batch = known.tensor.shape[known.axis]
        self.rows = 0, self.batch - 1

    def moved(self) -> tuple[Seen, int | None] | None:
        """What a layer saw whose batch is another dimension, and which (None: it has none); None if none is known."""
        base = self.run()
        by_first = [self.run(self.known.tensor, row) for row in self.rows]
        found = self.moved_by(base, by_first)
        touched = self.touched(base, by_first)
        if found is not None or all(touched):
            return found
        for tensor in {id(value): value for value in self.flat if isinstance(value, Tensor)}.values():
            dim = self.known.axis
            if tensor is not self.known.tensor and tensor.dim() > dim and tensor.shape[dim] == self.batch:
                trials = [self.run(tensor, row) for row in self.rows]
                touched = [a or b for a, b in zip(touched, self.touched(base, trials), strict=True)]
                if self.same_examples(base, by_first, trials):
                    found = self.moved_by(base, trials)
                    if found is not None:
                        return found
        return None if all(touched) else self.without_batch(base, touched)

    def without_batch(self, base: _Trial, touched: list[bool]) -> tuple[Seen, None] | None:
        """What a layer saw that is not `touched` by any example, and has as many rows with one example fewer."""
        names = [seen.name for seen in base.seen]
        data = [self.known.data.get(name) == names.count(name) for name in names]
        if not any(data) or not all(isinstance(value, (Tensor, int, float, str, type(None))) for value in self.flat):
            return None  # an object might hold examples too
        fewer = self.run(fewer=True)
        if [seen.name for seen in fewer.seen] == names:
            for i, seen in enumerate(base.seen):
                if data[i] and not touched[i] and fewer.seen[i].tensor.shape[seen.axis] == self.batch:
                    return seen, None
        return None

    def reordered(self, users: list[dict[str, bool]]) -> tuple[str, int, str, int] | None:
        """Two uses of one weight, and the rows where they have one example; None if no two are known to differ."""
        base = self.run()
        trials = [self.run(self.known.tensor, row, turned=True) for row in self.rows]
        found: dict[int, tuple[str, list[int]]] = {}  # by weight, the first use
        for i, (name, axis, tensor) in enumerate(base.seen):
            changed = [_along(_differ(tensor, trial.seen[i].tensor), axis).nonzero() for trial in trials]
            if any(len(rows) != 1 for rows in changed):
                continue  # examples interact, or their order depends on what they hold
            here = [int(rows) for rows in changed]
            for weight, names in enumerate(users):
                if name in names:
                    other, there = found.setdefault(weight, (name, here))
                    for row, other_row in zip(here, there, strict=True):
                        if row != other_row:
                            return name, row, other, other_row
        return None

    def run(self, tensor: Tensor | None = None, row: int = 0, turned: bool = False, fewer: bool = False) -> _Trial:
        """Run forward on copies, with another row of the input `tensor` in the place of `row`, or that `turned` around.

        Turned around along its first dimension a row has the same length and the same sum, by which models sort. Or
        with one example `fewer`, unless the model keeps something from pass to pass.
        """
        # The parameters are shared, and large tensors, what else there is in the model is the copy's own.
        large = [t for t in _held(self.module) if t.numel() * t.element_size() >= _LARGE and t.grad_fn is None]
        shared: dict[int, Tensor] = {id(t): t for t in large}
        shared |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in self.module.parameters()}
        module = copy_of(self.module, shared)
        examples: ExampleCount = module._examples  # type: ignore[assignment]
        seen: list[Seen] = []
        examples.watched = self.known.unclear, seen
        copies: dict[int, Any] = {}
        for value in self.flat:
            if id(value) not in copies:
                copies[id(value)] = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        if tensor is not None:
            rows = tensor.detach().movedim(self.known.axis, 0)
            new = rows[row].flip(0) if turned and rows.dim() > 1 else rows[1 if row == 0 else row - 1]
            copies[id(tensor)].movedim(self.known.axis, 0)[row] = new
        axis = self.known.axis
        for key, value in copies.items() if fewer else ():
            if isinstance(value, Tensor) and value.dim() > axis and value.shape[axis] == self.batch:
                copies[key] = value.narrow(axis, 0, self.batch - 1)
        state = _with_rows(module, self.batch)
        args, kwargs = pytree.tree_unflatten([copies[id(value)] for value in self.flat], self.spec)
        # The exact fallback looks at what its parameters meet only where there are gradients.
        grad = any(self.known.unclear.values())
        with torch.random.fork_rng(cuda_devices(module)), torch.set_grad_enabled(grad), _ReadOnly(self.module, large):
            outputs = pytree.tree_leaves(module(*args, **kwargs))
        if fewer and not _same(state, _with_rows(module, self.batch)):
            raise ValueError("what the model keeps may have rows of examples")
        return _Trial(seen, [output.detach() for output in outputs if isinstance(output, Tensor)])

    def moved_by(self, base: _Trial, trials: list[_Trial]) -> tuple[Seen, int] | None:
        """The same as `moved`, by `trials` in which each of `rows` was replaced."""
        for i, seen in enumerate(base.seen):
            dims = self.carriers([seen.tensor, *(trial.seen[i].tensor for trial in trials)])
            if dims and seen.axis not in dims:
                return seen, dims[0]
        return None

    def touched(self, base: _Trial, trials: list[_Trial]) -> list[bool]:
        """For each layer, whether it saw anything of what was replaced."""
        return [
            any(bool(_differ(seen.tensor, trial.seen[i].tensor).any()) for trial in trials)
            for i, seen in enumerate(base.seen)
        ]

    def same_examples(self, base: _Trial, by_first: list[_Trial], trials: list[_Trial]) -> bool:
        """Whether what was replaced changes the same rows of an output as examples of the first input do."""
        for i, output in enumerate(base.outputs):
            one, other = (self.carriers([output, *(t.outputs[i] for t in tried)]) for tried in (by_first, trials))
            if set(one) & set(other):
                return True
        return False

    def carriers(self, versions: list[Tensor]) -> list[int]:
        """The dimensions along which the first of `versions` differs from each other one in the replaced row alone."""
        base, *others = versions
        changed = [_differ(base, other) for other in others]
        pairs = list(zip(changed, self.rows, strict=True))
        return [dim for dim in range(base.dim()) if all(_only(where, dim, row, self.batch) for where, row in pairs)]


def _with_rows(module: nn.Module, batch: int) -> list[tuple[Tensor, int]]:
    """The tensors that a model holds which may have rows of examples, and how often each has been changed."""
    return [(t, t._version) for t in _held(module) if batch in t.shape or batch - 1 in t.shape]


def _held(module: nn.Module) -> list[Tensor]:
    """The parameters, buffers and other tensors that a model holds."""
    values = (value for part in module.modules() for value in pytree.tree_leaves(list(vars(part).values())))
    return [value for value in values if isinstance(value, Tensor)]


def _same(state: list[tuple[Tensor, int]], later: list[tuple[Tensor, int]]) -> bool:
    pairs = zip(state, later, strict=False)
    return len(state) == len(later) and all(a is b and v == w for (a, v), (b, w) in pairs)


def _differ(x: Tensor, y: Tensor) -> Tensor:
    """Where `x` and `y`, of one shape, are not the same to the bit."""
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        raise ValueError("what the model does depends on the examples")
    return (x != y) & ~((x != x) & (y != y))


def _along(changed: Tensor, dim: int) -> Tensor:
    """Where along dimension `dim` there is any change."""
    return changed.movedim(dim, 0).flatten(1).any(1).cpu()


def _only(changed: Tensor, dim: int, row: int, batch: int) -> bool:
    """Whether along dimension `dim`, which is the batch or has it folded in, the changes are where `row` is, only."""
    size = changed.shape[dim]
    where = _along(changed, dim)
    steps = [step for step in range(1, size // batch + 1) if size % (step * batch) == 0]
    return any(torch.equal(where, torch.arange(size) // step % batch == row) for step in steps)
