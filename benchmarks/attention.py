"""What do the statistics of one layer cost, in time and memory, beside the other ways to get them?

    python -m benchmarks.attention [--tokens 512 1024 2048] [--rounds 7] [--out benchmarks/results/attention-cpu]

One sequence, every token in R. The shape is SmolLM2-135M's on a CPU (9 query heads, 3 key heads of 64, fp32) and
Qwen3-4B's on a GPU (32 and 8 of 128, bf16). Variants:

    maps        the paper's way: the dense eager formula, [HQ, N, N] scores and softmax, then sums over the maps
    eager       transformers' own eager_attention_forward with its mask, then the same sums
    sdpa        torch's attention forward (on a GPU its flash kernel), no statistics: what a model pays anyway
    cudnn       the same through cuDNN (GPU)
    triton      a plain Triton forward, no statistics: `triton_forward_baseline.py` (GPU)
    flex        FlexAttention compiled: its forward, a pass for WAAD, and a reversed pass (k as queries) for the columns
    colreduce   the package flash-colreduce: means of whole columns (GPU)
    full        attention_stats, nothing known: lse, span, WAAD and FAI from every key
    band        attention_stats, lse given, no span: WAAD and FAI of each head, from a band
    groups      group_stats, lse given: WAAD summed over 30 % of the heads, FAI over another 30 %
    fused       attention: the output and all statistics

`full`, `band` and `groups` get the layout of the batch ready-made, since `collect` makes it once for all layers.

Whatever a variant returns is checked before it is timed: up to 1,024 tokens (once at 1,024, if only larger sizes are
asked for) against fp64; above, statistics against `full` and outputs against sdpa. Errors are in units of the largest
value of what is compared; allowed are `EXACT`, and `ROUNDED` for 16-bit outputs and for variants that round scores,
weights or sums to 16 bits. If one is wrong, nothing is printed but that.

On a GPU: times between two CUDA events with an L2 cache full of other data, in brackets that inside kernels alone.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import Measured, available_bytes, environment, interleave, ratio, write
from rhythm_kernels import AttentionStats, attention, attention_stats, group_heads, reference
from rhythm_kernels.attention.api import run_group_stats, run_stats
from rhythm_kernels.attention.layout import Layout, make_layout
from rhythm_kernels.attention.options import Options, check_options

WINDOW, HORIZON = 10, (10, 50)
OPTIONS = {"window": WINDOW, "horizon": HORIZON}
EXACT, ROUNDED = 1e-4, 2**-5
CHECKED_IN_FP64 = 1024  # tokens
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_SHARE = 0.9  # of what is free, for one variant


class Shape(NamedTuple):
    query_heads: int
    key_heads: int
    head_size: int
    dtype: torch.dtype


class Problem(NamedTuple):
    q: Tensor
    """[1, HQ, N, D]"""
    k: Tensor
    """[1, H, N, D]"""
    v: Tensor
    """[1, H, N, D]"""
    lse: Tensor
    """[1, HQ, N] fp32."""
    local: Tensor
    """[HQ] bool: 30 % of the heads, of the shortest spans."""
    global_: Tensor
    """[HQ] bool: 30 % of the heads, of the longest spans."""
    layout: Layout

    @property
    def repeats(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5


class Answer(NamedTuple):
    """What a variant gives; None for what it cannot."""

    out: Tensor | None = None
    """[1, HQ, N, D]"""
    waad: Tensor | None = None
    """[1, HQ, N], as fai and lse."""
    fai: Tensor | None = None
    span: Tensor | None = None
    """[1, HQ]"""
    lse: Tensor | None = None
    group_waad: Tensor | None = None
    """[1, N], as group_fai."""
    group_fai: Tensor | None = None
    column_mean: Tensor | None = None
    """[1, HQ, N]: the mean over all t >= s of A[t, s]."""


def make_problem(shape: Shape, tokens: int, device: torch.device) -> Problem:
    """Random q, k and v that lean on their neighbours, each query head more than the one before it.

    As in trained heads, the weights then fall off with the distance, and neither WAAD nor FAI is that of an even map.
    """
    query_heads, key_heads, size, dtype = shape
    generator = torch.Generator(device).manual_seed(tokens)
    q, k, v = (
        torch.randn(1, heads, tokens, size, generator=generator, device=device)
        for heads in (query_heads, key_heads, key_heads)
    )
    frequency = 10_000 ** -torch.linspace(0, 1, size // 2, dtype=torch.float64, device=device)
    angle = torch.arange(tokens, device=device)[:, None] * frequency
    place = torch.cat([angle.cos(), angle.sin()], -1).float()  # place[t] @ place[s] falls off with t - s
    k[..., : place.shape[1]] += place
    most = 2 * size**-0.5 * math.log(tokens)  # adds log N to the score of distance 0
    q[..., : place.shape[1]] += torch.linspace(0, most, query_heads, device=device)[:, None, None] * place
    q, k, v = (x.to(dtype) for x in (q, k, v))
    stats = attention_stats(q, k, **OPTIONS)
    groups = group_heads(stats.span)
    return Problem(q, k, v, stats.lse, groups.local[0], groups.global_[0], make_layout(1, tokens, device))


# ---- the variants ----------------------------------------------------------------------------------------------------


def make_maps(p: Problem) -> Callable[[], Answer]:
    sums, distance = dense_sums(p.q.shape[2], p.q.device)

    def run() -> Answer:
        scores = p.q @ p.k.repeat_interleave(p.repeats, 1).mT * p.scale
        return sums(torch.softmax(scores.masked_fill(distance < 0, -torch.inf), -1, dtype=torch.float32))

    return run


def make_eager(p: Problem) -> Callable[[], Answer]:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    sums, distance = dense_sums(p.q.shape[2], p.q.device)
    module = SimpleNamespace(num_key_value_groups=p.repeats, training=False)
    lowest = torch.finfo(p.q.dtype).min
    mask = torch.zeros(distance.shape, dtype=p.q.dtype, device=p.q.device).masked_fill_(distance < 0, lowest)

    def run() -> Answer:
        out, weights = eager_attention_forward(module, p.q, p.k, p.v, mask[None, None], scaling=p.scale)
        return sums(weights)._replace(out=out.transpose(1, 2))

    return run


def dense_sums(tokens: int, device: torch.device) -> tuple[Callable[[Tensor], Answer], Tensor]:
    """(the sums over maps [1, HQ, N, N], distances t - s [N, N]); what depends on N alone is made here, once."""
    position = torch.arange(tokens, dtype=torch.int32, device=device)
    distance = position[:, None] - position
    counted = (distance >= HORIZON[0]) & (distance <= HORIZON[1])
    looking_back = counted.sum(-2).clamp(min=1)

    def sums(weights: Tensor) -> Answer:
        return Answer(
            waad=(weights * distance.clamp(max=WINDOW)).sum(-1, dtype=torch.float32),
            fai=(weights * counted).sum(-2, dtype=torch.float32) / looking_back,
            span=(weights * distance).sum(-1, dtype=torch.float32).mean(-1),
        )

    return sums, distance


def make_sdpa(p: Problem, backend: SDPBackend | None = None) -> Callable[[], Answer]:
    if backend is None:
        backend = SDPBackend.FLASH_ATTENTION

    def run() -> Answer:
        with sdpa_kernel(backend):
            return Answer(out=F.scaled_dot_product_attention(p.q, p.k, p.v, is_causal=True, enable_gqa=True))

    return run


def make_cudnn(p: Problem) -> Callable[[], Answer]:
    return make_sdpa(p, SDPBackend.CUDNN_ATTENTION)


def make_triton(p: Problem) -> Callable[[], Answer]:
    from benchmarks.triton_forward_baseline import causal_attention

    return lambda: Answer(*causal_attention(p.q, p.k, p.v)[:1])


def make_flex(p: Problem) -> Callable[[], Answer]:
    """A weighted sum of A is exp of the log-sum-exp of its scores plus log weights less the row's log-sum-exp."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    torch.compiler.reset()  # each size is compiled for itself
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    tokens, (lo, hi) = p.q.shape[2], HORIZON
    # uncompiled, it evaluates a mask at every pair of tokens
    make_mask = create_block_mask if tokens <= 8192 else torch.compile(create_block_mask)

    def mask_of(visible) -> object:
        return make_mask(visible, None, None, tokens, tokens, device=p.q.device)

    causal = mask_of(lambda b, h, t, s: t >= s)
    near = mask_of(lambda b, h, t, s: (t >= s) & (t - s < WINDOW))
    looking_back = mask_of(lambda b, h, s, t: (t - s >= lo) & (t - s <= hi))  # k as queries
    column = torch.arange(tokens, device=p.q.device)
    count = (tokens - lo - column).clamp(1, hi - lo + 1)
    aux, narrow = AuxRequest(lse=True), 16  # the narrowest values that flex takes, where only the log-sum-exp is wanted

    def run() -> Answer:
        out, rows = attend(p.q, p.k, p.v, block_mask=causal, enable_gqa=True, return_aux=aux)
        lse = rows.lse

        def nearness(score, b, h, t, s):
            return score - lse[b, h, t] + torch.log((WINDOW - t + s).float())

        def received(score, b, h, s, t):
            return score - lse[b, h, t]

        values = p.v[..., :narrow]
        _, nearest = attend(p.q, p.k, values, score_mod=nearness, block_mask=near, enable_gqa=True, return_aux=aux)
        keys, values = p.k.repeat_interleave(p.repeats, 1), p.q[..., :narrow]
        _, columns = attend(keys, p.q, values, score_mod=received, block_mask=looking_back, return_aux=aux)
        return Answer(out=out, waad=WINDOW - nearest.lse.exp(), fai=columns.lse.exp() / count, lse=lse)

    return run


