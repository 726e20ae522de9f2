"""Tunes the tiles of the Triton kernels and writes them to triton_kernels/configs.py. `python -m bench.tune_triton`.

    python -m bench.tune_triton                         on a GPU: time the candidates of every row of its architecture
    python -m bench.tune_triton --rows "one position"   only the rows with this in their names
    python -m bench.tune_triton --dry-run --arch 90     without a GPU: compile the candidates, say which would be timed

A candidate has to compile without spills and with all else that tests/triton/lint asks for, and to compute the right
moments, before it is timed. The table is written after each row, so that a run can be cut short and taken up again.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from perexample.triton_kernels import _launch, ahead, configs, conv, linear
from perexample.triton_kernels.configs import Tile

CONFIGS = Path(configs.__file__)
DEVICE = "cuda"  # tests time on the CPU, in Triton's interpreter
MOST_RESIDENT = 4  # more programs on a multiprocessor only split the batch into more parts
# (O, I, B, T) of a row, by the most positions that it is for; convolutions: (O, C, B, size, kernel size).
SHAPES = {
    1: [(3072, 768, 4096, 1), (1024, 1024, 512, 1)],
    16: [(3072, 768, 512, 16), (768, 768, 128, 16)],
    32: [(3072, 768, 256, 32), (768, 768, 64, 32)],
    64: [(3072, 768, 128, 64), (768, 768, 32, 64)],
    128: [(3072, 768, 64, 128), (768, 768, 32, 128)],
    0: [(3072, 768, 16, 1024), (768, 768, 8, 512)],
}
CONVOLUTIONS = [(128, 64, 64, 32, 3), (256, 128, 32, 16, 3), (256, 256, 32, 14, 1)]


class Row(NamedTuple):
    """A row of one of the tables: `key` in `table`, which is LINEAR or CONV."""

    table: str
    arch: int
    key: Any

    @property
    def name(self) -> str:
        """As `--rows` compares it."""
        return ", ".join(map(str, (self.table.lower(), *(self.key if self.table == "LINEAR" else [self.key]))))

    @property
    def kind(self) -> str:
        """half, float32 or tf32."""
        return self.key[1] if self.table == "LINEAR" else self.key

    @property
    def shipped(self) -> Tile:
        """What the table has now."""
        return getattr(configs, self.table)[self.arch][self.key]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """bfloat16 and float16 are squared in different ways where T = 1: a tile has to suit both."""
        if self.kind != "half":
            return (torch.float32,)
        both = self.table == "LINEAR" and self.key[2] == 1
        return (torch.bfloat16, torch.float16) if both else (torch.bfloat16,)


def rows(arch: int) -> list[Row]:
    """All rows of an architecture."""
    return [Row(table, arch, key) for table in ("LINEAR", "CONV") for key in getattr(configs, table)[arch]]


# ---- Candidates ----------------------------------------------------------------------------------


def shared_memory(tile: Tile, itemsize: int) -> int:
    """Bytes of the blocks that the pipeline holds, which is the least that a program takes."""
    return tile.stages * (tile.outputs + tile.inputs) * tile.positions * itemsize


def candidates(row: Row) -> list[Tile]:
    """The tiles worth compiling, the shipped one first: accumulators fit registers, blocks fit shared memory."""
    itemsize = 2 if row.kind == "half" else 4
    one_block = row.table == "LINEAR" and row.key[2] > 1
    positions = (row.key[2],) if one_block else (16, 32) if row.kind == "float32" else (16, 32, 64)
    found = [row.shipped]
    # Tensor cores of 9.0 and later take 64 outputs at once.
    sizes = ((64, 128), (64, 128, 256)) if row.kind == "half" else ((32, 64, 128), (32, 64, 128))
    for outputs, inputs, block, warps, stages in itertools.product(*sizes, positions, (4, 8), (2, 3, 4)):
        tile = Tile(outputs, inputs, block, warps, stages, 1)
        accumulators = 3 * outputs * inputs / (32 * warps)  # of a thread
        fits = shared_memory(tile, itemsize) <= ahead.SHARED_PROGRAM[row.arch]
        if 16 <= accumulators <= 200 and fits and tile[:5] != row.shipped[:5]:
            found.append(tile)
    return found


def compiled(row: Row, tile: Tile) -> tuple[Tile, list[str]]:
    """The tile with as many programs planned on a multiprocessor as fit, and what is wrong with its kernels."""
    resident, found = MOST_RESIDENT, []
    for target, dtype in itertools.product(ahead.TARGETS[row.arch], row.dtypes):
        if row.table == "LINEAR":
            made = [ahead.compile_linear(row.arch, row.key, dtype, tile, target)]
            found += ahead.linear_problems(made[0], row.key, tile._replace(resident=1))
        else:
            made = []
            for size, odd in ahead.CONVOLUTIONS:
                made.append(ahead.compile_conv(row.arch, row.key, size, tile, odd=odd, target=target))
                found += ahead.conv_problems(made[-1], row.key, size, tile._replace(resident=1), odd=odd)
        resident = min(resident, *(each.resident for each in made))
    return tile._replace(resident=max(1, resident)), found


def compiling(row: Row, least: int = 0) -> Iterator[Tile]:
    """The candidates that compile well; what fails is said on stderr. `least`: stop after so many, if not 0."""
    good = 0
    for tile in candidates(row):
        try:
            with_resident, problems = compiled(row, tile)
        except Exception as error:  # a compiler that gives up is one more reason not to take the tile
            with_resident, problems = tile, [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
        if problems:
            print(f"  {tuple(tile)}: {'; '.join(problems)}", file=sys.stderr)
            continue
        yield with_resident
        good += 1
        if good == least:
            return


# ---- Measuring -----------------------------------------------------------------------------------


def programs(row: Row) -> Iterator[tuple[Callable[[], Any], Callable[[], Any]]]:
    """(the launcher, the reference of the op) on tensors on the GPU, for every shape of the row and dtype."""
    from perexample.ops import OPS

    for dtype in row.dtypes:
        if row.table == "LINEAR":
            for sizes in SHAPES[row.key[2]]:
                dy, x = (t.normal_() for t in ahead.operands(row.key, sizes, dtype, DEVICE))
                yield (
                    lambda dy=dy, x=x: linear.linear_moments(dy, x, False),
                    lambda dy=dy, x=x: OPS["linear_moments"][0](dy, x, False),
                )
        else:
            for outputs, channels, batch, size, kernel in CONVOLUTIONS:
                dy, x = (torch.randn(batch, c, size, size, device=DEVICE).to(dtype) for c in (outputs, channels))
                rest = ([kernel] * 2, [1, 1], [kernel // 2] * 2, [1, 1], 1, False)
                yield (
                    lambda dy=dy, x=x, rest=rest: conv.conv_moments(dy, x, *rest),
                    lambda dy=dy, x=x, rest=rest: OPS["conv_moments"][0](dy, x, *rest),
                )


def wrong(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], kind: str) -> bool:
    """Whether moments differ by more than the products' precision; tests hold the kernels to the exact budget."""
    precision = {"half": 2.0**-7, "tf32": 2.0**-9, "float32": 2.0**-18}[kind]
    return any(
        not float((g.double() - e.double()).abs().max()) <= precision * float(e.double().abs().max())
        for g, e in zip(got[:2], expected[:2], strict=True)
    )


