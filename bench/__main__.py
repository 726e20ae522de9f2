"""The main job: is it right, how fast is it, what does it buy. `python -m bench [--full]`, or `make bench`."""

from __future__ import annotations

import argparse
import sys
import time

from . import (
    _gate,
    _kernels,
    _report,
    _timing,
    conv,
    digits,
    embedding,
    fallback,
    layers,
    linear,
    memory,
    norm,
    optimizer,
    peers,
    rules,
    step,
)
from .models import workloads

KERNELS = {
    "linear": linear,
    "conv": conv,
    "norm": norm,
    "embedding": embedding,
    "layers": layers,
    "optimizer": optimizer,
}


def gate(full: bool) -> None:
    """Every kernel on small and odd shapes, and a small version of every model, before anything is timed."""
    checks = list(_gate.case_tables())
    models = {work.name.split()[0]: work for work in workloads(full)}
    with _timing.progress(len(checks) + len(models), "correctness") as bar:
        for check in checks:
            check()
            bar.update()
        for work in models.values():
            _gate.model_gate(work)
            bar.update()
    print(
        f"\nGREEN: {len(checks)} kernel cases as good as the reference, {len(models)} models as the loop over examples."
    )


def main() -> None:
    """Run everything; exit with 1, and no timing, where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="more sizes, learning rates and peers; much longer")
    full = parser.parse_args().full
    start = time.perf_counter()
    _report.announce()
    try:
        gate(full)
        step.table(full, seconds=10.0 if full else 5.0)
        memory.table([work.name for work in workloads(full)])
        for name, module in KERNELS.items():
            _kernels.table(name, module.TITLE, module.cases(full), seconds=1.0 if full else 0.4)
        if full:
            _kernels.table("fallback", fallback.TITLE, fallback.cases(full), seconds=1.0)
            peers.table(seconds=3.0)
        digits.table(full)
        rules.table(full)
    except _gate.RedGate as red:
        sys.exit(f"RED, nothing is timed: {red}")
    print(f"\nResults are in bench/results/. Took {(time.perf_counter() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
