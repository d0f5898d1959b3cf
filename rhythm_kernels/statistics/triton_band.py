"""The band pass: WAAD and FAI from the log-sum-exp, from only the part of a map within the window and the horizon.

A program owns one tile of tokens of one query head. As rows, its tokens look at themselves and at the keys of their
windows before the tile: that gives WAAD. As columns, they are looked at by themselves and by the rows behind the tile:
that gives FAI. Each output is written by one program, which sums in a fixed order. With known head groups, the programs
of other heads end at once.

Most of a program's time is waiting for loads. So they form a short chain: first the tile's line of `band_table`, with
groups the flags of its head, then everything else at once. Only a window or a horizon that is longer than a tile is
read in a loop.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, SIZE (D) the head size of q and k; S sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.triton_scores import (
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
from rhythm_kernels.statistics.triton_tiles import BandTile

TABLE_FIELDS = tl.constexpr(8)  # of a row of `band_table`
FAR = 1 << 30  # tokens: the length of an open horizon
SUM_HEADS = 32  # `sum_heads_kernel` adds so many heads at a time
STRIDES = ("stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_kt")
GROUP_STRIDES = ("stride_ls", "stride_lh", "stride_gs", "stride_gh")


@triton.jit
def _looked_at_before(
    query, early, log_sum, at, s, start, window, near_end, factor, cap,
    BLOCK_BEFORE: tl.constexpr, SCALE_FIRST: tl.constexpr, USE_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Returns sum A (W - (t - s)) over the keys at..start in the windows of the rows, [BLOCK]."""
    scores = scores_of(multiply(query, early), factor, cap, SCALE_FIRST, USE_SOFTCAP)
    weights = weights_of(scores, factor, log_sum[:, None], SCALE_FIRST)
    j = tl.arange(0, BLOCK_BEFORE)
    near = (window - s + at).to(tl.float32)[:, None] + j.to(tl.float32)[None, :]
    distance = s[:, None] - tl.where(at + j < start, at + j, NOWHERE)[None, :]
    return tl.sum(tl.where(is_within(distance, near_end), weights * near, 0.0), 1)


