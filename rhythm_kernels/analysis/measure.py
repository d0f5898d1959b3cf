"""Measures time and memory: interleaved variants, medians over rounds, peak extra memory."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

CPU = torch.device("cpu")
FEWEST_ROUNDS = 3  # rounds that are timed even after the time limit
HEAD_START = 1e-3  # seconds
CYCLES_PER_SECOND = 2e9  # of a GPU's clock, at most: a slower one gives a longer head start
TRACED_RUNS = 3


class Measured(NamedTuple):
    """The measurements of one variant."""

    seconds: float
    """The median over the rounds: wall time on a CPU, time between two events on a GPU."""
    samples: tuple[float, ...]
    """The seconds of each round."""
    extra_bytes: int
    """The peak memory above what was held before the call, its results included."""
    kernel_seconds: float | None = None
    """On a GPU the time inside kernels and copies alone, the median of a few runs; None without a trace."""


def ratios(above: Measured, below: Measured) -> list[float]:
    """Returns one variant's time over another's in each round."""
    return [a / b for a, b in zip(above.samples, below.samples, strict=True)]


def ratio(above: Measured, below: Measured) -> float:
    """Returns the median of `ratios`."""
    return statistics.median(ratios(above, below))


def interleave(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    label: str,
    device: torch.device = CPU,
    limit: float = float("inf"),
    after_round: Callable[[dict[str, Measured]], object] | None = None,
    head_start: float = HEAD_START,
) -> dict[str, Measured]:
    """Runs the variants in turn in each round, so that a machine that drifts slows all of them alike.

    Two untimed rounds come first: they warm up, and the smaller of their two memory peaks is reported. On a GPU each
    timed run finds an L2 cache full of other data; on a CPU the caches hold what the variant before it left.

    Args:
        variants: the functions to measure, by name.
        rounds: the largest number of timed rounds.
        label: names the progress bar.
        limit: seconds after which no further round starts, once `FEWEST_ROUNDS` are timed.
        after_round: is called after each timed round with the measurements so far, without `kernel_seconds`.
        head_start: seconds for which a GPU waits before its clock starts, while the host queues the first launches of
            a run. It must be longer than the time by which the device would otherwise be ahead of the host.

    Raises:
        ValueError: `head_start` is negative, or longer than a GPU can be made to wait.
    """
    cycles_of(head_start)
    extra: dict[str, list[int]] = {name: [] for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    begin = time.perf_counter()
    gc.collect()
    gc.freeze()  # collections between the runs then only look at objects that the runs left
    try:
        for i in progress(range(-2, rounds), label):
            if i >= FEWEST_ROUNDS and time.perf_counter() - begin > limit:
                break
            for name, run in variants.items():
                gc.collect()
                if i < 0:
                    extra[name].append(extra_bytes(run, device))
                else:
                    seconds[name].append(_time(run, device, head_start))
            if i >= 0 and after_round is not None:
                after_round(_summed_up(seconds, extra, min))
    finally:
        gc.unfreeze()
    measured = _summed_up(seconds, extra, min)
    if device.type != "cuda":
        return measured
    return {name: m._replace(kernel_seconds=_kernel_seconds(variants[name], device)) for name, m in measured.items()}


def interleave_long(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    label: str,
    device: torch.device = CPU,
    after_round: Callable[[dict[str, Measured]], object] | None = None,
) -> dict[str, Measured]:
    """Like `interleave`, for runs of minutes: without warm-up, and with time and memory from the same runs."""
    extra: dict[str, list[int]] = {name: [] for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in progress(range(rounds), label):
        for name, run in variants.items():
            gc.collect()
            extra[name].append(extra_bytes(lambda run=run, name=name: seconds[name].append(_time(run, device)), device))
        if after_round is not None:
            after_round(_summed_up(seconds, extra, statistics.median))
    return _summed_up(seconds, extra, statistics.median)


def _summed_up(
    seconds: dict[str, list[float]], extra: dict[str, list[int]], memory_of: Callable[[list[int]], float]
) -> dict[str, Measured]:
    return {
        name: Measured(statistics.median(samples), tuple(samples), int(memory_of(extra[name])))
        for name, samples in seconds.items()
    }


def cycles_of(head_start: float) -> int:
    """Returns the clock cycles of a head start in seconds.

    Raises:
        ValueError: it is negative, or takes more cycles than torch.cuda._sleep counts.
    """
    cycles = head_start * CYCLES_PER_SECOND
    if not 0 <= cycles < 2**31:
        most = (2**31 - 1) / CYCLES_PER_SECOND
        raise ValueError(f"head_start must be between 0 and {most:.2f} seconds, got {head_start}")
    return int(cycles)


def _time(run: Callable[[], object], device: torch.device, head_start: float = HEAD_START) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        _l2_sized_buffer(device).zero_()
        torch.cuda._sleep(cycles_of(head_start))
        first.record()
        run()
        last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def _kernel_seconds(run: Callable[[], object], device: torch.device) -> float | None:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    totals = []
    for _ in range(TRACED_RUNS):
        _l2_sized_buffer(device).zero_()
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            run()
            torch.cuda.synchronize(device)
        on_device = (e for e in trace.key_averages() if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
        totals.append(sum(event.self_device_time_total for event in on_device) / 1e6)
    return statistics.median(totals) or None


@cache
def _l2_sized_buffer(device: torch.device) -> torch.Tensor:
    """Returns a buffer of twice the size of the L2 cache: writing it evicts what a run left there."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.int8, device=device)


def progress(items: Iterable, label: str) -> Iterable:
    """Returns the items with a progress bar, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=label, leave=False)


# ---- memory ----------------------------------------------------------------------------------------------------------


def available_bytes(device: torch.device) -> int:
    """Returns the bytes that can still be allocated, on a CPU within the memory limit of a container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = _field(Path("/proc/meminfo"), "MemAvailable")
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Returns the peak memory of one call above what was held before it; on a CPU that of the resident set."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    _libc().malloc_trim(0)  # otherwise freed memory would hide the next allocations
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set, on Linux
    status = Path("/proc/self/status")
    before = _field(status, "VmRSS")
    run()
    return _field(status, "VmHWM") - before


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL("libc.so.6")


def _field(path: Path, name: str) -> int:
    """Returns the bytes of a line "name: 123 kB"."""
    for line in path.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{path} has no {name}")
