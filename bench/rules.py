"""Every optimizer over batch sizes on digits, against the rules for scaling stock ones. `python -m bench.rules`.

Stock settings are given at one batch size. `px.optim.translate` turns them into values for batch size 1, which ours
keep at every batch size B. The stock optimizer of torch.optim is scaled from that batch size to B by

- none: nothing is changed;
- linear: lr ∝ B (Goyal et al., 2017);
- square root: lr ∝ √B and, for RMSprop and Adam, 1 - β ∝ B and eps ∝ 1/√B (Malladi et al., 2022).

What is compared is the test loss after as many examples: how far it spreads over the batch sizes.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import perexample as px

from . import _report, _timing
from .digits import EXAMPLES, Data, load
from .models import mlp

TITLE = "Digits, MLP 64-48-10: spread of the final test loss over batch sizes"
REFERENCE = 16  # the batch size of the stock settings
BATCH_SIZES = (8, 16, 64, 256)
ALL_BATCH_SIZES = (1, 4, 16, 64, 256)
RULES = ("none", "linear", "square root")
OURS = "ours"
KEEP_G, KEEP_S = 1 - REFERENCE / 640, 1 - REFERENCE / 6400
# Name in the table -> name in torch.optim and px.optim, settings at REFERENCE, and of ours beside what is translated.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.05}, {}),
    "SGD, momentum": ("SGD", {"lr": 0.05 * (1 - KEEP_G), "momentum": KEEP_G}, {}),
    "RMSprop": ("RMSprop", {"lr": 2e-3, "alpha": KEEP_S}, {"bias_correction": True}),
    "Adam": ("Adam", {"lr": 4e-3, "betas": (KEEP_G, KEEP_S)}, {}),
    "AdamW": ("AdamW", {"lr": 4e-3, "betas": (KEEP_G, KEEP_S), "weight_decay": 0.1}, {}),
}


def scaled(settings: dict[str, Any], rule: str, factor: float) -> dict[str, Any]:
    """Stock settings at `factor` times the batch size."""
    if rule == "none":
        return settings
    if rule == "linear":
        return {**settings, "lr": settings["lr"] * factor}

    def keep(beta: float) -> float:
        return max(0.0, 1 - factor * (1 - beta))

    result = {**settings, "lr": settings["lr"] * math.sqrt(factor)}
    if "alpha" in settings:
        result |= {"alpha": keep(settings["alpha"]), "eps": 1e-8 / math.sqrt(factor)}
    if "betas" in settings:
        result |= {"betas": tuple(keep(beta) for beta in settings["betas"]), "eps": 1e-8 / math.sqrt(factor)}
    return result


def run(data: Data, start: nn.Module, kind: str, rule: str, batch: int) -> float:
    """Train a copy of `start` on all examples; the final test loss, infinite where it is not finite."""
    name, settings, more = OPTIMIZERS[kind]
    model = copy.deepcopy(start)
    optimizer: torch.optim.Optimizer
    if rule == OURS:
        options = px.optim.translate(name, batch_size=REFERENCE, **settings).options
        optimizer = getattr(px.optim, name)(px.convert(model).parameters(), **options, **more)
    else:
        optimizer = getattr(torch.optim, name)(model.parameters(), **scaled(settings, rule, batch / REFERENCE))
    for x, y in zip(data.x[data.order].split(batch), data.y[data.order].split(batch), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        loss = F.cross_entropy(model(data.test_x), data.test_y).item()
    return loss if math.isfinite(loss) else math.inf


def table(full: bool) -> list[_report.Row]:
    """Train, print and save; with `full` also at batch size 1."""
    batches = ALL_BATCH_SIZES if full else BATCH_SIZES
    data = load()
    torch.manual_seed(0)
    start = mlp(64, 48, 10)
    rows: list[_report.Row] = []
    total = len(OPTIMIZERS) * (1 + len(RULES)) * sum(EXAMPLES // batch for batch in batches)
    with _timing.threads(1), _timing.progress(total, "rules") as bar:
        for kind, (_, settings, _) in OPTIMIZERS.items():
            for rule in (OURS, *RULES):
                final = {}
                for batch in batches:
                    final[str(batch)] = run(data, start, kind, rule, batch)
                    bar.update(EXAMPLES // batch)
                spread = max(final.values()) - min(final.values())
                about = {"optimizer": kind, "rule": rule, "reference": REFERENCE, "settings": settings}
                rows.append({**about, "spread": spread, "final_loss": final})
    _report.print_table(
        f"{TITLE}; settings of B = {REFERENCE}",
        ("optimizer", "rule", *(f"B={batch}" for batch in batches), "spread"),
        [
            (
                row["optimizer"],
                row["rule"],
                *(f"{loss:.4f}" for loss in row["final_loss"].values()),
                f"{row['spread']:.4f}",
            )
            for row in rows
        ],
    )
    _report.save("rules", rows)
    return rows


def main() -> None:
    """The command `python -m bench.rules [--full]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.rules", description=TITLE)
    parser.add_argument("--full", action="store_true", help="batch size 1, too")
    arguments = parser.parse_args()
    _report.announce()
    table(arguments.full)


if __name__ == "__main__":
    main()
