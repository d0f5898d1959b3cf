"""Keeps the report of `gpu_suite.py`: one record of all steps, which grows over several calls and machines.

A report has at most eight files in one folder: gpu-<device>.json, .md and .log, and the pictures of benchmarks.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_run import Outcome
from benchmarks.measure import fold, heading, markdown_table, write
from rhythm_kernels.analysis.environment import UNKNOWN
from rhythm_kernels.files import write_whole

SECTION = re.compile(r"^==== (\S+): (?:passed|failed|out of time|left out) ====$", re.MULTILINE)


class Done(NamedTuple):
    """A step that ran, with what its benchmark wrote, even if it ran out of time."""

    name: str
    status: str
    seconds: float
    tail: str
    text: str | None = None
    """The benchmark's report in Markdown."""
    data: dict | None = None
    picture: str | None = None
    """The name of a file beside the report."""


class Report:
    """The steps that ran on one device, with one set of versions and one commit."""

    def __init__(self, where: dict[str, str]):
        self.where = where
        self.done: dict[str, Done] = {}
        self.left_out: dict[str, list[str]] = {}
        """The packages that are missing, by test files that cannot be imported without them."""
        self.logs: dict[str, str] = {}

    @property
    def name(self) -> str:
        return "gpu-" + re.sub(r"[^a-z0-9]+", "-", self.where["device"].lower()).strip("-")

    def add(self, outcome: Outcome, folder: Path, out: Path) -> None:
        """Adds a step's outcome and what it wrote into `folder`. Its picture goes to `out`.

        A step that ran before is not replaced by one for which there was no time or nothing to run it with.
        """
        if not ran(outcome) and outcome.name in self.done:
            return
        written = folder / f"{outcome.name}.json"
        text = data = picture = None
        if written.exists():
            text, data = written.with_suffix(".md").read_text().strip(), json.loads(written.read_text())
        if written.with_suffix(".png").exists():
            picture = f"{self.name}-{outcome.name}.png"
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(written.with_suffix(".png"), out / picture)
        self.done[outcome.name] = Done(*outcome[:4], text, data, picture)
        self.logs[outcome.name] = f"==== {outcome.name}: {outcome.status} ====\n{outcome.log}\n"

    def take(self, other: "Report", source: Path, out: Path) -> None:
        """Adds the steps of another report, which replace those of the same name.

        Raises: ValueError for a report of another device, of other versions or of another commit, and for one that no
            commit names: of changes, or without .git and COMMIT.
        """
        for key in sorted(self.where.keys() | other.where.keys()):
            mine, theirs = self.where.get(key), other.where.get(key)
            if mine != theirs:
                raise ValueError(f"reports must be of one {key}, got {theirs!r} in {source} beside {mine!r}")
        commit = other.where.get("commit", "")
        if commit.endswith("-dirty") or commit == UNKNOWN:
            raise ValueError(f"reports must be of one commit, got {commit} in {source}, which may be of other files")
        newer = [name for name, done in other.done.items() if ran(done) or name not in self.done]
        self.done |= {name: other.done[name] for name in newer}
        self.logs |= {name: other.logs[name] for name in newer if name in other.logs}
        self.left_out |= other.left_out
        if source.resolve() != out.resolve():
            for done in other.done.values():
                if done.picture is not None:
                    out.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / done.picture, out / done.picture)

    def save(self, out: Path) -> None:
        """Writes the three files, each whole or not at all."""
        steps = [done._asdict() for done in self.done.values()]
        data = {"where": self.where, "steps": steps, "left_out_tests": self.left_out}
        write(out / self.name, markdown(self), data)
        write_whole(out / f"{self.name}.log", "".join(self.logs.values()))


def ran(step: Outcome | Done) -> bool:
    return step.seconds > 0


def load(folder: Path) -> Report | None:
    """Returns the report in a folder, or None if there is none.

    Raises: ValueError if there are several.
    """
    files = sorted(folder.glob("gpu-*.json"))
    if not files:
        return None
    if len(files) > 1:
        raise ValueError(f"a folder must hold the report of one device, got {', '.join(x.name for x in files)}")
    data = json.loads(files[0].read_text())
    report = Report(data["where"])
    report.done = {step["name"]: Done(**step) for step in data["steps"]}
    report.left_out = data["left_out_tests"]
    log = files[0].with_suffix(".log")
    text = log.read_text() if log.exists() else ""
    begins = [*SECTION.finditer(text)]
    ends = [*(begin.start() for begin in begins[1:]), len(text)]
    report.logs = {begin[1]: text[begin.start() : end] for begin, end in zip(begins, ends, strict=True)}
    return report


# ---- the text --------------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """Returns the text of all steps so far."""
    done = report.done.values()
    steps = markdown_table(["step", "", "seconds"], [[x.name, x.status, f"{x.seconds:.0f}"] for x in done])
    lines = [heading(report.where), "", steps]
    if report.left_out:
        lines += ["", "Test files that could not run:", ""]
        lines += [f"- {name}: {', '.join(missing)} not installed" for name, missing in report.left_out.items()]
    for x in done:
        if x.text is not None:
            lines += ["", f"## {x.name}", "", x.text]
        if x.picture is not None:
            lines += ["", f"![{x.name}]({x.picture})"]
    results = {x.name: x.data for x in done if x.data is not None}
    tables = rows_with_work(results)
    if "ceilings" in results and tables:
        lines += [
            "",
            "The floor is the longest of the times for products, exponentials and bytes at the ceilings above.",
        ]
        for rows in tables:
            lines += ["", floors(rows, results["ceilings"])]
    for x in done:
        if x.status == "passed" and "tests" in x.name:
            lines += ["", f"{x.name}: {(x.tail.splitlines() or ['no output'])[-1].strip('= ')}"]
        elif x.status != "passed":
            lines += ["", f"## {x.name}: {x.status}", "", "```", x.tail, "```"]
    return fold("\n".join(lines) + "\n")


def rows_with_work(results: dict[str, dict]) -> list[dict[str, dict]]:
    """Returns the rows of each benchmark that counts the work of its variants, by their size or shape."""
    tables = []
    for name, result in results.items():
        if name.startswith("attention"):
            tables.append({f"{int(n):,}": row for n, row in result.get("tokens", {}).items()})
        elif name == "selection":
            tables.append(result.get("shapes", {}))
    return [rows for rows in tables if rows]


def floors(rows: dict[str, dict], ceilings: dict[str, float]) -> str:
    """Returns a table of the fraction of its floor that each variant reaches, by the time inside its kernels."""
    lines = []
    for name in sorted({name for row in rows.values() for name in row["work"]}):
        cells = []
        for row in rows.values():
            m = row["measured"].get(name)
            cells.append("" if m is None else _share(floor_seconds(row["work"][name], ceilings), m))
        lines.append([name, *cells])
    return markdown_table(["fraction of the floor", *rows], lines)


def floor_seconds(work: dict[str, int], ceilings: dict[str, float]) -> float:
    """Returns the longest of the times for products, exponentials and memory, each at its measured ceiling."""
    return max(amount / ceilings[name] for name, amount in work.items())


def _share(floor: float, measured: dict) -> str:
    return f"{floor / (measured['kernel_seconds'] or measured['seconds']):.0%}"
