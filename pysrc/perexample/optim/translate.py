"""From a tuned configuration of torch.optim to values for batch size 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._options import check_bool, check_choice, check_number

__all__ = ["Translation", "translate"]

# What may be given for each optimizer, with torch's defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False},
    "RMSprop": {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": False,
        "maximize": False,
    },
    "Adam": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
    },
    "AdamW": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "amsgrad": False,
        "maximize": False,
    },
}
NAME = "translate"


@dataclass(frozen=True)
class Translation:
    """What `translate` found.

    optimizer: name of the class in px.optim.
    groups: the options of each group.
    assumption: what it rests on; "" where it is exact.
    """

    optimizer: str
    groups: tuple[dict[str, Any], ...]
    assumption: str

    @property
    def options(self) -> dict[str, Any]:
        """The options, for ``getattr(px.optim, t.optimizer)(params, **t.options)``; all groups have to have the same.

        Raises ValueError where groups differ: then give each its own of `groups`.
        """
        if any(group != self.groups[0] for group in self.groups):
            raise ValueError("Translation.options: the groups differ; give each group its own of `groups`")
        return self.groups[0]


def translate(
    optimizer: str | torch.optim.Optimizer,
    *,
    batch_size: int,
    assume: str = "noise",
    noise_scale: float | Tensor | None = None,
    **options: Any,
) -> Translation:
    """The values for batch size 1 of a configuration that was tuned with torch.optim at one batch size.

    At that batch size B the optimizer of px.optim then takes the same steps: exactly for SGD and momentum
    (MATHS 13, 14), with ``n_g = B / (1 - momentum)`` and ``lr0 = lr / (B (1 - momentum))``; what is not exact beside
    momentum (weight_decay, dampening) is said in the result.

    RMSprop and Adam average squares of the mean gradient, of expectation ``|G|**2 + tr(Sigma) / B``; px.optim averages
    squares of per-example gradients, ``|G|**2 + tr(Sigma)``, r**2 times as large. So ``lr0 = lr r / B``,
    ``eps0 = r eps``, ``weight_decay0 = weight_decay / r``, ``n = B / (1 - beta)``, and what r is has to be assumed:

    - ``assume="noise"``: gradients of single examples are mostly noise, ``r = sqrt(B)``. Right where B is far below the
      gradient noise scale; the usual case, late in training above all.
    - ``assume="signal"``: they agree, ``r = 1``. Right where the noise scale is far below 1.
    - ``noise_scale=S``, measured (`px.noise`): ``r**2 = (1 + S) / (1 + S / B)``, of which both are limits. One number
      for all parameters, while parameters differ in it: right on average.

    Args:
        optimizer: an optimizer of torch.optim, or the name of one: "SGD", "RMSprop", "Adam", "AdamW".
        batch_size: at which it was tuned: the number of examples in a step, all micro-batches and ranks together.
        assume: "noise" or "signal"; without effect on SGD.
        noise_scale: in place of `assume`, in examples.
        options: with a name: lr, momentum, betas, alpha, eps, weight_decay, ... as torch.optim takes them; what is
            not given has torch's default.

    Returns:
        a `Translation`: class, options of each group, and the assumption in words.

    Raises:
        TypeError, ValueError: an argument out of range, or an option that has no counterpart (nesterov, amsgrad,
            momentum of RMSprop, the coupled weight_decay of Adam and RMSprop).
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"{NAME}: batch_size must be an int, got {type(batch_size).__name__}")
    check_number(NAME, "batch_size", batch_size, 1)
    check_choice(NAME, "assume", assume, ("noise", "signal"))
    if isinstance(noise_scale, Tensor):
        noise_scale = float(noise_scale)
    if noise_scale is not None:
        check_number(NAME, "noise_scale", noise_scale, 0.0, finite=False)
    if isinstance(optimizer, torch.optim.Optimizer):
        name, groups = type(optimizer).__name__, optimizer.param_groups
        if options:
            raise TypeError(f"{NAME}: options must be left out with an optimizer, got {', '.join(sorted(options))}")
        if name not in DEFAULTS or type(optimizer).__module__.split(".")[0] != "torch":
            raise TypeError(f"{NAME}: optimizer must be one of torch.optim's {', '.join(DEFAULTS)}, got {name}")
    elif optimizer in DEFAULTS:
        name, groups = optimizer, [options]
        unknown = sorted(options.keys() - DEFAULTS[name].keys())
        if unknown:
            raise TypeError(
                f"{NAME}: options of {name} must be among {', '.join(DEFAULTS[name])}, got {', '.join(unknown)}"
            )
    else:
        raise ValueError(f"{NAME}: optimizer must be one of {', '.join(DEFAULTS)}, got {optimizer!r}")
    scale, assumption = _ratio(batch_size, assume, noise_scale)
    translated = []
    for group in groups:
        given = {option: group.get(option, default) for option, default in DEFAULTS[name].items()}
        _check(name, given, group)
        own = _group(name, given, batch_size, scale)
        translated.append({**own, "maximize": True} if given["maximize"] else own)
    if name == "SGD":
        averaged = [group for group in groups if group.get("momentum")]
        departures = []
        if any(group.get("weight_decay") for group in averaged):
            departures.append(
                "weight_decay, which torch adds to the gradient and so averages, is applied to the weights at once"
            )
        if any(group.get("dampening") for group in averaged):
            departures.append("dampening, which torch leaves out of the first step, is in that one too")
        assumption = "; ".join(departures)
    return Translation(name, tuple(translated), assumption)


