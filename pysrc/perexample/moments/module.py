"""The base of the layers."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .count import ExampleCount, in_reentrant_checkpoint
from .layout import ambiguous, moved_from, without_history
from .leaf import Moment, _Mode, moment_of
from .uses import Call, Uses

__all__ = ["MomentModule"]

# How a parameter is used in a forward pass.
WITH = "with second moments"
WITHOUT = "with gradients, but without second moments"
REENTRANT = "in a reentrant checkpoint"


class MomentModule(nn.Module):
    """Base of the layers: keeps a `Moment` for each of the module's own parameters.

    Comes before the stock class among the bases. A subclass's `forward` asks `_tracking(x, dims, *names)` whether to
    record, and hands `_leaves(*names)` to its autograd Function. Where `_reusable` is set, the Function takes a `Call`
    in the place of the leaf that counts uses, and its parameters may be used again in the same forward pass.

    Attributes:
        batch_dim: which dimension of the input is the batch; 0, but 1 inside of a sequence-first module.
    """

    _reusable = False
    # Where the layer takes the batch: "any" dimension before the features, always "first", or where it "says" itself
    # (by `batch_dim`). None: only as the first, and refused in models that were converted with another batch_dim.
    _batch_at: str | None = None
    batch_dim: int = 0

    _moments: dict[str, Moment]
    _examples: ExampleCount
    _name: str

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            self._refuse_foreign(name, value)  # before anything has changed
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            self._bind(name)

    def _refuse_foreign(self, name: str, p: Tensor) -> None:
        """Raise where `p` belongs to another converted model, which counts its own examples."""
        other = moment_of(p)
        examples = self.__dict__.get("_examples")
        if (
            other is not None
            and examples is not None
            and other.examples is not examples
            and other.examples.rooted
            and examples.rooted
            and other.parameter is p
        ):
            raise ValueError(
                f"{self._label()}.{name}: this parameter already belongs to another converted model (as "
                f"'{other.name}'), which counts its examples by itself; convert one module that contains both"
            )

    def _bind(self, name: str) -> None:
        p = self._parameters.get(name)
        if p is None:
            return
        moments = self.__dict__.setdefault("_moments", {})
        examples = self.__dict__.setdefault("_examples", ExampleCount())
        moment, other = moments.get(name), moment_of(p)
        if other is not None and other is not moment and other.parameter is p:
            self._refuse_foreign(name, p)
            other.share(self, name)  # another layer's: a shared weight
            moment = other
        elif moment is None or moment.elsewhere(self, name, p):
            if moment is not None:
                moment.leave(self, name)
            moment = Moment(self, name, examples)
            moment.join(examples, self.__dict__.get("_name", ""))
        moments[name] = moment
        moment.bind(p)
        for other in moments.values():
            other.uses = moment.uses  # one scalar counts for all parameters of the layer

    def _bind_all(self) -> None:
        for name in self._parameters:
            self._bind(name)

    def _join(self, examples: ExampleCount, name: str) -> None:
        """Become a part, called `name`, of the model that `examples` counts for."""
        self.__dict__["_examples"] = examples
        self.__dict__["_name"] = name
        self._bind_all()
        for moment in self.__dict__.get("_moments", {}).values():
            moment.join(examples, name, self)
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
        parameters = self._parameters
        trainable = []
        for name in names:
            p = parameters.get(name)
            if p is not None and p.requires_grad:
                trainable.append(name)
        if not trainable:
            return False
        recording = (self.training or self._in_training()) and _Mode.enabled
        if recording and torch.is_grad_enabled():
            return True
        if torch.compiler.is_compiling() or self._examples.batch is None:
            return False
        if self._examples.watched is not None:
            return recording
        if torch.is_grad_enabled():
            for name in trainable:
                self._note_use(name, WITHOUT)
        elif recording and in_reentrant_checkpoint():
            # It runs forward without gradients here, and again with them in backward.
            for name in trainable:
                self._note_use(name, REENTRANT)
            return True
        return False

    def _in_training(self) -> bool:
        """Whether second moments are wanted; a layer that is trained in eval mode says so."""
        return self.training

    def _label(self) -> str:
        return f"{self.__dict__.get('_name') or type(self).__name__}"

    def _axis(self, x: Tensor, dims: int) -> int:
        """The batch dimension of input `x`, whose last ``dims - 1`` dimensions are one position of an example."""
        if "batch_dim" in self.__dict__ or self._batch_at == "says":
            return self.batch_dim
        batch_dim = self._examples.batch_dim
        return min(batch_dim, max(0, x.dim() - dims)) if batch_dim and self._batch_at == "any" else 0

    def _check_batch(self, x: Tensor, dims: int) -> None:
        if x.dim() < dims:
            raise ValueError(
                f"{self._label()}: expected an input of at least {dims} dimensions with the batch first, got shape "
                f"{tuple(x.shape)}; add the batch dimension, or use px.no_moments()"
            )
        batch = self._examples.batch
        if batch is None:
            return
        if self._batch_at is None and self._examples.batch_dim and "batch_dim" not in self.__dict__:
            raise ValueError(
                f"{self._label()} ({type(self).__name__}): is served with the batch as dimension 0 only, and the model "
                f"was converted with batch_dim={self._examples.batch_dim}; freeze it, or run it under px.no_moments()"
            )
        axis, why = self._axis(x, dims), ""
        examples = self._examples
        if examples.watched is not None:
            moved_from(x, axis, batch, examples.input, self._label())
        elif x.shape[axis] != batch:
            why = (
                f"{x.shape[axis]} rows, the batch has {batch} examples: a view folded the batch away, or the batch is "
                f"not dimension {axis}"
            )
        elif not torch.compiler.is_compiling() and (
            ambiguous(x.shape, axis, batch) or without_history(x, batch, examples.input)
        ):
            moved = moved_from(x, axis, batch, examples.input, self._label())
            if moved:
                why = f"{batch} rows, as many as the batch has examples, but dimension {axis} is not the batch: {moved}"
        if why:
            raise ValueError(
                f"{self._label()} saw {why}; keep the batch as dimension {axis} up to this layer "
                f"(extra dimensions are fine: (batch, positions, features)), pass px.convert(batch_dim=...) where the "
                f"whole model has it elsewhere, or run this part under px.no_moments()"
            )

    def _leaves(self, *names: str) -> list[Any]:
        """What a Function takes beside the parameters: their leaves (None for what is absent or frozen), and last the
        `Call`, or where there is no forward pass of eager mode to belong to, the leaf that counts uses.
        """
        leaves: list[Any] = []
        counter: Tensor | None = None
        compiling = torch.compiler.is_compiling()
        batch = None if compiling else self._examples.batch
        call: list[Uses | None] | None = [] if self._reusable and batch is not None else None
        parameters = self._parameters
        for name in names:
            p = parameters.get(name)
            use = None
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
                if compiling:
                    # Nothing may be noted down here (checkpointing forbids it): the uses are counted by autograd
                    # alone, and the optimizer compares.
                    if moment.shared:
                        self._refuse_shared(name, moment)
                    leaves.append(moment.leaf)
                elif batch is not None and moment.fits(p):
                    leaves.append(moment.leaf)
                    use = self._note_use(name, WITH)
                else:
                    leaf, use = self._eager_leaf(name, p, moment)
                    leaves.append(leaf)
                    moment = self._moments[name]
                if counter is None or moment.shared:
                    counter = moment.uses
            if call is not None:
                call.append(use)
        return [*leaves, counter if call is None else Call(call)]

    def _eager_leaf(self, name: str, p: Tensor, moment: Moment) -> tuple[Tensor | None, Uses | None]:
        if not moment.fits(p):
            if hasattr(p, "device_mesh"):
                raise ValueError(
                    f"{self._label()}: its {name} has become a DTensor: tensor-parallel and sharded parameters are not "
                    f"supported; train with plain ones, freeze it, or use px.no_moments()"
                )
            self._bind(name)
            moment = self._moments[name]
        if self._examples.batch is not None:
            return moment.leaf, self._note_use(name, WITH)
        if self._examples.rooted and torch._C._current_graph_task_id() == -1:
            return moment.uncounted_leaf(), None
        return moment.leaf, None

    def _refuse_shared(self, name: str, moment: Moment) -> NoReturn:
        raise ValueError(
            f"{self._label()}: its {name} is shared ({' = '.join(moment.names)}), and compiled code cannot add the "
            f"uses of a shared weight per example; leave these layers out with torch.compiler.disable, do not compile "
            f"the model, or give each layer a weight of its own"
        )

    def _refuse_computed(self, name: str) -> NoReturn:
        raise ValueError(
            f"{self._label()}: '{name}' is no longer a plain parameter (a parametrization, or a tensor put in its "
            f"place); remove it, or use px.no_moments()"
        )

    def _note_use(self, name: str, how: str) -> Uses | None:
        """Note a use in the pass under way; raises where the second moment of all uses together would not be exact."""
        moment = self._moments[name] if name in self._moments else None
        key = moment.name if moment is not None else f"{self._label()}.{name}"
        examples = self._examples
        before = examples.used.get(key)
        if before is not None and not (before == how and (how == WITHOUT or (how == WITH and self._reusable))):
            self._refuse_use(name, before, how)
        examples.used[key] = how
        if how != WITH or moment is None or examples.batch is None:
            return None
        uses = examples.uses.get(moment)
        if uses is None:
            uses = examples.uses[moment] = Uses(moment, examples.batch, self._reusable)
        elif not (uses.reusable and self._reusable):
            self._refuse_use(name, how, how)
        uses.count += 1
        return uses

    def _refuse_use(self, name: str, before: str, how: str) -> NoReturn:
        if REENTRANT in (before, how):
            why = (
                "at least one of them in torch.utils.checkpoint(use_reentrant=True), whose backward pass is apart; use "
                "use_reentrant=False"
            )
        elif before != how:
            why = (
                "one of them without second moments (in eval mode, or under px.no_moments()), so that its part would "
                "be missing; make both alike, or that one under torch.no_grad()"
            )
        else:
            why = f"which {type(self).__name__} does not support; use a layer of its own for each call"
        raise ValueError(
            f"{self._label()} was called twice in one forward pass: the uses of its '{name}' have to be added per "
            f"example before squaring, {why}"
        )
