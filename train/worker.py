"""What runs in a reward worker: one verification, whose every failure becomes the text of an error.

The module loads in a fresh process for each worker, so it and what it imports stay clear of torch.
"""

import contextlib
import math
import resource
import sys
from collections.abc import Callable
from typing import NamedTuple

from rhythm_kernels.tasks import maths

MEMORY = 4 << 30  # bytes of address space; beyond, an answer such as 10^{10^10} ends in a MemoryError of its worker


class Score(NamedTuple):
    """`error` says why an answer could not be verified; its reward is 0 then. None for right and wrong answers."""

    reward: float
    error: str | None = None


def prepare():
    """Runs when a worker starts: the time of an answer counts from after it."""
    if sys.platform == "linux":  # macOS refuses the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.suppress(ImportError):  # `check` reports it
        maths.load_library()


def check():
    """ImportError, in the process that asks, where a worker lacks a library."""
    maths.load_library()


def verify(verifier: Callable[[str, str], float], completion: str, answer: str) -> Score:
    """The verifier's score; one that raises, or returns no finite number, scores 0 with an error."""
    try:
        reward = float(verifier(completion, answer))
        if not math.isfinite(reward):
            raise ValueError(f"the verifier returned {reward}")
    except Exception as error:
        return Score(0.0, describe(error))
    return Score(reward)


def describe(error: BaseException) -> str:
    """Class and message of an exception, the class alone where the message cannot be made."""
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except Exception:
        return type(error).__name__
