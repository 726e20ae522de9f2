"""The hooks of a converted model: where a forward pass begins and ends, and where its examples are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from .. import autograd
from ..autograd.expansion import batched
from ..moments import ExampleCount, Moment, MomentModule, Uses, _Mode, overlap
from ..moments.bypass import refuse_bypass, refuse_earlier
from ..moments.layout import PassInput
from ..moments.module import WITH, WITHOUT
from ..moments.places import history
from .influence import refuse_moved_batch, refuse_other_orders

__all__ = ["batch_of", "follow_passes"]


def follow_passes(model: nn.Module) -> None:
    """Let `model` count the examples of its forward passes."""
    if "_perexample_root" not in model.__dict__:
        model._perexample_root = True  # type: ignore[assignment]
        model.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True)
        model.register_forward_hook(_leave, with_kwargs=True)
        model.register_forward_hook(_abandon, with_kwargs=True, always_call=True)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a converted model: remember the batch size of the pass that begins."""
    examples: ExampleCount = module._examples  # type: ignore[assignment]
    root = module.__dict__.get("_name", "")
    eager = not torch.compiler.is_compiling()
    if examples.batch is not None:
        if examples.root != root:
            if eager:
                examples.nested[root] = 1
            return  # part of a pass under way
        if eager:
            examples.end_pass()
            raise RuntimeError(
                f"{type(module).__name__} was called inside of its own forward pass (or the last one was interrupted; "
                f"then call it again), so that its examples would be counted twice; call the parts that it is made of"
            )
    again = eager and torch._C._current_graph_task_id() != -1  # checkpointing, in backward
    if again and root in examples.nested:
        return  # counted by the pass that it was part of
    examples.root = root
    examples.end_pass()
    examples.training = module.training
    if not ((torch.is_grad_enabled() or examples.watched is not None) and _Mode.enabled):
        examples.unnoticed = examples.unnoticed or torch.is_grad_enabled()
        return
    if eager:
        data_parallel = DistributedDataParallel._get_active_ddp_module()
        examples.processes = 1 if data_parallel is None else data_parallel.process_group.size()
    if not again:
        examples.forget_backward()  # in case the last backward pass raised
        if eager:
            examples.drop_cleared()
            _refuse_chain(module, examples, root, _tensors((args, kwargs)))
    found = batch_of(module, args, kwargs)
    if found is not None:
        examples.batch = found.tensor.shape[found.axis]
        if eager:
            found.watched = examples.watched
            examples.input = found
            examples.lone = examples.batch == 1 and all(
                tensor.dim() > found.axis and tensor.shape[found.axis] == 1 for tensor in _tensors((args, kwargs))
            )
    elif module.training:
        raise TypeError(
            f"{type(module).__name__}: its inputs hold no tensor whose dimension {_batch_dim(module)} could be the "
            f"batch; pass one, or call the model under px.no_moments()"
        )


def _batch_dim(module: nn.Module) -> int:
    if isinstance(module, MomentModule) and module._batch_at == "says":
        return module.batch_dim
    return module._examples.batch_dim  # type: ignore[union-attr, return-value]


def batch_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PassInput | None:
    """The input that the number of examples of a call of a converted model is taken from; None where there is none."""
    dim = _batch_dim(module)
    return next((PassInput(tensor, dim) for tensor in _tensors((args, kwargs)) if tensor.dim() > dim), None)


