"""WAAD and FAI from the log-sum-exp: only the part of each map is computed that the window and the horizon reach.

A program owns one tile of tokens of one query head. As rows, its tokens look at themselves and at the keys of their
windows before the tile (WAAD); as columns, they are looked at by themselves and by the rows behind the tile (FAI). Each
output is written by one program, in a fixed order. With known head groups, the programs of the other heads end at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm_kernels.attention.layout import Layout
from rhythm_kernels.attention.options import Options
from rhythm_kernels.attention.triton_scores import (
    LOG2E,
    NOWHERE,
    is_within,
    load_place,
    load_tile,
    multiply,
    padded_size,
    score_arguments,
    scores_of,
    weights_of,
)
from rhythm_kernels.attention.triton_tiles import BandTile

SUM_BLOCK = 256  # tokens a program of `sum_heads_kernel`


@triton.jit(do_not_specialize=["tokens", "query_heads", "key_heads", "sliding_window", "window", "lo", "hi"])
def band_kernel(
    q,
    k,
    tiles,
    rows,
    next_row,  # [B, T + 1]
    counts,  # [B, T]
    sinks,
    lse,  # [B, HQ, T]
    local,  # [sequences, HQ]
    global_,  # [sequences, HQ]
    waad,  # [B, HQ, T]; GROUPED: written for local heads only
    fai,  # [B, HQ, T]; GROUPED: sums over T(s), written for global heads only
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_ls,
    stride_lh,
    stride_gs,
    stride_gh,
    tokens,
    query_heads,
    key_heads,
    sliding_window,
    factor,
    cap,
    window,
    lo,
    hi,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BEFORE: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_SINKS: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Token tile and query head fixed."""
    batch, start, first, last, sequence, head = load_place(tiles, query_heads)
    is_local, is_global = True, True
    if GROUPED:
        is_local = tl.load(local + sequence * stride_ls + head * stride_lh) != 0
        is_global = tl.load(global_ + sequence * stride_gs + head * stride_gh) != 0
        if not (is_local | is_global):
            return
    i = tl.arange(0, BLOCK)
    s = start + i  # the tile's tokens, as columns and as rows
    rows += batch * tokens
    lse += (batch * query_heads + head) * tokens
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head // (query_heads // key_heads) * stride_kh
    active = tl.load(rows + s, mask=s < last, other=0) != 0
    log_sum = tl.load(lse + s, mask=active, other=0.0) * LOG2E
    row_end = tl.max(tl.where(active, s + 1, 0))
    window_end = tl.minimum(window, sliding_window)  # WAAD counts the distances 0 .. window_end - 1
    horizon = tl.maximum(tl.minimum(hi, sliding_window - 1) - lo + 1, 0)  # FAI counts lo .. lo + horizon - 1

    # rows behind the tile: from the first of R at a distance of lo to the last that is near enough
    after = tl.load(next_row + batch * (tokens + 1) + tl.minimum(start + tl.maximum(lo, BLOCK), tokens))
    after_end = tl.minimum(last, start + BLOCK + lo + horizon - 1)
    if GROUPED:
        after_end = tl.where(is_global, after_end, 0)

    key_end = tl.where((row_end > 0) | (after < after_end), last, 0)
    key = load_tile(k + start.to(tl.int64) * stride_kt, stride_kt, start, key_end, SIZE, BLOCK_D, BLOCK)
    query = load_tile(q + start.to(tl.int64) * stride_qt, stride_qt, start, row_end, SIZE, BLOCK_D, BLOCK)
    scores = scores_of(multiply(query, key), factor, cap, SCALE_FIRST, USE_SOFTCAP)
    weights = weights_of(scores, factor, log_sum, SCALE_FIRST)
    distance = i[:, None] - i[None, :]  # tokens
    to = (batch * query_heads + head) * tokens + s

    # selections come after exp2, since what is hidden may be NaN, and rows outside R go last
    if is_local:  # W x row sum - sum_s A (W - (t - s)) over t - s < W
        near = (window - i).to(tl.float32)[:, None] + i.to(tl.float32)[None, :]
        nearness = tl.sum(tl.where(is_within(distance, window_end), weights * near, 0.0), 1)
        before = tl.maximum(start - window_end + 1, first)
        k_before = k + before.to(tl.int64) * stride_kt
        for at in range(before, tl.where(row_end > 0, start, before), BLOCK_BEFORE):
            early = load_tile(k_before, stride_kt, at, start, SIZE, BLOCK_D, BLOCK_BEFORE)
            early_scores = scores_of(multiply(query, early), factor, cap, SCALE_FIRST, USE_SOFTCAP)
            early_weights = weights_of(early_scores, factor, log_sum, SCALE_FIRST)
            position = at + tl.arange(0, BLOCK_BEFORE)
            early_near = (window - s + at).to(tl.float32)[:, None] + (position - at).to(tl.float32)[None, :]
            early_distance = s[:, None] - tl.where(position < start, position, NOWHERE)[None, :]
            nearness += tl.sum(tl.where(is_within(early_distance, window_end), early_weights * early_near, 0.0), 1)
            k_before += BLOCK_BEFORE * stride_kt
        row_sum = tl.full([BLOCK], 1.0, tl.float32)
        if USE_SINKS:
            row_sum -= tl.exp2(tl.load(sinks + head) * LOG2E - log_sum)
        tl.store(waad + to, tl.where(active, window * row_sum - nearness, 0.0), mask=s < last)

    if is_global:
        limit = tl.where(active, horizon, 0)[:, None]
        received = tl.where(is_within(distance - lo, limit), weights, 0.0)
        q_after = q + after.to(tl.int64) * stride_qt
        for at in range(after, after_end, BLOCK):
            t = at + i
            late = tl.load(rows + t, mask=t < last, other=0) != 0
            late_log_sum = tl.load(lse + t, mask=late, other=0.0) * LOG2E
            late_query = load_tile(q_after, stride_qt, at, after_end, SIZE, BLOCK_D, BLOCK)
            late_scores = scores_of(multiply(late_query, key), factor, cap, SCALE_FIRST, USE_SOFTCAP)
            late_weights = weights_of(late_scores, factor, late_log_sum, SCALE_FIRST)
            late_limit = tl.where(late, horizon, 0)[:, None]
            received += tl.where(is_within((t - lo)[:, None] - s[None, :], late_limit), late_weights, 0.0)
            q_after += BLOCK * stride_qt
        total = tl.sum(received, 0)
        if not GROUPED:
            total /= tl.load(counts + batch * tokens + s, mask=s < last, other=1).to(tl.float32)
        tl.store(fai + to, total, mask=s < last)


