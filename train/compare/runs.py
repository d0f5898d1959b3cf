"""Reads finished runs, refuses those that cannot be compared, and keeps what a comparison reads of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rhythm_kernels.options import PREFIX
from train.compare.cells import name_cells
from train.config import BadSetting, Config, flag_name
from train.launch import CONFIG, write_config
from train.metrics import FILE, whole_lines
from train.solve_rates import Evaluation

STEP_METRICS = {
    "reward": "reward",
    "length": "completions/mean_length",
    "cut_off": "completions/clipped_ratio",
}
"""Names what a comparison reads of each step of the training, by its own name: the name in the metrics."""


class Run(NamedTuple):
    """A finished run of one seed."""

    cell: str
    seed: int
    folder: Path
    config: Config
    records: list[dict[str, float]]

    @property
    def evaluations(self) -> list[tuple[int, Evaluation]]:
        """The steps of the evaluations, and their solve rates."""
        return [(line["step"], Evaluation.from_metrics(line)) for line in self.records if is_evaluation(line)]

    @property
    def steps(self) -> list[dict[str, float]]:
        return [line for line in self.records if not is_evaluation(line)]


def is_evaluation(record: dict[str, float]) -> bool:
    return "reward" not in record


def find_runs(places: Sequence[Path]) -> list[Run]:
    """Returns the finished runs in these folders, each of which is a run or holds runs or grids.

    Raises:
        BadSetting: a folder holds none, or `read_runs` refuses one.
    """
    folders: list[Path] = []
    for place in places:
        around = [place, *sorted(place.glob("*")), *sorted(place.glob("*/seed-*"))]
        runs = [folder for folder in around if (folder / CONFIG).is_file()]
        runs = [folder for folder in runs if len(Config.load(folder / CONFIG).run.seeds) == 1]  # not those around seeds
        if not runs:
            raise BadSetting(f"RUN must be a finished run or a folder of such, got {str(place)!r}, which holds none")
        folders += runs
    return read_runs(folders)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Returns the finished runs in these folders, which differ in the options of the credit and in the seed alone.

    Raises:
        BadSetting: a run is not finished, lacks an evaluation that others have, differs in another setting, or two
            runs have the same settings; the message names the run.
    """
    configs = [Config.load(folder / CONFIG) for folder in folders]
    known = zip(name_cells(configs), folders, configs, strict=True)
    runs = [Run(cell, config.run.seeds[0], folder, config, read_whole(folder)) for cell, folder, config in known]
    for run in runs:
        if not is_finished(run.config, run.records):
            last = run.records[-1]["step"] if run.records else "none"
            raise BadSetting(
                f"{run.folder} must be a finished run, but has no evaluation after step {run.config.grpo.max_steps}; "
                f"the last step in its {FILE} is {last}. python -m train --resume {run.folder} continues it"
            )
    _check_settings(runs)
    _check_evaluations(runs)
    places: dict[tuple[str, int], Path] = {}
    for run in runs:
        if (other := places.setdefault((run.cell, run.seed), run.folder)) != run.folder:
            raise BadSetting(f"{run.folder} has the credit and the seed of {other}: {run.cell}, seed {run.seed}")
    return runs


def keep(runs: Sequence[Run], out: Path) -> None:
    """Writes what a comparison reads of each run to out/CELL/seed-N, from where it can be compared again.

    That is its configuration, its evaluations and `STEP_METRICS`. What is there already stays.

    Raises:
        BadSetting: `out` holds another run of this cell and seed, or cannot be written.
    """
    kept = ["step", *STEP_METRICS.values()]
    for run in runs:
        folder = out / run.cell / f"seed-{run.seed}"
        slim = [one if is_evaluation(one) else {name: one[name] for name in kept} for one in run.records]
        config, text = run.config.change(output=""), "".join(json.dumps(record) + "\n" for record in slim)
        try:
            if (folder / CONFIG).exists() and (Config.load(folder / CONFIG), (folder / FILE).read_text()) != (
                config,
                text,
            ):
                raise BadSetting(
                    f"--keep must name a folder without another run of {run.cell}, seed {run.seed}, got {out}"
                )
            write_config(config, folder)
            (folder / FILE).write_text(text, encoding="utf-8")
        except OSError as error:
            raise BadSetting(f"--keep must be a folder to write in, got {str(out)!r}: {error.strerror}") from error


def read_whole(folder: Path) -> list[dict[str, float]]:
    """Returns the records of a run; one that was torn when the run was killed, and what follows, is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: whole_lines(path, 2**31, len(data))].splitlines()]


def is_finished(config: Config, records: Sequence[dict[str, float]]) -> bool:
    """Returns whether a run has made all its steps and the evaluation after them."""
    last = config.grpo.max_steps
    after = [line for line in records if is_evaluation(line) and line["step"] == last]
    return bool(after) and (last > 0 or len(after) > 1)  # without steps the one before them has the same number


def _check_settings(runs: Sequence[Run]) -> None:
    """Raises BadSetting for a run that differs from the first in more than the credit and the seed."""
    first, *others = [{**run.config.settings(), "seeds": None} for run in runs]
    for run, settings in zip(runs[1:], others, strict=True):
        changed = [name for name in first if not name.startswith(PREFIX) and settings[name] != first[name]]
        if changed:
            texts = [f"{flag_name(name)} {settings[name]!r} there, {first[name]!r} in the other" for name in changed]
            raise BadSetting(
                f"{run.folder} differs from {runs[0].folder} in more than credit and seed: {'; '.join(texts)}"
            )


def _check_evaluations(runs: Sequence[Run]) -> None:
    """Raises BadSetting for a run that lacks an evaluation: a lost line of its metrics."""
    made = [{(step, name) for step, evaluation in run.evaluations for name in evaluation.rates} for run in runs]
    every = set().union(*made)
    for run, evaluations in zip(runs, made, strict=True):
        if missing := sorted(every - evaluations):
            texts = ", ".join(f"{name} at step {step}" for step, name in missing)
            raise BadSetting(f"{run.folder} lacks evaluations that other runs have: {texts}")
