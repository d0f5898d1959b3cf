"""Measures solve rates on held-out problems, with standard errors."""

import math
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

import torch

from rhythm_kernels.console import markdown_table
from train.config import Config
from train.console import bar, say
from train.distributed import World
from train.problems import EvalSet, Prompts
from train.rewards import Rewards, count_errors, describe_errors
from train.rollout import Engine, Sampling


class SolveRate(NamedTuple):
    """Means over `problems` of the shares of their answers that are right and that end within the length limit."""

    solved: float
    finished: float
    standard_error: float
    """The standard error of `solved`, from the problems."""
    problems: int
    answers: int = 1
    """Answers to each problem."""
    errors: int = 0
    """Answers that could not be verified; they count as wrong."""

    def __str__(self) -> str:
        unverified = f", NOT VERIFIED {self.errors}" if self.errors else ""
        return f"{self.solved:6.1%} ± {self.standard_error:.1%}, finished {self.finished:6.1%}{unverified}"


class Evaluation(NamedTuple):
    """The solve rates of one policy, by the names of the evaluation sets."""

    rates: dict[str, SolveRate]

    def __str__(self) -> str:
        return "  ".join(f"{name} {rate}" for name, rate in self.rates.items())

    def metrics(self) -> dict[str, float]:
        """Returns the rates as metrics, eval/SET/FIELD."""
        return {
            f"eval/{name}/{key}": value for name, rate in self.rates.items() for key, value in rate._asdict().items()
        }

    @classmethod
    def from_metrics(cls, metrics: dict[str, float]) -> "Evaluation":
        rates: dict[str, dict[str, float]] = {}
        for metric, value in metrics.items():
            if metric.startswith("eval/"):
                _, name, key = metric.split("/")  # no set has a slash in its name, see EvalSet
                rates.setdefault(name, {})[key] = value
        return cls({name: SolveRate(**values) for name, values in rates.items()})

    def table(self, peaks: dict[str, float] | None = None, weight: float = 0.0) -> str:
        """Returns the paper's table in Markdown: a column for each set, in percent, and their mean.

        Args:
            peaks: the peak averages of a run, by the names of its sets: a second row.
            weight: of the peak averages.
        """
        heads = [f"{name} (avg@{rate.answers})" if rate.answers > 1 else name for name, rate in self.rates.items()]
        cells = [f"{100 * rate.solved:.1f} ± {100 * rate.standard_error:.1f}" for rate in self.rates.values()]
        rows = [["solved", *cells, f"{100 * mean(rate.solved for rate in self.rates.values()):.1f}"]]
        if peaks is not None:
            values = [peaks.get(name, math.nan) for name in self.rates]
            cells = ["-" if math.isnan(value) else f"{100 * value:.1f}" for value in (*values, mean(values))]
            rows.append([f"peak average of the run, a = {weight:g}", *cells])
        return markdown_table(["", *heads, "mean"], rows)


def peak_average(scores: Sequence[float], weight: float) -> list[float]:
    """Returns the moving average of the peak of a run's scores, by which the paper compares runs (A.2).

    EMA_t = a max(x_t, EMA_{t-1}) + (1 - a) EMA_{t-1}. It begins at the first score. A better score than the average
    raises it, and a worse one leaves it as it is.

    Args:
        scores: of one benchmark, in the order of the evaluations.
        weight: a. The paper does not give it.
    """
    averages = list(scores[:1])
    for score in scores[1:]:
        averages.append(weight * max(score, averages[-1]) + (1 - weight) * averages[-1])
    return averages


def peak_averages(records: Sequence[dict[str, float]], weight: float) -> dict[str, tuple[list[int], list[float]]]:
    """Returns the steps of the evaluations in a run's metrics, and the peak average at each, for each set."""
    scores: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, rate in Evaluation.from_metrics(record).rates.items():
            scores.setdefault(name, []).append((record["step"], rate.solved))
    steps = {name: [step for step, _ in known] for name, known in scores.items()}
    return {name: (steps[name], peak_average([score for _, score in known], weight)) for name, known in scores.items()}


def evaluate(
    engine: Engine, evaluations: list[EvalSet], prompts: Prompts, rewards: Rewards, config: Config, world: World
) -> Evaluation:
    """Returns the solve rates on all sets, with the run's first seed: draws before and after training are the same."""
    engine.wake()
    rates = {
        questions.name: solve_rate(engine, questions, prompts, rewards, config, world) for questions in evaluations
    }
    engine.sleep()
    return Evaluation(rates)


def solve_rate(
    engine: Engine, questions: EvalSet, prompts: Prompts, rewards: Rewards, config: Config, world: World
) -> SolveRate:
    """Returns the solve rate on one set, of which each rank answers a share."""
    name, n, count = questions.name, questions.answers, len(questions.problems)
    problems = questions.problems[world.rank :: world.size]
    asked = [problem for problem in problems for _ in range(n)]
    seed = world.draw(config.run.seeds[0], 0)
    sampling = Sampling(config.rollout.max_completion_length, questions.temperature, seed)
    with bar(None, f"evaluate {name}", "answer", total=len(asked), disable=not world.is_first) as line:
        encoded = [prompts.encode(problem) for problem in problems]
        completions = engine.generate(encoded, n, sampling, lambda answers, tokens: line.update(answers))
    scores = rewards.score(prompts.decode(completions), asked)
    finished = torch.tensor([completion.finish_reason == "stop" for completion in completions]).double()
    solved = torch.tensor([score.reward for score in scores]).double() * finished
    share = solved.view(-1, n).mean(-1)
    errors = torch.tensor(count_errors(scores)).double()
    sums = world.sum(torch.stack([share.sum(), (share**2).sum(), finished.sum() / n, errors]))
    rate, mean_square, share_finished = (sums[:3] / count).tolist()
    unverified = int(sums[3])
    if unverified and world.is_first:
        say(
            f"warning: {unverified} of {n * count} answers to {name} could not be verified and count as wrong: "
            f"{describe_errors(scores) or 'on other ranks'}"
        )
    standard_error = math.sqrt(max(0.0, mean_square - rate**2) / count)
    return SolveRate(rate, share_finished, standard_error, count, n, unverified)


def cut_off(evaluation: Evaluation, config: Config) -> list[str]:
    """Returns a line for each set with answers that the length limit ended: these count as not solved."""
    limit = config.rollout.max_completion_length
    return [
        f"{name}: {1 - rate.finished:.1%} of the answers were cut off at --max-completion-length {limit}"
        for name, rate in evaluation.rates.items()
        if rate.finished < 1
    ]
