"""What every task shares: the problem, the score of an answer, and the row of data that a problem is built from."""

from collections.abc import Mapping
from typing import NamedTuple

LONGEST_BOX = 2000  # characters; a longer final answer is none


class Problem(NamedTuple):
    """One task for the policy, and how its answer is judged."""

    prompt: str  # what the policy reads: the user's turn, or the words themselves in the tiny task
    answer: str  # what the verifier compares with; JSON where it is structured
    verifier: str  # a key of train.tasks.VERIFIERS


class BadRow(ValueError):
    """A row of data with a missing column or a value of the wrong kind; the message shows what arrived."""


class UnusableRow(ValueError):
    """A well-formed row that gives no problem, such as one without an answer; it is left out and counted."""


def read_column(row: Mapping, path: str):
    """The value of a column; `a.b` is the field b of the column a. BadRow where there is none."""
    value = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise BadRow(f"no column {path!r}, the row has {shorten(row)}")
        value = value[name]
    return value


def require_text(value, what: str) -> str:
    """`value` if it is text with something in it; UnusableRow for none, BadRow for anything else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UnusableRow(f"the {what} is empty")
    if not isinstance(value, str):
        raise BadRow(f"the {what} must be text, got {shorten(value)}")
    return value.strip()


def shorten(value, most: int = 160) -> str:
    """`repr(value)`, cut to fit a message."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`; None if there is none, it never closes, or is longer than LONGEST_BOX."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth, position, end = 1, start, min(len(text), start + LONGEST_BOX + 1)
    while position < end:
        if text[position] == "\\":
            position += 1  # an escaped brace opens or closes nothing
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip()
        position += 1
    return None
