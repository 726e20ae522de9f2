"""bench/tune_triton.py: what it times computes the right moments with the tile that is being timed."""

import math

import pytest
from launching import Launches, interpreted
from perexample.triton_kernels.configs import Tile

from bench import gpu, tune_triton
from bench.tune_triton import Row

TILES = Tile(16, 16, 16, 4, 2), Tile(32, 16, 16, 4, 3), Tile(16, 32, 16, 8, 2)
ROWS = {
    Row("LINEAR", 90, ("descriptor", "half", 16)): "_descriptor",
    Row("LINEAR", 90, ("pointer, unaligned", "float32", 0)): "_pointer",
    Row("LINEAR", 90, ("one position", "half", 1)): "_one_position",
    Row("CONV", 90, "half"): "_implicit_gemm",
}


@interpreted
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_programs_of_a_row_run_its_tiles(row, monkeypatch):
    monkeypatch.setattr(tune_triton, "DEVICE", "cpu")
    monkeypatch.setattr(tune_triton, "SHAPES", {0: [(33, 20, 2, 20)], 1: [(32, 48, 5, 1)], 16: [(32, 48, 3, 7)]})
    monkeypatch.setattr(tune_triton, "CONVOLUTIONS", [(5, 4, 2, 5, 3), (17, 8, 2, 4, 1)])
    monkeypatch.setattr(tune_triton, "compiling", lambda row: TILES)

    def timer(programs, seconds):
        with Launches() as launches:
            for program in programs.values():
                program()
        ours = [meta for name, _, meta in launches if name == ROWS[row]]
        seen = [(m["BO"], m["BI"], m.get("BT", m.get("BB")), m["num_warps"], m["num_stages"]) for m in ours]
        assert seen == [tile[:5] for tile in TILES]
        return dict(zip(programs, (4.0, 1.0, 2.0), strict=True))

    monkeypatch.setattr(gpu, "timed", timer)
    best, ratio = tune_triton.tune(row)
    assert best == TILES[1] and math.isnan(ratio)  # the shipped tile is none of them
