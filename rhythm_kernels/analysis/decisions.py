"""Estimates what each token of an answer decides, and how much of it the tokens that a strategy credits hold.

The value V_t is the probability that an answer which begins with t given tokens gets solved. Token t decides d_t =
V_t - V_{t-1}. It was drawn with probability p_t, and W_t is the value where the policy draws another token in its
place. Then V_{t-1} = p_t V_t + (1 - p_t) W_t, so

    d_t = (1 - p_t) (V_t - W_t)

and all values follow backwards from V_n, which the answer itself shows, and the W_t. The W_t alone are sampled. A token
without alternatives decides nothing, and costs nothing.
Shapes: n tokens of an answer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TENTHS = 10
TOP = 0.1
"""The share of an answer's tokens that counts as deciding in the area under the ROC."""


class Sampled(NamedTuple):
    """Holds what was sampled of one answer. Halves are two independent sets of as many continuations each."""

    solved: bool
    """Whether the answer ended by itself, and right."""
    other: np.ndarray
    """[n] fp64, 1 - p_t: the probability of any other token in place of each; 0 where it has no continuations."""
    wins: np.ndarray
    """[2, n] int: how many continuations of each half, which begin with another token, end solved."""
    tries: np.ndarray
    """[n] int: how many continuations each half has, 0 or at least 2."""


class Decisions(NamedTuple):
    """Estimates for one answer. Those of values, decisions and squares have no bias."""

    value: np.ndarray
    """[n + 1]: V_0 to V_n."""
    decision: np.ndarray
    """[n]: d_t."""
    noise: np.ndarray
    """[n]: the variance of the estimate of d_t."""
    square: np.ndarray
    """[n]: d_t^2. May be negative."""
    rise: np.ndarray
    """[n]: d_t^2 by one half of the continuations, where d_t is positive by the other half. Its expectation is d_t^2
    times the probability that a half tells so: half of d_t^2 where noise hides the sign. rise + fall has no bias."""
    fall: np.ndarray
    """[n]: the same where d_t is negative."""
    spread: float
    """V_0 (1 - V_0): the variance of the reward. Over answers of the policy it equals the mean sum of d_t^2."""


def decide(sampled: Sampled) -> Decisions:
    """Estimates values and decisions.

    The square is the estimate squared, less the variance of its noise. That is the mean of d'_t d''_t over all ways to
    halve the continuations: each such product has the expectation d_t^2, since the halves are independent. With noise
    of variance v the product of one pair of halves has the variance 4 d^2 v + 4 v^2, and the mean over all pairs some
    4 d^2 v + 2 v^2. Neighbours share V_t, so their errors correlate; intervals come from a bootstrap over problems.
    """
    halves = [_estimate(sampled, wins, sampled.tries) for wins in sampled.wins]
    value, decision, value_noise, noise = _estimate(sampled, sampled.wins.sum(0), 2 * sampled.tries)
    squares = [half**2 - variance for _, half, _, variance in halves]
    positive = [(1 + np.sign(half)) / 2 for _, half, _, _ in halves]
    rise = (squares[0] * positive[1] + squares[1] * positive[0]) / 2
    return Decisions(
        value=value,
        decision=decision,
        noise=noise,
        square=decision**2 - noise,
        rise=rise,
        fall=sum(squares) / 2 - rise,
        spread=float(value[0] - value[0] ** 2 + value_noise[0]),
    )


def oracle(sampled: Sampled, top_fraction: float, entropy: np.ndarray) -> dict[str, float]:
    """Returns the sums of `shares` for the tokens that decide most, as far as half of the continuations tells.

    The first half ranks the tokens by |d_t| and the second is counted, then the other way round, so that the tokens are
    not selected by the noise that is counted. They are those of the largest estimates, so they hold less than the best:
    the less, the fewer the continuations. For what is held against chance within a tenth, that fraction of each tenth
    is selected.
    """
    sums: dict[str, float] = {}
    for ranking, counted in (sampled.wins, sampled.wins[::-1]):
        size = abs(_estimate(sampled, ranking, sampled.tries)[1])
        _, decision, _, noise = _estimate(sampled, counted, sampled.tries)
        found = _sums(1.0 + largest(size, top_fraction), decision**2 - noise, entropy)
        for name, group in groups_of(entropy).items():
            selected = np.zeros(len(size), dtype=bool)
            for one in range(TENTHS):
                selected[group == one] = largest(size[group == one], top_fraction)
            of_group = _sums(1.0 + selected, decision**2 - noise, entropy)
            found |= {key: of_group[key] for key in (f"square selected {name}", f"square by chance {name}")}
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value / 2
    return sums


