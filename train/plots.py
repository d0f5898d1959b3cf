"""Draws the learning curve of a run in one figure."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas
from matplotlib.figure import Figure

from train.metrics import read_metrics
from train.solve_rates import Evaluation

matplotlib.use("Agg")  # files only
SMOOTHING = 0.8  # weight of the past in the exponential mean drawn over the steps
CURVES = {
    "reward": "reward (lines, star: peak of the mean); held-out: dots",
    "completions/mean_length": "mean length, tokens",
    "entropy": "entropy, nats a token",
}


def plot_learning_curve(runs: dict[str, Path], path: Path, title: str) -> None:
    """Draws solve rates, length and entropy over the steps of each run; `runs` maps a label to its folder.

    The paper compares runs by the peak of their smoothed curve: a star marks it, and the legend gives its value.
    """
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axes, (name, heading) in zip(figure.subplots(1, 3), CURVES.items(), strict=True):
        for color, (label, folder) in zip(matplotlib.color_sequences["tab10"], runs.items(), strict=False):
            _draw(axes, read_metrics(folder), name, color, label)
        axes.set_title(heading, size=9)
        axes.set(xlabel="GRPO step", ylim=(0, 1 if name == "reward" else None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if name != "entropy" and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _draw(axes, records: list[dict], name: str, color, label: str) -> None:
    """Draws one metric of one run and, beside the reward, its peak and the evaluations with their standard errors."""
    if known := [(record["step"], record[name]) for record in records if name in record]:
        steps, values = zip(*known, strict=True)
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values), color=color, label=None if name == "reward" else label)
        if name == "reward":
            best, value = peak(values)
            label = f"{label}: peak {value:.3f} at step {steps[best]}"
            axes.plot(steps[best], value, "*", color=color, markersize=11, label=label)
    if name == "reward":
        for record in records:
            for place, rate in enumerate(Evaluation.from_metrics(record).rates.values()):
                style = {"fmt": "o", "color": color, "mfc": "none" if place else color, "capsize": 2}
                axes.errorbar(record["step"], rate.solved, rate.standard_error, **style)


def peak(values: Sequence[float]) -> tuple[int, float]:
    """Returns where the exponential mean of the values is largest, and its value there."""
    smoothed = smooth(values)
    best = max(range(len(smoothed)), key=smoothed.__getitem__)
    return best, smoothed[best]


def smooth(values: Sequence[float]) -> list[float]:
    """Returns the exponential mean, without the bias of its start towards 0."""
    return pandas.Series(values).ewm(alpha=1 - SMOOTHING).mean().tolist()
