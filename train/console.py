"""Shows progress on the console: bars with the time left, and whole lines between them."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

# If standard error is a file, every update stays in it, so there is at most one line in half a minute.
LOG_OPTIONS = {
    "mininterval": 30.0,
    "delay": 15.0,
    "leave": False,
    "bar_format": "{desc}: {n_fmt}/{total_fmt}, {remaining} left, {rate_fmt}{postfix}\n",
}


def bar(items: Iterable | None, phase: str, unit: str, **options) -> tqdm:
    style = {"dynamic_ncols": True, "leave": False} if sys.stderr.isatty() else LOG_OPTIONS
    return tqdm(items, desc=phase, unit=unit, **style | options)


def say(line: str) -> None:
    """Prints one line on standard output, clear of any bar."""
    tqdm.write(line) if sys.stderr.isatty() else print(line, flush=True)


class Phases:
    """Times the phases of one step, and shows a bar for each. On a GPU a phase ends when its work is done."""

    def __init__(self, label: str, *, shown: bool = True):
        self.label, self.shown = label, shown
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str, total: int = 1, unit: str = "") -> Iterator[Callable[..., None]]:
        """Yields a function that takes the amount of work and the number of tokens since its last call."""
        began, made = time.perf_counter(), 0
        options = {"total": total, "unit_scale": True, "disable": not self.shown}
        if sys.stderr.isatty():  # under the bar of the steps; a phase that is over within a second shows none
            options |= {"position": int(os.environ.get("TQDM_POSITION", 0)) + 1, "delay": 1.0}
        line = bar(None, f"{self.label} {phase}", unit, **options)

        def advance(done: int, tokens: int = 0) -> None:
            nonlocal made
            if tokens:
                made += tokens
                line.set_postfix_str(f"{made / (time.perf_counter() - began):,.0f} tok/s", refresh=False)
            line.update(done)

        with line:
            yield advance
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = time.perf_counter() - began

    def metrics(self, statistics: float) -> dict[str, float]:
        """Returns the seconds of each phase and of the step, and the share of the statistics in them."""
        total = sum(self.seconds.values())
        times = {f"time/{phase.replace(' ', '_')}": seconds for phase, seconds in self.seconds.items()}
        times |= {"time/statistics": statistics, "rhythm/statistics_share": statistics / total}
        return times | {"step_time": total}
