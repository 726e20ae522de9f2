"""The CUDA kernels against the oracle, run on the CPU by tests/cuda_emulation; and planted bugs, each caught.

This shows that indices, tails, splits, barriers and the order of asynchronous copies are right for every schedule
tried, not that the hardware agrees: nothing here runs on a GPU.
"""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import emulated
from emulated import check, check_linear, guarded, of_largest_rest, padded, pair

pytestmark = pytest.mark.skipif(not emulated.CXX, reason="no C++ compiler")
SEEDS = (1, 2, 3)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_half = pytest.mark.parametrize("dtype", HALF, ids=str)


@pytest.fixture(scope="module")
def lib(emulated_library):
    return emulated.Emulated(emulated_library)


# (batch, positions, outputs, inputs), multiprocessors: rows too short or too odd for vectors, small and large tiles,
# cut between examples, cut between positions, and several jobs a CTA.
PORTABLE = [
    ((3, 5, 19, 13), 3),
    ((1, 1, 1, 1), 3),
    ((5, 17, 40, 24), 3),
    ((3, 33, 64, 130), 1),
    ((2, 48, 136, 200), 3),
    ((40, 20, 24, 32), 6),
    ((2, 700, 40, 24), 8),
    ((1, 600, 16, 16), 8),
]


@every_dtype
@pytest.mark.parametrize(("shape", "multiprocessors"), PORTABLE, ids=str)
def test_portable_kernel(lib, dtype, shape, multiprocessors):
    check_linear(lib, *pair(*shape, dtype), multiprocessors=multiprocessors, seed=shape[0])


@every_dtype
@pytest.mark.parametrize("shape", [(70, 1, 40, 24), (9, 1, 136, 72), (300, 1, 16, 16), (5, 1, 3, 7)], ids=str)
def test_one_position_is_two_products(lib, dtype, shape):
    check_linear(lib, *pair(*shape, dtype), multiprocessors=3)


def test_the_cases_above_are_cut_as_they_say(lib):
    slot = 64 * 64 * 2 * 4
    lib.linear_moments(*pair(40, 20, 24, 32), multiprocessors=6)
    assert lib.workspace > 0 and lib.workspace % slot == 0
    lib.linear_moments(*pair(2, 700, 40, 24), multiprocessors=8)
    assert lib.workspace > 2 * slot


# T of less than 16, of 16 to 32, whole stages, and tails of every length.
HOPPER = [
    ((2, 64, 128, 128), 1),
    ((3, 150, 200, 136), 2),
    ((2, 33, 300, 72), 4),
    ((3, 112, 136, 8), 3),
    ((4, 128, 256, 256), 2),
    ((5, 17, 320, 144), 6),
    ((11, 9, 300, 136), 4),
    ((13, 2, 72, 40), 3),
    ((5, 30, 72, 300), 2),
    ((60, 16, 64, 64), 6),
    ((2, 1000, 72, 72), 8),
    ((1, 700, 136, 8), 12),
    ((7, 64, 264, 72), 4),
    ((6, 256, 136, 72), 2),
]


@every_half
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shape", "multiprocessors"), HOPPER, ids=str)
def test_hopper_kernel(lib, dtype, shape, multiprocessors, bias):
    check_linear(lib, *pair(*shape, dtype), bias, capability=90, multiprocessors=multiprocessors)


@pytest.mark.parametrize("seed", range(4, 9))
@pytest.mark.parametrize("shape", [(3, 150, 264, 72), (7, 12, 264, 72)], ids=str)
def test_hopper_kernel_under_other_schedules(lib, seed, shape):
    check_linear(lib, *pair(*shape, torch.bfloat16), capability=90, multiprocessors=4, seed=seed)


def test_what_tma_cannot_read_goes_to_the_portable_kernel(lib):
    dy, x = pair(3, 20, 33, 40, torch.bfloat16)  # rows of 33 are not 16 bytes aligned
    check_linear(lib, dy, x, capability=90)
    dy, x = pair(3, 20, 40, 40, torch.bfloat16)
    check_linear(lib, dy.mT.contiguous().mT, x, capability=90)
    check_linear(lib, dy[:1].expand(3, -1, -1), x, capability=90)
    check_linear(lib, dy, torch.cat([x, x], 2)[:, :, 1:41], capability=90)


