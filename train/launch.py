"""Starts a run: opens its folder, runs one process for each seed, and ends with the learning curve and a summary.

A run of several seeds is a folder of one-seed runs, `seed-0`, `seed-1`, ..., each of which can be read and
resumed by itself.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from rhythm_kernels.files import unfinished, write_whole
from train.checkpoint import list_checkpoints, step_of
from train.config import BadSetting, Config, differences
from train.console import say
from train.distributed import World, choose_device, is_torchrun, visible_gpus
from train.loop import train
from train.plots import plot_learning_curve
from train.report import report
from train.setup import enough_memory
from train.stop import Stopped, stop_with_parent

CONFIG, LOCK = "config.json", ".lock"
REFUSED = 2  # the exit status of a wrong setting
PARENT = "TRAIN_SEED_OF_A_RUN"  # set in the processes of a run's seeds, whose parent reports for them
# Seconds after a stop signal until torchrun kills its ranks. Its 30 are too few for a long step and a large checkpoint.
PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"}


class SeedRefused(BadSetting):
    """A setting does not fit the run of a seed, which has said so."""


def launch(config: Config, folder: Path | None = None) -> int:
    """Starts the run, or continues the one in `folder`; returns the exit status.

    Raises:
        BadSetting: a setting does not fit the machine, the model or the problems, or the folder is another run's.
        RunError: a checkpoint is damaged or cannot be written, the sampler's policy differs from the trainer's, or the
            memory does not suffice.
        OSError: the disk is full or not writable.
        ModuleNotFoundError: a package that these settings need is missing.
    """
    transformers_logging.disable_progress_bar()
    if os.environ.get(PARENT):
        stop_with_parent()
    if len(config.run.seeds) == 1:
        return launch_seed(config, folder)
    if is_torchrun():
        raise BadSetting(f"--seeds must be one number under torchrun, got {config.run.seeds}")
    choose_device(config.run.device)
    try:
        return launch_seeds(config, folder)
    except SeedRefused:  # its process has said why
        return REFUSED


def launch_seeds(config: Config, folder: Path | None) -> int:
    began = time.time()
    with open_folder(config, folder) as folder:
        runs = {f"seed {seed}": folder / f"seed-{seed}" for seed in config.run.seeds}
        if status := run_side_by_side(config, list(runs.values())):
            return status
        finish(config, folder, runs, began)
    return 0


def launch_seed(config: Config, folder: Path | None) -> int:
    """Runs one seed, in this process or as a rank of torchrun; the first rank chooses the folder and reports."""
    is_guest, began = dist.is_initialized(), time.time()
    world = World.join(config.run.device)
    with ExitStack() as stack:
        folder = world.from_first(lambda: stack.enter_context(open_folder(config, folder)))
        with enough_memory(config, "micro_batch_tokens"):
            train(config.change(threads=threads_per_seed(config)), folder)
        if world.is_first:
            finish(config, folder, {f"seed {config.run.seeds[0]}": folder}, began)
    world.barrier()
    if not is_guest:
        World.leave()
    return 0


def finish(config: Config, folder: Path, runs: dict[str, Path], began: float) -> None:
    title = f"{config.preset}, {config.credit.strategy} credit"
    plot_learning_curve(runs, folder / "learning_curve.png", title, config.run.peak_weight)
    if not os.environ.get(PARENT):
        report(config, folder, runs, time.time() - began)


@contextmanager
def open_folder(config: Config, folder: Path | None) -> Iterator[Path]:
    """Locks the run's folder for this process and writes the configuration to it.

    Without `folder` it is a new one, or that of a run with the same settings but for those that may change.
    """
    if folder is not None:
        with claim(folder):
            check_steps(config, folder)
            with written(config, folder):
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
            check_steps(config, folder)
        with written(config, folder):
            yield folder


@contextmanager
def written(config: Config, folder: Path) -> Iterator[None]:
    """Writes the configuration for this block; a run that has begun gets its own back if the block refuses it."""
    steps, file = steps_made(folder), folder / CONFIG
    before = file.read_text(encoding="utf-8") if steps is not None and file.exists() else None
    write_config(config, folder)
    try:
        yield
    except BadSetting:
        if before is not None and steps_made(folder) == steps:  # the steps that another seed has made stay valid
            write_whole(file, before)
        raise


def holds_other_files(folder: Path) -> bool:
    """Returns whether a folder has files but no configuration of a run."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return bool(names - {LOCK, unfinished(Path(CONFIG)).name}) and CONFIG not in names


def has_begun(folder: Path) -> bool:
    """Returns whether the run in this folder has a checkpoint; before the first, another run may take the folder."""
    return steps_made(folder) is not None


def steps_made(folder: Path) -> int | None:
    """Returns the step of the last checkpoint of a run, or of any of its seeds; None before the first."""
    checkpoints = (list_checkpoints(run) for run in (folder, *folder.glob("seed-*")))
    return max((step_of(of_run[-1]) for of_run in checkpoints if of_run), default=None)


def check_steps(config: Config, folder: Path) -> None:
    """Raises BadSetting if the run in this folder has made more steps than it is to make."""
    made, most = steps_made(folder) or 0, config.grpo.max_steps
    if made > most:
        raise BadSetting(f"--max-steps must be at least the {made} steps that the run has made, got {most}")


def check_same(config: Config, folder: Path) -> None:
    """Raises BadSetting if the run in this folder has other settings, but for those that may change."""
    there = Config.load(folder / CONFIG)
    if changed := differences(there, config, there.may_change()):
        raise BadSetting(f"--output {str(folder)!r} holds a run with other settings: {'; '.join(changed)}")


def write_config(config: Config, folder: Path) -> None:
    write_whole(folder / CONFIG, config.to_json() + "\n")


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Locks the folder for this process; the system releases the lock however the process ends."""
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
    cores = 1 if is_torchrun() else os.cpu_count() or 1
    return config.run.threads or max(1, cores // len(config.run.seeds))


def environment_of_run(gpus: Sequence[str], threads: int) -> dict[str, str]:
    """Returns the environment of the process of a run that has these GPUs to itself, if there are any."""
    own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return {**PATIENCE, **os.environ, **own, PARENT: "1", "OMP_NUM_THREADS": str(threads)}


def run_side_by_side(config: Config, folders: list[Path]) -> int:
    """Runs one process for each seed and returns the exit status; if one fails, stops the others with a checkpoint.

    Seeds take turns at the GPUs, and more seeds than GPUs share them.
    They also stop when this process is stopped or killed: each watches its standard input, a pipe from this process.
    """
    threads, gpus = threads_per_seed(config), visible_gpus(config.run.device)
    with ExitStack() as stack:
        for seed, folder in zip(config.run.seeds, folders, strict=True):
            own = config.change(seeds=(seed,), threads=threads, output=str(folder))
            stack.enter_context(written(own, folder))
        processes = []
        try:
            for place, folder in enumerate(folders):
                environment = environment_of_run([gpus[place % len(gpus)]] if gpus else [], threads)
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
        status = next((1 if status < 0 else status for _, status in failed), 0)
        if status == REFUSED:
            raise SeedRefused
    return status


def end(processes: list[subprocess.Popen]) -> None:
    """Asks the running processes to stop and waits for them; kills them if the wait is interrupted."""
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
