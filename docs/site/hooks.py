"""Makes pages of the site from Markdown that also reads well on a code host, where no hook runs.

| on a code host | on the site |
|---|---|
| a link alone on a line, to a file outside docs/ | the text of the file |
| the same, with a name of the package as its text | its docstrings; a comment below it has the options |
| a note: `> [!NOTE]` | an admonition |
| `<picture>`, which follows the reader's colours | two pictures, of which the site's theme shows one |
| DESIGN.md, CONTRIBUTING.md, CHANGELOG.md, pictures of benchmarks/results | pages and pictures of the site |
| a link in a sentence to another file outside docs/ | its text |
| LaTeX between dollar signs | MathML, which browsers show by themselves |
"""

import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
PAGES_OF_ROOT = {ROOT / f"{name}.md": f"{name.lower()}.md" for name in ("DESIGN", "CONTRIBUTING", "CHANGELOG")}

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
FILE_OR_NAME = re.compile(r"^\[`?([^\]`]+)`?\]\(([^)\s]+)\)\n(?:<!-- (.*?) -->\n)?(?=\n|\Z)", re.MULTILINE)
NOTE = re.compile(r"^> \[!(\w+)\]\n((?:>.*\n)+)", re.MULTILINE)
TITLE = re.compile(r"(?:> \*\*(.+)\.\*\*\n)?(.*)", re.DOTALL)
PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img alt="([^"]+)" src="([^"]+)">\s*</picture>')
DRAWING = re.compile(r"^!\[[^\]]*\]\(([^)\s]+\.svg)\)$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\(([\w./-]+)(#[^)]*)?\)")


def on_config(config):
    """Lists every page about a framework behind the overview: what comes with the package first, any other last."""
    pages = next(section["Frameworks"] for section in config.nav if "Frameworks" in section)
    names = {page.stem for page in (DOCS / "frameworks").glob("*.md")} - {"index"}
    order = {"trl": 0, "verl": 0, "megatron": 1, "any": 3}
    pages += [f"frameworks/{name}.md" for name in sorted(names, key=lambda name: (order.get(name, 2), name))]
    return config


def on_files(files, config):
    """Adds what lies outside docs/: the pages of the repository's root and the pictures of the benchmarks."""
    for path, name in PAGES_OF_ROOT.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for picture in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, place_on_site(picture), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, **_):
    folder = Path(page.file.abs_src_path).parent
    markdown = FILE_OR_NAME.sub(lambda found: text_of(found, folder), markdown)
    markdown = NOTE.sub(admonition, markdown)
    markdown = PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", markdown)
    markdown = DRAWING.sub(lambda found: drawing(found, folder), markdown)
    return LINK.sub(lambda found: link(found, folder, Path(page.file.src_uri).parent), markdown)


def text_of(found: re.Match, folder: Path) -> str:
    """Returns what a link alone on a line stands for, or the line itself if its file lies inside docs/."""
    text, target, options = found.groups()
    path = (folder / target).resolve()
    if path.is_relative_to(DOCS) or not path.is_file():
        return found[0]
    if text.startswith("rhythm_kernels."):
        return "\n".join([f"::: {text}", *(f"    {line}" for line in rendering(text, path, options))])
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.sub(r"\A# .*\n", "", content)  # the page has a heading of its own
    return f'``` {{ .{path.suffix[1:]} title="{path.relative_to(ROOT)}" }}\n{content}```\n'


def rendering(name: str, path: Path, options: str | None) -> list[str]:
    """Returns the lines of mkdocstrings' options for a module, a class or function, or a member of a class."""
    lines = [] if options is None else options.split("; ")
    if name == ".".join(path.relative_to(ROOT).with_suffix("").parts):  # a module: the page has a heading for it
        lines += ["show_root_heading: false", "show_root_toc_entry: false"]
    if name.split(".")[-2][0].isupper():
        lines += ["heading_level: 4"]
    return ["options:", *(f"  {line}" for line in lines)] if lines else []


def admonition(found: re.Match) -> str:
    title, text = TITLE.match(found[2]).groups()
    lines = [line.removeprefix(">").removeprefix(" ") for line in text.splitlines()]
    head = f"!!! {found[1].lower()}" + (f' "{title}"' if title else "")
    return "\n".join([head, *(f"    {line}" for line in lines)]) + "\n"


def drawing(found: re.Match, folder: Path) -> str:
    """Puts a drawing into the page itself where it takes the theme's colours from its style sheet."""
    content = (folder / found[1]).read_text(encoding="utf-8")
    return f'<div class="wide" markdown="0">\n{content}\n</div>' if "var(--md-" in content else found[0]


def link(found: re.Match, folder: Path, folder_on_site: Path) -> str:
    """Returns a link with its target on the site, or its text alone where the file is not on the site."""
    text, target, anchor = found.groups()
    path = (folder / target).resolve()
    if not path.exists():
        return found[0]  # of a piece of code, or for mkdocs to warn of
    place = place_on_site(path)
    if place.startswith(".."):
        return text
    return f"[{text}]({Path(os.path.relpath(place, folder_on_site)).as_posix()}{anchor or ''})"


def place_on_site(path: Path) -> str:
    if path in PAGES_OF_ROOT:
        return PAGES_OF_ROOT[path]
    if path.parent == RESULTS and path.suffix == ".png":
        return f"benchmarks/{path.name}"
    return os.path.relpath(path, DOCS)


def on_page_content(content, **_):
    """Replaces what pymdownx.arithmatex left for a script by MathML."""

    def formula(found: re.Match) -> str:
        tag, opening, latex = found.groups()
        shown = convert(html.unescape(latex), display="block" if opening == "[" else "inline")
        return f'<{tag} class="arithmatex">{shown}</{tag}>'

    return FORMULA.sub(formula, content)