def make_colreduce(p: Problem) -> Callable[[], Answer]:
    from flash_colreduce import flash_colreduce

    def run() -> Answer:
        keys = p.k.repeat_interleave(p.repeats, 1)  # it knows no grouped heads
        return Answer(column_mean=flash_colreduce(p.q, keys, "mean", is_causal=True))

    return run


def make_full(p: Problem) -> Callable[[], Answer]:
    options = checked_options(p, need_span=True)
    return lambda: of_stats(run_stats(p.q, p.k, None, p.layout, options))


def make_band(p: Problem) -> Callable[[], Answer]:
    options = checked_options(p, need_span=False)
    return lambda: of_stats(run_stats(p.q, p.k, p.lse, p.layout, options))


def make_groups(p: Problem) -> Callable[[], Answer]:
    options = checked_options(p, need_span=False)

    def run() -> Answer:
        waad, fai = run_group_stats(p.q, p.k, p.lse, p.local, p.global_, p.layout, options)
        return Answer(group_waad=waad, group_fai=fai)

    return run


def checked_options(p: Problem, need_span: bool) -> Options:
    none = dict.fromkeys(("scale", "sliding_window", "softcap", "sinks"))
    return check_options(p.q, p.k, need_span=need_span, **OPTIONS, **none)


def make_fused(p: Problem) -> Callable[[], Answer]:
    def run() -> Answer:
        out, stats = attention(p.q, p.k, p.v, **OPTIONS)
        return of_stats(stats)._replace(out=out)

    return run


