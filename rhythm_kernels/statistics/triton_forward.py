"""The forward pass: it reads each row's visible keys once, for its log-sum-exp, its mean distance and its output.

Without v it computes only the rows of R; with v it is the fused forward and computes all rows.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, SIZE (D) the head size of q and k, SIZE_V (Dv) that of v;
S sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm_kernels.statistics.layout import SPAN_UNIT, Layout
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.triton_scores import (
    LN2,
    LOG2E,
    LOWEST,
    NOWHERE,
    aligned,
    is_within,
    load_parts,
    load_place,
    load_tile,
    multiply_parts,
    padded_size,
    score_arguments,
    scores_of,
    size_parts,
    stride_arguments,
    weights_of,
)
from rhythm_kernels.statistics.triton_tiles import Tile

PLACE_FIELDS = tl.constexpr(5)  # of a row of Layout.tiles
PER_TOKEN = tl.constexpr(1 / SPAN_UNIT)
BROKEN = tl.constexpr(-(1 << 62))  # in place of the sum of a tile with a distance that is not finite
SPAN_BLOCK = 128  # a program of `span_kernel` adds so many tiles at a time


@triton.jit
def _key_tiles(
    highest,  # [BLOCK_M] the largest score so far; with USE_LSE the log-sum-exp
    total,  # [BLOCK_M] sum of exp2(score - highest)
    distance,  # [BLOCK_M] the same sum, weighted with t - s
    output,  # [BLOCK_M, BLOCK_DV] the same sum, weighted with v
    query,
    k,  # points to token 0
    v,
    stride_kt,
    stride_vt,
    begin,
    end,
    t,
    sliding_window,
    factor,
    cap,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_LSE: tl.constexpr,
    USE_SPAN: tl.constexpr,
    USE_OUT: tl.constexpr,
):
    """Adds the keys begin..end to the sums. WHOLE: they are whole tiles that every row sees."""
    j = tl.arange(0, BLOCK_N)
    k += begin.to(tl.int64) * stride_kt
    if USE_OUT:
        v += begin.to(tl.int64) * stride_vt
    for start in range(begin, end, BLOCK_N):
        key = load_parts(k, stride_kt, start, end, SIZE, BLOCK_D, REST_D, BLOCK_N, WHOLE)
        scores = scores_of(multiply_parts(query, key, REST_D), factor, cap, SCALE_FIRST, USE_SOFTCAP)
        if not WHOLE:
            past = t[:, None] - (start + j)[None, :]  # tokens
            visible = is_within(past, sliding_window) if USE_WINDOW else past >= 0
            scores = tl.where(visible, scores, float("-inf"))
        if not USE_LSE:
            tile_highest = tl.max(scores, 1)
            if not SCALE_FIRST:
                tile_highest *= factor
            new_highest = tl.maximum(highest, tile_highest)
            shrink = tl.exp2(highest - new_highest)
            highest = new_highest
            total *= shrink
            if USE_SPAN:
                distance *= shrink
            if USE_OUT:
                output *= shrink[:, None]
        weights = weights_of(scores, factor, highest, SCALE_FIRST)
        tile_total = tl.sum(weights, 1)
        total += tile_total
        if USE_SPAN:  # t - s = (t - start) - j: one FMA a score
            distance += (t - start).to(tl.float32) * tile_total - tl.sum(weights * j.to(tl.float32)[None, :], 1)
        if USE_OUT:
            value = load_tile(v, stride_vt, start, end, PADDED_V, BLOCK_DV, BLOCK_N, WHOLE)
            output = tl.dot(weights.to(value.dtype), value, output, input_precision="ieee")
            v += BLOCK_N * stride_vt
        k += BLOCK_N * stride_kt
    return highest, total, distance, output


@triton.jit
def span_units(distance):
    """Returns finite mean distances as int64 multiples of `SPAN_UNIT`, rounded to the nearest, halves to even."""
    units = distance * PER_TOKEN
    below = tl.floor(units)
    rest, number = units - below, below.to(tl.int64)
    return number + ((rest > 0.5) | ((rest == 0.5) & (number % 2 != 0))).to(tl.int64)


@triton.jit(
    do_not_specialize=[
        *("stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_kt", "stride_vb", "stride_vh"),
        *("stride_vt", "tokens", "query_heads", "key_heads", "sliding_window", "slots"),
    ]
)
def forward_kernel(
    q,  # [B, HQ, T, SIZE]
    k,  # [B, H, T, SIZE]
    v,  # [B, H, T, SIZE_V]
    tiles,  # [tiles, PLACE_FIELDS], of `Layout.tiles`
    rows,  # [B, T]
    sinks,  # [HQ]
    lse,  # [B, HQ, T], read with USE_LSE, else written
    totals,  # [HQ, slots]: each tile's sum of its rows' mean distances, in `span_units`, or BROKEN
    out,  # [B, HQ, T, SIZE_V], contiguous
    stride_qb,  # all strides are in UNITs
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    tokens,
    query_heads,
    key_heads,
    sliding_window,
    slots,
    factor,
    cap,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    SIZE_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_SINKS: tl.constexpr,
    USE_LSE: tl.constexpr,
    USE_SPAN: tl.constexpr,
    USE_OUT: tl.constexpr,
):
    """Computes one tile of rows of one query head, by an online softmax over the keys that they see."""
    batch, row, first, last, sequence, head = load_place(tiles, query_heads, PLACE_FIELDS)
    key_head = head // (query_heads // key_heads)
    stride_qt, stride_kt, stride_vt = stride_qt * UNIT, stride_kt * UNIT, stride_vt * UNIT
    t = row + tl.arange(0, BLOCK_M)
    in_response = tl.load(rows + batch * tokens + t, mask=t < last, other=0) != 0
    active = (t < last) & (sequence >= 0) if USE_OUT else in_response
    # some row sees each of the keys begin..end; every active row sees those of the whole tiles whole_begin..whole_end
    begin = first
    whole_begin = first
    if USE_WINDOW:
        lower = t - sliding_window + 1
        begin = tl.maximum(tl.min(tl.where(active, lower, NOWHERE)), first)
        whole_begin = begin + tl.cdiv(tl.maximum(tl.max(tl.where(active, lower, 0)) - begin, 0), BLOCK_N) * BLOCK_N
    end = tl.max(tl.where(active, t + 1, 0))
    whole_end = begin + tl.maximum(tl.min(tl.where(active, t + 1, NOWHERE)) - begin, 0) // BLOCK_N * BLOCK_N
    whole_end = tl.minimum(whole_end, end)  # without an active row nothing is seen
    whole_begin = tl.minimum(whole_begin, whole_end)

    q += (batch * stride_qb + head * stride_qh) * UNIT + row.to(tl.int64) * stride_qt
    k += (batch * stride_kb + key_head * stride_kh) * UNIT
    query = load_parts(q, stride_qt, row, end, SIZE, BLOCK_D, REST_D, BLOCK_M)
    at = (batch * query_heads + head) * tokens + t
    total = tl.zeros([BLOCK_M], tl.float32)
    looked_back = tl.zeros([BLOCK_M], tl.float32)
    output = total
    # v has zeros behind its head size; before Triton 3.7, tl.cdiv of constants is not a constant
    PADDED_V: tl.constexpr = (SIZE_V + UNIT - 1) // UNIT * UNIT
    if USE_OUT:
        v += (batch * stride_vb + key_head * stride_vh) * UNIT
        output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if USE_LSE:
        highest = tl.load(lse + at, mask=active, other=0.0) * LOG2E
    else:
        highest = tl.full([BLOCK_M], LOWEST, tl.float32)
        if USE_SINKS:  # a sink counts as a first key without a position
            sink = tl.load(sinks + head) * LOG2E
            highest = tl.zeros([BLOCK_M], tl.float32) + tl.where(sink < LOWEST, LOWEST, sink)
            total += 1.0

    if USE_WINDOW:
        highest, total, looked_back, output = _key_tiles(
            highest, total, looked_back, output, query, k, v, stride_kt, stride_vt, begin, whole_begin,
            t, sliding_window, factor, cap, SIZE, BLOCK_D, REST_D, PADDED_V, BLOCK_DV, BLOCK_N,
            False, SCALE_FIRST, USE_WINDOW, USE_SOFTCAP, USE_LSE, USE_SPAN, USE_OUT,
        )  # fmt: skip
    highest, total, looked_back, output = _key_tiles(
        highest, total, looked_back, output, query, k, v, stride_kt, stride_vt, whole_begin, whole_end,
        t, sliding_window, factor, cap, SIZE, BLOCK_D, REST_D, PADDED_V, BLOCK_DV, BLOCK_N,
        True, SCALE_FIRST, USE_WINDOW, USE_SOFTCAP, USE_LSE, USE_SPAN, USE_OUT,
    )  # fmt: skip
    highest, total, looked_back, output = _key_tiles(
        highest, total, looked_back, output, query, k, v, stride_kt, stride_vt, whole_end, end,
        t, sliding_window, factor, cap, SIZE, BLOCK_D, REST_D, PADDED_V, BLOCK_DV, BLOCK_N,
        False, SCALE_FIRST, USE_WINDOW, USE_SOFTCAP, USE_LSE, USE_SPAN, USE_OUT,
    )  # fmt: skip

    if not USE_LSE:
        total = tl.where(active, total, 1.0)
        row_lse = (highest + tl.log2(total)) * LN2
        tl.store(lse + at, tl.where(in_response, row_lse, 0.0), mask=t < last)
        looked_back /= total
    if USE_SPAN:
        looked_back = tl.where(in_response, looked_back, 0.0)
        is_finite = tl.abs(looked_back) < float("inf")
        total_units = tl.sum(tl.where(is_finite, span_units(tl.where(is_finite, looked_back, 0.0)), 0), 0)
        slot = first_slot(batch, first, sequence, tokens, BLOCK_M) + (row - first) // BLOCK_M
        is_whole = tl.min(is_finite.to(tl.int32), 0) > 0
        tl.store(totals + head * slots + slot, tl.where(is_whole, total_units, BROKEN), mask=sequence >= 0)
    if USE_OUT:
        d = tl.arange(0, BLOCK_DV)
        inside = (t < last)[:, None] & (d < SIZE_V)[None, :]
        tl.store(out + at[:, None] * SIZE_V + d[None, :], output / total[:, None], mask=inside)


@triton.jit
def first_slot(batch, begin, sequence, tokens, BLOCK_M: tl.constexpr):
    """Returns the slot of a sequence's first tile. Every tile has a slot of its own; some slots stay empty."""
    return (batch * tokens + begin) // BLOCK_M + sequence