def _refuse_chain(module: nn.Module, examples: ExampleCount, root: str, inputs: Iterator[Tensor]) -> None:
    """Raise where an input was computed by an earlier pass through the same weights: it would count examples twice."""
    leaves = [examples.roots[name][0] for name in examples.root_names if overlap(name, root)]
    for node in history(inputs):
        if any(getattr(node, "variable", None) is leaf for leaf in leaves):
            raise ValueError(
                f"{type(module).__name__}: an input was computed by an earlier forward pass through the same weights, "
                f"so they are used twice for one example, and their uses have to be added per example before squaring: "
                f"detach the input, or make both calls inside of the forward of one converted model"
            )


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a converted model: let the outputs carry the example count backward."""
    examples: ExampleCount = module._examples  # type: ignore[assignment]
    if examples.batch is None or examples.root != module.__dict__.get("_name", ""):
        return None
    batch, used, known = examples.batch, examples.used, examples.input
    uses, call = examples.uses, (module, args, kwargs)
    _refuse_lone_row(module, examples, _tensors((args, kwargs)), output)
    examples.end_pass()
    if known is not None and known.unclear:
        examples.unclear += 1
        if _now(examples.unclear):
            refuse_moved_batch(*call, known)
    if not module.training and all(how == WITHOUT for how in used.values()):
        if used:
            _watch(examples, output)
        return None
    examples.last_batch = batch
    examples.forward_pending = True
    note = None if torch.compiler.is_compiling() else examples.note_backward
    if isinstance(output, Tensor):
        if not output.requires_grad:
            return None
        output = batched(output)
        _look([output], examples, used, uses, call, known)
        return autograd.count_examples(*examples.leaves(), batch, [output], note)[0]
    leaves, spec = pytree.tree_flatten(output)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not where:
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError(
                f"{type(module).__name__} returned {type(output).__name__}, in which no tensor was found to count the "
                f"examples with; return tensors, lists, tuples or dicts of them, or register the class with "
                f"torch.utils._pytree"
            )
        return None
    outputs = [batched(leaves[i]) for i in where]
    _look(outputs, examples, used, uses, call, known)
    counted = autograd.count_examples(*examples.leaves(), batch, outputs, note)
    for i, tensor in zip(where, counted, strict=True):
        leaves[i] = tensor
    return pytree.tree_unflatten(leaves, spec)


def _refuse_lone_row(module: nn.Module, examples: ExampleCount, inputs: Iterator[Tensor], output: Any) -> None:
    """Raise where the input that told the batch has one row, and another one and an output have the same number, more.

    Parameters of one copy go with anything, unlike a layer with a kernel; but that may have seen the first input alone.
    Where the outputs do not tell, as a loss does not, the inputs decide if there was no such layer.
    """
    if examples.batch != 1 or not any(uses.expanded is not None for uses in examples.uses.values()):
        return
    dim = examples.batch_dim
    made = {
        value.shape[dim]
        for value in pytree.tree_leaves(output)
        if isinstance(value, Tensor) and value.requires_grad and value.dim() > dim
    }
    given = {value.shape[dim] for value in inputs if value.dim() > dim}
    if made:
        given &= made
    elif any(uses.expanded is None for uses in examples.uses.values()):
        return
    for rows in sorted(given - {1}):
        raise ValueError(
            f"{type(module).__name__}: its first input has 1 row, so the batch is taken to have 1 example, but another "
            f"input {'and the output have' if made else 'has'} {rows}; pass the input with the batch first, or expand "
            f"the first to {rows} rows; where there is one example, give what has no batch a first dimension of 1"
        )


def _look(
    outputs: list[Tensor],
    examples: ExampleCount,
    used: dict[str, str],
    uses: dict[Moment, Uses],
    call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]],
    known: PassInput | None,
) -> None:
    """Look through the graph of the first passes, and ever more rarely of later ones."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return
    examples.passes += 1
    if examples.watched is None and _now(examples.passes):
        refuse_bypass(outputs, examples, used, WITH)
        refuse_earlier(outputs, examples, uses.values())
        if known is not None:
            refuse_other_orders(*call, known, outputs, list(uses.values()))


def _now(times: int) -> bool:
    """Whether to look once more after so many times: 1, 2, 4, 8, ..., and every 1024."""
    return times & (times - 1) == 0 or times % 1024 == 0


def _watch(examples: ExampleCount, output: Any) -> None:
    """Notice a backward pass through `output`, whose examples are not counted."""
    for tensor in pytree.tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                examples.unnoticed = True
            else:
                tensor.grad_fn.register_prehook(examples.note_missed)


def _abandon(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook that runs in any case: a pass that raised is over."""
    examples: ExampleCount = module._examples  # type: ignore[assignment]
    if examples.batch is not None and examples.root == module.__dict__.get("_name", ""):
        examples.end_pass()
