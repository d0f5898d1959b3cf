"""Compares strategies of credit over seeds, from the command line.

    python -m train.compare --out OUT [--preset NAME] [--seeds N ...] [--cells NAME ...] [--jobs N] [flags]
    python -m train.compare RUN [RUN ...] [--out OUT] [--keep FOLDER]

The first form runs a grid: a run of one seed for each cell and seed, side by side. A cell is a strategy, or an ablation
of the paper's Table 5. Other flags are those of python -m train, and hold for all runs. Where runs in OUT were stopped,
the same command goes on with them. The second form reads finished runs: run folders, or folders of such.

Both write report.md, report.json and figures to OUT: the paper's Tables 3 to 5 and Figures 4 to 7, with intervals.
"""

import argparse
import os
import sys
from pathlib import Path

# Set before torch starts its thread pools: waiting threads must not spin on cores that the other runs need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rhythm_kernels.options import STRATEGIES
from train.command import run
from train.compare.cells import CELLS, OF_CELLS, choose_cells
from train.config import BadSetting, Config
from train.flags import add_flags
from train.presets import PRESETS

PROGRAM = "python -m train.compare"


def main(arguments: list[str] | None = None) -> int:
    return run(PROGRAM, lambda: compare(arguments), when_stopped="; the same command goes on with it")


def compare(arguments: list[str] | None) -> int:
    given = vars(build_parser().parse_args(arguments))
    places, out = given.pop("places"), given.pop("out", None)
    if places:
        return compare_finished([Path(place) for place in places], out, given)
    if "keep" in given:
        raise BadSetting("--keep is for finished runs: name them as RUN")
    if not out:
        raise BadSetting("--out must name the folder of the grid, or RUN finished runs to read")
    names, jobs, ranks = given.pop("cells", STRATEGIES), given.pop("jobs", None), given.pop("ranks", None)
    cells = choose_cells(given.pop("preset", PRESETS[0]), names, given)
    from train.compare.grid import open_grid  # torch and transformers load here, after the flags have been checked
    from train.compare.report import write_report

    with open_grid(Path(out), cells, jobs, ranks) as grid:
        grid.run()
        write_report(grid.finished(), Path(out))
    return 0


def compare_finished(places: list[Path], out: str | None, given: dict[str, str]) -> int:
    peak_weight, kept = given.pop("peak_weight", None), given.pop("keep", None)
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise BadSetting(f"finished runs are read as they are, but also got {flags}")
    for name, value in (("--out", out), ("--keep", kept)):
        if value == "":
            raise BadSetting(f"{name} must name a folder, got ''")
    if out is None and len(places) > 1:
        raise BadSetting("--out must name a folder for the report where several are read")
    from train.compare.report import write_report
    from train.compare.runs import find_runs, keep

    runs = find_runs(places)
    if kept is not None:
        keep(runs, Path(kept))
    weight = None if peak_weight is None else Config().change(peak_weight=peak_weight).run.peak_weight
    write_report(runs, Path(out or places[0]), weight)
    return 0


def build_parser() -> argparse.ArgumentParser:
    first, usage, rest = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="\n       ".join(line.strip() for line in usage.splitlines()),
        description=f"{first}\n\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "places", metavar="RUN", nargs="*", default=[], help="a finished run, or a folder of finished runs"
    )
    parser.add_argument("--out", metavar="OUT", help="folder of the grid and of the report; by default the one RUN")
    text = "folder to keep what a report reads of each RUN in, from which they can be compared again"
    parser.add_argument("--keep", metavar="FOLDER", help=text)
    parser.add_argument("--preset", help=f"settings of all runs: a preset of python -m train [{PRESETS[0]}]")
    text = f"what is compared, among {', '.join(CELLS)} [the strategies]"
    parser.add_argument("--cells", nargs="+", metavar="NAME", help=text)
    parser.add_argument("--jobs", type=int, help="runs side by side; by default as many as the cores or GPUs allow")
    text = "GPUs of a run, by torchrun; by default one, and for a named model as many as there are and share its batch"
    parser.add_argument("--ranks", type=int, help=text)
    add_flags(parser, [name for name in Config().flat() if name not in (*OF_CELLS, "output")])
    return parser


if __name__ == "__main__":
    sys.exit(main())
