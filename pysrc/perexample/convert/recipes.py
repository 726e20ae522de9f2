"""Which class of layer serves which stock class: by table, by `register`, or by what a module looks like."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as px_nn
from ..moments import MomentModule
from ..nn.lookalikes import InputMajorLinear, RMSNormLookalike, eps_of

__all__ = ["LAYERS", "recipe_for", "register"]

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
    nn.SyncBatchNorm: px_nn.SyncBatchNorm,
    nn.Embedding: px_nn.Embedding,
    nn.EmbeddingBag: px_nn.EmbeddingBag,
    nn.Bilinear: px_nn.Bilinear,
    nn.PReLU: px_nn.PReLU,
    nn.LSTM: px_nn.LSTM,
    nn.GRU: px_nn.GRU,
    nn.RNN: px_nn.RNN,
    nn.LSTMCell: px_nn.LSTMCell,
    nn.GRUCell: px_nn.GRUCell,
    nn.RNNCell: px_nn.RNNCell,
}

_registered: dict[type[nn.Module], type[MomentModule]] = {}
_made: dict[type[nn.Module], type[MomentModule]] = {}


def register(module_class: type[nn.Module], recipe: type[MomentModule]) -> None:
    """Let `px.convert` serve modules of exactly the class `module_class` by `recipe`.

    Args:
        module_class: a subclass of torch.nn.Module; not of its subclasses, which may compute something else.
        recipe: a subclass of ``px.nn.MomentModule`` and of `module_class` that adds no state of its own: converting
            changes the class of the module and nothing else.

    Raises:
        TypeError: if they are no such classes.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"px.register: module_class must be a subclass of torch.nn.Module, got {module_class!r}")
    if not (isinstance(recipe, type) and issubclass(recipe, MomentModule) and issubclass(recipe, module_class)):
        raise TypeError(
            f"px.register: recipe must be a subclass of px.nn.MomentModule and of {module_class.__name__}, "
            f"got {recipe!r}"
        )
    _registered[module_class] = recipe


def recipe_for(module: nn.Module) -> type[MomentModule] | None:
    """The class that serves `module` by a kernel, or None. An instance of such a class is served by its own."""
    stock: Any = type(module)
    if isinstance(module, MomentModule):
        return None if hasattr(stock, "_stock_class") else stock
    found = _registered.get(stock) or LAYERS.get(stock)
    if found is None:
        base = _lookalike(module)  # asked of each module: what one computes may hang on how it was made
        found = None if base is None else _made.setdefault(stock, _subclass(base, stock))
    return found


def _subclass(base: type[MomentModule], stock: type[nn.Module]) -> type[MomentModule]:
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__reduce_ex__": _reduce}
    return type(stock.__name__, (base, stock), {**names, "_made_for": stock})


def _reduce(self: MomentModule, protocol: object) -> object:
    return _remake, (type(self)._made_for, type(self).__mro__[1]), self.__getstate__()  # type: ignore[attr-defined]


def _remake(stock: type[nn.Module], base: type[MomentModule]) -> MomentModule:
    made = _made.get(stock)
    if made is None:
        made = _made[stock] = _subclass(base, stock)
    return made.__new__(made)


def _only(module: nn.Module, *names: str) -> bool:
    """Whether `module` has these parameters and nothing else: no other state, no children."""
    own = {name for name, p in module._parameters.items() if p is not None}
    return own == set(names) and not module._modules and not module._buffers


def _lookalike(module: nn.Module) -> type[MomentModule] | None:
    """By its class' name and its parameters, and then by what it computes of a probe."""
    name = type(module).__name__
    weight = module._parameters.get("weight")
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
        return None
    if name == "Conv1D" and weight.dim() == 2 and _only(module, "weight", "bias"):
        if _computes(module, weight.shape[0], lambda x, weight, bias: x @ weight + bias):
            return InputMajorLinear
    eps = eps_of(module)
    if (
        ("RMSNorm" in name or name == "T5LayerNorm")
        and weight.dim() == 1
        and _only(module, "weight")
        and eps is not None
    ):
        if _computes(
            module, weight.shape[0], lambda x, weight: weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ):
            return RMSNormLookalike
    return None


def _computes(module: nn.Module, width: int, formula: Callable[..., Tensor]) -> bool:
    """Whether `module` computes ``formula(x, **parameters)``, of a probe with rows large and small, in float32."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.randn(p.shape, generator=generator).to(p.device)
        for name, p in module._parameters.items()
        if p is not None
    }
    x = torch.randn(2, 3, width, generator=generator).to(next(iter(parameters.values())).device)
    x[:, 0] *= 1e-3
    try:
        probed = copy.copy(module)  # hooks are to see nothing of this
        probed.__dict__.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        for probed.training in (True, False):  # it may have a dropout
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                found = torch.func.functional_call(probed, parameters, (x,))
                expected = formula(x, **parameters)
            if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
                return False
            # Another formula differs in the first digits, this one in the last.
            if ((found - expected).abs() > torch.finfo(x.dtype).eps ** 0.5 * (1 + expected.abs())).any():
                return False
    except Exception:  # whatever it is, it is not that
        return False
    return True
