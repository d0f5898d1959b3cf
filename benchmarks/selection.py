"""How long do selection and credit take, beside the same rule composed of torch ops?

    python -m benchmarks.selection [--shapes 32x8K packed] [--calls coupled] [--out benchmarks/results/selection-cpu]

The signals are fp32. WAAD (windowed average attention distance) is autocorrelated noise between 0 and 10 tokens, FAI
(future attention influence) is small and skewed. R begins after a prompt of an eighth of each sequence. Shapes (K is
1,024):

    1x8K, 32x8K, 512x1K, 8x128K    sequences x tokens
    uneven      32 sequences of 256 to 8,192 tokens, padded on the right to 8,192
    packed      the same sequences in one row, cut by cu_seqlens

Compared are the calls

    coupled     token_credit("coupled"), the credit of a training step
    local       token_credit("local")
    topq        segment_topq of FAI
    peaks       find_peaks of WAAD, min_quantile 0.5

on two backends. `extension` is one launch with a block (on a CPU: a thread) for each sequence. `torch` is the same rule
composed of torch ops, which runs where the extension is not built. torch ops know no packed sequences: `torch` pads
them and unpads the result, and its time of `packed` includes that.

Nothing is timed before a check: at every shape both backends, and on a GPU the extension on a CPU, must give the same
bits, and on a few hundred tokens also those of rhythm_kernels.reference. If they differ, the benchmark ends.

The goals are for the coupled credit of 32x8K. On a CPU it should be at least 5x as fast as torch. On a GPU it should
take at most 2 launches and 40 us, be at least 10x as fast as torch, and never let the host wait.

On a GPU the times are those between two CUDA events, with an L2 cache full of other data. Times in brackets are those
inside kernels alone. Launches are kernels and fills, with copies in brackets. The host waits where torch reports it.
GB/s is the rate for inputs read once and results written once, by the time inside kernels.

The table and the files are written after each shape. An interrupt (SIGINT) ends the run with exit code 130.

On a CPU that other work shares, set OMP_WAIT_POLICY=PASSIVE, as make does. Otherwise threads that spin for each other
can slow `torch` down tenfold, which flatters the extension.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    Measured,
    environment,
    heading,
    interleave,
    make_parser,
    markdown_table,
    median_and_range,
    publish,
    ratio,
    ratios,
    says_when_interrupted,
)
from rhythm_kernels import Rhythm, find_peaks, reference, segment_topq, token_credit

K = 1024
PROMPT_SHARE = 8  # the prompt is the first of so many equal parts of a sequence
TOP_FRACTION, MIN_QUANTILE = 0.4, 0.5
BACKENDS = ("extension", "torch")
HEADLINE = ("32x8K", "coupled")
GOALS = {"cpu": "at least 5x", "cuda": "at most 2 launches and 40 us, at least 10x, the host never waits"}


# ---- batches ---------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    lengths: list[int]
    """The number of tokens of each sequence."""
    packed: bool = False


def uneven_lengths(sequences: int, least: int, most: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(least, most + 1, (sequences - 1,), generator=generator).tolist() + [most]


UNEVEN = uneven_lengths(32, 256, 8 * K)
SHAPES = {
    "1x8K": Shape([8 * K]),
    "32x8K": Shape([8 * K] * 32),
    "512x1K": Shape([K] * 512),
    "8x128K": Shape([128 * K] * 8),
    "uneven": Shape(UNEVEN),
    "packed": Shape(UNEVEN, packed=True),
}
CHECKED_BY_REFERENCE = [300, 257, 8, 300]  # tokens


class Batch(NamedTuple):
    """Padded rows, or one packed row."""

    waad: Tensor
    """[B, T] fp32"""
    fai: Tensor
    """[B, T] fp32"""
    response_mask: Tensor
    """[B, T] bool"""
    cu_seqlens: Tensor | None = None
    """[S + 1] int32, the bounds of packed sequences"""

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x if x is None else x.to(device) for x in self))


def make_batch(shape: Shape) -> Batch:
    """Makes a batch on a CPU, the same in each call. Packed sequences have the signals of padded ones."""
    lengths = torch.tensor(shape.lengths)
    generator = torch.Generator().manual_seed(0)
    sequences, tokens, width = len(lengths), max(shape.lengths), 8
    noise = torch.randn(sequences, tokens + width - 1, generator=generator)
    noise = F.avg_pool1d(noise[:, None], width, 1)[:, 0] * width**0.5  # correlates neighbours, keeps the deviation 1
    waad = 10 * torch.sigmoid(noise - 1)
    fai = torch.exp(torch.randn(sequences, tokens, generator=generator) - 6)
    position = torch.arange(tokens)
    inside = position < lengths[:, None]
    response_mask = inside & (position >= lengths[:, None] // PROMPT_SHARE)
    no_future = position >= lengths[:, None] - 10  # no token looks back at a sequence's last tokens
    batch = Batch(waad.masked_fill(~response_mask, 0.0), fai.masked_fill(no_future, 0.0), response_mask)
    if not shape.packed:
        return batch
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    return Batch(*(x[inside][None] for x in batch[:3]), cu_seqlens)


# ---- calls -----------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    run: Callable[[Batch, str], Tensor]
    """Computes the result [B, T] of a batch on a backend."""
    expected: Callable[[Batch], Tensor]
    """Computes the result of a padded batch with the reference."""
    token_bytes: int
    """The bytes of a token: inputs read once and results written once."""


def credit(strategy: str) -> Call:
    def run(b: Batch, backend: str) -> Tensor:
        rhythm = Rhythm(waad=b.waad, fai=b.fai)
        return token_credit(
            strategy, b.response_mask, rhythm, top_fraction=TOP_FRACTION, cu_seqlens=b.cu_seqlens, backend=backend
        )

    def expected(b: Batch) -> Tensor:
        return reference.gamma(strategy, b.response_mask, b.waad, b.fai, top_fraction=TOP_FRACTION)

    signals = 2 if strategy == "coupled" else 1
    return Call(run, expected, 4 * signals + 1 + 4)


def topq(b: Batch, backend: str) -> Tensor:
    return segment_topq(b.fai, b.response_mask, TOP_FRACTION, cu_seqlens=b.cu_seqlens, backend=backend)


def peaks(b: Batch, backend: str) -> Tensor:
    return find_peaks(b.waad, b.response_mask, min_quantile=MIN_QUANTILE, cu_seqlens=b.cu_seqlens, backend=backend)


CALLS = {
    "coupled": credit("coupled"),
    "local": credit("local"),
    "topq": Call(topq, lambda b: reference.segment_topq(b.fai, b.response_mask, TOP_FRACTION), 4 + 1 + 1),
    "peaks": Call(peaks, lambda b: reference.find_peaks(b.waad, b.response_mask, MIN_QUANTILE), 4 + 1 + 1),
}


def variant(call: str, backend: str) -> str:
    return f"{call}, {backend}"


# ---- checks ----------------------------------------------------------------------------------------------------------


def check(what: str, got: Tensor, want: Tensor) -> None:
    """Ends the benchmark (SystemExit) unless two results are equal bit for bit."""
    got = got.to(want.device)
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        raise SystemExit(f"{what}: {got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}")
    if torch.equal(got, want):
        return
    different = (got != want).nonzero().tolist()  # NaN differs from itself, and is never right here
    row, token = different[0]
    values = f"{got[row, token].item()}, not {want[row, token].item()}"
    raise SystemExit(f"{what}: {len(different):,} tokens differ, first [{row}, {token}]: {values}: nothing is timed")


def check_by_reference(calls: list[str], device: torch.device) -> None:
    padded, packed = (make_batch(Shape(CHECKED_BY_REFERENCE, packed)) for packed in (False, True))
    inside = torch.arange(max(CHECKED_BY_REFERENCE)) < torch.tensor(CHECKED_BY_REFERENCE)[:, None]
    for name in calls:
        want = CALLS[name].expected(padded)
        for backend in BACKENDS:
            what = f"{variant(name, backend)}, and the reference"
            check(f"{what}, padded", CALLS[name].run(padded.to(device), backend), want)
            check(f"{what}, packed", CALLS[name].run(packed.to(device), backend), want[inside][None])


def check_backends(shape: str, calls: list[str], device: torch.device) -> None:
    on_cpu = make_batch(SHAPES[shape])
    batch = on_cpu.to(device)
    for name in calls:
        run = CALLS[name].run
        got = run(batch, "extension")
        check(f"{name} of {shape}, extension and torch", got, run(batch, "torch"))
        if device.type == "cuda":
            check(f"{name} of {shape}, extension on a GPU and on a CPU", got, run(on_cpu, "extension"))


# ---- launches and waits on a GPU -------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """The work of one call on a GPU."""

    launches: int
    """The number of kernels and fills."""
    copies: int
    host_waits: bool


def trace(run: Callable[[], Tensor], device: torch.device) -> Trace:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize(device)
    on_device = [e for e in profiled.key_averages() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    copies = sum(event.count for event in on_device if event.key.startswith("Memcpy"))
    return Trace(sum(event.count for event in on_device) - copies, copies, host_waits(run))


def host_waits(run: Callable[[], Tensor]) -> bool:
    """Says whether the host waits for the GPU in a call, as far as torch knows."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