@every_dtype
@pytest.mark.parametrize("capability", [80, 90])
def test_any_memory_layout(lib, dtype, capability):
    dy, x = pair(4, 20, 24, 40, dtype)
    for view in (
        lambda t: t.mT.contiguous().mT,
        lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
        lambda t: torch.stack([t, torch.full_like(t, float("nan"))], 3)[..., 0],
        lambda t: padded(t[:, :, :19]),
        lambda t: t[:, :1].expand(-1, 20, -1),
        lambda t: t[:, :, :1].expand_as(t),
    ):
        check_linear(lib, view(dy), padded(x), capability=capability)
        check_linear(lib, padded(dy), view(x), capability=capability)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dtype", "capability"), [*((d, 80) for d in DTYPES), *((d, 90) for d in HALF)], ids=str)
def test_gradient_in_another_dtype_than_the_inputs(lib, dtype, grad_dtype, capability):
    check_linear(lib, *pair(3, 18, 24, 9, dtype), True, grad_dtype, capability=capability)
    check_linear(lib, *pair(3, 18, 24, 16, dtype), True, grad_dtype, capability=capability)


@every_dtype
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty_dimensions_give_zeros(lib, dtype, shape):
    check_linear(lib, *(torch.randn(*shape[:2], n).to(dtype) for n in shape[2:]))


@pytest.mark.parametrize("positions", [1, 20])
def test_tf32_where_it_is_allowed(lib, positions):
    # TF32 keeps 11 bits, as float16 does.
    dy, x = pair(6, positions, 40, 24)
    check_linear(lib, dy, x, tf32=True, precision=torch.float16)
    exact, rounded = (lib.linear_moments(dy, x, tf32=tf32)[1] for tf32 in (False, True))
    assert (exact - rounded).abs().max() > 1e-5 * exact.max()


@every_half
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("positions", [1, 2])
def test_squares_are_taken_of_what_is_not_rounded(lib, dtype, capability, positions):
    # G = 1 + 2**-9 is no bfloat16 number, and 2**-13 squared no float16.
    dy = torch.zeros(1, positions, 8, dtype=dtype)
    dy[0, 0, 0], dy[0, -1, 1] = 1, 2**-13
    dy[0, 0, 2] = 1 + torch.finfo(dtype).eps
    got = lib.linear_moments(dy, dy.clone(), capability=capability)[1]
    assert torch.equal(got, (dy[0].double().T @ dy[0].double()).square().float())


@every_dtype
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("positions", [2, 4, 50])
def test_what_cancels_within_an_example_leaves_nothing(lib, dtype, capability, positions):
    dy, x = pair(5, positions, 24, 16, dtype)
    dy[:, 1::2], x[:, 1::2] = -dy[:, ::2], x[:, ::2]
    assert all((t == 0).all() for t in lib.linear_moments(dy, x, capability=capability))


@every_half
@pytest.mark.parametrize("batch", [1, 100])
def test_every_piece_of_the_squares_counts(lib, dtype, batch):
    check_linear(lib, *of_largest_rest(batch, 8, 8, dtype))


@every_dtype
@pytest.mark.parametrize(
    ("shape", "multiprocessors"),
    [((3, 5, 7), 3), ((40, 3, 33), 1), ((3, 70, 40), 1), ((2, 900, 5), 2), ((300, 1, 40), 2), ((2, 1, 600), 1)],
    ids=str,
)
def test_bias(lib, dtype, shape, multiprocessors):
    torch.manual_seed(0)
    dy = guarded(torch.randn(shape).to(dtype))
    for view in (dy, guarded(dy.mT.contiguous()).mT, dy[:, :, :1].expand_as(dy), dy[:, :1].expand_as(dy)):
        got = lib.bias_moments(view, multiprocessors=multiprocessors)
        check(got, lambda b, d, v=view: v[b].to(d).sum(0), shape[0], shape[2:], dtype)


