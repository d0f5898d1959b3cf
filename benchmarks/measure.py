"""The tools that all benchmarks share: flags, the environment, reports and their files.

Times and memory are measured by `rhythm_kernels.analysis.measure`, whose names this module hands on.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import ROOT
from rhythm_kernels.analysis.measure import (
    CPU,
    FEWEST_ROUNDS,
    Measured,
    available_bytes,
    extra_bytes,
    interleave,
    interleave_long,
    progress,
    ratio,
    ratios,
)

__all__ = [
    "CPU",
    "FEWEST_ROUNDS",
    "Measured",
    "available_bytes",
    "commit_of",
    "environment",
    "extra_bytes",
    "fold",
    "heading",
    "interleave",
    "interleave_long",
    "make_parser",
    "markdown_table",
    "median_and_range",
    "output_of",
    "progress",
    "publish",
    "ratio",
    "ratios",
    "says_when_interrupted",
    "show",
    "write",
]

INTERRUPTED = 130  # the exit code of a program that SIGINT ended, as shells have it
COLUMNS = 120


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser that prints a module's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


# ---- where a benchmark runs ------------------------------------------------------------------------------------------


def environment(device: torch.device = CPU) -> dict[str, str]:
    """Returns device, versions and commit, for the head of a report."""
    where = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()}
    if device.type == "cuda":
        where["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    else:
        where["threads"] = str(torch.get_num_threads())
    where |= {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            where[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            where[package] = "absent"
    return where | {"commit": commit_of(ROOT)}


def commit_of(root: Path) -> str:
    """Returns the commit of a checkout, with "-dirty" where files differ from it.

    Without .git it returns what the file COMMIT holds, or else "unknown".
    """
    if not (root / ".git").exists():  # git would answer for a repository around it
        file = root / "COMMIT"
        return file.read_text().strip() if file.exists() else "unknown"
    git = ("git", "-C", str(root))
    commit = output_of(*git, "rev-parse", "--short", "HEAD") or "unknown"
    # results are written while others are still measured
    changed = output_of(*git, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{commit}-dirty" if changed else commit


def output_of(*command: str) -> str:
    """Returns what a command prints; an empty string if the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.processor()}, {len(names) or '?'} cores seen"


# ---- reports ---------------------------------------------------------------------------------------------------------


def heading(where: dict[str, str]) -> str:
    """Returns the first line of a report: where it was measured."""
    return ", ".join(f"{name} {value}" for name, value in where.items())


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([_table_row(head), "|---" * len(head) + "|", *map(_table_row, rows)])


def _table_row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def median_and_range(shares: Sequence[float], digits: int = 3) -> str:
    """Returns a cell of a table, "1.02x (0.98, 1.10)": the median, the least and the most."""
    median, least, most = (f"{x:.{digits}f}" for x in (statistics.median(shares), min(shares), max(shares)))
    return f"{median}x ({least}, {most})"


def fold(text: str) -> str:
    """Returns Markdown whose lines have at most 120 columns, outside of tables and fenced blocks."""
    lines, is_fenced = [], False
    for line in text.split("\n"):
        is_fenced ^= line.startswith("```")
        if len(line) <= COLUMNS or is_fenced or line.startswith("|"):
            lines.append(line)
            continue
        indent = "  " if line.startswith("- ") else ""
        lines += textwrap.wrap(line, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def publish(out: Path | None, text: str, data: dict) -> str:
    """Returns a report in folded lines, after writing it and its data to OUT.md and OUT.json if `out` is given."""
    text = fold(text)
    if out is not None:
        write(out, text, data)
    return text


def show(text: str, file: Path | None) -> None:
    """Prints a text, and writes it to a file if one is given."""
    print(text)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


@contextmanager
def says_when_interrupted(out: Path | None) -> Iterator[None]:
    """Turns an interrupt (SIGINT) in its block into one line and exit code 130.

    The line says whether results were written to `out` since the block began: a benchmark writes after each row.
    """
    before = _written_at(out)
    try:
        yield
    except KeyboardInterrupt:
        kept = f"{out}.md and {out}.json hold what was finished" if _written_at(out) != before else "nothing is kept"
        print(f"interrupted: {kept}", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None


def _written_at(out: Path | None) -> int | None:
    """Returns the time of the results in nanoseconds; None without results."""
    path = Path(f"{out}.json")
    return path.stat().st_mtime_ns if out is not None and path.exists() else None


def write(out: Path, text: str, data: dict) -> None:
    """Writes OUT.md and OUT.json, each whole or not at all: a run that is stopped leaves the last ones."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".md", text), (".json", json.dumps(data, indent=1) + "\n")):
        path = Path(f"{out}{suffix}")
        unfinished = Path(f"{path}.unfinished")
        unfinished.write_text(content)
        unfinished.replace(path)
