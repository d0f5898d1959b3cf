"""Solve rates on held-out problems, with their standard errors."""

import math
from typing import NamedTuple

import torch

from train.config import Config
from train.console import bar
from train.data import Problem
from train.rewards import countdown_reward
from train.rollout import Engine, Sampling


class SolveRate(NamedTuple):
    """Shares of `problems` held-out problems, one answer each: solved, and finished within the length limit."""

    solved: float
    finished: float
    problems: int

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.solved * (1 - self.solved) / self.problems)

    def __str__(self) -> str:
        return f"{self.solved:6.1%} ± {self.standard_error:.1%}, finished {self.finished:6.1%}"


class Evaluation(NamedTuple):
    """The same problems answered by sampling at the training temperature, and greedily."""

    sampled: SolveRate
    greedy: SolveRate

    def metrics(self) -> dict[str, float]:
        """Flat, under `eval/`."""
        return {
            f"eval/{how}/{name}": value
            for how, rate in self._asdict().items()
            for name, value in (*rate._asdict().items(), ("standard_error", rate.standard_error))
        }

    @classmethod
    def from_metrics(cls, metrics: dict[str, float]) -> "Evaluation":
        return cls(*(SolveRate(*(metrics[f"eval/{how}/{name}"] for name in SolveRate._fields)) for how in cls._fields))


def evaluate(engine: Engine, problems: list[Problem], config: Config) -> Evaluation:
    """With the run's seed, in a random stream of its own: the same before and after, and training does not see it."""
    length, size = config.rollout.max_completion_length, config.run.eval_batch_size
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seeds[0])
        sampled = solve_rate(engine, problems, Sampling(length, config.rollout.temperature), size)
        greedy = solve_rate(engine, problems, Sampling(length, None), size)
    return Evaluation(sampled, greedy)


def solve_rate(engine: Engine, problems: list[Problem], sampling: Sampling, batch_size: int) -> SolveRate:
    solved = finished = 0.0
    how = "greedy" if sampling.temperature is None else "sampled"
    for start in bar(range(0, len(problems), batch_size), f"evaluate, {how}", "batch"):
        batch = problems[start : start + batch_size]
        rollouts = engine.generate([problem.prompt for problem in batch], 1, sampling)
        answers = zip(rollouts.texts, rollouts.finished.tolist(), batch, strict=True)
        solved += sum(countdown_reward(text, *problem) for text, ended, problem in answers if ended)
        finished += rollouts.finished.sum().item()
    return SolveRate(solved / len(problems), finished / len(problems), len(problems))