@triton.jit(do_not_specialize=["tokens", "heads"])
def sum_heads_kernel(
    waad,  # [B, HQ, T]
    fai,
    local,  # [sequences, HQ]
    global_,
    segments,  # [B, T]
    counts,  # [B, T]
    waad_sum,  # [B, T]
    fai_sum,
    stride_ls,
    stride_lh,
    stride_gs,
    stride_gh,
    tokens,
    heads,
    BLOCK: tl.constexpr,
):
    """Sums over the heads that are in the group of each token's sequence, in ascending order; FAI divided by counts."""
    batch = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = t < tokens
    sequence = tl.load(segments + batch * tokens + t, mask=inside, other=0)
    waad_total = tl.zeros([BLOCK], tl.float32)
    fai_total = tl.zeros([BLOCK], tl.float32)
    for head in range(heads):
        at = (batch * heads + head) * tokens + t
        is_local = tl.load(local + sequence * stride_ls + head * stride_lh, mask=inside, other=0) != 0
        is_global = tl.load(global_ + sequence * stride_gs + head * stride_gh, mask=inside, other=0) != 0
        waad_total += tl.load(waad + at, mask=is_local, other=0.0)
        fai_total += tl.load(fai + at, mask=is_global, other=0.0)
    tl.store(waad_sum + batch * tokens + t, waad_total, mask=inside)
    count = tl.load(counts + batch * tokens + t, mask=inside, other=1).to(tl.float32)
    tl.store(fai_sum + batch * tokens + t, fai_total / count, mask=inside)


def band_pass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    groups: tuple[Tensor, Tensor] | None,
    layout: Layout,
    options: Options,
    tile: BandTile,
) -> tuple[Tensor, Tensor]:
    """(WAAD, FAI) [B, HQ, T] fp32 or, of groups (local, global_) bool [sequences, HQ], their sums [B, T]."""
    tokens = q.shape[2]
    waad, fai = (layout.output(q.shape[:3], torch.float32) for _ in range(2))
    tiles = layout.tiles(tile.block, "position" if options.horizon[1] is not None else "future")
    lo, hi = (tokens if bound is None else min(bound, tokens) for bound in options.horizon)
    before = triton.next_power_of_2(max(options.window - 1, tile.least_before))
    band_kernel[(len(tiles) * q.shape[1],)](
        tiles=tiles,
        rows=layout.rows,
        next_row=layout.next_row(),
        counts=layout.rows_looking_back(options.horizon),
        lse=lse,
        waad=waad,
        fai=fai,
        **_group_arguments(groups),
        **score_arguments(q, k, options),
        BLOCK_D=padded_size(q.shape[-1]),
        window=options.window,
        lo=lo,
        hi=hi,
        BLOCK=tile.block,
        BLOCK_BEFORE=min(before, max(tile.block // 2, 16)),
        GROUPED=groups is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.max_registers,
    )
    return (waad, fai) if groups is None else _sum_heads(waad, fai, groups, layout, options)


def _sum_heads(
    waad: Tensor, fai: Tensor, groups: tuple[Tensor, Tensor], layout: Layout, options: Options
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens = waad.shape
    waad_sum, fai_sum = (torch.empty((batch, tokens), dtype=torch.float32, device=waad.device) for _ in range(2))
    sum_heads_kernel[(batch, triton.cdiv(tokens, SUM_BLOCK))](
        waad=waad,
        fai=fai,
        segments=layout.segments,
        counts=layout.rows_looking_back(options.horizon),
        waad_sum=waad_sum,
        fai_sum=fai_sum,
        **_group_arguments(groups),
        tokens=tokens,
        heads=heads,
        BLOCK=SUM_BLOCK,
    )
    return waad_sum, fai_sum


def _group_arguments(groups: tuple[Tensor, Tensor] | None) -> dict[str, Tensor | int | None]:
    names = ("local", "stride_ls", "stride_lh", "global_", "stride_gs", "stride_gh")
    if groups is None:
        return dict.fromkeys(names[::3]) | dict.fromkeys((*names[1:3], *names[4:]), 0)
    local, global_ = groups
    return dict(zip(names, (local, *local.stride(), global_, *global_.stride()), strict=True))
