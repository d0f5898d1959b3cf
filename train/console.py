"""Progress on the console: bars that show the time left, and whole lines between them."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

# Where standard error is a file, every update stays: one line every half a minute.
LOG_OPTIONS = {
    "mininterval": 30.0,
    "delay": 15.0,
    "leave": False,
    "bar_format": "{desc}: {n_fmt}/{total_fmt}, {remaining} left, {rate_fmt}{postfix}\n",
}


def bar(items: Iterable, phase: str, unit: str) -> tqdm:
    options = {"dynamic_ncols": True, "leave": False} if sys.stderr.isatty() else LOG_OPTIONS
    return tqdm(items, desc=phase, unit=unit, **options)


def say(line: str):
    """One line on standard output, clear of any bar."""
    tqdm.write(line) if sys.stderr.isatty() else print(line, flush=True)
