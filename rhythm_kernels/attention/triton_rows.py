"""Row statistics in one pass over the visible keys: the log-sum-exp and the mean distance that a row looks back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm_kernels.attention.layout import Layout
from rhythm_kernels.attention.options import Options
from rhythm_kernels.attention.triton_scores import (
    LN2,
    LOG2E,
    LOWEST,
    NOWHERE,
    common_arguments,
    common_constants,
    is_between,
    load_rows,
    load_tile,
    program_place,
    score_tile,
)
from rhythm_kernels.attention.triton_tiles import Tile


@triton.jit
def _key_tiles(
    highest,  # [BLOCK_M] the largest score so far, or the lse
    total,  # [BLOCK_M] sum of exp2(score - highest)
    distance,  # [BLOCK_M] the same sum, weighted with t - s
    query,
    k,  # points to token `begin`
    stride_kt,
    begin,
    end,
    t,
    lower,
    factor,
    cap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_LSE: tl.constexpr,
    USE_SPAN: tl.constexpr,
):
    """Takes the keys begin..end into the sums; without MASKED every row must see all of them."""
    j = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        key = load_tile(k, stride_kt, start, end, HEAD_DIM, BLOCK_D, BLOCK_N)
        scores = score_tile(query, key, factor, cap, USE_SOFTCAP)
        if MASKED:
            scores = tl.where(is_between(lower, start + j, t), scores, float("-inf"))
        if not USE_LSE:
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            shrink = tl.exp2(highest - new_highest)
            highest = new_highest
            total *= shrink
            distance *= shrink
        weights = tl.exp2(scores - highest[:, None])
        tile_total = tl.sum(weights, 1)
        total += tile_total
        if USE_SPAN:  # t - s = (t - start) - j: one FMA a score
            distance += (t - start).to(tl.float32) * tile_total - tl.sum(weights * j.to(tl.float32)[None, :], 1)
        k += BLOCK_N * stride_kt
    return highest, total, distance, k


@triton.jit(do_not_specialize=["tokens", "batch", "query_heads", "group", "sliding_window"])
def row_kernel(
    q,
    k,
    first,
    rows,
    sinks,
    lse,  # [B, HQ, T], read with USE_LSE, else written
    distance,  # [B, HQ, T]
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    tokens,
    batch,
    query_heads,
    group,
    sliding_window,
    factor,
    cap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_SINKS: tl.constexpr,
    USE_LSE: tl.constexpr,
    USE_SPAN: tl.constexpr,
):
    """Row tile fixed, its visible keys streamed through an online softmax."""
    tile, b, head = program_place(batch, query_heads)
    tile = tl.cdiv(tokens, BLOCK_M) - 1 - tile  # long rows first
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    active, lower = load_rows(first + b * tokens, rows + b * tokens, t, tokens, sliding_window)
    out = (b * query_heads + head) * tokens + t

    # keys begin..end are seen by some row; full_begin..full_end, whole tiles of them, by every row of R
    begin = tl.min(lower)
    end = tl.max(tl.where(active, t + 1, 0))
    in_all = tl.min(tl.where(active, t + 1, NOWHERE)) - begin
    not_in_all = tl.max(tl.where(active, lower, 0)) - begin
    full_end = begin + tl.maximum(in_all, 0) // BLOCK_N * BLOCK_N
    full_begin = tl.minimum(begin + tl.cdiv(tl.maximum(not_in_all, 0), BLOCK_N) * BLOCK_N, full_end)

    q += b * stride_qb + head * stride_qh + (tile * BLOCK_M).to(tl.int64) * stride_qt
    k += b * stride_kb + head // group * stride_kh + begin.to(tl.int64) * stride_kt
    query = load_tile(q, stride_qt, tile * BLOCK_M, end, HEAD_DIM, BLOCK_D, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    looked_back = tl.zeros([BLOCK_M], tl.float32)
    if USE_LSE:
        highest = tl.load(lse + out, mask=active, other=0.0) * LOG2E
    else:
        highest = tl.full([BLOCK_M], LOWEST, tl.float32)
        if USE_SINKS:  # a first key without a position
            sink = tl.load(sinks + head) * LOG2E
            highest = tl.zeros([BLOCK_M], tl.float32) + tl.where(sink < LOWEST, LOWEST, sink)
            total += 1.0

    highest, total, looked_back, k = _key_tiles(
        highest, total, looked_back, query, k, stride_kt, begin, full_begin, t, lower, factor, cap,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, USE_SOFTCAP, USE_LSE, USE_SPAN,
    )  # fmt: skip
    highest, total, looked_back, k = _key_tiles(
        highest, total, looked_back, query, k, stride_kt, full_begin, full_end, t, lower, factor, cap,
        HEAD_DIM, BLOCK_D, BLOCK_N, False, USE_SOFTCAP, USE_LSE, USE_SPAN,
    )  # fmt: skip
    highest, total, looked_back, k = _key_tiles(
        highest, total, looked_back, query, k, stride_kt, full_end, end, t, lower, factor, cap,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, USE_SOFTCAP, USE_LSE, USE_SPAN,
    )  # fmt: skip

    if not USE_LSE:
        total = tl.where(active, total, 1.0)
        row_lse = (highest + tl.log2(total)) * LN2
        tl.store(lse + out, tl.where(active, row_lse, 0.0), mask=t < tokens)
        looked_back /= total
    if USE_SPAN:
        tl.store(distance + out, tl.where(active, looked_back, 0.0), mask=t < tokens)


def row_pass(
    q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """(lse, mean distance of each row or None), [B, HQ, T] fp32, 0 outside R; a given lse comes back as is."""
    batch, query_heads, tokens, _ = q.shape
    row_lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if lse is None else lse
    distance = torch.empty_like(row_lse) if options.need_span else None
    row_kernel[(triton.cdiv(tokens, tile.block_m) * batch * query_heads,)](
        q,
        k,
        layout.first,
        layout.rows,
        options.sinks,
        row_lse,
        distance,
        *common_arguments(q, k, options),
        **common_constants(q, options, tile),
        USE_SINKS=options.sinks is not None,
        USE_LSE=lse is not None,
        USE_SPAN=options.need_span,
    )
    return row_lse, distance
