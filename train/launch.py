"""Starts a run: its folder, one process for each seed, and the summary at the end.

A run of several seeds is a folder of one-seed runs, `seed-0`, `seed-1`, ..., each of which can be looked at and
continued by itself.
"""

import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean

import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from train.checkpoint import list_checkpoints
from train.config import BadSetting, Config, flag_name
from train.console import say
from train.distributed import World, choose_device, is_torchrun
from train.evaluate import Evaluation, SolveRate
from train.loop import train
from train.metrics import read_metrics
from train.plots import plot_learning_curve
from train.stop import Stopped, stop_with_parent

CONFIG, UNFINISHED_CONFIG, LOCK = "config.json", "config.json.tmp", ".lock"
PARENT = "TRAIN_SEED_OF_A_RUN"  # set in the processes of a run's seeds: the run itself reports for them


def launch(config: Config, folder: Path | None = None) -> int:
    """Starts the run, or continues the one in `folder`; returns the exit status.

    Raises:
        BadSetting: a setting that the machine, the model or the problems do not go with; a folder of another run.
        RunError: a checkpoint that is damaged or cannot be written, a sampler that is another policy.
        OSError: a disk that is full or does not let the run write.
        ModuleNotFoundError: a package that these settings need.
    """
    transformers_logging.disable_progress_bar()
    if os.environ.get(PARENT):
        stop_with_parent()
    return launch_rank(config, folder) if is_torchrun() else launch_here(config, folder)


def launch_here(config: Config, folder: Path | None) -> int:
    """All seeds of a run, side by side where there are several."""
    choose_device(config.run.device)
    began = time.time()
    with open_folder(config, folder) as folder:
        if len(config.run.seeds) == 1:
            is_guest = dist.is_initialized()
            train(config.change(threads=threads_per_seed(config)), folder)
            if not is_guest:
                World.leave()  # the group that this run made for itself
            runs = {f"seed {config.run.seeds[0]}": folder}
        else:
            runs = {f"seed {seed}": folder / f"seed-{seed}" for seed in config.run.seeds}
            status = run_side_by_side(config, list(runs.values()))
            if status:
                return status
        plot_learning_curve(runs, folder / "learning_curve.png", f"{config.preset}, {config.credit.strategy} credit")
    if not os.environ.get(PARENT):
        report(config, folder, runs, time.time() - began)
    return 0


def launch_rank(config: Config, folder: Path | None) -> int:
    """One rank of a run of one seed under torchrun; the first rank decides on the folder and reports."""
    if len(config.run.seeds) != 1:
        raise BadSetting(f"--seeds must be one number under torchrun, got {config.run.seeds}")
    world = World.join(config.run.device)
    began = time.time()
    with ExitStack() as stack:
        folder = world.from_first(lambda: stack.enter_context(open_folder(config, folder)))
        train(config, folder)
    if world.is_first:
        runs = {f"seed {config.run.seeds[0]}": folder}
        plot_learning_curve(runs, folder / "learning_curve.png", f"{config.preset}, {config.credit.strategy} credit")
        report(config, folder, runs, time.time() - began)
    world.barrier()
    World.leave()
    return 0


@contextmanager
def open_folder(config: Config, folder: Path | None) -> Iterator[Path]:
    """The run's folder, held for this process; without `folder` that of a new run, or of one with the same settings."""
    if folder is not None:
        with claim(folder):
            yield folder
        return
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(config.run.output or f"runs/{config.preset}-{config.credit.strategy}-{stamp}")
    try:
        if holds_other_files(folder):
            raise BadSetting(f"--output must be a new folder or a run's, got {str(folder)!r}, which holds other files")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(f"--output must be a folder to write in, got {str(folder)!r}: {error.strerror}") from error
    with claim(folder):
        if has_begun(folder):
            check_same(config, folder)
        else:
            write_config(config, folder)
        yield folder