def _estimate(sampled: Sampled, wins: np.ndarray, tries: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns (values [n + 1], decisions [n], the variance of the noise of each value, and of each decision).

    Args:
        wins, tries: [n], how many continuations with another token end solved, and how many there are.
    """
    tries = np.maximum(2, tries)  # where there are none, the token is certain
    rate = wins / tries  # W
    return *_along(sampled, rate), *_noise(sampled, rate * (1 - rate) / (tries - 1))


def _along(sampled: Sampled, rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values [n + 1], decisions [n]), given the share of solved continuations with another token, [n]."""
    other = sampled.other
    value = np.full(len(other) + 1, float(sampled.solved))
    for t in reversed(range(len(other))):
        value[t] = (1 - other[t]) * value[t + 1] + other[t] * rate[t]
    return value, other * (value[1:] - rate)


def _noise(sampled: Sampled, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the variances of the estimates of (values [n + 1], decisions [n]), given that of each rate, [n]."""
    other = sampled.other
    value = np.zeros(len(other) + 1)
    for t in reversed(range(len(other))):
        value[t] = (1 - other[t]) ** 2 * value[t + 1] + other[t] ** 2 * variance[t]
    return value, other**2 * (value[1:] + variance)


# ---- shares ----------------------------------------------------------------------------------------------------------


def ranks(signal: np.ndarray) -> np.ndarray:
    """Returns the share of the answer's tokens with a smaller signal, [n]; those with an equal one count half."""
    _, place, count = np.unique(signal, return_inverse=True, return_counts=True)
    return (count.cumsum() - count / 2)[place] / len(signal)


def largest(values: np.ndarray, fraction: float) -> np.ndarray:
    """Returns which of the values are the largest, [n] bool, as TopQ of the credit selects them."""
    selected = np.zeros(len(values), dtype=bool)
    selected[np.argsort(-values, kind="stable")[: int(np.ceil(fraction * len(values) - 1e-9))]] = True
    return selected


def tenths(count: int) -> np.ndarray:
    """Returns the tenth of the answer that each of its tokens is in, from 0, [n]."""
    return np.arange(count) * TENTHS // count


def groups_of(entropy: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the group of each token, from 0 to TENTHS - 1: the tenth of the answer, and the tenth by entropy, [n]."""
    return {"in tenths": tenths(len(entropy)), "at entropy": (ranks(entropy) * TENTHS).astype(int)}


def shares(gamma: np.ndarray, decisions: Decisions, entropy: np.ndarray) -> dict[str, float]:
    """Returns sums over one answer, of which the report's shares are ratios.

    A token is selected where gamma > 1, and its credit is gamma - 1. Under chance as many tokens are selected at random
    from the whole answer, from each tenth of it, or from each tenth of its tokens by their entropy.
    """
    selected = gamma > 1
    return _sums(gamma, decisions.square, entropy) | {
        "rise": decisions.rise.sum(),
        "rise selected": decisions.rise[selected].sum(),
        "fall": decisions.fall.sum(),
        "fall selected": decisions.fall[selected].sum(),
        "gain": decisions.decision.sum(),
        "gain selected": decisions.decision[selected].sum(),
    }


def _sums(gamma: np.ndarray, square: np.ndarray, entropy: np.ndarray) -> dict[str, float]:
    selected, credit = gamma > 1, gamma - 1

    sums = {
        "tokens": float(len(gamma)),
        "selected": float(selected.sum()),
        "square": square.sum(),
        "square selected": square[selected].sum(),
        "square by chance": square.sum() * selected.mean(),
        "square credited": credit @ square,
        "square credited by chance": credit.mean() * square.sum(),
    }
    for name, group in groups_of(entropy).items():
        count, chosen, held = (np.bincount(group, one, TENTHS) for one in (None, selected, square))
        sums[f"square selected {name}"] = sums["square selected"]
        sums[f"square by chance {name}"] = chosen / np.maximum(1, count) @ held
    return sums


def by_tenth(weights: np.ndarray) -> np.ndarray:
    """Returns the sums of an answer's weights [n] in each tenth, [TENTHS]."""
    return np.bincount(tenths(len(weights)), weights, TENTHS)


def areas(signal: np.ndarray, decisions: Decisions) -> dict[str, float]:
    """Returns sums over one answer, of which two areas are ratios; both are 0.5 for a signal that tells nothing.

    The first is the area under the share of the decisions (d_t^2) that the tokens with the largest signal hold, drawn
    over the share of the tokens. It is linear in d_t^2, so noise does not bias it. The second is the area under the ROC
    for the tenth of the tokens with the largest |d_t|. Noise puts wrong tokens into that tenth, the more the less a
    token was certain. An answer in which nothing is decided has no such tenth.
    """
    size, position = abs(decisions.decision), ranks(signal)
    found = {
        "square": decisions.square.sum(),
        "square ranked": decisions.square @ position,
        "pairs": 0.0,
        "pairs right": 0.0,
    }
    if not size.any():
        return found
    count, most = len(size), int(largest(size, TOP).sum())
    # the mean over all ways to choose among tokens of the same |d_t|, of which the first would else be chosen
    least = np.sort(size)[-most]
    above, tied = size > least, size == least
    top = above + tied * (most - above.sum()) / tied.sum()
    pairs = most * (count - most)
    # Mann and Whitney: the pairs of a deciding token and another in which the deciding one has the larger signal
    right = count * (top @ position) - most * most / 2
    return found | {"pairs": float(pairs), "pairs right": right if pairs else 0.0}


def columns(rows: Sequence[dict[str, float]], *names: str) -> np.ndarray:
    """Returns [answers, names]: the sums of each answer, for `bootstrap`; NaN for those that a row does not have."""
    return np.array([[row.get(name, np.nan) for name in names] for row in rows])