def of_stats(stats: AttentionStats) -> Answer:
    return Answer(waad=stats.waad, fai=stats.fai, span=stats.span, lse=stats.lse)


class Variant(NamedTuple):
    make: Callable[[Problem], Callable[[], Answer]]
    """Prepares what is not timed and returns what is."""
    ours: bool = False
    """An error is ours to fix and stops the benchmark; another variant's is reported in the table."""
    dense: bool = False
    """Holds N x N maps."""
    gpu_only: bool = False
    rounds: bool = False
    """Rounds scores, weights or sums to the inputs' dtype."""


VARIANTS = {
    "maps": Variant(make_maps, dense=True, rounds=True),
    "eager": Variant(make_eager, dense=True, rounds=True),
    "sdpa": Variant(make_sdpa),
    "cudnn": Variant(make_cudnn, gpu_only=True),
    "triton": Variant(make_triton, gpu_only=True),
    "flex": Variant(make_flex),
    "colreduce": Variant(make_colreduce, gpu_only=True, rounds=True),
    "full": Variant(make_full, ours=True),
    "band": Variant(make_band, ours=True),
    "groups": Variant(make_groups, ours=True),
    "fused": Variant(make_fused, ours=True),
}


def dense_bytes(query_heads: int, tokens: int) -> int:
    """Peak of the dense variants: three maps of 4 bytes a score, and distances and masks of 12 bytes a pair."""
    return tokens**2 * (12 * query_heads + 12)


