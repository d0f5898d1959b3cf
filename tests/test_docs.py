"""The documentation builds in strict mode, loads nothing from a network, and lists every page; its examples run."""

import ast
import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

pytest.importorskip("mkdocs", reason="docs/requirements.txt brings the tools of the documentation")
pytest.importorskip("material", reason="docs/requirements.txt brings the tools of the documentation")

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses: whoever asks for a page fails
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data", "embed": "src"}

pytestmark = pytest.mark.xdist_group("docs")  # one build for all of them


class Page(HTMLParser):
    """A page: the files that a browser loads for it, its links, and its anchors."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("id"):
            self.anchors.add(found["id"])
        if tag in LOADS and found.get(LOADS[tag]):
            self.loads.append(found[LOADS[tag]])
        if tag == "link" and found.get("rel") not in ("next", "prev", "canonical"):
            self.loads.append(found["href"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    # not --quiet: mkdocs then counts no warnings either, and nothing is strict
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", out]
    environment = os.environ | dict.fromkeys(PROXIES, NOWHERE)
    environment |= {"no_proxy": "", "NO_PROXY": "", "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_built(pages, site):
    written = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    written |= {Path(name) for name in ("design.html", "contributing.html", "changelog.html")}
    assert written <= {path.relative_to(site) for path in pages}
    start = Page(site / "index.html")
    listed = {Path(link) for link in start.links if not urlsplit(link).scheme}
    assert written <= listed, "a page that the navigation does not list"


def test_nothing_is_loaded_from_a_network(pages, site):
    for page in pages.values():
        away = [source for source in page.loads if urlsplit(source).scheme not in ("", "data") or source[:2] == "//"]
        assert not away, f"{page.path.relative_to(site)} loads {away}"
    for style in site.rglob("*.css"):
        for source in re.findall(r"(?:url\(|@import\s+)['\"]?([^'\")\s;]+)", style.read_text(encoding="utf-8")):
            assert urlsplit(source).scheme in ("", "data") and source[:2] != "//", f"{style.name} loads {source}"


def test_links_and_pictures_lead_somewhere(pages, site):
    for page in pages.values():
        if page.path.name == "404.html":  # served for any address, so its links begin with a slash
            continue
        for target in page.loads + page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            where = f"{page.path.relative_to(site)}: {target}"
            assert path.is_file(), where
            if parts.fragment and path in pages and parts.fragment not in ("__skip", "only-light", "only-dark"):
                assert unquote(parts.fragment) in pages[path].anchors | {"__comments"}, where


def test_formulas_are_mathml(pages, site):
    text = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in pages}
    assert "<math" in text["concepts/rhythm.html"] and "<math" in text["concepts/statistics.html"]
    left = [name for name, html in text.items() if re.search(r'class="arithmatex">\\[(\[]', html)]
    assert not left, f"LaTeX that no script will render: {left}"


def test_the_reference_has_all_that_the_package_exports(site):
    import rhythm_kernels

    reference = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    assert set(rhythm_kernels.__all__) <= set(re.findall(r'<h3 id="rhythm_kernels[\w.]*\.(\w+)" class="doc', reference))


def test_no_name_and_no_file_is_left_open(pages, site):
    for path in pages:
        text = unescape(re.sub(r"<[^>]*>", "", path.read_text(encoding="utf-8")))  # code is a tag a word
        left = re.findall(r"\]\[rhythm_kernels[\w.]*\]|^.*--8\W*--.*$", text, re.MULTILINE)
        assert not left, f"{path.relative_to(site)}: {left}"


@pytest.mark.parametrize("name", ["maps", "rhythm", "credit", "strategies", "bands"])
def test_pictures_are_small_and_for_both_themes(name):
    for theme in ("light", "dark"):
        picture = DOCS / "pictures" / f"{name}-{theme}.svg"
        assert picture.stat().st_size < 150_000 and "</svg>" in picture.read_text()[-20:]


def test_the_example_on_the_start_page_runs():
    torch.manual_seed(0)
    names = run_blocks(DOCS / "index.md")
    gamma, response = names["gamma"], names["response"]
    assert gamma[response].gt(1).any() and gamma[~response].eq(1).all() and names["per_token"].shape == (4, 300)


def test_the_example_with_q_and_k_runs():
    names = run_blocks(DOCS / "models.md")
    assert names["sums"].waad.shape == names["sums"].fai.shape == (2, 64)
    chosen = names["stats"].waad * names["local_heads"][:, None]
    assert torch.allclose(names["sums"].waad, chosen.sum(1), atol=1e-5)


def test_credit_by_hand_is_as_the_page_says():
    names = run_blocks(DOCS / "concepts" / "credit.md")
    said = re.search(r"^# (1\.25, .*)$", (DOCS / "concepts" / "credit.md").read_text(), re.MULTILINE)[1]
    assert names["gamma"][0].tolist() == [float(factor) for factor in said.split(", ")]
    sets = names["sets"]
    chosen = [group[0].nonzero().flatten().tolist() for group in sets[:4]]
    assert chosen == [[0, 1, 3], [1, 2, 5], [2], [0]] and sets.intro_of[0, 2] == 0


def test_the_messages_of_the_errors_page_are_those_of_the_code():
    code = "\n".join(text for path in (ROOT / "rhythm_kernels").rglob("*.py") for text in texts(path))
    page = (DOCS / "how-to" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    said = [row for row in rows if row != "message"]
    assert len(said) > 10
    for message in said:
        for part in message.split("…"):
            assert part.strip() in code, f"no error says {part.strip()!r}"


def texts(path: Path):
    """The texts in a file's code, with … for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def run_blocks(path: Path) -> dict[str, object]:
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(block, names)
    return names
