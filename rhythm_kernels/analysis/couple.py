"""Tests whether anchors follow preplan tokens, as in the paper's Table 2, on any model.

The model answers problems. In each answer the command finds the peaks of two numbers: of the windowed average attention
distance (WAAD), where the model reaches back before it goes on, and of the future attention influence (FAI), at tokens
that later ones look back at. It counts how often the peaks coincide or follow each other, and compares that with peaks
at random places.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from rhythm_kernels.analysis.bootstrap import Estimate, bootstrap, share
from rhythm_kernels.analysis.profile import correlations, profile, tables
from rhythm_kernels.analysis.reading import read
from rhythm_kernels.analysis.receivers import FEWEST_ROWS, RECEIVERS
from rhythm_kernels.analysis.sources import token_texts
from rhythm_kernels.analysis.study import (
    INTERVALS,
    Answer,
    Study,
    check_flags,
    check_room,
    parser_of,
    report_of,
    shown,
    too_short,
    write_report,
)
from rhythm_kernels.analysis.style import COLORS, hide_frame
from rhythm_kernels.checks import check_float, check_int
from rhythm_kernels.console import markdown_table
from rhythm_kernels.credit.selection import find_peaks

FEWEST_TOKENS = 16
"""An answer counts if it has at least so many tokens."""
NEARBY = 20
"""A nearby shift moves peaks by at most so many tokens, so that a trend along the answer stays in place."""
FURTHEST = 3
"""Coupling is reported for FAI peaks up to so many tokens after a WAAD peak."""
PAPER = {
    "entropy": (0.3608, 0.2386),
    "co-occurrence": (0.6084, 0.2241),
    "coupling": (0.5253, 0.3687),
}
"""(observed, random) for Qwen3-4B-Base in the paper's Table 2; entropy in nats."""


class Peaks(NamedTuple):
    """The m tokens of one answer that count; all fields are [m]."""

    entropy: np.ndarray
    """Nats, of the distribution that the token was drawn from."""
    next_entropy: np.ndarray
    """Nats, of the distribution of the next token, which the row of WAAD predicts; the last token's own at the end."""
    waad: np.ndarray
    """bool, the peaks of WAAD; `fai` and `receiver` are the peaks of FAI and of the receiver heads' FAI."""
    fai: np.ndarray
    receiver: np.ndarray


class Row(NamedTuple):
    """One row of the table: a number, what it is at random, and both in the paper."""

    name: str
    observed: Estimate
    random: float
    """The baseline of the paper's A.1: the mean entropy of all tokens, the density of FAI peaks, the share of FAI peaks
    at random places that follow a WAAD peak."""
    lift: Estimate
    """(observed - random) / random, as the other lifts."""
    p: float
    """The share of shuffles to random places that reach the observed number; NaN where no peak is counted."""
    shifted_lift: Estimate
    """The lift over peaks that are moved along the answer together."""
    nearby_lift: Estimate
    """The lift over peaks that are moved by at most NEARBY tokens together."""
    paper: tuple[float, float] | None
    """(observed, random)."""


# ---- one answer ------------------------------------------------------------------------------------------------------


def signals(study: Study, answers: list[Answer]) -> list[dict[str, list]]:
    """Reads answers; returns the text, entropy, WAAD, FAI and receiver heads' FAI of the tokens of each."""
    return [_signals(study, answer) for answer in answers]


def _signals(study: Study, answer: Answer) -> dict[str, list]:
    device, begin = study.model.device, len(answer.prompt)
    ids = torch.tensor(answer.prompt + answer.tokens, device=device)
    response = torch.arange(len(ids), device=device) >= begin
    reading = read(study.model, ids, response, layers=study.args.layers, receivers=study.args.receivers)
    names = ("entropy", "waad", "fai", "receiver_fai")
    texts = token_texts(study.tokenizer, ids.tolist())[begin:]
    return {"text": texts} | {name: getattr(reading, name)[begin:].tolist() for name in names}


def peaks_of(signal: dict[str, list], quantile: float, without_last: int = 0) -> Peaks | None:
    """Returns the peaks among an answer's tokens but the last ones, or None for an answer that is too short."""
    counted = len(signal["entropy"]) - without_last
    if counted < FEWEST_TOKENS:
        return None

    def peaks(name: str) -> np.ndarray:
        values = torch.tensor(signal[name][:counted], dtype=torch.float32)[None]
        return find_peaks(values, torch.ones_like(values, dtype=torch.bool), min_quantile=quantile)[0].numpy()

    entropy = np.array(signal["entropy"])
    following = np.append(entropy[1:], entropy[-1])
    return Peaks(entropy[:counted], following[:counted], peaks("waad"), peaks("fai"), peaks("receiver_fai"))


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


