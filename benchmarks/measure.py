"""The tools that all benchmarks share: flags, the environment, reports and their files.

Times and memory are measured by `rhythm_kernels.analysis.measure`. This module hands on its names, and those that say
where a benchmark ran.
"""

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rhythm_kernels.analysis.environment import commit_of, environment, heading, output_of
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
from rhythm_kernels.console import markdown_table
from rhythm_kernels.files import write_whole

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


# ---- reports ---------------------------------------------------------------------------------------------------------


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
        write_whole(file, text + "\n")


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
    write_whole(Path(f"{out}.md"), text)
    write_whole(Path(f"{out}.json"), json.dumps(data, indent=1) + "\n")
