"""Variance of the per-example gradient and gradient noise scale, from what a step has anyway (MATHS 20, 21)."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .moments import Moment, moment_of
from .moments.count import version
from .ops._library import accumulate_dtype

__all__ = ["GradientNoise", "plot", "variance"]


def _examples(moment: Moment) -> Tensor | None:
    """How many examples the gradient of the moment's parameter is of: a scalar on the device."""
    total = moment.examples.total_of(moment.roots)
    return total if total is None or moment.base is None else total - moment.base.total


def _second_moment(p: Tensor, what: str) -> tuple[Moment, Tensor, Tensor] | None:
    """What belongs to the present gradient of `p`, and that gradient; None where there is nothing."""
    moment = moment_of(p)
    grad = p.grad
    if moment is None or grad is None:
        return None
    changed = moment.version != version(grad)
    second = moment.current()
    if second is None:
        return None
    if changed:
        raise RuntimeError(
            f"{what}: a gradient of shape {tuple(p.shape)} was changed in place after backward, and its second moment "
            f"was not; use px.clip_grad_norm_ in place of torch's, or call this before the change"
        )
    return moment, second, grad


def _batch(moment: Moment, second: Tensor, what: str, batch_size: int | Tensor | None) -> Tensor:
    """B: a scalar on the device."""
    if isinstance(batch_size, Tensor):
        return batch_size.to(second.device, non_blocking=True)
    if batch_size is not None:
        return torch.full((), batch_size, dtype=torch.float32, device=second.device)
    batch = _examples(moment)
    if batch is None:
        raise ValueError(f"{what}: no example was counted; call the model that was converted, or give batch_size")
    return batch


def _check_reduction(what: str, loss_reduction: str) -> None:
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"{what}: loss_reduction must be one of mean, sum, got {loss_reduction!r}")


def _sum(values: Tensor) -> Tensor:
    """The sum, in float64 where the device has it; torch adds float32 numbers pairwise, so that few bits are lost."""
    return values.sum().to(_sum_dtype(values))


def _sum_of_squares(values: Tensor) -> Tensor:
    """The same of the squares; rows are squared without a copy of them all."""
    rows = values.flatten(1) if values.dim() > 1 else values
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=accumulate_dtype(values.dtype)) if values.dim() else values
    return norms.to(_sum_dtype(values)).square().sum()


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


@torch.no_grad()
def variance(p: Tensor, *, batch_size: int | Tensor | None = None, loss_reduction: str = "mean") -> Tensor:
    """The variance over the batch of every element of the per-example gradient: ``mean_b ghat_b**2 - ghat**2``.

    MATHS (20). Multiply by ``B / (B - 1)`` for the unbiased estimate of the variance over all examples.

    Args:
        p: a parameter of a converted model, after backward and before its gradient is cleared.
        batch_size: number of examples in the gradient, instead of what the model counted.
        loss_reduction: "mean" or "sum", how the loss combines examples.

    Returns:
        shape of `p`; float32, or float64 for a float64 parameter. At least 0.

    Raises:
        ValueError: there is no second moment, or no example was counted.
        RuntimeError: the gradient was changed in place, so that its second moment does not belong to it.
    """
    _check_reduction("variance", loss_reduction)
    found = _second_moment(p, "variance")
    if found is None:
        raise ValueError(
            f"variance: a parameter of shape {tuple(p.shape)} has no second moment; call it between backward and "
            f"zero_grad, on a converted model"
        )
    moment, second, grad = found
    batch = _batch(moment, second, "variance", batch_size).to(second.dtype)
    mean, square = grad.to(second.dtype), second * batch  # MATHS (2)
    if loss_reduction == "sum":
        mean, square = mean / batch, second / batch
    return (square - mean.square()).clamp(min=0)


