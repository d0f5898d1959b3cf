"""Writes the report of a comparison: the paper's Tables 3 to 5 with intervals, as Markdown and JSON, and figures."""

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas

from train.compare.cells import BASELINE, Groups, label
from train.compare.figures import draw_figures
from train.compare.runs import Run
from train.compare.scores import (
    CONFIDENCE,
    MEASURES,
    POWER,
    Difference,
    at_end,
    differences_of,
    evaluations_of,
    training_of,
)
from train.config import BadSetting
from train.console import say

WIDTH = 120  # of a line outside of tables


def write_report(runs: Sequence[Run], out: Path, peak_weight: float | None = None) -> None:
    """Prints the tables and writes them to report.md, their numbers to report.json, and the figures beside them.

    Args:
        peak_weight: of the moving average of the peak; by default that of the runs, which must then be the same.
    """
    weights = {run.config.run.peak_weight for run in runs} if peak_weight is None else {peak_weight}
    if len(weights) > 1:
        raise BadSetting(f"--peak-weight must be given where the runs have different ones, {sorted(weights)}")
    (weight,) = weights
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(f"--out must be a folder to write in, got {str(out)!r}: {error.strerror}") from error
    evaluations = evaluations_of(runs, weight)
    ends, training = at_end(evaluations), training_of(runs)
    sections = _sections(runs, ends, training, weight)
    text = "\n\n".join(part if part.startswith("|") else textwrap.fill(part, WIDTH) for part in sections)
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    (out / "report.json").write_text(json.dumps(_numbers(runs, evaluations, ends, training, weight), indent=1) + "\n")
    say(text)
    figures = draw_figures(evaluations, out, weight)
    say(f"\nin {out}: report.md, report.json, {', '.join(figures)}")


def _sections(runs: Sequence[Run], ends: pandas.DataFrame, training: pandas.DataFrame, weight: float) -> list[str]:
    """Returns the parts of the report: tables, and sentences that say what their numbers are."""
    first, seeds = runs[0].config, sorted({run.seed for run in runs})
    groups = Groups.of(list(dict.fromkeys(run.cell for run in runs)))
    present = [*groups.strategies, *groups.bottom, *groups.top]
    parts = [
        f"# Credit compared: {first.preset}",
        f"{len(runs)} runs of {first.grpo.max_steps} steps, seeds {', '.join(map(str, seeds))}. Solve rates are in "
        f"per cent of {_problems(runs)} held-out problems, means over seeds. {_explain(ends, weight)}",
        "## Strategies, as in the paper's Tables 3 and 4",
        *_score_tables(ends, groups.strategies),
    ]
    if groups.bottom or groups.top:
        cells = [*groups.baseline, *groups.bottom, *groups.largest, *groups.top]
        parts += ["## Ablations, as in the paper's Table 5", *_score_tables(ends, cells, is_ablation=True)]
    parts += ["## What these seeds can show", _power_text(), _power_table(ends, present)]
    parts += [
        "## Beside the scores",
        "Reward, length and cut-off answers of the training are means over the last tenth of the steps; cut-off "
        "answers of the evaluations are those after the last step. All are means over seeds.",
        _beside_table(ends, training, present),
    ]
    return parts


def _problems(runs: Sequence[Run]) -> str:
    """Returns the numbers of problems of the sets: one where it is the same for all."""
    rates = runs[0].evaluations[-1][1].rates
    counts = {name: rate.problems for name, rate in rates.items()}
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,}"
    return ", ".join(f"{count:,} ({name})" for name, count in counts.items())


def _explain(ends: pandas.DataFrame, weight: float) -> str:
    seeds = ends.groupby("cell")["seed"].nunique()
    if BASELINE not in seeds:
        return f"No run is GRPO (--credit {BASELINE}), so there are no differences against it."
    text = (
        f"A difference is against GRPO, within each seed that both have, and its interval is Student's t over "
        f"these differences ({CONFIDENCE:.0%}). It says what other seeds would give on these problems. The standard "
        f"error that the problems alone give a row's last score stands behind ±: all seeds and rows answer the same "
        f"problems, so more seeds do not lower it, and most of it cancels in a difference. No correction is made for "
        f"the number of comparisons. The moving average has the weight {weight:g}."
    )
    pairs = {cell: pair.seeds for cells in differences_of(ends, "last").values() for cell, pair in cells.items()}
    if alone := [cell for cell, count in pairs.items() if count < 2]:
        text += f" With fewer than two seeds there is no interval: {', '.join(alone)}."
    if apart := [cell for cell in seeds.index if cell != BASELINE and cell not in pairs]:
        text += f" No seed is GRPO's too, so there is no difference: {', '.join(apart)}."
    return text


