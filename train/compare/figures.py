"""Draws the curves of a comparison, as the paper's Figures 4 to 7: means over seeds, with their standard errors."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas
from matplotlib.figure import Figure

from train.compare.cells import BASELINE, Groups, label
from train.compare.scores import of_shared_seeds

matplotlib.use("Agg")  # files only
ROWS = {"peak": "moving average of the peak, %", "solved": "solve rate, %"}


def draw_figures(evaluations: pandas.DataFrame, out: Path, peak_weight: float) -> list[str]:
    """Draws strategies.png, bottom.png and top.png, each where there are such runs; returns the names of the files."""
    groups = Groups.of(list(dict.fromkeys(evaluations["cell"])))
    figures = {}
    if groups.strategies:
        figures["strategies.png"] = ("Strategies of credit (the paper's Figures 4 and 5)", groups.strategies)
    if groups.bottom:
        cells = [*groups.baseline, *groups.largest, *groups.bottom]
        figures["bottom.png"] = ("Credit for the top and for the bottom (the paper's Figure 6)", cells)
    if groups.top:
        cells = [*groups.baseline, *(cell for cell in groups.largest if cell.startswith("coupled")), *groups.top]
        figures["top.png"] = ("Coupled credit for other top fractions (the paper's Figure 7)", cells)
    for name, (title, cells) in figures.items():
        is_ablation = name != "strategies.png"
        draw_curves(
            of_shared_seeds(evaluations, cells),
            cells,
            out / name,
            f"{title}, a = {peak_weight:g}",
            is_ablation=is_ablation,
        )
    return list(figures)


def draw_curves(
    evaluations: pandas.DataFrame, cells: Sequence[str], path: Path, title: str, *, is_ablation: bool
) -> None:
    """Draws a column of panels for each set: the moving average of the peak, the solve rate, and its difference.

    The difference is taken against GRPO within each seed, and left out without GRPO. Seeds lie further apart than
    strategies do, so the panels above it show how the training goes, and this one how the strategies compare.
    """
    sets, rows = list(dict.fromkeys(evaluations["set"])), dict(ROWS)
    evaluations = evaluations.assign(difference=_differences(evaluations))
    if evaluations["difference"].notna().any():
        rows["difference"] = "solve rate less GRPO's, points"
    figure = Figure(figsize=(1.5 + 4.5 * len(sets), 1 + 3.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(sets), squeeze=False, sharex=True)
    colors = matplotlib.color_sequences["tab10"]
    for column, name in enumerate(sets):
        of_set = evaluations[evaluations["set"] == name]
        for row, (measure, heading) in enumerate(rows.items()):
            axes = panels[row][column]
            for place, cell in enumerate(cells):
                grouped = of_set[of_set["cell"] == cell].groupby("step")[measure]
                mean, error = 100 * grouped.mean(), 100 * grouped.sem().fillna(0.0)
                color = colors[place % len(colors)]
                text = f"{label(cell, is_ablation)}, seeds: {grouped.size().max()}"
                axes.plot(mean.index, mean, color=color, label=text, marker=None if measure == "peak" else ".")
                axes.fill_between(mean.index, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
            axes.set_title(f"{name}: {heading}", size=9)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1][column].set_xlabel("GRPO step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{title}; bands: one standard error over seeds", size=11)
    figure.savefig(path, dpi=120)


def _differences(evaluations: pandas.DataFrame) -> pandas.Series:
    """Returns the solve rate of each row less GRPO's of the same seed, set and step; NaN where there is none."""
    keys = ["seed", "set", "step"]
    indexed = evaluations.assign(place=evaluations.groupby(["cell", *keys]).cumcount()).set_index([*keys, "place"])
    baseline = indexed.loc[indexed["cell"] == BASELINE, "solved"]
    return pandas.Series((indexed["solved"] - baseline.reindex(indexed.index)).to_numpy(), evaluations.index)