def tune(row: Row) -> tuple[Tile, float] | None:
    """The fastest tile of a row by the geometric mean over its shapes, and its time over that of the shipped one.

    The ratio is NaN where the shipped tile is not right; None where no tile is.
    """
    from . import gpu

    table = getattr(configs, row.table)
    logs: dict[Tile, list[float]] = {tile: [] for tile in compiling(row)}  # of the times of what is right so far
    for ours, reference in programs(row):

        def with_tile(tile: Tile, ours: Callable[[], Any] = ours) -> Any:
            with ahead.row_is(table, row.arch, row.key, tile):
                return ours()

        with ahead.multiplying(row.kind):
            expected = reference()
            for tile in list(logs):
                try:
                    failed = "wrong moments" if wrong(with_tile(tile), expected, row.kind) else ""
                except triton.OutOfResources as error:  # less shared memory than the row's architecture
                    failed = str(error)
                if failed:
                    print(f"  {tuple(tile)}: {failed}", file=sys.stderr)
                    del logs[tile]
            if not logs:
                return None
            ms = gpu.timed({str(tile): lambda tile=tile: with_tile(tile) for tile in logs}, seconds=1.0)
        for tile in logs:
            logs[tile].append(math.log(ms[str(tile)]))
    mean = {tile: math.fsum(logs[tile]) / len(logs[tile]) for tile in logs}
    best = min(mean, key=mean.__getitem__)
    shipped = next((mean[tile] for tile in mean if tile[:5] == row.shipped[:5]), math.nan)
    return best, math.exp(mean[best] - shipped)


