"""Intervals over problems: what a number could have been, had other problems of the same kind been drawn."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


class Estimate(NamedTuple):
    """A number and its bootstrap interval; NaN where it is not defined, such as a share of nothing."""

    value: float
    low: float
    high: float


def bootstrap(
    columns: np.ndarray, statistic: Callable[..., np.ndarray], *, seed: int, resamples: int = RESAMPLES
) -> Estimate:
    """The percentile bootstrap of a statistic that is a function of sums over problems.

    Args:
        columns: [n, c], of each of n problems what is summed: hits and trials of a share, say.
        statistic: takes the c sums, each a float or [resamples], and returns the same: hits / trials, say.
        seed: equal seeds draw the same problems, so estimates of one study move together.
    """
    columns = np.asarray(columns, dtype=np.float64)
    if not len(columns):
        return Estimate(np.nan, np.nan, np.nan)
    draws = np.random.default_rng(seed).multinomial(
        len(columns), np.full(len(columns), 1 / len(columns)), size=resamples
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*columns.sum(0)))
        drawn = np.asarray(statistic(*(draws @ columns).T))
    drawn = drawn[np.isfinite(drawn)]  # a draw may hold no trial at all
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(drawn) else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))


def share(hits: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """The statistic of two columns that most numbers are."""
    return hits / trials
