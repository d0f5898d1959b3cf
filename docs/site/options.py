"""Writes the table of credit's options into docs/reference/options.md:  python docs/site/options.py"""

import re
from dataclasses import fields
from pathlib import Path

from rhythm_kernels.options import CreditOptions, flat_name

PAGE = Path(__file__).resolve().parents[1] / "reference" / "options.md"
HEAD = "| option | flat name | default | meaning |\n|---|---|---|---|\n"


def table() -> str:
    """Returns the fields of `CreditOptions` as a Markdown table: option, flat name, default, meaning."""
    rows = []
    for option in fields(CreditOptions):
        meaning = option.metadata["help"]
        if "choices" in option.metadata:
            meaning += ": " + ", ".join(f"`{choice}`" for choice in option.metadata["choices"])
        cells = [f"`{option.name}`", f"`{flat_name(option.name)}`", f"`{shown(option.default)}`", meaning]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n")
    return HEAD + "".join(rows)


def shown(value) -> str:
    """Returns a default as it is written on a command line."""
    if isinstance(value, tuple):
        return " ".join(shown(item) for item in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def written(text: str) -> str:
    """Returns the page with today's table in place of the one that it has."""
    return re.sub(re.escape(HEAD) + r"(\|.*\n)*", lambda _: table(), text, count=1)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
