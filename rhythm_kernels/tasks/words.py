"""The tiny Countdown, in which prompt and answer are words with one token each, and the verifier of its answers.

A problem gives numbers and a target. An answer may search first; the expression after its `A` is what gets verified:

    prompt    1 7 10 ? 2 >
    answer    10 + 1 = 11 , 11 + 7 = 18 x 10 - 1 = 9 , 9 - 7 = 2 ! A ( 10 - 1 ) - 7
"""

import json
from typing import NamedTuple

from rhythm_kernels.tasks.expression import hits_target
from rhythm_kernels.tasks.types import Problem, require_puzzle

ANSWER = "A"


class Puzzle(NamedTuple):
    """`numbers` in ascending order, each to be used once, and the `target` to hit."""

    numbers: tuple[int, ...]
    target: int

    @property
    def problem(self) -> Problem:
        """The puzzle as a Problem."""
        prompt = f"{' '.join(map(str, self.numbers))} ? {self.target} >"
        return Problem(prompt, json.dumps({"numbers": self.numbers, "target": self.target}), "words")

    @classmethod
    def of(cls, problem: Problem) -> "Puzzle":
        """Returns the puzzle that a Problem of this task was made of."""
        answer = json.loads(problem.answer)
        return cls(tuple(answer["numbers"]), answer["target"])


def from_row(numbers, target) -> Problem:
    """Returns the problem of a row {numbers, target}, as the trainer asks it."""
    require_puzzle("numbers", numbers, target)
    return Puzzle(tuple(sorted(numbers)), target).problem


def verify(completion: str, answer: str) -> float:
    """Returns 1.0 if the expression after the `A` uses every number once and equals the target, else 0.0."""
    _, marker, expression = completion.partition(ANSWER)
    puzzle = json.loads(answer)
    return float(bool(marker) and hits_target(expression, puzzle["numbers"], puzzle["target"]))
