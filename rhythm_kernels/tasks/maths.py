r"""Maths with a final answer in \boxed{}, compared by kind (answers.py).

Only sums, integrals, products and limits are left to math-verify. Sympy, which it compares with, can take for ever and
can eat all memory: run `verify` in a process that can be killed, as train/rewards.py does.
"""

import json
import logging
import math
import re
from decimal import Decimal
from functools import cache
from types import ModuleType

from rhythm_kernels.tasks import answers
from rhythm_kernels.tasks.forms import normalise
from rhythm_kernels.tasks.types import (
    BadRow,
    Problem,
    UnusableRow,
    last_boxed,
    require_earnable,
    require_short,
    require_text,
    shorten,
)

INSTRUCTION = "Reason step by step, and put the final answer inside \\boxed{}."
LONGEST_TEXT = 8  # words of an answer that is no formula; more are an explanation
FINAL = "####"  # before the answer at the end of GSM8K's solutions
OPERATORS = re.compile(r"\\(?:sum|prod|i*int|oint|lim|limsup|liminf)(?![A-Za-z])")
FOR_SYMPY = re.compile(
    r"(?:\\(?:sum|prod|int|lim|frac|sqrt|binom|infty|pi|cdot|times|to|sin|cos|tan|ln|log|exp|theta|alpha|beta)(?![A-Za-z])"
    r"|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|d[a-z]|[-+*/^_=!(){}|,.0-9\s])+"
)


def from_row(question, answer, context=None) -> Problem:
    """Returns the problem of a question and its answer: text, a number, or a list of which any one is right."""
    return _problem(question, _golds(answer), context)


def from_row_of_parts(question, final_answer, context=None) -> Problem:
    """Returns the same, where a list holds the parts of one answer, all of which must be given, in any order."""
    parts = _golds(final_answer)
    return _problem(question, [", ".join(parts)] if parts else [], context)


def _golds(answer) -> list[str]:
    return [_gold(item) for item in (answer if isinstance(answer, list) else [answer])]


def _problem(question, golds: list[str], context) -> Problem:
    if not golds:
        raise UnusableRow("the answer is empty")
    text = require_text(question, "question")
    if context is not None and context != "":
        text = f"{require_text(context, 'context')}\n\n{text}"
    problem = Problem(f"{text}\n\n{INSTRUCTION}", json.dumps(golds), "maths")
    for gold in golds:
        require_earnable(gold, json.dumps([gold]), verify)
    return problem


def _gold(item) -> str:
    """Returns a row's answer as text; raises UnusableRow for one that no answer of a model can be equal to."""
    if isinstance(item, bool) or not isinstance(item, str | int | float | None):
        raise BadRow(f"an answer must be text or a number, got {shorten(item)}")
    if isinstance(item, float):
        if not math.isfinite(item):
            raise UnusableRow(f"the answer {item} is no number")
        item = format(Decimal(repr(item)), "f")  # 1e-5 and 1e16 as people write them
    text = require_text(item if item is None else str(item), "answer")
    if FINAL in text:
        text = require_text(text.rpartition(FINAL)[2], f"answer after {FINAL}")
    inner = text[1:-1]
    text = inner.strip() if text[0] == text[-1] == "$" and inner.strip() and "$" not in inner else text
    text = last_boxed(text) or text  # a whole solution, or an answer in a box of its own
    require_short(text)
    normal, is_understood = normalise(text), answers.is_understood(text)
    if (not re.search(r"\w", normal) and not is_understood) or normal.casefold() in ("nan", "n/a"):
        raise UnusableRow(f"the answer {shorten(text)} says nothing")
    if not is_understood and not OPERATORS.search(normal):
        words = len(re.findall(r"[^\W\d_]{2,}", answers.plain(normal)))
        if words > LONGEST_TEXT:
            raise UnusableRow(f"the answer is prose of {words} words, got {shorten(text)}")
    return text


def verify(completion: str, answer: str) -> float:
    r"""Returns 1.0 if the last \boxed{} holds one of the golds, else 0.0; raises ValueError for an empty gold."""
    boxed = last_boxed(completion)
    if not boxed:
        return 0.0
    golds = json.loads(answer)
    for gold in golds:
        if not answers.readings(gold):
            raise ValueError(f"the gold answer {gold!r} says nothing")
    return float(any(answers.same(gold, boxed) or _same_by_sympy(gold, boxed) for gold in golds))


def _same_by_sympy(gold: str, given: str) -> bool:
    """Whether math-verify finds two sums, integrals, products or limits equal; it is not asked about anything else."""
    texts = [normalise(text) for text in (gold, given)]
    # Its reader takes X for x, and its comparison takes all small numbers for zero: so values are compared first.
    if not OPERATORS.search(texts[0]) or not all(
        FOR_SYMPY.fullmatch(text) and text == text.lower() and "." not in text for text in texts
    ):
        return False
    one, other = (_parse(text) for text in texts)
    variables = getattr(one, "free_symbols", None)
    if variables is None or variables != getattr(other, "free_symbols", None):
        return False
    for start in (2, 3, 5):
        point = {variable: start + index for index, variable in enumerate(sorted(variables, key=str))}
        try:
            a, b = (complex(each.subs(point).doit().evalf(30)) for each in (one, other))
        except (TypeError, AttributeError):  # sympy finds no value
            return False
        if not abs(a - b) <= 1e-12 * max(abs(a), abs(b)):  # a NaN is not equal
            return False
    return bool(load_library().verify(one, other, timeout_seconds=None))


def _parse(latex: str):
    """Returns sympy's expression, None where there is none. The library's reader of plain text would call `eval`."""
    library = load_library()
    config = [library.LatexExtractionConfig(boxed_match_priority=0)]
    found = library.parse(f"\\boxed{{{latex}}}", extraction_config=config, parsing_timeout=None)
    return found[0] if found else None


@cache
def load_library() -> ModuleType:
    """Returns math-verify, which brings sympy and takes a second to load; ImportError where it is not installed."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that without its own timeouts it may hang
    return math_verify
