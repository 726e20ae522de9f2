"""The static tables of tile sizes: what the launchers look up by architecture, kernel, dtype and shape class.

Nothing is tuned at run time. bench/tune_triton.py rewrites LINEAR, CONV and TUNED, which are plain literals for that
reason. What TUNED does not name was chosen by what the compiler makes of it, not by a measurement. tests/triton/lint
compiles every row, and fails where registers spill or the pipeline breaks.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A tile of a product over positions (linear, convolution), and how it runs."""

    outputs: int
    inputs: int
    positions: int  # contracted at once (examples, where T = 1)
    warps: int
    stages: int  # of the software pipeline
    resident: int = 1  # programs that a multiprocessor should hold at once


class Rows(NamedTuple):
    """A block of (positions, outputs) of a kernel that only adds up."""

    outputs: int
    elements: int  # positions * outputs at once
    warps: int
    programs: int  # for each multiprocessor


class Step(NamedTuple):
    """How the optimizer's step walks its tensors."""

    chunk: int  # elements of a program
    block: int  # of them at once
    warps: int
    registers: int  # at most, of a thread; left alone, ptxas saves some of them around divisions
    rows: int  # tensors that one launch tells the device of: 8 * 7 bytes of at most 4096 of arguments each


# Tiles of this many rows run one after another (see linear.tile_of).
GROUP = 8
# Elements of a program that adds up the parts of a batch.
ADD_PARTS = 1024
BIAS = Rows(outputs=128, elements=2048, warps=4, programs=4)
# The affine part of a norm, and the elements of a row taken at once.
NORM = Rows(outputs=64, elements=2048, warps=4, programs=4)
NORM_ROW = 2048
# Columns of a table's row taken at once.
EMBEDDING = 256
# Elements of a program of a recurrent layer's cell.
CELL = 256
STEP = Step(chunk=8192, block=512, warps=4, registers=64, rows=64)
# Positions of one output and tap.
DEPTHWISE = Rows(outputs=1, elements=1024, warps=4, programs=4)

# Architectures: 80 also serves what is newer and has neither wgmma nor tcgen05 (8.x, 12.x).
# Kernel: "descriptor" loads by TMA; "pointer" takes any strides; unaligned: rows that are no multiple of 16 elements.
# Dtype: "half" is bfloat16 and float16; "tf32" is float32 where PyTorch was told to multiply float32 so.
# Last, the most positions of an example that the row is for: then one block holds an example; 0: any number.
LinearTable = dict[tuple[str, str, int], Tile]

