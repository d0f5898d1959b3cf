"""Scores answers with their problems' verifiers, whatever a model wrote: an answer never ends or stalls a run.

Verifiers that are bounded by construction run in the process. All others run in worker processes, which are killed and
replaced where an answer takes too long, too much memory, or the process with it.
"""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as TimedOut  # the built-in one from Python 3.11 on
from concurrent.futures.process import BrokenProcessPool
from queue import Empty, SimpleQueue

from pebble import ProcessExpired, ProcessPool

from rhythm_kernels.tasks import VERIFIERS, Problem
from train import worker
from train.worker import Score

BOUNDED = frozenset({"words", "countdown", "choice"})  # exact arithmetic or text comparison, limited in length
PATIENCE = 120.0  # seconds beyond the timeout in which workers that start or are replaced must finish something


class Rewards:
    """Scores answers; as a context manager it ends its worker processes on leaving.

    workers: processes, started at the first answer that needs one. timeout: seconds an answer may take there, without
    the start of the process.
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
        """The score of each completion for the problem beside it; `progress` is called with each number newly scored.

        A verifier that hangs scores 0 with the error "timed out", one that takes its process with it "worker died",
        one that raises or returns no finite number says so. ValueError for unequal lengths and unknown verifiers;
        RuntimeError where workers cannot start at all.
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
                scores[index] = worker.verify(*job)
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
        """The scores of these jobs; some are missing if the pool broke or got stuck, and it is closed then."""
        self._start()
        scores: dict[int, Score] = {}
        finished: SimpleQueue[tuple[int, Future]] = SimpleQueue()
        try:
            for index, job in jobs.items():
                future = self.pool.schedule(worker.verify, args=job, timeout=self.timeout)
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
        """A pool that works; RuntimeError where its processes do not start."""
        if self.pool is not None and not self.pool.active:
            self.close()
        if self.pool is None:
            # spawn: a forked child would inherit torch, its threads and its GPU
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPool(self.workers, initializer=worker.prepare, context=context)
            try:
                self.pool.schedule(worker.check).result(timeout=PATIENCE)
            except Exception as error:
                self.close()
                raise RuntimeError(f"the reward workers do not start: {worker.describe(error)}") from error


def count_errors(scores: Sequence[Score]) -> int:
    """How many of the answers could not be verified, for the metric `rewards/errors`."""
    return sum(score.error is not None for score in scores)


def describe_errors(scores: Sequence[Score]) -> str:
    """The commonest reasons why answers could not be verified, each with its count; empty without any."""
    reasons = Counter(score.error for score in scores if score.error is not None)
    return ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))


def _score_of(future: Future) -> Score:
    """What came of a verification; raises BrokenProcessPool or CancelledError where the pool gave up on it."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        raise error
    if isinstance(error, TimedOut):
        return Score(0.0, "timed out")
    if isinstance(error, ProcessExpired):
        return Score(0.0, f"worker died: exit code {error.exitcode}")
    return Score(0.0, worker.describe(error))
