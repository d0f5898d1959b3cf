"""How much time and memory do the statistics of one layer cost, beside other ways to compute them?

    python -m benchmarks.attention [--tokens 512 1024 2048] [--rounds 7] [--out benchmarks/results/attention-cpu]

The input is one sequence of N tokens, all of them in R. Its shape is that of SmolLM2-135M on a CPU (9 query heads and
3 key heads of 64, fp32) and of Qwen3-4B on a GPU (32 and 8 heads of 128, bf16). WAAD is the windowed average attention
distance, FAI the future attention influence, lse the log-sum-exp of the scores. Compared are:

    maps        the paper's way: the dense eager formula, [HQ, N, N] scores and softmax, then sums over the maps
    eager       transformers' own eager_attention_forward with its mask, then the same sums
    sdpa        torch's attention forward (on a GPU its flash kernel) without statistics, which a model runs anyway
    cudnn       the same through cuDNN (GPU)
    triton      a plain Triton forward without statistics, `triton_forward_baseline.py` (GPU)
    flex        FlexAttention compiled: its forward, a pass for WAAD, and a reversed pass (k as queries) for the columns
    colreduce   the package flash-colreduce: means of whole columns (GPU)
    full        attention_stats without a known lse: lse, span, WAAD and FAI from every key
    sampled     attention_stats with a known lse: span from 512 rows, WAAD and FAI of each head from a band
    band        the same without span
    groups      group_stats with a known lse: WAAD summed over 30 % of the heads, FAI over another 30 %
    fused       attention: the output and all statistics

The last four variants get the layout of the batch ready-made, since `collect` makes it once for all layers.

Each variant is checked before it is timed. Up to 1,024 tokens the reference is fp64; where only larger sizes are asked
for, this check runs once at 1,024. Above, statistics are held against `full` and outputs against sdpa. Errors are in
units of the largest value of the result. `EXACT` is allowed, or `ROUNDED` for 16-bit outputs and for variants that
round scores, weights or sums to 16 bits. They are the package's own: if one of them is wrong or fails, the
benchmark ends. Another variant that is wrong or fails is left out from there on, with a footnote that says why.

`flex` compiles several graphs for each number of tokens, so it runs at one number only: the largest up to 8,192.

The table and the files are written after each number of tokens. An interrupt (SIGINT) ends the run with exit code 130.

On a GPU the times are those between two CUDA events, with an L2 cache full of other data. Times in brackets are those
inside kernels alone.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.attention_report import Row, one_line, report
from benchmarks.attention_variants import (
    HORIZON,
    OPTIONS,
    SPAN_ROWS,
    VARIANTS,
    WINDOW,
    Answer,
    Problem,
    Shape,
    answer_of,
    make_problem,
    why_not,
)
from benchmarks.measure import interleave, make_parser, says_when_interrupted
from rhythm_kernels import attention_stats, reference

EXACT, ROUNDED = 1e-4, 2**-5
CHECKED_IN_FP64 = 1024  # the most tokens that are checked against fp64
COMPILED_UP_TO = 8192  # the most tokens for variants that run at one size
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- checks ----------------------------------------------------------------------------------------------------------


def exact_answer(p: Problem) -> Answer:
    """Computes everything in fp64 on a CPU."""
    q, k, v, local_heads, global_heads = (x.cpu() for x in (p.q, p.k, p.v, p.local_heads, p.global_heads))
    segments = torch.zeros(1, q.shape[2], dtype=torch.int64)
    rows = segments == 0
    weights, lse = reference.attention_map(q, k, segments)
    waad, fai = reference.waad(weights, rows, WINDOW), reference.fai(weights, rows, segments, HORIZON)
    return Answer(
        out=weights @ v.double().repeat_interleave(p.repeats, 1),
        waad=waad,
        fai=fai,
        span=reference.span(weights, rows, segments, 1),
        lse=lse,
        group_waad=waad[:, local_heads].sum(1),
        group_fai=fai[:, global_heads].sum(1),
        sampled_span=reference.span(weights, rows, segments, 1, SPAN_ROWS),
        column_mean=reference.fai(weights, rows, segments, (0, None)),
    )


def own_answer(p: Problem) -> Answer:
    """Computes everything with `full` and sdpa, where maps in fp64 are too large."""
    full = answer_of(attention_stats(p.q, p.k, **OPTIONS))
    return full._replace(
        out=F.scaled_dot_product_attention(p.q, p.k, p.v, is_causal=True, enable_gqa=True),
        group_waad=full.waad[:, p.local_heads].sum(1),
        group_fai=full.fai[:, p.global_heads].sum(1),
        sampled_span=attention_stats(p.q, p.k, span_rows=SPAN_ROWS, **OPTIONS).span,
        column_mean=attention_stats(p.q, p.k, lse=p.lse, need_span=False, window=1, horizon=(0, None)).fai,
    )


class Mismatch(SystemExit):
    """A variant's result is wrong. It ends the program if the variant is the package's own."""


def check(name: str, answer: Answer, truth: Answer, shape: Shape) -> float:
    """Returns the largest error, in units of the largest value.

    Raises: Mismatch if the error is above what is allowed.
    """
    worst = 0.0
    tokens = truth.lse.shape[-1]
    for field, got, want in zip(Answer._fields, answer, truth, strict=True):
        if got is None:
            continue
        if got.shape != want.shape:
            raise Mismatch(f"{field} of {name} at {tokens} tokens is {list(got.shape)}, not {list(want.shape)}")
        is_rounded = shape.dtype != torch.float32 and (field == "out" or VARIANTS[name].rounds)
        allowed = ROUNDED if is_rounded else EXACT
        difference = (got.double() - want.to(got.device).double()).abs()
        error = (difference.max() / want.abs().max()).item()
        if not error <= allowed:
            what = f"{field} of {name} at {tokens} tokens"
            raise Mismatch(f"{what} is off by {error:.1e}, allowed are {allowed:.1e}: it is not timed")
        worst = max(worst, error)
    return worst


# ---- a run -----------------------------------------------------------------------------------------------------------


def prepare(
    shape: Shape, tokens: int, names: list[str], device: torch.device, failed: dict[str, str]
) -> tuple[dict[str, Callable[[], Answer]], Row]:
    """Returns the checked variants that run at this size, and a row to fill.

    Variants of others that fail or are wrong join `failed`, with the reason.
    """
    problem = make_problem(shape, tokens, device)
    truth = exact_answer(problem) if tokens <= CHECKED_IN_FP64 else own_answer(problem)
    runs, row = {}, Row({}, {}, {}, {})
    for name in names:
        variant = VARIANTS[name]
        reason = failed.get(name) or why_not(variant, shape, tokens, device)
        if reason is None:
            try:
                run = variant.make(problem)
                answer = run()
                row.errors[name] = check(name, answer, truth, shape)
            except (Exception, Mismatch) as error:
                if variant.ours:
                    raise
                reason = failed[name] = one_line(error)
        if reason is not None:
            row.skipped[name] = reason
            if name in failed:
                check_device(name, reason, device)
            continue
        runs[name] = run if variant.ours else guarded(name, run, device, failed)
        row.gives[name] = [field for field, x in answer._asdict().items() if x is not None]
    return runs, row


def guarded(
    name: str, run: Callable[[], Answer], device: torch.device, failed: dict[str, str]
) -> Callable[[], Answer | None]:
    """Wraps `run`: an error is added to `failed` instead of ending the benchmark, and the variant runs no more."""

    def attempt() -> Answer | None:
        if name in failed:
            return None
        try:
            return run()
        except Exception as error:
            failed[name] = one_line(error)
        check_device(name, failed[name], device)
        return None

    return attempt


def check_device(name: str, reason: str, device: torch.device) -> None:
    """Ends the benchmark (SystemExit) if a variant left the GPU in a state in which nothing runs any more."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise SystemExit(f"{name} failed ({reason}) and left the GPU unusable: leave it out with --variants") from None
    torch.cuda.empty_cache()


