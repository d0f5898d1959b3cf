"""Adds to the site what lies elsewhere: frameworks' pages, pictures, the table of credit options; LaTeX as MathML."""

import html
import re
import sys
from dataclasses import fields
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
OPTIONS = "<!-- credit options -->"


def on_config(config):
    """Lists every page about a framework behind the overview: what comes with the package first, any other last."""
    pages = next(section["Frameworks"] for section in config.nav if "Frameworks" in section)
    names = {page.stem for page in (Path(config.docs_dir) / "frameworks").glob("*.md")} - {"index"}
    order = {"trl": 0, "verl": 0, "megatron": 1, "any": 3}
    pages += [f"frameworks/{name}.md" for name in sorted(names, key=lambda name: (order.get(name, 2), name))]
    return config


def on_files(files, config):
    """Adds the pictures of the benchmarks."""
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"benchmarks/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, **_):
    """Replaces the marker of the credit options by their table."""
    return markdown.replace(OPTIONS, options_table()) if OPTIONS in markdown else markdown


def options_table() -> str:
    """Returns the fields of `CreditOptions` as a Markdown table: option, flat name, default, meaning."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # the checkout that the site is built from
    from rhythm_kernels.options import CreditOptions, flat_name

    rows = ["| option | flat name | default | meaning |", "|---|---|---|---|"]
    for option in fields(CreditOptions):
        meaning = option.metadata["help"]
        if "choices" in option.metadata:
            meaning += ": " + ", ".join(f"`{choice}`" for choice in option.metadata["choices"])
        cells = [f"`{option.name}`", f"`{flat_name(option.name)}`", f"`{show(option.default)}`", meaning]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)


def show(value) -> str:
    """Returns a default as it is written on a command line."""
    if isinstance(value, tuple):
        return " ".join(show(item) for item in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def on_page_content(content, **_):
    """Replaces what pymdownx.arithmatex left for a script by MathML, which browsers show by themselves."""

    def formula(found: re.Match) -> str:
        tag, opening, latex = found.groups()
        shown = convert(html.unescape(latex), display="block" if opening == "[" else "inline")
        return f'<{tag} class="arithmatex">{shown}</{tag}>'

    return FORMULA.sub(formula, content)
