"""Whole training steps: stock PyTorch with its fused AdamW against the converted model. `python -m bench.step`."""

from __future__ import annotations

import argparse
import copy
import sys

import torch

import perexample as px

from . import _gate, _report, _timing
from .models import Workload, our_optimizer, stock_optimizer, training_step, workloads

TITLE = "Whole training step (zero_grad, forward, backward, step) ÷ stock PyTorch + torch.optim.AdamW(fused=True)"


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
