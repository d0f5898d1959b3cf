"""The problems of a study: word problems that are generated from a seed, or prompts from a file."""

import json
import random
from pathlib import Path

from rhythm_kernels.checks import check_int

GSM = "gsm"
GSM_END = " Give the result as your final answer. Do not include units."
"""The end of each problem of reasoning-gym. It is removed: with it, a small model gives the bare result, which has too
few tokens to study."""
STEPS = " Explain step by step."
LONGEST_LINE = 2**20  # bytes
FIELDS = ("prompt", "question")


def load_problems(task: str, count: int, seed: int) -> list[str]:
    """Returns the texts of `count` problems, or of all problems in a file that has fewer.

    Args:
        task: "gsm" for GSM-Symbolic of reasoning-gym, grade-school word problems from templates; else the path of a
            JSONL file with a "prompt" or a "question" in each line, of which the first `count` are taken.
        seed: chooses the problems of "gsm".

    Raises:
        ValueError: a line of the file is no problem (the message has its number), the file is empty, or reasoning-gym
            is not installed.
        OSError: the file cannot be read.
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
    # reasoning-gym draws each problem from seed + index, so consecutive seeds would share all problems but one
    dataset = reasoning_gym.create_dataset("gsm_symbolic", seed=random.Random(seed).getrandbits(31), size=count)
    return [dataset[index]["question"].removesuffix(GSM_END) + STEPS for index in range(count)]


def read_problems(path: Path, count: int) -> list[str]:
    """Returns the first `count` problems of a JSONL file; empty lines are skipped."""
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
    names = [name for name in FIELDS if name in row]
    if len(names) != 1:
        raise ValueError(f'{where}: must have a "prompt" or a "question", got {", ".join(map(repr, row))}'[:300])
    text = row[names[0]]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {names[0]} must be a text, got {text!r}"[:300])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can write one, no tokenizer reads it
        raise ValueError(f"{where}: {names[0]} is not Unicode text") from None
    return text
