"""Variance of the per-example gradient and gradient noise scale, from what a step has anyway (MATHS 20, 21)."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .moments import Moment, moment_of
from .ops._library import accumulate_dtype

__all__ = ["GradientNoise", "plot", "variance"]


def _examples(moment: Moment) -> Tensor | None:
    """How many examples the gradient of the moment's parameter is of: a scalar on the device."""
    total = moment.examples.total_of(moment.roots)
    return total if total is None or moment.base is None else total - moment.base.total


def _mean_and_square(
    p: Tensor, what: str, batch_size: int | Tensor | None, loss_reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """ghat, the mean of the squared per-example gradients (MATHS 2), and B."""
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"{what}: loss_reduction must be one of mean, sum, got {loss_reduction!r}")
    moment = moment_of(p)
    second = None if moment is None else moment.current()
    if moment is None or second is None or p.grad is None:
        raise ValueError(
            f"{what}: a parameter of shape {tuple(p.shape)} has no second moment; call it between backward and "
            f"zero_grad, on a converted model"
        )
    batch = _examples(moment) if batch_size is None else torch.as_tensor(batch_size, device=p.device)
    if batch is None:
        raise ValueError(f"{what}: no example was counted; call the model that was converted, or give batch_size")
    batch = batch.to(second.dtype)
    grad = p.grad.to(second.dtype)
    return (grad, second * batch, batch) if loss_reduction == "mean" else (grad / batch, second / batch, batch)


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
    """
    mean, square, _ = _mean_and_square(p, "variance", batch_size, loss_reduction)
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

    An update reads gradients and second moments once more: about a quarter of what the optimizer's step costs.

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
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"GradientNoise: loss_reduction must be one of mean, sum, got {loss_reduction!r}")
        self.n, self.loss_reduction = n, loss_reduction
        # name -> (3,): examples seen, and the averages of tr(Sigma) and |G|**2
        self.averages: dict[str, Tensor] = {}
        # examples seen and scale at each of the last updates
        self.history: collections.deque[tuple[Tensor, Tensor]] = collections.deque(maxlen=10_000)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Update before every step of `optimizer`; returns a handle whose ``remove()`` ends that."""
        return optimizer.register_step_pre_hook(lambda *_: self.update())

    @torch.no_grad()
    def update(self, *, batch_size: int | Tensor | None = None) -> None:
        """Take in the present gradients; parameters without a gradient are left out.

        Args:
            batch_size: number of examples in the gradients, instead of what the model counted.
        """
        for name, p in self.parameters.items():
            moment = moment_of(p)
            if p.grad is None or moment is None or moment.current() is None:
                continue
            mean, square, batch = _mean_and_square(p, "GradientNoise.update", batch_size, self.loss_reduction)
            # Sums of many small squares: in float64, where the device has it.
            sum_dtype = accumulate_dtype(p.dtype) if p.device.type == "mps" else torch.float64
            batch = batch.to(sum_dtype)
            mean_square = mean.square().sum(dtype=sum_dtype)
            trace = (square.sum(dtype=sum_dtype) - mean_square) * batch / (batch - 1)
            new = torch.stack([batch, trace, mean_square - trace / batch])
            old = self.averages.get(name)
            if old is None:
                old = torch.zeros_like(new)
            seen = old[0] + batch
            kappa = (batch / seen.clamp(max=self.n)).clamp(max=1)
            mixed = torch.cat([seen[None], old[1:] + kappa * (new[1:] - old[1:])])
            self.averages[name] = torch.where(batch > 1, mixed, old)
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
