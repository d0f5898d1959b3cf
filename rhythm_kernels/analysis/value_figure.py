"""The figure of `rhythm value`."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rhythm_kernels.analysis.decisions import TENTHS, by_tenth
from rhythm_kernels.analysis.style import COLORS, hide_frame
from rhythm_kernels.analysis.value_judge import STRATEGIES, Judged
from rhythm_kernels.analysis.value_tables import ALL, ORACLE, Tables

COLOR_OF = {
    "coupled": COLORS["coupled"],
    "global": COLORS["fai"],
    "local": COLORS["waad"],
    "entropy": COLORS["entropy"],
    "random": COLORS["soft"],
    ORACLE: COLORS["grid"],
}


def draw(tables: Tables, answers: list[Judged], path: Path) -> None:
    """Draws the share of the decisions on the tokens of each strategy, and where in the answer both are."""
    matplotlib.use("Agg")  # files only
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = tables.strategies[ALL]
    x, found = np.arange(len(numbers)), [one["decisions"] for one in numbers.values()]
    value = np.array([one.value for one in found])
    error = [value - [one.low for one in found], [one.high for one in found] - value]
    left.bar(x, value, 0.6, yerr=error, capsize=3, color=[COLOR_OF[one] for one in numbers])
    left.hlines(
        [one["chance"].value for one in numbers.values()],
        x - 0.42,
        x + 0.42,
        colors=COLORS["text"],
        linestyles="dashed",
        label="chance",
    )
    left.set_xticks(x, numbers)
    top = np.nanmax([1.0, *(one.high for one in found)])  # noise may take an estimate above 1
    left.set(ylabel="share of the decisions on selected tokens", ylim=(0, top))
    left.legend(frameon=False, fontsize=8)
    tenth = np.arange(1, TENTHS + 1)
    right.bar(tenth, [row["decisions"].value for row in tables.tenths], 0.8, color="#c9cdd4", label="decisions")
    for strategy in STRATEGIES[:-1]:
        extra = [answer.gammas[strategy] - 1 for answer in answers]
        credit = np.mean([by_tenth(one) / max(1e-9, one.sum()) for one in extra], 0)
        right.plot(tenth, credit, "o-", markersize=3, color=COLOR_OF[strategy], label=f"credit, {strategy}")
    right.set_xticks(tenth)
    right.set(xlabel="tenth of the answer", ylabel="share of the whole answer")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        hide_frame(axes)
    figure.savefig(path, dpi=130)