# ---- The table -----------------------------------------------------------------------------------


def literal(name: str, annotation: str, value: Any) -> str:
    """An assignment as ruff formats it; one line for each row."""
    if name == "TUNED":
        lines = [f'    {arch}: "{what}",' for arch, what in sorted(value.items())]
    else:
        lines = []
        for arch, table in sorted(value.items()):
            keys = (f'("{k[0]}", "{k[1]}", {k[2]})' if isinstance(k, tuple) else f'"{k}"' for k in table)
            tiles = (f"Tile({', '.join(map(str, tile))})" for tile in table.values())
            lines += [f"    {arch}: {{", *(f"        {k}: {t}," for k, t in zip(keys, tiles, strict=True)), "    },"]
    return "\n".join([f"{name}: {annotation} = {{", *lines, "}"]) if lines else f"{name}: {annotation} = {{}}"


def rewritten(source: str, **tables: Any) -> str:
    """The source of configs.py with other tables in the places of LINEAR, CONV or TUNED."""
    lines, places = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in tables:
            places[node.target.id] = (node.lineno - 1, node.end_lineno, ast.unparse(node.annotation))
    if places.keys() != tables.keys():
        raise ValueError(f"configs.py has no {sorted(tables.keys() - places.keys())}")
    for name, (first, last, annotation) in sorted(places.items(), key=lambda item: -item[1][0]):
        lines[first:last] = literal(name, annotation, tables[name]).split("\n")
    return "\n".join(lines) + "\n"


def write(row: Row, tile: Tile, what: str) -> None:
    """Put a tile into the table, here and in configs.py, and say on what it was measured."""
    table = getattr(configs, row.table)
    table[row.arch][row.key] = tile
    configs.TUNED[row.arch] = what
    CONFIGS.write_text(rewritten(CONFIGS.read_text(), **{row.table: table, "TUNED": configs.TUNED}))


def main() -> None:
    """The command `python -m bench.tune_triton`."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_triton", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default="", help="only the rows with this in their names, 'linear, descriptor' say")
    parser.add_argument("--dry-run", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--arch", type=int, choices=list(configs.LINEAR), help="for --dry-run; else the GPU's")
    parser.add_argument("--most", type=int, default=0, help="for --dry-run: so many good candidates of each row")
    chosen = parser.parse_args()
    if _launch.INTERPRET:
        sys.exit("bench.tune_triton: unset TRITON_INTERPRET")
    if chosen.dry_run:
        for row in rows(chosen.arch or 90):
            if chosen.rows in row.name:
                print(f"{row.name}: {len(candidates(row))} candidates", flush=True)
                for tile in compiling(row, chosen.most):
                    print(f"  {tuple(tile)}", flush=True)
        return
    if not torch.cuda.is_available():
        sys.exit("bench.tune_triton: no GPU here; --dry-run needs none")
    device = torch.cuda.get_device_name()
    what = f"{device}, torch {torch.__version__}, Triton {triton.__version__}"
    for row in rows(_launch.device_of(torch.empty(0, device=DEVICE)).arch):
        if chosen.rows in row.name:
            found = tune(row)
            if found is None:
                print(f"{row.name}: no candidate is right; {tuple(row.shipped)} stays", flush=True)
                continue
            tile, ratio = found
            print(f"{row.name}: {tuple(row.shipped)} -> {tuple(tile)}, {ratio:.3f} of its time", flush=True)
            write(row, tile, what)


if __name__ == "__main__":
    main()
