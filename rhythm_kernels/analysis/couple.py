"""Do anchors follow preplan tokens? Table 2 of the paper, on a model of yours.

The model answers problems; its entropy, WAAD and FAI are read along each answer, and their peaks are held against the
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
    command_of,
    parser_of,
    shown,
    table,
    versions,
    write_report,
)
from rhythm_kernels.checks import check_float, check_int
from rhythm_kernels.credit.selection import find_peaks

FEWEST_TOKENS = 16
"""That an answer must have to be counted, apart from its last FEWEST_ROWS."""
NEARBY = 20
"""Tokens that a nearby shift moves peaks by at most: what rises or falls along an answer then stays the same."""
FURTHEST = 3
"""Coupling is reported up to so many tokens after a WAAD peak."""
PAPER = {
    "entropy": (0.3608, 0.2386),
    "co-occurrence": (0.6084, 0.2241),
    "coupling": (0.5253, 0.3687),
}
"""(observed, baseline) of Qwen3-4B-Base in the paper's Table 2; entropy in nats."""


class Peaks(NamedTuple):
    """One answer, the tokens that count: [m] each."""

    entropy: np.ndarray
    """Nats, of what the token was drawn from."""
    next_entropy: np.ndarray
    """Nats, of what the next token was drawn from, which is what the row of WAAD predicts."""
    waad: np.ndarray
    """bool, the peaks of WAAD, and so on."""
    fai: np.ndarray
    receiver: np.ndarray


class Row(NamedTuple):
    """One number, its baseline, and both in the paper."""

    name: str
    observed: Estimate
    baseline: float
    """Of peaks shifted anywhere along the answer; of entropy, that of all tokens."""
    lift: Estimate
    """observed / baseline."""
    p: float
    """Share of the shuffles that reach what is observed."""
    nearby_lift: Estimate
    """observed / that of peaks shifted by at most NEARBY tokens."""
    paper: tuple[float, float] | None


# ---- one answer ------------------------------------------------------------------------------------------------------


def signals(study: Study, answer: Answer) -> dict[str, list[float]]:
    """Reads an answer; of each of its tokens entropy, WAAD, FAI and the receiver heads' FAI."""
    device = study.model.device
    ids = torch.tensor(answer.prompt + answer.tokens, device=device)
    response = torch.arange(len(ids), device=device) >= len(answer.prompt)
    found = read(study.model, ids, response, layers=study.args.layers, receivers=study.args.receivers)
    of = {"entropy": found.entropy, "waad": found.waad, "fai": found.fai, "receiver_fai": found.receiver_fai}
    return {name: signal[len(answer.prompt) :].tolist() for name, signal in of.items()}