def why_not(variant: Variant, shape: Shape, tokens: int, device: torch.device) -> str | None:
    """The reason to leave a variant out at this size, if there is one."""
    if variant.gpu_only and device.type != "cuda":
        return "needs a GPU"
    needed = dense_bytes(shape.query_heads, tokens)
    if variant.dense and needed > MEMORY_SHARE * available_bytes(device):
        return f"needs {needed / 2**30:,.1f} GiB"
    return None


# ---- what a variant has to do at least -------------------------------------------------------------------------------


class Work(NamedTuple):
    flops: int
    """Of the products q k^T and A v."""
    exps: int
    bytes: int
    """Inputs read once and results written once."""


def work(name: str, shape: Shape, tokens: int) -> Work | None:
    """None for variants whose cost is the maps'."""
    heads, key_heads, size, dtype = shape
    pairs = heads * tokens * (tokens + 1) // 2
    (lo, hi), share = HORIZON, math.ceil(0.3 * heads)
    columns = len({*range(WINDOW), *range(lo, hi + 1)}) * tokens  # of a head's band
    band = heads * columns
    some = share * (WINDOW + hi - lo + 1) * tokens
    queries, keys = (n * tokens * size * dtype.itemsize for n in (heads, key_heads))
    row = 4 * heads * tokens  # bytes of one fp32 value a row
    inputs, forward = queries + keys, 2 * queries + 2 * keys
    return {
        "sdpa": Work(4 * size * pairs, pairs, forward),
        "cudnn": Work(4 * size * pairs, pairs, forward),
        "triton": Work(4 * size * pairs, pairs, forward + row),
        "flex": Work(4 * size * pairs + 2 * size * band, pairs + band, forward + 3 * row),
        "colreduce": Work(4 * size * pairs, 2 * pairs, inputs + row),
        "full": Work(2 * size * (pairs + band), pairs + band, inputs + 3 * row),
        "band": Work(2 * size * band, band, inputs + 3 * row),
        "groups": Work(2 * size * some, some, 2 * share * queries // heads + keys + 2 * share * row // heads),
        "fused": Work(4 * size * pairs + 2 * size * band, pairs + band, forward + 3 * row),
    }.get(name)


# ---- checks ----------------------------------------------------------------------------------------------------------


def exact_answer(p: Problem) -> Answer:
    """Everything, in fp64 on a CPU."""
    q, k, v, local, global_ = (x.cpu() for x in (p.q, p.k, p.v, p.local, p.global_))
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
        group_waad=waad[:, local].sum(1),
        group_fai=fai[:, global_].sum(1),
        column_mean=reference.fai(weights, rows, segments, (0, None)),
    )


def own_answer(p: Problem) -> Answer:
    """Everything from `full` and sdpa, where maps in fp64 are too large."""
    full = of_stats(attention_stats(p.q, p.k, **OPTIONS))
    return full._replace(
        out=F.scaled_dot_product_attention(p.q, p.k, p.v, is_causal=True, enable_gqa=True),
        group_waad=full.waad[:, p.local].sum(1),
        group_fai=full.fai[:, p.global_].sum(1),
        column_mean=attention_stats(p.q, p.k, lse=p.lse, need_span=False, window=1, horizon=(0, None)).fai,
    )


def check(name: str, answer: Answer, truth: Answer, shape: Shape) -> float:
    """The largest error, in units of the largest value; SystemExit if it is above what is allowed."""
    worst = 0.0
    tokens = truth.lse.shape[-1]
    for field, got, want in zip(Answer._fields, answer, truth, strict=True):
        if got is None:
            continue
        if got.shape != want.shape:
            raise SystemExit(f"{field} of {name} at {tokens} tokens is {list(got.shape)}, not {list(want.shape)}")
        rounded = shape.dtype != torch.float32 and (field == "out" or VARIANTS[name].rounds)
        allowed = ROUNDED if rounded else EXACT
        difference = (got.double() - want.to(got.device).double()).abs()
        error = (difference.max() / want.abs().max()).item()
        if not error <= allowed:
            off = f"{field} of {name} at {tokens} tokens is off by {error:.1e}"
            raise SystemExit(f"{off}, allowed are {allowed:.1e}: nothing is timed")
        worst = max(worst, error)
    return worst


