"""These tests need processes of their own, since Triton decides at import whether it interprets: tests/test_triton.py.

They are collected only where the command line names them:

    TRITON_INTERPRET=1 python -m pytest tests/triton/kernels    the kernels, in Triton's interpreter
    python -m pytest tests/triton/kernels                       the same on a GPU
    python -m pytest tests/triton/lint                          the kernels compiled for every architecture, no GPU
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "ops"))  # opchecks


def pytest_ignore_collect(collection_path, config):
    named = (config.invocation_params.dir / argument.split("::")[0] for argument in config.args)
    return None if any(path.resolve().is_relative_to(HERE) for path in named) else True
