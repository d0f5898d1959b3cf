"""Problems and the verifiers of their answers. Reward workers import this package, so it loads no torch."""

from collections.abc import Callable

from rhythm_kernels.tasks import choice, countdown, maths, words
from rhythm_kernels.tasks.types import BadSet, Problem

# (completion, answer) -> reward. A verifier is pure, and gives 0.0 for a wrong answer, however it is written.
VERIFIERS: dict[str, Callable[[str, str], float]] = {
    "words": words.verify,
    "countdown": countdown.verify,
    "choice": choice.verify,
    "maths": maths.verify,
}

__all__ = ["VERIFIERS", "BadSet", "Problem"]
