"""Writes the report of a comparison: the paper's Tables 3 to 5 with intervals, as Markdown and JSON, and figures."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas

from rhythm_kernels.console import markdown_table
from rhythm_kernels.files import write_whole
from train.compare.cells import BASELINE, RANDOM, Groups, bottom_of, label
from train.compare.figures import draw_figures
from train.compare.runs import Run
from train.compare.scores import (
    CONFIDENCE,
    FEWEST_PAIRS,
    MEASURES,
    POWER,
    Difference,
    at_end,
    differences_of,
    evaluations_of,
    of_shared_seeds,
    shared_seeds,
    training_of,
    unpaired_seeds,
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
    sections = _sections(runs, evaluations, training, weight)
    text = "\n\n".join(part if part.startswith("|") else textwrap.fill(part, WIDTH) for part in sections)
    write_whole(out / "report.md", text + "\n")
    write_whole(out / "report.json", json.dumps(_numbers(runs, evaluations, ends, training, weight), indent=1) + "\n")
    say(text)
    figures = draw_figures(evaluations, out, weight)
    say(f"\nin {out}: report.md, report.json, {', '.join(figures)}")


def _sections(
    runs: Sequence[Run], evaluations: pandas.DataFrame, training: pandas.DataFrame, weight: float
) -> list[str]:
    """Returns the parts of the report: tables, and sentences that say what their numbers are."""
    ends = at_end(evaluations)
    first, seeds = runs[0].config, sorted({run.seed for run in runs})
    groups = Groups.of(list(dict.fromkeys(run.cell for run in runs)))
    ablated = [*groups.baseline, *groups.bottom, *groups.largest, *groups.top] if groups.bottom or groups.top else []
    present = [*groups.strategies, *groups.bottom, *groups.top]
    evaluated = len({step for step, _ in runs[0].evaluations})
    parts: list[str] = [
        f"# Credit compared: {first.preset}",
        f"{len(runs)} runs of {first.grpo.max_steps} steps, seeds {', '.join(map(str, seeds))}. Solve rates are in "
        f"per cent of {_problems(runs)} held-out problems, means over seeds. {_explain(ends)}",
        *_notes(evaluations),
    ]
    if groups.strategies:
        parts += [
            "## Strategies, as in the paper's Tables 3 and 4",
            *_score_tables(ends, groups.strategies, weight, evaluated),
            *_against_random(runs, ends, groups.strategies),
        ]
    if ablated:
        parts += [
            "## Ablations, as in the paper's Table 5",
            *_score_tables(ends, ablated, weight, evaluated, is_ablation=True),
            *_against_bottom(ends, groups),
        ]
    parts += ["## What these seeds can show", _power_text(), _power_table(ends, present)]
    parts += [
        "## Beside the scores",
        "Reward, length and cut-off answers of the training are means over the last tenth of the steps; cut-off "
        "answers of the evaluations are those after the last step. All are means over seeds.",
    ]
    for cells, is_ablation in ((groups.strategies, False), (ablated, True)):
        if cells:
            seeds = _which_seeds(ends, cells).strip()
            parts += [*([seeds] if seeds else []), _beside_table(ends, training, cells, is_ablation)]
    return parts


def _problems(runs: Sequence[Run]) -> str:
    """Returns the numbers of problems of the sets: one where it is the same for all."""
    rates = runs[0].evaluations[-1][1].rates
    counts = {name: rate.problems for name, rate in rates.items()}
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,}"
    return ", ".join(f"{count:,} ({name})" for name, count in counts.items())


def _explain(ends: pandas.DataFrame) -> str:
    seeds = ends.groupby("cell")["seed"].nunique()
    text = (
        "Behind ± stands the standard error of a single run's score, from the problems and from the answers that were "
        "sampled to them. Seeds share the problems and not the samples, so the mean of S seeds is off by less than "
        "that, and by at least 1 / sqrt(S) of it. A difference is taken within each seed that both have, and its "
        f"interval is Student's t over these differences ({CONFIDENCE:.0%}); that of a single seed has none. The "
        "interval says what other seeds would give on these problems. No correction is made for the number of "
        "comparisons."
    )
    if BASELINE not in seeds:
        return f"{text} No run is GRPO (--credit {BASELINE}), so there are no differences against it."
    with_pairs = {cell for cells in differences_of(ends, "last").values() for cell in cells}
    if apart := [cell for cell in seeds.index if cell != BASELINE and cell not in with_pairs]:
        text += f" No seed is GRPO's too, so there is no difference: {', '.join(apart)}."
    return text


def _notes(evaluations: pandas.DataFrame) -> Iterator[str]:
    """Yields sentences on runs that are no pair or were not verified."""
    if unpaired := unpaired_seeds(evaluations):
        yield (
            f"The runs of seed {', '.join(map(str, unpaired))} do not begin with the same solve rates, so they began "
            "with other policies or other samples: pairing them takes nothing out of a difference."
        )
    unverified = evaluations[evaluations["unverified"] > 0]
    if len(unverified):
        worst = unverified.loc[unverified["unverified"].idxmax()]
        yield (
            f"Answers that could not be verified count as wrong. There are up to {worst['unverified']:.1%} in an "
            f"evaluation: {worst['cell']}, seed {worst['seed']}, {worst['set']}, step {worst['step']}."
        )


def _which_seeds(table: pandas.DataFrame, cells: Sequence[str]) -> str:
    """Returns a sentence on the seeds that are left out since not all of the cells have them; else nothing."""
    of_cells = table[table["cell"].isin(cells)]
    shared, all_seeds = shared_seeds(of_cells), set(of_cells["seed"])
    if not shared:
        return " No seed is common to all rows: the numbers of two rows are of different seeds."
    if shared == all_seeds:
        return ""
    kept, left = (", ".join(map(str, sorted(seeds))) for seeds in (shared, all_seeds - shared))
    return f" Rows are of the seeds that all of them have, {kept}, without {left}."


def _score_tables(
    ends: pandas.DataFrame, cells: Sequence[str], weight: float, evaluated: int, *, is_ablation: bool = False
) -> Iterator[str]:
    """Yields for each measure a sentence and its table: scores, and differences against GRPO.

    Args:
        weight: of the moving average of the peak.
        evaluated: how many evaluations a run has.
    """
    shared = of_shared_seeds(ends, cells)
    sets, seeds = list(dict.fromkeys(shared["set"])), shared.groupby("cell")["seed"].nunique()
    for measure, what in MEASURES.items():
        differences = differences_of(shared, measure)
        means = 100 * shared.groupby(["cell", "set"])[[measure, "error"]].mean()
        rows = []
        for cell in cells:
            scores = [f"{means.loc[(cell, name), measure]:.1f}" for name in sets]
            if measure == "last":
                scores = [f"{score} ± {means.loc[(cell, name), 'error']:.1f}" for score, name in zip(scores, sets)]
            pairs = [differences.get(name, {}).get(cell) for name in sets]
            texts = [f"{score} {_show(pair)}" if pair else score for score, pair in zip(scores, pairs, strict=True)]
            rows.append([label(cell, is_ablation), str(seeds[cell]), *texts])
        text = f"Scores are {what}.{_which_seeds(ends, cells)}"
        if measure == "peak":
            text += (
                f" Its weight is {weight:g}. It begins at the solve rate before the training, which has at least "
                f"{(1 - weight) ** (evaluated - 1):.0%} of the weight in the end."
            )
        yield text
        yield markdown_table(["method", "seeds", *sets], rows)


def _against_random(runs: Sequence[Run], ends: pandas.DataFrame, cells: Sequence[str]) -> Iterator[str]:
    """Yields a sentence and a table of differences against random credit, where such a run credits as many tokens."""
    fractions = {run.cell: run.config.credit.top_fraction for run in runs}
    sets = list(dict.fromkeys(ends["set"]))
    for random in [cell for cell in cells if cell.partition(" ")[0] == RANDOM]:
        of_measure = {measure: differences_of(ends, measure, random) for measure in MEASURES}
        rows = []
        for cell in cells:
            if cell.partition(" ")[0] in (BASELINE, RANDOM) or fractions[cell] != fractions[random]:
                continue
            pairs = [of_measure[measure].get(name, {}).get(cell) for measure in MEASURES for name in sets]
            if any(pairs):
                rows.append([label(cell), str(pairs[0].seeds), *map(_show, pairs)])
        if rows:
            yield (
                f"{label(random).removeprefix('+ ').capitalize()} raises the advantages of {fractions[random]:.0%} of "
                "the tokens, whichever they are. Differences against it say what the choice of the tokens adds. "
                "Coupled credit raises some more, since part of an anchor's credit moves to a token before it."
            )
            yield markdown_table(["method", "pairs", *_heads(sets)], rows)


def _against_bottom(ends: pandas.DataFrame, groups: Groups) -> Iterator[str]:
    """Yields a sentence and a table of what the largest values do more than the smallest, if both are there."""
    sets, rows = list(dict.fromkeys(ends["set"])), []
    for bottom in groups.bottom:
        of_measure = {measure: differences_of(ends, measure, bottom) for measure in MEASURES}
        for top in groups.largest:
            pairs = [of_measure[measure].get(name, {}).get(top) for measure in MEASURES for name in sets]
            if bottom == bottom_of(top) and any(pairs):
                rows.append([label(top, True), str(pairs[0].seeds), *map(_show, pairs)])
    if rows:
        yield "Differences against the bottom of the same strategy say whether it matters which tokens it takes."
        yield markdown_table(["method", "pairs", *_heads(sets)], rows)


def _heads(sets: Sequence[str]) -> list[str]:
    return [f"{name}, {'peak average' if measure == 'peak' else 'last'}" for measure in MEASURES for name in sets]


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
        f"differences that was found, in points. A difference that is smaller may be there and not show. The deviation "
        f"of few pairs is itself uncertain, so there is no number for fewer than {FEWEST_PAIRS} pairs."
    )


def _power_table(ends: pandas.DataFrame, cells: Sequence[str]) -> str:
    of_measure = {measure: differences_of(ends, measure) for measure in MEASURES}
    sets, rows = list(dict.fromkeys(ends["set"])), []
    for cell in cells:
        pairs = [of_measure[measure].get(name, {}).get(cell) for measure in MEASURES for name in sets]
        if any(pairs):
            rows.append([label(cell), str(pairs[0].seeds), *map(_show_power, pairs)])
    return markdown_table(["method", "pairs", *_heads(sets)], rows) if rows else "There are no differences."


def _show_power(difference: Difference) -> str:
    if difference.detectable is None:
        return "-"
    return f"{100 * difference.detectable:.1f} (sd {100 * difference.deviation:.1f})"


def _beside_table(
    ends: pandas.DataFrame, training: pandas.DataFrame, cells: Sequence[str], is_ablation: bool = False
) -> str:
    shared, training = of_shared_seeds(ends, cells), of_shared_seeds(training, cells)
    sets, rows = list(dict.fromkeys(shared["set"])), []
    trained = training.groupby("cell")[["reward", "length", "cut_off"]].mean()
    finished = shared.groupby(["cell", "set"])["finished"].mean()
    for cell in cells:
        texts = ["-", "-", "-"]
        if cell in trained.index:
            reward, length, cut_off = trained.loc[cell]
            texts = [f"{reward:.3f}", f"{length:.1f}", f"{cut_off:.1%}"]
        rows.append([label(cell, is_ablation), *texts, *(f"{1 - finished[cell, name]:.1%}" for name in sets)])
    heads = ["reward", "length, tokens", "cut off in training", *(f"cut off, {name}" for name in sets)]
    return markdown_table(["method", *heads], rows)


def _numbers(
    runs: Sequence[Run],
    evaluations: pandas.DataFrame,
    ends: pandas.DataFrame,
    training: pandas.DataFrame,
    weight: float,
) -> dict[str, object]:
    """Returns what report.json holds, as shares of 1: all evaluations, and differences over all seeds of both cells."""
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
