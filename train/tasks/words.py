"""Countdown in words: problems for a tiny policy with a token for each word, their split, and demonstrations.

A problem gives numbers and a target; an answer is an expression that uses every number once and hits the target.
Prompt and answer are words with one token each:

    prompt    1 7 10 ? 2 >
    answer    10 + 1 = 11 , 11 + 7 = 18 x 10 - 1 = 9 , 9 - 7 = 2 ! A ( 10 - 1 ) - 7

An attempt that misses ends in `x`, one that hits in `!`; the expression after `A` is what gets verified.
"""

import itertools
import json
import random
import typing
from functools import cache
from typing import NamedTuple

from train.config import BadSetting, Demonstrations, Words
from train.tasks.expression import hits_target
from train.tasks.types import Problem

if typing.TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGEST_NUMBER = 99  # every integer from 0 to here is a token; no step of an attempt leaves this range
PAD, EOS = "<pad>", "<eos>"
SIGNS = ("+", "-", "*", "/", "(", ")", "=", ",", "x", "!", "A", "?", ">")
MISS, HIT, ANSWER = "x", "!", "A"


class Puzzle(NamedTuple):
    """`numbers` in ascending order, each to be used once, and the `target` to hit."""

    numbers: tuple[int, ...]
    target: int

    @property
    def problem(self) -> Problem:
        """The puzzle as the trainer's Problem."""
        prompt = f"{' '.join(map(str, self.numbers))} ? {self.target} >"
        return Problem(prompt, json.dumps({"numbers": self.numbers, "target": self.target}), "words")

    @classmethod
    def of(cls, problem: Problem) -> "Puzzle":
        """The puzzle that a Problem of this task was made of."""
        answer = json.loads(problem.answer)
        return cls(tuple(answer["numbers"]), answer["target"])


class Attempt(NamedTuple):
    """One way to combine all the numbers: the worked steps, the expression they amount to, and its value."""

    steps: str
    expression: str
    value: int


class Split(NamedTuple):
    """Problems to train on and problems held out; no number multiset occurs in both."""

    train: list[Problem]
    held_out: list[Problem]


def verify(completion: str, answer: str) -> float:
    """1.0 if the expression after the completion's `A` uses every number once and equals the target, else 0.0."""
    _, marker, expression = completion.partition(ANSWER)
    puzzle = json.loads(answer)
    return float(bool(marker) and hits_target(expression, puzzle["numbers"], puzzle["target"]))


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer with one token for each word of this task."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # here: reward workers import this module
    from transformers import PreTrainedTokenizerFast

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
    """Every allowed `a sign b`, a >= b, whose result is a token."""
    results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else -1}
    return [(sign, results[sign]) for sign in operators if 0 <= results[sign] <= LARGEST_NUMBER]


@cache
def attempts(numbers: tuple[int, ...], operators: str) -> tuple[Attempt, ...]:
    """All attempts for these numbers: repeatedly replace two of the values by their combination, the larger first."""

    def reduce(terms: list[tuple[int, str]], steps: list[str]):
        if len(terms) == 1:
            value, expression = terms[0]
            found[" , ".join(steps)] = Attempt(" , ".join(steps), _strip(expression), value)
            return
        for i, j in itertools.combinations(range(len(terms)), 2):
            (b, right), (a, left) = sorted((terms[i], terms[j]), key=lambda term: term[0])
            rest = [term for index, term in enumerate(terms) if index not in (i, j)]
            for sign, value in _combine(a, b, operators):
                step = f"{a} {sign} {b} = {value}"
                reduce([*rest, (value, f"( {left} {sign} {right} )")], [*steps, step])

    found: dict[str, Attempt] = {}
    reduce([(number, str(number)) for number in numbers], [])
    return tuple(found.values())


def _strip(expression: str) -> str:
    return expression[2:-2] if expression.startswith("(") else expression  # the outermost pair says nothing


def split_problems(task: Words) -> Split:
    """All solvable problems, split by number multiset; `held_out` of them, all distinct, from multisets of their own.

    Whole multisets go to the held-out side, in a seeded order, until they hold `held_out_pool` times as many problems
    as are kept, so that the kept ones spread over many multisets.
    """
    draw = random.Random(task.split_seed)
    multisets = list(itertools.combinations_with_replacement(range(1, task.largest + 1), task.numbers))
    draw.shuffle(multisets)
    held_out: list[Puzzle] = []
    while multisets and len(held_out) < task.held_out_pool * task.held_out:
        held_out += _puzzles_of(multisets.pop(), task.operators)
    train = [puzzle for numbers in multisets for puzzle in _puzzles_of(numbers, task.operators)]
    if len(held_out) < task.held_out or not train:
        raise BadSetting(
            f"--held-out {task.held_out} leaves {len(train)} problems to train on and finds {len(held_out)} to hold "
            f"out: take fewer, or more --numbers or a greater --largest"
        )
    kept = draw.sample(held_out, task.held_out)
    return Split([puzzle.problem for puzzle in train], [puzzle.problem for puzzle in kept])


def _puzzles_of(numbers: tuple[int, ...], operators: str) -> list[Puzzle]:
    return [Puzzle(numbers, target) for target in sorted({a.value for a in attempts(numbers, operators)})]


def demonstrate(problem: Problem, task: Words, style: Demonstrations, draw: random.Random) -> str:
    """One search trace: some misses, then a hit, or giving up with the last miss as the answer."""
    numbers, target = Puzzle.of(problem)
    ways = attempts(numbers, task.operators)
    hits = [way for way in ways if way.value == target]
    misses = [way for way in ways if way.value != target]
    count = draw.choices(range(len(style.misses)), weights=style.misses)[0]
    tried = draw.sample(misses, min(count, len(misses)))
    words = [f"{way.steps} {MISS}" for way in tried]
    if tried and draw.random() < style.give_up:
        return " ".join([*words, ANSWER, tried[-1].expression])
    hit = draw.choice(hits)
    return " ".join([*words, hit.steps, HIT, ANSWER, hit.expression])
