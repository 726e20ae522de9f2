"""Where results go: JSON lines in bench/results/ with the facts of the machine, and tables on the terminal."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import perexample as px

RESULTS = Path(__file__).with_name("results")
Row = dict[str, Any]


def capability() -> str:
    """The CPU capability of the kernels that serve the ops; "reference" without the extension."""
    info = px._extension.info()
    return "reference" if info is None else info.capability()


def facts() -> Row:
    """What a reader needs to know of the machine. No name of it, and no path."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "perexample": px.__version__,
        "kernels": capability(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def save(benchmark: str, rows: Sequence[Row]) -> None:
    """Write `rows` to bench/results/BENCHMARK.jsonl, in place of the last run's."""
    RESULTS.mkdir(exist_ok=True)
    about = facts()
    with (RESULTS / f"{benchmark}.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps({"benchmark": benchmark, **row, **about}) + "\n")


def announce() -> None:
    """Print what is measured, on what."""
    about = facts()
    print(
        f"{about['cpu']}, {about['cores']} cores · torch {about['torch']} ({about['torch_capability']}) · "
        f"perexample {about['perexample']} ({about['kernels']} kernels)",
        flush=True,
    )
    if about["kernels"] == "reference":
        print("NO COMPILED KERNELS: the reference kernels serve every op, which is correct and slow.", flush=True)


def verdict(ratio: float, reach: float | None) -> str:
    """How `ratio` stands to the ratio that the design asks for."""
    return "" if reach is None else f"≤ {reach:.2f} " + ("✓" if round(ratio, 2) <= reach else "✗")


def ratio_table(title: str, rows: Sequence[Row]) -> None:
    """Print rows made of a `Ratio`: times, ratio, quantiles, and what is to be reached."""
    print_table(
        title,
        ("case", "threads", "stock ms", "ours ms", "ratio", "10-90 %", "to reach"),
        [
            (
                row["case"],
                str(row["threads"]),
                f"{row['stock_ms']:.3g}" if row["stock_ms"] < 100 else f"{row['stock_ms']:.0f}",
                f"{row['ours_ms']:.3g}" if row["ours_ms"] < 100 else f"{row['ours_ms']:.0f}",
                f"{row['ratio']:.2f}{'?' if disturbed(row) else ''}",
                f"{row['low']:.2f}-{row['high']:.2f}",
                verdict(row["ratio"], row["reach"]),
            )
            for row in rows
        ],
    )

    if any(disturbed(row) for row in rows):
        print("  ?: other programs were using cores that this needed; run it again on a quiet machine", flush=True)


def disturbed(row: Row) -> bool:
    """Whether other programs left fewer cores than the row has threads."""
    return row["others"] is not None and row["others"] + row["threads"] > (os.cpu_count() or 1) + 0.2


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for line in [header, *rows]:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  " + "  ".join(cells).rstrip())
    print(end="", flush=True)
