"""Computes what is compared: scores of each run, and differences paired by seed with their intervals and their power.

Runs of one seed start from the same warm start and see the same problems in the same order, so a difference is taken
within each seed. The interval is Student's t over these differences.
"""

import math
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

import numpy
import pandas
from scipy import optimize, stats

from train.compare.cells import BASELINE
from train.compare.runs import STEP_METRICS, Run
from train.solve_rates import peak_average

CONFIDENCE, POWER = 0.95, 0.8
MEASURES = {"peak": "the moving average of the peak at the end of the run", "last": "the last checkpoint"}
MEAN = "mean"  # the column of the mean over benchmarks


class Difference(NamedTuple):
    """The difference of two cells, over the seeds that both have."""

    seeds: int
    mean: float
    low: float | None
    """The interval; None with a single seed, as are the numbers below."""
    high: float | None
    deviation: float | None
    """The standard deviation of the difference from seed to seed."""
    detectable: float | None
    """The smallest true difference that so many seeds find significant with a probability of `POWER`."""

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Difference":
        count, center = len(differences), mean(differences)
        if count < 2:
            return cls(count, center, None, None, None, None)
        deviation = float(numpy.std(differences, ddof=1))
        half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * deviation / math.sqrt(count)
        return cls(count, center, center - half, center + half, deviation, detectable(deviation, count))


def detectable(deviation: float, count: int) -> float:
    """Returns the smallest true difference that a two-sided paired t test of `count` seeds finds with `POWER`.

    Found is a significant difference of the true one's sign.
    """
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    most = 4 * critical + 8  # the power is above 0.97 there, whatever the count
    shift = optimize.brentq(lambda shift: stats.nct.sf(critical, count - 1, shift) - POWER, 0.0, most)
    return float(shift) * deviation / math.sqrt(count)


def evaluations_of(runs: Sequence[Run], peak_weight: float) -> pandas.DataFrame:
    """Returns a row for each evaluation on each set: cell, seed, set, step, solved, peak, error, finished.

    `peak` is the moving average of the peak up to this step, `error` the standard error of `solved` from the problems.
    Where a run is evaluated on several benchmarks their mean is a set of its own.
    """
    rows = []
    for run in runs:
        of_set: dict[str, list[tuple]] = {}
        for step, evaluation in run.evaluations:
            rates = list(evaluation.rates.items())
            for name, rate in rates:
                of_set.setdefault(name, []).append((step, rate.solved, rate.standard_error, rate.finished))
            if len(rates) > 1 and not _is_tiny(run):
                error = math.hypot(*(rate.standard_error for _, rate in rates)) / len(rates)
                means = (mean(rate.solved for _, rate in rates), error, mean(rate.finished for _, rate in rates))
                of_set.setdefault(MEAN, []).append((step, *means))
        for name, known in of_set.items():
            peaks = peak_average([solved for _, solved, _, _ in known], peak_weight)
            rows += [
                (run.cell, run.seed, name, step, solved, peak, error, finished)
                for (step, solved, error, finished), peak in zip(known, peaks, strict=True)
            ]
    names = ["cell", "seed", "set", "step", "solved", "peak", "error", "finished"]
    return pandas.DataFrame(rows, columns=names)


def _is_tiny(run: Run) -> bool:
    """Returns whether the sets are the same problems, sampled and greedy, whose mean says nothing."""
    return run.config.data.train_data == "words" and not run.config.data.eval_data


def at_end(evaluations: pandas.DataFrame) -> pandas.DataFrame:
    """Returns the evaluation of each run after its last step, with `last` in place of `solved`."""
    ends = evaluations.groupby(["cell", "seed", "set"], sort=False).tail(1)
    return ends.rename(columns={"solved": "last"})


def differences_of(ends: pandas.DataFrame, measure: str) -> dict[str, dict[str, Difference]]:
    """Returns the differences against the baseline, by set and cell; empty where a cell shares no seed with it."""
    out: dict[str, dict[str, Difference]] = {}
    for name, of_set in ends.groupby("set", sort=False):
        table = of_set.pivot(index="seed", columns="cell", values=measure)
        if BASELINE not in table:
            continue
        for cell in table.columns.drop(BASELINE):
            pairs = (table[cell] - table[BASELINE]).dropna()
            if len(pairs):
                out.setdefault(name, {})[cell] = Difference.of(pairs.tolist())
    return out


def training_of(runs: Sequence[Run]) -> pandas.DataFrame:
    """Returns the means over the last tenth of each run's steps: reward, mean length, share of answers cut off."""
    rows = []
    for run in runs:
        steps = run.steps[-max(1, len(run.steps) // 10) :]
        if steps:
            rows.append((run.cell, run.seed, *(mean(step[name] for step in steps) for name in STEP_METRICS.values())))
    return pandas.DataFrame(rows, columns=["cell", "seed", *STEP_METRICS])