def holds_other_files(folder: Path) -> bool:
    """Whether a folder has files and none of them says that it is a run's."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return bool(names - {LOCK, UNFINISHED_CONFIG}) and CONFIG not in names


def has_begun(folder: Path) -> bool:
    """Whether the run in this folder has a checkpoint; before, nothing keeps it from being another run."""
    return any(list_checkpoints(run) for run in (folder, *folder.glob("seed-*")))


def check_same(config: Config, folder: Path) -> None:
    before = Config.load(folder / CONFIG)
    there, now = before.flat(), config.flat()
    changed = [
        f"{flag_name(name)} {there[name]!r} there, {now[name]!r} now" for name in now if there[name] != now[name]
    ]
    if changed:
        raise BadSetting(f"--output {str(folder)!r} holds a run with other settings: {'; '.join(changed)}")


def write_config(config: Config, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / UNFINISHED_CONFIG
    unfinished.write_text(config.to_json() + "\n", encoding="utf-8")
    unfinished.replace(folder / CONFIG)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the system lets go of it however the process ends."""
    try:
        lock = open(folder / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise BadSetting(f"a run's folder must be one to write in, got {str(folder)!r}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadSetting(f"another process is training in {str(folder)!r}") from None
        yield


def threads_per_seed(config: Config) -> int:
    return config.run.threads or max(1, (os.cpu_count() or 1) // len(config.run.seeds))


def run_side_by_side(config: Config, folders: list[Path]) -> int:
    """One process for each seed; if one fails, the others are stopped, with a checkpoint, and its status is returned.

    They stop too where this process is stopped or killed: each watches its standard input, which is a pipe from here.
    """
    threads = threads_per_seed(config)
    for seed, folder in zip(config.run.seeds, folders, strict=True):
        if not has_begun(folder):
            write_config(config.change(seeds=(seed,), threads=threads, output=str(folder)), folder)
    processes = []
    try:
        for place, folder in enumerate(folders):
            environment = {**os.environ, PARENT: "1", "OMP_NUM_THREADS": str(threads)}
            if sys.stderr.isatty():
                environment["TQDM_POSITION"] = str(2 * place)  # bars below each other
            command = [sys.executable, "-m", "train", "--resume", str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE))
        while None in (now := [process.poll() for process in processes]) and not any(now):
            time.sleep(0.2)
        failed = [(folder, process.returncode) for folder, process in zip(folders, processes) if process.returncode]
    finally:
        end(processes)
    for folder, status in failed:
        if status < 0:
            say(f"the run in {folder} was ended by {signal.Signals(-status).name}")
    return next((1 if status < 0 else status for _, status in failed), 0)


def end(processes: list[subprocess.Popen]) -> None:
    """Asks those that still run to stop, and waits for them; kills them where that wait is interrupted."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    try:
        for process in processes:
            process.wait()
    except (KeyboardInterrupt, Stopped):
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.stdin.close()


def report(config: Config, folder: Path, runs: dict[str, Path], seconds: float):
    """The solve rates before and after, with standard errors, and where everything lies."""
    evaluations = {}
    for label, run in runs.items():
        records = [record for record in read_metrics(run) if "reward" not in record]
        before, after = (Evaluation.from_metrics(record) for record in (records[0], records[-1]))
        evaluations[label] = (before if records[0]["step"] == 0 else None, after)
    say("\nsolved of the held-out problems" + (", whose numbers were never trained on" if is_words(config) else ""))
    width = max(len(name) for _, after in evaluations.values() for name in after.rates)
    say(f"{'':8} {'':{width}} {'before':>28}   {'after':>28}   change")
    for label, (before, after) in evaluations.items():
        _report_rows(label, before, after, width)
    if len(evaluations) > 1:
        befores, afters = zip(*evaluations.values(), strict=True)
        _report_rows("mean", None if None in befores else _mean(befores), _mean(afters), width)
    steps = [record for run in runs.values() for record in read_metrics(run) if "reward" in record]
    if steps:
        share = sum(record["time/statistics"] for record in steps) / sum(record["step_time"] for record in steps)
        say(f"\nstep time {mean(record['step_time'] for record in steps):.2f} s, statistics {share:.2%} of it")
    drifts = [record for record in steps if "rhythm/groups_spearman" in record]
    if drifts:
        names = ("spearman", "local_overlap", "global_overlap")
        spearman, local_share, global_share = (
            mean(record[f"rhythm/groups_{name}"] for record in drifts) for name in names
        )
        say(
            f"from one ranking of the heads to the next: Spearman {spearman:.3f}, "
            f"{local_share:.1%} of the local and {global_share:.1%} of the global heads stay"
        )
    say(f"{seconds / 60:.1f} minutes; in {folder}: learning_curve.png; for each seed samples.html, checkpoints/,")
    say("metrics.jsonl and tensorboard/")


def is_words(config: Config) -> bool:
    return config.data.train_data == "words" and not config.data.eval_data


def _report_rows(label: str, before: Evaluation | None, after: Evaluation, width: int):
    """`before` is None where the line of metrics that held it is lost."""
    for name, new in after.rates.items():
        shown, change = "not known", "not known"
        if before is not None:
            old = before.rates[name]
            shown, change = str(old), f"{100 * (new.solved - old.solved):+.1f} points of {new.problems}"
        say(f"{label:8} {name:{width}} {shown:>28}   {new!s:>28}   {change}")
        label = ""


def _mean(evaluations: tuple[Evaluation, ...]) -> Evaluation:
    """Means over seeds, and their standard errors from the problems of all."""

    def pool(rates: list[SolveRate]) -> SolveRate:
        return SolveRate(
            mean(rate.solved for rate in rates),
            mean(rate.finished for rate in rates),
            math.sqrt(sum(rate.standard_error**2 for rate in rates)) / len(rates),
            sum(rate.problems for rate in rates),
            rates[0].answers,
            sum(rate.errors for rate in rates),
        )

    return Evaluation({name: pool([each.rates[name] for each in evaluations]) for name in evaluations[0].rates})
