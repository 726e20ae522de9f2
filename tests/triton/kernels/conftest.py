"""As in tests/ops: what is not written shows as NaN. Launches go to the GPU, or to Triton's interpreter."""

import os

import pytest
import torch

# Without it the products of recurrent layers refuse to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/triton/kernels needs a GPU, or TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(seeded_and_restored):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