# ---- a run -----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The results at one shape, by the names that `variant` gives."""

    measured: dict[str, Measured]
    traces: dict[str, Trace]
    """The traces of the variants; empty without a GPU."""
    work: dict[str, dict[str, int]]
    """The bytes that the extension's variants read and write."""


def measure(shape: str, calls: list[str], device: torch.device, rounds: int, limit: float) -> Row:
    batch = make_batch(SHAPES[shape]).to(device)
    runs = {
        variant(name, backend): lambda run=CALLS[name].run, backend=backend: run(batch, backend)
        for name in calls
        for backend in BACKENDS
    }
    return Row(
        measured=interleave(runs, rounds, shape, device, limit),
        traces={name: trace(run, device) for name, run in runs.items()} if device.type == "cuda" else {},
        work={variant(name, BACKENDS[0]): {"bytes": CALLS[name].token_bytes * batch.fai.numel()} for name in calls},
    )


# ---- the report ------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


def cells(row: Row, call: str) -> dict[str, str]:
    """Returns a line of the table, by column."""
    keys = [variant(call, backend) for backend in BACKENDS]
    ours, theirs = (row.measured[key] for key in keys)
    line = {
        "extension": times(ours),
        "torch": times(theirs),
        "torch / extension (least, most)": median_and_range(ratios(theirs, ours), 1),
        "peak extra memory": " / ".join(f"{m.extra_bytes / 2**20:,.1f}" for m in (ours, theirs)) + " MiB",
    }
    if row.traces:
        traces = [row.traces[key] for key in keys]
        rate = row.work[keys[0]]["bytes"] / (ours.kernel_seconds or ours.seconds)
        line["launches (copies)"] = " / ".join(f"{t.launches} ({t.copies})" for t in traces)
        line["host waits"] = " / ".join("yes" if t.host_waits else "no" for t in traces)
        line["extension, GB/s"] = f"{rate / 1e9:,.0f}"
    return line


