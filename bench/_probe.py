"""The fresh process in which `bench.memory` takes a peak: `python -m bench._probe NAME stock|ours THREADS`."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch


def probe(name: str, variant: str, threads: int) -> None:
    """In a fresh process: take three training steps and print the peak of the resident memory as JSON.

    The baseline is taken after `import torch`, so that the model, and for ours the library itself, count.
    """
    torch.set_num_threads(threads)
    baseline = _start_peak()
    from .models import our_optimizer, stock_optimizer, training_step, workloads

    torch.manual_seed(0)
    work = next(work for work in workloads(full=True) if work.name == name)
    model = work.build()
    parameters = sum(p.numel() for p in model.parameters())
    if variant == "ours":
        import perexample as px

        px.convert(model)
        optimizer = our_optimizer(model)
    else:
        optimizer = stock_optimizer(model)
    step = training_step(model, optimizer, [work.batch() for _ in range(2)])
    for i in range(3):
        step(i)
    print(json.dumps({"peak": _peak() - baseline, "parameters": parameters}))


def _start_peak() -> int:
    """Begin a new high-water mark (Linux), and return the resident bytes now; elsewhere the mark so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    probe(sys.argv[1], sys.argv[2], int(sys.argv[3]))
