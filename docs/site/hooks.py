"""What the site takes from what is there: the frameworks' pages, the benchmarks' pictures; and LaTeX as MathML."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config):
    """Lists every page about a framework behind the overview: what comes with the package first, any other last."""
    pages = next(section["Frameworks"] for section in config.nav if "Frameworks" in section)
    names = {page.stem for page in (Path(config.docs_dir) / "frameworks").glob("*.md")} - {"index"}
    order = {"trl": 0, "verl": 0, "any": 2}
    pages += [f"frameworks/{name}.md" for name in sorted(names, key=lambda name: (order.get(name, 1), name))]
    return config


def on_files(files, config):
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"benchmarks/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_content(content, **_):
    """Replaces what pymdownx.arithmatex left for a script by MathML, which browsers show by themselves."""

    def formula(found: re.Match) -> str:
        tag, opening, latex = found.groups()
        shown = convert(html.unescape(latex), display="block" if opening == "[" else "inline")
        return f'<{tag} class="arithmatex">{shown}</{tag}>'

    return FORMULA.sub(formula, content)
