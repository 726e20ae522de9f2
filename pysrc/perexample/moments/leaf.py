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
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._library import accumulate_dtype
from .count import Base, ExampleCount, version
from .uses import Uses, is_placeholder

__all__ = ["Moment", "accumulate_dtype", "moment_of", "no_moments"]


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
    moment: Moment | None = p.__dict__.get("_perexample_moment")
    return moment if moment is not None and moment.bound == id(p) else None


def _no_moment() -> None:
    return None


torch.serialization.add_safe_globals([_no_moment])


class Place(NamedTuple):
    """A module that holds a parameter, what it calls it, and the full name of that in messages."""

    owner: weakref.ref[nn.Module]
    parameter_name: str
    name: str


class Moment:
    """The second moment of one parameter: its leaf, its owner, and whether what the leaf holds is current.

    It belongs to the module that owns the parameter (or to the modules that share it), and follows the parameter by
    name. `live` says that the leaf's gradient belongs to the present ``p.grad``; `base` is what the example count stood
    at when this parameter's gradient was cleared while others went on accumulating.
    """

    __slots__ = (
        "__weakref__",
        "ambiguous",
        "base",
        "bound",
        "eager",
        "examples",
        "grad_rounds",
        "handles",
        "leaf",
        "leaf_rounds",
        "live",
        "name",
        "owner",
        "parameter_name",
        "places",
        "roots",
        "stamp",
        "unscaled_rounds",
        "uses",
        "version",
        "waiting",
    )

    def __init__(self, owner: nn.Module, parameter_name: str, examples: ExampleCount) -> None:
        self.owner = weakref.ref(owner)
        self.parameter_name = parameter_name
        self.bound = 0  # the id of the parameter that it follows (`torch.utils.swap_tensors` forbids weak references)
        self.leaf: Tensor | None = None
        self.stamp: tuple[torch.Size, torch.dtype, torch.device] | None = None  # of the leaf
        self.places = [Place(self.owner, parameter_name, "")]  # all modules that hold the parameter
        self.uses: Tensor | None = None  # a scalar leaf whose gradient counts uses that no `Uses` knows of
        self.eager = False  # whether there were uses that a `Uses` does know of
        self.waiting: dict[int, list[Uses]] = {}  # by the number of the backward pass, what it has to contract
        self.live = False
        self.ambiguous = False  # whether p.grad may have been cleared or not, which cannot be told: the step refuses
        self.leaf_rounds = self.grad_rounds = 0  # backward passes accumulated in the leaf, and in p.grad
        self.unscaled_rounds = 0  # what leaf_rounds was when px.unscale_ divided the leaf's gradient
        self.roots: tuple[str, ...] = ()  # the converted models that contain the parameter
        self.version: tuple[int, int] | None = None  # of p.grad, when this library last saw it
        self.base: Base | None = None
        self.handles: list[Any] = []
        self.name = ""
        self.examples = examples
        self.join(examples, "")

    def join(self, examples: ExampleCount, module_name: str, owner: nn.Module | None = None) -> None:
        """Count examples with `examples`; `module_name` is the name of the owner (or of this one) in messages."""
        for i, place in enumerate(self.places):
            if place.owner() is (self.owner() if owner is None else owner):
                name = f"{module_name}.{place.parameter_name}" if module_name else place.parameter_name
                self.places[i] = place._replace(name=name)
        self.name = self.places[0].name
        if self.examples is not examples:
            self.base = None
        self.examples = examples
        examples.add(self)

    @property
    def shared(self) -> bool:
        """Whether several modules hold the parameter."""
        return len(self.places) > 1

    @property
    def names(self) -> list[str]:
        """What the modules that hold the parameter call it."""
        return [place.name for place in self.places]

    def share(self, owner: nn.Module, parameter_name: str) -> None:
        """Belong to `owner` too."""
        if not any(place.owner() is owner and place.parameter_name == parameter_name for place in self.places):
            self.places.append(Place(weakref.ref(owner), parameter_name, parameter_name))

    def leave(self, owner: nn.Module, parameter_name: str) -> None:
        """Belong to `owner` no longer; others remain."""
        self.places = [p for p in self.places if not (p.owner() is owner and p.parameter_name == parameter_name)]
        self.owner, self.parameter_name, self.name = self.places[0]

    def elsewhere(self, owner: nn.Module, parameter_name: str, p: Tensor) -> bool:
        """Whether a module other than `owner` holds this parameter still, and it is not `p`."""
        for place in self.places:
            other = place.owner()
            if other is None or (other is owner and place.parameter_name == parameter_name):
                continue
            held = other._parameters.get(place.parameter_name)
            if held is not None and held is not p and moment_of(held) is self:
                return True
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        # Made again by the module that owns the parameter; a copy or a pickle holds nothing of it.
        return (_no_moment, ())

    @property
    def parameter(self) -> Tensor | None:
        for place in self.places:
            owner = place.owner()
            p = None if owner is None else owner._parameters.get(place.parameter_name)
            if p is not None and (len(self.places) == 1 or moment_of(p) is self):
                return p
        return None

    def bind(self, p: Tensor) -> None:
        """Follow `p`: a new leaf where shape, dtype or device changed, hooks where the object is new."""
        if not self.fits(p):  # what the leaf holds belonged to another
            leaf = torch.zeros((), dtype=accumulate_dtype(p.dtype), device=p.device).expand(p.shape).requires_grad_()
            leaf.register_hook(self._before_leaf)
            self.leaf, self.stamp = leaf, (p.shape, leaf.dtype, p.device)
            self.uses = torch.zeros((), device=p.device, requires_grad=True)
            self.live = False
            self.leaf_rounds = self.unscaled_rounds = 0
        if moment_of(p) is not self:
            for handle in self.handles:
                handle.remove()
            p.__dict__["_perexample_moment"] = self
            self.bound = id(p)
            self.grad_rounds = 0
            # Hooks can be registered only on what requires grad; they stay when it no longer does.
            frozen = not p.requires_grad
            p.requires_grad_(True)
            self.handles = [
                p.register_hook(self._before_parameter),
                p.register_post_accumulate_grad_hook(self._after_parameter),
            ]
            # After torch.utils.swap_tensors the hooks are there, but autograd does not know of them until they are set.
            p._backward_hooks = p._backward_hooks
            p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks
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

    def _before_leaf(self, grad: Tensor) -> Tensor | None:
        self.examples.begin_round()
        self.examples.touched = self.name
        self.live = True
        self.leaf_rounds += 1
        if not self.waiting:
            return None
        task = torch._C._current_graph_task_id()
        for uses in self.waiting.pop(task, ()):
            sum_sq = uses.contract(task, grad)
            grad = sum_sq if is_placeholder(grad) else grad + sum_sq
        return grad

    def _before_parameter(self, grad: Tensor) -> None:
        self.examples.begin_round()

    def _after_parameter(self, p: Tensor) -> None:
        self.version = None if p.grad is None else version(p.grad)
        self.grad_rounds += 1

    def fits(self, p: Tensor) -> bool:
        """Whether the leaf was made for `p` as it now is: another object, or ``p.data = ...``, needs another one."""
        return (
            self.bound == id(p)
            and self.stamp == (p.shape, accumulate_dtype(p.dtype), p.device)
            and p.__dict__.get("_perexample_moment") is self
        )

    def current(self) -> Tensor | None:
        """The second moment that belongs to the present ``p.grad``, or None."""
        self.examples.drop_cleared([self])
        return self.leaf.grad if self.live and self.leaf is not None else None


def _sum_grad_squared(p: nn.Parameter) -> Tensor | None:
    """``sum_b c_b**2`` (MATHS 1): the sum over examples of the squared per-example contribution to ``p.grad``.

    Shape of the parameter; float32, or float64 for a float64 parameter. None where ``p.grad`` is None, or where
    the gradient was made under `no_moments`, in eval mode, or not by a layer of this library. Raises
    AttributeError for a parameter that no such layer owns.
    """
    moment: Moment | None = p.__dict__.get("_perexample_moment")
    if moment is None:
        raise AttributeError(
            "sum_grad_squared: this parameter belongs to no layer of perexample; convert the model with "
            "px.convert(model)"
        )
    return moment.current() if moment.bound == id(p) else None  # another took its place in the layer


nn.Parameter.sum_grad_squared = property(_sum_grad_squared)  # type: ignore[attr-defined]
