"""The named sets of problems: where each lies, which columns make a problem, and how it is evaluated.

A set is named as in SETS, `math-500`, or with a local JSONL file of the same columns in its place,
`math-500:my.jsonl`. `countdown`, `words`, `maths` and `choice` are sets without a place of their own: they read files
(`maths:my.jsonl` with the columns problem and answer), and `countdown` makes its problems here where no file is given.
"""

import gzip
import io
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rhythm_kernels.tasks import choice, countdown, maths, words
from rhythm_kernels.tasks.types import BadRow, BadSet, Problem, UnusableRow, read_column

HELD_OUT = 512  # problems of a set's test part, where the set has only one split
TRAIN = 20_000  # and at most so many of its train part
SPLIT_SEED = 0
GZIP = b"\x1f\x8b"
PAPER_MATHS = ("aime24", "aime25", "amc23", "math-500", "olympiadbench")


@dataclass(frozen=True)
class ProblemSet:
    """A set of problems: `build` makes one from a row's `columns`, then its `optional` ones (None where absent)."""

    build: Callable[..., Problem]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    place: tuple[str, str | None, str] | None = None  # path, configuration and split on the Hugging Face hub
    part: str = ""  # "train" or "test" of a set that is split here, the same way every time
    answers: int = 1  # to each problem, in evaluation
    evaluate: tuple[str, ...] = ()  # of a set to train on: the sets that such a run is evaluated on by default


