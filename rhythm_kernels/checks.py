"""Checks plain arguments: each error names the argument and shows its value. Loads no torch."""

import itertools
import sys
from collections.abc import Sequence

SPAN_BLOCK = 64  # tokens: spans are read from whole blocks of a sequence


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value


def check_float(
    name: str, value: object, minimum: float = -sys.float_info.max, maximum: float = sys.float_info.max
) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}: {value!r}")
    if not minimum <= value <= maximum:  # written so that NaN fails too; a compiled graph cannot call math.isfinite
        raise ValueError(f"{name} must be finite and between {minimum} and {maximum}, got {value}")
    return float(value)


def check_span_rows(span_rows: object) -> int | None:
    if span_rows is not None and check_int("span_rows", span_rows, SPAN_BLOCK) % SPAN_BLOCK:
        raise ValueError(f"span_rows must be a multiple of {SPAN_BLOCK}, or None for all rows, got {span_rows}")
    return span_rows


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}: {value!r}")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_cuts(cuts: Sequence[int], tokens: int) -> None:
    """Raises ValueError if the values of cu_seqlens do not rise from 0 to T."""
    rising = all(begin <= end for begin, end in itertools.pairwise(cuts))
    if not cuts or cuts[0] != 0 or cuts[-1] != tokens or not rising:
        raise ValueError(f"cu_seqlens must rise from 0 to T = {tokens}, got {cuts[:8]}{' ...' * (len(cuts) > 8)}")


def check_horizon(horizon: object) -> tuple[int, int | None]:
    if not isinstance(horizon, (tuple, list)) or len(horizon) != 2:
        raise TypeError(f"horizon must be (lo, hi) in tokens, hi None for the end of the sequence, got {horizon!r}")
    lo, hi = horizon
    check_int("horizon[0]", lo, 0)
    if hi is not None:
        check_int("horizon[1]", hi, lo)
    return lo, hi
