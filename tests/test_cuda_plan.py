"""How the CUDA kernels share out their work (csrc/cuda/plan.h): every product once, in whole tiles, without overlap."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perexample import _extension

INFO = _extension.info()
pytestmark = pytest.mark.skipif(INFO is None, reason="the extension is not built")
H100 = 132


def ceil_div(a, b):
    return -(-a // b)


def plan(outputs, inputs, batch, positions, ctas=H100, groups=1, tile=(128, 128), position_block=64):
    return INFO.plan(groups, outputs, inputs, *tile, batch, positions, position_block, ctas)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    outputs=st.integers(1, 700),
    inputs=st.integers(1, 700),
    batch=st.integers(1, 90),
    positions=st.integers(1, 900),
    ctas=st.integers(1, 140),
    groups=st.integers(1, 3),
    tile=st.sampled_from([(128, 128), (256, 128), (64, 64), (1, 32)]),
    position_block=st.sampled_from([16, 32, 64]),
)
def test_every_pair_of_tile_and_position_is_summed_once(
    outputs, inputs, batch, positions, ctas, groups, tile, position_block
):
    p = plan(outputs, inputs, batch, positions, ctas, groups, tile, position_block)
    assert (p["rows"], p["columns"]) == (ceil_div(outputs, tile[0]), ceil_div(inputs, tile[1]))
    assert 1 <= p["ctas"] <= min(ctas, len(p["jobs"]))
    summed, slots = {}, []
    for group, row, column, b0, b1, t0, t1, slot in p["jobs"]:
        assert 0 <= b0 < b1 <= batch and 0 <= t0 < t1 <= positions
        assert t0 % position_block == 0 and (t1 % position_block == 0 or t1 == positions)
        assert 0 <= group < groups and 0 <= row < p["rows"] and 0 <= column < p["columns"]
        summed.setdefault((group, row, column), []).append((b0, b1, t0, t1))
        if slot < 0:
            assert (b0, b1, t0, t1) == (0, batch, 0, positions)
        else:
            slots.append(slot)
            # Only where an example is whole in a job may the job square it.
            assert p["chunks"] == 1 or (p["parts"] == batch and b1 == b0 + 1)
            assert p["chunks"] > 1 or (t0, t1) == (0, positions)
    assert len(summed) == groups * p["rows"] * p["columns"]
    assert slots == list(range(p["slots"]))
    for ranges in summed.values():  # in the order in which the slots are added
        assert sum((b1 - b0) * (t1 - t0) for b0, b1, t0, t1 in ranges) == batch * positions
        assert ranges == sorted(ranges)
        assert all(a[1] <= b[0] or a[3] <= b[2] for a, b in pairwise(ranges))


def test_of_a_large_matrix_only_the_last_wave_is_cut():
    p = plan(4096, 4096, 32, 1024, H100 // 2, tile=(256, 128))  # 512 tiles, 7 waves of 66 and 50 more
    assert p["whole"] == 7 * 66
    assert p["slots"] == 50 * p["parts"] and p["chunks"] == 1


def test_few_tiles_are_cut_between_examples():
    p = plan(768, 768, 32, 1024)
    assert p["parts"] > 1 and p["chunks"] == 1
    assert p["slots"] <= 36 * p["parts"]


def test_few_examples_are_cut_between_positions():
    p = plan(256, 256, 2, 4096)
    assert p["parts"] == 2 and p["chunks"] > 1
    assert plan(256, 256, 1, 8192)["chunks"] > 1


def test_little_work_is_not_cut():
    assert plan(64, 64, 4, 8)["slots"] == 0


def test_a_device_of_one_multiprocessor_takes_all_jobs_in_turn():
    # Pairs of CTAs, of which it can run half of one.
    assert plan(256, 128, 5, 100, 0, tile=(256, 128)) == plan(256, 128, 5, 100, 1, tile=(256, 128))


def test_neighbouring_jobs_share_operands():
    # 132 CTAs at once: 8 rows and 17 columns of tiles, where row by row it would be 3 and 64.
    jobs = plan(8192, 8192, 8, 512)["jobs"][:H100]
    assert len({job[1] for job in jobs}) == 8
    assert len({job[2] for job in jobs}) == 17


def test_tf32_is_taken_where_the_user_of_torch_allows_it():
    # The kernels ask torch by a name of its C++ library: where that changes, this fails.
    matmul, other = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = matmul.fp32_precision, other.fp32_precision
    try:
        for precision, allowed in (("ieee", False), ("tf32", True), ("ieee", False)):
            matmul.fp32_precision = precision
            assert INFO.tf32_allowed() is allowed
        for precision, allowed in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            assert INFO.tf32_allowed() is allowed
    finally:
        matmul.fp32_precision, other.fp32_precision = before
    assert not INFO.tf32_allowed()
