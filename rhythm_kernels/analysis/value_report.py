"""The report of `rhythm value`: which strategies and signals find the tokens that decide, and where they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rhythm_kernels.analysis.bootstrap import Estimate, bootstrap, share
from rhythm_kernels.analysis.decisions import TENTHS, TOP, areas, by_tenth, ceiling, columns, shares
from rhythm_kernels.analysis.study import INTERVALS, Answer, Study, report_of, shown
from rhythm_kernels.analysis.style import COLORS, hide_frame
from rhythm_kernels.analysis.value_choices import paragraphs_of
from rhythm_kernels.analysis.value_judge import STRATEGIES, Judged
from rhythm_kernels.analysis.value_page import render
from rhythm_kernels.console import markdown_table

CEILING = "ceiling"
"""The tokens that decide most, as far as half of the continuations tells."""
SIGNALS = {
    "waad": "WAAD",
    "fai": "FAI of credit",
    "delta": "Delta",
    "entropy": "entropy",
    "surprise": "1 - p",
    "gamma": "gamma, coupled",
}
"""The signals whose areas are compared, and their names in the report."""
FEWEST_DECISIONS = 0.01
"""A tenth of the answer with a smaller share of the decisions gets a dash for the shares within it."""
SHOWN, LONGEST_SHOWN = 4, 600
"""The number of answers on the page, and the most tokens that one may have."""
COLOR_OF = {
    "coupled": COLORS["coupled"],
    "global": COLORS["fai"],
    "local": COLORS["waad"],
    "entropy": COLORS["entropy"],
    "random": COLORS["soft"],
    CEILING: COLORS["grid"],
}


def share_table(answers: list[Judged], top_fraction: float, seed: int) -> dict[str, dict[str, Estimate]]:
    """Returns the numbers of each strategy, and of the ceiling, by name, each an estimate over problems.

    They are the share of the tokens that it selects; the share of the decisions (the sum of d_t^2) on them, what chance
    would have, and the one over the other; the decisions that a unit of credit meets over those that it would meet
    anywhere in the answer; the share of the decisions over chance with as many tokens selected in each tenth of the
    answer, or in each tenth of the tokens by their entropy; and the shares of the positive decisions, of the negative
    ones and of the net change of the value on the selected tokens.
    """
    ratios = {
        "tokens": ("selected", "tokens"),
        "decisions": ("square selected", "square"),
        "chance": ("square by chance", "square"),
        "over chance": ("square selected", "square by chance"),
        "credited over chance": ("square credited", "square credited by chance"),
        "over chance in tenths": ("square selected", "square by chance in tenths"),
        "over chance at entropy": ("square selected", "square by chance at entropy"),
        "positive": ("rise selected", "rise"),
        "negative": ("fall selected", "fall"),
        "gain": ("gain selected", "gain"),
    }
    sums = {
        name: [shares(one.gammas[name], one.decisions, one.signals["entropy"]) for one in answers]
        for name in STRATEGIES
    }
    sums[CEILING] = [ceiling(one.sampled, top_fraction, one.signals["entropy"]) for one in answers]
    return {
        strategy: {name: bootstrap(columns(rows, *pair), share, seed=seed) for name, pair in ratios.items()}
        for strategy, rows in sums.items()
    }


def area_table(answers: list[Judged], seed: int) -> dict[str, dict[str, Estimate]]:
    """Returns the two areas of each signal (`areas`)."""
    numbers = {}
    for signal in SIGNALS:
        rows = [areas(answer.signals[signal], answer.decisions) for answer in answers]
        numbers[signal] = {
            "decisions": bootstrap(columns(rows, "square ranked", "square"), share, seed=seed),
            "top tenth": bootstrap(columns(rows, "pairs right", "pairs"), share, seed=seed),
        }
    return numbers


def tenth_table(answers: list[Judged], seed: int) -> list[dict[str, Any]]:
    """Returns a row for each tenth of the answer.

    It has the share of all decisions in the tenth, and for each strategy the share of the tenth's tokens that it
    selects, and the share of the tenth's decisions on them.
    """
    squares = [answer.decisions.square for answer in answers]
    inside = np.array([by_tenth(square) for square in squares])  # [answers, TENTHS]
    tokens = np.array([by_tenth(np.ones_like(square)) for square in squares])
    whole = inside.sum(1)
    rows: list[dict[str, Any]] = [
        {"decisions": bootstrap(np.stack([inside[:, place], whole], 1), share, seed=seed)} for place in range(TENTHS)
    ]
    for strategy in STRATEGIES:
        chosen = [answer.gammas[strategy] > 1 for answer in answers]
        count = np.array([by_tenth(one) for one in chosen])
        held = np.array([by_tenth(one * square) for one, square in zip(chosen, squares, strict=True)])
        for place, row in enumerate(rows):
            row[strategy] = {
                "tokens": count[:, place].sum() / max(1, tokens[:, place].sum()),
                "decisions": bootstrap(np.stack([held[:, place], inside[:, place]], 1), share, seed=seed),
            }
    return rows


def balance(answers: list[Judged], seed: int) -> dict[str, Estimate]:
    """Returns the mean sum of d_t^2 of an answer and the mean variance of the reward, which have one expectation.

    A value is a martingale along the answers of the policy, so its steps are uncorrelated and end at the reward.
    """
    ones = np.ones(len(answers))
    sums = {
        "decisions": [answer.decisions.square.sum() for answer in answers],
        "variance": [answer.decisions.spread for answer in answers],
        "solved": [float(answer.sampled.solved) for answer in answers],
        "value": [answer.decisions.value[0] for answer in answers],
    }
    return {name: bootstrap(np.stack([values, ones], 1), share, seed=seed) for name, values in sums.items()}


# ---- report ----------------------------------------------------------------------------------------------------------

EXPLAINED = [
    "The *value* of a prefix is the probability that a continuation, sampled at the temperature of the answers and up "
    "to their limit, ends by itself in a solved answer. A token *decides* d, the value with it less the value before "
    "it, and its decision counts d². *Tokens* are the share of the tokens that a strategy selects (gamma > 1), "
    "*decisions* the share of the sum of d² on them. *Over chance* divides it by what as many tokens at random places "
    "of each answer would hold. *Credited over chance* weighs each token by its extra credit, gamma - 1, which differs "
    "among the tokens of coupled credit. *Place held equal* divides by what as many tokens at random places of each "
    "tenth of the answer would hold: above 1, a strategy knows more than where in the answer decisions are made. "
    "*Entropy held equal* draws as many tokens from each tenth of the answer's tokens by their entropy: above 1, it "
    "knows more than where the policy is uncertain, without which nothing is decided (|d| ≤ 1 - p). The *ceiling* are "
    "the tokens with the largest |d| by one half of the continuations, counted by the other half.",
    "Training raises positive advantages alone, those of solved answers. There the *gain* is the share of the value's "
    "net rise, from that of the prompt to 1, on the selected tokens. *Positive* and *negative* are shares of the d² "
    "of decisions whose sign one half of the continuations tells, in the product of both halves.",
    "d is estimated as (1 - p) (V - W): p is the probability of the token, V the value after it, and W the value with "
    "another token in its place. d² is the square of that less the variance of its noise, the mean over all ways to "
    "halve the continuations of the product of both halves, and has no bias. *Area, decisions*: the area under the "
    "share of the decisions that the tokens with the largest signal hold, over the share of tokens; it is linear in d² "
    f"and has no bias from noise. *Area, top tenth*: the area under the ROC for the {TOP:.0%} of an answer's tokens "
    "with the largest estimate of |d|. Noise puts wrong tokens into that tenth, most of all uncertain ones, which "
    f"favours the entropy. Both are 0.5 for a signal that tells nothing. {INTERVALS}",
]
ALL, CREDITED = "all answers", "solved answers"


def report(
    answers: list[Judged],
    generated: list[Answer],
    study: Study,
    arguments: list[str],
    choices: Sequence[dict[str, Any]] = (),
) -> tuple[str, dict[str, Any]]:
    """Returns (report.md, the data of report.json); `choices` are the rows of `compare_choices`, if any."""
    args = study.args
    of_solved = [answer for answer in answers if answer.sampled.solved]
    kinds = {ALL: answers, CREDITED: of_solved}
    tables = {kind: share_table(some, args.top_fraction, args.seed) for kind, some in kinds.items()}
    signals, by_place = area_table(answers, args.seed), tenth_table(answers, args.seed)
    check = balance(answers, args.seed)
    tokens = sum(len(answer.texts) for answer in answers)
    continuations = 2 * sum(int(answer.sampled.tries.sum()) for answer in answers)
    certain = sum(int((answer.sampled.tries == 0).sum()) for answer in answers)
    noise = sum(answer.decisions.noise.sum() for answer in answers)
    estimated = sum((answer.decisions.decision**2).sum() for answer in answers)

    over = [
        ("decisions", ".1%"),
        ("over chance", ".2f"),
        ("credited over chance", ".2f"),
        ("over chance in tenths", ".2f"),
        ("over chance at entropy", ".2f"),
    ]
    positive = [("decisions", ".1%"), ("over chance", ".2f"), ("gain", ".1%"), ("positive", ".1%"), ("negative", ".1%")]

    def rows_of(kind: str, forms: list[tuple[str, str]]) -> list[list[str]]:
        return [
            [strategy, shown(numbers["tokens"].value, ".1%"), *(shown(numbers[name], form) for name, form in forms)]
            for strategy, numbers in tables[kind].items()
        ]

    places = [
        [
            str(place),
            shown(row["decisions"], ".1%"),
            *(
                f"{row[one]['tokens']:.0%} → "
                + (shown(row[one]["decisions"], ".0%") if row["decisions"].value >= FEWEST_DECISIONS else "–")
                for one in STRATEGIES[:-1]
            ),
        ]
        for place, row in enumerate(by_place, 1)
    ]
    of_solved_paragraphs = [
        f"The {len(of_solved)} solved answers, whose positive advantages the credit raises:",
        markdown_table(
            ["strategy", "tokens", "decisions", "over chance", "gain", "positive", "negative"],
            rows_of(CREDITED, positive),
        ),
    ]
    paragraphs = [
        f"{args.model}, task {args.task}, temperature {args.temperature}: {len(answers)} answers, {tokens:,} tokens, "
        f"{continuations:,} continuations; {certain / tokens:.1%} of the tokens are certain and have none. The policy "
        f"solves {shown(check['solved'], '.1%')} of the problems. {study.described(generated)}",
        f"The squares of an answer's decisions sum to {shown(check['decisions'])} on average, and the variance of its "
        f"reward given the problem is {shown(check['variance'])}; both have the same expectation. Noise of the "
        f"continuations made {noise / (estimated or 1.0):.1%} of the squared estimates, and is taken off.",
        f"All {len(answers)} answers:",
        markdown_table(
            [
                "strategy",
                "tokens",
                "decisions",
                "over chance",
                "credited over chance",
                "place held equal",
                "entropy held equal",
            ],
            rows_of(ALL, over),
        ),
        *(of_solved_paragraphs if of_solved else ["No answer is solved, so nothing is said of solved answers."]),
        "Which signal finds the decisions, by its rank in the answer:",
        markdown_table(
            ["signal", "area, decisions", "area, top tenth"],
            [[SIGNALS[name], *map(shown, numbers.values())] for name, numbers in signals.items()],
        ),
        "By tenth of the answer: the share of all decisions in it, then for each strategy the share of its tokens that "
        "are selected → the share of its decisions on them.",
        markdown_table(["tenth", "decisions", *STRATEGIES[:-1]], places),
        *(paragraphs_of(choices) if choices else ()),
        *EXPLAINED,
        "![Share of the decisions on the selected tokens; decisions along the answer](figure.png)",
        "[Answers tinted by their decisions](answers.html)",
    ]
    numbers = {
        "answers": len(answers),
        "tokens": tokens,
        "continuations": continuations,
        "certain": certain,
        "cut_off": sum(not study.ended(answer) for answer in generated),
        "balance": check,
        "strategies": tables,
        "signals": signals,
        "tenths": by_place,
        "choices": choices,
    }
    return report_of(study, arguments, "Does credit land where the answer is decided?", paragraphs, numbers)


def draw(answers: list[Judged], study: Study, path: Path) -> None:
    """Draws the share of the decisions on the tokens of each strategy, and where in the answer both are."""
    matplotlib.use("Agg")  # files only
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    args = study.args
    numbers, by_place = share_table(answers, args.top_fraction, args.seed), tenth_table(answers, args.seed)
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
    right.bar(tenth, [row["decisions"].value for row in by_place], 0.8, color="#c9cdd4", label="decisions")
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


def page(answers: list[Judged], study: Study) -> str:
    """Returns the page with the answers whose decisions are the largest, solved and unsolved."""
    short = [answer for answer in answers if len(answer.texts) <= LONGEST_SHOWN]
    chosen = sorted(short, key=lambda answer: -answer.decisions.square.sum())[:SHOWN]
    return render(
        [
            {
                "prompt": study.problems[answer.index].text,
                "solved": bool(answer.sampled.solved),
                "words": answer.texts,
                "value": answer.decisions.value.tolist(),
                "decision": answer.decisions.decision.tolist(),
                "noise": np.sqrt(answer.decisions.noise).tolist(),
                "probability": (1 - answer.sampled.other).tolist(),
                "gamma": answer.gammas["coupled"].tolist(),
                "signals": {name: answer.signals[name].tolist() for name in ("waad", "fai", "entropy")},
            }
            for answer in chosen
        ],
        study.args.model,
    )
