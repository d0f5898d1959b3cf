"""Countdown for language models: reason in words, then answer with an expression in <answer> tags."""

import json
import random
import re
from collections.abc import Iterator

from rhythm_kernels.tasks.expression import LONGEST_NUMBER, hits_target
from rhythm_kernels.tasks.types import Problem, UnusableRow, require_puzzle

NUMBERS = 4  # that a generated problem gives
LARGEST_NUMBER, TARGETS = 99, range(10, 100)  # of generated problems
PROMPT = """Combine the numbers {numbers} into an arithmetic expression whose value is {target}. \
Use each number exactly once, and nothing else but +, -, *, / and parentheses. \
Reason step by step first. Then write the finished expression inside <answer> and </answer>, \
for example <answer>(1 + 2) * 3 - 4</answer>."""
RIGHT_SIDE = re.compile(rf"\s*(-?[0-9]{{1,{LONGEST_NUMBER}}})\s*", re.ASCII)


def from_row(nums, target) -> Problem:
    """Returns the problem of a row {nums, target}, with the numbers in the row's order."""
    require_puzzle("nums", nums, target)
    answer = json.dumps({"numbers": sorted(nums), "target": target})
    return Problem(PROMPT.format(numbers=", ".join(map(str, nums)), target=target), answer, "countdown")


def from_row_of_four(nums, target) -> Problem:
    """Returns the same; raises UnusableRow where there are not as many numbers as in the paper's problems."""
    problem = from_row(nums, target)
    if len(nums) != NUMBERS:
        raise UnusableRow(f"it gives {len(nums)} numbers, not {NUMBERS}")
    return problem


def generate_rows(count: int, seed: int) -> Iterator[dict]:
    """Yields `count` solvable rows {nums, target}; no two have the same target and the same numbers in any order.

    The numbers are combined at random, by positive integers only, until one value is left. Where that can be a target
    it is, so no search for a solution is needed.
    """
    draw, seen = random.Random(seed), set()
    while len(seen) < count:
        nums = [draw.randint(1, LARGEST_NUMBER) for _ in range(NUMBERS)]
        target = _combine(nums, draw)
        key = (*sorted(nums), target)
        if target is not None and key not in seen:
            seen.add(key)
            yield {"nums": nums, "target": target}


def _combine(nums: list[int], draw: random.Random) -> int | None:
    """Returns the value in TARGETS of a random expression over all of `nums`; None where the last step reaches none."""
    values = draw.sample(nums, len(nums))
    while len(values) > 1:
        a, b = values.pop(draw.randrange(len(values))), values.pop(draw.randrange(len(values)))
        results = [a + b, a * b]
        if a > b:
            results.append(a - b)
        if a % b == 0:
            results.append(a // b)
        if not values:
            results = [value for value in results if value in TARGETS]
        if not results:
            return None
        values.append(draw.choice(results))
    return values[0]


def verify(completion: str, answer: str) -> float:
    """Returns 1.0 if the last <answer> uses every number once and equals the target, else 0.0.

    The expression may end in `= target`.
    """
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return 0.0
    puzzle = json.loads(answer)
    expression, equals, right = completion[start + len("<answer>") : end].partition("=")
    if equals:
        stated = RIGHT_SIDE.fullmatch(right)
        if stated is None or int(stated[1]) != puzzle["target"]:
            return 0.0
    return float(hits_target(expression, puzzle["numbers"], puzzle["target"]))
