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
from train.solve_rates import SolveRate, peak_average

CONFIDENCE, POWER = 0.95, 0.8
FEWEST_PAIRS = 4  # for a statement on power: the deviation of three differences is nearly unknown
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
    """The smallest true difference that so many seeds find significant with a probability of `POWER`, if the deviation
    is the one that was found; None with fewer seeds than `FEWEST_PAIRS`."""

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Difference":
        count, center = len(differences), mean(differences)
        if count < 2:
            return cls(count, center, None, None, None, None)
        deviation = float(numpy.std(differences, ddof=1))
        half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * deviation / math.sqrt(count)
        least = detectable(deviation, count) if count >= FEWEST_PAIRS else None
        return cls(count, center, center - half, center + half, deviation, least)


def detectable(deviation: float, count: int) -> float:
    """Returns the smallest true difference that a two-sided paired t test of `count` seeds finds with `POWER`.

    Found is a significant difference of the true one's sign.
    """
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    most = 4 * critical + 8  # the power is above 0.97 there, whatever the count
    shift = optimize.brentq(lambda shift: stats.nct.sf(critical, count - 1, shift) - POWER, 0.0, most)
    return float(shift) * deviation / math.sqrt(count)


def evaluations_of(runs: Sequence[Run], peak_weight: float) -> pandas.DataFrame:
    """Returns a row for each evaluation on each set: cell, seed, set, step, solved, peak, error, finished, unverified.

    `peak` is the moving average of the peak up to this step, `error` the standard error of `solved` from the problems
    and the answers that were sampled to them, `unverified` the share of the answers that could not be verified. Where a
    run is evaluated on several benchmarks their mean is a set of its own.
    """
    rows = []
    for run in runs:
        of_set: dict[str, list[dict[str, float]]] = {}
        for step, evaluation in run.evaluations:
            for name, rate in evaluation.rates.items():
                of_set.setdefault(name, []).append({"step": step} | _shares(rate))
            if len(evaluation.rates) > 1 and not _is_tiny(run):
                shares = [_shares(rate) for rate in evaluation.rates.values()]
                means = {share: mean(of_one[share] for of_one in shares) for share in shares[0]}
                means["error"] = math.hypot(*(of_one["error"] for of_one in shares)) / len(shares)
                of_set.setdefault(MEAN, []).append({"step": step} | means)
        for name, known in of_set.items():
            peaks = peak_average([shares["solved"] for shares in known], peak_weight)
            rows += [
                {"cell": run.cell, "seed": run.seed, "set": name, **shares, "peak": peak}
                for shares, peak in zip(known, peaks, strict=True)
            ]
    names = ["cell", "seed", "set", "step", "solved", "peak", "error", "finished", "unverified"]
    return pandas.DataFrame(rows, columns=names)


def _shares(rate: SolveRate) -> dict[str, float]:
    return {
        "solved": rate.solved,
        "error": rate.standard_error,
        "finished": rate.finished,
        "unverified": rate.errors / (rate.problems * rate.answers),
    }


def _is_tiny(run: Run) -> bool:
    """Returns whether the sets are the same problems, sampled and greedy, whose mean says nothing."""
    return run.config.data.train_data == "words" and not run.config.data.eval_data


def of_shared_seeds(table: pandas.DataFrame, cells: Sequence[str]) -> pandas.DataFrame:
    """Returns the rows of these cells and of the seeds that all of them have; of all seeds where none is common."""
    of_cells = table[table["cell"].isin(cells)]
    shared = shared_seeds(of_cells)
    return of_cells[of_cells["seed"].isin(shared)] if shared else of_cells


def shared_seeds(table: pandas.DataFrame) -> set[int]:
    """Returns the seeds that all cells of a table have."""
    seeds = [set(of_cell["seed"]) for _, of_cell in table.groupby("cell")]
    return set.intersection(*seeds) if seeds else set()


def unpaired_seeds(evaluations: pandas.DataFrame) -> list[int]:
    """Returns the seeds whose runs do not begin with the same solve rates: with another policy, or other samples."""
    first = evaluations.groupby(["seed", "cell", "set"], sort=False).head(1)
    distinct = first.groupby(["seed", "set"])["solved"].nunique()
    return sorted({seed for (seed, _), count in distinct.items() if count > 1})


def at_end(evaluations: pandas.DataFrame) -> pandas.DataFrame:
    """Returns the evaluation of each run after its last step, with `last` in place of `solved`."""
    ends = evaluations.groupby(["cell", "seed", "set"], sort=False).tail(1)
    return ends.rename(columns={"solved": "last"})


def differences_of(ends: pandas.DataFrame, measure: str, baseline: str = BASELINE) -> dict[str, dict[str, Difference]]:
    """Returns the differences against a cell, by set and cell; empty where a cell shares no seed with it."""
    out: dict[str, dict[str, Difference]] = {}
    for name, of_set in ends.groupby("set", sort=False):
        table = of_set.pivot(index="seed", columns="cell", values=measure)
        if baseline not in table:
            continue
        for cell in table.columns.drop(baseline):
            pairs = (table[cell] - table[baseline]).dropna()
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
