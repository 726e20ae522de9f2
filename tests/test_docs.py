"""The documentation runs."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import perexample as px

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str) -> None:
    torch.manual_seed(0)
    names = {
        "torch": torch,
        "F": F,
        "nn": nn,
        "px": px,
        "model": nn.Linear(6, 3),
        "loader": [(torch.randn(b, 6), torch.randint(3, (b,))) for b in (4, 8, 5)],
        "dy": torch.randn(4, 7, 3),
        "x": torch.randn(4, 7, 6),
    }
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)


def test_the_equivalence_in_the_readme_is_one() -> None:
    dy, x = torch.randn(4, 7, 3), torch.randn(4, 7, 6)
    names: dict[str, object] = {"torch": torch, "dy": dy, "x": x}
    exec(blocks("README.md")[0], names)
    dw, dw_sq, _, _ = px.ops.linear_moments(dy, x)
    torch.testing.assert_close(names["grad"], dw)
    torch.testing.assert_close(names["sum_grad_squared"], dw_sq)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target
