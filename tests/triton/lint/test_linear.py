"""Every tile of the tables for linear, compiled for its architecture."""

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from perexample.triton_kernels import _launch, ahead, configs, linear, reduce
from perexample.triton_kernels.configs import Tile

DTYPES = {"half": (torch.bfloat16,), "float32": (torch.float32,), "tf32": (torch.float32,)}
ROWS = [
    (arch, target, *row, dtype)
    for arch, table in configs.LINEAR.items()
    for target in ahead.TARGETS[arch]
    for row in table
    # float16 differs where it is squared before the product.
    for dtype in (*DTYPES[row[1]], *((torch.float16,) if row[0].startswith("one") and row[1] == "half" else ()))
]


@pytest.mark.parametrize(("arch", "target", "kernel", "kind", "positions", "dtype"), ROWS, ids=str)
def test_every_row_compiles_well(arch, target, kernel, kind, positions, dtype):
    row = (kernel, kind, positions)
    compiled = ahead.compile_linear(arch, row, dtype, target=target)
    tile = configs.LINEAR[arch][row]
    if target != arch:  # whose multiprocessors hold less
        tile = tile._replace(resident=1)
    found = ahead.linear_problems(compiled, row, tile)
    assert not found, (found, compiled)


@pytest.mark.parametrize(
    ("tile", "expected"),
    [
        (Tile(128, 128, 64, 4, 3), "spills"),
        (Tile(256, 128, 16, 4, 2), "ptxas warns: C7511"),
        (Tile(128, 128, 64, 8, 8), "bytes of shared memory"),
        (Tile(128, 128, 64, 8, 3, resident=2), "1 programs fit a multiprocessor, 2 are planned"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_tiles_are_caught(tile, expected):
    row = ("descriptor", "half", 0)
    found = ahead.linear_problems(ahead.compile_linear(90, row, torch.bfloat16, tile), row, tile)
    assert any(expected in problem for problem in found), found


def test_what_serves_8_6_fits_its_shared_memory():
    row, tile = ("pointer", "half", 0), Tile(128, 128, 64, 8, 8)
    compiled = ahead.compile_linear(80, row, torch.bfloat16, tile)
    assert 101_376 < compiled.shared < 166_912
    assert f"{compiled.shared} bytes of shared memory" in ahead.linear_problems(compiled, row, tile)


@triton.jit
def _nested(
    dy, x, dw, dw_sq, batch, positions, outputs, inputs, examples,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The descriptor kernel as one would write it first: right, and its pipeline is empty at every example."""
    total = tl.zeros((BO, BI), tl.float32)
    total_sq = tl.zeros((BO, BI), tl.float32)
    for b in tl.range(0, batch):
        G = tl.zeros((BO, BI), tl.float32)
        for t in tl.range(0, positions, BT):
            dy_b = dy.load([b, t, 0]).reshape(BT, BO)
            x_b = x.load([b, t, 0]).reshape(BT, BI)
            G = tl.dot(tl.trans(dy_b), x_b, G)
        total += G
        total_sq += G * G
    linear.store_tile(dw, dw_sq, total, total_sq, tl.arange(0, BO), tl.arange(0, BI), outputs, inputs, tl.program_id(1))


def test_a_pipeline_broken_at_every_example_is_caught():
    row = ("descriptor", "half", 0)
    with mock.patch.object(linear, "_descriptor", _nested), ahead.compiling(90) as made:
        linear.linear_moments(*ahead.operands(row, (768, 3072, 16, 1024), torch.bfloat16), False)
    assert any("loops" in problem for problem in ahead.linear_problems(made[0], row, configs.LINEAR[90][row]))


@pytest.mark.parametrize("arch", configs.LINEAR)
def test_products_that_miss_the_tensor_cores_are_caught(arch):
    row = ("pointer", "float32", 0)  # which has no tensor cores: what if it were to have them?
    compiled = ahead.compile_linear(arch, row, torch.float32)
    tile = configs.LINEAR[arch][row]
    assert ahead.linear_problems(compiled, ("pointer", "tf32", 0), tile) == ["no product on tensor cores"]


@pytest.mark.parametrize("arch", [arch for arch in configs.LINEAR if arch >= 90])
def test_products_that_wait_for_the_one_before_are_caught(arch):
    row = ("descriptor", "half", 64)  # one product for each example, which is read at once
    compiled = ahead.compile_linear(arch, row, torch.bfloat16)
    found = ahead.linear_problems(compiled, ("descriptor", "half", 0), configs.LINEAR[arch][row])
    assert found == ["every product waits for the one before"]


@pytest.mark.parametrize("arch", [80, 90])
def test_loads_that_wait_are_caught(arch):
    row = ("pointer", "half", 0)
    tile = configs.LINEAR[arch][row]._replace(stages=1)
    found = ahead.linear_problems(ahead.compile_linear(arch, row, torch.bfloat16, tile), row, tile)
    assert "loads are not asynchronous" in found


def test_loads_that_are_not_tma_are_caught():
    row = ("pointer", "half", 64)
    compiled = ahead.compile_linear(90, row, torch.bfloat16)
    assert ahead.linear_problems(compiled, ("descriptor", "half", 64), configs.LINEAR[90][row]) == ["no TMA"]


@triton.jit
def _with_an_atomic(dw):
    tl.atomic_add(dw, 1.0)


def test_atomic_operations_are_caught():
    with ahead.compiling(90) as made:
        _launch.launch(_with_an_atomic, (1,), torch.empty(1))
    assert made[0].problems() == ["1 atomic operations"]


@pytest.mark.parametrize("arch", configs.LINEAR)
def test_long_distances_do_not_spill(arch):
    row = ("pointer, unaligned", "half", 0)  # of all the rows those with the fewest registers to spare
    with mock.patch.object(linear, "offset_dtype", lambda *reaches: tl.int64):
        compiled = ahead.compile_linear(arch, row, torch.bfloat16)
    found = ahead.linear_problems(compiled, row, configs.LINEAR[arch][row])
    assert not found, (found, compiled)


@pytest.mark.parametrize(("kernel", "kind"), [("pointer, unaligned", "float32"), ("one position", "half")])
def test_any_batch_runs_what_was_compiled_for_its_row(kernel, kind):
    """No other kernel where there is one example, where one fits a block, or where there is an even number of them."""
    row = (kernel, kind, int(kernel == "one position"))
    sizes = [(1, 1), (7, 1), (16, 1), (4096, 1)] if row[2] else [(1, 2), (1, 1023), (7, 3), (16, 21), (64, 63)]
    with ahead.multiplying(kind), ahead.compiling(90) as made:
        for batch, positions in sizes:
            dy, x = ahead.operands(row, (768, 3072, batch, positions), DTYPES[kind][0])
            linear.linear_moments(dy, x, False)
    first, *others = (compiled for compiled in made if compiled.name != "_add_parts")
    assert len(others) == len(sizes) - 1 and all(other is first for other in others)


def test_sums_of_parts_and_biases_compile_well():
    for arch in configs.LINEAR:
        with ahead.compiling(arch) as made:
            reduce.bias_moments(torch.empty(512, 64, 768, dtype=torch.bfloat16))
            reduce.bias_moments(torch.empty(7, 96, 31, dtype=torch.float64).mT)  # of a norm over positions, odd
            reduce.add_parts(torch.empty(2, 4, 768, 768), torch.empty(768, 768), torch.empty(768, 768))
        assert [c.name for c in made][:1] == ["_bias"]
        for compiled in made:
            assert not compiled.problems(), compiled


def test_launches_are_recorded_once_for_every_use():
    assert not _launch.INTERPRET
    with ahead.compiling(80) as made:
        for _ in range(2):
            linear.linear_moments(torch.empty(1, 3, 16), torch.empty(1, 3, 16), False)
    assert [c.name for c in made] == ["_pointer", "_pointer"]
