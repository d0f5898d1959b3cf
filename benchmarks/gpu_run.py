"""Runs the steps of `gpu_suite.py`, each as a process with its own time limit."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, TextIO

from benchmarks import ROOT

GRACE = 20.0  # seconds from the interrupt to the kill; pytest waits 10 of them for workers that hang, then reports
POLL = 0.05  # seconds between two looks at what runs
TAIL = 40  # lines of a failing step's output in the report
LOG_CHARACTERS = (500_000, 1_000_000)  # the beginning and the end of a step's output that the log keeps


class Step(NamedTuple):
    name: str
    half: int
    """1 for the most important steps, 2 for the rest."""
    command: list[str]
    """The arguments, in which {out} stands for the path without a suffix where a benchmark writes its results."""
    estimate: int
    """The seconds that it is expected to take."""
    limit: int
    """The seconds after which it is stopped."""
    environment: dict[str, str] | None = None
    together: str = ""
    """Steps of one such name, which measure no time, run side by side."""


class Outcome(NamedTuple):
    name: str
    status: str
    """"passed", "failed", "out of time" (its own or the suite's) or "left out"."""
    seconds: float
    tail: str
    """The end of the output, or the reason why the step was left out."""
    log: str = ""
    """The output, without its middle if it is long."""


def run(step: Step, seconds: float, out: Path) -> Outcome:
    """Runs a step in its own process group, which ends with it, for at most `seconds`. `out` stands for {out}."""
    return run_together([step], [seconds], out.parent)[0]


def run_together(steps: list[Step], seconds: list[float], folder: Path) -> list[Outcome]:
    """Runs steps side by side, each in its own process group, which ends with it. Their {out} is `folder`/name.

    After its `seconds` a step is interrupted, as by Ctrl-C, so that tests say what failed and benchmarks keep what they
    have. Processes that still run `GRACE` seconds later are killed.
    """
    with contextlib.ExitStack() as stack:
        running = []
        for step in steps:
            output = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            running.append(stack.enter_context(_Running(step, folder / step.name, output)))
        waited_for = list(zip(running, seconds, strict=True))
        while waited_for:
            waited_for = [(x, limit) for x, limit in waited_for if not x.is_over(limit)]
            time.sleep(POLL)
        return [x.outcome() for x in running]


class _Running:
    """A step's process. All that it started ends with the block."""

    def __init__(self, step: Step, out: Path, output: TextIO):
        command = [argument.replace("{out}", str(out)) for argument in step.command]
        self.name, self.begin = step.name, time.perf_counter()
        self.took, self.is_late = 0.0, False
        self.output = output
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(step.environment or {})}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def __enter__(self) -> "_Running":
        return self

    def __exit__(self, *exception: object) -> None:
        _end(self.process)

    def is_over(self, seconds: float) -> bool:
        """Whether it has ended; interrupts it `seconds` after its begin, and gives it up `GRACE` later."""
        self.took = time.perf_counter() - self.begin
        if self.process.poll() is not None or self.took > seconds + GRACE:
            return True
        if self.took > seconds and not self.is_late:
            self.is_late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGINT)  # reaches processes under a sanitizer or in a worker too
        return False

    def outcome(self) -> Outcome:
        """Returns the outcome of what is over, and ends what it has left behind."""
        _end(self.process)
        status = "out of time" if self.is_late else "passed" if self.process.returncode == 0 else "failed"
        self.output.seek(0)
        lines = [line for line in self.output.read().replace("\r", "\n").splitlines() if line.strip()]
        return Outcome(self.name, status, self.took, "\n".join(lines[-TAIL:]), _cut("\n".join(lines)))


def _end(process: subprocess.Popen) -> None:
    """Ends the rest of a step's process group: a compiler or a worker outlives the process that started it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _cut(text: str) -> str:
    """Returns a text without its middle if it is longer than `LOG_CHARACTERS`."""
    first, last = LOG_CHARACTERS
    left_out = len(text) - first - last
    return text if left_out <= 0 else f"{text[:first]}\n... {left_out} characters ...\n{text[-last:]}"