def _ratio(batch: int, assume: str, noise_scale: float | None) -> tuple[float, str]:
    """r, the root of the ratio of the two second moments, and what it rests on."""
    if noise_scale is not None:
        inverse = 0.0 if math.isinf(noise_scale) else 1 / (1 + noise_scale)  # (1 + S) / (1 + S / B), safe for all S
        square = 1 / (inverse + (1 - inverse) / batch)
        return math.sqrt(square), f"a gradient noise scale of {noise_scale:g} examples, the same for all parameters"
    if assume == "noise":
        return math.sqrt(batch), f"noise-dominated: a gradient noise scale far above {batch} examples"
    return 1.0, "signal-dominated: a gradient noise scale far below 1 example"


def _check(name: str, given: dict[str, Any], group: dict[str, Any]) -> None:
    if isinstance(given["lr"], Tensor):
        given["lr"] = float(given["lr"])
    check_number(NAME, "lr", given["lr"], 0.0)
    check_number(NAME, "weight_decay", given["weight_decay"], 0.0)
    for option in ("momentum", "dampening", "alpha"):
        if option in given:
            check_number(NAME, option, given[option], 0.0)
            if option != "dampening" and given[option] >= 1:
                raise ValueError(f"{NAME}: {option} must be below 1, got {given[option]}")
    if "betas" in given:
        betas = given["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"{NAME}: betas must be a pair of numbers, got {betas!r}")
        given["betas"] = tuple(float(beta) if isinstance(beta, Tensor) else beta for beta in betas)
        for beta in given["betas"]:
            check_number(NAME, "betas", beta, 0.0)
            if beta >= 1:
                raise ValueError(f"{NAME}: betas must be below 1, got {beta}")
    check_bool(NAME, "maximize", given["maximize"])
    for option in ("nesterov", "amsgrad"):
        if given.get(option):
            raise ValueError(f"{NAME}: {option} must be False, got {given[option]}: it has no counterpart here")
    if name == "RMSprop" and given["momentum"]:
        raise ValueError(f"{NAME}: momentum of RMSprop must be 0, got {given['momentum']}: it has no counterpart here")
    coupled = name in ("Adam", "RMSprop") and not group.get("decoupled_weight_decay", False)
    if coupled and given["weight_decay"]:
        raise ValueError(
            f"{NAME}: weight_decay of {name} must be 0, got {given['weight_decay']}: torch adds it to the gradient, "
            f"here it is decoupled; tune torch.optim.AdamW"
        )


def _group(name: str, given: dict[str, Any], batch: int, r: float) -> dict[str, Any]:
    lr, decay = given["lr"], given["weight_decay"]
    if name == "SGD":
        keep = given["momentum"]
        if not keep:
            return {"lr": lr / batch, "weight_decay": decay}
        rate = lr * (1 - given["dampening"]) / (batch * (1 - keep))
        return {"lr": rate, "n_g": batch / (1 - keep), "weight_decay": decay}
    result = {"lr": lr * r / batch, "eps": r * given["eps"], "weight_decay": decay / r}
    if name == "RMSprop":
        return {**result, "n_s": batch / (1 - given["alpha"]), "centered": given["centered"]}
    keep_g, keep_s = given["betas"]
    return {**result, "n_g": batch / (1 - keep_g), "n_s": batch / (1 - keep_s)}
