"""Solve rates on held-out problems, with their standard errors: during a run, and of any model from the command line.

    python -m train.evaluate MODEL [--eval-data aime24 aime25 amc23 math-500 olympiadbench] [--engine vllm] [flags]

MODEL is a run's folder (its last checkpoint), a checkpoint, or a transformers model. A checkpoint brings its run's
settings, and every flag of `python -m train` may change them. AIME's problems are answered 16 times (avg@16), others
once (pass@1).
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from train.config import BadSetting, Config
from train.console import bar, say
from train.distributed import World
from train.problems import EvalSet, Prompts
from train.rewards import Rewards, Score, count_errors, describe_errors
from train.rollout import Engine, Sampling


class SolveRate(NamedTuple):
    """Means over `problems` of their answers' shares: solved, and finished within the length limit."""

    solved: float
    finished: float
    standard_error: float
    """Of `solved`, from the problems."""
    problems: int
    answers: int = 1
    """To each problem."""
    errors: int = 0
    """Answers that could not be verified, and count as wrong."""

    def __str__(self) -> str:
        unverified = f", NOT VERIFIED {self.errors}" if self.errors else ""
        return f"{self.solved:6.1%} ± {self.standard_error:.1%}, finished {self.finished:6.1%}{unverified}"


class Evaluation(NamedTuple):
    rates: dict[str, SolveRate]

    def __str__(self) -> str:
        return "  ".join(f"{name} {rate}" for name, rate in self.rates.items())

    def metrics(self) -> dict[str, float]:
        """Flat, under `eval/`."""
        return {
            f"eval/{name}/{key}": value for name, rate in self.rates.items() for key, value in rate._asdict().items()
        }

    @classmethod
    def from_metrics(cls, metrics: dict[str, float]) -> "Evaluation":
        names = dict.fromkeys(name.split("/")[1] for name in metrics if name.startswith("eval/"))  # see EvalSet.name
        return cls({name: SolveRate(*(metrics[f"eval/{name}/{key}"] for key in SolveRate._fields)) for name in names})


def evaluate(
    engine: Engine, evaluations: list[EvalSet], prompts: Prompts, rewards: Rewards, config: Config, world: World
) -> Evaluation:
    """With the run's first seed: the same draws before and after, and training does not see them."""
    engine.wake()
    rates = {each.name: solve_rate(engine, each, prompts, rewards, config, world) for each in evaluations}
    engine.sleep()
    return Evaluation(rates)


def solve_rate(
    engine: Engine, wanted: EvalSet, prompts: Prompts, rewards: Rewards, config: Config, world: World
) -> SolveRate:
    """Each rank answers a share of the problems."""
    problems, n = wanted.problems[world.rank :: world.size], wanted.answers
    at_once = max(1, config.run.eval_batch_size // n)
    sums = torch.zeros(4, dtype=torch.float64)  # of solved, its square, and finished, over problems; of errors
    unverified: list[Score] = []
    batches = range(0, len(problems), at_once)
    for start in bar(batches, f"evaluate {wanted.name}", "batch", disable=not world.is_first):
        batch = problems[start : start + at_once]
        draw = world.draw(config.run.seeds[0], start)
        sampling = Sampling(config.rollout.max_completion_length, wanted.temperature, draw)
        completions = engine.generate([prompts.encode(problem) for problem in batch], n, sampling)
        asked = [problem for problem in batch for _ in range(n)]
        scores = rewards.score(prompts.decode(completions), asked)
        finished = torch.tensor([each.finish_reason == "stop" for each in completions]).double()
        solved = torch.tensor([score.reward for score in scores]).double() * finished
        share = solved.view(-1, n).mean(-1)
        sums[:3] += torch.stack([share.sum(), (share**2).sum(), finished.view(-1, n).mean(-1).sum()])
        sums[3] += count_errors(scores)
        unverified += [score for score in scores if score.error is not None]
    sums = world.sum(sums)
    total, squares, finished = (sums[:3] / len(wanted.problems)).tolist()
    errors = int(sums[3])
    if errors and world.is_first:
        say(
            f"warning: {errors} of {n * len(wanted.problems)} answers to {wanted.name} could not be verified and count "
            f"as wrong: {describe_errors(unverified) or 'on other ranks'}"
        )
    error = math.sqrt(max(0.0, squares - total**2) / len(wanted.problems))
    return SolveRate(total, finished, error, len(wanted.problems), n, errors)


def table(evaluation: Evaluation) -> str:
    """As in the paper: a column a set, in percent, and their mean."""
    rates = evaluation.rates
    heads = [f"{name} (avg@{rate.answers})" if rate.answers > 1 else name for name, rate in rates.items()] + ["mean"]
    mean = sum(rate.solved for rate in rates.values()) / len(rates)
    cells = [f"{100 * rate.solved:.1f} ± {100 * rate.standard_error:.1f}" for rate in rates.values()]
    rows = [heads, ["---"] * len(heads), [*cells, f"{100 * mean:.1f}"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def find_model(place: str) -> tuple[str, Config | None]:
    """The model to load, and the settings of the run that made it, if one did."""
    from train.checkpoint import MODEL, list_checkpoints

    path = Path(place)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        checkpoints = list_checkpoints(path)
        if not checkpoints:
            raise BadSetting(f"the run in {place!r} has no checkpoint yet")
        path = checkpoints[-1]
    if (path / MODEL).is_dir():
        path = path / MODEL
    run = path.parents[2] / "config.json" if path.name == MODEL and len(path.parents) > 2 else None
    return str(path), Config.load(run) if run is not None and run.is_file() else None


def main(arguments: list[str] | None = None) -> int:
    from transformers import AutoTokenizer

    from train.__main__ import build_parser
    from train.problems import load_evaluations, load_task
    from train.setup import load_engine, local_model

    parser = build_parser()
    parser.prog, parser.description = "python -m train.evaluate", __doc__.split("\n\n", 1)[1]
    parser.add_argument("place", metavar="MODEL")
    try:
        values = vars(parser.parse_args(arguments))
        values.pop("resume"), values.pop("preset")
        place, settings = find_model(values.pop("place"))
        config = (settings or Config()).change(**{"model": place, **values})
        world = World.join(config.run.device)
        evaluations = (
            load_evaluations(config.data.eval_data, config.rollout.temperature)
            if config.data.eval_data
            else load_task(config, world).evaluations
        )
        place = local_model(place, world)
        tokenizer = AutoTokenizer.from_pretrained(place)
        prompts = Prompts(tokenizer, config)
        evaluations = prompts.all_fitting(evaluations)
        engine = load_engine(place, None, tokenizer, config, world)
        with Rewards(config.data.reward_workers, config.data.reward_timeout) as rewards:
            found = evaluate(engine, evaluations, prompts, rewards, config, world)
        engine.close()
    except BadSetting as error:
        print(f"python -m train.evaluate: {error}", file=sys.stderr)
        return 2
    if world.is_first:
        say(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