@triton.jit(do_not_specialize=["tokens", "heads", "slots"])
def span_kernel(
    totals,  # [HQ, slots], of `forward_kernel`
    bounds,  # [S, 3] int64, `Layout.table`
    row_counts,  # [S] int64
    span,  # [S, HQ]
    tokens,
    heads,
    slots,
    BLOCK_M: tl.constexpr,  # tokens of a tile
    BLOCK: tl.constexpr,
):
    """Computes the span of one sequence and head, with the bits of `mean_over_rows`."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    bounds += sequence * 3
    batch, begin, end = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
    row_count = tl.load(row_counts + sequence)
    totals += head.to(tl.int64) * slots + first_slot(batch, begin, sequence, tokens, BLOCK_M)
    i = tl.arange(0, BLOCK)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    units, broken = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int32)
    for at in range(0, tiles, BLOCK):
        total = tl.load(totals + at + i, mask=at + i < tiles, other=0)
        broken |= (total == BROKEN).to(tl.int32)
        units += total
    mean = tl.sum(units, 0).to(tl.float64) / PER_TOKEN / tl.maximum(row_count, 1).to(tl.float64)
    mean = tl.where(tl.max(broken, 0) > 0, float("nan"), mean.to(tl.float32))
    tl.store(span + sequence.to(tl.int64) * heads + head, mean)


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor | None, lse: Tensor | None, layout: Layout, options: Options, tile: Tile
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns lse fp32 [B, HQ, T], 0 outside R; span fp32 [S, HQ] or None; out [B, HQ, T, Dv], 0 in padding, or None.

    q [B, HQ, T, D] and k [B, H, T, D] are `aligned`. A given lse [B, HQ, T] is returned as it is.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    batch, query_heads, tokens, size = q.shape
    row_lse = empty(batch, query_heads, tokens) if lse is None else lse
    slots = batch * tokens // tile.block_m + layout.sequences + 1
    totals = empty(query_heads, slots, dtype=torch.int64) if options.need_span else None
    out, size_v = None, 16
    if v is not None:
        size_v = v.shape[-1]
        out, v = empty(batch, query_heads, tokens, size_v, dtype=v.dtype), aligned(v)
    block_d, rest_d = size_parts(size)
    tiles = layout.tiles(tile.block_m, "past", padding=True)
    forward_kernel[(len(tiles) * query_heads,)](
        v=v,
        tiles=tiles,
        rows=layout.rows,
        lse=row_lse,
        totals=totals,
        out=out,
        **score_arguments(q, k, options),
        **stride_arguments("v", v),
        sliding_window=tokens if options.sliding_window is None else min(options.sliding_window, tokens),
        slots=slots,
        BLOCK_D=block_d,
        REST_D=rest_d,
        SIZE_V=size_v,
        BLOCK_DV=padded_size(size_v),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        USE_WINDOW=options.sliding_window is not None,
        USE_LSE=lse is not None,
        USE_SPAN=options.need_span,
        USE_OUT=v is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.max_registers if options.softcap is None else None,  # a soft cap takes more and would spill
    )
    return row_lse, None if totals is None else mean_spans(totals, layout, tile.block_m), out


def mean_spans(totals: Tensor, layout: Layout, block_m: int) -> Tensor:
    """Returns the spans, fp32 [S, HQ], from the sums of `forward_kernel` over tiles of block_m rows.

    totals: int64 [HQ, slots].
    """
    heads, slots = totals.shape
    span = torch.empty((layout.sequences, heads), dtype=torch.float32, device=totals.device)
    span_kernel[(layout.sequences * heads,)](
        totals=totals,
        bounds=layout.table,
        row_counts=layout.row_counts(),
        span=span,
        tokens=layout.rows.shape[1],
        heads=heads,
        slots=slots,
        BLOCK_M=block_m,
        BLOCK=SPAN_BLOCK,
        num_warps=1,
    )
    return span