@every_dtype
def test_reduce(lib, dtype):
    torch.manual_seed(0)
    for shape, multiprocessors in (((5, 300), 1), ((700, 3), 1), ((0, 4), 1), ((3000, 2), 8)):
        grad = guarded(torch.randn(shape).to(dtype))
        got = lib.reduce_moments(grad, torch.float32, multiprocessors=multiprocessors)
        check(got, lambda b, d, g=grad: g[b].to(d), shape[0], shape[1:], dtype, torch.float32)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_bits_do_not_depend_on_the_schedule(lib, capability):
    for shape in ((40, 20, 72, 40), (2, 700, 40, 24), (90, 1, 40, 24)):
        dy, x = pair(*shape, torch.bfloat16)
        results = [lib.linear_moments(dy, x, True, capability=capability, seed=s, multiprocessors=8) for s in SEEDS]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# what is compiled, the file, what stands there, what a mistake would make of it
MUTANTS = {
    "a stage released before it is read": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "if (before >= 0) wgmma_wait<1>(), release(before);",
        "if (before >= 0) release(before), wgmma_wait<1>();",
    ),
    "the last product of an example not waited for": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "        wgmma_wait<0>();\n        release(before);",
        "        wgmma_wait<1>();\n        release(before);",
    ),
    "no wait for an empty stage": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "    barrier_wait_cluster(ring.empty(), ring.phase);\n    barrier_expect",
        "    barrier_expect",
    ),
    "no wait for a full stage": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "        for (int block = 0; block < full_blocks; ++block) {\n          barrier_wait(ring.full(), ring.phase);",
        "        for (int block = 0; block < full_blocks; ++block) {",
    ),
    "a turn passed on before all warps have seen it": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "          __syncwarp();\n          if (thread % 32 == 0) barrier_arrive(ring.turn(1 - group));",
        "          if (thread < 4) barrier_arrive(ring.turn(1 - group));",
    ),
    "turns in examples longer than the ring": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "full_blocks + (tail_steps > 0) < Tile::kStages - 1;",
        "true;",
    ),
    "wrong stride in the descriptor": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "Tile::kHalfBytes >> 4) << 16",
        "Tile::kHalfBytes >> 5) << 16",
    ),
    "a stage released in the wrong CTA": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "barrier_arrive_in_cluster(ring.empty(stage), static_cast<uint32_t>(thread))",
        "barrier_arrive_in_cluster(ring.empty(stage), 0u)",
    ),
    "the bias read after its stage is released": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "          if (wanted) add_rows(G, 0, Tile::kBlock);\n          release();",
        "          release();\n          if (wanted) add_rows(G, 0, Tile::kBlock);",
    ),
    "examples of one stage run together": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "db + k * kDescriptorStep, k != 0);",
        "db + k * kDescriptorStep, 1);",
    ),
    "the tail of an example dropped": (
        "few_wgmma",
        "linear_wgmma.cuh",
        "(positions + 15) % Tile::kBlock / 16",
        "positions % Tile::kBlock / 16",
    ),
    "chunks squared before they are added": (
        "few_wgmma",
        "common.cuh",
        "if (plan.chunks == 1) {",
        "if (true) {",
    ),
    "chunks of the bias squared before they are added": (
        "few_mma",
        "common.cuh",
        "if (plan.chunks == 1) s += slot[kRows];",
        "s += slot[kRows];",
    ),
    "the last part of the bias lost": (
        "few_mma",
        "common.cuh",
        "part < plan.parts; ++part) {\n    A G",
        "part < plan.parts - (plan.parts > 1); ++part) {\n    A G",
    ),
    "the rest of a float32 cut off": ("few_mma", "linear_mma.cuh", "    x -= as_float(p.piece[i]);\n", ""),
    "a column behind the end of a row": (
        "few_mma",
        "common.cuh",
        "put_if(exists && c + 1 < inputs,",
        "put_if(exists,",
    ),
    "copies not waited for": (
        "few_mma",
        "linear_mma.cuh",
        "copy_wait<Tile::kStages - 2>();",
        "copy_wait<Tile::kStages - 1>();",
    ),
    "no barrier before a stage is read": (
        "few_mma",
        "linear_mma.cuh",
        "copy_wait<Tile::kStages - 2>();\n      __syncthreads();",
        "copy_wait<Tile::kStages - 2>();",
    ),
    "no barrier between jobs": (
        "few_mma",
        "linear_mma.cuh",
        "__syncthreads();  // the stages of the job before have been read",
        "",
    ),
    "examples run together": (
        "few_mma",
        "linear_mma.cuh",
        "if (block == 0) {\n          multiply(0, std::true_type{});",
        "if (done == 0) {\n          multiply(0, std::true_type{});",
    ),
    "the last example not drained": ("few_mma", "linear_mma.cuh", "    acc.drain();\n", ""),
    "low pieces dropped": (
        "few_mma",
        "linear_mma.cuh",
        "constexpr int kMost = kAll ? 2 * (kPieces - 1) : kPieces - 1;",
        "constexpr int kMost = 0;",
    ),
    "the product of the second pieces dropped": (
        "few_mma",
        "linear_mma.cuh",
        "multiply_pieces<false, kPieces == 2, kPieces>",
        "multiply_pieces<false, false, kPieces>",
    ),
    "the bias squared block by block": (
        "few_mma",
        "linear_mma.cuh",
        "set(0, ends ? 0.f : sum);\n      if (!ends) return;",
        "set(0, 0.f);",
    ),
    "the bias of the job before kept": ("few_mma", "linear_mma.cuh", "if (adds_bias) bias_sums.clear();", ""),
    "the bias of a stage that has not landed": (
        "few_mma",
        "linear_mma.cuh",
        "bias_sums.add(at_dy, block",
        "bias_sums.add(base + free_stage * Tile::kStageBytes, block",
    ),
    "chunks of an example summed in the wrong slot": (
        "few_mma",
        "linear_mma.cuh",
        "workspace + j.slot * slot_vectors",
        "workspace + j.slot / 2 * slot_vectors",
    ),
    "a position too many": ("few_mma", "linear_mma.cuh", "int bytes = t + k < t1 ?", "int bytes = t + k < t1 + 1 ?"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """How the cases ended on every mutant, and on the sources as they are (by the name of what is compiled)."""
    base = tmp_path_factory.mktemp("mutants")
    shared = [emulated.compile(source, base) for source in (emulated.SOURCES / "plan.cpp", emulated.HERE / "shim.cpp")]

    def build(item):
        number, (name, change) = item
        few = name if change is None else change[0]
        folder = base / str(number)
        shutil.copytree(emulated.SOURCES, folder / "csrc/cuda")
        (folder / "csrc/cpu").mkdir()
        shutil.copy(emulated.SOURCES.parent / "cpu/kernels.h", folder / "csrc/cpu")
        if change is not None:
            _, file, old, new = change
            text = (folder / "csrc/cuda" / file).read_text()
            assert text.count(old) >= 1, f"{name}: {file} no longer has {old!r}"
            (folder / "csrc/cuda" / file).write_text(text.replace(old, new, 1))
        target = emulated.compile(emulated.HERE / f"{few}.cpp", folder / "build", folder / "csrc/cuda")
        return few, name, emulated.link([target, *shared], folder / "emulated.so")

    def run(few):
        names, libraries = zip(*((name, str(library)) for of, name, library in built if of == few), strict=True)
        command = [sys.executable, str(emulated.HERE / "emulated.py"), few, *libraries]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return dict(zip(names, map(int, result.stdout.splitlines()[-1].split()), strict=True))

    unchanged = [(few, None) for few in emulated.MUTANT_CASES]
    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(build, enumerate([*unchanged, *MUTANTS.items()])))
        some, others = pool.map(run, emulated.MUTANT_CASES)
    return some | others


@pytest.mark.parametrize("few", emulated.MUTANT_CASES)
def test_the_cases_of_the_mutants_pass_without_one(outcomes, few):
    assert outcomes[few] == 0


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(outcomes, name):
    assert outcomes[name] == 3  # by a check: not by a crash, which could have other causes
