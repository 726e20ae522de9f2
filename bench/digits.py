"""Batch-size invariance on scikit-learn's digits, at one set of hyper-parameters. `python -m bench.digits`."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexample as px

from . import _report, _timing
from .models import mlp

TITLE = "Digits, MLP 64-48-10, the same η₀, N⁰_g, N⁰_s at every batch size"
BATCH_SIZES = (1, 4, 16, 64, 256)
EXAMPLES = 20_480
EVERY = 256  # examples between two looks at the test loss
N_G, N_S = 640, 6_400
RATE = 1e-3
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)

PER_EXAMPLE, PER_BATCH, SQUARE_ROOT = "per-example squares", "per-batch squares", "per-batch squares, η ∝ √B"


class Data(NamedTuple):
    """Digits as rows of 64 numbers in [0, 1], and the order in which every run sees them."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    order: Tensor


class Curve(NamedTuple):
    """Test loss against examples seen."""

    rule: str
    rate: float
    batch: int
    seen: list[int]
    loss: list[float]


def load() -> Data:
    """1,437 digits to train on and 360 to test on; the order is one permutation after another."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(x), generator=generator)
    test, train = shuffled[:360], shuffled[360:]
    epochs = math.ceil(EXAMPLES / len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)])[:EXAMPLES]
    return Data(x[train], y[train], x[test], y[test], order)


def run(data: Data, start: nn.Module, rule: str, rate: float, batch: int) -> Iterator[tuple[int, float]]:
    """Train a copy of `start` and yield (examples seen, test loss)."""
    model = px.convert(copy.deepcopy(start))
    optimizer = px.optim.Adam(
        model.parameters(),
        lr=rate / math.sqrt(batch) if rule == SQUARE_ROOT else rate,
        n_g=N_G,
        n_s=N_S,
        second_moment="per_example" if rule == PER_EXAMPLE else "per_batch",
    )
    x, y = data.x[data.order].split(batch), data.y[data.order].split(batch)
    for step, (x_step, y_step) in enumerate(zip(x, y, strict=True), 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x_step), y_step).backward()
        optimizer.step()
        if step * batch % EVERY == 0:
            with torch.no_grad():
                yield step * batch, F.cross_entropy(model(data.test_x), data.test_y).item()


def spread(curves: list[Curve]) -> float:
    """Largest less smallest final loss."""
    final = [curve.loss[-1] for curve in curves]
    return max(final) - min(final)


def measure(rules: tuple[str, ...], rates: tuple[float, ...]) -> list[Curve]:
    """All curves; every run starts from the same weights and sees the same examples in the same order."""
    data = load()
    torch.manual_seed(0)
    start = mlp(64, 48, 10)
    plan = [(rule, rate, batch) for rate in rates for rule in rules for batch in BATCH_SIZES]
    curves = []
    with _timing.threads(1), _timing.progress(sum(EXAMPLES // batch for _, _, batch in plan), "digits") as bar:
        for rule, rate, batch in plan:
            curve = Curve(rule, rate, batch, [], [])
            for seen, loss in run(data, start, rule, rate, batch):
                curve.seen.append(seen)
                curve.loss.append(loss)
                bar.update(EVERY // batch)
            curves.append(curve)
    return curves


def draw(curves: list[Curve]) -> None:
    """Draw the rules at `RATE` into bench/results/invariance.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rules = (PER_EXAMPLE, PER_BATCH)
    titles = (
        "perexample: mean of squared per-example gradients",
        "the usual Adam: square of the batch's mean gradient",
    )
    shades = plt.get_cmap("viridis_r")([0.12, 0.33, 0.55, 0.77, 1.0])
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "xtick.color": "#444444",
        "ytick.color": "#444444",
        "axes.titlesize": 12,
    }
    with plt.rc_context(style):
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.9), sharey=True, layout="constrained")
        for panel, rule, title in zip(panels, rules, titles, strict=True):
            chosen = [curve for curve in curves if curve.rule == rule and curve.rate == RATE]
            for rank, (curve, shade) in enumerate(zip(chosen, shades, strict=True)):
                # Wide below, thin above: curves that coincide stay visible.
                width = 7.5 - 1.5 * rank if rule == PER_EXAMPLE else 2.2
                panel.plot(curve.seen, curve.loss, color=shade, linewidth=width, solid_capstyle="round")
            panel.set_title(title, pad=10)
            panel.set_xscale("log")
            ticks = [256, 1024, 4096, EXAMPLES]
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            panel.set_xlim(EVERY * 0.93, EXAMPLES * 1.07)
            panel.set_yscale("log")
            panel.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
            panel.grid(color="#dddddd", linewidth=0.7)
            panel.set_axisbelow(True)
            panel.minorticks_off()
            panel.set_xlabel(f"examples seen\n\nspread of the final loss over B: {spread(chosen):.3f}")
        panels[0].set_ylabel("test loss")
        handles = [Line2D([], [], color=shade, linewidth=3.5) for shade in shades]
        labels = [f"B = {batch}" for batch in BATCH_SIZES]
        same = f"digits, MLP 64-48-10; at every B: η₀ = {RATE:g}, N⁰$_g$ = {N_G:,}, N⁰$_s$ = {N_S:,}"
        figure.legend(
            handles, labels, title=same, loc="outside upper center", ncols=len(labels), frameon=False, columnspacing=2.2
        )
        _report.RESULTS.mkdir(exist_ok=True)
        figure.savefig(_report.RESULTS / "invariance.png", dpi=160)
        plt.close(figure)


def table(full: bool) -> list[_report.Row]:
    """Train, draw, print and save; with `full` also the square-root rule, and five learning rates."""
    rules = (PER_EXAMPLE, PER_BATCH, SQUARE_ROOT) if full else (PER_EXAMPLE, PER_BATCH)
    curves = measure(rules, RATES if full else (RATE,))
    rows = []
    for rate in RATES if full else (RATE,):
        for rule in rules:
            chosen = [curve for curve in curves if curve.rule == rule and curve.rate == rate]
            final = {str(curve.batch): curve.loss[-1] for curve in chosen}
            loss = {str(curve.batch): [round(value, 5) for value in curve.loss] for curve in chosen}
            about = {"rule": rule, "rate": rate, "n_g": N_G, "n_s": N_S, "every": EVERY}
            rows.append({**about, "spread": spread(chosen), "final_loss": final, "loss": loss})
    _report.print_table(
        f"{TITLE}: final test loss",
        ("second moment", "η₀", *(f"B={batch}" for batch in BATCH_SIZES), "spread"),
        [
            (
                row["rule"],
                f"{row['rate']:.0e}",
                *(f"{loss:.4f}" for loss in row["final_loss"].values()),
                f"{row['spread']:.4f}",
            )
            for row in rows
        ],
    )
    draw(curves)
    _report.save("digits", rows)
    print("  drawn in bench/results/invariance.png")
    return rows


def main() -> None:
    """The command `python -m bench.digits [--full]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.digits", description=TITLE)
    parser.add_argument("--full", action="store_true", help="five learning rates, and the square-root rule")
    arguments = parser.parse_args()
    _report.announce()
    table(arguments.full)


if __name__ == "__main__":
    main()
