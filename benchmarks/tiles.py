"""Which tiles of the Triton kernels are fastest on this GPU?

    python -m benchmarks.tiles [--passes rows forward band groups] [--tokens 8192] [--out OUT]
    python -m benchmarks.tiles --try rows=128,128,8,2 band=64,16,4,2,128    # these alone, beside the table's own

Each pass runs by itself with the tile of the table (triton_tiles.py) and with each of the others:

    rows        the forward pass without v: log-sum-exp and span from every key
    known       the same with a given log-sum-exp: span alone
    sampled     span from 512 rows, with a given log-sum-exp
    forward     the forward pass with v
    band        WAAD and FAI of each head, from the log-sum-exp
    groups      WAAD summed over 30 % of the heads, FAI over another 30 %

A tile whose results differ from those of the table's tile by more than `EXACT` (outputs: `ROUNDED`) of the largest
value, or that does not compile or run, is left out, with the reason; if it is the table's own, so is its pass. Times
are medians of interleaved rounds, with an L2 cache full of other data. `rate` counts the products of visible scores, or
for the band the bytes of q, k, and three values a row. Kernels compile in several processes first. `python -m
benchmarks.kernels --try` tells a tile's registers.

    ncu --clock-control none -k regex:_kernel python -m benchmarks.tiles --once     # the table's tiles, for a profiler
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.attention import DTYPES, EXACT, ROUNDED
from benchmarks.attention_report import one_line
from benchmarks.attention_variants import OPTIONS, SPAN_ROWS, Problem, Shape, make_problem, work
from benchmarks.kernels import parse_tile
from benchmarks.measure import (
    Measured,
    environment,
    heading,
    interleave,
    make_parser,
    markdown_table,
    median_and_range,
    publish,
    ratios,
    says_when_interrupted,
)
from rhythm_kernels.statistics.options import check_options
from rhythm_kernels.statistics.triton_band import band_pass
from rhythm_kernels.statistics.triton_forward import forward_pass
from rhythm_kernels.statistics.triton_tiles import BandTile, Tile, Tiles, choose_tiles

AnyTile = Tile | BandTile

TILE_OF = {
    "rows": "rows",
    "known": "rows",
    "sampled": "sampled",
    "forward": "forward",
    "band": "band",
    "groups": "band",
}
WORK_OF = {"rows": "full", "known": "full", "forward": "sdpa"}  # in `work`, where the names differ
COMPILED_AT = 2 * SPAN_ROWS  # tokens; from there on the kernels are the same at every number

# For heads up to 128 in 16 bits on a Hopper GPU.
OTHERS = {
    "rows": [
        Tile(128, 64, 4, 2),
        Tile(128, 64, 4, 4),
        Tile(128, 64, 8, 3),
        Tile(128, 128, 8, 2),
        Tile(128, 128, 8, 3),
        Tile(128, 128, 4, 2),
        Tile(64, 64, 4, 3),
        Tile(64, 128, 4, 2),
        Tile(64, 128, 4, 3),
        Tile(128, 32, 4, 4),
        Tile(256, 64, 8, 3),
        Tile(256, 128, 8, 2),
    ],
    "sampled": [
        Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 4),
        Tile(64, 128, 4, 2),
        Tile(64, 128, 4, 3),
        Tile(64, 64, 8, 3),
        Tile(64, 32, 4, 4),
        Tile(32, 64, 4, 3),
    ],
    "forward": [
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 4),
        Tile(128, 64, 4, 2),
        Tile(128, 64, 4, 3),
        Tile(128, 128, 8, 2),
        Tile(64, 64, 4, 3),
        Tile(64, 128, 4, 2),
        Tile(128, 32, 8, 3),
    ],
    "band": [
        BandTile(64, 16, 4, 2, 128),
        BandTile(64, 16, 4, 2, 168),
        BandTile(64, 16, 8, 2),
        BandTile(32, 16, 2, 2),
    ],
}


def run_pass(name: str, tile: AnyTile, p: Problem) -> tuple[Tensor, ...]:
    """Runs one pass and returns its results."""
    plain_map = dict.fromkeys(("scale", "sliding_window", "softcap", "sinks"))
    need_span, span_rows = TILE_OF[name] in ("rows", "sampled", "forward"), SPAN_ROWS if name == "sampled" else None
    options = check_options(p.q, p.k, need_span=need_span, span_rows=span_rows, **OPTIONS, **plain_map)
    if TILE_OF[name] == "band":
        heads = (p.local_heads[None], p.global_heads[None]) if name == "groups" else None
        return band_pass(p.q, p.k, p.lse, heads, p.layout, options, tile)
    lse, v = p.lse if name in ("known", "sampled") else None, p.v if name == "forward" else None
    results = forward_pass(p.q, p.k, v, lse, p.layout, options, tile, sample_only=name == "sampled")
    return tuple(x for x in results if x is not None)


def own_tiles(q: Tensor) -> Tiles:
    """Returns the table's tiles for this GPU and heads like those of q."""
    major, minor = torch.cuda.get_device_capability(q.device)
    return choose_tiles(10 * major + minor, q.shape[-1], q.shape[-1], 8 * q.element_size())