def shifted_sums(kind: str, answers: list[Peaks], shuffles: int, seed: int, nearby: bool, within: int) -> np.ndarray:
    """Returns the first column of `observed_sums` with the leading peaks shifted, [n, shuffles]."""
    sums = np.zeros((len(answers), shuffles))
    for index, answer in enumerate(answers):
        shifts = draw_shifts(len(answer.waad), shuffles, seed, index, nearby)
        leaders, values = _sides(kind, answer)
        sums[index] = (after(shifted(leaders, shifts), within) * values).sum(-1)
    return sums


def shuffled_sums(kind: str, answers: list[Peaks], shuffles: int, seed: int, within: int) -> np.ndarray:
    """Returns the first column of `observed_sums` with the summed values at random places, [n, shuffles]."""
    sums = np.zeros((len(answers), shuffles))
    for index, answer in enumerate(answers):
        leaders, values = _sides(kind, answer)
        generator = np.random.default_rng([seed, index, 2])
        places = generator.permuted(np.broadcast_to(values, (shuffles, len(values))), axis=1)
        sums[index] = (places * after(leaders, within)).sum(-1)
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


def random_sums(kind: str, answers: list[Peaks], within: int) -> np.ndarray:
    """Returns a sum and a count for each answer, [n, 2], whose ratio is the baseline of the paper's A.1."""
    sums = np.zeros((len(answers), 2))
    for index, answer in enumerate(answers):
        leaders, values = _sides(kind, answer)
        if "entropy" in kind:  # all tokens
            sums[index] = values.sum(), len(values)
        elif kind == "co-occurrence":  # the density of the global heads' peaks
            sums[index] = leaders.sum(), len(leaders)
        else:  # the expectation over all places of the FAI peaks
            sums[index] = values.sum() * after(leaders, within).mean(), values.sum()
    return sums


