"""What every task shares: the problem, the score of an answer, and the row of data that a problem is built from."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

LONGEST_BOX = 2000  # characters; a longer final answer is none
BOXES = (r"\boxed", r"\fbox", r"\framebox")
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?:\s*\{|(?:\s+|(?=\d))([-+]?[\w.,/]+%?))")


class Problem(NamedTuple):
    """One task for the policy, and how its answer is judged."""

    prompt: str  # what the policy reads: the user's turn, or the words themselves in the tiny task
    answer: str  # what the verifier compares with; JSON where it is structured
    verifier: str  # a key of rhythm_kernels.tasks.VERIFIERS


class BadSet(ValueError):
    """A set of problems that does not load; the message names it and shows what arrived."""


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


def require_earnable(gold: str, answer: str, verify: Callable[[str, str], float]):
    r"""UnusableRow where a completion that boxes the gold itself would not be paid for."""
    if len(gold) > LONGEST_BOX:
        raise UnusableRow(f"the answer has {len(gold)} characters, more than {LONGEST_BOX}")
    if verify(f"\\boxed{{{gold}}}", answer) != 1.0:
        raise UnusableRow(f"the answer {shorten(gold)} cannot be earned: it is not equal to itself in a box")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` or `\fbox{...}`, or behind a last `\boxed 5`.

    None if there is no box, if the last one never closes, or is longer than LONGEST_BOX.
    """
    start = max(text.rfind(name) for name in BOXES)
    if start < 0:
        return None
    match = BOX.match(text, start)
    if match is None:
        return None
    if match[1] is not None:
        return match[1].rstrip(".,;:")
    start = match.end()
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
