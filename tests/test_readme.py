"""The README's example runs as it stands, CONTRIBUTING.md's tree names what is there, and pages have short lines."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def names():
    torch.manual_seed(0)
    return run_blocks(ROOT / "README.md", {})


@pytest.mark.slow
def test_the_library_example_runs(names):
    gamma, per_token, response = names["gamma"], names["per_token"], names["response"]
    assert gamma.shape == per_token.shape == (4, 300)
    assert gamma[~response].eq(1).all() and gamma[response].gt(1).any()
    assert torch.equal(per_token[1], torch.full((300,), -0.4))


def test_the_group_schedule_goes_on_from_the_example(names):
    after = run_blocks(ROOT / "docs" / "how-to" / "own-loop.md", dict(names))
    assert after["schedule"].groups.local_heads.any() and after["c"].rhythm().spans is None


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120, "details belong on the pages of docs/"


@pytest.mark.parametrize("pages", ["*.md", "docs/**/*.md"])
def test_no_line_is_longer_than_120_columns(pages):
    for page in ROOT.glob(pages):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            free = line.startswith("|") or "http" in line  # tables and links
            assert free or len(line) <= 120, f"{page.relative_to(ROOT)}:{number} has {len(line)} columns"


def test_the_tree_names_what_is_there():
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("## The tree", 1)[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        name = line.split()[0]
        path = (folder / name) if line.startswith(" ") else (ROOT / name)
        assert path.exists(), f"{path.relative_to(ROOT)} is in CONTRIBUTING.md's tree only"
        if not line.startswith(" "):
            folder = path


def run_blocks(page: Path, names: dict[str, object]) -> dict[str, object]:
    """Runs the python blocks of a page one after the other, and returns the names that they leave."""
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(block, names)
    return names
