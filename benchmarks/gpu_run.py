"""Runs the steps of `gpu_suite.py`, each a process with a time limit of its own."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GRACE = 20.0  # seconds between the request to stop and the end; pytest waits 10 for workers that hang, then reports
TAIL = 40  # lines of a failing step's output in the report
LOG_BYTES = (500_000, 1_000_000)  # of a step's output in the log: its beginning and its end


class Step(NamedTuple):
    name: str
    half: int
    """1: among the most valuable, 2: the rest."""
    command: list[str]
    """{out} stands for the path, without a suffix, where a benchmark writes its results."""
    estimate: int
    """Seconds that it is expected to take."""
    limit: int
    """Seconds after which it is stopped."""
    environment: dict[str, str] | None = None


class Outcome(NamedTuple):
    name: str
    status: str
    """"passed", "failed", "out of time" (its own or the suite's) or "left out"."""
    seconds: float
    tail: str
    """The end of the output; or why it was left out."""
    log: str = ""
    """The output, without its middle if it is long."""


def run(step: Step, seconds: float, out: Path) -> Outcome:
    """Runs a step in a process group of its own, which ends with it.

    After so many seconds it is interrupted, as by Ctrl-C, so that tests say what failed and benchmarks keep what they
    have; what still runs `GRACE` seconds later is killed.
    """
    command = [argument.replace("{out}", str(out)) for argument in step.command]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(step.environment or {})}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "passed" if process.wait(max(seconds, 0)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)  # also what runs under a sanitizer or in a worker
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _end(process)
        output.seek(0)
        lines = [line for line in output.read().replace("\r", "\n").splitlines() if line.strip()]
    return Outcome(step.name, status, time.perf_counter() - begin, "\n".join(lines[-TAIL:]), _cut("\n".join(lines)))


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of a step's process group: a compiler or a worker outlives the process that started it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _cut(text: str) -> str:
    first, last = LOG_BYTES
    left_out = len(text) - first - last
    return text if left_out <= 0 else f"{text[:first]}\n... {left_out} characters ...\n{text[-last:]}"
