"""WAAD and FAI from the log-sum-exp: only the part of each map is computed that the window and the horizon reach."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm_kernels.attention.layout import Layout
from rhythm_kernels.attention.options import Options
from rhythm_kernels.attention.triton_scores import (
    LOG2E,
    common_arguments,
    common_constants,
    is_between,
    load_rows,
    load_tile,
    program_place,
    score_tile,
)
from rhythm_kernels.attention.triton_tiles import Tile


@triton.jit(do_not_specialize=["tokens", "batch", "query_heads", "group", "sliding_window", "window"])
def waad_kernel(
    q,
    k,
    first,
    rows,
    sinks,
    lse,  # [B, HQ, T]
    waad,  # [B, HQ, T]
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
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_SINKS: tl.constexpr,
):
    """Row tile fixed, the keys of its windows streamed: W x row sum - sum_s A (W - (t - s)) over t - s < W."""
    tile, b, head = program_place(batch, query_heads)
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    active, lower = load_rows(first + b * tokens, rows + b * tokens, t, tokens, sliding_window)
    out = (b * query_heads + head) * tokens + t
    log_sum = tl.load(lse + out, mask=active, other=0.0) * LOG2E

    lower = tl.maximum(lower, t - window + 1)
    begin = tl.min(lower)
    end = tl.max(tl.where(active, t + 1, 0))
    q += b * stride_qb + head * stride_qh + (tile * BLOCK_M).to(tl.int64) * stride_qt
    k += b * stride_kb + head // group * stride_kh + begin.to(tl.int64) * stride_kt
    query = load_tile(q, stride_qt, tile * BLOCK_M, end, HEAD_DIM, BLOCK_D, BLOCK_M)
    nearness = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = load_tile(k, stride_kt, start, end, HEAD_DIM, BLOCK_D, BLOCK_N)
        scores = score_tile(query, key, factor, cap, USE_SOFTCAP)
        weights = tl.exp2(scores - log_sum[:, None])
        near = ((window - t + start)[:, None] + j[None, :]).to(tl.float32)  # W - (t - s)
        nearness += tl.sum(tl.where(is_between(lower, start + j, t), weights * near, 0.0), 1)
        k += BLOCK_N * stride_kt

    row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    if USE_SINKS:
        row_sum -= tl.exp2(tl.load(sinks + head) * LOG2E - log_sum)
    tl.store(waad + out, tl.where(active, window * row_sum - nearness, 0.0), mask=t < tokens)


@triton.jit(do_not_specialize=["tokens", "batch", "query_heads", "group", "sliding_window", "lo", "hi"])
def fai_kernel(
    q,
    k,
    first,
    last,
    rows,
    next_row,  # [B, T]
    counts,  # [B, T]
    lse,  # [B, HQ, T]
    fai,  # [B, HQ, T]
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
    lo,
    hi,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
):
    """Column tile fixed, the rows that look at it from lo..hi streamed in order: sum_t A[t, s] / counts[s]."""
    tile, b, head = program_place(batch, query_heads)
    s = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_M)
    first += b * tokens
    rows += b * tokens
    lse += (b * query_heads + head) * tokens

    # from the first row of R behind s + lo to the last row that sees one of the columns
    begin = tl.load(next_row + b * tokens + tl.minimum(tile * BLOCK_N + lo, tokens - 1))
    end = tl.max(tl.load(last + b * tokens + s, mask=s < tokens, other=-1)) + 1
    end = tl.minimum(end, (tile + 1) * BLOCK_N + hi)
    q += b * stride_qb + head * stride_qh + begin.to(tl.int64) * stride_qt
    k += b * stride_kb + head // group * stride_kh + (tile * BLOCK_N).to(tl.int64) * stride_kt
    key_end = tl.where(begin < end, tokens, 0)
    key = load_tile(k, stride_kt, tile * BLOCK_N, key_end, HEAD_DIM, BLOCK_D, BLOCK_N)
    received = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # summed over its rows once, at the end
    for start in range(begin, end, BLOCK_M):
        t = start + i
        active, lower = load_rows(first, rows, t, tokens, sliding_window)
        log_sum = tl.load(lse + t, mask=active, other=0.0) * LOG2E
        query = load_tile(q, stride_qt, start, end, HEAD_DIM, BLOCK_D, BLOCK_M)
        scores = score_tile(query, key, factor, cap, USE_SOFTCAP)
        counted = is_between(tl.maximum(lower, t - hi), s, t - lo)
        received += tl.where(counted, tl.exp2(scores - log_sum[:, None]), 0.0)
        q += BLOCK_M * stride_qt

    count = tl.load(counts + b * tokens + s, mask=s < tokens, other=1)
    out = (b * query_heads + head) * tokens + s
    tl.store(fai + out, tl.sum(received, 0) / tl.maximum(count, 1).to(tl.float32), mask=s < tokens)


def waad_pass(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, tile: Tile) -> Tensor:
    """WAAD [B, HQ, T] fp32, 0 outside R."""
    batch, query_heads, tokens, _ = q.shape
    waad = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    waad_kernel[(triton.cdiv(tokens, tile.block_m) * batch * query_heads,)](
        q,
        k,
        layout.first,
        layout.rows,
        options.sinks,
        lse,
        waad,
        *common_arguments(q, k, options),
        options.window,
        **common_constants(q, options, tile),
        USE_SINKS=options.sinks is not None,
    )
    return waad


def fai_pass(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, tile: Tile) -> Tensor:
    """FAI [B, HQ, T] fp32, 0 where no row looks back."""
    batch, query_heads, tokens, _ = q.shape
    fai = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lo, hi = (tokens if bound is None else min(bound, tokens) for bound in options.horizon)
    fai_kernel[(triton.cdiv(tokens, tile.block_n) * batch * query_heads,)](
        q,
        k,
        layout.first,
        layout.last,
        layout.rows,
        layout.next_row()[:, :-1].contiguous(),
        layout.rows_looking_back(options.horizon),
        lse,
        fai,
        *common_arguments(q, k, options),
        lo,
        hi,
        **common_constants(q, options, tile),
    )
    return fai
