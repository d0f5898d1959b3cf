"""Bootstrap intervals over problems: how far a number may move when other problems of the same kind are drawn."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
ROUNDING = 1e-12  # a sum of decisions below it is one of rounding errors


class Estimate(NamedTuple):
    """A number and its bootstrap interval; NaN where one is not defined: a share of nothing, one problem's interval."""

    value: float
    low: float
    high: float


def bootstrap(
    columns: np.ndarray, statistic: Callable[..., np.ndarray], *, seed: int, resamples: int = RESAMPLES
) -> Estimate:
    """Returns the percentile bootstrap of a statistic that is a function of sums over problems.

    Args:
        columns: [n, c], the c numbers of each of n problems that are summed, such as hits and trials of a share.
        statistic: takes the c sums, each a float or [resamples], and returns the same, such as hits / trials.
        seed: equal seeds draw the same problems, so the estimates of one study move together.
    """
    columns = np.asarray(columns, dtype=np.float64)
    if not len(columns):
        return Estimate(np.nan, np.nan, np.nan)
    counts = _draws(len(columns), seed, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*columns.sum(0)))
        resampled = np.asarray(statistic(*(counts @ columns).T))
    resampled = resampled[np.isfinite(resampled)]  # a resample may hold no trial at all
    low, high = np.nan, np.nan
    if len(columns) > 1 and len(resampled) and np.isfinite(value):
        low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


@lru_cache(4)  # a report draws the same for each of its numbers
def _draws(problems: int, seed: int, resamples: int) -> np.ndarray:
    """Returns how often each problem is drawn, [resamples, problems] fp64."""
    even = np.full(problems, 1 / problems)
    return np.random.default_rng(seed).multinomial(problems, even, size=resamples).astype(np.float64)


def share(hits: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Returns hits / trials, the statistic of most numbers in the reports; NaN where the trials are not above 0.

    A sum of unbiased estimates may be negative, and a share of it means nothing.
    """
    return np.where(trials > ROUNDING, hits / trials, np.nan)
