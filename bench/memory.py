"""Peak memory of training, each variant in a process of its own. `python -m bench.memory`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from . import _report, _timing
from .models import workloads

TITLE = "Peak memory of training, beyond `import torch`; bound: stock + 4 bytes a parameter + 16 MB"
MB = 1e6
PROBES = 3  # the median counts: the allocator's fragments vary from run to run


def measure(name: str, threads: int) -> _report.Row:
    """Peaks of both variants, the median over fresh processes taken in turns."""
    peaks: dict[str, list[int]] = {"stock": [], "ours": []}
    parameters = 0
    for _ in range(PROBES):
        for variant, values in peaks.items():
            command = [sys.executable, "-m", "bench._probe", name, variant, str(threads)]
            done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the memory probe of {variant} {name} failed:\n{done.stderr}")
            answer = json.loads(done.stdout.splitlines()[-1])
            values.append(answer["peak"])
            parameters = answer["parameters"]
    stock, ours = (sorted(values)[PROBES // 2] for values in peaks.values())
    bound = stock + 4 * parameters + 16 * MB
    return {
        "case": name,
        "threads": threads,
        "parameters": parameters,
        "stock_mb": stock / MB,
        "ours_mb": ours / MB,
        "bound_mb": bound / MB,
        "ratio": ours / stock,
        "extra_bytes_a_parameter": (ours - stock) / parameters,
    }


def table(names: list[str]) -> list[_report.Row]:
    """Measure, print and save the table of peaks."""
    rows = []
    counts = _timing.thread_counts()[-1:]
    with _timing.progress(len(names) * len(counts), "memory") as bar:
        for name in names:
            for count in counts:
                rows.append(measure(name, count))
                bar.update()
    _report.print_table(
        TITLE,
        ("case", "threads", "parameters", "stock MB", "ours MB", "bound MB", "ratio", "within"),
        [
            (
                row["case"],
                str(row["threads"]),
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['stock_mb']:.0f}",
                f"{row['ours_mb']:.0f}",
                f"{row['bound_mb']:.0f}",
                f"{row['ratio']:.2f}",
                "✓" if row["ours_mb"] <= row["bound_mb"] else "✗",
            )
            for row in rows
        ],
    )
    _report.save("memory", rows)
    return rows


def main() -> None:
    """The command `python -m bench.memory [--full]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=TITLE)
    parser.add_argument("--full", action="store_true", help="more sizes")
    arguments = parser.parse_args()
    _report.announce()
    table([work.name for work in workloads(arguments.full)])


if __name__ == "__main__":
    main()
