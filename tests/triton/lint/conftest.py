"""The kernels as the compiler sees them; needs no GPU, but a process without the interpreter."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/triton/lint compiles: unset TRITON_INTERPRET")
