"""The variants that `benchmarks.attention` compares, and the least work that each has to do."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import available_bytes
from rhythm_kernels import AttentionStats, attention_stats, group_heads
from rhythm_kernels.statistics.api import run_attention, run_group_stats, run_stats
from rhythm_kernels.statistics.layout import Layout, make_layout
from rhythm_kernels.statistics.options import Options, check_options

WINDOW, HORIZON = 10, (10, 50)
OPTIONS = {"window": WINDOW, "horizon": HORIZON}
SPAN_ROWS = 512
MEMORY_SHARE = 0.9  # the part of the free memory that one variant may take


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
    local_heads: Tensor
    """[HQ] bool: 30 % of the heads, of the shortest spans."""
    global_heads: Tensor
    """[HQ] bool: 30 % of the heads, of the longest spans."""
    layout: Layout

    @property
    def repeats(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5


class Answer(NamedTuple):
    """The results of a variant; None where it does not give one."""

    out: Tensor | None = None
    """[1, HQ, N, D]"""
    waad: Tensor | None = None
    """[1, HQ, N]"""
    fai: Tensor | None = None
    """[1, HQ, N]"""
    span: Tensor | None = None
    """[1, HQ]"""
    lse: Tensor | None = None
    """[1, HQ, N]"""
    group_waad: Tensor | None = None
    """[1, N]"""
    group_fai: Tensor | None = None
    """[1, N]"""
    sampled_span: Tensor | None = None
    """[1, HQ], over `SPAN_ROWS` rows."""
    column_mean: Tensor | None = None
    """[1, HQ, N], the mean of A[t, s] over all t >= s."""


def make_problem(shape: Shape, tokens: int, device: torch.device) -> Problem:
    """Draws random q, k and v whose weights lean on their neighbours, in each query head more than in the one before.

    The weights fall off with the distance as in trained heads, so WAAD and FAI are not those of an even map.
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
    return Problem(q, k, v, stats.lse, groups.local_heads[0], groups.global_heads[0], make_layout(1, tokens, device))


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
    """Returns the function that sums over maps [1, HQ, N, N], and the distances t - s [N, N].

    What depends on N alone is computed once, here.
    """
    position = torch.arange(tokens, dtype=torch.int32, device=device)
    distance = position[:, None] - position
    in_horizon = (distance >= HORIZON[0]) & (distance <= HORIZON[1])
    looking_back = in_horizon.sum(-2).clamp(min=1)

    def sums(weights: Tensor) -> Answer:
        return Answer(
            waad=(weights * distance.clamp(max=WINDOW)).sum(-1, dtype=torch.float32),
            fai=(weights * in_horizon).sum(-2, dtype=torch.float32) / looking_back,
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
    """Computes a weighted sum of A as exp(log-sum-exp of scores + log weights - the row's log-sum-exp)."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    torch.compiler.reset()  # each size has graphs of its own
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    tokens, (lo, hi) = p.q.shape[2], HORIZON
    # without compilation it evaluates a mask at every pair of tokens
    make_mask = create_block_mask if tokens <= 8192 else torch.compile(create_block_mask)

    def mask_of(visible) -> object:
        return make_mask(visible, None, None, tokens, tokens, device=p.q.device)

    causal = mask_of(lambda b, h, t, s: t >= s)
    near = mask_of(lambda b, h, t, s: (t >= s) & (t - s < WINDOW))
    looking_back = mask_of(lambda b, h, s, t: (t - s >= lo) & (t - s <= hi))  # k as queries
    column = torch.arange(tokens, device=p.q.device)
    count = (tokens - lo - column).clamp(1, hi - lo + 1)
    aux, narrow = AuxRequest(lse=True), 16  # flex takes no narrower values; here only the log-sum-exp is used

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
        keys = p.k.repeat_interleave(p.repeats, 1)  # the package has no grouped heads
        return Answer(column_mean=flash_colreduce(p.q, keys, "mean", is_causal=True))

    return run


def make_full(p: Problem) -> Callable[[], Answer]:
    options = checked_options(p, need_span=True)
    return lambda: answer_of(run_stats(p.q, p.k, None, p.layout, options))


def make_band(p: Problem) -> Callable[[], Answer]:
    options = checked_options(p, need_span=False)
    return lambda: answer_of(run_stats(p.q, p.k, p.lse, p.layout, options))


def make_groups(p: Problem) -> Callable[[], Answer]:
    options = checked_options(p, need_span=False)

    def run() -> Answer:
        waad, fai, _ = run_group_stats(p.q, p.k, p.lse, p.local_heads, p.global_heads, p.layout, options)
        return Answer(group_waad=waad, group_fai=fai)

    return run


def make_sampled(p: Problem) -> Callable[[], Answer]:
    options = checked_options(p, need_span=True, span_rows=SPAN_ROWS)

    def run() -> Answer:
        stats = run_stats(p.q, p.k, p.lse, p.layout, options)
        return answer_of(stats._replace(span=None))._replace(sampled_span=stats.span)

    return run


def checked_options(p: Problem, need_span: bool, span_rows: int | None = None) -> Options:
    plain_map = dict.fromkeys(("scale", "sliding_window", "softcap", "sinks"))
    return check_options(p.q, p.k, need_span=need_span, span_rows=span_rows, **OPTIONS, **plain_map)


def make_fused(p: Problem) -> Callable[[], Answer]:
    options = checked_options(p, need_span=True)

    def run() -> Answer:
        out, stats = run_attention(p.q, p.k, p.v, p.layout, options)
        return answer_of(stats)._replace(out=out)

    return run


def answer_of(stats: AttentionStats) -> Answer:
    return Answer(waad=stats.waad, fai=stats.fai, span=stats.span, lse=stats.lse)


class Variant(NamedTuple):
    make: Callable[[Problem], Callable[[], Answer]]
    """Prepares the problem, which is not timed, and returns the function that is timed."""
    ours: bool = False
    """Whether the variant is the package's own: then an error or a wrong result stops the benchmark."""
    dense: bool = False
    """Whether it holds N x N maps."""
    gpu_only: bool = False
    one_size: bool = False
    """Whether it runs at one number of tokens only, because it compiles for seconds for each."""
    rounds: bool = False
    """Whether it rounds scores, weights or sums to the inputs' dtype."""


VARIANTS = {
    "maps": Variant(make_maps, dense=True, rounds=True),
    "eager": Variant(make_eager, dense=True, rounds=True),
    "sdpa": Variant(make_sdpa),
    "cudnn": Variant(make_cudnn, gpu_only=True),
    "triton": Variant(make_triton, gpu_only=True),
    "flex": Variant(make_flex, one_size=True),
    "colreduce": Variant(make_colreduce, gpu_only=True, rounds=True),
    "full": Variant(make_full, ours=True),
    "sampled": Variant(make_sampled, ours=True),
    "band": Variant(make_band, ours=True),
    "groups": Variant(make_groups, ours=True),
    "fused": Variant(make_fused, ours=True),
}


def dense_bytes(query_heads: int, tokens: int) -> int:
    """Returns the peak memory of the dense variants: three maps of 4 bytes a score, and 12 bytes a pair of tokens."""
    return tokens**2 * (12 * query_heads + 12)


def why_not(variant: Variant, shape: Shape, tokens: int, device: torch.device) -> str | None:
    """Returns the reason to leave a variant out at this size, or None."""
    if variant.gpu_only and device.type != "cuda":
        return "needs a GPU"
    needed = dense_bytes(shape.query_heads, tokens)
    if variant.dense and needed > MEMORY_SHARE * available_bytes(device):
        return f"needs {needed / 2**30:,.1f} GiB"
    return None


# ---- the least work of a variant -------------------------------------------------------------------------------------


class Work(NamedTuple):
    flops: int
    """The floating-point operations of the products q k^T and A v."""
    exps: int
    bytes: int
    """The size of inputs that are read once and of results that are written once."""


def work(name: str, shape: Shape, tokens: int) -> Work | None:
    """Returns the work of a variant; None for the variants whose cost is that of the maps."""
    heads, key_heads, size, dtype = shape
    pairs = heads * tokens * (tokens + 1) // 2
    (lo, hi), share = HORIZON, math.ceil(0.3 * heads)
    band = heads * len({*range(WINDOW), *range(lo, hi + 1)}) * tokens  # scores
    group_band = share * (WINDOW + hi - lo + 1) * tokens
    sampled = heads * min(SPAN_ROWS, tokens) * (tokens + 1) // 2  # rows spread evenly see half of the keys on average
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
        "sampled": Work(2 * size * (sampled + band), sampled + band, inputs + 3 * row),
        "band": Work(2 * size * band, band, inputs + 3 * row),
        "groups": Work(
            2 * size * group_band, group_band, 2 * share * queries // heads + keys + 2 * share * row // heads
        ),
        "fused": Work(4 * size * pairs + 2 * size * band, pairs + band, forward + 3 * row),
    }.get(name)
