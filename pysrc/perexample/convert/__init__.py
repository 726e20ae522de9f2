"""From a stock model to one that computes per-example second moments, in place."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import nn

from ..moments import ExampleCount, MomentModule
from ..nn.fallback import Fallback, fallback_class, follow_copies
from .passes import follow_passes
from .recipes import LAYERS, recipe_for, register
from .survey import ConversionTable, Served, groups_of, layers_of, served_by_kernel, survey

__all__ = ["LAYERS", "ConversionTable", "Served", "convert", "register"]


@overload
def convert(
    model: nn.Module, *, dry_run: Literal[False] = False, batchnorm: Literal["group"] | None = None, batch_dim: int = 0
) -> nn.Module: ...
@overload
def convert(
    model: nn.Module, *, dry_run: Literal[True], batchnorm: Literal["group"] | None = None, batch_dim: int = 0
) -> ConversionTable: ...


def convert(
    model: nn.Module, *, dry_run: bool = False, batchnorm: Literal["group"] | None = None, batch_dim: int = 0
) -> nn.Module | ConversionTable:
    """Make every layer of `model` compute ``p.sum_grad_squared`` in its backward, in place.

    Modules, parameters and hooks stay the objects that they are; a converted layer is an instance of a subclass of
    its stock class, and the state_dict is the stock one. `model` itself becomes the place where examples are
    counted: dimension 0 of the first tensor among its inputs is the batch. A part of it that is to be called by
    itself is converted as well (``px.convert(model.encoder)``), before or after.

    Args:
        model: the module that training calls.
        dry_run: change nothing; return the table of what would happen.
        batchnorm: "group" replaces every BatchNorm by a GroupNorm with its weight, bias and eps: as many groups as
            divide the channels into groups of two or more, up to 32. Its running statistics are dropped, and with them
            what the model had learned: train anew. None: BatchNorm in training mode is refused, in eval mode served.
        batch_dim: where the batch is in the inputs of the model and of its layers: 0, or 1 for sequence-first models
            ((T, B, D); what has no positions, (B, D), has it first all the same). Layers whose layout is fixed
            (convolutions, GroupNorm) have the batch first in any case.

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
    if batchnorm not in (None, "group"):
        raise ValueError(f'px.convert: batchnorm must be None or "group", got {batchnorm!r}')
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim not in (0, 1):
        raise ValueError(f"px.convert: batch_dim must be 0 or 1, got {batch_dim!r}")
    examples = _common_count(model)
    table = ConversionTable(survey(model, examples, batchnorm))
    if dry_run:
        return table
    refused = [row for row in table if row.how == "refused"]
    if refused:
        lines = "\n".join(f"  {row}" for row in refused)
        raise ValueError(f"px.convert: {len(refused)} of {len(table)} modules cannot be served exactly:\n{lines}")
    if all(row.how == "frozen" for row in table):
        raise ValueError(
            f"px.convert: {type(model).__name__} has nothing to convert: no layer with a parameter that requires grad; "
            f"convert before freezing, or leave the model as it is"
        )
    prefix = _name_in_whole(model) if examples is not None else ""
    examples = examples or ExampleCount()
    examples.batch_dim = batch_dim
    follow_passes(model)
    for name, module in model.named_modules():
        _replace(module, batchnorm)
        name = f"{prefix}.{name}".strip(".")
        if isinstance(module, MomentModule):
            module._join(examples, name)
        if "_perexample_root" in module.__dict__:
            module._examples = examples
            module._name = name
            examples.add_root(name)
    if any(isinstance(module, Fallback) or getattr(module, "batched", None) is False for module in model.modules()):
        for module in layers_of(model):
            if not isinstance(module, Fallback):
                follow_copies(module)
    return model


def _replace(module: nn.Module, batchnorm: str | None) -> None:
    """Change the class of `module` to the one that serves it."""
    biases = getattr(module, "relative_attention_bias", None)
    if isinstance(biases, nn.Embedding) and getattr(biases, "batched", None) is None:
        biases.batched = False  # type: ignore[assignment]  # T5 and its kin look up pairs of positions
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if batchnorm == "group":
            _as_group_norm(module)
    if isinstance(module, MomentModule):
        return
    if served_by_kernel(module):
        module.__class__ = recipe_for(module)  # type: ignore[assignment]
    elif any(p is not None and p.requires_grad for p in module._parameters.values()):
        module.__class__ = fallback_class(type(module))  # type: ignore[arg-type]


def _as_group_norm(module: nn.modules.batchnorm._BatchNorm) -> None:
    channels = module.num_features
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    for name in ("num_features", "momentum", "track_running_stats", "process_group"):
        module.__dict__.pop(name, None)
    module.__class__ = nn.GroupNorm  # type: ignore[assignment]
    module.__dict__.update(num_groups=groups_of(channels), num_channels=channels)


def _common_count(model: nn.Module) -> ExampleCount | None:
    """The count that all layers of `model` share already: `model` is part of a converted model, or is one."""
    counts = {id(module._examples): module._examples for module in layers_of(model) if "_examples" in module.__dict__}
    count = next(iter(counts.values()), None)
    if (
        len(counts) == 1
        and count is not None
        and count.rooted
        and not any(_unconverted(module) for module in model.modules())
    ):
        return count
    return model.__dict__.get("_examples") if "_perexample_root" in model.__dict__ else None


def _unconverted(module: nn.Module) -> bool:
    return not isinstance(module, MomentModule) and any(
        p is not None and p.requires_grad for p in module._parameters.values()
    )


def _name_in_whole(model: nn.Module) -> str:
    """What `model` is called inside of the model that it was converted as a part of; empty if it is the whole."""
    for name, module in model.named_modules():
        if isinstance(module, MomentModule):
            full = module.__dict__.get("_name", "")
            if not name:
                return full
            return full.removesuffix(f".{name}") if full.endswith(f".{name}") else ""
    return ""
