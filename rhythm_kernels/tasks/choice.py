r"""Questions with options, or with a few words as the answer, which goes into \boxed{}."""

import json
import re
import string
import unicodedata
from collections.abc import Mapping

from rhythm_kernels.tasks.types import BadRow, Problem, UnusableRow, last_boxed, require_earnable, require_text, shorten

LETTERS = string.ascii_uppercase
OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*)$", re.MULTILINE)
LETTER = re.compile(r"\(?([A-Za-z])\)?[.:)]?")
LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[.:)])\s*(\S.*)", re.DOTALL)
WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname)\s*\{([^{}]*)\}")


def from_row(question, answer, options=None) -> Problem:
    """Returns the problem of a question, its answer (a letter or the words) and its options, if any.

    Args:
        question: text, or a chat, whose last turn by the user is taken.
        answer: the letter of the right option, or its words.
        options: a list of texts, or texts by letter. If None, options are read that the question lists line by line,
            as in `B. ...` or `(B) ...`.
    """
    text, gold = require_text(_last_turn(question), "question"), require_text(answer, "answer")
    listed = options is None
    choices = dict(OPTION_LINE.findall(text)) if listed else _by_letter(options)
    letter, words = _read(gold)
    if letter is None or not (listed or letter in choices):
        letter, words = None, gold
    if letter is None:
        letter = next((key for key, option in choices.items() if _plain(option) == _plain(gold)), None)
        if letter is None and not listed:
            raise UnusableRow(f"the answer {shorten(gold)} is none of the options {shorten(choices)}")
    if letter in choices:
        words = choices[letter]
    if letter is None and not _plain(gold):
        raise UnusableRow(f"the answer {shorten(gold)} says nothing")
    if not listed:
        text = "\n".join([text, "", *(f"{key}. {option}" for key, option in choices.items())])
    if r"\boxed" not in text:
        what = "the letter of the right option" if letter else "the answer, and nothing else,"
        text = f"{text}\n\nReason step by step, and put {what} inside \\boxed{{}}."
    answer = json.dumps({"letter": letter, "text": words})
    require_earnable(letter or words, answer, verify)
    return Problem(text, answer, "choice")


def verify(completion: str, answer: str) -> float:
    r"""Returns 1.0 if the last \boxed{} holds the gold's letter, its text, or both, else 0.0."""
    boxed = last_boxed(completion)
    if not boxed:
        return 0.0
    gold = json.loads(answer)
    letter, words = _read(boxed)
    if letter is not None and gold["letter"] is not None:
        agrees = words is None or gold["text"] is None or _plain(words) == _plain(gold["text"])
        return float(letter == gold["letter"] and agrees)
    return float(gold["text"] is not None and _plain(boxed) == _plain(gold["text"]))


def _last_turn(question):
    """Returns the content of the user's last turn where `question` is a chat, else `question`."""
    if not isinstance(question, list):
        return question
    turns = [turn for turn in question if isinstance(turn, Mapping) and turn.get("role") == "user"]
    if not turns or "content" not in turns[-1]:
        raise BadRow(f"the question must be text or a chat with a turn by the user, got {shorten(question)}")
    return turns[-1]["content"]


def _by_letter(options) -> dict[str, str]:
    items = list(options.items()) if isinstance(options, Mapping) else None
    if isinstance(options, list) and len(options) <= len(LETTERS):
        items = list(zip(LETTERS, options))
    if not items or not all(key in LETTERS and len(key) == 1 and isinstance(text, str) for key, text in items):
        raise BadRow(
            f"options must be at most {len(LETTERS)} texts, or texts by capital letter, got {shorten(options)}"
        )
    choices = {}
    for key, text in items:
        letter, words = _read(text)
        choices[key] = words if words is not None and letter == key else text.strip()
    return choices


def _read(text: str) -> tuple[str | None, str | None]:
    """Returns letter and words of `B`, `(B)`, `B.`, `B. Paris` or `(B) Paris`; no letter for anything else."""
    text = _unwrap(text)
    if match := LETTER.fullmatch(text):
        return match[1].upper(), None
    if match := LETTER_AND_TEXT.fullmatch(text):
        return (match[1] or match[2]).upper(), match[3].strip()
    return None, None


def _unwrap(text: str) -> str:
    r"""Returns `text` without $ around it and without \text{} and its kin."""
    previous = None
    while previous != text:
        previous, text = text, WRAPPER.sub(r"\1", text).strip().strip("$").strip()
    return text


def _plain(text: str) -> str:
    """Returns `text` as it is compared: unwrapped, in lower case, single spaces, no full stop at its end."""
    return " ".join(unicodedata.normalize("NFKC", _unwrap(text)).casefold().split()).rstrip(". ")