@triton.jit
def _received_behind(
    late_query, key, late, late_lse, t, s, lo, horizon, factor, cap,
    SCALE_FIRST: tl.constexpr, USE_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Returns A [BLOCK, BLOCK] of the rows t behind the tile, 0 outside the horizon and in rows that are not `late`."""
    scores = scores_of(multiply(late_query, key), factor, cap, SCALE_FIRST, USE_SOFTCAP)
    weights = weights_of(scores, factor, (late_lse * LOG2E)[:, None], SCALE_FIRST)
    limit = tl.where(late, horizon, 0)[:, None]
    return tl.where(is_within((t - lo)[:, None] - s[None, :], limit), weights, 0.0)


@triton.jit(
    do_not_specialize=[
        *STRIDES, *GROUP_STRIDES, "tokens", "query_heads", "key_heads", "window", "near_end", "lo", "horizon"
    ]
)  # fmt: skip
def band_kernel(
    q,  # [B, HQ, T, SIZE]
    k,  # [B, H, T, SIZE]
    tiles,  # [tiles, TABLE_FIELDS], of `band_table`
    rows,  # [B, T]
    counts,  # [B, T], of `Layout.rows_looking_back`
    sinks,  # [HQ]
    lse,  # [B, HQ, T]; outside R it may hold anything
    local_heads,  # [S, HQ]
    global_heads,  # [S, HQ]
    waad,  # [B, HQ, T]; GROUPED: written only for local heads, in tiles with rows of R
    fai,  # [B, HQ, T]; GROUPED: sums over T(s), written only for global heads, in tiles that rows of R look at
    row_lse,  # [B, HQ, T]; COPY_LSE: lse in R, 0 elsewhere
    stride_qb,  # the strides of q and k are in UNITs
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
    factor,
    cap,
    window,
    near_end,  # WAAD counts the distances 0 .. near_end - 1
    lo,
    horizon,  # FAI counts the distances lo .. lo + horizon - 1
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BEFORE: tl.constexpr,
    LOOP_BEFORE: tl.constexpr,  # False if no window reaches further than BLOCK_BEFORE
    LOOP_BEHIND: tl.constexpr,  # False if no row further than BLOCK behind the tile looks at it
    SCALE_FIRST: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_SINKS: tl.constexpr,
    GROUPED: tl.constexpr,
    COPY_LSE: tl.constexpr,
):
    """Computes WAAD and FAI of one tile of tokens and one query head."""
    batch, start, first, last, sequence, head = load_place(tiles, query_heads, TABLE_FIELDS)
    row_end, after, after_end = load_reach(tiles + tl.program_id(0) // query_heads * TABLE_FIELDS)
    i = tl.arange(0, BLOCK)
    s = start + i  # the tile's tokens, as columns and as rows
    inside = s < last
    to = (batch * query_heads + head) * tokens + s
    is_local, is_global = True, True
    if GROUPED:
        looks, is_seen = row_end > 0, (row_end > 0) | (after_end > 0)  # not in padding, which has no sequence
        is_local = tl.load(local_heads + sequence * stride_ls + head * stride_lh, mask=looks, other=0) != 0
        is_global = tl.load(global_heads + sequence * stride_gs + head * stride_gh, mask=is_seen, other=0) != 0
        if not (is_local | is_global):
            return
        after_end = tl.where(is_global, after_end, 0)
    else:
        if (row_end == 0) & (after_end == 0):  # padding, and most of a prompt
            nothing = tl.zeros([BLOCK], tl.float32)
            tl.store(waad + to, nothing, mask=inside)
            tl.store(fai + to, nothing, mask=inside)
            if COPY_LSE:
                tl.store(row_lse + to, nothing, mask=inside)
            return

    # load everything that is read without a loop, before anything waits for it
    rows += batch * tokens
    lse += (batch * query_heads + head) * tokens
    stride_qt, stride_kt = stride_qt * UNIT, stride_kt * UNIT
    q += (batch * stride_qb + head * stride_qh) * UNIT
    k += (batch * stride_kb + head // (query_heads // key_heads) * stride_kh) * UNIT
    before = tl.maximum(start - near_end + 1, first)
    before_end = tl.where(row_end > 0, start, before)
    if GROUPED:
        before_end = tl.where(is_local, before_end, before)
    k_before = k + before.to(tl.int64) * stride_kt
    q_after = q + after.to(tl.int64) * stride_qt
    t = after + i
    # small loads come first: a tile's store to shared memory waits for its load, and later loads would wait behind it
    active = tl.load(rows + s, mask=inside, other=0) != 0
    own_lse = tl.load(lse + s, mask=inside, other=0.0)
    if not LOOP_BEHIND:
        late = tl.load(rows + t, mask=t < after_end, other=0) != 0
        late_lse = tl.load(lse + t, mask=t < after_end, other=0.0)
        if not GROUPED:
            count = tl.load(counts + batch * tokens + s, mask=inside, other=1)
    if USE_SINKS:
        sink = tl.load(sinks + head)
    key = load_tile(k + start.to(tl.int64) * stride_kt, stride_kt, start, last, SIZE, BLOCK_D, BLOCK)
    query = load_tile(q + start.to(tl.int64) * stride_qt, stride_qt, start, row_end, SIZE, BLOCK_D, BLOCK)
    if not LOOP_BEFORE:
        early = load_tile(k_before, stride_kt, before, before_end, SIZE, BLOCK_D, BLOCK_BEFORE)
    if not LOOP_BEHIND:
        late_query = load_tile(q_after, stride_qt, after, after_end, SIZE, BLOCK_D, BLOCK)

    log_sum = own_lse * LOG2E
    scores = scores_of(multiply(query, key), factor, cap, SCALE_FIRST, USE_SOFTCAP)
    weights = weights_of(scores, factor, log_sum[:, None], SCALE_FIRST)
    distance = i[:, None] - i[None, :]  # tokens

    # hidden weights are removed after exp2, since they may be NaN; rows outside R are removed last
    if is_local:  # W x row sum - sum_s A (W - (t - s)) over t - s < W
        near = (window - i).to(tl.float32)[:, None] + i.to(tl.float32)[None, :]
        nearness = tl.sum(tl.where(is_within(distance, near_end), weights * near, 0.0), 1)
        if LOOP_BEFORE:
            for at in range(before, before_end, BLOCK_BEFORE):
                early = load_tile(k_before, stride_kt, at, start, SIZE, BLOCK_D, BLOCK_BEFORE)
                nearness += _looked_at_before(
                    query, early, log_sum, at, s, start, window, near_end, factor, cap,
                    BLOCK_BEFORE, SCALE_FIRST, USE_SOFTCAP,
                )  # fmt: skip
                k_before += BLOCK_BEFORE * stride_kt
        else:
            nearness += _looked_at_before(
                query, early, log_sum, before, s, start, window, near_end, factor, cap,
                BLOCK_BEFORE, SCALE_FIRST, USE_SOFTCAP,
            )  # fmt: skip
        row_sum = tl.full([BLOCK], 1.0, tl.float32)
        if USE_SINKS:
            row_sum -= tl.exp2(sink * LOG2E - log_sum)
        tl.store(waad + to, tl.where(active, window * row_sum - nearness, 0.0), mask=inside)

    if is_global:
        limit = tl.where(active, horizon, 0)[:, None]
        received = tl.where(is_within(distance - lo, limit), weights, 0.0)
        if LOOP_BEHIND:
            for at in range(after, after_end, BLOCK):
                t = at + i
                late = tl.load(rows + t, mask=t < after_end, other=0) != 0
                late_lse = tl.load(lse + t, mask=t < after_end, other=0.0)
                late_query = load_tile(q_after, stride_qt, at, after_end, SIZE, BLOCK_D, BLOCK)
                received += _received_behind(
                    late_query, key, late, late_lse, t, s, lo, horizon, factor, cap, SCALE_FIRST, USE_SOFTCAP
                )
                q_after += BLOCK * stride_qt
        else:
            received += _received_behind(
                late_query, key, late, late_lse, t, s, lo, horizon, factor, cap, SCALE_FIRST, USE_SOFTCAP
            )
        if GROUPED or LOOP_BEHIND:
            total = tl.sum(received, 0)
            if not GROUPED:
                count = tl.load(counts + batch * tokens + s, mask=inside, other=1)
        else:  # in halves: their sum is in one thread, which divides once, where the sum of all rows is in many threads
            first_half, second_half = tl.split(tl.trans(tl.sum(tl.reshape(received, [2, BLOCK // 2, BLOCK]), 1)))
            total = first_half + second_half
        if not GROUPED:
            total /= count.to(tl.float32)
        tl.store(fai + to, total, mask=inside)
    if COPY_LSE:
        tl.store(row_lse + to, tl.where(active, own_lse, 0.0), mask=inside)


@triton.jit
def load_reach(tile):
    """Returns the last three fields of a tile's line of `band_table`."""
    return tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)


