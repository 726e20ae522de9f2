"""Every test starts from one seed and leaves torch's global switches as it found them."""

import sys
from pathlib import Path

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


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """The CUDA kernels, built to run on the CPU: tests/cuda_emulation."""
    sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
    import emulated

    return emulated.build(tmp_path_factory.mktemp("emulated"))
