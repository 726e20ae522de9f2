"""Every test starts from one seed and leaves torch's global switches as it found them."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_and_restored():
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
