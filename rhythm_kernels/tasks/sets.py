"""The named sets of problems: where each lies, which columns make a problem, and how it is evaluated.

A set is named as in SETS, `math-500`, or with a local JSONL file of the same columns in its place,
`math-500:my.jsonl`. `countdown`, `maths` and `choice` are sets without a place of their own: they read files
(`maths:my.jsonl` with the columns problem and answer), and `countdown` makes its problems here where no file is given.
"""

import gzip
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rhythm_kernels.tasks import choice, countdown, maths
from rhythm_kernels.tasks.types import BadRow, BadSet, Problem, UnusableRow, read_column

HELD_OUT = 512  # problems of a set's test part, where the set has only one split
TRAIN = 20_000  # and at most so many of its train part
SPLIT_SEED = 0
GZIP = b"\x1f\x8b"
LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # or both halves of a pair: json tells them apart
PAPER_MATHS = ("aime24", "aime25", "amc23", "math-500", "olympiadbench")


@dataclass(frozen=True)
class ProblemSet:
    """`build` makes a problem of the row's `columns`, then its `optional` ones (None where absent)."""

    build: Callable[..., Problem]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    place: tuple[str, str | None, str] | None = None  # path, configuration and split on the Hugging Face hub
    part: str = ""  # train or test of a set that is split here, the same way every time
    answers: int = 1  # to each problem, in evaluation
    evaluate: tuple[str, ...] = ()  # the sets that a run which trains on this one is evaluated on, unless told


