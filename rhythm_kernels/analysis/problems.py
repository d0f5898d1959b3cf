"""The problems of a study: word problems that are generated from a seed, or those of a file."""

import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from rhythm_kernels.checks import check_int
from rhythm_kernels.tasks.answers import same
from rhythm_kernels.tasks.types import last_boxed

GSM = "gsm"
GSM_END = " Give the result as your final answer. Do not include units."
"""The end of each problem of reasoning-gym. It is removed: with it, a small model gives the bare result, which has too
few tokens to study."""
STEPS = " Explain step by step."
"""The end of a problem in a chat template."""
SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)")
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
FINAL = "####"  # before the answer at the end of GSM8K's solutions
LONGEST_LINE = 2**20  # bytes
FIELDS = ("prompt", "question")


class Problem(NamedTuple):
    """A problem in words."""

    text: str
    gold: str | None
    """The right final answer, if it is known."""


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
    if problem.gold is None:
        return None
    given = final_answer(text)
    return given is not None and same(problem.gold, given)


# ---- where problems come from ----------------------------------------------------------------------------------------


def load_problems(task: str, count: int, seed: int) -> list[Problem]:
    """Returns `count` problems, or all problems of a file that has fewer, in an order that the seed draws.

    More problems of the same seed begin with the same ones.

    Args:
        task: "gsm" for GSM-Symbolic of reasoning-gym, grade-school word problems from templates; else the path of a
            JSONL file with a "prompt" or a "question" in each line, and the right answer in "answer" if it is known,
            as in GSM8K's files.

    Raises:
        ValueError: a line of the file is no problem (the message has its number), the file is empty, or reasoning-gym
            is not installed.
        OSError: the file cannot be read.
    """
    check_int("problems", count, 1)
    check_int("seed", seed, 0)
    if task == GSM:
        return _gsm(count, seed)
    problems = read_problems(Path(task))
    random.Random(seed).shuffle(problems)
    return problems[:count]


def _gsm(count: int, seed: int) -> list[Problem]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(
            f"the task gsm needs the package reasoning-gym ({error}): pip install reasoning-gym, or give --task "
            "FILE.jsonl"
        ) from error
    # reasoning-gym draws each problem from seed + index, so consecutive seeds would share all problems but one
    rows = reasoning_gym.create_dataset("gsm_symbolic", seed=random.Random(seed).getrandbits(31), size=count)
    return [Problem(rows[i]["question"].removesuffix(GSM_END), rows[i]["answer"]) for i in range(count)]


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
        row = json.loads(line.decode("utf-8"))
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
    return Problem(text, _text(str(gold), "answer", where).rpartition(FINAL)[2].strip() or None)


def _text(text, name: str, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {name} must be a text, got {text!r}"[:300])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can write one, no tokenizer reads it
        raise ValueError(f"{where}: {name} is not Unicode text") from None
    return text
