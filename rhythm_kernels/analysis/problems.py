"""The problems that a model is studied on: word problems made on the spot, or prompts from a file."""

import json
import random
from pathlib import Path

from rhythm_kernels.checks import check_int

GSM = "gsm"
GSM_END = " Give the result as your final answer. Do not include units."
"""How reasoning-gym ends a problem; a small model then gives the result alone, and there is no answer to look at."""
STEPS = " Explain step by step."
LONGEST_LINE = 2**20  # bytes of a file's line
FIELDS = ("prompt", "question")


def load_problems(task: str, count: int, seed: int) -> list[str]:
    """The texts of `count` problems, or of all that a file has where it has fewer.

    Args:
        task: "gsm": GSM-Symbolic of reasoning-gym, grade-school word problems from templates, to be explained; else a
            JSONL file with a "prompt" or a "question" in each line, of which the first `count` are taken.
        seed: of "gsm".

    Raises:
        ValueError: a line of the file that has no problem, with its number; no line at all; no reasoning-gym.
        OSError: no such file.
    """
    check_int("problems", count, 1)
    check_int("seed", seed, 0)
    return _gsm(count, seed) if task == GSM else read_problems(Path(task), count)


def _gsm(count: int, seed: int) -> list[str]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(
            f"the task gsm needs the package reasoning-gym ({error}): pip install reasoning-gym, or give --task "
            "FILE.jsonl"
        ) from error
    # a problem is drawn from seed + index: seeds that follow each other would share all but one
    found = reasoning_gym.create_dataset("gsm_symbolic", seed=random.Random(seed).getrandbits(31), size=count)
    return [found[index]["question"].removesuffix(GSM_END) + STEPS for index in range(count)]


def read_problems(path: Path, count: int) -> list[str]:
    """The first `count` problems of a JSONL file; empty lines are skipped."""
    problems: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes")
            if line.strip():
                problems.append(_problem(line, f"{path}, line {number}"))
            if len(problems) == count:
                break
    if not problems:
        raise ValueError(f"{path} has no problem")
    return problems


def _problem(line: bytes, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON in UTF-8 ({error})"[:300]) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object, got {type(row).__name__}")
    given = [name for name in FIELDS if name in row]
    if len(given) != 1:
        raise ValueError(f'{where}: must have a "prompt" or a "question", got {", ".join(map(repr, row))}'[:300])
    text = row[given[0]]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {given[0]} must be a text, got {text!r}"[:300])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and no tokenizer reads
        raise ValueError(f"{where}: {given[0]} is not Unicode text") from None
    return text