@triton.jit(do_not_specialize=[*GROUP_STRIDES, "tokens", "heads"])
def sum_heads_kernel(
    waad,  # [B, HQ, T], of `band_kernel`
    fai,  # [B, HQ, T], of `band_kernel`
    tiles,  # [tiles, TABLE_FIELDS], of `band_table`
    local_heads,  # [S, HQ]
    global_heads,  # [S, HQ]
    counts,  # [B, T], of `Layout.rows_looking_back`
    waad_sum,  # [B, T]
    fai_sum,  # [B, T]
    stride_ls,
    stride_lh,
    stride_gs,
    stride_gh,
    tokens,
    heads,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Sums a tile's tokens over the heads of their groups, in an order that only HQ decides, and takes FAI's mean."""
    batch, start, _, last, sequence, _ = load_place(tiles, 1, TABLE_FIELDS)
    row_end, _, after_end = load_reach(tiles + tl.program_id(0) * TABLE_FIELDS)
    t = start + tl.arange(0, BLOCK)
    inside = t < last
    count = tl.load(counts + batch * tokens + t, mask=inside, other=1).to(tl.float32)
    waad_total = tl.zeros([BLOCK], tl.float32)
    fai_total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, heads, HEADS):
        head = begin + tl.arange(0, HEADS)
        looks, is_seen = (head < heads) & (row_end > 0), (head < heads) & ((row_end > 0) | (after_end > 0))
        is_local = tl.load(local_heads + sequence * stride_ls + head * stride_lh, mask=looks, other=0) != 0
        is_global = tl.load(global_heads + sequence * stride_gs + head * stride_gh, mask=is_seen, other=0) != 0
        at = (batch * heads + head)[:, None] * tokens + t[None, :]
        waad_total += tl.sum(tl.load(waad + at, mask=is_local[:, None] & inside[None, :], other=0.0), 0)
        fai_total += tl.sum(tl.load(fai + at, mask=is_global[:, None] & inside[None, :], other=0.0), 0)
    tl.store(waad_sum + batch * tokens + t, waad_total, mask=inside)
    tl.store(fai_sum + batch * tokens + t, fai_total / count, mask=inside)


def band_pass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    groups: tuple[Tensor, Tensor] | None,
    layout: Layout,
    options: Options,
    tile: BandTile,
    copy_lse: bool = False,
) -> tuple[Tensor, ...]:
    """Returns WAAD and FAI, fp32 [B, HQ, T], or with groups their sums over the heads of the groups, fp32 [B, T].

    Args:
        q, k: [B, HQ, T, D] and [B, H, T, D], `aligned`.
        lse: [B, HQ, T] fp32; outside R it may hold anything.
        groups: (local_heads, global_heads), each bool [S, HQ].
        copy_lse: without groups, also returns lse, with 0 outside R.
    """

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    batch, heads, tokens, size = q.shape
    waad, fai = empty(batch, heads, tokens), empty(batch, heads, tokens)
    row_lse = empty(batch, heads, tokens) if copy_lse else None
    lo, horizon = _horizon(options)
    tiles, reach = _table(layout, options, tile)
    counts = layout.rows_looking_back(options.horizon)
    before = triton.next_power_of_2(max(options.window - 1, tile.least_before))
    before = min(before, max(tile.block // 2, 16))
    block_d = padded_size(size)
    loop_before = tile.in_turns or options.window - 1 > before
    loop_behind = tile.in_turns or horizon - 1 + min(lo, tile.block) > tile.block
    takes_more = loop_before or loop_behind or size != block_d or options.softcap is not None  # and would spill
    band_kernel[(len(tiles) * heads,)](
        tiles=tiles,
        rows=layout.rows,
        counts=counts,
        lse=lse,
        waad=waad,
        fai=fai,
        row_lse=row_lse,
        **_group_arguments(groups),
        **score_arguments(q, k, options),
        BLOCK_D=block_d,
        window=options.window,
        near_end=options.window if options.sliding_window is None else min(options.window, options.sliding_window),
        lo=reach[0],
        horizon=reach[1],
        BLOCK=tile.block,
        BLOCK_BEFORE=before,
        LOOP_BEFORE=loop_before,
        LOOP_BEHIND=loop_behind,
        GROUPED=groups is not None,
        COPY_LSE=copy_lse,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=None if takes_more else tile.max_registers,
    )
    if groups is None:
        return (waad, fai, row_lse) if copy_lse else (waad, fai)
    return sum_heads(waad, fai, groups, layout, options, tile)


def sum_heads(
    waad: Tensor, fai: Tensor, groups: tuple[Tensor, Tensor], layout: Layout, options: Options, tile: BandTile
) -> tuple[Tensor, Tensor]:
    """Returns the sums of the first over the local heads and the means of the second's sums, fp32 [B, T].

    Args:
        waad, fai: [B, HQ, T]: WAAD or a mass of the local heads, and the column sums of the global heads.
        groups: (local_heads, global_heads), each bool [S, HQ].
    """
    batch, heads, tokens = waad.shape
    waad_sum, fai_sum = (torch.empty((batch, tokens), dtype=torch.float32, device=waad.device) for _ in range(2))
    tiles, _ = _table(layout, options, tile)
    sum_heads_kernel[(len(tiles),)](
        waad=waad,
        fai=fai,
        tiles=tiles,
        counts=layout.rows_looking_back(options.horizon),
        waad_sum=waad_sum,
        fai_sum=fai_sum,
        **_group_arguments(groups),
        tokens=tokens,
        heads=heads,
        BLOCK=tile.block,
        HEADS=min(triton.next_power_of_2(heads), SUM_HEADS),
    )
    return waad_sum, fai_sum


def _table(layout: Layout, options: Options, tile: BandTile) -> tuple[Tensor, tuple[int, int]]:
    """Returns `band_table`, and lo and the length of the horizon, which a sequence bounds."""
    tokens = layout.rows.shape[1]
    reach = tuple(min(x, tokens) for x in _horizon(options))
    order = "position" if options.horizon[1] is not None else "future"
    table = layout.keep(("band", tile.block, order, *reach), lambda: band_table(layout, tile.block, order, *reach))
    return table, reach


def band_table(layout: Layout, block: int, order: str, lo: int, horizon: int) -> Tensor:
    """Returns the tiles and the rows of R in and behind each. FAI counts the distances lo .. lo + horizon - 1.

    Returns:
        int32 [tiles, 8]: the five fields of `Layout.tiles`, padding included; one past the last row of R in the tile,
        or 0; the first row of R behind the tile that looks at it, and one past the last such row, or 0 and 0.
    """
    table = layout.tiles(block, order, padding=True)
    batch, start, _, end, _ = table.long().unbind(-1)
    tokens = layout.rows.shape[1]
    last_row = layout.row_end()[batch, torch.minimum(start + block, end)]
    row_end = torch.where(last_row > start, last_row, 0)
    after = layout.next_row()[batch, (start + max(lo, block)).clamp(max=tokens)]
    reached = torch.minimum(start + block + lo + horizon - 1, end) if horizon > 0 else torch.zeros_like(start)
    after_end = layout.row_end()[batch, reached]
    behind = torch.stack([after, after_end], -1) * (after < after_end)[:, None]
    return torch.cat([table, row_end[:, None], behind], -1).int()


def _horizon(options: Options) -> tuple[int, int]:
    """Returns lo, and how many distances from lo on FAI counts.

    They do not depend on the lengths of sequences, so that a sequence has the same kernel alone and in any batch.
    """
    lo, hi = options.horizon
    end = FAR if hi is None else hi + 1
    if options.sliding_window is not None:
        end = min(end, options.sliding_window)
    return lo, max(end - lo, 0)


def _group_arguments(groups: tuple[Tensor, Tensor] | None) -> dict[str, Tensor | int | None]:
    """Returns the groups and their strides by the kernels' names for them."""
    names = ("local_heads", "stride_ls", "stride_lh", "global_heads", "stride_gs", "stride_gh")
    if groups is None:
        return dict.fromkeys(names[::3]) | dict.fromkeys((*names[1:3], *names[4:]), 0)
    local_heads, global_heads = groups
    return dict(zip(names, (local_heads, *local_heads.stride(), global_heads, *global_heads.stride()), strict=True))