# Not of 128x128 tiles for T = 1 on 10.x: of these Triton 3.6 makes an empty kernel.
LINEAR: dict[int, LinearTable] = {
    80: {
        ("pointer", "half", 16): Tile(64, 64, 16, 4, 4, 4),
        ("pointer", "half", 32): Tile(64, 64, 32, 4, 4, 2),
        ("pointer", "half", 64): Tile(64, 128, 64, 8, 3, 1),
        ("pointer", "half", 0): Tile(128, 64, 32, 8, 4, 1),
        ("pointer, unaligned", "half", 0): Tile(64, 64, 32, 4, 3, 2),
        ("one position", "half", 1): Tile(64, 64, 16, 4, 3, 2),
        ("one position, unaligned", "half", 1): Tile(64, 64, 16, 4, 3, 2),
        ("pointer", "float32", 0): Tile(64, 64, 16, 4, 3, 2),
        ("pointer, unaligned", "float32", 0): Tile(64, 64, 16, 8, 3, 2),
        ("one position", "float32", 1): Tile(64, 64, 16, 4, 3, 2),
        ("one position, unaligned", "float32", 1): Tile(64, 32, 16, 4, 2, 2),
        ("pointer", "tf32", 0): Tile(64, 64, 32, 4, 3, 2),
        ("pointer, unaligned", "tf32", 0): Tile(64, 64, 32, 4, 3, 2),
        ("one position", "tf32", 1): Tile(64, 64, 32, 4, 3, 2),
        ("one position, unaligned", "tf32", 1): Tile(64, 64, 32, 4, 3, 2),
    },
    90: {
        ("descriptor", "half", 16): Tile(64, 128, 16, 4, 4, 2),
        ("descriptor", "half", 32): Tile(64, 128, 32, 4, 4, 2),
        ("descriptor", "half", 64): Tile(64, 128, 64, 4, 3, 2),
        ("descriptor", "half", 128): Tile(64, 128, 128, 4, 2, 2),
        ("descriptor", "half", 0): Tile(128, 128, 64, 8, 3, 1),
        ("pointer", "half", 64): Tile(64, 128, 64, 4, 3, 2),
        ("pointer", "half", 0): Tile(128, 128, 64, 8, 3, 1),
        ("pointer, unaligned", "half", 0): Tile(64, 64, 16, 4, 3, 2),
        ("one position", "half", 1): Tile(128, 128, 16, 8, 2, 1),
        ("one position, unaligned", "half", 1): Tile(64, 64, 32, 4, 3, 2),
        ("pointer", "float32", 0): Tile(64, 64, 16, 4, 3, 2),
        ("pointer, unaligned", "float32", 0): Tile(64, 64, 16, 4, 3, 2),
        ("one position", "float32", 1): Tile(64, 64, 16, 4, 3, 2),
        ("one position, unaligned", "float32", 1): Tile(64, 32, 16, 4, 3, 2),
        ("pointer", "tf32", 0): Tile(64, 64, 32, 4, 3, 2),
        ("pointer, unaligned", "tf32", 0): Tile(64, 64, 32, 4, 3, 2),
        ("one position", "tf32", 1): Tile(64, 64, 32, 4, 3, 2),
        ("one position, unaligned", "tf32", 1): Tile(64, 64, 32, 4, 3, 2),
    },
    100: {
        ("descriptor", "half", 16): Tile(64, 128, 16, 4, 4, 2),
        ("descriptor", "half", 32): Tile(64, 128, 32, 4, 4, 2),
        ("descriptor", "half", 64): Tile(64, 128, 64, 4, 3, 2),
        ("descriptor", "half", 128): Tile(64, 128, 128, 4, 2, 2),
        ("descriptor", "half", 0): Tile(128, 128, 64, 8, 3, 1),
        ("pointer", "half", 64): Tile(64, 64, 64, 4, 3, 2),
        ("pointer", "half", 0): Tile(64, 128, 64, 8, 3, 1),
        ("pointer, unaligned", "half", 0): Tile(64, 64, 32, 4, 3, 2),
        ("one position", "half", 1): Tile(64, 128, 32, 8, 2, 1),
        ("one position, unaligned", "half", 1): Tile(64, 64, 16, 4, 3, 2),
        ("pointer", "float32", 0): Tile(64, 64, 16, 4, 3, 2),
        ("pointer, unaligned", "float32", 0): Tile(64, 64, 16, 4, 3, 2),
        ("one position", "float32", 1): Tile(64, 64, 16, 4, 3, 2),
        ("one position, unaligned", "float32", 1): Tile(64, 32, 16, 4, 2, 2),
        ("pointer", "tf32", 0): Tile(64, 64, 32, 4, 3, 2),
        ("pointer, unaligned", "tf32", 0): Tile(64, 64, 32, 4, 3, 2),
        ("one position", "tf32", 1): Tile(64, 64, 32, 4, 3, 2),
        ("one position, unaligned", "tf32", 1): Tile(64, 64, 32, 4, 3, 2),
    },
}
# Convolution, by dtype alone.
CONV: dict[int, dict[str, Tile]] = {
    80: {
        "half": Tile(64, 64, 32, 4, 3, 2),
        "float32": Tile(32, 64, 16, 4, 2, 2),
        "tf32": Tile(64, 32, 16, 4, 3, 2),
    },
    90: {
        "half": Tile(64, 64, 16, 4, 3, 2),
        "float32": Tile(64, 32, 16, 4, 2, 2),
        "tf32": Tile(64, 32, 32, 4, 2, 2),
    },
    100: {
        "half": Tile(64, 64, 32, 4, 3, 2),
        "float32": Tile(64, 32, 16, 4, 2, 2),
        "tf32": Tile(64, 32, 16, 4, 3, 2),
    },
}
# Architecture -> what bench/tune_triton.py measured its rows on; the rows of others are untuned.
TUNED: dict[int, str] = {}
