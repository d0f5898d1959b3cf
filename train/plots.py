"""The learning curve of a run, as one picture."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from train.evaluate import Evaluation
from train.metrics import read_metrics

matplotlib.use("Agg")  # files only
SMOOTHING = 0.8  # of the exponential mean drawn over the single steps


def plot_learning_curve(runs: dict[str, Path], path: Path, title: str):
    """Reward, length and entropy over the steps of each run; `runs` maps a label to its folder."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    solved, length, entropy = figure.subplots(1, 3)
    for color, (label, folder) in zip(matplotlib.color_sequences["tab10"], runs.items(), strict=False):
        records = read_metrics(folder)
        steps = [record for record in records if "reward" in record]
        _draw(solved, steps, "reward", color, label)
        _draw(length, steps, "completions/mean_length", color, label)
        _draw(entropy, steps, "entropy", color, label)
        for record in records:
            if "reward" not in record:
                _mark(solved, record["step"], Evaluation.from_metrics(record), color)
    solved.set(title="solved: training (lines), held-out sampled (dots) and greedy (rings)", ylim=(0, 1))
    length.set(title="mean length, tokens", ylim=(0, None))
    entropy.set(title="entropy, nats a token", ylim=(0, None))
    for axes in (solved, length, entropy):
        axes.title.set_size(9)
        axes.set_xlabel("GRPO step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    length.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _draw(axes, records: list[dict], name: str, color, label: str):
    steps, values = [record["step"] for record in records], [record[name] for record in records]
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=color, label=label)


def _mark(axes, step: int, evaluation: Evaluation, color):
    for rate, face in ((evaluation.sampled, color), (evaluation.greedy, "none")):
        axes.errorbar(step, rate.solved, yerr=rate.standard_error, fmt="o", color=color, mfc=face, capsize=2)


def smooth(values: list[float]) -> list[float]:
    """The exponential mean, started without a bias towards 0."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(total / weight)
    return smoothed
