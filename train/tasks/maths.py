r"""Maths with a final answer in \boxed{}, compared by math-verify.

Sympy, which math-verify compares with, can take for ever and can eat all memory over an answer such as
9^{9^{9^9}}: `verify` belongs into a process that can be killed, as train.rewards runs it.
"""

import json
import logging
from functools import cache
from types import ModuleType

from train.tasks.types import BadRow, Problem, UnusableRow, last_boxed, require_text, shorten

INSTRUCTION = "Reason step by step, and put the final answer inside \\boxed{}."


def from_row(question, answer, context=None) -> Problem:
    """The problem of a question and its answer: text, a number, or a list of which any one is right."""
    golds = [_gold(item) for item in (answer if isinstance(answer, list) else [answer])]
    return _problem(question, golds, context)


def from_row_of_parts(question, final_answer, context=None) -> Problem:
    """As `from_row`, where a list holds the parts of one answer, all of which must be given, in any order."""
    parts = [_gold(item) for item in (final_answer if isinstance(final_answer, list) else [final_answer])]
    return _problem(question, [", ".join(parts)] if parts else [], context)


def _problem(question, golds: list[str], context) -> Problem:
    if not golds:
        raise UnusableRow("the answer is empty")
    text = require_text(question, "question")
    if context is not None and context != "":
        text = f"{require_text(context, 'context')}\n\n{text}"
    return Problem(f"{text}\n\n{INSTRUCTION}", json.dumps(golds), "maths")


def _gold(item) -> str:
    if isinstance(item, bool) or not isinstance(item, str | int | float | None):
        raise BadRow(f"an answer must be text or a number, got {shorten(item)}")
    text = require_text(item if item is None else str(item), "answer")
    inner = text[1:-1]
    return inner.strip() if text[0] == text[-1] == "$" and inner.strip() and "$" not in inner else text


def verify(completion: str, answer: str) -> float:
    r"""1.0 if what the last \boxed{} holds equals one of the golds, else 0.0. ValueError for a gold without meaning."""
    boxed = last_boxed(completion)
    if not boxed:
        return 0.0
    golds = json.loads(answer)
    if boxed in golds:
        return 1.0
    given = _parse(boxed)
    for gold in golds:
        expected = _parse(gold)
        if not expected:
            raise ValueError(f"the gold answer {gold!r} cannot be parsed")
        if load_library().verify(expected, given, timeout_seconds=None):
            return 1.0
    return 0.0


def _parse(latex: str) -> list:
    # LaTeX only: the library's reader of plain expressions goes through Python's eval.
    library = load_library()
    config = [library.LatexExtractionConfig(boxed_match_priority=0)]
    return library.parse(f"\\boxed{{{latex}}}", extraction_config=config, parsing_timeout=None)


@cache
def load_library() -> ModuleType:
    """math-verify, which brings sympy and takes a second to load; ImportError where it is not installed."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that without its own timeouts it may hang
    return math_verify
