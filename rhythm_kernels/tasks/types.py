"""The problem, the errors of its data, and the final answer in a box, which all tasks share."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

LONGEST_BOX = 2000  # characters; a longer final answer is none
BOXES = (r"\boxed", r"\fbox", r"\framebox")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace opens or closes nothing
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?:\s*\{|(?:\s+|(?=\d))([-+]?[\w.,/]+%?))")


class Problem(NamedTuple):
    """One task for the policy, and the verifier of its answers."""

    prompt: str  # what the policy reads: the user's turn, or the words themselves in the tiny task
    answer: str  # what the verifier compares with; JSON where it is structured
    verifier: str  # a key of VERIFIERS


class BadSet(ValueError):
    """A set of problems that does not load; the message names it and shows what arrived."""


class BadRow(ValueError):
    """A row of data with a missing column or a value of the wrong kind; the message shows what arrived."""


class UnusableRow(ValueError):
    """A well-formed row that gives no problem, such as one without an answer; it is left out and counted."""


def read_column(row: Mapping, path: str):
    """Returns the value of a column, or raises BadRow; `a.b` is the field b of the column a."""
    value = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise BadRow(f"no column {path!r}, the row has {shorten(row)}")
        value = value[name]
    return value


def require_puzzle(name: str, numbers, target) -> None:
    """Raises BadRow unless a Countdown row, whose column of numbers is `name`, has two or more of them and a target."""
    whole = isinstance(numbers, list | tuple) and all(type(number) is int and number >= 0 for number in numbers)
    if not whole or len(numbers) < 2:
        raise BadRow(f"{name} must be two or more integers from 0 up, got {shorten(numbers)}")
    if type(target) is not int:
        raise BadRow(f"target must be an integer, got {shorten(target)}")


def require_text(value, what: str) -> str:
    """Returns `value` without space around it; raises UnusableRow if it is empty, BadRow if it is no text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UnusableRow(f"the {what} is empty")
    if not isinstance(value, str):
        raise BadRow(f"the {what} must be text, got {shorten(value)}")
    return value.strip()


def shorten(value, most: int = 160) -> str:
    """Returns `repr(value)`, cut to fit a message."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def require_short(gold: str):
    """Raises UnusableRow for an answer too long to be read, which takes a time that grows with its square."""
    if len(gold) > LONGEST_BOX:
        raise UnusableRow(f"the answer has {len(gold)} characters, more than {LONGEST_BOX}")


def require_earnable(gold: str, answer: str, verify: Callable[[str, str], float]):
    r"""Raises UnusableRow where a completion that boxes the gold itself would not be paid for."""
    require_short(gold)
    if verify(f"\\boxed{{{gold}}}", answer) != 1.0:
        raise UnusableRow(f"the answer {shorten(gold)} cannot be earned: it is not equal to itself in a box")


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` or `\fbox{...}`, or what follows a last `\boxed 5`.

    Returns None if there is no box, if the last one never closes, or is longer than LONGEST_BOX.
    """
    start = max(text.rfind(name) for name in BOXES)
    if start < 0:
        return None
    match = BOX.match(text, start)
    if match is None:
        return None
    if match[1] is not None:
        return match[1].rstrip(".,;:")
    end = closing_brace(text[: match.end() + LONGEST_BOX + 1], match.end())
    return text[match.end() : end].strip() if end >= 0 else None


def closing_brace(text: str, start: int) -> int:
    """Returns where the brace closes that opened just before `start`; -1 if it does not."""
    depth = 1
    for match in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1
