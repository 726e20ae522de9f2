"""bench/tune_triton.py, as far as it goes without a GPU: its candidates, their compilation, and what it writes."""

import subprocess
import sys

import pytest
import torch
from perexample.triton_kernels import ahead, configs
from perexample.triton_kernels.configs import Tile

from bench import gpu, tune_triton
from bench.tune_triton import CONFIGS, Row

ROWS = [row for arch in configs.LINEAR for row in tune_triton.rows(arch)]
DESCRIPTOR = Row("LINEAR", 90, ("descriptor", "half", 64))


def test_the_tables_have_the_rows_of_the_launchers():
    assert len(ROWS) == sum(map(len, (*configs.LINEAR.values(), *configs.CONV.values())))
    assert len({(row.arch, row.name) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.arch}, {row.name}")
def test_candidates_fit(row):
    tiles = tune_triton.candidates(row)
    assert tiles[0] == row.shipped
    assert len(tiles) > 20 and len({tile[:5] for tile in tiles}) == len(tiles)
    for tile in tiles:
        assert tune_triton.shared_memory(tile, 2 if row.kind == "half" else 4) <= ahead.SHARED_PROGRAM[row.arch]
        if row.table == "LINEAR" and row.key[2] > 1:  # one block has to hold an example
            assert tile.positions == row.key[2]


def test_what_does_not_fit_shared_memory_is_no_candidate(monkeypatch):
    before = tune_triton.candidates(DESCRIPTOR)
    monkeypatch.setitem(ahead.SHARED_PROGRAM, 90, 64 * 1024)
    after = tune_triton.candidates(DESCRIPTOR)
    assert set(after) < set(before)
    # The estimate is what the compiler comes to, but for what it adds.
    tile = Tile(64, 128, 64, 4, 3, 2)
    assert tune_triton.shared_memory(tile, 2) <= ahead.compile_linear(90, DESCRIPTOR.key, *DESCRIPTOR.dtypes).shared


def test_bad_candidates_are_dropped_and_good_ones_know_how_many_fit(monkeypatch, capsys):
    good, spilling = DESCRIPTOR.shipped, Tile(128, 128, 64, 4, 3)
    monkeypatch.setattr(tune_triton, "candidates", lambda row: [spilling, good._replace(resident=1)])
    assert list(tune_triton.compiling(DESCRIPTOR)) == [good]
    assert "(128, 128, 64, 4, 3, 1): spills" in capsys.readouterr().err
    conv = Row("CONV", 90, "half")
    monkeypatch.setattr(tune_triton, "candidates", lambda row: [row.shipped])
    assert [tile[:5] for tile in tune_triton.compiling(conv)] == [conv.shipped[:5]]


def test_the_table_comes_back_as_it_was_written():
    source = CONFIGS.read_text()
    tables = {name: getattr(configs, name) for name in ("LINEAR", "CONV", "TUNED")}
    assert tune_triton.rewritten(source, **tables) == source
    with pytest.raises(ValueError, match=r"configs.py has no \['NORMS'\]"):
        tune_triton.rewritten(source, NORMS={})


def test_a_tuned_row_is_written_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "configs.py"
    path.write_text(CONFIGS.read_text())
    linear = {arch: dict(table) for arch, table in configs.LINEAR.items()}
    monkeypatch.setattr(configs, "LINEAR", linear)
    monkeypatch.setattr(configs, "TUNED", {})
    tile = Tile(128, 64, 64, 8, 4, 3)
    tune_triton.write(DESCRIPTOR, tile, "NVIDIA H100, torch 2.13.0", path)
    namespace = {"__name__": configs.__name__}
    exec(compile(path.read_text(), path, "exec"), namespace)
    assert namespace["LINEAR"] == linear and linear[90][DESCRIPTOR.key] == tile
    assert namespace["CONV"] == configs.CONV
    assert namespace["TUNED"] == {90: "NVIDIA H100, torch 2.13.0"}
    changed = set(path.read_text().splitlines()) ^ set(CONFIGS.read_text().splitlines())
    assert len(changed) <= 6, changed
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--config", "line-length = 120", str(path)]
    assert subprocess.run(ruff, capture_output=True, check=False).returncode == 0


def test_the_gpu_scripts_choose_the_implementation(monkeypatch):
    started = []
    monkeypatch.delenv("PEREXAMPLE_CUDA", raising=False)
    monkeypatch.setattr(gpu.os, "execve", lambda path, command, environment: started.append((command, environment)))
    for command in ("tests", "sanitize", "optimizer", "ncu", "step"):
        for implementation in ("triton", "default"):
            monkeypatch.setattr(sys, "argv", ["bench.gpu", command, "--implementation", implementation])
            with pytest.raises(SystemExit, match="no GPU here"):
                gpu.main()
        ((again, environment),) = started
        assert again[1:] == ["-m", "bench.gpu", command, "--implementation", "triton"]
        assert environment["PEREXAMPLE_CUDA"] == "triton"
        started.clear()
        monkeypatch.setenv("PEREXAMPLE_CUDA", "triton")
        gpu.use("triton")  # here already
        assert not started
        monkeypatch.delenv("PEREXAMPLE_CUDA")


def test_the_table_of_linear_runs_the_triton_kernel():
    dy, x = (torch.empty(4, 32, 64, dtype=torch.bfloat16) for _ in range(2))
    with ahead.compiling(90) as made:
        gpu.linear_programs(dy, x, "triton")["ours"]()
    assert made[0].name == "_descriptor"
    with ahead.compiling(90) as made:
        gpu.linear_programs(dy, x, "default")["ours"]()
    assert not made
