"""The learning curve of a run, as one picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from train.evaluate import Evaluation
from train.metrics import read_metrics

matplotlib.use("Agg")  # files only
SMOOTHING = 0.8  # of the exponential mean drawn over the single steps


def plot_learning_curve(runs: dict[str, Path], path: Path, title: str):
    """Solve rates, length and entropy over the steps of each run; `runs` maps a label to its folder.

    The paper compares runs by the peak of their smoothed curve: it is marked by a star, and stands in the legend.
    """
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    solved, length, entropy = figure.subplots(1, 3)
    for color, (label, folder) in zip(matplotlib.color_sequences["tab10"], runs.items(), strict=False):
        records = read_metrics(folder)
        steps = [record for record in records if "reward" in record]
        if steps:
            _star(solved, steps, color, label)
        for axes, name in ((solved, "reward"), (length, "completions/mean_length"), (entropy, "entropy")):
            _draw(axes, steps, name, color, label if axes is length else None)
        _mark(solved, [record for record in records if "reward" not in record], color)
    solved.set(title="reward (lines, star: peak of the mean); held-out: dots", ylim=(0, 1))
    length.set(title="mean length, tokens", ylim=(0, None))
    entropy.set(title="entropy, nats a token", ylim=(0, None))
    for axes in (solved, length, entropy):
        axes.title.set_size(9)
        axes.set_xlabel("GRPO step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (solved, length):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def peak(values: Sequence[float]) -> tuple[int, float]:
    """Where the exponential mean of the values is largest, and its value there."""
    smoothed = smooth(values)
    best = max(range(len(smoothed)), key=smoothed.__getitem__)
    return best, smoothed[best]


def _star(axes, records: list[dict], color, label: str):
    best, value = peak([record["reward"] for record in records])
    step = records[best]["step"]
    axes.plot(step, value, "*", color=color, markersize=11, label=f"{label}: peak {value:.3f} at step {step}")


def _draw(axes, records: list[dict], name: str, color, label: str | None):
    known = [(record["step"], record[name]) for record in records if name in record]
    if not known:
        return
    steps, values = zip(*known, strict=True)
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=color, label=label)


def _mark(axes, records: list[dict], color):
    """Each evaluation's sets, the first filled, with standard errors."""
    for record in records:
        for place, rate in enumerate(Evaluation.from_metrics(record).rates.values()):
            face = "none" if place else color
            axes.errorbar(record["step"], rate.solved, rate.standard_error, fmt="o", color=color, mfc=face, capsize=2)


def smooth(values: Sequence[float]) -> list[float]:
    """The exponential mean, started without a bias towards 0."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(total / weight)
    return smoothed
