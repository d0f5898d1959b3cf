"""Arithmetic that a model wrote: read within bounds, valued exactly, and never evaluated as code."""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

LONGEST_EXPRESSION = 256  # words; longer ones are wrong without being read
LONGEST_NUMBER = 9  # digits
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
WORD = re.compile(rf"\s*([0-9]{{1,{LONGEST_NUMBER}}}(?![0-9])|[-+*/()])", re.ASCII)


def hits_target(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether `text` is an expression that uses each of `numbers` exactly once and equals `target`."""
    words = split_words(text)
    if words is None or Counter(int(word) for word in words if word.isdigit()) != Counter(numbers):
        return False
    return evaluate(words) == target


def split_words(text: str) -> list[str] | None:
    """Returns numbers, signs and parentheses of `text`; None if it is empty, too long, or holds anything else."""
    words, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = WORD.match(text, position)
        if match is None or len(words) == LONGEST_EXPRESSION:
            return None
        words.append(match[1])
        position = match.end()
    return words or None


def evaluate(words: Sequence[str]) -> Fraction | None:
    """Returns the exact value of an infix expression; None if it is malformed or divides by zero."""
    values: list[Fraction] = []
    pending: list[str] = []

    def apply() -> bool:
        b, a, sign = values.pop(), values.pop(), pending.pop()
        if sign == "/" and b == 0:
            return False
        values.append(a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b)
        return True

    value_next = True
    for word in words:
        if (word.isdigit() or word == "(") != value_next:
            return None
        if word.isdigit():
            values.append(Fraction(int(word)))
            value_next = False
        elif word == "(":
            pending.append(word)
        elif word == ")":
            while pending and pending[-1] != "(":
                if not apply():
                    return None
            if not pending:
                return None
            pending.pop()
        else:
            while pending and PRECEDENCE.get(pending[-1], 0) >= PRECEDENCE[word]:
                if not apply():
                    return None
            pending.append(word)
            value_next = True
    if value_next:
        return None
    while pending:
        if pending[-1] == "(" or not apply():
            return None
    return values[0]
