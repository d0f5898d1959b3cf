"""Prints the summary at the end of a run: solve rates before and after, times, and the files."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from train.config import Config
from train.console import say
from train.metrics import is_evaluation, read_metrics
from train.solve_rates import Evaluation, SolveRate, peak_averages


def report(config: Config, folder: Path, runs: dict[str, Path], seconds: float) -> None:
    """Prints the solve rates of each seed and of their mean, and a summary; `runs` maps a label to its folder."""
    records = {label: read_metrics(run) for label, run in runs.items()}
    is_words = config.data.train_data == "words" and not config.data.eval_data
    say("\nsolved of the held-out problems" + (", whose numbers were never trained on" if is_words else ""))
    evaluations = {label: [line for line in lines if is_evaluation(line)] for label, lines in records.items()}
    _print_rates(evaluations, config.run.peak_weight)
    steps = [line for lines in records.values() for line in lines if not is_evaluation(line)]
    if steps:
        share = sum(step["time/statistics"] for step in steps) / sum(step["step_time"] for step in steps)
        say(f"\nstep time {mean(step['step_time'] for step in steps):.2f} s, statistics {share:.2%} of it")
    drifts = [step for step in steps if "rhythm/groups_spearman" in step]
    if drifts:
        names = ("spearman", "local_overlap", "global_overlap")
        spearman, local_share, global_share = (mean(step[f"rhythm/groups_{name}"] for step in drifts) for name in names)
        say(
            f"from one ranking of the heads to the next: Spearman {spearman:.3f}, "
            f"{local_share:.1%} of the local and {global_share:.1%} of the global heads stay"
        )
    say(f"{seconds / 60:.1f} minutes; in {folder}: learning_curve.png; for each seed samples/, checkpoints/,")
    say("metrics.jsonl and tensorboard/")


def _print_rates(evaluations: dict[str, list[dict[str, float]]], peak_weight: float) -> None:
    """Prints the first and the last evaluation of each seed, and the peak average at the end.

    The first evaluation may be lost, with its line of the metrics.
    """
    pairs, peaks = {}, {}
    for label, lines in evaluations.items():
        before = Evaluation.from_metrics(lines[0]) if lines[0]["step"] == 0 else None
        pairs[label] = (before, Evaluation.from_metrics(lines[-1]))
        peaks[label] = {name: curve[-1] for name, (_, curve) in peak_averages(lines, peak_weight).items()}
    if len(pairs) > 1:
        befores, afters = zip(*pairs.values(), strict=True)
        pairs["mean"] = (None if None in befores else _pool(befores), _pool(afters))
        peaks["mean"] = {name: mean(peak[name] for peak in peaks.values()) for name in afters[0].rates}
    width = max(len(name) for _, after in pairs.values() for name in after.rates)
    say(f"{'':8} {'':{width}} {'before':>28}   {'after':>28}   {'peak':>6}   change")
    for seed, (before, after) in pairs.items():
        label = seed
        for name, new in after.rates.items():
            old, change = "not known", "not known"
            if before is not None:
                old = before.rates[name]
                change = f"{100 * (new.solved - old.solved):+.1f} points of {new.problems}"
            peak = f"{peaks[seed][name]:6.1%}"
            say(f"{label:8} {name:{width}} {old!s:>28}   {new!s:>28}   {peak}   {change}")
            label = ""
    say(f"peak: moving average of the best score over all evaluations, --peak-weight {peak_weight:g} (the paper's A.2)")


def _pool(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Returns the means over seeds, with their standard errors from the problems of all."""

    def pool(rates: list[SolveRate]) -> SolveRate:
        return SolveRate(
            mean(rate.solved for rate in rates),
            mean(rate.finished for rate in rates),
            math.hypot(*(rate.standard_error for rate in rates)) / len(rates),
            sum(rate.problems for rate in rates),
            rates[0].answers,
            sum(rate.errors for rate in rates),
        )

    return Evaluation({name: pool([one.rates[name] for one in evaluations]) for name in evaluations[0].rates})