def why_wrong(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> str:
    """Returns how far results are from those of the table's tile, or "" if they are near enough."""
    for x, y in zip(got, want, strict=True):
        allowed = EXACT if y.dtype == torch.float32 else ROUNDED
        error = ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()
        if not error <= allowed:
            return f"off by {error:.1e}, allowed are {allowed:.1e}"
    return ""


def compile_tile(name: str, tile: AnyTile, shape: Shape) -> str:
    """Compiles a pass in a process of its own, which leaves the kernels in Triton's cache. Returns why it failed."""
    try:
        run_pass(name, tile, make_problem(shape, COMPILED_AT, torch.device("cuda")))
        torch.cuda.synchronize()
    except Exception as error:  # any tile may be tried, and the compiler may fail in any way
        return one_line(error)
    return ""


def compile_all(tiles: dict[tuple[str, AnyTile], None], shape: Shape) -> dict[tuple, str]:
    """Compiles all passes, and returns the reasons of those that failed."""
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        reasons = {key: pool.submit(compile_tile, *key, shape) for key in tiles}
    return {key: reason for key, done in reasons.items() if (reason := _result_of(done))}


def _result_of(done: Future) -> str:
    try:
        return done.result()
    except Exception as error:  # the process has died
        return one_line(error)


def measure(name: str, tiles: list, problem: Problem, failed: dict, rounds: int) -> dict[AnyTile, Measured]:
    """Returns the times of the tiles whose results are those of the first, the table's; the others join `failed`.

    Without the table's tile there is nothing to compare with, and nothing is timed.
    """
    runs: dict[AnyTile, Callable] = {}
    want = None
    for tile in tiles:
        if (name, tile) in failed:
            continue
        if want is None and tile != tiles[0]:
            return {}
        try:
            got = run_pass(name, tile, problem)
            torch.cuda.synchronize()
        except Exception as error:  # as in `compile_tile`
            failed[name, tile] = one_line(error)
            continue
        want = want or got
        if reason := why_wrong(got, want):
            failed[name, tile] = reason
        else:
            runs[tile] = lambda tile=tile: run_pass(name, tile, problem)
    return interleave(runs, rounds, name, problem.q.device) if runs else {}


def describe(tile: AnyTile) -> str:
    return ", ".join(f"{field} {value}" for field, value in tile._asdict().items() if value is not None)


def report(out: Path | None, where: dict, args: argparse.Namespace, shape: Shape, results: dict, failed: dict) -> str:
    """Returns the report, after writing it where `--out` asks for it."""
    rows, data = [], []
    for name, measured in results.items():
        own = next(iter(measured.values()), None)
        least = work(WORK_OF.get(name, name), shape, args.tokens)
        for tile, m in measured.items():
            seconds = m.kernel_seconds or m.seconds
            amount, unit = (least.bytes / 1e9, "GB/s") if TILE_OF[name] == "band" else (least.flops / 1e12, "TFLOP/s")
            rate = f"{amount / seconds:,.0f} {unit}"
            kernels = f"{m.kernel_seconds * 1e6:,.1f}" if m.kernel_seconds else "-"
            cells = [name, describe(tile), f"{m.seconds * 1e6:,.1f}", kernels, median_and_range(ratios(m, own)), rate]
            rows.append(cells)
            data.append({"pass": name, "tile": tile, **m._asdict()})
    head = ["pass", "tile; the table's first", "us", "kernels alone", "of the table's (least, most)", "rate"]
    what = f"{shape.query_heads} / {shape.key_heads} heads of {shape.head_size}, {args.dtype}, {args.tokens:,} tokens"
    lines = [f"- {name} {describe(tile)}: {reason}" for (name, tile), reason in failed.items()]
    text = f"{heading(where)}\n\n{what}\n\n{markdown_table(head, rows)}\n\n" + "\n".join(lines) + "\n"
    return publish(out, text, {**where, "tokens": args.tokens, "measured": data, "failed": lines})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--passes", nargs="+", choices=TILE_OF, default=list(TILE_OF))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, nargs=2, metavar=("HQ", "H"), default=(32, 8))
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    help_ = "these tiles alone, as in benchmarks.kernels: rows=128,64,4,3 or band=64,16,4,2,128"
    parser.add_argument("--try", dest="tiles", type=parse_tile, nargs="+", metavar="PASS=A,B,WARPS,STAGES", help=help_)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--once", action="store_true", help="run each pass once with the table's tile, and time nothing"
    )
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well, after each pass")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(
            "tiles are timed on a GPU, and there is none here: python -m benchmarks.kernels --try needs none"
        )
    device, shape = torch.device("cuda"), Shape(*args.heads, args.head_size, DTYPES[args.dtype])
    own = own_tiles(torch.empty(0, args.head_size, dtype=shape.dtype, device=device))
    if args.once:
        problem = make_problem(shape, args.tokens, device)
        for name in args.passes:
            run_pass(name, getattr(own, TILE_OF[name]), problem)
        torch.cuda.synchronize()
        return
    tiles = {}
    for name in args.passes:
        kind = TILE_OF[name]
        others = OTHERS[kind] if args.tiles is None else [tile for pass_, tile in args.tiles if pass_ == kind]
        if args.tiles is None and kind in ("rows", "sampled"):  # they differ from the table's in their sizes alone
            mine = getattr(own, kind)
            others = [tile._replace(lanes=mine.lanes, split=mine.split) for tile in others]
        tiles[name] = list(dict.fromkeys([getattr(own, kind), *others]))
    with says_when_interrupted(args.out):
        failed = compile_all({(name, tile): None for name in tiles for tile in tiles[name]}, shape)
        problem, results, text = make_problem(shape, args.tokens, device), {}, ""
        for name in tiles:
            results[name] = measure(name, tiles[name], problem, failed, args.rounds)
            text = report(args.out, environment(device), args, shape, results, failed)
    print(text)


if __name__ == "__main__":
    main()