def _score_tables(ends: pandas.DataFrame, cells: Sequence[str], is_ablation: bool = False) -> Iterator[str]:
    """Yields for each measure a sentence and its table: scores, and differences against GRPO."""
    sets, seeds = list(dict.fromkeys(ends["set"])), ends.groupby("cell")["seed"].nunique()
    for measure, what in MEASURES.items():
        differences = differences_of(ends, measure)
        means = 100 * ends.groupby(["cell", "set"])[[measure, "error"]].mean()
        rows = []
        for cell in cells:
            scores = [
                f"{means.loc[(cell, name), measure]:.1f} ± {means.loc[(cell, name), 'error']:.1f}" for name in sets
            ]
            pairs = [differences.get(name, {}).get(cell) for name in sets]
            texts = [f"{score} {_show(pair)}" if pair else score for score, pair in zip(scores, pairs, strict=True)]
            rows.append([label(cell, is_ablation), str(seeds[cell]), *texts])
        yield f"Scores are {what}."
        yield markdown(["method", "seeds", *sets], rows)


def _show(difference: Difference) -> str:
    """Returns a difference in points, with its interval if there is one."""
    text = f"{100 * difference.mean:+.1f}"
    if difference.low is None:
        return text
    return f"{text} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _power_text() -> str:
    return (
        f"The smallest true difference against GRPO, in points, that a two-sided paired t test at "
        f"{1 - CONFIDENCE:.0%} finds with a probability of {POWER:.0%}, from the standard deviation (sd) of the "
        f"differences that was found, in points. A difference that is smaller may be there and not show."
    )


def _power_table(ends: pandas.DataFrame, cells: Sequence[str]) -> str:
    of_measure = {measure: differences_of(ends, measure) for measure in MEASURES}
    sets, rows = list(dict.fromkeys(ends["set"])), []
    for cell in cells:
        pairs = [of_measure[measure].get(name, {}).get(cell) for measure in MEASURES for name in sets]
        if any(pairs):
            rows.append([label(cell), str(pairs[0].seeds), *map(_show_power, pairs)])
    heads = [f"{name}, {'peak average' if measure == 'peak' else 'last'}" for measure in MEASURES for name in sets]
    return markdown(["method", "pairs", *heads], rows) if rows else "There are no differences."


def _show_power(difference: Difference) -> str:
    if difference.detectable is None:
        return "one seed"
    return f"{100 * difference.detectable:.1f} (sd {100 * difference.deviation:.1f})"


def _beside_table(ends: pandas.DataFrame, training: pandas.DataFrame, cells: Sequence[str]) -> str:
    sets, rows = list(dict.fromkeys(ends["set"])), []
    trained = training.groupby("cell")[["reward", "length", "cut_off"]].mean()
    finished = ends.groupby(["cell", "set"])["finished"].mean()
    for cell in cells:
        texts = ["-", "-", "-"]
        if cell in trained.index:
            reward, length, cut_off = trained.loc[cell]
            texts = [f"{reward:.3f}", f"{length:.1f}", f"{cut_off:.1%}"]
        rows.append([label(cell), *texts, *(f"{1 - finished[cell, name]:.1%}" for name in sets)])
    heads = ["reward", "length, tokens", "cut off in training", *(f"cut off, {name}" for name in sets)]
    return markdown(["method", *heads], rows)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def _numbers(
    runs: Sequence[Run],
    evaluations: pandas.DataFrame,
    ends: pandas.DataFrame,
    training: pandas.DataFrame,
    weight: float,
) -> dict[str, object]:
    """Returns what report.json holds: all evaluations, and the differences of each measure, as shares of 1."""
    differences = {
        measure: {
            name: {cell: difference._asdict() for cell, difference in cells.items()}
            for name, cells in differences_of(ends, measure).items()
        }
        for measure in MEASURES
    }
    settings = {name: value for name, value in runs[0].config.settings().items() if name != "seeds"}
    return {
        "preset": runs[0].config.preset,
        "peak_weight": weight,
        "settings": {name: value for name, value in settings.items() if not name.startswith("credit")},
        "runs": [{"cell": run.cell, "seed": run.seed, "folder": str(run.folder)} for run in runs],
        "differences": differences,
        "training": training.to_dict(orient="records"),
        "evaluations": evaluations.to_dict(orient="records"),
    }
