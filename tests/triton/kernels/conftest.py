"""As in tests/ops: what is not written shows as NaN. Launches go to the GPU, or to Triton's interpreter."""

import os

import pytest
import torch

# Without it the products of recurrent layers refuse to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/triton/kernels needs a GPU, or TRITON_INTERPRET=1")


def pytest_configure(config):
    # What the interpreter of Triton 3.6 does with its own arrays; NumPy 2.4 no longer allows it.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(seeded_and_restored):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