class GradientNoise:
    """Gradient noise scale ``tr(Sigma) / |G|**2`` (McCandlish et al., 2018), of a model, its layers, its parameters.

    Every step gives unbiased estimates of both terms (MATHS 21), which are noisy, the second one above all: it can be
    negative. So each is averaged over the steps, and the scale is the ratio of the averages. Steps of one example say
    nothing of the variance and are left out. Nothing here waits for the device; what is returned lives there::

        noise = px.noise.GradientNoise(model, n=100_000)
        noise.attach(optimizer)  # or noise.update() between backward and zero_grad
        ...
        print(float(noise.scale()))

    An update reads gradients and second moments once more: about half of what the step of `Adam` costs.

    Args:
        model: converted, or a list of (name, parameter).
        n: averaging time in examples, as in the optimizers (MATHS 11): a plain mean until then.
        loss_reduction: "mean" or "sum", how the loss combines examples.

    Raises:
        TypeError, ValueError: an argument of the wrong kind.
    """

    def __init__(
        self, model: nn.Module | Iterable[tuple[str, Tensor]], n: float = 100_000, loss_reduction: str = "mean"
    ) -> None:
        named = model.named_parameters() if isinstance(model, nn.Module) else model
        self.parameters = {name: p for name, p in named if moment_of(p) is not None}
        if not self.parameters:
            raise ValueError("GradientNoise: model must have parameters with second moments; call px.convert(model)")
        if isinstance(n, bool) or not isinstance(n, (int, float)):
            raise TypeError(f"GradientNoise: n must be a number, got {type(n).__name__}")
        if not n >= 1:
            raise ValueError(f"GradientNoise: n must be at least 1, got {n}")
        _check_reduction("GradientNoise", loss_reduction)
        self.n, self.loss_reduction = n, loss_reduction
        # name -> (3,): examples seen, and the averages of tr(Sigma) and |G|**2
        self.averages: dict[str, Tensor] = {}
        # examples seen and scale at each of the last updates
        self.history: collections.deque[tuple[Tensor, Tensor]] = collections.deque(maxlen=10_000)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Update before every step of `optimizer`; returns a handle whose ``remove()`` ends that.

        Under a GradScaler the scale that it hands to the step is taken into account; an optimizer that is not handed it
        (most of torch.optim) needs `px.unscale_` before the step. Where `step` is given a closure, what is taken in are
        the gradients from before it.
        """
        return optimizer.register_step_pre_hook(
            lambda stepping, *_: self.update(grad_scale=getattr(stepping, "grad_scale", None))
        )

    @torch.no_grad()
    def update(self, *, batch_size: int | Tensor | None = None, grad_scale: float | Tensor | None = None) -> None:
        """Take in the present gradients; parameters without a gradient, or with one that is not finite, are left out.

        Args:
            batch_size: number of examples in the gradients, instead of what the model counted.
            grad_scale: of a GradScaler, where the gradients are still multiplied by it.

        Raises:
            ValueError: no example was counted.
            RuntimeError: a gradient was changed in place, so that its second moment does not belong to it.
        """
        what = "GradientNoise.update"
        for name, p in self.parameters.items():
            found = _second_moment(p, what)
            if found is None:
                continue
            moment, second, grad = found
            batch = _batch(moment, second, what, batch_size).to(_sum_dtype(second))
            # MATHS (2), of the sums over all elements.
            mean_square, square = _sum_of_squares(grad), _sum(second) * batch
            if self.loss_reduction == "sum":
                mean_square, square = mean_square / batch.square(), square / batch.square()
            trace = (square - mean_square) * batch / (batch - 1)
            terms = torch.stack([trace, mean_square - trace / batch])
            if grad_scale is not None:
                if isinstance(grad_scale, Tensor):
                    grad_scale = grad_scale.to(terms.device, terms.dtype, non_blocking=True)
                terms = terms / grad_scale**2
            old = self.averages.get(name)
            if old is None:
                old = torch.zeros(3, dtype=terms.dtype, device=terms.device)
            seen = old[0] + batch
            kappa = (batch / seen.clamp(max=self.n)).clamp(max=1)
            mixed = torch.cat([seen[None], old[1:] + kappa * (terms - old[1:])])
            self.averages[name] = torch.where((batch > 1) & terms.isfinite().all(), mixed, old)
        if self.averages:
            first = next(iter(self.averages.values()))
            self.history.append((first[0], self.scale()))

    def scale(self, names: Iterable[str] | None = None) -> Tensor:
        """The noise scale in examples, of the parameters called `names` or of all: a scalar on the device.

        nan before the first update of more than one example; infinite or negative where noise drowns the signal.
        """
        trace, signal = self._terms(self.averages if names is None else names)
        return trace / signal

    def by_parameter(self) -> dict[str, Tensor]:
        """Noise scale of each parameter by its name: scalars on the device."""
        return {name: self.scale([name]) for name in self.averages}

    def by_layer(self) -> dict[str, Tensor]:
        """Noise scale of each layer by the name of the module: scalars on the device."""
        layers: dict[str, list[str]] = {}
        for name in self.averages:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        return {layer: self.scale(names) for layer, names in layers.items()}

    def variance_by_parameter(self) -> dict[str, Tensor]:
        """``tr(Sigma)`` of each parameter, averaged over the steps: scalars on the device."""
        return {name: average[1] for name, average in self.averages.items()}

    def _terms(self, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        chosen = [self.averages[name] for name in names]
        if not chosen:
            raise ValueError("GradientNoise.scale: nothing was taken in yet; call update() after backward, or attach()")
        total = torch.stack([average[1:].to(chosen[0].device) for average in chosen]).sum(0)
        return total[0], total[1]


def plot(noise: GradientNoise, axes: Any = None) -> Any:
    """Draw the noise scale against the examples seen, with matplotlib; waits for the device.

    Args:
        noise: after some updates.
        axes: matplotlib axes to draw into; new ones where None.

    Returns:
        the axes.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots()
    points = [(float(seen), float(scale)) for seen, scale in noise.history]
    axes.plot([seen for seen, _ in points], [scale for _, scale in points])
    axes.set_xlabel("examples seen")
    axes.set_ylabel("gradient noise scale (examples)")
    axes.set_yscale("log")
    return axes
