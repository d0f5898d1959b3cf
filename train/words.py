"""Makes problems, tokenizer and demonstrations of the tiny Countdown; rhythm_kernels.tasks.words has its verifier.

In a demonstration an attempt that misses the target ends in `x`, one that hits it in `!`.
"""

import itertools
import math
import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rhythm_kernels.tasks import Problem
from rhythm_kernels.tasks.words import ANSWER, Puzzle
from train.config import BadSetting, Words

LARGEST_NUMBER = 99  # every integer from 0 to here is a token; no step of an attempt leaves this range
PAD, EOS = "<pad>", "<eos>"
SIGNS = ("+", "-", "*", "/", "(", ")", "=", ",", "x", "!", "A", "?", ">")
MISS, HIT = "x", "!"
ODDS_OF_MISSES = (0.35, 0.3, 0.2, 0.15)  # of 0, 1, 2 and 3 misses in a demonstration
GIVE_UP = 0.25  # share of the demonstrations with a miss that end with it as the answer


class Attempt(NamedTuple):
    """One way to combine all the numbers: the worked steps, the expression that they make, and its value."""

    steps: str
    expression: str
    value: int


class Split(NamedTuple):
    """Problems to train on and problems held out; no number multiset occurs in both."""

    train: list[Problem]
    held_out: list[Problem]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each word of this task."""
    words = [PAD, EOS, *SIGNS, *map(str, range(LARGEST_NUMBER + 1))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(prefix="\0", cleanup=False)  # joins words by single spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _combine(a: int, b: int, operators: str) -> list[tuple[str, int]]:
    """Returns every allowed `a sign b`, a >= b, whose result is a token, as (sign, result)."""
    results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else -1}
    return [(sign, results[sign]) for sign in operators if 0 <= results[sign] <= LARGEST_NUMBER]


@cache
def attempts(numbers: tuple[int, ...], operators: str) -> tuple[Attempt, ...]:
    """Returns all attempts: two of the values are repeatedly replaced by their combination, the larger first."""

    def reduce(terms: list[tuple[int, str]], steps: list[str]):
        if len(terms) == 1:
            value, expression = terms[0]
            text = " , ".join(steps)
            ways[text] = Attempt(text, _strip(expression), value)
            return
        for i, j in itertools.combinations(range(len(terms)), 2):
            (b, right), (a, left) = sorted((terms[i], terms[j]), key=lambda term: term[0])
            rest = [term for index, term in enumerate(terms) if index not in (i, j)]
            for sign, value in _combine(a, b, operators):
                step = f"{a} {sign} {b} = {value}"
                reduce([*rest, (value, f"( {left} {sign} {right} )")], [*steps, step])

    ways: dict[str, Attempt] = {}
    reduce([(number, str(number)) for number in numbers], [])
    return tuple(ways.values())


def _strip(expression: str) -> str:
    return expression[2:-2] if expression.startswith("(") else expression  # the outermost pair says nothing


def split_problems(task: Words) -> Split:
    """Returns the solvable problems, split by number multiset; `held_out` distinct ones have multisets of their own.

    Whole multisets go to the held-out side, in a seeded order, until they give `held_out_pool` times as many problems
    as are kept, so that the kept ones spread over many multisets. Where problems differ in how many numbers they give,
    there are as many multisets of each length as of the shortest. The longer ones have more targets, of which as many
    are drawn as the shortest have on average.
    """
    draw = random.Random(0)  # one split for all runs
    train: list[Puzzle] = []
    kept: list[Puzzle] = []
    lengths = range(task.fewest_numbers or task.numbers, task.numbers + 1)
    most_multisets = most_targets = None
    for place, length in enumerate(lengths):
        multisets = list(itertools.combinations_with_replacement(range(1, task.largest + 1), length))
        draw.shuffle(multisets)
        count = (task.held_out + place) // len(lengths)
        of_length = [_puzzles_of(numbers, task.operators, most_targets, draw) for numbers in multisets[:most_multisets]]
        held_out: list[Puzzle] = []
        while of_length and len(held_out) < task.held_out_pool * count:
            held_out += of_length.pop()
        left = [puzzle for puzzles in of_length for puzzle in puzzles]
        if len(held_out) < count or not left:
            raise BadSetting(
                f"--held-out {task.held_out} leaves {len(left)} problems of {length} numbers to train on and finds "
                f"{len(held_out)} to hold out: take fewer, or more --numbers or a greater --largest"
            )
        train += left
        kept += draw.sample(held_out, count)
        most_multisets = most_multisets or len(multisets)
        most_targets = most_targets or math.ceil((len(left) + len(held_out)) / len(multisets))
    return Split([puzzle.problem for puzzle in train], [puzzle.problem for puzzle in kept])


def _puzzles_of(numbers: tuple[int, ...], operators: str, most: int | None, draw: random.Random) -> list[Puzzle]:
    """Returns the puzzles of these numbers, or `most` of them that are drawn."""
    targets = sorted({a.value for a in attempts(numbers, operators)})
    if most is not None and len(targets) > most:
        targets = draw.sample(targets, most)
    return [Puzzle(numbers, target) for target in targets]


def demonstrate(
    problem: Problem,
    task: Words,
    draw: random.Random,
    *,
    odds: Sequence[float] = ODDS_OF_MISSES,
    give_up: float = GIVE_UP,
) -> str:
    """Returns a search: some misses, then a hit or, if it gives up, the last miss as the answer."""
    numbers, target = Puzzle.of(problem)
    ways = attempts(numbers, task.operators)
    hits = [way for way in ways if way.value == target]
    misses = [way for way in ways if way.value != target]
    (count,) = draw.choices(range(len(odds)), weights=odds)
    tried = draw.sample(misses, min(count, len(misses)))
    words = [f"{way.steps} {MISS}" for way in tried]
    if tried and draw.random() < give_up:
        return " ".join([*words, ANSWER, tried[-1].expression])
    hit = draw.choice(hits)
    return " ".join([*words, hit.steps, HIT, ANSWER, hit.expression])
