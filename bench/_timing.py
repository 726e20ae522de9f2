"""Two programs timed in turns, so that a noisy machine disturbs both alike: what counts is the ratio of neighbours."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

LARGER_THAN_CACHE = 128 << 20  # bytes of inputs to walk through
SHORTEST_TURN = 0.004  # seconds; shorter programs are repeated within a turn


class Ratio(NamedTuple):
    """Time of ours over time of stock: median and 10 % and 90 % quantiles over the rounds, and both medians.

    `others` says how many cores other programs kept busy meanwhile (None where the system does not tell).
    """

    ratio: float
    low: float
    high: float
    stock_ms: float
    ours_ms: float
    rounds: int
    others: float | None


def compare(stock: Callable[[int], Any], ours: Callable[[int], Any], seconds: float, least_rounds: int = 7) -> Ratio:
    """Time `stock` and `ours` in turns for about `seconds`.

    Each is called with a running number, by which it may rotate its inputs. A turn of ours is held against the mean
    of the turns of stock before and after it, so that neither a drift of the clock nor the order favours one.
    """
    counter = 0

    def turn(program: Callable[[int], Any], repeats: int) -> float:
        nonlocal counter
        start = time.perf_counter()
        for _ in range(repeats):
            program(counter)
            counter += 1
        return (time.perf_counter() - start) / repeats

    before = _used_by_others()
    began = time.perf_counter()
    with _no_collection():
        for program in (stock, ours):
            turn(program, 2)
        shortest = min(turn(stock, 1), turn(ours, 1))
        repeats = max(1, math.ceil(SHORTEST_TURN / shortest))
        pair = turn(stock, repeats) + turn(ours, repeats)
        rounds = min(201, max(least_rounds, int(seconds / (pair * repeats))))
        stock_times, our_times = [turn(stock, repeats)], []
        for _ in range(rounds):
            our_times.append(turn(ours, repeats))
            stock_times.append(turn(stock, repeats))
    after, elapsed = _used_by_others(), time.perf_counter() - began
    ratios = sorted(2 * own / (stock_times[i] + stock_times[i + 1]) for i, own in enumerate(our_times))
    return Ratio(
        ratio=statistics.median(ratios),
        low=ratios[round(0.1 * (rounds - 1))],
        high=ratios[round(0.9 * (rounds - 1))],
        stock_ms=1e3 * statistics.median(stock_times),
        ours_ms=1e3 * statistics.median(our_times),
        rounds=rounds,
        others=None if before is None or after is None else round(max(0.0, after - before) / elapsed, 2),
    )


def _used_by_others() -> float | None:
    """Seconds of processor time that this process did not use, since the machine was started (Linux)."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, stolen = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK") - time.process_time()


def rotation(make: Callable[[], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """So many sets of inputs that walking through them empties the caches, at most 8."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first if isinstance(t, torch.Tensor))
    more = min(7, LARGER_THAN_CACHE // size) if size else 0
    return [first, *(make() for _ in range(more))]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` threads inside the operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_counts() -> list[int]:
    """1 and 2, as far as this machine has them."""
    return [n for n in (1, 2) if n <= (os.cpu_count() or 1)]


def progress(total: int, what: str) -> tqdm[Any]:
    """A progress bar on stderr; where that is no terminal, one line every ten seconds."""
    quiet = not sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, leave=False, mininterval=10 if quiet else 0.1, dynamic_ncols=True, file=sys.stderr
    )


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
