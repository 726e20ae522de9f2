"""Adam on per-example second moments."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..moments import ExampleCount, Moment, accumulate_dtype, moment_of

__all__ = ["Adam"]


class _Bucket(NamedTuple):
    """The parameters that one call of the fused op updates: same group, device and example count."""

    group: dict[str, Any]
    examples: ExampleCount | None
    batch_size: Tensor
    rounds: int  # backward passes that the gradients were accumulated over
    params: list[Tensor]
    grads: list[Tensor]
    sums: list[Tensor]
    uses: list[Tensor]  # for each layer once: how often its parameters were used
    users: list[Tensor]  # a parameter of that layer


class Adam(Optimizer):
    """Adam with decoupled weight decay, whose second moment averages squared *per-example* gradients.

    All hyper-parameters are values for batch size 1. With B examples in the step, n examples seen so far, ``ghat``
    the mean gradient and ``s`` the mean over examples of the squared per-example gradient (MATHS 2, 11, 16-18)::

        kappa      = min(1, B / min(n, N))                                   # N = n_g, and N = n_s
        exp_avg    = (1 - kappa_g) exp_avg + kappa_g ghat
        exp_avg_sq = (1 - kappa_s) exp_avg_sq + kappa_s s
        p          = (1 - B lr weight_decay) p - B lr exp_avg / (sqrt(exp_avg_sq) + eps)

    B is what was backpropagated since the gradients were cleared: micro-batches add up, and it may change from step
    to step. An LR scheduler acts on `lr`.

    Args:
        params: parameters (or named parameters, or groups) of a converted model, or of px.nn layers.
        lr: learning rate for batch size 1 (eta_0). A float or a scalar tensor.
        n_g: averaging time of the gradient, in examples (N0_g); 1 / (1 - beta1) steps of batch size 1.
        n_s: averaging time of the second moment, in examples (N0_s).
        eps: added to the root.
        weight_decay: decoupled (AdamW), per example: independent of B.
        second_moment: "per_example" (MATHS 17), or "per_batch" for the square of the mean gradient (MATHS 16), which
            also works on a model that is not converted; `step` then needs its `batch_size`.
        loss_reduction: "mean" or "sum", how the loss combines the examples of a batch. Micro-batches of a mean-reduced
            loss have to be weighted by their share of the batch, as with any optimizer.
        maximize: ascend.
        guard: raise where a gradient is larger than its second moment allows, that is, where part of it did not
            come through the layers (Cauchy-Schwarz).

    Raises:
        TypeError, ValueError: for arguments out of range, or a parameter without second moment.

    Equivalent, for batch size 1 and without averaging-time limits, to torch.optim.AdamW with betas
    ``(1 - 1 / min(t, n_g), 1 - 1 / min(t, n_s))`` and no bias correction.
    """

    # GradScaler then hands the scale over instead of dividing p.grad alone, which would leave the second moment scaled.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        n_g: float,
        n_s: float,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        second_moment: str = "per_example",
        loss_reduction: str = "mean",
        maximize: bool = False,
        guard: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "n_g": n_g,
            "n_s": n_s,
            "eps": eps,
            "weight_decay": weight_decay,
            "second_moment": second_moment,
            "loss_reduction": loss_reduction,
            "maximize": maximize,
            "guard": guard,
        }
        self._prepare()
        super().__init__(params, defaults)

    def _prepare(self) -> None:
        self._packed: dict[tuple[int, ...], Tensor] = {}
        self._pending_flags: list[tuple[Tensor, Any, list[Tensor], str]] = []
        self._warned = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked here, and that its parameters have a second moment."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        for option, low, inclusive in (
            ("lr", 0.0, True),
            ("n_g", 1.0, True),
            ("n_s", 1.0, True),
            ("eps", 0.0, True),
            ("weight_decay", 0.0, True),
        ):
            value = group[option]
            if option == "lr" and isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"{name}: lr must be a scalar tensor, got shape {tuple(value.shape)}")
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: {option} must be a number, got {type(value).__name__}")
            if not (value >= low) or (option in ("lr", "weight_decay", "eps") and math.isinf(value)):
                raise ValueError(
                    f"{name}: {option} must be {'at least' if inclusive else 'above'} {low:g}, got {value}"
                )
        for option, allowed in (("second_moment", ("per_example", "per_batch")), ("loss_reduction", ("mean", "sum"))):
            if group[option] not in allowed:
                raise ValueError(f"{name}: {option} must be one of {', '.join(allowed)}, got {group[option]!r}")
        for index, p in enumerate(group["params"]):
            if p.is_complex():
                raise TypeError(
                    f"{name}: {self._name_of(p, group, index)} is complex; only real parameters are supported"
                )
            if group["second_moment"] == "per_example" and p.requires_grad and moment_of(p) is None:
                raise ValueError(
                    f"{name}: {self._name_of(p, group, index)}, of shape {tuple(p.shape)}, has no second moment: no "
                    f"layer of perexample owns it; call px.convert(model) before making the optimizer, or use "
                    f"second_moment='per_batch'"
                )

    def _name_of(self, p: Tensor, group: dict[str, Any], index: int | None = None) -> str:
        moment = moment_of(p)
        if moment is not None and moment.name:
            return f"parameter '{moment.name}'"
        if index is None:
            index = next(i for i, q in enumerate(group["params"]) if q is p)
        if "param_names" in group:
            return f"parameter '{group['param_names'][index]}'"
        return f"parameter {index} of its group"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, batch_size: int | Tensor | None = None) -> Any:
        """Perform one step.

        Args:
            closure: reevaluates the model and returns the loss.
            batch_size: number of examples in the gradients, instead of what the converted model counted: for layers
                used without px.convert, or second_moment="per_batch" on a stock model.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a second moment or the number of examples is missing, a forward pass had no backward, or
                the guard found a gradient that bypassed the layers. But for the guard nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step(self._as_batch_size(batch_size))
        except BaseException:
            # GradScaler sets these for one step and deletes them after it, but not where the step raises.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise
        return loss

    def _step(self, batch_size: Tensor | None) -> None:
        self._raise_flagged()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        buckets = self._collect(batch_size)
        if found_inf is not None and grad_scale is None and any(bucket.sums for bucket in buckets):
            raise RuntimeError(
                f"{type(self).__name__}: GradScaler.unscale_(optimizer) divided the gradients but cannot divide their "
                f"second moments; leave out unscale_, GradScaler.step(optimizer) hands the scale over"
            )
        for bucket in buckets:
            self._update(bucket, grad_scale, found_inf)
        self._raise_flagged()

    def _as_batch_size(self, batch_size: int | Tensor | None) -> Tensor | None:
        if batch_size is None:
            return None
        if isinstance(batch_size, Tensor) and batch_size.numel() == 1:
            return batch_size.detach().reshape(()).double()
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(
                f"{type(self).__name__}.step: batch_size must be an int or a scalar tensor, got "
                f"{type(batch_size).__name__}"
            )
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__}.step: batch_size must be at least 1, got {batch_size}")
        return torch.tensor(batch_size, dtype=torch.float64)

    def _collect(self, batch_size: Tensor | None) -> list[_Bucket]:
        """Sort the parameters into buckets; raises before anything is changed."""
        moments = [[moment_of(p) for p in group["params"]] for group in self.param_groups]
        counts = {id(m.examples): m.examples for row in moments for m in row if m is not None}
        for count in counts.values():
            count.drop_cleared()
        buckets: dict[tuple[Any, ...], _Bucket] = {}
        for number, (group, row) in enumerate(zip(self.param_groups, moments, strict=True)):
            per_example = group["second_moment"] == "per_example"
            last_uses: Tensor | None = None
            for p, moment in zip(group["params"], row, strict=True):
                grad = p.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__}: {self._name_of(p, group)} has a sparse gradient; use a dense one"
                    )
                second = self._second_moment(p, grad, moment, group) if per_example else None
                if per_example and second is None:
                    continue
                examples, base = (None, None) if moment is None else (moment.examples, moment.base)
                roots = () if moment is None else moment.roots
                key = (number, p.device, id(examples), roots, id(base))
                bucket = buckets.get(key)
                if bucket is None:
                    total = batch_size if batch_size is not None else self._counted(p, group, moment)
                    rounds = 1 if examples is None else examples.rounds_since(base)
                    bucket = buckets[key] = _Bucket(group, examples, total, rounds, [], [], [], [], [])
                bucket.params.append(p)
                bucket.grads.append(grad)
                if second is not None and moment is not None:
                    bucket.sums.append(second)
                    uses = moment.uses
                    if uses is not last_uses and uses is not None and uses.grad is not None:
                        last_uses = uses
                        # Beside uses in eager mode, these may have been in the same forward pass as well.
                        bucket.uses.append(uses.grad + math.inf if moment.eager else uses.grad)
                        bucket.users.append(p)
        if not buckets and any(count.forward_pending for count in counts.values()):
            raise RuntimeError(
                f"{type(self).__name__}.step: a forward pass was made, but its backward never came, so no parameter "
                f"has a gradient; call loss.backward() before step()"
            )
        for bucket in buckets.values():
            self._check_uses(bucket)
        self._raise_flagged()
        self._warn_beyond_horizon(buckets.values())
        return list(buckets.values())

    def _check_uses(self, bucket: _Bucket) -> None:
        """Flag the layers that were used more often than there were passes, which only autograd could count."""
        examples = bucket.examples
        if not bucket.uses or examples is None or examples.uncounted:
            return
        moment = moment_of(bucket.users[0])
        assert moment is not None
        passes = examples.passes_of(moment.roots) if examples.roots else examples.rounds
        if passes is not None:
            self._note_flags(torch.stack(bucket.uses) > passes, bucket.users, "uses")

    def _second_moment(self, p: Tensor, grad: Tensor, moment: Moment | None, group: dict[str, Any]) -> Tensor | None:
        if moment is not None and moment.live and moment.leaf is not None:
            second = moment.leaf.grad
            if second is not None:
                if moment.leaf_rounds != moment.grad_rounds:
                    raise RuntimeError(
                        f"{type(self).__name__}.step: the gradient of {self._name_of(p, group)} was accumulated in "
                        f"{moment.grad_rounds} backward passes, its second moment in {moment.leaf_rounds}: some ran in "
                        f"eval mode, under px.no_moments(), past the layer, with backward(inputs=...), or before a "
                        f"change of dtype or device; clear the gradients and accumulate all in one way"
                    )
                return second
        if moment is not None and not bool(grad.any()):
            return None  # zero_grad(set_to_none=False), and no gradient since
        raise RuntimeError(
            f"{type(self).__name__}.step: {self._name_of(p, group)} has a gradient but no second moment: its forward "
            f"pass ran in eval mode, under px.no_moments(), or outside of the layer that owns it (F.linear on its "
            f"weight, say); run the layer itself in training mode"
        )

    def _counted(self, p: Tensor, group: dict[str, Any], moment: Moment | None) -> Tensor:
        examples = None if moment is None else moment.examples
        base = None if moment is None else moment.base
        total = None if examples is None or moment is None else examples.total_of(moment.roots)
        if examples is not None and examples.uncounted and total is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step: '{examples.uncounted}' was backpropagated through outside of the "
                f"converted model as well as inside, so its examples were not all counted; convert the part that is "
                f"called by itself (px.convert(model.part)), or pass step(batch_size=...)"
            )
        if total is None:
            raise RuntimeError(
                f"{type(self).__name__}.step: no example was counted for {self._name_of(p, group)}: the backward pass "
                f"did not go through the output of a converted model (a sub-module was called directly, or px.convert "
                f"was not); call the model that was converted, convert the part that is called "
                f"(px.convert(model.part)), or pass step(batch_size=...)"
            )
        return total if base is None else total - base.total

    def _warn_beyond_horizon(self, buckets: Iterable[_Bucket]) -> None:
        """MATHS (12): beyond N nothing is averaged, and batch-size invariance ends. Said once, from host values."""
        if self._warned:
            return
        for bucket in buckets:
            if bucket.batch_size.device.type == "cpu":
                size = int(bucket.batch_size)
            else:
                size = 0 if bucket.examples is None else bucket.examples.last_batch
            horizon = min(bucket.group["n_g"], bucket.group["n_s"])
            if size > horizon:
                self._warned = True
                warnings.warn(
                    f"{type(self).__name__}: the batch of {size} examples is larger than the averaging time of "
                    f"{horizon:g} examples "
                    f"(n_g, n_s): nothing is averaged, and from here on results depend on the batch size",
                    stacklevel=7,
                )
                return

    def _update(self, bucket: _Bucket, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        group, params = bucket.group, bucket.params
        device = params[0].device
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                self._initialise(p, state)
        guarded = group["guard"] and bucket.sums
        violations = torch.zeros(len(params), dtype=torch.int32, device=device)
        lr = group["lr"]
        torch.ops.perexample.adam_step_(
            params,
            bucket.grads,
            bucket.sums,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            self._pack_examples(params, states),
            violations,
            bucket.batch_size.to(device, non_blocking=True),
            lr.to(device, torch.float64)
            if isinstance(lr, Tensor)
            else torch.full((), lr, dtype=torch.float64, device=device),
            float(group["n_g"]),
            float(group["n_s"]),
            float(group["eps"]),
            float(group["weight_decay"]),
            group["loss_reduction"] == "mean",
            group["maximize"],
            max(1, bucket.rounds) if guarded else 0,
            None if grad_scale is None else grad_scale.to(device, non_blocking=True),
            None if found_inf is None else found_inf.to(device, non_blocking=True),
        )
        # The kernel writes through raw pointers; a graph that saved these parameters has to notice.
        torch.autograd.graph.increment_version(params)
        if guarded:
            self._note_flags(violations, params, "guard")

    @staticmethod
    def _initialise(p: Tensor, state: dict[str, Any]) -> None:
        dtype = accumulate_dtype(p.dtype)
        state["examples"] = torch.zeros((), dtype=torch.float64, device=p.device)
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def _pack_examples(self, params: list[Tensor], states: list[dict[str, Any]]) -> Tensor:
        """The example counts of `params` as one tensor, of which the states hold the elements."""
        key = tuple(map(id, params))
        packed = self._packed.get(key)
        if packed is None or any(state["examples"]._base is not packed for state in states):
            if len(self._packed) > 32:
                self._packed.clear()
            packed = torch.stack([state["examples"] for state in states])
            for state, element in zip(states, packed.unbind(), strict=True):
                state["examples"] = element
            self._packed[key] = packed
        return packed

    def _note_flags(self, flags: Tensor, params: list[Tensor], kind: str) -> None:
        """Remember to raise for the flagged ones of `params`; on an accelerator the flags travel without a sync."""
        if flags.device.type == "cpu":
            self._pending_flags.append((flags, None, params, kind))
        elif not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event()
            arriving = flags.to("cpu", non_blocking=True)
            event.record()
            self._pending_flags.append((arriving, event, params, kind))

    def _raise_flagged(self) -> None:
        """Raise for what was flagged; on an accelerator only once the flags have arrived, a step late."""
        waiting = []
        flagged: dict[str, list[Tensor]] = {}
        for entry in self._pending_flags:
            flags, event, params, kind = entry
            if event is not None and not event.query():
                waiting.append(entry)
            elif bool(flags.any()):
                flagged.setdefault(kind, []).extend(params[i] for i in flags.nonzero().flatten().tolist())
        self._pending_flags = [] if flagged else waiting
        for kind, params in flagged.items():
            groups = {id(p): group for group in self.param_groups for p in group["params"]}
            names = ", ".join(self._name_of(p, groups[id(p)]) for p in params[:5])
            more = f" and {len(params) - 5} more" if len(params) > 5 else ""
            if kind == "uses":
                raise RuntimeError(
                    f"{type(self).__name__}.step: {names}{more} was used more than once in one forward pass: its uses "
                    f"have to be added per example before squaring, which is not supported yet; use a layer of its own "
                    f"for each call"
                )
            raise RuntimeError(
                f"{type(self).__name__}.step: the gradient of {names}{more} is larger than its second moment allows "
                f"((sum_b c_b)**2 <= B sum_b c_b**2): part of it did not come through the layer. Usual causes: "
                f"F.linear or F.conv2d on the layer's weight, a hook or code that changed p.grad, a penalty on the "
                f"weights in the loss (use weight_decay, which is decoupled), a wrong batch_size. guard=False turns "
                f"this check off. The step has been applied"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, the second moments and the example count."""
        super().zero_grad(set_to_none)
        touched: dict[int, tuple[ExampleCount, list[Moment]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                moment = moment_of(p)
                if moment is not None:
                    touched.setdefault(id(moment.examples), (moment.examples, []))[1].append(moment)
        for examples, moments in touched.values():
            examples.drop(moments)
            if not examples.alive():
                examples.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, bit for bit: the state keeps its own dtype, whatever the parameter's."""
        super().load_state_dict(state_dict)
        self._prepare()
        own = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for p, key in zip(own, saved, strict=True):
            if key in state_dict["state"]:
                wide = accumulate_dtype(p.dtype)
                self.state[p] = {
                    name: value.to(p.device, torch.float64 if name == "examples" else wide, copy=True)
                    for name, value in state_dict["state"][key].items()
                }