def peaks_of(signal: dict[str, list[float]], quantile: float) -> Peaks | None:
    """The peaks of an answer's signals, among the tokens that FEWEST_ROWS later ones look back at; None if few are.

    FAI of the last tokens is the attention of a few neighbours, which is large for any token.
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
    """[..., m] bool -> [..., m] bool: at a leader, or at most `within` positions after one."""
    found = leaders.copy()
    for distance in range(1, min(within, leaders.shape[-1] - 1) + 1):
        found[..., distance:] |= leaders[..., :-distance]
    return found


def shifted(values: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """[m] and [S] -> [S, m]: moved to the right by each shift, around the end."""
    size = len(values)
    return values[(np.arange(size) - shifts[:, None]) % size]


def draw_shifts(size: int, count: int, seed: int, index: int, nearby: bool) -> np.ndarray:
    """[count] int64: never 0; of problem `index`."""
    generator = np.random.default_rng([seed, index, nearby])
    if not nearby:
        return generator.integers(1, size, count)
    distance = generator.integers(1, min(NEARBY, size - 1) + 1, count)
    return distance * generator.choice([-1, 1], count)


def shuffled_sums(kind: str, answers: list[Peaks], shuffles: int, seed: int, nearby: bool, within: int) -> np.ndarray:
    """[n, shuffles]: `observed_sums` of each answer with the leading peaks shifted, before the division."""
    sums = np.zeros((len(answers), shuffles))
    for index, answer in enumerate(answers):
        shifts = draw_shifts(len(answer.waad), shuffles, seed, index, nearby)
        leaders, values = _sides(kind, answer)
        sums[index] = (after(shifted(leaders, shifts), within) * values).sum(-1)
    return sums


def observed_sums(kind: str, answers: list[Peaks], within: int) -> np.ndarray:
    """[n, 2] of each answer: the sum at the peaks and how many there are; their ratio is the number of a row.

    "entropy": of tokens at WAAD peaks; "next entropy": of the token after. "co-occurrence": the receiver heads' FAI
    peaks that are the global heads', of all of theirs. "coupling": FAI peaks at most `within` tokens after a WAAD peak,
    or at one, of all FAI peaks.
    """
    found = np.zeros((len(answers), 2))
    for index, answer in enumerate(answers):
        leaders, values = _sides(kind, answer)
        found[index] = (after(leaders, within) * values).sum(), leaders.sum() if "entropy" in kind else values.sum()
    return found


def _sides(kind: str, answer: Peaks) -> tuple[np.ndarray, np.ndarray]:
    """(peaks that are shifted, what is added up at them)."""
    if kind == "entropy":
        return answer.waad, answer.entropy
    if kind == "next entropy":
        return answer.waad, answer.next_entropy
    return (answer.fai, answer.receiver) if kind == "co-occurrence" else (answer.waad, answer.fai)


def row_of(name: str, kind: str, answers: list[Peaks], *, within: int, shuffles: int, seed: int, paper=None) -> Row:
    """A row of the table: see `observed_sums`."""
    hits = observed_sums(kind, answers, within)
    anywhere, near = (shuffled_sums(kind, answers, shuffles, seed, nearby, within) for nearby in (False, True))
    if "entropy" in kind:
        values = [_sides(kind, answer)[1] for answer in answers]
        base = np.array([[each.sum(), len(each)] for each in values]).reshape(-1, 2)
    else:
        base = np.stack([anywhere.mean(1), hits[:, 1]], 1)
    near_base = np.stack([near.mean(1), hits[:, 1]], 1)

    def lift(hit, of, expected, among):
        return (hit / of) / (expected / among)

    reached = (anywhere.sum(0) >= hits[:, 0].sum()).sum()
    return Row(
        name=name,
        observed=bootstrap(hits, share, seed=seed),
        baseline=bootstrap(base, share, seed=seed).value,
        lift=bootstrap(np.hstack([hits, base]), lift, seed=seed),
        p=float(1 + reached) / (1 + shuffles),
        nearby_lift=bootstrap(np.hstack([hits, near_base]), lift, seed=seed),
        paper=paper,
    )


def table_2(answers: list[Peaks], *, within: int, shuffles: int, seed: int) -> list[Row]:
    """All rows; coupling at several distances, of which that at `within` stands beside the paper's."""
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
    "*Entropy* is that of the distribution a token was drawn from, in nats at temperature 1: at WAAD peaks, "
    "against all tokens. *Co-occurrence*: of the FAI peaks of the receiver heads, the share that are FAI peaks of"
    " the global heads. *Coupling*: of the FAI peaks of the global heads, the share that a WAAD peak is at or "
    "shortly before. *Baseline*: the same with the peaks shifted around the answer by a random number of tokens; "
    "p is the share of shuffles that reach the observed number. *Nearby*: the lift against shifts by at most "
    f"{NEARBY} tokens, which leaves in place what merely rises or falls along an answer. {INTERVALS}",
    "Not the paper's: the model, its size, the problems. Chosen here, and perhaps otherwise there: which peaks "
    "count (local maxima above a quantile of the answer's own values), how far after a WAAD peak an FAI peak may "
    f"come, and the shuffle. The last {FEWEST_ROWS} tokens of an answer do not count: too few look back at them.",
]


def report(rows: list[Row], answers: list[Peaks], left_out: int, study: Study, command: str) -> tuple[str, dict]:
    """(report.md, report.json)."""
    args, environment = study.args, versions(study.model.device)
    tokens, peaks = sum(len(each.waad) for each in answers), [sum(a[i].sum() for a in answers) for i in (2, 3, 4)]
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
    text = "\n".join(
        [
            "# Preplan tokens and anchors (Table 2)\n",
            f"    {command}\n",
            ", ".join(f"{name} {value}" for name, value in environment.items()) + "\n",
            f"{args.model}, {len(answers)} answers, {tokens:,} tokens{skipped}; peaks above the {args.peak_quantile} "
            f"quantile: {peaks[0]:,} of WAAD, {peaks[1]:,} of FAI, {peaks[2]:,} of the receiver heads' FAI; "
            f"{args.shuffles:,} shuffles. The paper's numbers are of Qwen3-4B-Base.\n",
            table(head, lines) + "\n",
            *(paragraph + "\n" for paragraph in EXPLAINED),
            "![Entropy at WAAD peaks; co-occurrence and coupling](figure.png)\n",
        ]
    )
    data = {
        "command": command,
        "versions": environment,
        "settings": study.settings,
        "peak_quantile": args.peak_quantile,
        "within": args.within,
        "shuffles": args.shuffles,
        "answers": len(answers),
        "left_out": left_out,
        "tokens": tokens,
        "peaks": dict(zip(("waad", "fai", "receiver_fai"), map(int, peaks), strict=True)),
        "rows": [row._asdict() for row in rows],
    }
    return text, data