def left_out(names: list[str], tokens: int, sizes: list[int]) -> dict[str, str]:
    """Returns the variants that run at one number of tokens only, which is not this one, and says at which."""
    chosen = max((n for n in sizes if n <= COMPILED_UP_TO), default=min(sizes))
    return {} if tokens == chosen else {name: f"only at {chosen:,}" for name in names if VARIANTS[name].one_size}


def measure(
    shape: Shape,
    tokens: int,
    names: list[str],
    device: torch.device,
    rounds: int,
    limit: float,
    failed: dict[str, str],
) -> Row:
    runs, row = prepare(shape, tokens, names, device, failed)
    measured = interleave(runs, rounds, f"{tokens:,} tokens", device, limit)
    for name, m in measured.items():
        if name in failed:
            row.skipped[name] = failed[name]
        else:
            row.measured[name] = m
    return row


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 512..8,192 on a CPU, 1,024..131,072 on a GPU")
    parser.add_argument("--heads", type=int, nargs=2, metavar=("HQ", "H"), help="default: 9 3, on a GPU 32 8")
    parser.add_argument("--head-size", type=int, help="default: 64, on a GPU 128")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32, on a GPU bf16")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all that are for the device")
    parser.add_argument("--rounds", type=int, default=7, help="most timed rounds at each size")
    parser.add_argument("--limit", type=float, default=600, help="seconds at each size after which rounds stop")
    parser.add_argument("--out", type=Path, help="write OUT.md, OUT.json and OUT.png as well, after each size")
    args = parser.parse_args(arguments)
    gpu = args.device == "cuda"
    args.tokens = sorted(args.tokens or [2**n for n in (range(10, 18) if gpu else range(9, 14))])
    args.heads = args.heads or ([32, 8] if gpu else [9, 3])
    args.head_size = args.head_size or (128 if gpu else 64)
    args.dtype = args.dtype or ("bf16" if gpu else "fp32")
    args.variants = args.variants or [name for name in VARIANTS if gpu or name not in ("cudnn", "triton")]
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device, shape = torch.device(args.device), Shape(*args.heads, args.head_size, DTYPES[args.dtype])
    failed: dict[str, str] = {}
    results, text = {}, ""
    with says_when_interrupted(args.out):
        if args.tokens[0] > CHECKED_IN_FP64:
            names = [name for name in args.variants if not VARIANTS[name].one_size]
            prepare(shape, CHECKED_IN_FP64, names, device, failed)
        for tokens in args.tokens:
            elsewhere = left_out(args.variants, tokens, args.tokens)
            names = [name for name in args.variants if name not in elsewhere]
            results[tokens] = measure(shape, tokens, names, device, args.rounds, args.limit, failed)
            results[tokens].skipped.update(elsewhere)
            text = report(args, shape, device, results)
    print(text)


if __name__ == "__main__":
    main()
