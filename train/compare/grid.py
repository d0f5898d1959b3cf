"""Runs the cells of a grid side by side: each cell and seed is a run of `python -m train` in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rhythm_kernels.options import PREFIX
from train.compare.runs import Run, is_finished, read_runs, read_whole
from train.config import MAY_CHANGE, BadSetting, Config, RunError, differences
from train.console import say
from train.distributed import is_torchrun, sharing_ranks, visible_gpus
from train.launch import CONFIG, claim, end, environment_of_run, has_begun, write_config
from train.solve_rates import Evaluation
from train.supervise import warm_start_path

MAY_DIFFER = (*MAY_CHANGE, "output")  # --output of a cell in a folder that was moved


class Cell(NamedTuple):
    """One run of the grid."""

    label: str
    folder: Path
    config: Config
    warm_start: Path | None = None
    """The folder of the model that the run starts from, if it is made by the first run that needs it."""

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def is_finished(self) -> bool:
        return is_finished(self.config, read_whole(self.folder)) if self.folder.exists() else False


class Share(NamedTuple):
    """Says how runs share the machine."""

    jobs: int
    ranks: int
    threads: int
    devices: list[str]
    """The visible GPUs; empty on a CPU."""

    @classmethod
    def of_machine(cls, config: Config, jobs: int | None, ranks: int | None) -> "Share":
        if jobs is not None and jobs < 1:
            raise BadSetting(f"--jobs must be at least 1, got {jobs}")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = visible_gpus(config.run.device)
        if not devices:
            if ranks not in (None, 1):
                raise BadSetting(f"--ranks must be 1 without GPUs, got {ranks}")
            threads = config.run.threads or 1
            return cls(jobs or max(1, cores // threads), 1, threads, [])
        ranks = default_ranks(config, len(devices)) if ranks is None else ranks
        if not 1 <= ranks * (jobs or 1) <= len(devices):
            raise BadSetting(f"--ranks {ranks} and --jobs {jobs or 1} must fit the {len(devices)} GPUs that are there")
        threads = config.run.threads or max(1, cores // len(devices))
        return cls(jobs or len(devices) // ranks, ranks, threads, devices)

    def environment(self, slot: int) -> dict[str, str]:
        return environment_of_run(self.devices[slot * self.ranks : (slot + 1) * self.ranks], self.threads)

    def command(self, folder: Path) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        return [sys.executable, *(torchrun if self.ranks > 1 else []), "-m", "train", "--resume", str(folder)]


def default_ranks(config: Config, devices: int) -> int:
    """Returns the most ranks that can share an optimizer step; 1 for a model from scratch."""
    return sharing_ranks(config, devices)[-1] if config.model.model else 1


@contextmanager
def open_grid(out: Path, cells: dict[str, Config], jobs: int | None, ranks: int | None) -> Iterator["Grid"]:
    """Locks the folder of a grid and writes the configuration of each run that is not finished.

    Raises:
        BadSetting: the folder cannot be written, is a run's or holds a grid with other settings, or `jobs` and `ranks`
            do not fit the machine.
    """
    if is_torchrun():
        raise BadSetting("this command starts torchrun itself, for each run with --ranks above 1")
    configs = list(cells.values())
    share = Share.of_machine(configs[0], jobs, ranks)
    seeds = configs[0].run.seeds
    grid = Grid(share, [make_cell(out, name, cells[name], seed, share) for seed in seeds for name in cells])
    try:
        if (out / CONFIG).exists():
            raise BadSetting(f"--out must be a new folder or a grid's, got {str(out)!r}, which is a run's")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(f"--out must be a folder to write in, got {str(out)!r}: {error.strerror}") from error
    with claim(out):
        check_same(out, grid.cells)
        for cell in grid.cells:
            if not cell.is_finished:
                write_config(cell.config, cell.folder)
        yield grid


def make_cell(out: Path, name: str, config: Config, seed: int, share: Share) -> Cell:
    folder = out / name / f"seed-{seed}"
    own = config.change(seeds=(seed,), threads=share.threads, output=str(folder))
    return Cell(f"{name}, seed {seed}", folder, own, None if config.model.model else warm_start_path(config, seed))


def holds_run(folder: Path) -> bool:
    """Returns whether a run in this folder has a checkpoint, or is finished: kept runs have no checkpoints."""
    if has_begun(folder):
        return True
    return (folder / CONFIG).exists() and is_finished(Config.load(folder / CONFIG), read_whole(folder))


def check_same(out: Path, cells: list[Cell]) -> None:
    """Raises BadSetting if a run that has begun in the folder has other settings than this grid, which it must keep.

    Runs of other cells and seeds may be there, which differ in the credit and the seed alone.
    """
    own, any_cell = {cell.folder: cell.config for cell in cells}, cells[0].config
    of_cells = [name for name in any_cell.flat() if name.startswith(PREFIX)] + ["seeds"]
    texts: dict[str, None] = {}
    for folder in filter(holds_run, sorted(out.glob("*/seed-*"))):
        but = MAY_DIFFER if folder in own else [*MAY_DIFFER, *of_cells]
        texts |= dict.fromkeys(differences(Config.load(folder / CONFIG), own.get(folder, any_cell), but))
    if texts:
        raise BadSetting(f"--out {str(out)!r} holds a grid with other settings: {'; '.join(texts)}")


class Grid:
    """The runs of a grid, seed by seed, so that pairs of cells are complete early."""

    def __init__(self, share: Share, cells: list[Cell]):
        self.share, self.cells = share, cells

    def run(self) -> None:
        """Runs what is not finished, `jobs` at a time; if a run fails, stops the others with a checkpoint.

        They also stop when this process is stopped or killed: each watches its standard input, a pipe from here.

        Raises:
            RunError, BadSetting: a run failed; the message is the run's.
        """
        waiting = [cell for cell in self.cells if not cell.is_finished]
        total, jobs = len(self.cells), self.share.jobs
        say(f"{total} runs, {total - len(waiting)} of them finished; {min(jobs, len(waiting))} side by side")
        running: dict[int, tuple[Cell, subprocess.Popen, float]] = {}
        try:
            while waiting or running:
                for slot in set(range(jobs)) - set(running):
                    if cell := next_ready(waiting, [cell for cell, _, _ in running.values()]):
                        waiting.remove(cell)
                        running[slot] = (cell, self.start(cell, slot), time.time())
                time.sleep(0.2)
                for slot, (cell, process, began) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        process.stdin.close()
                        check_ended(cell, process.returncode)
                        self.tell(cell, total - len(waiting) - len(running), time.time() - began)
        finally:
            end([process for _, process, _ in running.values()])

    def start(self, cell: Cell, slot: int) -> subprocess.Popen:
        command, environment = self.share.command(cell.folder), self.share.environment(slot)
        with open(cell.log, "ab") as log:
            return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def tell(self, cell: Cell, done: int, seconds: float) -> None:
        rates = Evaluation.from_metrics(read_whole(cell.folder)[-1])
        say(f"[{done}/{len(self.cells)}] {cell.label}: {rates}, {seconds / 60:.1f} minutes")

    def finished(self) -> list[Run]:
        """Returns the runs with their results."""
        return read_runs([cell.folder for cell in self.cells])


def next_ready(waiting: list[Cell], running: list[Cell]) -> Cell | None:
    """Returns the first run that needs to wait for no warm start which another run is making."""
    being_made = [cell.warm_start for cell in running]
    for cell in waiting:
        start = cell.warm_start
        if start is None or start.exists() or start not in being_made:
            return cell
    return None


def check_ended(cell: Cell, status: int) -> None:
    """Raises RunError or BadSetting if a run failed, with the last line of its log."""
    if status == 0 and cell.is_finished:
        return
    lines = cell.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    kind = BadSetting if status == 2 else RunError
    raise kind(f"the run of {cell.label} ended with status {status}: {last}; its log is {cell.log}")
