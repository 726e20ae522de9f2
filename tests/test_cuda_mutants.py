"""Bugs planted in the CUDA kernels of convolution, embedding, norms, sums and the step: the emulation catches each.

Those of linear_moments are in tests/test_cuda_emulation.py.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import emulated
import mutants

pytestmark = pytest.mark.skipif(not emulated.CXX, reason="no C++ compiler")


@pytest.fixture(scope="module")
def outcomes(emulated_library, tmp_path_factory):
    with ThreadPoolExecutor(2) as pool:
        library = mutants.build(tmp_path_factory.mktemp("mutants"), emulated_library.parent, pool.map)
    result = subprocess.run([sys.executable, mutants.__file__, str(library)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("source", mutants.MUTANTS)
def test_the_cases_of_the_mutants_pass_without_one(outcomes, source):
    assert outcomes[source] == 0


@pytest.mark.parametrize("name", mutants.NUMBERS)
def test_planted_bug_is_caught(outcomes, name):
    assert outcomes[name] == 3  # by a check: not by a crash, which could have other causes
