"""Tests whether anchors follow preplan tokens, as in the paper's Table 2, on any model.

The model answers problems. In each answer the command finds the peaks of two numbers: of the windowed average attention
distance (WAAD), where the model reaches back before it goes on, and of the future attention influence (FAI), at tokens
that later ones look back at. It counts how often the peaks coincide or follow each other, and compares that with the
same peaks shifted along the answer.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from rhythm_kernels.analysis.bootstrap import Estimate, bootstrap, share
from rhythm_kernels.analysis.reading import read
from rhythm_kernels.analysis.receivers import FEWEST_ROWS
from rhythm_kernels.analysis.study import (
    INTERVALS,
    Answer,
    Study,
    check_flags,
    parser_of,
    report_of,
    shown,
    table,
    too_short,
    write_report,
)
from rhythm_kernels.analysis.style import COLORS, hide_frame
from rhythm_kernels.checks import check_float, check_int
from rhythm_kernels.credit.selection import find_peaks

FEWEST_TOKENS = 16
"""An answer counts if it has at least so many tokens before its last FEWEST_ROWS."""
NEARBY = 20
"""A nearby shift moves peaks by at most so many tokens, so that a trend along the answer stays in place."""
FURTHEST = 3
"""Coupling is reported for FAI peaks up to so many tokens after a WAAD peak."""
PAPER = {
    "entropy": (0.3608, 0.2386),
    "co-occurrence": (0.6084, 0.2241),
    "coupling": (0.5253, 0.3687),
}
"""(observed, baseline) for Qwen3-4B-Base in the paper's Table 2; entropy in nats."""


class Peaks(NamedTuple):
    """The m tokens of one answer that count; all fields are [m]."""

    entropy: np.ndarray
    """Nats, of the distribution that the token was drawn from."""
    next_entropy: np.ndarray
    """Nats, of the distribution of the next token, which the row of WAAD predicts."""
    waad: np.ndarray
    """bool, the peaks of WAAD; `fai` and `receiver` are the peaks of FAI and of the receiver heads' FAI."""
    fai: np.ndarray
    receiver: np.ndarray


class Row(NamedTuple):
    """One row of the table: a number, its baseline, and both in the paper."""

    name: str
    observed: Estimate
    baseline: float
    """The number for peaks shifted anywhere along the answer; for entropy, the mean over all tokens."""
    lift: Estimate
    """observed / baseline."""
    p: float
    """The share of shuffles that reach the observed number."""
    nearby_lift: Estimate
    """observed / the number for peaks shifted by at most NEARBY tokens."""
    paper: tuple[float, float] | None
    """(observed, baseline)."""


# ---- one answer ------------------------------------------------------------------------------------------------------


def signals(study: Study, answer: Answer) -> dict[str, list[float]]:
    """Reads an answer; returns the entropy, WAAD, FAI and receiver heads' FAI of each of its tokens."""
    device = study.model.device
    ids = torch.tensor(answer.prompt + answer.tokens, device=device)
    response = torch.arange(len(ids), device=device) >= len(answer.prompt)
    reading = read(study.model, ids, response, layers=study.args.layers, receivers=study.args.receivers)
    names = ("entropy", "waad", "fai", "receiver_fai")
    return {name: getattr(reading, name)[len(answer.prompt) :].tolist() for name in names}


def peaks_of(signal: dict[str, list[float]], quantile: float) -> Peaks | None:
    """Returns the peaks of an answer's signals, or None for an answer that is too short.

    The last FEWEST_ROWS tokens do not count: their FAI is the attention of a few neighbours, large for any token.
    """
    counted = len(signal["entropy"]) - FEWEST_ROWS
    if counted < FEWEST_TOKENS:
        return None

    def peaks(name: str) -> np.ndarray:
        values = torch.tensor(signal[name][:counted], dtype=torch.float32)[None]
        return find_peaks(values, torch.ones_like(values, dtype=torch.bool), min_quantile=quantile)[0].numpy()

    entropy = np.array(signal["entropy"])
    return Peaks(entropy[:counted], entropy[1 : counted + 1], peaks("waad"), peaks("fai"), peaks("receiver_fai"))


