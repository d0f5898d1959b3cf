"""Solve rates on held-out problems, with their standard errors: during a run, and of any model from the command line.

    python -m train.evaluate MODEL [--eval-data aime24 aime25 amc23 math-500 olympiadbench] [--engine vllm] [flags]

MODEL is a run's folder (its last checkpoint), a checkpoint, or a transformers model. A checkpoint brings its run's
settings; for another model --preset or flags give them. AIME's problems are answered 16 times (avg@16), others once
(pass@1).
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from train import command
from train.config import BadSetting, Config, add_flags, check_given
from train.presets import load_preset

PROGRAM = "python -m train.evaluate"

try:
    import torch

    from train.console import bar, say
    from train.distributed import World
    from train.problems import EvalSet, Prompts
    from train.rewards import Rewards, Score, count_errors, describe_errors
    from train.rollout import Engine, Sampling
except ImportError as error:  # the command tells what is missing; a module that imports this one raises
    if __name__ != "__main__":
        raise
    sys.exit(command.explain(PROGRAM, error))


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
        fields = {name: [key for key in SolveRate._fields if f"eval/{name}/{key}" in metrics] for name in names}
        return cls({name: SolveRate(**{key: metrics[f"eval/{name}/{key}"] for key in fields[name]}) for name in names})


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


FLAGS = (
    *("eval_data", "chat_template", "max_prompt_length", "reward_workers", "reward_timeout", "dtype"),
    *("engine", "max_completion_length", "temperature", "rollout_batch_size", "vllm_gpu_memory_utilization"),
    *("seeds", "device", "eval_batch_size"),
)
"""The settings that an evaluation reads; the command has no other flags."""


def find_model(place: str) -> tuple[str, Config | None]:
    """The model to load, and the settings of the run that made it, if one did."""
    from train.checkpoint import MODEL, list_checkpoints

    path = Path(place)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        checkpoints = list_checkpoints(path)
        if not checkpoints:
            raise BadSetting(f"the run in {place!r} has no checkpoint yet")
        path = checkpoints[-1]
    elif seeds := sorted(str(seed) for seed in path.glob("seed-*") if (seed / "config.json").is_file()):
        raise BadSetting(f"MODEL must be one of the runs in {place!r}: {', '.join(seeds)}")
    if (path / MODEL).is_dir():
        path = path / MODEL
    run = path.parents[2] / "config.json" if path.name == MODEL and len(path.parents) > 2 else None
    return str(path), Config.load(run) if run is not None and run.is_file() else None


def choose_settings(model: str, of_run: Config | None, preset: str | None, given: dict[str, str]) -> Config:
    """The settings of an evaluation: the run's, or the preset's or the defaults, with the flags that were given."""
    if of_run is not None and preset is not None:
        raise BadSetting(
            f"--preset is for a model that no run made, got {preset!r} and a run's, which brings its settings"
        )
    if of_run is None and preset is None and "eval_data" not in given:
        raise BadSetting("--eval-data must name what to evaluate on, or --preset, for a model that no run made")
    base = of_run or (Config() if preset is None else load_preset(preset))
    config = base.change(**{"model": model, **given})
    if "seeds" in given and len(config.run.seeds) > 1:
        raise BadSetting(f"--seeds must be one number here, got {config.run.seeds}")
    check_given(given, config)
    return config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("place", metavar="MODEL")
    parser.add_argument("--preset", help="settings for a model that no run made: a preset of python -m train")
    add_flags(parser, FLAGS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    return command.run(PROGRAM, lambda: evaluate_model(arguments))


def evaluate_model(arguments: list[str] | None) -> int:
    from train.problems import check_fit, check_verifiers, load_held_out, stop_ids
    from train.setup import check_engine, load_engine, load_tokenizer, local_model, reading_model

    given = vars(build_parser().parse_args(arguments))
    place, of_run = find_model(given.pop("place"))
    config = choose_settings(place, of_run, given.pop("preset", None), given)
    world = World.join(config.run.device)
    check_engine(config)
    evaluations = load_held_out(config, world)
    check_verifiers([each.problems for each in evaluations])
    place = local_model(place, world)
    with reading_model(place):
        tokenizer = load_tokenizer(place)
        prompts = Prompts(tokenizer, config, stop_ids(place, tokenizer))
        evaluations = prompts.all_fitting(evaluations)
        check_fit(place, prompts, config)
        engine = load_engine(place, None, tokenizer, config, world)
    with Rewards(config.data.reward_workers, config.data.reward_timeout) as rewards:
        found = evaluate(engine, evaluations, prompts, rewards, config, world)
    engine.close()
    if world.is_first:
        say(table(found))
        for line in cut_off(found, config):
            say(line)
    return 0


def cut_off(evaluation: Evaluation, config: Config) -> list[str]:
    """A line for each set with answers that the length limit ended: these count as not solved."""
    most = config.rollout.max_completion_length
    return [
        f"{name}: {1 - rate.finished:.1%} of the answers were cut off at --max-completion-length {most}"
        for name, rate in evaluation.rates.items()
        if rate.finished < 1
    ]


if __name__ == "__main__":
    sys.exit(main())
