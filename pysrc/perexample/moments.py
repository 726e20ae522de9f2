"""The second moment as a gradient, and the number of examples (MATHS 1, 2).

Every parameter that a layer of this library serves has a *leaf*: a tensor of the parameter's shape without
storage. It enters the layer's autograd Function beside the parameter, and its "gradient" is ``sum_b c_b**2``.
So autograd itself adds the second moments of several backward passes, frees them, and follows checkpointing
and ``torch.compile``; backward mutates nothing.

The number of examples is a gradient as well: the output of a converted model passes through an identity whose
backward also returns the batch size, for a scalar leaf.

Whatever clears ``p.grad`` must clear both. Nothing tells us when that happens, so it is looked up at the one
moment that counts: the first hook of a backward pass sees every ``p.grad`` as it was before that pass.
"""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from .ops._library import accumulate_dtype

__all__ = ["ExampleCount", "Moment", "MomentModule", "accumulate_dtype", "moment_of", "no_moments"]


class _Mode:
    """Process-wide switch behind `no_moments` (a plain attribute, so that torch.compile can guard on it)."""

    enabled = True


@contextlib.contextmanager
def no_moments() -> Iterator[None]:
    """Context manager: forward passes inside record no second moments and count no examples.

    Inside it the layers are the stock layers, at the stock cost. A step of a per-example optimizer on
    gradients made so raises.
    """
    previous, _Mode.enabled = _Mode.enabled, False
    try:
        yield
    finally:
        _Mode.enabled = previous


def moment_of(p: Tensor) -> Moment | None:
    """The `Moment` of parameter `p`, or None where no layer of this library owns it."""
    return p.__dict__.get("_perexample_moment")


def _version(grad: Tensor) -> tuple[int, int]:
    """Differs where `grad` was changed in place, or is another tensor."""
    return grad._version, grad.data_ptr() if grad.layout == torch.strided else 0


def _no_moment() -> None:
    return None


torch.serialization.add_safe_globals([_no_moment])


class Moment:
    """The second moment of one parameter: its leaf, its owner, and whether what the leaf holds is current.

    It belongs to the module that owns the parameter, and follows the parameter by name. `live` says that
    the leaf's gradient belongs to the present ``p.grad``; `base` is what the example count stood at when
    this parameter's gradient was cleared while others went on accumulating.
    """

    __slots__ = (
        "__weakref__",
        "base",
        "examples",
        "grad_rounds",
        "handles",
        "leaf",
        "leaf_rounds",
        "live",
        "name",
        "owner",
        "parameter_name",
        "roots",
        "uses",
        "version",
    )

    def __init__(self, owner: nn.Module, parameter_name: str, examples: ExampleCount) -> None:
        self.owner = weakref.ref(owner)
        self.parameter_name = parameter_name
        self.leaf: Tensor | None = None
        self.uses: Tensor | None = None  # a scalar leaf whose gradient counts uses
        self.live = False
        self.leaf_rounds = self.grad_rounds = 0  # backward passes accumulated in the leaf, and in p.grad
        self.roots: tuple[str, ...] = ()  # the converted models that contain the parameter
        self.version: tuple[int, int] | None = None  # of p.grad, when this library last saw it
        self.base: Base | None = None
        self.handles: list[Any] = []
        self.name = ""
        self.examples = examples
        self.join(examples, "")

    def join(self, examples: ExampleCount, module_name: str) -> None:
        """Count examples with `examples`; `module_name` is the owner's name in messages."""
        self.name = f"{module_name}.{self.parameter_name}" if module_name else self.parameter_name
        self.examples = examples
        self.base = None
        examples.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Made again by the module that owns the parameter; a copy or a pickle holds nothing of it.
        return (_no_moment, ())

    @property
    def parameter(self) -> Tensor | None:
        owner = self.owner()
        return None if owner is None else owner._parameters.get(self.parameter_name)

    def bind(self, p: Tensor) -> None:
        """Follow `p`: a new leaf where shape, dtype or device changed, hooks where the object is new."""
        dtype = accumulate_dtype(p.dtype)
        leaf = self.leaf
        if leaf is None or (leaf.shape, leaf.dtype, leaf.device) != (p.shape, dtype, p.device):
            leaf = torch.zeros((), dtype=dtype, device=p.device).expand(p.shape).requires_grad_()
            leaf.register_hook(self._before_leaf)
            self.leaf = leaf
            self.uses = torch.zeros((), device=p.device, requires_grad=True)
            self.live = False
            self.leaf_rounds = 0
        if moment_of(p) is not self:
            for handle in self.handles:
                handle.remove()
            p.__dict__["_perexample_moment"] = self
            # Hooks can be registered only on what requires grad; they stay when it no longer does.
            frozen = not p.requires_grad
            p.requires_grad_(True)
            self.handles = [
                p.register_hook(self._before_parameter),
                p.register_post_accumulate_grad_hook(self._after_parameter),
            ]
            p.requires_grad_(not frozen)
        self.examples.follow(p.device)

    def uncounted_leaf(self) -> Tensor:
        """The leaf, for a use outside of any pass of the converted model: its backward leaves a note."""
        assert self.leaf is not None
        alias = self.leaf.view_as(self.leaf)
        alias.register_hook(self._note_uncounted)
        return alias

    def _note_uncounted(self, grad: Tensor) -> None:
        self.examples.begin_round()
        self.examples.uncounted = self.name

    def _before_leaf(self, grad: Tensor) -> None:
        self.examples.begin_round()
        self.examples.touched = self.name
        self.live = True
        self.leaf_rounds += 1

    def _before_parameter(self, grad: Tensor) -> None:
        self.examples.begin_round()

    def _after_parameter(self, p: Tensor) -> None:
        self.version = None if p.grad is None else _version(p.grad)
        self.grad_rounds += 1

    def current(self) -> Tensor | None:
        """The second moment that belongs to the present ``p.grad``, or None."""
        self.examples.drop_cleared([self])
        return self.leaf.grad if self.live and self.leaf is not None else None


