"""Reads finished runs, refuses those that cannot be compared, and keeps what a comparison reads of them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rhythm_kernels.files import write_whole
from rhythm_kernels.options import PREFIX
from train.compare.cells import name_cells
from train.config import BadSetting, Config, flag_name
from train.launch import CONFIG, write_config
from train.metrics import FILE, is_evaluation, whole_lines
from train.solve_rates import Evaluation, SolveRate

STEP_METRICS = {
    "reward": "reward",
    "length": "completions/mean_length",
    "cut_off": "completions/clipped_ratio",
}
"""Names what a comparison reads of each step of the training, by its own name: the name in the metrics."""


LIMITS = {"reward": (None, None), "length": (0, None), "cut_off": (0, 1)}
LARGEST = 1e12  # a number beyond it is none of a run
ROUNDING = 1e-9


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


def find_runs(places: Sequence[Path]) -> list[Run]:
    """Returns the finished runs in these folders, each of which is a run or holds runs or grids.

    Raises:
        BadSetting: a folder holds none, or `read_runs` refuses one.
    """
    folders: list[Path] = []
    for place in places:
        runs = [*_runs_in(place, set())]
        if not runs:
            raise BadSetting(f"RUN must be a finished run or a folder of such, got {str(place)!r}, which holds none")
        folders += runs
    return read_runs(folders)


def _runs_in(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yields the runs of one seed in a folder, however deep; `seen` are the folders that were looked at."""
    if folder.resolve() in seen or not folder.is_dir():
        return
    seen.add(folder.resolve())
    if (folder / CONFIG).is_file():
        if _is_model(folder / CONFIG):
            return
        if len(Config.load(folder / CONFIG).run.seeds) == 1:  # another is around its seeds
            yield folder
            return
    for inner in sorted(folder.iterdir()):
        yield from _runs_in(inner, seen)


def _is_model(config: Path) -> bool:
    """Returns whether a file is the configuration of a model, whose name is that of a run's."""
    try:
        return "model_type" in json.loads(config.read_bytes())
    except (ValueError, TypeError, RecursionError):
        return False


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Returns the finished runs in these folders, which differ in the options of the credit and in the seed alone.

    A folder that is named twice is one run.

    Raises:
        BadSetting: a run is not finished, lacks a step or an evaluation, has metrics that are none, differs in another
            setting, or two runs have the same settings; the message names the run.
    """
    folders = [*{folder.resolve(): folder for folder in folders}.values()]
    configs = [Config.load(folder / CONFIG) for folder in folders]
    known = zip(name_cells(configs), folders, configs, strict=True)
    runs = [_read(cell, folder, config) for cell, folder, config in known]
    _check_settings(runs)
    _check_evaluations(runs)
    places: dict[tuple[str, int], Path] = {}
    for run in runs:
        if (other := places.setdefault((run.cell, run.seed), run.folder)) != run.folder:
            raise BadSetting(f"{run.folder} has the credit and the seed of {other}: {run.cell}, seed {run.seed}")
    return runs


def _read(cell: str, folder: Path, config: Config) -> Run:
    try:
        run = Run(cell, config.run.seeds[0], folder, config, read_whole(folder))
        if not is_finished(config, run.records):
            last = run.records[-1]["step"] if run.records else "none"
            raise BadSetting(
                f"{folder} must be a finished run, but has no evaluation after step {config.grpo.max_steps}; "
                f"the last step in its {FILE} is {last}. python -m train --resume {folder} continues it"
            )
        _check_numbers(run)
    except BadSetting:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise BadSetting(
            f"{folder / FILE} must hold the metrics of a run, got {type(error).__name__}: {error}"
        ) from error
    return run


def _check_numbers(run: Run) -> None:
    """Raises BadSetting if a step or an evaluation is lost or there twice, or a number cannot be one."""
    last, every = run.config.grpo.max_steps, run.config.run.eval_steps
    steps, evaluated = [line["step"] for line in run.steps], [step for step, _ in run.evaluations]
    due = [0, *(range(every, last, every) if every else ()), last]
    if steps != [*range(1, last + 1)] or evaluated != due:
        raise BadSetting(
            f"{run.folder} must have each of {last} steps once and evaluations after the steps {due}, "
            f"got {len(steps)} steps and evaluations after {evaluated}"
        )
    for step, evaluation in run.evaluations:
        for name, rate in evaluation.rates.items():
            if not _is_possible(rate):
                raise BadSetting(f"{run.folder} must have possible solve rates, got {rate!r} of {name} at step {step}")
    for line in run.steps:
        for key, (least, most) in LIMITS.items():
            name = STEP_METRICS[key]
            if not _is_number(line[name], least, most):
                raise BadSetting(f"{run.folder} must have a possible {name}, got {line[name]} at step {line['step']}")


def _is_possible(rate: SolveRate) -> bool:
    return (
        all(_is_number(count, least, kind=int) for count, least in ((rate.problems, 1), (rate.answers, 1)))
        and _is_number(rate.finished, 0, 1)
        and _is_number(rate.solved, 0, rate.finished + ROUNDING)  # an answer that is cut off earns nothing
        and _is_number(rate.standard_error, 0, 1)
        and _is_number(rate.errors, 0, rate.problems * rate.answers, kind=int)
    )


def _is_number(
    value: object, least: float | None = None, most: float | None = None, kind: type | tuple = (int, float)
) -> bool:
    if isinstance(value, bool) or not isinstance(value, kind) or not abs(value) <= LARGEST:
        return False
    return (least is None or value >= least) and (most is None or value <= most)


def keep(runs: Sequence[Run], out: Path) -> None:
    """Writes what a comparison reads of each run to out/CELL/seed-N, from where it can be compared again.

    That is its configuration, its evaluations and `STEP_METRICS`. What is there already stays. The configuration is
    written last: a folder without it, which a kill left behind, is written anew.

    Raises:
        BadSetting: `out` holds another run of this cell and seed, or cannot be written.
    """
    kept = ["step", *STEP_METRICS.values()]
    for run in runs:
        folder = out / run.cell / f"seed-{run.seed}"
        slim = [one if is_evaluation(one) else {name: one[name] for name in kept} for one in run.records]
        text = "".join(json.dumps(record) + "\n" for record in slim)
        try:
            if (folder / CONFIG).exists():
                there = Config.load(folder / CONFIG).settings(), (folder / FILE).read_text(encoding="utf-8")
                if there != (run.config.settings(), text):
                    raise BadSetting(
                        f"--keep must name a folder without another run of {run.cell}, seed {run.seed}, got {out}"
                    )
                continue
            write_whole(folder / FILE, text)
            write_config(run.config.change(output=""), folder)
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
    """Raises BadSetting for a run with other evaluation sets, or other numbers of problems, than the first."""
    for run in runs:
        for step, evaluation in run.evaluations:
            sets, first = (
                {name: (rate.problems, rate.answers) for name, rate in rates.items()}
                for rates in (evaluation.rates, runs[0].evaluations[0][1].rates)
            )
            if sets != first:
                raise BadSetting(
                    f"{run.folder} must have the problems and the answers to each of {runs[0].folder}, {first}, got "
                    f"{sets} at step {step}"
                )