# ---- a run -----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One number of tokens."""

    measured: dict[str, Measured]
    skipped: dict[str, str]
    """Why a variant did not run."""
    errors: dict[str, float]
    gives: dict[str, list[str]]
    """The fields of `Answer` that a variant returned."""


def prepare(
    shape: Shape, tokens: int, names: list[str], device: torch.device, failed: dict[str, str]
) -> tuple[dict[str, Callable[[], Answer]], Row]:
    """The variants that run at this size, each checked; `failed` holds those that cannot run at all."""
    problem = make_problem(shape, tokens, device)
    truth = exact_answer(problem) if tokens <= CHECKED_IN_FP64 else own_answer(problem)
    runs, row = {}, Row({}, {}, {}, {})
    for name in names:
        variant = VARIANTS[name]
        reason = failed.get(name) or why_not(variant, shape, tokens, device)
        if reason is None:
            try:
                runs[name] = variant.make(problem)
                answer = runs[name]()
            except Exception as error:
                if variant.ours:
                    raise
                runs.pop(name, None)
                reason = failed[name] = one_line(error)
        if reason is not None:
            row.skipped[name] = reason
            continue
        row.errors[name] = check(name, answer, truth, shape)
        row.gives[name] = [field for field, x in answer._asdict().items() if x is not None]
    return runs, row


def one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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
    row.measured.update(interleave(runs, rounds, f"{tokens:,} tokens", device, limit))
    return row


# ---- what is shown ---------------------------------------------------------------------------------------------------

RATIOS = [("maps", "full"), ("maps", "band"), ("maps", "groups")]  # how much faster
RATIOS += [("band", "sdpa"), ("groups", "sdpa"), ("fused", "sdpa")]  # what it adds to the attention itself
SHORT = {"group_waad": "waad of a group", "group_fai": "fai of a group", "column_mean": "means of columns"}


def table(results: dict[int, Row], names: list[str]) -> str:
    lines = ["| | gives | " + " | ".join(f"{tokens:,}" for tokens in results) + " |"]
    lines.append("|---" * (len(results) + 2) + "|")
    notes: list[str] = []
    for name in names:
        gives = next((row.gives[name] for row in results.values() if name in row.gives), [])
        cells = [_cell(name, row, notes) for row in results.values()]
        what = ", ".join(SHORT.get(x, x) for x in gives) or "-"
        lines.append(f"| {name} | {what} | " + " | ".join(cells) + " |")
    for above, below in RATIOS:
        if above in names and below in names:
            ratios = [_ratio(row, above, below) for row in results.values()]
            lines.append(f"| {above} / {below} | | " + " | ".join(f"{x:.3g}x" if x else "" for x in ratios) + " |")
    return "\n".join(lines + [f"\n({i + 1}) {note}" for i, note in enumerate(notes)])


def _cell(name: str, row: Row, notes: list[str]) -> str:
    if name in row.skipped:
        reason = row.skipped[name]
        if reason.startswith("needs"):
            return reason
        note = f"{name}: {reason}"
        if note not in notes:
            notes.append(note)
        return f"({notes.index(note) + 1})"
    m = row.measured[name]
    inside = f" ({m.kernel_seconds * 1e3:.3g})" if m.kernel_seconds else ""
    return f"{_milliseconds(m.seconds)}{inside} ms, {m.extra_bytes / 2**20:,.0f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 1 else f"{seconds * 1e3:.3g}"


def _ratio(row: Row, above: str, below: str) -> float | None:
    if above in row.measured and below in row.measured:
        return ratio(row.measured[above], row.measured[below])
    return None


def summary(results: dict[int, Row]) -> str:
    """maps against band at the largest size that both ran at, and how band grows."""
    said = []
    both = [tokens for tokens, row in results.items() if _ratio(row, "maps", "band")]
    if both:
        row = results[both[-1]]
        memory = row.measured["band"].extra_bytes / max(row.measured["maps"].extra_bytes, 1)
        said.append(
            f"At {both[-1]:,} tokens band is {_ratio(row, 'maps', 'band'):.3g}x as fast as maps, "
            f"with {memory:.1%} of the memory."
        )
    banded = [tokens for tokens, row in results.items() if "band" in row.measured]
    if len(banded) > 1:
        few, many = banded[-2:]
        growth = results[many].measured["band"].seconds / results[few].measured["band"].seconds
        said.append(f"band takes {growth:.2f}x the time at {many:,} tokens that it takes at {few:,}.")
    return " ".join(said)


