"""Peak memory of training, each variant in a process of its own. `python -m bench.memory`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from . import _report, _timing
from .models import workloads

TITLE = "Peak memory of training, beyond `import torch`; bound: stock + 4 bytes a parameter + 16 MB"
MB = 1e6
# glibc keeps freed blocks below a threshold that it moves as it goes, which makes the peak vary by 20 MB from run to
# run. Held fixed, for stock and ours alike, it makes the resident memory that of the live tensors, to 0.3 MB.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def measure(name: str, threads: int) -> _report.Row:
    """The peaks of both variants, and the bound."""
    answers = []
    for variant in ("stock", "ours"):
        command = [sys.executable, "-m", "bench._probe", name, variant, str(threads)]
        root, environment = Path(__file__).parents[1], {**os.environ, **ENVIRONMENT}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the memory probe of {variant} {name} failed:\n{done.stderr}")
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    parameters = answers[0]["parameters"]
    stock, ours = (answer["peak"] for answer in answers)
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
