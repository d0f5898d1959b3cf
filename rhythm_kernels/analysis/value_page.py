"""Renders the page of `rhythm value`: answers tinted by their decisions, beside WAAD, FAI and entropy."""

from pathlib import Path

import jinja2
import numpy as np

from rhythm_kernels.analysis.problems import Problem
from rhythm_kernels.analysis.value_judge import Judged
from rhythm_kernels.console import visible

TEMPLATE = Path(__file__).parent / "web" / "value.html.jinja"
SHOWN, LONGEST_SHOWN = 4, 600
"""The number of answers on the page, and the most tokens that one may have."""


def page(answers: list[Judged], problems: list[Problem], model: str) -> str:
    """Returns the page with the answers whose decisions are the largest, solved and unsolved."""
    short = [answer for answer in answers if len(answer.texts) <= LONGEST_SHOWN]
    chosen = sorted(short, key=lambda answer: -answer.decisions.square.sum())[:SHOWN]
    return render(
        [
            {
                "prompt": problems[answer.index].text,
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
        model,
    )


def render(answers: list[dict], model: str) -> str:
    """Returns the page, in one file without a script; everything that a model or a user wrote is escaped.

    An answer has its prompt, whether it is solved and, for each token, words, decision, noise (the standard error of
    the decision), probability, gamma and the signals; value has one number more, that of the prompt. A token's tint is
    its share of the answer's largest value, without the sign of a decision.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["visible"] = visible
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    for answer in answers:
        rows = {"decision": answer["decision"], **answer["signals"]}
        answer["tints"] = {name: _tints(values) for name, values in rows.items()}
    return template.render(answers=answers, model=model)


def _tints(values: list[float]) -> list[float]:
    largest = max(map(abs, values)) or 1.0
    return [abs(value) / largest for value in values]
