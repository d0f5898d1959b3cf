"""Draws the learning curve of a run in one figure."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas
from matplotlib.figure import Figure

from train.metrics import read_metrics
from train.solve_rates import Evaluation, peak_averages

matplotlib.use("Agg")  # files only
SMOOTHING = 0.8  # weight of the past in the exponential mean drawn over the steps
STYLES = ("-", "--", ":", "-.", (0, (1, 4)))  # of the lines of a run's evaluation sets
CURVES = {
    "reward": "reward",
    "completions/mean_length": "mean length, tokens",
    "entropy": "entropy, nats a token",
}


def plot_learning_curve(runs: dict[str, Path], path: Path, title: str, peak_weight: float) -> None:
    """Draws solve rates, reward, length and entropy over the steps of each run; `runs` maps a label to its folder.

    Lines among the solve rates are the moving averages of the peak (`peak_average`), by which the paper compares runs.
    """
    figure = Figure(figsize=(17, 4.2), layout="constrained")
    solved, *others = figure.subplots(1, 1 + len(CURVES))
    solved.set_title(f"held-out solve rates (dots); peak averages, a = {peak_weight:g} (lines)", size=9)
    for axes, heading in zip(others, CURVES.values(), strict=True):
        axes.set_title(heading, size=9)
    for color, (label, folder) in zip(matplotlib.color_sequences["tab10"], runs.items(), strict=False):
        records = read_metrics(folder)
        _draw_evaluations(solved, records, color, label, peak_weight)
        for axes, name in zip(others, CURVES, strict=True):
            _draw(axes, records, name, color, label)
    for axes in (solved, *others):
        axes.set(xlabel="GRPO step", ylim=(0, 1 if axes in (solved, others[0]) else None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in others[:-1]:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    figure.legend(*solved.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _draw_evaluations(axes, records: list[dict], color, label: str, peak_weight: float) -> None:
    """Draws the evaluations of one run with their standard errors, and for each set its peak average."""
    for place, (name, (steps, averages)) in enumerate(peak_averages(records, peak_weight).items()):
        rates = [rates[name] for record in records if name in (rates := Evaluation.from_metrics(record).rates)]
        fill = "none" if place else color
        style = {"fmt": "o", "color": color, "mfc": fill, "capsize": 2, "alpha": 0.6, "markersize": 3}
        axes.errorbar(steps, [rate.solved for rate in rates], [rate.standard_error for rate in rates], **style)
        text = f"{label}, {name}: {averages[-1]:.3f}, last {rates[-1].solved:.3f}"
        axes.plot(steps, averages, linestyle=STYLES[place % len(STYLES)], color=color, label=text)


def _draw(axes, records: list[dict], name: str, color, label: str) -> None:
    """Draws one metric of one run, and its exponential mean."""
    if known := [(record["step"], record[name]) for record in records if name in record]:
        steps, values = zip(*known, strict=True)
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values), color=color, label=label)


def smooth(values: Sequence[float]) -> list[float]:
    """Returns the exponential mean, without the bias of its start towards 0."""
    return pandas.Series(values).ewm(alpha=1 - SMOOTHING).mean().tolist()