def plot(results: dict[int, Row], names: list[str], title: str, path: Path) -> None:
    """Time and memory over the tokens, both logarithmic; each line is labelled at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    colors = dict(zip(names, matplotlib.color_sequences["tab20"][::2] + matplotlib.color_sequences["tab20"][1::2]))
    panels = {
        "time, ms": lambda m: m.seconds * 1e3,
        "peak extra memory, MiB": lambda m: max(m.extra_bytes, 2**16) / 2**20,
    }
    for axes, (label, value) in zip(figure.subplots(1, 2), panels.items()):
        ends = {}
        for name in names:
            points = [(n, value(row.measured[name])) for n, row in results.items() if name in row.measured]
            if points:
                ours = VARIANTS[name].ours
                axes.plot(*zip(*points), "o-", color=colors[name], lw=2.2 if ours else 1.2, ms=4 if ours else 3)
                ends[name] = points[-1]
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=label)
        axes.set_xticks(list(results), [f"{n:,}" for n in results])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(right=max(results) * (max(results) / min(results)) ** 0.2)  # room for the labels
        for name, height in _apart({name: y for name, (_, y) in ends.items()}, axes.get_ylim()).items():
            weight = "bold" if VARIANTS[name].ours else "normal"
            text = axes.annotate(name, (ends[name][0], height), (7, 0), textcoords="offset points", fontsize=8)
            text.set(color=colors[name], va="center", weight=weight)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)


def _apart(heights: dict[str, float], limits: tuple[float, float]) -> dict[str, float]:
    """Heights on a logarithmic axis, moved up where labels would touch."""
    step = (limits[1] / limits[0]) ** 0.045
    placed, last = {}, 0.0
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        last = placed[name] = max(height, last * step)
    return placed


def report(args: argparse.Namespace, shape: Shape, device: torch.device, results: dict[int, Row]) -> str:
    """Writes what `--out` asks for, and returns the text."""
    where = environment(device)
    heads = f"{shape.query_heads} query and {shape.key_heads} key heads of {shape.head_size}, {args.dtype}"
    worst = max((error for row in results.values() for error in row.errors.values()), default=0.0)
    rounds = f"medians of at most {args.rounds} interleaved rounds; largest error {worst:.1e}"
    head = ", ".join(f"{name} {value}" for name, value in where.items())
    text = f"{head}\n\n{heads}; {rounds}\n\n{table(results, args.variants)}\n\n{summary(results)}\n"
    if args.out is not None:
        rows = {
            tokens: {
                "measured": {name: m._asdict() for name, m in row.measured.items()},
                "work": {name: w._asdict() for name in row.measured if (w := work(name, shape, tokens))},
                "skipped": row.skipped,
                "errors": row.errors,
            }
            for tokens, row in results.items()
        }
        write(args.out, text, {**where, "shape": heads, "window": WINDOW, "horizon": HORIZON, "tokens": rows})
        try:
            plot(results, args.variants, f"{where['device']}: {heads}", Path(f"{args.out}.png"))
        except ImportError as error:
            text += f"\nno plot: {one_line(error)}\n"
    return text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 512..8,192 on a CPU, 1,024..131,072 on a GPU")
    parser.add_argument("--heads", type=int, nargs=2, metavar=("HQ", "H"), help="default: 9 3, on a GPU 32 8")
    parser.add_argument("--head-size", type=int, help="default: 64, on a GPU 128")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32, on a GPU bf16")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all that are for the device")
    parser.add_argument("--rounds", type=int, default=7, help="at most so many timed rounds at each size")
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
    if args.tokens[0] > CHECKED_IN_FP64:
        prepare(shape, CHECKED_IN_FP64, args.variants, device, failed)
    results, text = {}, ""
    for tokens in args.tokens:
        results[tokens] = measure(shape, tokens, args.variants, device, args.rounds, args.limit, failed)
        text = report(args, shape, device, results)
    print(text)


if __name__ == "__main__":
    main()
