"""The numbers of `rhythm value`: how much of the decisions each strategy and signal finds, and where they are."""

from typing import Any, NamedTuple

import numpy as np

from rhythm_kernels.analysis.bootstrap import Estimate, bootstrap, share
from rhythm_kernels.analysis.decisions import TENTHS, areas, by_tenth, columns, oracle, shares
from rhythm_kernels.analysis.value_judge import STRATEGIES, Judged

ORACLE = "oracle"
"""The tokens that decide most, as far as half of the continuations tells."""
SIGNALS = {
    "waad": "WAAD",
    "fai": "FAI of credit",
    "delta": "Delta",
    "entropy": "entropy",
    "surprise": "1 - p",
    "gamma": "gamma, coupled",
}
"""The signals whose areas are compared, and their names in the report."""
ALL, SOLVED = "all answers", "solved answers"


class Tables(NamedTuple):
    """All numbers of the report; estimates are over problems."""

    strategies: dict[str, dict[str, dict[str, Estimate]]]
    """`share_table` of ALL and of SOLVED answers."""
    signals: dict[str, dict[str, Estimate]]
    """`area_table`."""
    tenths: list[dict[str, Any]]
    """`tenth_table`."""
    balance: dict[str, Estimate]
    """`balance`."""
    answers: int
    solved: int
    tokens: int
    continuations: int
    certain: int
    """Tokens without a continuation."""
    noise: float
    """The share of the squared estimates that noise of the continuations made."""


def tables_of(answers: list[Judged], top_fraction: float, seed: int) -> Tables:
    """Computes all numbers of the report."""
    solved = [answer for answer in answers if answer.sampled.solved]
    noise = sum(answer.decisions.noise.sum() for answer in answers)
    estimated = sum((answer.decisions.decision**2).sum() for answer in answers)
    return Tables(
        strategies={name: share_table(some, top_fraction, seed) for name, some in ((ALL, answers), (SOLVED, solved))},
        signals=area_table(answers, seed),
        tenths=tenth_table(answers, seed),
        balance=balance(answers, seed),
        answers=len(answers),
        solved=len(solved),
        tokens=sum(len(answer.texts) for answer in answers),
        continuations=2 * sum(int(answer.sampled.tries.sum()) for answer in answers),
        certain=sum(int((answer.sampled.tries == 0).sum()) for answer in answers),
        noise=float(noise / (estimated or 1.0)),
    )


def share_table(answers: list[Judged], top_fraction: float, seed: int) -> dict[str, dict[str, Estimate]]:
    """Returns the numbers of each strategy, and of the oracle, by name, each an estimate over problems.

    They are the share of the tokens that it selects; the share of the decisions (the sum of d_t^2) on them, what chance
    would have, and the one over the other; the decisions that a unit of credit meets over those that it would meet
    anywhere in the answer; the share of the decisions over chance with as many tokens selected in each tenth of the
    answer, or in each tenth of the tokens by their entropy; and the shares of the positive decisions, of the negative
    ones and of the net change of the value on the selected tokens.
    """
    ratios = {
        "tokens": ("selected", "tokens"),
        "decisions": ("square selected", "square"),
        "chance": ("square by chance", "square"),
        "over chance": ("square selected", "square by chance"),
        "credited over chance": ("square credited", "square credited by chance"),
        "over chance in tenths": ("square selected in tenths", "square by chance in tenths"),
        "over chance at entropy": ("square selected at entropy", "square by chance at entropy"),
        "positive": ("rise selected", "rise"),
        "negative": ("fall selected", "fall"),
        "gain": ("gain selected", "gain"),
    }
    sums = {
        name: [shares(one.gammas[name], one.decisions, one.signals["entropy"]) for one in answers]
        for name in STRATEGIES
    }
    sums[ORACLE] = [oracle(one.sampled, top_fraction, one.signals["entropy"]) for one in answers]
    return {
        strategy: {name: bootstrap(columns(rows, *pair), share, seed=seed) for name, pair in ratios.items()}
        for strategy, rows in sums.items()
    }


def area_table(answers: list[Judged], seed: int) -> dict[str, dict[str, Estimate]]:
    """Returns the two areas of each signal (`areas`)."""
    numbers = {}
    for signal in SIGNALS:
        rows = [areas(answer.signals[signal], answer.decisions) for answer in answers]
        numbers[signal] = {
            "decisions": bootstrap(columns(rows, "square ranked", "square"), share, seed=seed),
            "top tenth": bootstrap(columns(rows, "pairs right", "pairs"), share, seed=seed),
        }
    return numbers


def tenth_table(answers: list[Judged], seed: int) -> list[dict[str, Any]]:
    """Returns a row for each tenth of the answer.

    It has the share of all decisions in the tenth, and for each strategy the share of the tenth's tokens that it
    selects, and the share of the tenth's decisions on them.
    """
    squares = [answer.decisions.square for answer in answers]
    inside = np.array([by_tenth(square) for square in squares])  # [answers, TENTHS]
    tokens = np.array([by_tenth(np.ones_like(square)) for square in squares])
    whole = inside.sum(1)
    rows: list[dict[str, Any]] = [
        {"decisions": bootstrap(np.stack([inside[:, place], whole], 1), share, seed=seed)} for place in range(TENTHS)
    ]
    for strategy in STRATEGIES:
        chosen = [answer.gammas[strategy] > 1 for answer in answers]
        count = np.array([by_tenth(one) for one in chosen])
        held = np.array([by_tenth(one * square) for one, square in zip(chosen, squares, strict=True)])
        for place, row in enumerate(rows):
            row[strategy] = {
                "tokens": count[:, place].sum() / max(1, tokens[:, place].sum()),
                "decisions": bootstrap(np.stack([held[:, place], inside[:, place]], 1), share, seed=seed),
            }
    return rows


def balance(answers: list[Judged], seed: int) -> dict[str, Estimate]:
    """Returns the mean sum of d_t^2 of an answer and the mean variance of the reward, which have one expectation.

    A value is a martingale along the answers of the policy, so its steps are uncorrelated and end at the reward.
    """
    ones = np.ones(len(answers))
    sums = {
        "decisions": [answer.decisions.square.sum() for answer in answers],
        "variance": [answer.decisions.spread for answer in answers],
        "solved": [float(answer.sampled.solved) for answer in answers],
        "value": [answer.decisions.value[0] for answer in answers],
    }
    return {name: bootstrap(np.stack([values, ones], 1), share, seed=seed) for name, values in sums.items()}
