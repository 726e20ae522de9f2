"""From a stock model to one that computes per-example second moments, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import autograd
from . import nn as px_nn
from .moments import ExampleCount, MomentModule, _Mode, overlap
from .nn.embedding import unsupported_embedding

__all__ = ["ConversionTable", "Served", "convert"]

# Exactly these classes: a subclass may compute something else.
LAYERS: dict[type[nn.Module], type[MomentModule]] = {
    nn.Linear: px_nn.Linear,
    nn.Conv1d: px_nn.Conv1d,
    nn.Conv2d: px_nn.Conv2d,
    nn.Conv3d: px_nn.Conv3d,
    nn.ConvTranspose1d: px_nn.ConvTranspose1d,
    nn.ConvTranspose2d: px_nn.ConvTranspose2d,
    nn.ConvTranspose3d: px_nn.ConvTranspose3d,
    nn.MultiheadAttention: px_nn.MultiheadAttention,
    nn.modules.linear.NonDynamicallyQuantizableLinear: px_nn.NonDynamicallyQuantizableLinear,
    nn.TransformerEncoderLayer: px_nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: px_nn.TransformerDecoderLayer,
    nn.TransformerEncoder: px_nn.TransformerEncoder,
    nn.TransformerDecoder: px_nn.TransformerDecoder,
    nn.Transformer: px_nn.Transformer,
    nn.LayerNorm: px_nn.LayerNorm,
    nn.RMSNorm: px_nn.RMSNorm,
    nn.GroupNorm: px_nn.GroupNorm,
    nn.InstanceNorm1d: px_nn.InstanceNorm1d,
    nn.InstanceNorm2d: px_nn.InstanceNorm2d,
    nn.InstanceNorm3d: px_nn.InstanceNorm3d,
    nn.BatchNorm1d: px_nn.BatchNorm1d,
    nn.BatchNorm2d: px_nn.BatchNorm2d,
    nn.BatchNorm3d: px_nn.BatchNorm3d,
    nn.Embedding: px_nn.Embedding,
}


@dataclass(frozen=True)
class Served:
    """How one module is served: "kernel", "frozen" (no parameter requires grad), or "refused", and then why."""

    name: str
    class_name: str
    how: Literal["kernel", "frozen", "refused"]
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'} ({self.class_name}): {self.why or self.how}"


class ConversionTable(list[Served]):
    """What `convert` would do: a row for each module that holds parameters. Prints as a table."""

    def __str__(self) -> str:
        cells = [("module", "class", "served", "why")]
        cells += [(row.name or "(itself)", row.class_name, row.how, row.why) for row in self]
        widths = [max(len(line[i]) for line in cells) for i in range(3)]
        return "\n".join(
            "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in cells
        )


@overload
def convert(model: nn.Module, *, dry_run: Literal[False] = False) -> nn.Module: ...
@overload
def convert(model: nn.Module, *, dry_run: Literal[True]) -> ConversionTable: ...


def convert(model: nn.Module, *, dry_run: bool = False) -> nn.Module | ConversionTable:
    """Make every layer of `model` compute ``p.sum_grad_squared`` in its backward, in place.

    Modules, parameters and hooks stay the objects that they are; a converted layer is an instance of a subclass of
    its stock class, and the state_dict is the stock one. `model` itself becomes the place where examples are
    counted: dimension 0 of the first tensor among its inputs is the batch. A part of it that is to be called by
    itself is converted as well (``px.convert(model.encoder)``), before or after.

    Args:
        model: the module that training calls.
        dry_run: change nothing; return the table of what would happen.

    Returns:
        `model`, or with `dry_run` a `ConversionTable`.

    Raises:
        TypeError: `model` is no torch.nn.Module, or is already compiled or scripted.
        ValueError: some module cannot be served exactly (all are listed, with the way out), or nothing can be
            converted. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"px.convert: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"px.convert: model is a {type(model).__name__}; convert the model first, then compile it: "
            f"torch.compile(px.convert(model))"
        )
    table = ConversionTable(_survey(model))
    if dry_run:
        return table
    refused = [row for row in table if row.how == "refused"]
    if refused:
        lines = "\n".join(f"  {row}" for row in refused)
        raise ValueError(f"px.convert: {len(refused)} of {len(table)} modules cannot be served exactly:\n{lines}")
    if not any(row.how == "kernel" for row in table):
        raise ValueError(
            f"px.convert: {type(model).__name__} has nothing to convert: no layer with a parameter that requires grad; "
            f"convert before freezing, or leave the model as it is"
        )
    examples = _common_count(model)
    prefix = _name_in_whole(model) if examples is not None else ""
    examples = examples or ExampleCount()
    if "_perexample_root" not in model.__dict__:
        model._perexample_root = True  # type: ignore[assignment]
        model.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True)
        model.register_forward_hook(_leave, with_kwargs=True)
        model.register_forward_hook(_abandon, with_kwargs=True, always_call=True)
    for name, module in model.named_modules():
        name = f"{prefix}.{name}".strip(".")
        if type(module) in LAYERS:
            module.__class__ = LAYERS[type(module)]
        if isinstance(module, MomentModule):
            module._join(examples, name)
        if "_perexample_root" in module.__dict__:
            module._examples = examples
            module._name = name
            examples.add_root(name)
    return model


def _survey(model: nn.Module) -> Iterator[Served]:
    """A row for each module with parameters of its own, or that mixes examples."""
    users: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                users.setdefault(id(p), []).append(f"{module_name}.{name}" if module_name else name)
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        why = _refusal(module, own, users)
        class_name = type(module).__name__
        if why:
            yield Served(name, class_name, "refused", why)
        elif own:
            yield Served(name, class_name, "kernel" if any(p.requires_grad for p in own) else "frozen")