# ---- statistics ------------------------------------------------------------------------------------------------------


def after(leaders: np.ndarray, within: int) -> np.ndarray:
    """Returns the positions at a leader or at most `within` positions after one, bool [..., m] like `leaders`."""
    reached = leaders.copy()
    for distance in range(1, min(within, leaders.shape[-1] - 1) + 1):
        reached[..., distance:] |= leaders[..., :-distance]
    return reached


def shifted(values: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Returns [S, m]: the values [m] moved to the right by each of the shifts [S], around the end."""
    size = len(values)
    return values[(np.arange(size) - shifts[:, None]) % size]


def draw_shifts(size: int, count: int, seed: int, index: int, nearby: bool) -> np.ndarray:
    """Returns `count` shifts for problem `index`, int64, never 0."""
    generator = np.random.default_rng([seed, index, nearby])
    if not nearby:
        return generator.integers(1, size, count)
    distances = generator.integers(1, min(NEARBY, size - 1) + 1, count)
    return distances * generator.choice([-1, 1], count)


def shuffled_sums(kind: str, answers: list[Peaks], shuffles: int, seed: int, nearby: bool, within: int) -> np.ndarray:
    """Returns the first column of `observed_sums` with the leading peaks shifted, [n, shuffles]."""
    sums = np.zeros((len(answers), shuffles))
    for index, answer in enumerate(answers):
        shifts = draw_shifts(len(answer.waad), shuffles, seed, index, nearby)
        leaders, values = _sides(kind, answer)
        sums[index] = (after(shifted(leaders, shifts), within) * values).sum(-1)
    return sums


def observed_sums(kind: str, answers: list[Peaks], within: int) -> np.ndarray:
    """Returns a sum and a count for each answer, [n, 2]; the ratio of their totals is the number of a row.

    The kinds are "entropy", the mean entropy at WAAD peaks; "next entropy", that of the token after; "co-occurrence",
    the share of the receiver heads' FAI peaks that are FAI peaks of the global heads; and "coupling", the share of FAI
    peaks that stand at a WAAD peak or at most `within` tokens after one.
    """
    sums = np.zeros((len(answers), 2))
    for index, answer in enumerate(answers):
        leaders, values = _sides(kind, answer)
        count = leaders.sum() if "entropy" in kind else values.sum()
        sums[index] = (after(leaders, within) * values).sum(), count
    return sums


def _sides(kind: str, answer: Peaks) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the peaks that are shifted, the values that are summed at them)."""
    if kind == "entropy":
        return answer.waad, answer.entropy
    if kind == "next entropy":
        return answer.waad, answer.next_entropy
    return (answer.fai, answer.receiver) if kind == "co-occurrence" else (answer.waad, answer.fai)


def row_of(name: str, kind: str, answers: list[Peaks], *, within: int, shuffles: int, seed: int, paper=None) -> Row:
    """Returns a row of the table; `observed_sums` says what the kinds are."""
    hits = observed_sums(kind, answers, within)
    anywhere, nearby = (shuffled_sums(kind, answers, shuffles, seed, is_nearby, within) for is_nearby in (False, True))
    if "entropy" in kind:
        values = [_sides(kind, answer)[1] for answer in answers]
        base = np.array([[entropy.sum(), len(entropy)] for entropy in values]).reshape(-1, 2)
    else:
        base = np.stack([anywhere.mean(1), hits[:, 1]], 1)
    nearby_base = np.stack([nearby.mean(1), hits[:, 1]], 1)

    def lift(hits, trials, base_hits, base_trials):
        return (hits / trials) / (base_hits / base_trials)

    reached = (anywhere.sum(0) >= hits[:, 0].sum()).sum()
    return Row(
        name=name,
        observed=bootstrap(hits, share, seed=seed),
        baseline=bootstrap(base, share, seed=seed).value,
        lift=bootstrap(np.hstack([hits, base]), lift, seed=seed),
        p=float(1 + reached) / (1 + shuffles),
        nearby_lift=bootstrap(np.hstack([hits, nearby_base]), lift, seed=seed),
        paper=paper,
    )


def table_2(answers: list[Peaks], *, within: int, shuffles: int, seed: int) -> list[Row]:
    """Returns all rows; coupling has one per distance, and that of `within` is compared with the paper."""
    options = {"shuffles": shuffles, "seed": seed}
    rows = [
        row_of("entropy at WAAD peaks", "entropy", answers, within=0, paper=PAPER["entropy"], **options),
        row_of("entropy of the token after", "next entropy", answers, within=0, **options),
        row_of("co-occurrence", "co-occurrence", answers, within=0, paper=PAPER["co-occurrence"], **options),
    ]
    for distance in sorted({*range(FURTHEST + 1), within}):
        name = "coupling, at a WAAD peak" if distance == 0 else f"coupling, 0 to {distance} after"
        paper = PAPER["coupling"] if distance == within else None
        rows.append(row_of(name, "coupling", answers, within=distance, paper=paper, **options))
    return rows


# ---- report ----------------------------------------------------------------------------------------------------------

EXPLAINED = [
    "*Entropy* is the entropy of the distribution that a token was drawn from, in nats at temperature 1. The first "
    "row is its mean at WAAD peaks, the baseline its mean over all tokens. *Co-occurrence* is the share of the "
    "receiver heads' FAI peaks that are also FAI peaks of the global heads. *Coupling* is the share of the global "
    "heads' FAI peaks at or shortly after a WAAD peak. The *baseline* shifts the peaks around the answer by a "
    "random number of tokens; p is the share of shuffles that reach the observed number. The *nearby lift* compares "
    f"with shifts by at most {NEARBY} tokens, which keep a trend along the answer in place. {INTERVALS}",
    "The model, its size and the problems are not the paper's. Chosen here, and perhaps different there: which "
    "peaks count (local maxima above a quantile of the answer's own values), how far after a WAAD peak an FAI peak "
    f"may stand, and the shuffle. The last {FEWEST_ROWS} tokens of an answer do not count, because too few tokens "
    "look back at them.",
]


def report(
    rows: list[Row], answers: list[Peaks], left_out: int, study: Study, arguments: list[str]
) -> tuple[str, dict]:
    """Returns (report.md, the data of report.json)."""
    args = study.args
    tokens = sum(len(answer.waad) for answer in answers)
    peaks = {
        "waad": sum(int(answer.waad.sum()) for answer in answers),
        "fai": sum(int(answer.fai.sum()) for answer in answers),
        "receiver_fai": sum(int(answer.receiver.sum()) for answer in answers),
    }
    head = ["", "observed", "baseline", "lift", "p", "nearby lift", "paper: observed", "baseline", "lift"]
    lines = []
    for row in rows:
        form = ".3f" if "entropy" in row.name else ".1%"
        paper = ["", "", ""]
        if row.paper:
            paper = [f"{row.paper[0]:{form}}", f"{row.paper[1]:{form}}", f"{row.paper[0] / row.paper[1]:.2f}"]
        ours = [shown(row.observed, form), f"{row.baseline:{form}}", shown(row.lift, ".2f"), f"{row.p:.3f}"]
        lines.append([row.name, *ours, shown(row.nearby_lift, ".2f"), *paper])
    skipped = f"; {left_out} shorter answers left out" if left_out else ""
    paragraphs = [
        f"{args.model}, {len(answers)} answers, {tokens:,} tokens{skipped}; peaks above the {args.peak_quantile} "
        f"quantile: {peaks['waad']:,} of WAAD (windowed average attention distance), {peaks['fai']:,} of FAI (future "
        f"attention influence), {peaks['receiver_fai']:,} of the receiver heads' FAI; {args.shuffles:,} shuffles. The "
        "paper's numbers are those of Qwen3-4B-Base.",
        table(head, lines),
        *EXPLAINED,
        "![Entropy at WAAD peaks; co-occurrence and coupling](figure.png)",
    ]
    numbers = {
        "peak_quantile": args.peak_quantile,
        "within": args.within,
        "shuffles": args.shuffles,
        "answers": len(answers),
        "left_out": left_out,
        "tokens": tokens,
        "peaks": peaks,
        "rows": [row._asdict() for row in rows],
    }
    return report_of(study, arguments, "Preplan tokens and anchors (Table 2)", paragraphs, numbers)


def draw(rows: list[Row], answers: list[Peaks], within: int, path: Path) -> None:
    """Draws the entropy at WAAD peaks beside that of all tokens, and both shares beside their baselines."""
    matplotlib.use("Agg")  # files only
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    of_all = np.concatenate([answer.entropy for answer in answers])
    at_peaks = np.concatenate([answer.entropy[answer.waad] for answer in answers])
    for values, label, color in ((of_all, "all tokens", "soft"), (at_peaks, "at WAAD peaks", "waad")):
        ordered = np.sort(values)
        above = 1 - np.arange(len(ordered)) / max(1, len(ordered))
        left.plot(ordered, above, color=COLORS[color], label=label)
        if len(values):
            left.axvline(values.mean(), color=COLORS[color], linestyle=":", linewidth=1)
    left.set(xlabel="entropy, nats (dotted: means)", ylabel="share of tokens above", xlim=(0, None), ylim=(0, 1))
    left.legend(frameon=False)

    bars = [row for row in rows if row.name == "co-occurrence" or (row.paper and row.name.startswith("coupling"))]
    x, observed = np.arange(len(bars)), [row.observed for row in bars]
    value = np.array([estimate.value for estimate in observed])
    error = [value - [estimate.low for estimate in observed], [estimate.high for estimate in observed] - value]
    right.bar(x - 0.2, value, 0.36, yerr=error, capsize=3, color=COLORS["waad"], label="observed")
    right.bar(x + 0.2, [row.baseline for row in bars], 0.36, color="#c9cdd4", label="shifted")
    places, paper = np.concatenate([x - 0.2, x + 0.2]), np.array([row.paper for row in bars]).T.flatten()
    right.plot(places, paper, "D", color=COLORS["fai"], markersize=5, label="paper, Qwen3-4B-Base")
    reach = f"0 to {within} after" if within else "at"
    names = ["receiver peaks\nthat are FAI peaks", f"FAI peaks {reach}\na WAAD peak"]
    right.set_xticks(x, names[: len(bars)])
    right.set(ylabel="share", ylim=(0, 1))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        hide_frame(axes)
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> None:
    """Runs `rhythm couple`: generates answers, reads them, and writes the report."""
    parser = parser_of("couple", __doc__)
    parser.add_argument(
        "--receivers",
        type=int,
        default=16,
        help="number of receiver heads: those whose attention falls on the fewest tokens",
    )
    parser.add_argument(
        "--peak-quantile",
        type=float,
        default=0.6,
        help="a local maximum is a peak if it is above this quantile of the answer's values",
    )
    parser.add_argument(
        "--within", type=int, default=1, help="largest number of tokens from a WAAD peak to an FAI peak coupled with it"
    )
    parser.add_argument("--shuffles", type=int, default=1000, help="number of random shifts that the baseline averages")
    args = parser.parse_args(arguments)
    check_flags(args, "couple")
    check_int("--receivers", args.receivers, 1)
    check_float("--peak-quantile", args.peak_quantile, 0.0, 1.0)
    check_int("--within", args.within, 0)
    check_int("--shuffles", args.shuffles, 1)
    with Study("couple", args, also=["receivers"]) as study:
        measured = study.measured(lambda answer: signals(study, answer))
    all_peaks = [peaks_of(signal, args.peak_quantile) for signal in measured]
    answers = [peaks for peaks in all_peaks if peaks is not None]
    if not answers:
        raise too_short(FEWEST_ROWS + FEWEST_TOKENS)
    rows = table_2(answers, within=args.within, shuffles=args.shuffles, seed=args.seed)
    text, data = report(rows, answers, len(measured) - len(answers), study, arguments)
    draw(rows, answers, args.within, args.out / "figure.png")
    write_report(args.out, text, data)