def _sides(kind: str, answer: Peaks) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the peaks that lead, the values that are summed at them)."""
    if kind == "entropy":
        return answer.waad, answer.entropy
    if kind == "next entropy":
        return answer.waad, answer.next_entropy
    return (answer.fai, answer.receiver) if kind == "co-occurrence" else (answer.waad, answer.fai)


def row_of(name: str, kind: str, answers: list[Peaks], *, within: int, shuffles: int, seed: int, paper=None) -> Row:
    """Returns a row of the table; `observed_sums` says what the kinds are."""
    hits, base = observed_sums(kind, answers, within), random_sums(kind, answers, within)

    def lift(hits, trials, base_hits, base_trials):
        return (hits / trials) / (base_hits / base_trials) - 1

    def lift_over(base: np.ndarray) -> Estimate:
        return bootstrap(np.hstack([hits, base]), lift, seed=seed)

    anywhere, nearby = (
        np.stack([shifted_sums(kind, answers, shuffles, seed, is_nearby, within).mean(1), hits[:, 1]], 1)
        for is_nearby in (False, True)
    )
    reached = (shuffled_sums(kind, answers, shuffles, seed, within).sum(0) >= hits[:, 0].sum() - 1e-9).sum()
    return Row(
        name=name,
        observed=bootstrap(hits, share, seed=seed),
        random=bootstrap(base, share, seed=seed).value,
        lift=lift_over(base),
        p=float(1 + reached) / (1 + shuffles) if hits[:, 1].sum() else np.nan,
        shifted_lift=lift_over(anywhere),
        nearby_lift=lift_over(nearby),
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
    "row is its mean at WAAD peaks. *Co-occurrence* is the share of the receiver heads' FAI peaks that are also FAI "
    "peaks of the global heads. *Coupling* is the share of the global heads' FAI peaks at or just after a WAAD peak. "
    "*Random* is the baseline of the paper's A.1: the mean entropy of all tokens, the share of tokens that are FAI "
    "peaks, and the coupling of FAI peaks at random places. *Lift* is (observed - random) / random. p is the share of "
    "shuffles to random places that reach the observed number. The last two lifts compare with peaks that move around "
    f"the answer together: anywhere, or by at most {NEARBY} tokens, which keeps a trend along the answer in place. "
    f"{INTERVALS}",
    "The model and the problems are not the paper's. Chosen here, and perhaps different there: which peaks count "
    "(local maxima above a quantile of the answer's own values), how far after a WAAD peak an FAI peak may stand, and "
    f"which heads are receiver heads (the largest kurtosis over tokens with at least {FEWEST_ROWS} later ones).",
]


def table_of(rows: list[Row]) -> str:
    """Returns Table 2 in Markdown."""
    head = ["", "random", "observed", "lift", "p", "lift over shifts", "over nearby shifts"]
    lines = []
    for row in rows:
        form = ".3f" if "entropy" in row.name else ".1%"
        lifts = [
            shown(row.lift, "+.1%"),
            shown(row.p),
            shown(row.shifted_lift, "+.1%"),
            shown(row.nearby_lift, "+.1%"),
        ]
        lines.append([row.name, shown(row.random, form), shown(row.observed, form), *lifts])
        if row.paper:
            observed, random = row.paper
            paper = [f"{random:{form}}", f"{observed:{form}}", f"{observed / random - 1:+.1%}", "", "", ""]
            lines.append(["*paper, Qwen3-4B-Base*", *paper])
    return markdown_table(head, lines)


def report(
    rows: list[Row],
    fewer: list[Row],
    long_enough: int,
    measured: list[dict],
    answers: list[Answer],
    study: Study,
    arguments: list[str],
) -> tuple[str, dict]:
    """Returns (report.md, the data of report.json).

    Args:
        rows, fewer: Table 2 of all tokens, and without the last ones of each answer.
        long_enough: the number of answers in `fewer`.
        measured: what `signals` returned for the answers that count.
        answers: all answers.
    """
    args = study.args
    peaks = [peaks_of(signal, args.peak_quantile) for signal in measured]
    tokens = sum(len(answer.waad) for answer in peaks)
    counts = {name: sum(int(getattr(answer, name).sum()) for answer in peaks) for name in ("waad", "fai", "receiver")}
    left_out = len(answers) - len(measured)
    skipped = f"; {left_out} shorter answers left out" if left_out else ""
    without = [
        f"Without the last {args.without_last} tokens of each answer, whose FAI is the attention of few others, "
        f"{long_enough} answers:",
        table_of(fewer),
    ]
    if not fewer:
        least = FEWEST_TOKENS + args.without_last
        without = [f"No answer has the {least} tokens that a table without the last {args.without_last} needs."]
    pearson, spearman = correlations(measured, args.seed)
    profiles = profile(measured, peaks, args.seed)
    paragraphs = [
        f"{args.model}, {len(measured)} answers, {tokens:,} tokens{skipped}; peaks above the {args.peak_quantile} "
        f"quantile: {counts['waad']:,} of WAAD (windowed average attention distance), {counts['fai']:,} of FAI (future "
        f"attention influence), {counts['receiver']:,} of the receiver heads' FAI; {args.shuffles:,} shuffles. "
        f"{study.described(answers)}",
        table_of(rows),
        *without,
        *EXPLAINED,
        f"FAI of the receiver heads and of the global heads correlate along an answer with {shown(pearson, '.2f')} "
        f"(Pearson) and {shown(spearman, '.2f')} (Spearman), as means over the answers.",
        *tables(profiles),
        "![Entropy at WAAD peaks; co-occurrence and coupling](figure.png)",
    ]
    numbers = {
        "peak_quantile": args.peak_quantile,
        "within": args.within,
        "shuffles": args.shuffles,
        "answers": len(measured),
        "left_out": left_out,
        "cut_off": sum(not study.ended(answer) for answer in answers),
        "tokens": tokens,
        "peaks": counts,
        "rows": [row._asdict() for row in rows],
        "without_last": {
            "tokens": args.without_last,
            "answers": long_enough,
            "rows": [row._asdict() for row in fewer],
        },
        "pearson": pearson,
        "spearman": spearman,
        "profiles": {name: [line._asdict() for line in lines] for name, lines in profiles.items()},
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
    right.bar(x + 0.2, [row.random for row in bars], 0.36, color="#c9cdd4", label="random")
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
    parser = parser_of("couple", __doc__, temperature=0.7, batch_size=10)
    parser.add_argument(
        "--receivers",
        type=int,
        help=f"number of receiver heads: those whose attention falls on the fewest tokens ({RECEIVERS}, or all heads "
        "of a model with fewer)",
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
    parser.add_argument(
        "--shuffles", type=int, default=1000, help="number of random places and shifts of the baselines"
    )
    parser.add_argument(
        "--without-last",
        type=int,
        default=FEWEST_ROWS,
        help="number of last tokens that a second table leaves out: few others look back at them",
    )
    args = parser.parse_args(arguments)
    check_flags(args, "couple")
    if args.receivers is not None:
        check_int("--receivers", args.receivers, 1)
    check_float("--peak-quantile", args.peak_quantile, 0.0, 1.0)
    check_int("--within", args.within, 0)
    check_int("--shuffles", args.shuffles, 1)
    check_int("--without-last", args.without_last, 1)
    check_room(args, FEWEST_TOKENS)
    with Study("couple", args, also=["receivers"]) as study:
        answers, results = study.measured(partial(signals, study))
    measured = [result for result in results if len(result["entropy"]) >= FEWEST_TOKENS]
    if not measured:
        raise too_short(FEWEST_TOKENS)

    def table_without(last: int) -> tuple[list[Peaks], list[Row]]:
        peaks = [peaks_of(signal, args.peak_quantile, last) for signal in measured]
        peaks = [one for one in peaks if one is not None]
        rows = table_2(peaks, within=args.within, shuffles=args.shuffles, seed=args.seed) if peaks else []
        return peaks, rows

    peaks, rows = table_without(0)
    remaining, fewer = table_without(args.without_last)
    text, data = report(rows, fewer, len(remaining), measured, answers, study, arguments)
    draw(rows, peaks, args.within, args.out / "figure.png")
    write_report(args.out, text, data)