def draw(rows: list[Row], answers: list[Peaks], within: int, path: Path) -> None:
    """The entropy at WAAD peaks against all tokens, and both shares against their baselines."""
    matplotlib.use("Agg")  # files only
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    every = np.concatenate([answer.entropy for answer in answers])
    at_peaks = np.concatenate([answer.entropy[answer.waad] for answer in answers])
    for values, label, color in ((every, "all tokens", "#7d8491"), (at_peaks, "at WAAD peaks", "#2f6db5")):
        ordered = np.sort(values)
        left.plot(ordered, 1 - np.arange(len(ordered)) / max(1, len(ordered)), color=color, label=label)
        if len(values):
            left.axvline(values.mean(), color=color, linestyle=":", linewidth=1)
    left.set(xlabel="entropy, nats (dotted: means)", ylabel="share of tokens above", xlim=(0, None), ylim=(0, 1))
    left.legend(frameon=False)

    shown_rows = [row for row in rows if row.name == "co-occurrence" or (row.paper and row.name.startswith("coupling"))]
    for place, row in enumerate(shown_rows):
        observed, label = row.observed, {"label": "observed"} if place == 0 else {}
        error = [[observed.value - observed.low], [observed.high - observed.value]]
        right.bar(place - 0.2, observed.value, 0.36, yerr=error, capsize=3, color="#2f6db5", **label)
        right.bar(place + 0.2, row.baseline, 0.36, color="#c9cdd4", **({"label": "shifted"} if place == 0 else {}))
        for value, x in zip(row.paper, (place - 0.2, place + 0.2), strict=True):
            name = {"label": "paper, Qwen3-4B-Base"} if place == 0 and value == row.paper[0] else {}
            right.plot(x, value, "D", color="#c2620e", markersize=5, **name)
    reach = f"0 to {within} after" if within else "at"
    names = ["receiver peaks\nthat are FAI peaks", f"FAI peaks {reach}\na WAAD peak"]
    right.set_xticks(range(len(shown_rows)), names[: len(shown_rows)])
    right.set(ylabel="share", ylim=(0, 1))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> None:
    """`rhythm couple`: answers, reads, and writes the report."""
    parser = parser_of("couple", __doc__.splitlines()[0])
    parser.add_argument("--receivers", type=int, default=16, help="receiver heads, of all layers")
    parser.add_argument(
        "--peak-quantile", type=float, default=0.6, help="peaks count among the values of an answer above this quantile"
    )
    parser.add_argument(
        "--within", type=int, default=1, help="tokens that a coupled FAI peak may come after a WAAD peak"
    )
    parser.add_argument("--shuffles", type=int, default=1000)
    args = parser.parse_args(arguments)
    check_flags(args, "couple")
    check_int("--receivers", args.receivers, 1)
    check_float("--peak-quantile", args.peak_quantile, 0.0, 1.0)
    check_int("--within", args.within, 0)
    check_int("--shuffles", args.shuffles, 1)
    with Study("couple", args, also=["receivers"]) as study:
        found = study.measured(lambda answer: signals(study, answer))
    answers = [each for each in (peaks_of(signal, args.peak_quantile) for signal in found) if each is not None]
    if not answers:
        raise ValueError(
            f"no answer has {FEWEST_ROWS + FEWEST_TOKENS} tokens, which are needed to look at one: give more "
            "--max-new-tokens, or other problems"
        )
    rows = table_2(answers, within=args.within, shuffles=args.shuffles, seed=args.seed)
    text, data = report(rows, answers, len(found) - len(answers), study, command_of("couple", arguments))
    draw(rows, answers, args.within, args.out / "figure.png")
    write_report(args.out, text, data)
    print(text)
    print(f"{args.out / 'report.md'}, {args.out / 'report.json'}, {args.out / 'figure.png'}")
