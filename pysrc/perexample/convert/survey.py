"""What would become of each module, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..moments import ExampleCount, MomentModule, moment_of
from ..nn.embedding import unsupported_embedding
from ..nn.fallback import Fallback
from .recipes import recipe_for

__all__ = ["ConversionTable", "Served", "survey"]

FALLBACK: Literal["exact fallback"] = "exact fallback"


@dataclass(frozen=True)
class Served:
    """How one module is served, and why.

    "kernel"; "exact fallback" (one copy of its parameters per example in backward); "frozen" (no parameter requires
    grad); "group norm" (in the place of a BatchNorm); or "refused".
    """

    name: str
    class_name: str
    how: Literal["kernel", "exact fallback", "frozen", "group norm", "refused"]
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


def survey(model: nn.Module, examples: ExampleCount | None, batchnorm: str | None) -> Iterator[Served]:
    """A row for each module with parameters of its own, or that mixes examples."""
    inside = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None}
        class_name = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield _batch_norm(name, class_name, module, own, batchnorm)
            continue
        why = _refusal(module, own, examples, inside)
        if why:
            yield Served(name, class_name, "refused", why)
        elif own:
            yield Served(name, class_name, _how(module, own))


def _how(module: nn.Module, own: dict[str, Tensor]) -> Any:
    if not any(p.requires_grad for p in own.values()):
        return "frozen"
    return "kernel" if served_by_kernel(module) else FALLBACK


def served_by_kernel(module: nn.Module) -> bool:
    """Whether a class with a kernel serves `module`: there is one, and its weights are parameters of its own."""
    return recipe_for(module) is not None and not _computed(module)


def _computed(module: nn.Module) -> str:
    """A weight of `module` that is no parameter of its own but computed (weight_norm, pruning, ...)."""
    names: tuple[str, ...] = ("weight", "bias")
    if isinstance(module, nn.RNNBase):
        names = tuple(module._flat_weights_names)
    elif isinstance(module, nn.RNNCellBase):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    elif isinstance(module, nn.MultiheadAttention):
        names = (
            "in_proj_weight",
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "in_proj_bias",
            "bias_k",
            "bias_v",
        )
    for name in names:
        if module._parameters.get(name) is not None:
            continue
        # Reading what a parametrization computes may change its buffers: spectral_norm moves on with each read.
        if parametrize.is_parametrized(module, name) or isinstance(getattr(module, name, None), Tensor):
            return name
    return ""


def _batch_norm(
    name: str, class_name: str, module: nn.modules.batchnorm._BatchNorm, own: dict[str, Tensor], batchnorm: str | None
) -> Served:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return Served(name, class_name, "refused", _LAZY)
    if batchnorm == "group":
        return Served(
            name, class_name, "group norm", f"{groups_of(module.num_features)} groups; running statistics dropped"
        )
    if module.training or module.running_mean is None or not served_by_kernel(module):
        return Served(
            name,
            class_name,
            "refused",
            "batch statistics mix the examples, so no per-example gradient exists; use torch.nn.GroupNorm in its "
            'place, which px.convert(model, batchnorm="group") does, or in eval mode (its .eval()) '
            "torch.nn's own BatchNorm1d/2d/3d or SyncBatchNorm, which are served",
        )
    trainable = any(p.requires_grad for p in own.values())
    return Served(name, class_name, "kernel" if trainable else "frozen", "as long as it stays in eval mode")


def groups_of(channels: int) -> int:
    """The groups of the GroupNorm in the place of a BatchNorm: as many as divide the channels into groups of two or
    more, up to 32. (A group of one channel would make every input (B, C) zero.)
    """
    return max((g for g in range(1, 33) if channels % g == 0 and channels // g >= 2), default=1)


_GROUPS = "{} groups; running statistics dropped"
_LAZY = "its parameters have no shape yet; run one forward pass before converting"


def _refusal(module: nn.Module, own: dict[str, Tensor], examples: ExampleCount | None, inside: set[int]) -> str:
    trainable = {name: p for name, p in own.items() if p.requires_grad}
    if not trainable:
        return ""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return _LAZY
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted (torch.jit), so nothing can be added to what it computes; convert the stock module"
    for name, p in trainable.items():
        why = _unusual(name, p) or _foreign(name, p, examples, inside)
        if why:
            return why
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        why = unsupported_embedding(module)
        if why:
            return why
    computed = _computed(module)
    if computed and not parametrize.is_parametrized(module, computed):
        value = getattr(module, computed)
        if isinstance(value, Tensor) and value.requires_grad and value.is_leaf and not isinstance(module, Fallback):
            return f"its {computed} is a tensor that is no parameter; make it a torch.nn.Parameter"
    if served_by_kernel(module):
        out_proj = module.out_proj if isinstance(module, nn.MultiheadAttention) else None
        if out_proj is not None and not served_by_kernel(out_proj):
            return (
                f"its out_proj ({type(out_proj).__name__}) is no plain linear layer; remove the parametrization, or "
                f"freeze the parameters of both (requires_grad_(False))"
            )
        return ""
    if isinstance(module, nn.RNNBase):
        return (
            "a recurrent layer that keeps its weights in a list besides; build it from cells (torch.nn.LSTMCell, "
            "GRUCell, RNNCell), or freeze its parameters (requires_grad_(False))"
        )
    if type(module).forward is nn.MultiheadAttention.forward:
        return (
            "an attention of another class, or whose in_proj is computed (a parametrization); use "
            "torch.nn.MultiheadAttention as it is, or freeze its parameters (requires_grad_(False))"
        )
    for attribute, value in module.__dict__.items():
        if attribute not in ("_parameters", "_modules", "_buffers", "_moments"):
            held = list(value.values()) if isinstance(value, dict) else value
            parts = held if isinstance(held, (list, tuple)) else (held,)
            if any(part is p for part in parts for p in trainable.values()):
                return (
                    f"keeps a parameter besides in its attribute '{attribute}', where its uses could not be seen; "
                    f"reach it by its own name only"
                )
    return ""


def _unusual(name: str, p: Tensor) -> str:
    kind = type(p)
    if kind.__name__ == "DTensor" or hasattr(p, "device_mesh"):
        return (
            f"its {name} is a DTensor: tensor-parallel and sharded parameters are not supported; train with plain "
            f"ones, or freeze it"
        )
    if p.layout != torch.strided:
        return f"its {name} is sparse ({p.layout}), which has no second moment here; make it dense, or freeze it"
    if p.is_quantized or not (p.is_floating_point() or p.is_complex()) or kind is not nn.Parameter:
        what = kind.__name__ if kind is not nn.Parameter else str(p.dtype)
        return f"its {name} is quantised or of a special class ({what}); train in floating point, or freeze it"
    if p.is_complex():
        return f"its {name} is complex; only real parameters have a second moment here"
    return ""


def _foreign(name: str, p: Tensor, examples: ExampleCount | None, inside: set[int]) -> str:
    moment = moment_of(p)
    if moment is None or moment.parameter is not p or moment.examples is examples or not moment.examples.rooted:
        return ""
    if any(id(place.owner()) in inside for place in moment.places):
        return ""
    return (
        f"its {name} is shared with another converted model (as '{moment.name}'), which counts its examples by itself; "
        f"convert one module that contains both"
    )


def layers_of(model: nn.Module) -> Iterator[MomentModule]:
    """The modules of `model` that are converted."""
    for module in model.modules():
        if isinstance(module, MomentModule):
            yield module
