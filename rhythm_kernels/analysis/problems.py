"""The problems of a study: generated from a seed, of the trainer's sets, or of a file; and which answers are right."""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rhythm_kernels import tasks
from rhythm_kernels.checks import check_int
from rhythm_kernels.tasks.answers import same
from rhythm_kernels.tasks.maths import FINAL
from rhythm_kernels.tasks.sets import SETS, load_set
from rhythm_kernels.tasks.types import last_boxed

GSM, GYM = "gsm", "gym"
GSM_END = " Give the result as your final answer. Do not include units."
"""The end of each problem of reasoning-gym. It is removed: with it, a small model gives the bare result, which has too
few tokens to study."""
STEPS = " Explain step by step."
"""The end of a problem in a chat template."""
SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)")
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
LONGEST_LINE = 2**20  # bytes
FIELDS = ("prompt", "question")


class Problem(NamedTuple):
    """A problem in words."""

    text: str
    gold: str | None
    """The right final answer, if it is known."""
    verify: Callable[[str], float] | None = None
    """Gives 1 for an answer that is right; without it the final answer is compared with the gold one."""
    is_whole: bool = False
    """Whether the text says how to answer, as a prompt of the training does, so that a study adds nothing to it."""


JEWELS = Problem(
    "Siobhan has 2 fewer jewels than Aaron. Aaron has 5 more jewels than half of Raymond's jewels. If Raymond has 40 "
    "jewels, how many jewels does Siobhan have?",
    "23",
)
"""The problem of the paper's Fig. 2. Source: the test set of GSM8K (Cobbe et al., 2021), MIT licence."""


# ---- the text of a prompt and the answer to it -----------------------------------------------------------------------


def paper_prompt(text: str) -> str:
    """Returns a problem in the paper's plain text for a base model (A.1); the last sentence is the question.

    The paper does not show what follows the question: here it is a line break.
    """
    *context, question = SENTENCE_END.split(text.strip())
    lines = [f"System: {SYSTEM}", *([f"Context: {' '.join(context)}"] if context else []), f"Question: {question}"]
    return "\n".join(lines) + "\n"


def final_answer(text: str) -> str | None:
    r"""Returns the content of the last \boxed{} of a text, or its last number, or None."""
    numbers = NUMBER.findall(text)
    return last_boxed(text) or (numbers[-1] if numbers else None)


def is_right(problem: Problem, text: str) -> bool | None:
    """Returns whether a text ends in the right answer, or None for a problem without one."""
    if problem.verify is not None:
        return problem.verify(text) == 1
    if problem.gold is None:
        return None
    given = final_answer(text)
    return given is not None and same(problem.gold, given)


# ---- where problems come from ----------------------------------------------------------------------------------------


def load_problems(task: str, count: int, seed: int) -> list[Problem]:
    """Returns `count` problems, or all problems of a file that has fewer, in an order that the seed draws.

    More problems of the same seed begin with the same ones.

    Args:
        task: "gsm" for GSM-Symbolic of reasoning-gym, grade-school word problems from templates; gym:NAME for another
            of its tasks, with its options behind commas (gym:chain_sum,max_terms=3); a set of the trainer, or
            SET:FILE.jsonl, as in `load_set`; else the path of a JSONL file with a "prompt" or a "question" in each
            line, and the right answer in "answer" if it is known, as in GSM8K's files.

    Raises:
        ValueError: a line of the file is no problem (the message has its number), the file is empty, the task has
            another name or other options, or reasoning-gym is not installed.
        OSError: the file cannot be read.
    """
    check_int("problems", count, 1)
    check_int("seed", seed, 0)
    kind, _, name = task.partition(":")
    if task == GSM:
        rows = _gym("gsm_symbolic", count, seed)
        return [Problem(rows[i]["question"].removesuffix(GSM_END), rows[i]["answer"]) for i in range(count)]
    if kind == GYM:
        rows = _gym(name, count, seed)
        return [Problem(rows[i]["question"], rows[i]["answer"], partial(_score, rows, rows[i])) for i in range(count)]
    if kind in SETS:
        problems = [Problem(one.prompt, one.answer, partial(_verify, one), True) for one in load_set(task)]
    else:
        problems = read_problems(Path(task))
    random.Random(seed).shuffle(problems)
    return problems[:count]


def _gym(task: str, count: int, seed: int):
    """Returns `count` rows of a task of reasoning-gym, NAME or NAME,OPTION=VALUE,..., with its score function."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"{task} needs the package reasoning-gym ({error}): pip install reasoning-gym, or give --task FILE.jsonl"
        ) from error
    name, *parts = task.split(",")
    if name not in DATASETS:
        raise ValueError(f"gym:NAME must name a task of reasoning-gym, such as gym:chain_sum, got {name!r}")
    known = sorted({option.name for option in fields(DATASETS[name][1])} - {"seed", "size"})
    options = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals or option not in known:
            raise ValueError(f"gym:{name} takes OPTION=VALUE, one of {', '.join(known)}, got {part!r}")
        options[option] = _option_value(value)
    # reasoning-gym draws each problem from seed + index, so consecutive seeds would share all problems but one
    draw = random.Random(seed).getrandbits(31)
    try:
        return reasoning_gym.create_dataset(name, seed=draw, size=count, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"gym:{task} is refused by reasoning-gym: {error}") from error


def _option_value(text: str) -> object:
    """Returns the number, truth value or list that a text is in JSON, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _score(rows, row: dict, text: str) -> float:
    return rows.score_answer(final_answer(text), row)


def _verify(problem: tasks.Problem, text: str) -> float:
    """Returns the reward of the trainer's verifier, except that sums and integrals are not asked of math-verify.

    It may hang, and there is no process here that could be killed.
    """
    if problem.verifier != "maths":
        return tasks.VERIFIERS[problem.verifier](text, problem.answer)
    boxed = last_boxed(text)
    return float(bool(boxed) and any(same(gold, boxed) for gold in json.loads(problem.answer)))


def read_problems(path: Path) -> list[Problem]:
    """Returns the problems of a JSONL file; empty lines are skipped."""
    problems: list[Problem] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes")
            if line.strip():
                problems.append(_problem(line, f"{path}, line {number}"))
    if not problems:
        raise ValueError(f"{path} has no problem")
    return problems


def _problem(line: bytes, where: str) -> Problem:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # without a byte order mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON in UTF-8 ({error})"[:300]) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object, got {type(row).__name__}")
    names = [name for name in FIELDS if name in row]
    if len(names) != 1:
        raise ValueError(f'{where}: must have a "prompt" or a "question", got {", ".join(map(repr, row))}'[:300])
    text = _text(row[names[0]], names[0], where)
    gold = row.get("answer")
    if gold is None:
        return Problem(text, None)
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise ValueError(f"{where}: answer must be text or a number, got {gold!r}"[:300])
    if isinstance(gold, float) and not math.isfinite(gold):
        raise ValueError(f"{where}: answer must be finite, got {gold!r}")
    return Problem(text, _text(str(gold), "answer", where).rpartition(FINAL)[2].strip() or None)


def _text(text, name: str, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {name} must be a text, got {text!r}"[:300])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can write one, no tokenizer reads it
        raise ValueError(f"{where}: {name} is not Unicode text") from None
    return text
