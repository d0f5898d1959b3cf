"""The report of `rhythm value` in words and tables."""

from collections.abc import Sequence
from typing import Any

from rhythm_kernels.analysis.bootstrap import Estimate
from rhythm_kernels.analysis.decisions import TOP
from rhythm_kernels.analysis.study import INTERVALS, Answer, Study, report_of, shown
from rhythm_kernels.analysis.value_choices import paragraphs_of
from rhythm_kernels.analysis.value_judge import STRATEGIES
from rhythm_kernels.analysis.value_tables import ALL, SIGNALS, SOLVED, Tables
from rhythm_kernels.console import markdown_table

FEWEST_DECISIONS = 0.01
"""A tenth of the answer with a smaller share of the decisions gets a dash for the shares within it."""
OF_ALL = {
    "decisions": ("decisions", ".1%"),
    "over chance": ("over chance", ".2f"),
    "credited over chance": ("credited over chance", ".2f"),
    "place held equal": ("over chance in tenths", ".2f"),
    "entropy held equal": ("over chance at entropy", ".2f"),
}
OF_SOLVED = {
    "decisions": ("decisions", ".1%"),
    "over chance": ("over chance", ".2f"),
    "gain": ("gain", ".1%"),
    "positive": ("positive", ".1%"),
    "negative": ("negative", ".1%"),
}
"""The columns of the tables of strategies: a number of `share_table`, and its format."""
EXPLAINED = [
    "The *value* of a prefix is the probability that a continuation, sampled at the temperature of the answers and up "
    "to their limit, ends by itself in a solved answer. A token *decides* d, the value with it less the value before "
    "it, and its decision counts d². *Tokens* are the share of the tokens that a strategy selects (gamma > 1), "
    "*decisions* the share of the sum of d² on them. *Over chance* divides it by what as many tokens at random places "
    "of each answer would hold. *Credited over chance* weighs each token by its extra credit, gamma - 1, which differs "
    "among the tokens of coupled credit. *Place held equal* divides by what as many tokens at random places of each "
    "tenth of the answer would hold: above 1, a strategy knows more than where in the answer decisions are made. "
    "*Entropy held equal* draws as many tokens from each tenth of the answer's tokens by their entropy: above 1, it "
    "knows more than where the policy is uncertain, without which nothing is decided (|d| ≤ 1 - p).",
    "The *oracle* selects the tokens with the largest |d| by one half of the continuations, and is counted by the "
    "other half; *held equal*, it selects that fraction of each tenth. The fewer the continuations, the less it holds "
    "of what the best tokens hold, so a strategy may surpass it.",
    "Training raises positive advantages alone, those of solved answers. There the *gain* is the share of the value's "
    "net rise, from that of the prompt to 1, on the selected tokens. *Positive* and *negative* are shares of the d² of "
    "decisions that raise and lower the value, by the sign that one half of the continuations tells and the square of "
    "the other half. A decision whose sign the noise hides counts by half on either side.",
    "d is estimated as (1 - p) (V - W): p is the probability of the token, V the value after it, and W the value with "
    "another token in its place. d² is the square of that less the variance of its noise, the mean over all ways to "
    "halve the continuations of the product of both halves, and has no bias. A share is left out where the sum that it "
    "is of is not above 0. *Area, decisions*: the area under the share of the decisions that the tokens with the "
    "largest signal hold, over the share of tokens; it is linear in d² and has no bias from noise. *Area, top "
    f"tenth*: the area under the ROC for the {TOP:.0%} of an answer's tokens with the largest estimate of |d|. Noise "
    "puts wrong tokens into that tenth, most of all uncertain ones, which favours the entropy. Both are 0.5 for a "
    f"signal that tells nothing. Entropy is that of the policy at the temperature of the answers. {INTERVALS}",
]


def report(
    tables: Tables,
    generated: list[Answer],
    study: Study,
    arguments: list[str],
    choices: Sequence[dict[str, Any]] = (),
) -> tuple[str, dict[str, Any]]:
    """Returns (report.md, the data of report.json); `choices` are the rows of `compare_choices`, if any."""
    paragraphs = [
        *_overview(tables, study, generated),
        f"All {tables.answers} answers:",
        _strategies(tables.strategies[ALL], OF_ALL),
        *_of_solved(tables),
        "Which signal finds the decisions, by its rank in the answer:",
        _signals(tables),
        "By tenth of the answer: the share of all decisions in it, then for each strategy the share of its tokens that "
        "are selected → the share of its decisions on them.",
        _tenths(tables),
        *(paragraphs_of(choices) if choices else ()),
        *EXPLAINED,
        "![Share of the decisions on the selected tokens; decisions along the answer](figure.png)",
        "[Answers tinted by their decisions](answers.html)",
    ]
    numbers = {
        "answers": tables.answers,
        "tokens": tables.tokens,
        "continuations": tables.continuations,
        "certain": tables.certain,
        "cut_off": sum(not study.ended(answer) for answer in generated),
        "balance": tables.balance,
        "strategies": tables.strategies,
        "signals": tables.signals,
        "tenths": tables.tenths,
        "choices": choices,
    }
    return report_of(study, arguments, "Does credit land where the answer is decided?", paragraphs, numbers)


def _overview(tables: Tables, study: Study, generated: list[Answer]) -> list[str]:
    args, check = study.args, tables.balance
    return [
        f"{args.model}, task {args.task}, temperature {args.temperature}: {tables.answers} answers, {tables.tokens:,} "
        f"tokens, {tables.continuations:,} continuations; {tables.certain / tables.tokens:.1%} of the tokens are "
        f"certain and have none. The policy solves {shown(check['solved'], '.1%')} of the problems. "
        f"{study.described(generated)}",
        f"The squares of an answer's decisions sum to {shown(check['decisions'])} on average, and the variance of its "
        f"reward given the problem is {shown(check['variance'])}; both have the same expectation. Noise of the "
        f"continuations made {tables.noise:.1%} of the squared estimates, and is taken off.",
    ]


def _strategies(numbers: dict[str, dict[str, Estimate]], shapes: dict[str, tuple[str, str]]) -> str:
    rows = [
        [strategy, shown(found["tokens"].value, ".1%"), *(shown(found[name], form) for name, form in shapes.values())]
        for strategy, found in numbers.items()
    ]
    return markdown_table(["strategy", "tokens", *shapes], rows)


def _of_solved(tables: Tables) -> list[str]:
    if not tables.solved:
        return ["No answer is solved, so nothing is said of solved answers."]
    return [
        f"The {tables.solved} solved answers, whose positive advantages the credit raises:",
        _strategies(tables.strategies[SOLVED], OF_SOLVED),
    ]


def _signals(tables: Tables) -> str:
    rows = [[SIGNALS[name], *map(shown, numbers.values())] for name, numbers in tables.signals.items()]
    return markdown_table(["signal", "area, decisions", "area, top tenth"], rows)


def _tenths(tables: Tables) -> str:
    strategies = STRATEGIES[:-1]  # random credit is the same everywhere
    rows = []
    for place, row in enumerate(tables.tenths, 1):
        decides = row["decisions"].value >= FEWEST_DECISIONS
        found = [
            f"{row[one]['tokens']:.0%} → {shown(row[one]['decisions'], '.0%') if decides else '–'}"
            for one in strategies
        ]
        rows.append([str(place), shown(row["decisions"], ".1%"), *found])
    return markdown_table(["tenth", "decisions", *strategies], rows)
