"""Texts kept in tests/golden, compared exactly.

`PX_WRITE_GOLDEN=1 pytest tests/...` rewrites those of the tests that run; then read the diff.
"""

from __future__ import annotations

import os
import pathlib
import re

FOLDER = pathlib.Path(__file__).parent / "golden"


def assert_golden(name: str, text: str) -> None:
    """The text is the stored one, exactly."""
    path = FOLDER / (re.sub(r"[^a-z0-9]+", "_", name.lower()) + ".txt")
    if os.environ.get("PX_WRITE_GOLDEN") == "1":
        path.write_text(text + "\n", encoding="utf-8")
    assert path.exists(), f"{path.name} is missing; see {pathlib.Path(__file__).name} for how to write it"
    assert text + "\n" == path.read_text(encoding="utf-8")
