"""Habits of every command in this package: output that any encoding takes, errors in one line, tables, visible text."""

import re
import sys
from collections.abc import Iterable, Sequence

TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Marks that turn the direction of the text behind them."""


def visible(text: str) -> str:
    """Returns a token's text as a page shows it: line breaks as a sign, and turns named, which could reorder a page."""
    return TURNS.sub(lambda mark: f"⟨U+{ord(mark[0]):X}⟩", text.replace("\n", "⏎"))


def escape_unencodable() -> None:
    """Makes stdout and stderr escape characters that their encoding lacks, where they would raise UnicodeEncodeError.

    The C locale's ASCII, for example, has no ±: a command must not lose its results when it prints one.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_error(program: str, message: str) -> None:
    """Prints `program: message` to stderr in one line, however many lines the message has."""
    print(f"{program}: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)


def missing_package(error: ImportError) -> str:
    """Returns the error's message, or how to install the package whose absence caused the error.

    A message that says `pip install` itself is kept. transformers raises import errors from other import errors, so
    the first cause in the chain decides.
    """
    cause = error
    while cause.__cause__ is not None and isinstance(cause, ImportError):
        cause = cause.__cause__
    if not isinstance(cause, ModuleNotFoundError) or not cause.name or "pip install" in str(error):
        return str(error)
    package = cause.name.partition(".")[0].replace("_", "-")
    return f"the package {package} is needed and not installed: pip install {package}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown; a bar or a line break in a cell does not end it."""
    return "\n".join([_table_row(head), "|---" * len(head) + "|", *map(_table_row, rows)])


def _table_row(cells: Sequence[str]) -> str:
    whole = (" ".join(cell.replace("|", "\\|").splitlines()) for cell in cells)
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in whole)