def _refusal(module: nn.Module, own: Sequence[nn.Parameter], users: dict[int, list[str]]) -> str:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not _has_constant_statistics(module):
        return (
            "batch statistics mix the examples, so no per-example gradient exists; use torch.nn.GroupNorm in its place"
        )
    if not any(p.requires_grad for p in own):
        return ""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "its parameters have no shape yet; run one forward pass before converting"
    shared = [users[id(p)] for p in own if len(users[id(p)]) > 1]
    if shared:
        return (
            f"shares a weight ({' = '.join(shared[0])}); its uses have to be added per example before squaring, which "
            f"is not supported yet: give each module a weight of its own"
        )
    if isinstance(module, nn.Embedding) and type(module) in (nn.Embedding, px_nn.Embedding):
        return unsupported_embedding(module)
    if type(module) in LAYERS or isinstance(module, MomentModule):
        for name in ("weight", "bias"):
            if module._parameters.get(name) is None and getattr(module, name, None) is not None:
                return (
                    f"its {name} is computed from other parameters (weight_norm, spectral_norm, pruning, ...); remove "
                    f"that before converting"
                )
        return ""
    names = ", ".join(name for name, p in module._parameters.items() if p is not None)
    return (
        f"holds parameters ({names}) and is none of the layers of perexample.nn; build it from these, "
        f"or freeze its parameters (requires_grad_(False))"
    )


def _has_constant_statistics(module: nn.modules.batchnorm._BatchNorm) -> bool:
    served = type(module) in LAYERS or isinstance(module, MomentModule)
    return served and not module.training and module.running_mean is not None


def _common_count(model: nn.Module) -> ExampleCount | None:
    """The count that all layers of `model` share already: `model` is part of a converted model, or is one."""
    counts = {id(module._examples): module._examples for module in model.modules() if isinstance(module, MomentModule)}
    count = next(iter(counts.values()), None)
    if (
        len(counts) == 1
        and count is not None
        and count.rooted
        and not any(type(module) in LAYERS for module in model.modules())
    ):
        return count
    return model.__dict__.get("_examples") if "_perexample_root" in model.__dict__ else None


def _name_in_whole(model: nn.Module) -> str:
    """What `model` is called inside of the model that it was converted as a part of; empty if it is the whole."""
    for name, module in model.named_modules():
        if isinstance(module, MomentModule):
            full = module.__dict__.get("_name", "")
            if not name:
                return full
            return full.removesuffix(f".{name}") if full.endswith(f".{name}") else ""
    return ""


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
            examples.batch = None
            raise RuntimeError(
                f"{type(module).__name__} was called inside of its own forward pass (or the last one was interrupted; "
                f"then call it again): the uses of its weights have to be added per example before squaring, which is "
                f"not supported yet"
            )
    again = eager and torch._C._current_graph_task_id() != -1  # checkpointing, in backward
    if again and root in examples.nested:
        return  # counted by the pass that it was part of
    examples.root = root
    examples.training = module.training
    examples.batch = None
    examples.used = {}
    if not (torch.is_grad_enabled() and _Mode.enabled):
        return
    if not again:
        examples._in_round = False  # in case the last backward pass raised
        if eager:
            examples.drop_cleared()
            _refuse_chain(module, examples, root, _tensors((args, kwargs)))
    dim = module.batch_dim if isinstance(module, MomentModule) else 0
    for tensor in _tensors((args, kwargs)):
        if tensor.dim() > dim:
            examples.batch = tensor.shape[dim]
            return
    if module.training:
        raise TypeError(
            f"{type(module).__name__}: its inputs hold no tensor whose dimension 0 could be the batch; pass one, or "
            f"call the model under px.no_moments()"
        )


def _refuse_chain(module: nn.Module, examples: ExampleCount, root: str, inputs: Iterator[Tensor]) -> None:
    """Raise where an input was computed by an earlier pass through the same weights: it would count examples twice."""
    leaves = [examples.roots[name][0] for name in examples.root_names if overlap(name, root)]
    pending = [tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if any(getattr(node, "variable", None) is leaf for leaf in leaves):
            raise ValueError(
                f"{type(module).__name__}: an input was computed by an earlier forward pass through the same weights, "
                f"so they are used twice for one example; their uses have to be added per example before squaring, "
                f"which is not supported yet: detach the input, or make both calls inside of the forward of one "
                f"converted model, with a layer of its own for each"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a converted model: let the outputs carry the example count backward."""
    examples: ExampleCount = module._examples  # type: ignore[assignment]
    if examples.batch is None or examples.root != module.__dict__.get("_name", ""):
        return None
    batch, tracked = examples.batch, any(examples.used.values())
    examples.batch = None
    examples.used = {}
    if not (module.training or tracked):
        return None
    examples.last_batch = batch
    examples.forward_pending = True
    if isinstance(output, Tensor):
        if not output.requires_grad:
            return None
        return autograd.count_examples(*examples.leaves(), batch, [output])[0]
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
    counted = autograd.count_examples(*examples.leaves(), batch, [leaves[i] for i in where])
    for i, tensor in zip(where, counted, strict=True):
        leaves[i] = tensor
    return pytree.tree_unflatten(leaves, spec)


def _abandon(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook that runs in any case: a pass that raised is over."""
    examples: ExampleCount = module._examples  # type: ignore[assignment]
    if examples.batch is not None and examples.root == module.__dict__.get("_name", ""):
        examples.batch = None
        examples.used = {}