def times(m: Measured) -> str:
    return duration(m.seconds) + (f" ({duration(m.kernel_seconds)})" if m.kernel_seconds else "")


def table(results: dict[str, Row], calls: list[str]) -> str:
    lines = [{"shape": shape, "call": call, **cells(row, call)} for shape, row in results.items() for call in calls]
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines])


def summary(results: dict[str, Row], device: torch.device) -> str:
    """Returns the result of `HEADLINE` and its goals; an empty text if it was not measured."""
    shape, call = HEADLINE
    keys = [variant(call, backend) for backend in BACKENDS]
    if shape not in results or keys[0] not in results[shape].measured:
        return ""
    ours, theirs = (results[shape].measured[key] for key in keys)
    parts = [duration(ours.seconds), f"{ratio(theirs, ours):.1f}x as fast as torch"]
    if results[shape].traces:
        t = results[shape].traces[keys[0]]
        waits = "waits" if t.host_waits else "does not wait"
        parts.append(f"launches {t.launches}, copies {t.copies}, the host {waits}")
    return f"\n{call} of {shape}: {', '.join(parts)}. Goal: {GOALS[device.type]}.\n"


def report(args: argparse.Namespace, device: torch.device, results: dict[str, Row]) -> str:
    """Returns the report, after writing it where `--out` asks for it."""
    where = environment(device)
    if device.type == "cpu":
        where["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "unset")
    rounds = f"medians of at most {args.rounds} interleaved rounds; results equal bit for bit"
    notes = "memory and the columns behind it: extension / torch; torch pads `packed`, and its time includes that"
    text = f"{heading(where)}\n\nfp32 signals; {rounds}; {notes}\n\n"
    text += f"{table(results, args.calls)}\n{summary(results, device)}"
    shapes = {
        shape: {
            **SHAPES[shape]._asdict(),
            "measured": {name: m._asdict() for name, m in row.measured.items()},
            "traces": {name: t._asdict() for name, t in row.traces.items()},
            "work": row.work,
        }
        for shape, row in results.items()
    }
    data = {**where, "top_fraction": TOP_FRACTION, "min_quantile": MIN_QUANTILE, "shapes": shapes}
    return publish(args.out, text, data)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS), help="default: all")
    parser.add_argument("--rounds", type=int, default=21, help="most timed rounds at each shape")
    parser.add_argument("--limit", type=float, default=25, help="seconds at each shape after which rounds stop")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well, after each shape")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = torch.device(args.device)
    results, text = {}, ""
    with says_when_interrupted(args.out):
        check_by_reference(args.calls, device)
        for shape in args.shapes:
            check_backends(shape, args.calls, device)
        for shape in args.shapes:
            results[shape] = measure(shape, args.calls, device, args.rounds, args.limit)
            text = report(args, device, results)
    print(text)


if __name__ == "__main__":
    main()
