"""In the op tests every torch.empty, also in C++, starts as NaN: an output that is not written shows."""

import sys
from pathlib import Path

import pytest
import torch

from perexample import ops

sys.path.insert(0, str(Path(__file__).parents[1]))
from on_device import DEVICE, on_device

if DEVICE:  # the public functions, before the tests import them
    for name in ops.OPS:
        setattr(ops, name, on_device(getattr(ops, name), in_place=name.endswith("_")))


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(seeded_and_restored):
    torch.set_num_threads(1)  # several threads give the same bits: test_registration.py
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(9).isnan().all()
