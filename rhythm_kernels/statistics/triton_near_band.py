"""The band pass where neither the window nor the horizon reaches further than a tile: the case of credit.

A program walks over the tiles of a run of tokens of one query head. In each turn it multiplies the keys of one tile
with the queries of that tile and of the next one. These rows are all that look at the keys within the horizon, which
gives FAI. WAAD of the tile's own rows is complete too: the turn before has kept what they see of its keys. The loads of
a turn are under way during the turn before.

Each output is written by one program, which sums in a fixed order. Runs begin with their sequence and have the same
length in every batch, so a sequence has the same bits alone and in any batch.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, SIZE (D) the head size of q and k; S sequences.
"""

import triton
import triton.language as tl

from rhythm_kernels.statistics.triton_scores import (
    LOG2E,
    is_within,
    load_place,
    load_tile,
    multiply,
    scores_of,
    weights_of,
)

RUN_FIELDS = tl.constexpr(5)  # of a row of `Layout.tiles`


@triton.jit
def _load_rows(rows, lse, t, last):
    """Returns whether the rows t are of R, as int32, and their log-sum-exp; 0 from `last` on."""
    inside = t < last
    return tl.load(rows + t, mask=inside, other=0).to(tl.int32), tl.load(lse + t, mask=inside, other=0.0)


