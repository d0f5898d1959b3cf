"""Scores answers with their problems' verifiers; no answer can end or stall a run.

Verifiers that are bounded by construction run in the process. All others run in worker processes, which are killed and
replaced if an answer takes too long or too much memory, or crashes the process. A worker is a fresh process that loads
this module, so it and what it imports stay clear of torch.
"""

import contextlib
import math
import multiprocessing
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as TimedOut  # the built-in one from Python 3.11 on
from concurrent.futures.process import BrokenProcessPool
from queue import Empty, SimpleQueue
from typing import NamedTuple

from pebble import ProcessExpired, ProcessPool

from rhythm_kernels.tasks import VERIFIERS, Problem, maths
from train.stop import SIGNALS

BOUNDED = frozenset({"words", "countdown", "choice"})  # exact arithmetic or text comparison, limited in length
PATIENCE = 120.0  # seconds beyond the timeout in which workers that start or are replaced must finish something
MEMORY = 4 << 30  # bytes of address space; beyond, an answer such as 10^{10^10} ends in a MemoryError of its worker


class Score(NamedTuple):
    """A reward; it is 0 where an `error` says why the answer could not be verified."""

    reward: float
    error: str | None = None


class Rewards:
    """Scores answers; as a context manager, ends its worker processes on leaving.

    Args:
        workers: processes, started at the first answer that needs one.
        timeout: seconds that an answer may take there, without the start of the process.
    """

    def __init__(self, workers: int, timeout: float):
        if workers < 1 or not 0 < timeout < float("inf"):
            raise ValueError(f"workers must be at least 1 and timeout above 0, got {workers} and {timeout}")
        self.workers, self.timeout = workers, timeout
        self.pool: ProcessPool | None = None

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the worker processes, busy or not; the next answer that needs one starts new ones."""
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def score(
        self, texts: Sequence[str], problems: Sequence[Problem], progress: Callable[[int], object] | None = None
    ) -> list[Score]:
        """Returns the score of each completion for the problem beside it; `progress` gets each number newly scored.

        A verifier that hangs scores 0 with the error "timed out", one that takes its process with it "worker died".

        Raises:
            ValueError: unequal lengths, or an unknown verifier.
            RuntimeError: workers that cannot start at all.
        """
        if len(texts) != len(problems):
            raise ValueError(f"each text needs its problem, got {len(texts)} texts and {len(problems)} problems")
        unknown = {problem.verifier for problem in problems} - set(VERIFIERS)
        if unknown:
            raise ValueError(f"verifiers are {', '.join(VERIFIERS)}, got {', '.join(sorted(map(repr, unknown)))}")
        report = progress or (lambda count: None)
        scores: list[Score | None] = [None] * len(texts)
        for_workers = {}
        for index, (text, problem) in enumerate(zip(texts, problems)):
            job = (VERIFIERS[problem.verifier], text, problem.answer)
            if problem.verifier in BOUNDED:
                scores[index] = verify(*job)
                report(1)
            else:
                for_workers[index] = job
        for _ in range(2):  # what a pool that broke or got stuck leaves goes to one new pool
            if for_workers:
                for index, score in self._score_in_workers(for_workers, report).items():
                    scores[index] = score
                    del for_workers[index]
        for index in for_workers:
            scores[index] = Score(0.0, "no worker answered")
            report(1)
        return scores

    def _score_in_workers(self, jobs: dict[int, tuple], report: Callable[[int], object]) -> dict[int, Score]:
        """Returns the scores of these jobs; where the pool broke or got stuck some are missing, and it is closed."""
        self._start()
        scores: dict[int, Score] = {}
        finished: SimpleQueue[tuple[int, Future]] = SimpleQueue()
        try:
            for index, job in jobs.items():
                future = self.pool.schedule(verify, args=job, timeout=self.timeout)
                future.add_done_callback(lambda future, index=index: finished.put((index, future)))
        except RuntimeError:  # pebble's answer where the pool broke meanwhile
            self.close()
            return scores
        while len(scores) < len(jobs):
            try:
                index, future = finished.get(timeout=self.timeout + PATIENCE)
                scores[index] = _score_of(future)
            except (BrokenProcessPool, CancelledError, Empty):
                self.close()
                break
            report(1)
        return scores

    def _start(self):
        """Starts a pool that works; raises RuntimeError where its processes do not start."""
        if self.pool is not None and not self.pool.active:
            self.close()
        if self.pool is None:
            # spawn: a forked child would inherit torch, its threads and its GPU
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPool(self.workers, initializer=prepare, context=context)
            try:
                self.pool.schedule(check).result(timeout=PATIENCE)
            except Exception as error:
                self.close()
                raise RuntimeError(f"the reward workers do not start: {describe(error)}") from error


def prepare() -> None:
    """Prepares a worker when it starts; this does not count towards an answer's time."""
    if sys.platform == "linux":  # macOS refuses the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.suppress(ImportError):  # `check` reports it
        maths.load_library()


def check() -> None:
    """Raises ImportError, in the calling process, if a worker lacks a library."""
    maths.load_library()


def verify(verifier: Callable[[str, str], float], completion: str, answer: str) -> Score:
    """Returns the verifier's score; one that raises, or returns no finite number, scores 0 with an error."""
    try:
        reward = float(verifier(completion, answer))
        if not math.isfinite(reward):
            raise ValueError(f"the verifier returned {reward}")
    except Exception as error:
        return Score(0.0, describe(error))
    return Score(reward)


def describe(error: BaseException) -> str:
    """Returns class and message of an exception, or its class alone if the message cannot be formatted."""
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except Exception:
        return type(error).__name__


def count_errors(scores: Sequence[Score]) -> int:
    """Returns how many answers could not be verified, for the metric `rewards/errors`."""
    return sum(score.error is not None for score in scores)


def describe_errors(scores: Sequence[Score]) -> str:
    """Returns the commonest reasons why answers could not be verified, each with its count."""
    reasons = Counter(score.error for score in scores if score.error is not None)
    return ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))


def _score_of(future: Future) -> Score:
    """Returns the score of a verification; raises BrokenProcessPool or CancelledError if it must be made again."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        raise error
    if isinstance(error, TimedOut):
        return Score(0.0, "timed out")
    if isinstance(error, ProcessExpired):
        if error.exitcode in SIGNALS:  # without its sign; the signal was for the whole job, not for this answer
            raise BrokenProcessPool from error
        return Score(0.0, f"worker died: exit code {error.exitcode}")
    return Score(0.0, describe(error))
