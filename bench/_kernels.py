"""What the kernel tables have in common: a case, its gate, its timing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import _gate, _report, _timing

Program = Callable[..., Any]


class Case(NamedTuple):
    """One line of a table: inputs, the stock operator and ours on them."""

    name: str
    make: Callable[[], tuple[Any, ...]]  # one set of inputs
    stock: Program
    ours: Program
    gate: Callable[..., None]  # raises RedGate; takes a set of inputs
    reach: float | None = None
    peers: dict[str, Program] = {}  # noqa: RUF012  (a NamedTuple's default; never changed)


def _can(name: str, program: Program, inputs: tuple[Any, ...]) -> bool:
    """Whether a peer can do it at all; says so where not."""
    try:
        program(*inputs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        print(f"  {name}: cannot ({str(error).splitlines()[0][:110]})")
        return False
    return True


def measure(case: Case, seconds: float) -> list[_report.Row]:
    """Rows of `case`, one for each number of threads, and one for each peer in place of ours, with all threads."""
    torch.manual_seed(0)
    inputs = _timing.rotation(case.make)
    case.gate(*inputs[0])
    rows = []
    counts = _timing.thread_counts()
    for count in counts:
        with _timing.threads(count):
            for peer, program in {"": case.ours, **(case.peers if count == counts[-1] else {})}.items():
                if peer and not _can(f"{case.name} [{peer}]", program, inputs[0]):
                    continue
                result = _timing.compare(
                    lambda i: case.stock(*inputs[i % len(inputs)]),
                    lambda i, program=program: program(*inputs[i % len(inputs)]),
                    seconds,
                    least_rounds=1 if peer else 7,  # some take a hundred times as long as stock
                )
                name = f"{case.name} [{peer}]" if peer else case.name
                rows.append({"case": name, "threads": count, "reach": None if peer else case.reach, **result._asdict()})
    return rows


def table(benchmark: str, title: str, cases: Sequence[Case], seconds: float) -> list[_report.Row]:
    """Measure, print and save a table."""
    rows = []
    with _timing.progress(len(cases), benchmark) as bar:
        for case in cases:
            rows += measure(case, seconds)
            bar.update()
    _report.ratio_table(title, rows)
    _report.save(benchmark, rows)
    return rows


def main(benchmark: str, title: str, cases: Callable[[bool], Sequence[Case]]) -> None:
    """The command `python -m bench.BENCHMARK [--full]`."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{benchmark}", description=title)
    parser.add_argument("--full", action="store_true", help="more sizes, and peers")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each line of the table")
    arguments = parser.parse_args()
    _report.announce()
    try:
        table(benchmark, title, cases(arguments.full), arguments.seconds)
    except _gate.RedGate as red:
        sys.exit(f"RED, nothing is timed: {red}")
