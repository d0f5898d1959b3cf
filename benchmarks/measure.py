"""How every benchmark here measures: interleaved variants, medians, peak extra memory, and where it ran."""

import ctypes
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm


class Measured(NamedTuple):
    seconds: float
    """Median over the rounds."""
    spread: tuple[float, float]
    """Smallest and largest, seconds."""
    extra_bytes: int
    """Peak memory above what was held before the call; on a CPU from the resident set, so to a few pages."""


def interleave(variants: dict[str, Callable[[], object]], rounds: int, label: str) -> dict[str, Measured]:
    """Runs the variants in turn, `rounds` times after one warm-up, so that a drifting machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    extra: dict[str, list[int]] = {name: [] for name in variants}
    for i in tqdm(range(rounds + 1), desc=label, leave=False):
        for name, run in variants.items():
            gc.collect()
            before = _reset_peak()
            begin = time.perf_counter()
            result = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - begin
            if i > 0:
                seconds[name].append(elapsed)
                extra[name].append(_peak() - before)
            del result
    return {
        name: Measured(statistics.median(taken), (min(taken), max(taken)), int(statistics.median(extra[name])))
        for name, taken in seconds.items()
    }


def environment() -> dict[str, str]:
    """Device, versions and commit, for the head of a result."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.processor()}, {len(names) or '?'} cores seen"


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL("libc.so.6")


def _reset_peak() -> int:
    """Bytes held now; the peak counts from here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    _libc().malloc_trim(0)  # what was freed must not hide what is allocated next
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set (Linux)
    return _resident("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")
