"""Where a benchmark ran and what is kept of it; how it measures is in `rhythm_kernels.analysis.measure`."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

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
    "interleave",
    "interleave_long",
    "output_of",
    "progress",
    "ratio",
    "ratios",
    "says_when_interrupted",
    "write",
]

ROOT = Path(__file__).resolve().parent.parent
INTERRUPTED = 130  # the exit code of a program that SIGINT ended, as shells have it


def environment(device: torch.device = CPU) -> dict[str, str]:
    """Device, versions and commit, for the head of a result."""
    found = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()}
    if device.type == "cuda":
        found["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    else:
        found["threads"] = str(torch.get_num_threads())
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found | {"commit": commit_of(ROOT)}


def commit_of(root: Path) -> str:
    """The commit of a checkout, "-dirty" where files differ from it; without .git, what COMMIT holds; or "unknown"."""
    if not (root / ".git").exists():  # git would answer for a repository around it
        file = root / "COMMIT"
        return file.read_text().strip() if file.exists() else "unknown"
    git = ("git", "-C", str(root))
    commit = output_of(*git, "rev-parse", "--short", "HEAD") or "unknown"
    # results are written while others are still measured
    changed = output_of(*git, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{commit}-dirty" if changed else commit


def output_of(*command: str) -> str:
    """Of a command; empty if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.processor()}, {len(names) or '?'} cores seen"


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
    """Nanoseconds; None without such results."""
    path = Path(f"{out}.json")
    return path.stat().st_mtime_ns if out is not None and path.exists() else None


def write(out: Path, text: str, data: dict) -> None:
    """OUT.md and OUT.json, each whole or not at all: a run that is stopped leaves the last ones."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".md", text), (".json", json.dumps(data, indent=1) + "\n")):
        path = Path(f"{out}{suffix}")
        unfinished = Path(f"{path}.unfinished")
        unfinished.write_text(content)
        unfinished.replace(path)
