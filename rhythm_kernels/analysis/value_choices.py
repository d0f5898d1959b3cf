"""Compares choices of credit's options by where the answer is decided, on the answers of `rhythm value`.

Each choice changes one option. The answers are read again, in one forward each for all choices, and nothing is sampled.
Shapes: n tokens of an answer.
"""

from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from rhythm_kernels.analysis.bootstrap import Estimate, bootstrap, share
from rhythm_kernels.analysis.decisions import columns, shares
from rhythm_kernels.analysis.study import Answer, Study, shown
from rhythm_kernels.analysis.value_judge import Judged
from rhythm_kernels.console import markdown_table
from rhythm_kernels.credit.tokens import token_credit
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.listen.taps import decoder_of, softmax_layers
from rhythm_kernels.options import CreditOptions
from rhythm_kernels.types import Rhythm

OF_WAAD = {"window": [5, 20, 50], "local_fraction": [0.1, 0.2, 0.5], "delta": ["drop"]}
OF_FAI = {"horizon": [(1, None), (1, 10), (1, 50), (10, None)], "global_fraction": [0.1, 0.2, 0.5]}
OF_BOTH = {"span_rows": [64], "top_fraction": [0.2, 0.6], "largest": [False]}
OF_SETS = {
    "preplan_fraction": [0.2, 0.6],
    "max_lookback": [1, 2, 8],
    "shared_fraction": [0.0, 1.0],
    "tau_waad": [256.0],  # no WAAD is above the largest window
    "tau_delta": [0.0],
}
OPTIONS = {"local": OF_WAAD | OF_BOTH, "global": OF_FAI | OF_BOTH, "coupled": OF_WAAD | OF_FAI | OF_BOTH | OF_SETS}
"""The values that each strategy's options are changed to, one at a time; the layers come from the model."""
THIRDS = ("first", "middle", "last")
RATIOS = {
    "over chance": ("square selected", "square by chance"),
    "credited over chance": ("square credited", "square credited by chance"),
    "over chance at entropy": ("square selected at entropy", "square by chance at entropy"),
}


class Choice(NamedTuple):
    """A strategy with one option changed."""

    strategy: str
    name: str
    """"defaults", or what is changed."""
    options: CreditOptions


def choices_of(study: Study) -> list[Choice]:
    """Returns the choices of each strategy, first that of the study's own flags; what they say already is left out."""
    args, there = study.args, softmax_layers(decoder_of(study.model))
    bounds = [round(len(there) * third / 3) for third in range(4)]
    layers = {"all": "all"} | {
        f"{name} third": tuple(there[first:last])
        for name, first, last in zip(THIRDS, bounds[:-1], bounds[1:], strict=True)
        if first < last
    }
    flags = {"top_fraction": args.top_fraction, "layers": args.layers, "span_rows": None}
    out = []
    for strategy, options in OPTIONS.items():
        base = CreditOptions(strategy=strategy, **flags)
        out.append(Choice(strategy, "defaults", base))
        changes = [(f"{name} {_text(value)}", name, value) for name, values in options.items() for value in values]
        changes += [(f"layers {name}", "layers", value) for name, value in layers.items()]
        for text, name, value in changes:
            changed = CreditOptions(**{"strategy": strategy, **flags, name: value})
            if changed != base:
                out.append(Choice(strategy, text, changed))
    return out


def _text(value: object) -> str:
    return (
        " to ".join("the end" if end is None else str(end) for end in value) if isinstance(value, tuple) else str(value)
    )


@torch.no_grad()
def gammas_of(study: Study, answers: list[Answer], choices: list[Choice]) -> list[list[np.ndarray]]:
    """Returns the factor of each token's advantage for each choice, [choices][answers] of [n] fp64."""
    ways = {repr(choice.options.collect_arguments): choice.options.collect_arguments for choice in choices}
    out: list[list[np.ndarray]] = [[] for _ in choices]
    for answer in tqdm(answers, desc="choices", unit="answer", leave=False):
        ids = torch.tensor([answer.prompt + answer.tokens], device=study.model.device)
        response = torch.arange(ids.shape[1], device=ids.device)[None] >= len(answer.prompt)
        with ExitStack() as stack:
            opened = {
                way: stack.enter_context(collect(study.model, response_mask=response, **arguments))
                for way, arguments in ways.items()
            }
            decoder_of(study.model)(ids, use_cache=False)
        rhythms = {way: collected.rhythm() for way, collected in opened.items()}
        for gammas, (strategy, _, options) in zip(out, choices, strict=True):
            rhythm = rhythms[repr(options.collect_arguments)]
            gamma = token_credit(strategy, response, Rhythm(rhythm.waad, rhythm.fai), **options.credit_arguments)
            gammas.append(gamma[response].double().cpu().numpy())
    return out


def compare_choices(
    answers: list[Judged], choices: list[Choice], gammas: list[list[np.ndarray]], seed: int
) -> list[dict[str, Any]]:
    """Returns a row for each choice: its `RATIOS`, and by how much each differs from that of the strategy's defaults.

    Problems are drawn for both at once, so what the problems add to both does not widen a difference.
    """
    rows, base = [], []
    for choice, of_choice in zip(choices, gammas, strict=True):
        sums = [
            shares(gamma, answer.decisions, answer.signals["entropy"])
            for answer, gamma in zip(answers, of_choice, strict=True)
        ]
        is_base = choice.name == "defaults"
        base = sums if is_base else base
        row: dict[str, Any] = {"strategy": choice.strategy, "choice": choice.name}
        row["tokens"] = bootstrap(columns(sums, "selected", "tokens"), share, seed=seed)
        for name, pair in RATIOS.items():
            own = columns(sums, *pair)
            row[name] = bootstrap(own, share, seed=seed)
            if not is_base:
                both = np.hstack([own, columns(base, *pair)])
                row[f"change of {name}"] = bootstrap(both, lambda a, b, c, d: share(a, b) - share(c, d), seed=seed)
        rows.append(row)
    return rows


def is_clear(change: Estimate) -> bool:
    """Whether the interval of a difference leaves out 0."""
    return change.low > 0 or change.high < 0


def paragraphs_of(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the paragraphs of the report."""
    changed = "credited over chance"
    changes = [row[f"change of {changed}"] for row in rows if row["choice"] != "defaults"]
    clear = sum(is_clear(change) for change in changes)
    head = [
        "strategy",
        "choice",
        "tokens",
        "over chance",
        changed,
        "difference from the defaults",
        "entropy held equal",
    ]
    lines = []
    for row in rows:
        difference = "" if row["choice"] == "defaults" else shown(row[f"change of {changed}"], "+.2f")
        numbers = [shown(row[name], ".2f") for name in RATIOS]
        lines.append(
            [row["strategy"], row["choice"], shown(row["tokens"].value, ".1%"), *numbers[:2], difference, numbers[2]]
        )
    return [
        "Choices of credit's options, one changed at a time, on the same answers. *Difference from the defaults* is "
        "that of credited over chance, of the same problems in each resample of the bootstrap. Its interval leaves out "
        f"0 for {clear} of {len(changes)} choices; by chance it would for {len(changes) / 20:.0f}.",
        markdown_table(head, lines),
    ]
