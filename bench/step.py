"""Whole training steps: stock PyTorch with its fused AdamW against the converted model. `python -m bench.step`."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import perexample as px

from . import _gate, _report, _timing
from .models import Batch, Workload, loss_fn, workloads

TITLE = "Whole training step (zero_grad, forward, backward, step) ÷ stock PyTorch + torch.optim.AdamW(fused=True)"


def stock_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def our_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return px.optim.Adam(model.parameters(), lr=1e-6, n_g=1000, n_s=100_000)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]) -> Callable[[int], Any]:
    """The program to time: one whole step on batch i."""

    def step(i: int) -> None:
        x, y = batches[i % len(batches)]
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    return step


def measure(work: Workload, seconds: float) -> list[_report.Row]:
    """One row for each number of threads."""
    torch.manual_seed(0)
    model = work.build()
    batches = [work.batch() for _ in range(4)]
    converted = px.convert(copy.deepcopy(model))
    stock = training_step(model, stock_optimizer(model), batches)
    ours = training_step(converted, our_optimizer(converted), batches)
    rows = []
    for count in _timing.thread_counts():
        with _timing.threads(count):
            result = _timing.compare(stock, ours, seconds)
        rows.append({"case": work.name, "threads": count, "reach": work.reach, **result._asdict()})
    return rows


def table(full: bool, seconds: float) -> list[_report.Row]:
    """Measure, print and save the table of whole steps."""
    works = workloads(full)
    rows = []
    with _timing.progress(len(works), "whole steps") as bar:
        for work in works:
            rows += measure(work, seconds)
            bar.update()
    _report.ratio_table(TITLE, rows)
    _report.save("step", rows)
    return rows


def main() -> None:
    """The command `python -m bench.step [--full]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=TITLE)
    parser.add_argument("--full", action="store_true", help="more sizes")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each line of the table")
    arguments = parser.parse_args()
    _report.announce()
    try:
        for work in workloads(arguments.full):
            _gate.model_gate(work)
    except _gate.RedGate as red:
        sys.exit(f"RED, nothing is timed: {red}")
    table(arguments.full, arguments.seconds)


if __name__ == "__main__":
    main()
