"""Where the time of a forward goes on a GPU: `python -m benchmarks.forward --trace`.

Each variant runs under torch's profiler, without a head start, so that a device that waits for the host shows as idle.
A fill of one number is launched right before each call. It is the first kernel, and the gap behind it is what the host
does before the call's own first launch. On a CPU the outermost operators of torch stand for kernels.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.measure import markdown_table

RUNS = 3
MOST_KERNELS, MOST_GAPS = 10, 3
LONGEST_NAME = 90


class Kernel(NamedTuple):
    """A kernel or a copy on the device."""

    name: str
    begin: float
    """Seconds."""
    end: float


class Trace(NamedTuple):
    """One run of a variant."""

    kernels: list[Kernel]
    """In the order in which they begin."""
    host_seconds: float
    """The time until the call returned to the host, which then waits for the device."""

    @property
    def seconds(self) -> float:
        """The time inside kernels; two that run at the same time count twice."""
        return sum(kernel.end - kernel.begin for kernel in self.kernels)

    @property
    def first_to_last(self) -> float:
        """The time from the begin of the first kernel to the end of the last."""
        if not self.kernels:
            return 0.0
        return max(kernel.end for kernel in self.kernels) - self.kernels[0].begin

    def gaps(self) -> list[tuple[float, Kernel, Kernel]]:
        """Returns the times in which no kernel runs, each with the kernels before and behind it, the longest first."""
        gaps, latest = [], None
        for kernel in self.kernels:
            if latest is not None and kernel.begin > latest.end:
                gaps.append((kernel.begin - latest.end, latest, kernel))
            if latest is None or kernel.end > latest.end:
                latest = kernel
        return sorted(gaps, key=lambda gap: -gap[0])

    def by_name(self) -> dict[str, tuple[float, int]]:
        """Returns the seconds and the number of runs of the kernels of each name."""
        sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for name, begin, end in self.kernels:
            seconds, count = sums[name]
            sums[name] = seconds + end - begin, count + 1
        return dict(sums)


def trace(run: Callable[[], object], device: torch.device) -> Trace:
    """Returns the trace of the run that took the median time from its first kernel to its last; one run warms up."""
    run()
    traces = sorted((_trace(run, device) for _ in range(RUNS)), key=lambda trace: trace.first_to_last)
    return traces[RUNS // 2]


def _trace(run: Callable[[], object], device: torch.device) -> Trace:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu, mark = device.type == "cuda", torch.zeros(1, device=device)
    if on_gpu:
        torch.cuda.synchronize(device)
    # recording the host's operators too would slow the host down
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        mark.zero_()
        begin = time.perf_counter()
        run()
        host_seconds = time.perf_counter() - begin
        if on_gpu:
            torch.cuda.synchronize(device)
    kernels = [
        Kernel(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiled.events()
        if not event.is_user_annotation
        and (event.device_type == DeviceType.CUDA if on_gpu else event.cpu_parent is None)
    ]
    return Trace(sorted(kernels, key=lambda kernel: kernel.begin), host_seconds)


def report(traces: dict[str, Trace]) -> str:
    """Returns the times of all variants, the longest gaps of each, and its kernels that take longer than in `plain`."""
    rows = []
    for name, one in traces.items():
        idle = sum(seconds for seconds, *_ in one.gaps())
        times = one.seconds, one.first_to_last, idle, one.host_seconds
        rows.append([name, str(len(one.kernels)), *map(_ms, times)])
    header = [
        "",
        "kernels",
        "time inside kernels",
        "first to last kernel",
        "idle in between",
        "host, until the call returns",
    ]
    parts = [markdown_table(header, rows)]
    plain = traces["plain"].by_name()
    for name, one in traces.items():
        gaps = [
            f"- {_ms(seconds)} between {_short(before.name)} and {_short(after.name)}"
            for seconds, before, after in one.gaps()[:MOST_GAPS]
        ]
        parts.append("\n".join([f"{name}, the longest gaps:", "", *(gaps or ["- none"])]))
        if name == "plain":
            continue
        more = []
        for kernel, (seconds, count) in one.by_name().items():
            plain_seconds, plain_count = plain.get(kernel, (0.0, 0))
            more.append((seconds - plain_seconds, count - plain_count, kernel))
        more = sorted((x for x in more if x[0] > 0), reverse=True)[:MOST_KERNELS]
        table = [[_short(kernel), _ms(seconds), f"{count:+d}"] for seconds, count, kernel in more]
        parts.append(f"{name}, beyond plain:\n\n{markdown_table(['kernel', 'time', 'runs'], table)}")
    return "\n\n".join(parts) + "\n"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _short(name: str) -> str:
    """Returns a kernel's name without line breaks and column borders, cut where templates make it long."""
    name = " ".join(name.replace("|", "/").split())
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
