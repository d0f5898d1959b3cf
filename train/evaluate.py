"""Measures the solve rates of any model, from the command line.

    python -m train.evaluate RUN [--engine vllm] [flags]
    python -m train.evaluate MODEL --eval-data aime24 math-500 --max-completion-length 8192 --dtype bfloat16 [flags]
    python -m train.evaluate MODEL --preset maths-4b-8k [flags]

RUN is a run's folder (its last checkpoint) or a checkpoint, which bring the run's settings. A run of several seeds has
a folder for each: name one, such as runs/FOLDER/seed-0. MODEL is any transformers model. AIME's problems are answered
16 times (avg@16), others once (pass@1).

For a run's folder a second row has the moving average of the peak over the evaluations of the run, at its end: the
number by which the paper compares runs (A.2).
"""

import argparse
import sys
from pathlib import Path

from train.command import run
from train.config import BadSetting, Config, flag_name
from train.flags import add_flags, check_given
from train.presets import load_preset

PROGRAM = "python -m train.evaluate"
FLAGS = (
    *("eval_data", "chat_template", "max_prompt_length", "reward_workers", "reward_timeout", "dtype"),
    *("engine", "max_completion_length", "eval_temperature", "rollout_batch_size", "vllm_gpu_memory_utilization"),
    *("seeds", "device", "peak_weight"),
)
"""The settings that an evaluation reads; the command has no other flags."""


def main(arguments: list[str] | None = None) -> int:
    return run(PROGRAM, lambda: evaluate_model(arguments))


def evaluate_model(arguments: list[str] | None) -> int:
    given = vars(build_parser().parse_args(arguments))
    from train.distributed import World  # torch and transformers load here, after the flags have been checked
    from train.problems import Prompts, check_fit, check_verifiers, load_held_out, stop_ids
    from train.rewards import Rewards
    from train.setup import check_engine, enough_memory, load_engine, load_tokenizer, local_model, reading_model
    from train.solve_rates import cut_off, evaluate

    folder = Path(given["place"])
    place, of_run = find_model(given.pop("place"))
    config = choose_settings(place, of_run, given.pop("preset", None), given)
    world = World.join(config.run.device)
    check_engine(config)
    evaluations = load_held_out(config, world)
    check_verifiers([questions.problems for questions in evaluations])
    place = local_model(place, world)
    with reading_model(place):
        tokenizer = load_tokenizer(place)
        prompts = Prompts(tokenizer, config, stop_ids(place, tokenizer))
        evaluations = prompts.all_fitting(evaluations)
        check_fit(place, prompts, config)
    rewards = Rewards(config.data.reward_workers, config.data.reward_timeout)
    with enough_memory(config), rewards:
        engine = load_engine(place, None, prompts, config, world)
        evaluation = evaluate(engine, evaluations, prompts, rewards, config, world)
        engine.close()
    if world.is_first:
        peaks = peaks_of(folder, config.run.peak_weight)
        print(evaluation.table(peaks, config.run.peak_weight), *cut_off(evaluation, config), sep="\n")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} MODEL [flags]",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("place", metavar="MODEL", help="a run's folder, a checkpoint, or a transformers model")
    parser.add_argument("--preset", help="settings for a model that no run made: a preset of python -m train")
    add_flags(parser, FLAGS)
    return parser


def peaks_of(run: Path, weight: float) -> dict[str, float] | None:
    """Returns the peak average of each set at the end of a run; None for another folder, or a run without metrics."""
    from train.metrics import FILE, read_metrics
    from train.solve_rates import peak_averages

    if not (run / "checkpoints").is_dir() or not (run / FILE).is_file():
        return None
    return {name: curve[-1] for name, (_, curve) in peak_averages(read_metrics(run), weight).items()}


def find_model(place: str) -> tuple[str, Config | None]:
    """Returns the model to load, and the settings of the run that made it, if one did."""
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
    """Returns the run's settings, or the preset's or the defaults, changed by the flags that were given."""
    if of_run is not None and preset is not None:
        raise BadSetting(
            f"--preset is for a model that no run made, got {preset!r} and a run's, which brings its settings"
        )
    for name, what in (("eval_data", "what to evaluate on"), ("max_completion_length", "the most tokens of an answer")):
        if of_run is None and preset is None and name not in given:
            raise BadSetting(f"{flag_name(name)} must say {what}, or --preset both, for {model!r}, which no run made")
    base = of_run or (Config() if preset is None else load_preset(preset))
    config = base.change(**{"model": model, **given})
    if "seeds" in given and len(config.run.seeds) > 1:
        raise BadSetting(f"--seeds must be one number here, got {config.run.seeds}")
    check_given(given, config)
    return config


if __name__ == "__main__":
    sys.exit(main())