MATHS = (maths.from_row, ("problem", "answer"))
DAPO = (maths.from_row, ("prompt", "solution"))
GSM8K = (maths.from_row, ("question", "answer"))
COUNTDOWN = (countdown.from_row, ("nums", "target"))
TINYZERO = (countdown.from_row_of_four, ("nums", "target"), (), ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train"))
CROSSTHINK_COLUMNS = ("prompt", "reward_model.ground_truth")
CROSSTHINK = (choice.from_row, CROSSTHINK_COLUMNS, (), ("nvidia/Nemotron-CrossThink", None, "train_qa"))
GENERATED = ("countdown", "countdown-test")  # from a seed, where no file is given

SETS = {
    "countdown": ProblemSet(*COUNTDOWN, part="train", evaluate=("countdown-test",)),
    "countdown-test": ProblemSet(*COUNTDOWN, part="test"),
    "tinyzero": ProblemSet(*TINYZERO, part="train", evaluate=("tinyzero-test",)),
    "tinyzero-test": ProblemSet(*TINYZERO, part="test"),
    "crossthink-qa": ProblemSet(*CROSSTHINK, part="train", evaluate=("crossthink-qa-test",)),
    "crossthink-qa-test": ProblemSet(*CROSSTHINK, part="test"),
    "dapo-math": ProblemSet(*DAPO, place=("open-r1/DAPO-Math-17k-Processed", "all", "train"), evaluate=PAPER_MATHS),
    "dapo-math-en": ProblemSet(*DAPO, place=("open-r1/DAPO-Math-17k-Processed", "en", "train"), evaluate=PAPER_MATHS),
    "aime24": ProblemSet(*MATHS, place=("HuggingFaceH4/aime_2024", None, "train"), answers=16),
    "aime25": ProblemSet(*MATHS, place=("math-ai/aime25", None, "test"), answers=16),
    "amc23": ProblemSet(maths.from_row, ("question", "answer"), place=("math-ai/amc23", None, "test")),
    "math-500": ProblemSet(*MATHS, place=("HuggingFaceH4/MATH-500", None, "test")),
    "olympiadbench": ProblemSet(
        maths.from_row_of_parts,
        ("question", "final_answer"),
        ("context",),
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
    ),
    "gsm8k": ProblemSet(*GSM8K, place=("openai/gsm8k", "main", "test")),
    "gsm8k-train": ProblemSet(*GSM8K, place=("openai/gsm8k", "main", "train"), evaluate=("gsm8k",)),
    "words": ProblemSet(words.from_row, ("numbers", "target")),
    "maths": ProblemSet(*MATHS, ("context",)),
    "choice": ProblemSet(choice.from_row, ("question", "answer"), ("options",)),
}


def find_set(name: str) -> tuple[ProblemSet, Path | None]:
    """Returns the set called `name` and the file behind the name's colon, if any; raises BadSet for an unknown name."""
    key, _, file = name.partition(":")
    if key not in SETS:
        hint = f" (a file is named with the set whose columns it has: maths:{name})" if Path(name).suffix else ""
        raise BadSet(f"a set of problems must be one of {', '.join(SETS)}, or SET:FILE.jsonl, got {name!r}{hint}")
    if not file and (":" in name or (SETS[key].place is None and key not in GENERATED)):
        raise BadSet(f"{name!r} needs a file: {key}:FILE.jsonl")
    return SETS[key], Path(file) if file else None


def load_set(name: str, say: Callable[[str], object] = print) -> list[Problem]:
    """Returns the problems of a named set or a local file, in their order.

    `say` is told how many rows give no problem, such as one whose answer cannot be earned, and how many problems repeat
    another.

    Raises:
        BadSet: an unknown name, a set that does not load, or a row that cannot be read, with its file and line.
    """
    source, file = find_set(name)
    if file is not None:
        rows = _rows_of_file(file)
    elif source.place is not None:
        rows = _rows_of_hub(name, *source.place)
    else:
        generated = countdown.generate_rows(TRAIN + HELD_OUT, SPLIT_SEED)
        rows = ((f"{name}, row {index}", row) for index, row in enumerate(generated))
    problems = _build(name, source, rows, say)
    if file is None and source.part:
        problems = _take_part(name, source.part, problems, say)
    else:
        _tell_repeats(name, problems, say)
    if not problems:
        raise BadSet(f"{name!r} holds no problems")
    return problems


def drop_overlap(train: Iterable[Problem], held_out: Iterable[Problem]) -> tuple[list[Problem], int]:
    """Returns `train` without the problems that are also in `held_out`, and how many those were."""
    known, train = {identify(problem) for problem in held_out}, list(train)
    kept = [problem for problem in train if identify(problem) not in known]
    return kept, len(train) - len(kept)


def identify(problem: Problem) -> str:
    """Returns a key that is equal for problems that ask the same: in Countdown, the same numbers in any order."""
    return problem.answer if problem.verifier == "countdown" else " ".join(problem.prompt.casefold().split())


def _rows_of_file(path: Path) -> Iterator[tuple[str, Mapping]]:
    """Yields the rows of a JSONL file, gzipped or not, whatever its name, each with its place."""
    try:
        content = path.read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")  # without a byte order mark
    except (OSError, EOFError, zlib.error) as error:
        raise BadSet(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise BadSet(f"{path} must be JSONL in UTF-8, gzipped or not: {error}") from error
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        where, shown = f"{path}, line {number}", line.strip()[:160]
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadSet(f"{where}: half of a surrogate pair is no text, got {shown}") from None
        except (ValueError, RecursionError) as error:
            raise BadSet(f"{where}: no JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadSet(f"{where}: a row must be an object with columns, got {shown}")
        yield where, row


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


def _build(name: str, source: ProblemSet, rows: Iterator[tuple[str, Mapping]], say: Callable) -> list[Problem]:
    problems, unusable = [], []
    for where, row in rows:
        try:
            values = [read_column(row, column) for column in source.columns]
            problems.append(source.build(*values, *(row.get(column) for column in source.optional)))
        except BadRow as error:
            raise BadSet(f"{where}: {error}") from error
        except UnusableRow as error:
            unusable.append(f"{where}: {error}")
    if unusable:
        first = "; ".join(unusable[:3])
        say(f"{name}: {len(unusable)} of {len(unusable) + len(problems)} rows left out, the first {first}")
    return problems


def _tell_repeats(name: str, problems: list[Problem], say: Callable):
    """Tells of repeated problems. They stay, since their number may be meant; two answers to a question rarely are."""
    answers: dict[str, set[str]] = {}
    for problem in problems:
        answers.setdefault(identify(problem), set()).add(problem.answer)
    repeats, torn = len(problems) - len(answers), sum(len(each) > 1 for each in answers.values())
    if repeats:
        what = f", {torn} of the questions with other answers" if torn else ""
        say(f"{name}: {repeats} of {len(problems)} problems repeat another{what}")


def _take_part(name: str, part: str, problems: list[Problem], say: Callable) -> list[Problem]:
    """Returns one side of a seeded split in which no problem is on both sides."""
    distinct = list({identify(problem): problem for problem in reversed(problems)}.values())[::-1]
    if len(distinct) < len(problems):
        say(f"{name}: {len(problems) - len(distinct)} of {len(problems)} problems left out as repeats of others")
    if len(distinct) <= HELD_OUT:
        raise BadSet(f"{name!r} has {len(distinct)} problems: too few to hold out {HELD_OUT}")
    random.Random(SPLIT_SEED).shuffle(distinct)
    return distinct[:HELD_OUT] if part == "test" else distinct[HELD_OUT : HELD_OUT + TRAIN]