class Base(NamedTuple):
    """What the count stood at when some gradients were cleared while others went on accumulating."""

    total: Tensor
    rounds: int


class ExampleCount:
    """Counts the examples backpropagated through one model, and knows the forward pass under way."""

    def __init__(self) -> None:
        self.batch: int | None = None  # examples of the forward pass under way; None outside of one
        self.used: dict[str, bool] = {}  # the parameters that it has used so far, and whether with second moments
        self.root = ""  # name of the module that began the pass
        self.training = False  # whether that module is in training
        self.rooted = False  # whether a converted model counts here at all
        self.nested: dict[str, int] = {}  # converted parts that were called inside of a pass
        self.uncounted = ""  # a parameter that was backpropagated through outside of any pass
        self.last_batch = 0
        self.rounds = 0  # backward passes since the count was cleared
        self.forward_pending = False
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
        return {"rooted": self.rooted, "root_names": self.root_names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.rooted = state["rooted"]
        self.root_names = state["root_names"]

    def add(self, moment: Moment) -> None:
        self.moments = [ref for ref in self.moments if ref() not in (None, moment)]
        self.moments.append(weakref.ref(moment))
        self._place(moment)

    def add_root(self, name: str) -> None:
        """Count what passes through the converted model or part called `name`."""
        self.rooted = True
        if name not in self.root_names:
            self.root_names = [*self.root_names, name]
        for ref in self.moments:
            moment = ref()
            if moment is not None:
                self._place(moment)
                if moment.leaf is not None:
                    self.follow(moment.leaf.device)

    def _place(self, moment: Moment) -> None:
        moment.roots = tuple(root for root in self.root_names if overlap(root, moment.name))

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
        task = torch._C._current_graph_task_id()
        if self._in_round and (self.rooted or task == self._task):
            return
        self._in_round, self._task, self.touched, self.counted = True, task, "", False
        torch.autograd.Variable._execution_engine.queue_callback(self._end_round)
        self.drop_cleared()
        self.rounds += 1

    def _end_round(self) -> None:
        self._in_round = False
        if self.rooted and self.touched and not self.counted:
            self.uncounted = self.touched

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
                grad = None if p is None else p.grad
                if grad is None:
                    cleared.append(moment)
                elif _version(grad) != moment.version:
                    changed.append((moment, grad))
        if changed:
            # zero_grad(set_to_none=False) is an in-place change that leaves nothing but zeros.
            norms = torch._foreach_norm([g._values() if g.is_sparse else g for _, g in changed], math.inf)
            for (moment, grad), norm in zip(changed, norms, strict=True):
                if norm.item() == 0:
                    cleared.append(moment)
                moment.version = _version(grad)
        self.drop(cleared)
        if everything and not self.alive():
            self.clear()

    def drop(self, moments: Iterable[Moment]) -> None:
        """Drop `moments`; the count goes with the last one, and till then is remembered as their base."""
        dropped = []
        for moment in moments:
            moment.live = False
            moment.leaf_rounds = moment.grad_rounds = 0
            if moment.leaf is not None and moment.uses is not None:
                moment.leaf.grad = moment.uses.grad = None
            dropped.append(moment)
        if not dropped:
            return
        if self.alive():
            bases: dict[tuple[str, ...], Base | None] = {}
            for moment in dropped:
                if moment.roots not in bases:
                    total = self.total_of(moment.roots)
                    bases[moment.roots] = None if total is None else Base(total.clone(), self.rounds)
                moment.base = bases[moment.roots]
        else:
            self.clear()

    def clear(self) -> None:
        for leaf, passes in self.roots.values():
            leaf.grad = passes.grad = None
        self.rounds = 0
        self.uncounted = ""
        for ref in self.moments:
            moment = ref()
            if moment is not None:
                moment.base = None

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


def _sum_grad_squared(p: nn.Parameter) -> Tensor | None:
    """``sum_b c_b**2`` (MATHS 1): the sum over examples of the squared per-example contribution to ``p.grad``.

    Shape of the parameter; float32, or float64 for a float64 parameter. None where ``p.grad`` is None, or where
    the gradient was made under `no_moments`, in eval mode, or not by a layer of this library. Raises
    AttributeError for a parameter that no such layer owns.
    """
    moment = moment_of(p)
    if moment is None:
        raise AttributeError(
            "sum_grad_squared: this parameter belongs to no layer of perexample; convert the model with "
            "px.convert(model)"
        )
    return moment.current()


nn.Parameter.sum_grad_squared = property(_sum_grad_squared)  # type: ignore[attr-defined]


class MomentModule(nn.Module):
    """Base of the layers: keeps a `Moment` for each of the module's own parameters.

    Comes before the stock class among the bases. A subclass's `forward` asks `_tracking(x, dims, *names)` whether to
    record, and hands `_leaves(*names)` to its autograd Function.

    Attributes:
        batch_dim: which dimension of the input is the batch; 0, but 1 inside of a sequence-first module.
    """

    batch_dim: int = 0
    _moments: dict[str, Moment]
    _examples: ExampleCount
    _name: str

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            self._owns(name, value)  # raises before anything has changed
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            self._bind(name)

    def _owns(self, name: str, p: Tensor) -> bool:
        """Whether `p` may be bound here; raises where another layer owns it, unless it is frozen and so harmless."""
        other = moment_of(p)
        if other is None or other.parameter is not p or other.owner() is self:
            return True
        if p.requires_grad:
            raise ValueError(
                f"{type(self).__name__}.{name}: this parameter already belongs to {type(other.owner()).__name__} "
                f"('{other.name}'); the uses of a shared weight have to be added per example before squaring, which is "
                f"not supported yet: give each layer a weight of its own"
            )
        return False

    def _bind(self, name: str) -> None:
        p = self._parameters.get(name)
        if p is None:
            return
        moments = self.__dict__.setdefault("_moments", {})
        examples = self.__dict__.setdefault("_examples", ExampleCount())
        if not self._owns(name, p):
            return  # `_leaves` tries again when it is thawed
        if name not in moments:
            moments[name] = Moment(self, name, examples)
        moments[name].bind(p)
        for moment in moments.values():
            moment.uses = moments[name].uses  # one scalar counts for all parameters of the layer

    def _bind_all(self) -> None:
        for name in self._parameters:
            self._bind(name)

    def _join(self, examples: ExampleCount, name: str) -> None:
        """Become a part, called `name`, of the model that `examples` counts for."""
        self.__dict__["_examples"] = examples
        self.__dict__["_name"] = name
        self._bind_all()
        for moment in self.__dict__.get("_moments", {}).values():
            moment.join(examples, name)
            examples.follow(moment.leaf.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._bind_all()
        return result

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_moments", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        examples = self.__dict__.get("_examples")
        if examples is not None:
            self._join(examples, self.__dict__.get("_name", ""))

    def _tracking(self, x: Tensor, dims: int, *names: str) -> bool:
        """Whether this forward pass, of input `x`, records second moments of the named parameters.

        It does in training, with gradients, not under `no_moments`, where one of them requires grad. Raises unless
        `x` has at least `dims` dimensions of which `batch_dim` is the batch.
        """
        if not self._recording(*names):
            return False
        self._check_batch(x, dims)
        return torch.is_grad_enabled()

    def _recording(self, *names: str) -> bool:
        trainable = []
        for name in names:
            p = self._parameters.get(name)
            if p is not None and p.requires_grad:
                trainable.append(name)
        if not trainable:
            return False
        recording = self._in_training() and _Mode.enabled
        if recording and torch.is_grad_enabled():
            return True
        if torch.compiler.is_compiling() or self._examples.batch is None:
            return False
        if torch.is_grad_enabled():
            for name in trainable:
                self._note_use(name, False)
        elif recording and in_reentrant_checkpoint():
            # It runs forward without gradients here, and again with them in backward.
            for name in trainable:
                self._note_use(name, True)
            return True
        return False

    def _in_training(self) -> bool:
        """Whether second moments are wanted; a layer that is trained in eval mode says so."""
        return self.training

    def _label(self) -> str:
        return f"{self.__dict__.get('_name') or type(self).__name__}"

    def _check_batch(self, x: Tensor, dims: int) -> None:
        if x.dim() < dims:
            raise ValueError(
                f"{self._label()}: expected an input of at least {dims} dimensions with the batch first, got shape "
                f"{tuple(x.shape)}; add the batch dimension, or use px.no_moments()"
            )
        batch = self._examples.batch
        dim = self.batch_dim
        if batch is not None and x.shape[dim] != batch:
            raise ValueError(
                f"{self._label()} saw {x.shape[dim]} rows, the batch has {batch} examples: a view folded the batch "
                f"away, or the batch is not dimension {dim}; keep the batch as dimension {dim} up to this layer (extra "
                f"dimensions are fine: (batch, positions, features)), or run this part under px.no_moments()"
            )

    def _leaves(self, *names: str) -> list[Tensor | None]:
        """What a Function takes beside the parameters: their leaves (None for what is absent or frozen), and last the
        leaf that counts uses.
        """
        leaves: list[Tensor | None] = []
        uses = None
        for name in names:
            p = self._parameters.get(name)
            if p is None:
                value = getattr(self, name, None)
                if value is not None and value.requires_grad:
                    self._refuse_computed(name)
                leaves.append(None)
            elif not p.requires_grad:
                leaves.append(None)
            else:
                if not isinstance(p, nn.Parameter):
                    self._refuse_computed(name)
                if name not in self._moments:
                    self._bind(name)
                moment = self._moments[name]
                uses = moment.uses
                # Inside torch.compile nothing may be noted down (checkpointing forbids it): there the uses are
                # counted by autograd alone, and the optimizer compares.
                leaves.append(moment.leaf if torch.compiler.is_compiling() else self._eager_leaf(name, p, moment))
        return [*leaves, uses]

    def _eager_leaf(self, name: str, p: Tensor, moment: Moment) -> Tensor | None:
        if moment_of(p) is not moment:
            self._bind(name)
        if self._examples.batch is not None:
            self._note_use(name, True)
        elif self._examples.rooted and torch._C._current_graph_task_id() == -1:
            return moment.uncounted_leaf()
        return moment.leaf

    def _refuse_computed(self, name: str) -> NoReturn:
        raise ValueError(
            f"{self._label()}: '{name}' is no longer a plain parameter (a parametrization, or a tensor put in its "
            f"place); remove it, or use px.no_moments()"
        )

    def _note_use(self, name: str, with_moments: bool) -> None:
        """Note a use in the pass under way; two uses are refused, unless neither makes a second moment."""
        key = self._moments[name].name if name in self._moments else f"{self._label()}.{name}"
        used = self._examples.used
        if key in used and (with_moments or used[key]):
            raise ValueError(
                f"{self._label()} was called twice in one forward pass: the uses of its '{name}' have to be added per "
                f"example before squaring, which is not supported yet; use a layer of its own for each call"
            )
        used[key] = with_moments
