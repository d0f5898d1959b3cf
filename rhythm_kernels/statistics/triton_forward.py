"""The forward pass: it reads each row's visible keys once, for its log-sum-exp, its mean distance and its output.

Without v it computes only the rows of R; with v it is the fused forward and computes all rows. With a given log-sum-exp
it may compute only the rows that the spans are read from.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, SIZE (D) the head size of q and k, SIZE_V (Dv) that of v;
S sequences.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm_kernels.checks import SPAN_BLOCK
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.spans import leaves_out_rows, span_sample
from rhythm_kernels.statistics.triton_scores import (
    LN2,
    LOG2E,
    LOWEST,
    NO_WEIGHT,
    NOWHERE,
    aligned,
    is_within,
    load_parts,
    load_place,
    load_tile,
    multiply_parts,
    padded_size,
    rounded_product,
    score_arguments,
    scores_of,
    size_parts,
    stride_arguments,
    weights_of,
)
from rhythm_kernels.statistics.triton_spans import (
    BROKEN,
    PLACE_FIELDS,
    first_slot,
    mean_spans,
    sampled_mean_spans,
    span_units,
)
from rhythm_kernels.statistics.triton_tiles import Tile

NOTHING: Mapping[str, Tensor] = MappingProxyType({})

# A warp holds a row of scores in LANES threads, pairs of neighbours in turns. Each keeps an online softmax of its own,
# [M, LANES], and they are joined at the end: that spares every tile its shuffles. LANES 0 keeps one of a row, [M].


@triton.jit
def _by_lane(x, LANES: tl.constexpr):
    """Returns x [M, N] as [M, N / (2 LANES), LANES, 2]."""
    if LANES > 0:
        x = tl.reshape(x, [x.shape[0], x.shape[1] // (2 * LANES), LANES, 2])
    return x


@triton.jit
def _past(distance, LANES: tl.constexpr):
    """Returns the distances [M] of rows from a tile's first key; by lane, from the lane's first key."""
    distance = distance.to(tl.float32)
    return distance if LANES == 0 else distance[:, None] - 2.0 * tl.arange(0, LANES)[None, :].to(tl.float32)


@triton.jit
def _ahead(BLOCK_N: tl.constexpr, LANES: tl.constexpr):
    """Returns how far a tile's keys are ahead of the first, [1, N]; by lane, ahead of the lane's first.

    By lane they are the same in all lanes: constants, which take no registers.
    """
    if LANES == 0:
        ahead = tl.arange(0, BLOCK_N)[None, :]
    else:
        pairs = tl.arange(0, BLOCK_N // (2 * LANES)) * 2 * LANES
        ahead = pairs[None, :, None, None] + tl.arange(0, 2)[None, None, None, :]
    return ahead.to(tl.float32)


@triton.jit
def _beside_keys(x, LANES: tl.constexpr):
    """Returns what is kept of rows, so that it can be used with scores `_by_lane`."""
    return x[:, None] if LANES == 0 else x[:, None, :, None]


@triton.jit
def _sum_of(x, LANES: tl.constexpr):
    """Returns the sums of x `_by_lane`: neighbours last, so that products are added by FMA."""
    return tl.sum(x, 1) if LANES == 0 else tl.sum(tl.sum(x, 1), 2)


@triton.jit
def _sum_of_products(x, y, LANES: tl.constexpr, ROUNDED: tl.constexpr):
    """Returns the sums of x y, both `_by_lane`. ROUNDED: with a `rounded_product`."""
    return _sum_of(rounded_product(x, y) if ROUNDED else x * y, LANES)


@triton.jit
def _highest_of(x, LANES: tl.constexpr):
    """Returns the largest elements of x `_by_lane`."""
    return tl.max(x, 1) if LANES == 0 else tl.max(tl.max(x, 1), 2)


@triton.jit
def _key_tiles(
    highest,  # [BLOCK_M] or by lane: the largest score so far; with USE_LSE the log-sum-exp
    total,  # like `highest`: sum of exp2(score - highest)
    distance,  # like `highest`: the same sum, weighted with t - s
    output,  # [BLOCK_M, BLOCK_DV] the same sum, weighted with v
    surprise,  # like `highest`: the same sum, weighted with highest - score
    largest,  # like `highest`: the largest score of a key
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
    USE_ENTROPY: tl.constexpr,
    USE_LARGEST: tl.constexpr,
    IS_PART: tl.constexpr,  # the rows may see keys from `end` on
    LANES: tl.constexpr,
):
    """Adds the keys begin..end to the sums. WHOLE: they are whole tiles that every row sees."""
    ROUNDED: tl.constexpr = query[0].dtype == tl.float32  # a thread may hold a single score of an fp32 tile
    j = tl.arange(0, BLOCK_N)
    k += begin.to(tl.int64) * stride_kt
    if USE_OUT:
        v += begin.to(tl.int64) * stride_vt
    for start in range(begin, end, BLOCK_N):
        key = load_parts(k, stride_kt, start, end, SIZE, BLOCK_D, REST_D, BLOCK_N, WHOLE)
        scores = scores_of(multiply_parts(query, key, REST_D), factor, cap, SCALE_FIRST, USE_SOFTCAP)
        if not WHOLE:
            at = start + j
            if IS_PART:
                at = tl.where(at < end, at, NOWHERE)
            past = t[:, None] - at[None, :]  # tokens
            visible = is_within(past, sliding_window) if USE_WINDOW else past >= 0
            scores = tl.where(visible, scores, float("-inf"))
        scores = _by_lane(scores, LANES)
        if USE_LARGEST or not USE_LSE:
            tile_highest = _highest_of(scores, LANES)
            if not SCALE_FIRST:
                tile_highest *= factor
        if USE_LARGEST:
            largest = tl.maximum(largest, tile_highest)
        if not USE_LSE:
            new_highest = tl.maximum(highest, tile_highest)
            shrink = tl.exp2(highest - new_highest)
            if USE_ENTROPY:
                surprise = (surprise + (new_highest - highest) * total) * shrink
            highest = new_highest
            total *= shrink
            if USE_SPAN:
                distance *= shrink
            if USE_OUT:
                output *= shrink[:, None]
        weights = weights_of(scores, factor, _beside_keys(highest, LANES), SCALE_FIRST)
        tile_total = _sum_of(weights, LANES)
        total += tile_total
        if USE_SPAN:  # t - s = (t - start) - j: one FMA a score
            ahead = _sum_of_products(weights, _ahead(BLOCK_N, LANES), LANES, ROUNDED)
            distance += _past(t - start, LANES) * tile_total - ahead
        if USE_ENTROPY:
            below = _beside_keys(highest, LANES) - (scores if SCALE_FIRST else scores * factor)
            below = tl.minimum(below, NO_WEIGHT)  # a weight of 0 times an infinity would be NaN
            surprise += _sum_of_products(weights, below, LANES, ROUNDED)
        if USE_OUT:
            value = load_tile(v, stride_vt, start, end, PADDED_V, BLOCK_DV, BLOCK_N, WHOLE)
            output = tl.dot(weights.to(value.dtype), value, output, input_precision="ieee")
            v += BLOCK_N * stride_vt
        k += BLOCK_N * stride_kt
    return highest, total, distance, output, surprise, largest


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
    tiles,  # [tiles, PLACE_FIELDS], of `Layout.tiles`, or `SpanSample.cut`
    rows,  # [B, T]
    sinks,  # [HQ]
    lse,  # [B, HQ, T], read with USE_LSE, else written
    totals,  # [parts, HQ, slots]: for TOTAL_ROWS rows the sum of their mean distances, in `span_units`, or BROKEN
    row_entropy,  # [B, HQ, T]
    largest_score,  # [B, HQ, T]
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
    USE_ENTROPY: tl.constexpr,
    USE_LARGEST: tl.constexpr,
    TOTAL_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,  # program (i, n) reads the keys n SPLIT .. (n + 1) SPLIT of its sequence; 0: (i, 0) reads all
    LANES: tl.constexpr,
):
    """Computes one tile of rows of one query head, by an online softmax over the keys that they see."""
    batch, row, first, last, sequence, head = load_place(tiles, query_heads, PLACE_FIELDS)
    keys_begin = first
    if SPLIT > 0:  # at places of the sequence, so that its spans have the same bits in any batch
        keys_begin += tl.program_id(1) * SPLIT
        keys_end = keys_begin + SPLIT
        totals += tl.program_id(1).to(tl.int64) * query_heads * slots
    key_head = head // (query_heads // key_heads)
    stride_qt, stride_kt, stride_vt = stride_qt * UNIT, stride_kt * UNIT, stride_vt * UNIT
    t = row + tl.arange(0, BLOCK_M)
    in_response = tl.load(rows + batch * tokens + t, mask=t < last, other=0) != 0
    active = (t < last) & (sequence >= 0) if USE_OUT else in_response
    # some row sees each of the keys begin..end; every active row sees those of the whole tiles whole_begin..whole_end
    begin = keys_begin
    whole_begin = keys_begin
    if USE_WINDOW:
        lower = t - sliding_window + 1
        begin = tl.maximum(tl.min(tl.where(active, lower, NOWHERE)), keys_begin)
        whole_begin = begin + tl.cdiv(tl.maximum(tl.max(tl.where(active, lower, 0)) - begin, 0), BLOCK_N) * BLOCK_N
    row_end = tl.max(tl.where(active, t + 1, 0))
    whole_end = tl.min(tl.where(active, t + 1, NOWHERE))
    end = row_end
    if SPLIT > 0:
        end, whole_end = tl.minimum(end, keys_end), tl.minimum(whole_end, keys_end)
    whole_end = begin + tl.maximum(whole_end - begin, 0) // BLOCK_N * BLOCK_N
    whole_end = tl.minimum(whole_end, end)  # nothing is seen without an active row, or if all see other keys
    whole_begin = tl.minimum(whole_begin, whole_end)

    q += (batch * stride_qb + head * stride_qh) * UNIT + row.to(tl.int64) * stride_qt
    k += (batch * stride_kb + key_head * stride_kh) * UNIT
    query = load_parts(q, stride_qt, row, row_end, SIZE, BLOCK_D, REST_D, BLOCK_M)
    at = (batch * query_heads + head) * tokens + t
    total = tl.zeros([BLOCK_M] if LANES == 0 else [BLOCK_M, LANES], tl.float32)
    looked_back, output, surprise, largest = total, total, total, total
    if USE_LARGEST:
        largest = total + float("-inf")
    # v has zeros behind its head size; before Triton 3.7, tl.cdiv of constants is not a constant
    PADDED_V: tl.constexpr = (SIZE_V + UNIT - 1) // UNIT * UNIT
    if USE_OUT:
        v += (batch * stride_vb + key_head * stride_vh) * UNIT
        output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if USE_LSE:
        log_sum = tl.load(lse + at, mask=active, other=0.0) * LOG2E
        highest = total + (log_sum if LANES == 0 else log_sum[:, None])
    else:
        highest = total + LOWEST
        if USE_SINKS:  # a sink counts as a first key without a position
            sink = tl.load(sinks + head) * LOG2E
            highest = total + tl.where(sink < LOWEST, LOWEST, sink)
            total += 1.0 if LANES == 0 else tl.where(tl.arange(0, LANES) == 0, 1.0, 0.0)[None, :]

    if USE_WINDOW:
        highest, total, looked_back, output, surprise, largest = _key_tiles(
            highest, total, looked_back, output, surprise, largest, query, k, v, stride_kt, stride_vt,
            begin, whole_begin, t, sliding_window, factor, cap, SIZE, BLOCK_D, REST_D, PADDED_V, BLOCK_DV, BLOCK_N,
            False, SCALE_FIRST, USE_WINDOW, USE_SOFTCAP, USE_LSE, USE_SPAN, USE_OUT, USE_ENTROPY, USE_LARGEST,
            SPLIT > 0, LANES,
        )  # fmt: skip
    highest, total, looked_back, output, surprise, largest = _key_tiles(
        highest, total, looked_back, output, surprise, largest, query, k, v, stride_kt, stride_vt,
        whole_begin, whole_end, t, sliding_window, factor, cap, SIZE, BLOCK_D, REST_D, PADDED_V, BLOCK_DV, BLOCK_N,
        True, SCALE_FIRST, USE_WINDOW, USE_SOFTCAP, USE_LSE, USE_SPAN, USE_OUT, USE_ENTROPY, USE_LARGEST,
        SPLIT > 0, LANES,
    )  # fmt: skip
    highest, total, looked_back, output, surprise, largest = _key_tiles(
        highest, total, looked_back, output, surprise, largest, query, k, v, stride_kt, stride_vt,
        whole_end, end, t, sliding_window, factor, cap, SIZE, BLOCK_D, REST_D, PADDED_V, BLOCK_DV, BLOCK_N,
        False, SCALE_FIRST, USE_WINDOW, USE_SOFTCAP, USE_LSE, USE_SPAN, USE_OUT, USE_ENTROPY, USE_LARGEST,
        SPLIT > 0, LANES,
    )  # fmt: skip

    if not USE_LSE:
        if LANES > 0:
            lane_highest, highest = highest, tl.max(highest, 1)
            shrink = tl.exp2(lane_highest - highest[:, None])
            if USE_ENTROPY:
                surprise += (highest[:, None] - lane_highest) * total
                surprise = tl.sum(rounded_product(surprise, shrink), 1)
            total, looked_back = tl.sum(rounded_product(total, shrink), 1), rounded_product(looked_back, shrink)
        total = tl.where(active, total, 1.0)
        row_lse = (highest + tl.log2(total)) * LN2
        tl.store(lse + at, tl.where(in_response, row_lse, 0.0), mask=t < last)
        if USE_ENTROPY:
            surprise = surprise / total + tl.log2(total)
            if USE_SINKS:  # the sink is a term of this sum, and no key
                below = highest + tl.log2(total) - tl.where(sink < LOWEST, LOWEST, sink)
                surprise -= tl.exp2(-below) * below
    elif LANES > 0:
        total, surprise = tl.sum(total, 1), tl.sum(surprise, 1)
    if USE_ENTROPY:
        tl.store(row_entropy + at, tl.where(in_response, surprise * LN2, 0.0), mask=t < last)
    if USE_LARGEST:  # a maximum passes over a NaN
        if LANES > 0:
            largest = tl.max(largest, 1)
        largest = tl.where(total == total, largest * LN2, float("nan"))
        tl.store(largest_score + at, tl.where(in_response, largest, 0.0), mask=t < last)
    if USE_SPAN:
        if LANES > 0:
            looked_back = tl.sum(looked_back, 1)
        if not USE_LSE:
            looked_back /= total
        looked_back = tl.where(in_response, looked_back, 0.0)
        is_finite = tl.abs(looked_back) < float("inf")
        units = tl.where(is_finite, span_units(tl.where(is_finite, looked_back, 0.0)), 0)
        slot = first_slot(batch, first, sequence, tokens, TOTAL_ROWS) + (row - first) // TOTAL_ROWS
        if TOTAL_ROWS == BLOCK_M:
            total_units = tl.sum(units, 0)
            is_whole = tl.min(is_finite.to(tl.int32), 0) > 0
            tl.store(totals + head * slots + slot, tl.where(is_whole, total_units, BROKEN), mask=sequence >= 0)
        else:
            for part in tl.static_range(BLOCK_M // TOTAL_ROWS):
                own = (t - row) // TOTAL_ROWS == part
                total_units = tl.sum(tl.where(own, units, 0), 0)
                is_whole = tl.min((is_finite | ~own).to(tl.int32), 0) > 0
                inside = (sequence >= 0) & (row + part * TOTAL_ROWS < last)
                to = totals + head * slots + slot + part
                tl.store(to, tl.where(is_whole, total_units, BROKEN), mask=inside)
    if USE_OUT:
        d = tl.arange(0, BLOCK_DV)
        inside = (t < last)[:, None] & (d < SIZE_V)[None, :]
        tl.store(out + at[:, None] * SIZE_V + d[None, :], output / total[:, None], mask=inside)


def forward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lse: Tensor | None,
    layout: Layout,
    options: Options,
    tile: Tile,
    sample_only: bool = False,
    row_values: Mapping[str, Tensor] = NOTHING,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns lse fp32 [B, HQ, T], 0 outside R; span fp32 [S, HQ] or None; out [B, HQ, T, Dv], 0 in padding, or None.

    q [B, HQ, T, D] and k [B, H, T, D] are `aligned`. A given lse [B, HQ, T] is returned as it is. With `sample_only`,
    for which lse is given and tile.block_m divides SPAN_BLOCK, only the rows of `options.span_rows` are read. The
    tensors of `row_values`, fp32 [B, HQ, T] by the names of `NEED_EVERY_KEY`, are filled.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    batch, query_heads, tokens, size = q.shape
    row_lse = empty(batch, query_heads, tokens) if lse is None else lse
    sample, total_rows = None, tile.block_m
    if options.need_span and leaves_out_rows(layout, options.span_rows):
        sample = span_sample(layout, options.span_rows)
        total_rows = min(total_rows, SPAN_BLOCK)  # so that the sums of a block can be chosen
    slots = batch * tokens // total_rows + layout.sequences + 1
    parts = 1
    if is_split := sample_only and sample is not None and tile.split is not None:
        parts = max(triton.cdiv(end - begin, tile.split) for _, begin, end in layout.bounds)
    totals = empty(parts, query_heads, slots, dtype=torch.int64) if options.need_span else None
    out, size_v = None, 16
    if v is not None:
        size_v = v.shape[-1]
        out, v = empty(batch, query_heads, tokens, size_v, dtype=v.dtype), aligned(v)
    block_d, rest_d = size_parts(size)
    if sample_only and sample is not None:
        key = ("sampled tiles", options.span_rows, tile.block_m)
        tiles = layout.keep(key, lambda: sample.cut(tile.block_m))
    else:
        tiles = layout.tiles(tile.block_m, "past", padding=True)
    forward_kernel[(len(tiles) * query_heads, parts)](
        v=v,
        tiles=tiles,
        rows=layout.rows,
        lse=row_lse,
        totals=totals,
        out=out,
        row_entropy=row_values.get("row_entropy"),
        largest_score=row_values.get("largest_score"),
        **score_arguments(q, k, options),
        **stride_arguments("v", v),
        sliding_window=options.sliding_window or tokens,
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
        USE_ENTROPY="row_entropy" in row_values,
        USE_LARGEST="largest_score" in row_values,
        TOTAL_ROWS=total_rows,
        SPLIT=tile.split if is_split else 0,
        LANES=tile.lanes if v is None else 0,  # an output is scaled by one maximum a row
        num_warps=tile.warps,
        num_stages=tile.stages,
        # a soft cap, and more statistics, take more and would spill
        maxnreg=tile.max_registers if options.softcap is None and not row_values else None,
    )
    if totals is None:
        return row_lse, None, out
    if sample is None:
        return row_lse, mean_spans(totals, layout, total_rows), out
    return row_lse, sampled_mean_spans(totals, layout, sample, total_rows), out
