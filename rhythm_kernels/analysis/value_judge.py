"""One answer of `rhythm value` with what its tokens decide, and the credit that each strategy gives them.

Shapes: n tokens of the answer.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from rhythm_kernels.analysis.decisions import Decisions, Sampled, decide
from rhythm_kernels.credit.tokens import token_credit
from rhythm_kernels.options import CreditOptions
from rhythm_kernels.types import Rhythm

STRATEGIES = ("coupled", "global", "local", "entropy", "random")


class Judged(NamedTuple):
    """One answer with its decisions, signals and credit; fields are [n] by name."""

    index: int
    sampled: Sampled
    decisions: Decisions
    signals: dict[str, np.ndarray]
    gammas: dict[str, np.ndarray]
    """The factor of each token's advantage under each strategy."""
    texts: list[str]


def judge(result: dict[str, Any], index: int, top_fraction: float) -> Judged:
    """Estimates the decisions of one of the results of `measured`, and computes the credit of each strategy."""
    signals = {name: np.array(result[name], dtype=np.float32) for name in ("waad", "fai", "entropy")}
    waad, fai, entropy = (torch.tensor(signal)[None] for signal in signals.values())
    response = torch.ones_like(waad, dtype=torch.bool)
    gammas = {}
    for strategy in STRATEGIES:
        options = CreditOptions(strategy=strategy, top_fraction=top_fraction)
        gamma = token_credit(
            strategy,
            response,
            Rhythm(waad, fai),
            entropy=entropy,
            seed=options.draw_seed(index),
            **options.credit_arguments,
        )
        gammas[strategy] = gamma[0].double().numpy()
    delta = np.append(abs(np.diff(signals["waad"])), 0.0)
    sampled = Sampled(*(np.array(result[name]) for name in ("solved", "other", "wins", "tries")))
    signals |= {"delta": delta, "surprise": sampled.other, "gamma": gammas["coupled"]}
    return Judged(index, sampled, decide(sampled), signals, gammas, result["text"])
