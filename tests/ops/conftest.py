"""In the op tests every torch.empty, also in C++, starts as NaN: an output that is not written shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(seeded_and_restored):
    torch.set_num_threads(1)  # several threads give the same bits: test_registration.py
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(9).isnan().all()
