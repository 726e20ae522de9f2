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
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of second moments and of every accumulation: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        "handles",
        "leaf",
        "live",
        "name",
        "owner",
        "parameter_name",
        "uses",
        "version",
    )

    def __init__(self, owner: nn.Module, parameter_name: str, examples: ExampleCount) -> None:
        self.owner = weakref.ref(owner)
        self.parameter_name = parameter_name
        self.leaf: Tensor | None = None
        self.uses: Tensor | None = None  # a scalar leaf whose gradient counts uses, where Python can't (`_leaves`)
        self.live = False
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

    def used_again(self) -> bool:
        """Whether compiled code used the parameter more often than there were forward passes."""
        if self.uses is None or self.uses.grad is None or self.examples.passes is None:
            return False
        passes = self.examples.passes.grad
        return passes is not None and bool(self.uses.grad > passes)

    def _before_leaf(self, grad: Tensor) -> None:
        self.examples.begin_round()
        self.live = True

    def _before_parameter(self, grad: Tensor) -> None:
        self.examples.begin_round()

    def _after_parameter(self, p: Tensor) -> None:
        self.version = None if p.grad is None else _version(p.grad)

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
        self.used: dict[str, int] = {}  # the parameters that it has used so far
        self.silent: dict[str, int] = {}  # how often it used each without gradients (reentrant checkpointing)
        self.root = ""  # name of the module that began the pass
        self.rooted = False  # whether a converted model counts here at all
        self.uncounted = ""  # a parameter that was backpropagated through outside of any pass
        self.last_batch = 0
        self.rounds = 0  # backward passes since the count was cleared
        self.forward_pending = False
        self._reset()

    def _reset(self) -> None:
        self.leaf: Tensor | None = None  # its gradient is the number of examples
        self.passes: Tensor | None = None  # its gradient is the number of forward passes that they came in
        self.moments: list[weakref.ref[Moment]] = []
        self._in_round = False

    def __getstate__(self) -> dict[str, Any]:
        return {"rooted": self.rooted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.rooted = state["rooted"]

    def add(self, moment: Moment) -> None:
        self.moments = [ref for ref in self.moments if ref() not in (None, moment)]
        self.moments.append(weakref.ref(moment))

    def follow(self, device: torch.device) -> None:
        """Keep the count where the parameters are."""
        if self.leaf is None or (self.leaf.device != device and self.leaf.grad is None):
            # MPS has no float64; float32 counts exactly up to 2**24 examples a step.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.leaf = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
            self.leaf.register_hook(self._before_count)
            self.passes = torch.zeros((), device=device, requires_grad=True)

    def _before_count(self, grad: Tensor) -> None:
        self.begin_round()
        self.forward_pending = False

    def begin_round(self) -> None:
        """Called by every hook of a backward pass; acts in the first one only.

        A pass lasts until the engine says so: reentrant checkpointing runs backward passes inside of one.
        """
        if not self._in_round:
            self._in_round = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_round)
            self.drop_cleared()
            self.rounds += 1

    def _end_round(self) -> None:
        self._in_round = False

    def alive(self) -> list[Moment]:
        return [m for ref in self.moments if (m := ref()) is not None and m.live]

    def drop_cleared(self, candidates: Iterable[Moment] | None = None) -> None:
        """Drop the second moments (of `candidates`, or all) whose ``p.grad`` was cleared since they were made."""
        cleared, changed = [], []
        for moment in self.alive() if candidates is None else candidates:
            if moment.live:
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
        if candidates is None and not self.alive():
            self.clear()

    def drop(self, moments: Iterable[Moment]) -> None:
        """Drop `moments`; the count goes with the last one, and till then is remembered as their base."""
        dropped = []
        for moment in moments:
            moment.live = False
            if moment.leaf is not None and moment.uses is not None:
                moment.leaf.grad = moment.uses.grad = None
            dropped.append(moment)
        if not dropped:
            return
        if self.alive():
            base = None if self.total is None else Base(self.total.clone(), self.rounds)
            for moment in dropped:
                moment.base = base
        else:
            self.clear()

    def clear(self) -> None:
        if self.leaf is not None and self.passes is not None:
            self.leaf.grad = self.passes.grad = None
        self.rounds = 0
        self.uncounted = ""
        for ref in self.moments:
            moment = ref()
            if moment is not None:
                moment.base = None

    def rounds_since(self, base: Base | None) -> int:
        return self.rounds - (0 if base is None else base.rounds)

    def leaves(self) -> tuple[Tensor, Tensor]:
        """What `autograd.count_examples` takes: the leaves of the examples and of the passes."""
        assert self.leaf is not None and self.passes is not None
        return self.leaf, self.passes

    @property
    def total(self) -> Tensor | None:
        """The examples counted since the last clearing: a scalar on the device, or None."""
        return None if self.leaf is None else self.leaf.grad


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
    """

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
        `x` has at least `dims` dimensions of which the first is the batch.
        """
        if not self._recording(*names):
            return False
        self._check_batch(x, dims)
        return torch.is_grad_enabled()

    def _recording(self, *names: str) -> bool:
        if not (self.training and _Mode.enabled):
            return False
        trainable = False
        for name in names:
            p = self._parameters.get(name)
            if p is not None and p.requires_grad:
                trainable = True
        if trainable and not torch.is_grad_enabled():
            # Reentrant checkpointing runs forward without gradients here, and again in backward.
            examples = self._examples
            if examples.batch is None:
                return False
            for name in names:
                moment = self._moments.get(name)
                if moment is not None:
                    examples.silent[moment.name] = examples.silent.get(moment.name, 0) + 1
        return trainable

    def _label(self) -> str:
        return f"{self.__dict__.get('_name') or type(self).__name__}"

    def _check_batch(self, x: Tensor, dims: int) -> None:
        if x.dim() < dims:
            raise ValueError(
                f"{self._label()}: expected an input of at least {dims} dimensions with the batch first, got shape "
                f"{tuple(x.shape)}; add the batch dimension, or use px.no_moments()"
            )
        batch = self._examples.batch
        if batch is not None and x.shape[0] != batch:
            raise ValueError(
                f"{self._label()} saw {x.shape[0]} rows, the batch has {batch} examples: a view folded the batch "
                "away, or the "
                f"batch is not dimension 0; keep the batch as dimension 0 up to this layer (extra dimensions are fine: "
                f"(batch, positions, features)), or run this part under px.no_moments()"
            )

    def _leaves(self, *names: str) -> list[Tensor | None]:
        """What a Function takes beside the parameters: their leaves (None for what is absent or frozen), and last the
        leaf that counts uses, or None where a second use in one pass has been ruled out here.
        """
        examples = self._examples
        compiling = torch.compiler.is_compiling()
        leaves: list[Tensor | None] = []
        uses = None
        for name in names:
            p = self._parameters.get(name)
            if p is not None and p.requires_grad and name not in self._moments:
                self._bind(name)
            moment = self._moments.get(name)
            if moment is None:
                leaves.append(None)
                continue
            if p is None or not p.requires_grad:
                if p is None and getattr(self, name, None) is not None:
                    raise ValueError(
                        f"{self._label()}: '{name}' is no longer a plain parameter (a parametrization, or a tensor "
                        "put in "
                        f"its place); remove it, or use px.no_moments()"
                    )
                leaves.append(None)
                continue
            leaf = moment.leaf
            if compiling:
                # Inside torch.compile nothing may be noted down here (checkpointing forbids it): the uses are counted
                # by autograd, and the optimizer compares.
                uses = moment.uses
            elif examples.batch is not None:
                if moment.name in examples.used:
                    self._refuse_reuse(name)
                examples.used[moment.name] = 1
            elif torch._C._current_graph_task_id() != -1:
                # Run again by checkpointing, in backward.
                if examples.silent.get(moment.name, 0) > 1:
                    self._refuse_reuse(name)
            elif examples.rooted:
                leaf = moment.uncounted_leaf()
            leaves.append(leaf)
        return [*leaves, uses]

    def _refuse_reuse(self, name: str) -> None:
        raise ValueError(
            f"{self._label()} was called twice in one forward pass: the uses of its '{name}' have to be added per "
            "example "
            f"before squaring, which is not supported yet; use a layer of its own for each call, or px.no_moments()"
        )
