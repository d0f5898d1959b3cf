"""The README's example runs as it stands, and pages read well where no site is built: on a code host, in an editor."""

import re
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SITE_ONLY = re.compile(r"--8<--|^(:::|!!!|\?\?\?|===) |\{ ?[.#:]|#only-|^.*\\[(\[].*\\[)\]]", re.MULTILINE)


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


def test_no_line_is_longer_than_120_columns():
    for page in PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            free = line.startswith("|") or "http" in line  # tables and links
            assert free or len(line) <= 120, f"{page.relative_to(ROOT)}:{number} has {len(line)} columns"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_needs_no_site(page):
    """Finds nothing that only the site's extensions show, and a place that is there behind each link and picture."""
    text = without_code(page)
    assert not (found := SITE_ONLY.search(text)), f"a code host shows it as it is: {found[0]!r}"
    for target in links(text):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in headings(path), f"no heading of {path.name} has the anchor {anchor}"


def without_code(page: Path) -> str:
    """Returns the text of a page without its blocks of code, and with dots in place of code in a line."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: "." * len(code[0]), text)


def links(text: str) -> Iterator[str]:
    """Yields the links and pictures of a page that lead to files."""
    for found in re.finditer(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text):
        target = found[1] or found[2]
        if not re.match(r"https?:", target):
            yield target


def headings(page: Path) -> set[str]:
    """Returns the anchors that a code host gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_page_of_options_has_todays_table():
    """`python docs/site/options.py` writes it."""
    page = run_path(str(ROOT / "docs" / "site" / "options.py"))
    text = page["PAGE"].read_text(encoding="utf-8")
    assert page["table"]() in text and page["written"](text) == text
    assert page["written"](text.replace("| `0.4` |", "| `0.7` |")) == text


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