MATHS = (maths.from_row, ("problem", "answer"))
DAPO = (maths.from_row, ("prompt", "solution"))
COUNTDOWN = (countdown.from_row, ("nums", "target"))
TINYZERO = (countdown.from_row_of_four, ("nums", "target"), (), ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train"))
CROSSTHINK = (
    choice.from_row,
    ("prompt", "reward_model.ground_truth"),
    (),
    ("nvidia/Nemotron-CrossThink", None, "train_qa"),
)

SETS = {
    "countdown": ProblemSet(*COUNTDOWN, part="train", evaluate=("countdown-test",)),
    "countdown-test": ProblemSet(*COUNTDOWN, part="test"),
    "tinyzero": ProblemSet(*TINYZERO, part="train", evaluate=("tinyzero-test",)),
    "tinyzero-test": ProblemSet(*TINYZERO, part="test"),
    "crossthink-qa": ProblemSet(*CROSSTHINK, part="train", evaluate=("crossthink-qa-test",)),
    "crossthink-qa-test": ProblemSet(*CROSSTHINK, part="test"),
    "dapo-math": ProblemSet(*DAPO, (), ("open-r1/DAPO-Math-17k-Processed", "all", "train"), evaluate=PAPER_MATHS),
    "dapo-math-en": ProblemSet(*DAPO, (), ("open-r1/DAPO-Math-17k-Processed", "en", "train"), evaluate=PAPER_MATHS),
    "aime24": ProblemSet(*MATHS, (), ("HuggingFaceH4/aime_2024", None, "train"), answers=16),
    "aime25": ProblemSet(*MATHS, (), ("math-ai/aime25", None, "test"), answers=16),
    "amc23": ProblemSet(maths.from_row, ("question", "answer"), (), ("math-ai/amc23", None, "test")),
    "math-500": ProblemSet(*MATHS, (), ("HuggingFaceH4/MATH-500", None, "test")),
    "olympiadbench": ProblemSet(
        maths.from_row_of_parts,
        ("question", "final_answer"),
        ("context",),
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
    ),
    "gsm8k": ProblemSet(maths.from_row, ("question", "answer"), (), ("openai/gsm8k", "main", "test")),
    "maths": ProblemSet(*MATHS, ("context",)),
    "choice": ProblemSet(choice.from_row, ("question", "answer"), ("options",)),
}


def find_set(name: str) -> tuple[ProblemSet, Path | None]:
    """The set called `name`, as in SETS or with a file behind a colon, and that file. BadSet for an unknown one."""
    key, _, file = name.partition(":")
    if key not in SETS:
        hint = f" (a file is named with the set whose columns it has: maths:{name})" if Path(name).suffix else ""
        raise BadSet(f"a set of problems must be one of {', '.join(SETS)}, or SET:FILE.jsonl, got {name!r}{hint}")
    if not file and (":" in name or (SETS[key].place is None and key not in GENERATED)):
        raise BadSet(f"{name!r} needs a file: {key}:FILE.jsonl")
    return SETS[key], Path(file) if file else None


def load_set(name: str, say: Callable[[str], object] = print) -> list[Problem]:
    """The problems of a named set or a local file, in their order.

    `say` is told how many rows give no problem, among them those whose answer cannot be earned, and how many repeat
    another, where there are any. BadSet for an unknown name, a place that does not load, a row without a column
    and one with text that is no unicode: with file, line and what arrived.
    """
    found, file = find_set(name)
    if file is not None:
        rows = _rows_of_file(file)
    elif found.place is not None:
        rows = _rows_of_hub(name, *found.place)
    else:
        rows = ((f"{name}, row {index}", row) for index, row in enumerate(GENERATED[name]()))
    problems = _build(name, found, rows, say)
    if file is None and found.part:
        problems = _take_part(name, found.part, problems, say)
    else:
        _tell_repeats(name, problems, say)
    if not problems:
        raise BadSet(f"{name!r} holds no problems")
    return problems


def drop_overlap(train: Iterable[Problem], held_out: Iterable[Problem]) -> tuple[list[Problem], int]:
    """`train` without the problems that are also in `held_out`, and how many those were."""
    known, train = {identify(problem) for problem in held_out}, list(train)
    kept = [problem for problem in train if identify(problem) not in known]
    return kept, len(train) - len(kept)


def identify(problem: Problem) -> str:
    """Equal for problems that ask the same: of Countdown, whatever the order of the numbers; else by the prompt."""
    return problem.answer if problem.verifier == "countdown" else " ".join(problem.prompt.casefold().split())


def _rows_of_file(path: Path) -> Iterator[tuple[str, Mapping]]:
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise BadSet(f"{where}: no JSON: {error}") from None
                if LONE_SURROGATE.search(line) and not _is_unicode(row):
                    raise BadSet(f"{where}: half of a surrogate pair is no text, got {line.strip()[:160]}")
                if not isinstance(row, dict):
                    raise BadSet(f"{where}: a row must be an object with columns, got {line.strip()[:160]}")
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise BadSet(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise BadSet(f"{path} must be JSONL in UTF-8, gzipped or not: {error}") from error


def _open(path: Path) -> TextIO:
    """A file of lines, unpacked where it is gzipped, whatever its name; a byte order mark at its start is no text."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    return gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig")


def _is_unicode(row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows_of_hub(name: str, path: str, config: str | None, split: str) -> Iterator[tuple[str, Mapping]]:
    import datasets  # here: it is needed for the hub's sets only

    try:
        rows = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # of the network, the hub or the set: there is no common class
        raise BadSet(
            f"{name!r}: {path} on the Hugging Face hub does not load ({type(error).__name__}: {error}); "
            f"a copy in a file is named {name}:FILE.jsonl"
        ) from error
    for index, row in enumerate(rows):
        yield f"{path}, row {index}", row


def _rows_of_countdown() -> Iterator[dict]:
    return countdown.generate_rows(TRAIN + HELD_OUT, SPLIT_SEED)


GENERATED = {"countdown": _rows_of_countdown, "countdown-test": _rows_of_countdown}


def _build(name: str, found: ProblemSet, rows: Iterator[tuple[str, Mapping]], say: Callable) -> list[Problem]:
    problems, unusable = [], []
    for where, row in rows:
        try:
            values = [read_column(row, column) for column in found.columns]
            problems.append(found.build(*values, *(row.get(column) for column in found.optional)))
        except BadRow as error:
            raise BadSet(f"{where}: {error}") from error
        except UnusableRow as error:
            unusable.append(f"{where}: {error}")
    if unusable:
        first = "; ".join(unusable[:3])
        say(f"{name}: {len(unusable)} of {len(unusable) + len(problems)} rows left out, the first {first}")
    return problems


def _tell_repeats(name: str, problems: list[Problem], say: Callable):
    """They stay, since their number may be meant; two answers to one question rarely are."""
    answers: dict[str, set[str]] = {}
    for problem in problems:
        answers.setdefault(identify(problem), set()).add(problem.answer)
    repeats, torn = len(problems) - len(answers), sum(len(each) > 1 for each in answers.values())
    if repeats:
        what = f", {torn} of the questions with other answers" if torn else ""
        say(f"{name}: {repeats} of {len(problems)} problems repeat another{what}")


def _take_part(name: str, part: str, problems: list[Problem], say: Callable) -> list[Problem]:
    """One side of a seeded split in which no problem is on both sides."""
    distinct = list({identify(problem): problem for problem in reversed(problems)}.values())[::-1]
    if len(distinct) < len(problems):
        say(f"{name}: {len(problems) - len(distinct)} of {len(problems)} problems left out as repeats of others")
    if len(distinct) <= HELD_OUT:
        raise BadSet(f"{name!r} has {len(distinct)} problems: too few to hold out {HELD_OUT}")
    random.Random(SPLIT_SEED).shuffle(distinct)
    return distinct[:HELD_OUT] if part == "test" else distinct[HELD_OUT : HELD_OUT + TRAIN]