@triton.jit
def _seen_before_run(
    q, k, lse, stride_qt, stride_kt, begin, first, last, window, near_end, factor, cap,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BEFORE: tl.constexpr,
    SCALE_FIRST: tl.constexpr, USE_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Returns sum A (W - (t - s)) over the keys before the run in the windows of its first rows, [BLOCK].

    q points to the run's first token, k to token 0.
    """
    before = tl.maximum(begin - near_end + 1, first)
    t, s = begin + tl.arange(0, BLOCK), before + tl.arange(0, BLOCK_BEFORE)
    key = load_tile(k + before.to(tl.int64) * stride_kt, stride_kt, before, begin, SIZE, BLOCK_D, BLOCK_BEFORE)
    query = load_tile(q, stride_qt, begin, last, SIZE, BLOCK_D, BLOCK)
    log_sum = tl.load(lse + t, mask=t < last, other=0.0) * LOG2E
    scores = scores_of(multiply(query, key), factor, cap, SCALE_FIRST, USE_SOFTCAP)
    weights = weights_of(scores, factor, log_sum, SCALE_FIRST)
    distance = t[:, None] - s[None, :]
    is_near = is_within(distance, near_end) & (s < begin)[None, :]
    return tl.sum(tl.where(is_near, weights * (window - distance).to(tl.float32), 0.0), 1)


@triton.jit(
    do_not_specialize=[
        *("stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_kt"),
        *("stride_ls", "stride_lh", "stride_gs", "stride_gh"),
        *("tokens", "query_heads", "key_heads", "window", "near_end", "lo", "horizon"),
    ]
)
def near_band_kernel(
    q,  # [B, HQ, T, SIZE]
    k,  # [B, H, T, SIZE]
    runs,  # [runs, RUN_FIELDS], of `Layout.tiles`, of RUN_TOKENS tokens, padding included
    rows,  # [B, T]
    next_row,  # [B, T + 1], of `Layout.next_row`
    counts,  # [B, T], of `Layout.rows_looking_back`
    sinks,  # [HQ]
    lse,  # [B, HQ, T]; outside R it may hold anything
    local_heads,  # [S, HQ]
    global_heads,  # [S, HQ]
    waad,  # [B, HQ, T]; GROUPED: written only for local heads, in runs with rows of R or right before some
    fai,  # [B, HQ, T]; GROUPED: sums over T(s), written only for global heads, in the same runs
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
    near_end,  # WAAD counts the distances 0 .. near_end - 1, at most BLOCK + 1 of them
    lo,
    horizon,  # FAI counts the distances lo .. lo + horizon - 1, at most up to BLOCK
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BEFORE: tl.constexpr,  # at least near_end - 1
    RUN_TOKENS: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_SINKS: tl.constexpr,
    GROUPED: tl.constexpr,
    COPY_LSE: tl.constexpr,
):
    """Computes WAAD and FAI of a run of tokens and one query head."""
    batch, begin, first, last, sequence, head = load_place(runs, query_heads, RUN_FIELDS)
    end = tl.minimum(begin + RUN_TOKENS, last)
    out = (batch * query_heads + head) * tokens
    i = tl.arange(0, BLOCK)
    is_seen = tl.load(next_row + batch * (tokens + 1) + begin) < tl.minimum(end + BLOCK, last)
    is_local, is_global = True, True
    if GROUPED:
        if not is_seen:  # also padding, which has no sequence
            return
        is_local = tl.load(local_heads + sequence * stride_ls + head * stride_lh) != 0
        is_global = tl.load(global_heads + sequence * stride_gs + head * stride_gh) != 0
        if not (is_local | is_global):
            return
    else:
        if not is_seen:  # padding, and most of a prompt
            nothing = tl.zeros([BLOCK], tl.float32)
            for start in range(begin, end, BLOCK):
                inside = start + i < end
                tl.store(waad + out + start + i, nothing, mask=inside)
                tl.store(fai + out + start + i, nothing, mask=inside)
                if COPY_LSE:
                    tl.store(row_lse + out + start + i, nothing, mask=inside)
            return

    stride_qt, stride_kt = stride_qt * UNIT, stride_kt * UNIT
    q += (batch * stride_qb + head * stride_qh) * UNIT + begin.to(tl.int64) * stride_qt
    k += (batch * stride_kb + head // (query_heads // key_heads) * stride_kh) * UNIT
    rows += batch * tokens
    counts += batch * tokens
    lse += out
    distance = i[:, None] - i[None, :]  # tokens, from a tile's keys to its own rows
    past = (window - i).to(tl.float32)[:, None] + i.to(tl.float32)[None, :]
    if USE_SINKS:
        sink = tl.load(sinks + head) * LOG2E
    # of the rows behind a tile, WAAD needs the first few alone
    reach = tl.where(is_global, BLOCK, near_end)

    seen_before = _seen_before_run(
        q, k, lse, stride_qt, stride_kt, begin, first, last, window, near_end, factor, cap,
        SIZE, BLOCK_D, BLOCK, BLOCK_BEFORE, SCALE_FIRST, USE_SOFTCAP,
    )  # fmt: skip
    k += begin.to(tl.int64) * stride_kt
    active, own_lse = _load_rows(rows, lse, begin + i, last)
    late, late_lse = _load_rows(rows, lse, begin + BLOCK + i, last)
    for start in range(begin, end, BLOCK):
        s, late_end = start + i, tl.minimum(start + BLOCK + reach, last)
        inside = s < last
        key = load_tile(k, stride_kt, start, last, SIZE, BLOCK_D, BLOCK)
        query = load_tile(q, stride_qt, start, last, SIZE, BLOCK_D, BLOCK)
        late_query = load_tile(q + BLOCK * stride_qt, stride_qt, start + BLOCK, late_end, SIZE, BLOCK_D, BLOCK)
        # the compiler loads operands of products a turn ahead, and nothing at all if a value is carried for two turns
        next_active, next_lse = _load_rows(rows, lse, start + BLOCK + i, last)
        next_late, next_late_lse = _load_rows(rows, lse, start + 2 * BLOCK + i, last)
        count = tl.load(counts + s, mask=inside, other=1)

        # hidden weights are removed after exp2, since they may be NaN; rows outside R are removed last
        log_sum = own_lse * LOG2E
        scores = scores_of(multiply(query, key), factor, cap, SCALE_FIRST, USE_SOFTCAP)
        weights = weights_of(scores, factor, log_sum, SCALE_FIRST)
        if is_local:  # W x row sum - sum_s A (W - (t - s)) over t - s < W
            nearness = seen_before + tl.sum(tl.where(is_within(distance, near_end), weights * past, 0.0), 1)
            row_sum = tl.full([BLOCK], 1.0, tl.float32)
            if USE_SINKS:
                row_sum -= tl.exp2(sink - log_sum)
            tl.store(waad + out + s, tl.where(active != 0, window * row_sum - nearness, 0.0), mask=inside)
        limit = tl.where(active != 0, horizon, 0)[:, None]
        received = tl.where(is_within(distance - lo, limit), weights, 0.0)

        scores = scores_of(multiply(late_query, key), factor, cap, SCALE_FIRST, USE_SOFTCAP)
        weights = weights_of(scores, factor, late_lse * LOG2E, SCALE_FIRST)
        if is_local:
            near = is_within(distance + BLOCK, near_end)
            seen_before = tl.sum(tl.where(near, weights * (past - BLOCK), 0.0), 1)
        if is_global:
            limit = tl.where(late != 0, horizon, 0)[:, None]
            received += tl.where(is_within(distance + (BLOCK - lo), limit), weights, 0.0)
            halves = tl.sum(tl.reshape(received, [2, BLOCK // 2, BLOCK]), 1)
            upper, lower = tl.split(tl.trans(halves))
            total = upper + lower
            if not GROUPED:
                total /= count.to(tl.float32)
            tl.store(fai + out + s, total, mask=inside)
        if COPY_LSE:
            tl.store(row_lse + out + s, tl.where(active != 0, own_lse, 0.0), mask=inside)
        active, own_lse, late, late_lse = next_active, next_lse, next_late, next_late_lse
        k += BLOCK * stride_kt
        q += BLOCK * stride_qt
