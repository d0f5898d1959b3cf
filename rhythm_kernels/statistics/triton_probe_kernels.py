"""The Triton kernels that check an attention call; triton_verify.py launches them.

The keys of each sequence are cut into chunks. The first kernel computes a chunk's part of the softmax of each probed
row, and stores the scores. The second forms each row's expected values and the difference that rounding explains. The
third finds the worst row. The order of all sums depends on the sequence alone. The rule is that of verify.py.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, SIZE the head size of q and k, SIZE_V that of v;
S sequences, P probed rows of each, C chunks of all sequences.
"""

import triton
import triton.language as tl

from rhythm_kernels.statistics import probes
from rhythm_kernels.statistics.triton_scores import LOWEST, is_within, load_tile, multiply

CHUNK_FIELDS = tl.constexpr(4)  # of a row of `chunks`
SLACK, ACCUMULATED, VANISHING = (tl.constexpr(x) for x in (probes.SLACK, probes.ACCUMULATED, probes.VANISHING))


@triton.jit
def _cap(scores, cap):
    """Returns cap * tanh(scores / cap), with its last bits also near 0, where the formula with exp loses them."""
    x = scores / cap
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return cap * tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (1 + tl.exp(2 * x)))


@triton.jit
def _add_weighted(output, weights, value, GAIN: tl.constexpr):
    """Returns output + GAIN * weights @ value, fp32 [BLOCK_M, BLOCK_DV].

    The tensor core takes 16-bit values as they are and the weights as a sum of three parts of the same dtype. GAIN
    keeps the last parts of small weights above the smallest number of fp16.
    """
    if value.dtype == tl.float32:
        return tl.dot(weights, value, output, input_precision="ieee")
    rest = weights * GAIN
    for _ in tl.static_range(3):
        part = rest.to(value.dtype)
        output = tl.dot(part, value, output)
        rest -= part.to(tl.float32)
    return output


@triton.jit
def _lengths(tile):
    """Returns the norms [BLOCK_N] of the rows of a tile."""
    tile = tile.to(tl.float32)
    return tl.sqrt(tl.sum(tile * tile, 1))


@triton.jit
def _longer(longest, broken, lengths):
    """Returns the largest length so far and, beside it, 0 or NaN if any was not finite: a maximum may lose a NaN."""
    return tl.maximum(longest, lengths), broken + lengths * 0


@triton.jit(do_not_specialize=["places", "tokens", "heads", "probes", "sliding_window"])
def probe_scores_kernel(
    q,
    k,
    v,
    chunks,  # [C, 4]: sequence, batch row, first key, one past the last of the sequence
    rows,  # [S, P] the probed rows, -1 where there is none
    scores,  # [HQ, P, B, T] written for visible keys, with USE_OUT
    lengths,  # [H, B, T] the norms of v, with USE_OUT
    longest,  # [C, H, 2] the largest norm of k and of v in a chunk; NaN if any is not finite
    peaks,  # [C, HQ, P] the largest score of a chunk
    totals,  # [C, HQ, P] the chunk's sum of exp(score - peak)
    outputs,  # [C, HQ, P, SIZE_V] the same sum, weighted with v
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    places,  # B * T
    tokens,
    heads,
    probes,
    sliding_window,
    scale,
    cap,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SIZE_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    GAIN: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_OUT: tl.constexpr,
):
    """Computes one chunk's and key head's part of the probed rows, for the query heads that read the key head."""
    key_heads, tiles = heads // GROUP, tl.cdiv(probes * GROUP, BLOCK_M)
    tile, program = tl.program_id(0) % tiles, tl.program_id(0) // tiles  # tiles of one chunk share it in L2
    chunk, key_head = (program // key_heads).to(tl.int64), (program % key_heads).to(tl.int64)
    fields = chunks + chunk * CHUNK_FIELDS
    sequence, batch = tl.load(fields).to(tl.int64), tl.load(fields + 1).to(tl.int64)
    start, end = tl.load(fields + 2), tl.load(fields + 3)
    stop = tl.minimum(start + CHUNK, end)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    probe, head = m // GROUP, key_head * GROUP + m % GROUP
    t = tl.load(rows + sequence * probes + probe, mask=probe < probes, other=-1).to(tl.int32)
    if tl.max(t) < 0:
        return
    exists = t >= 0

    d = tl.arange(0, BLOCK_D)
    at = q + batch * stride_qb + head[:, None] * stride_qh + t[:, None].to(tl.int64) * stride_qt + d[None, :]
    query = tl.load(at, mask=exists[:, None] & (d < SIZE)[None, :], other=0.0)
    k += batch * stride_kb + key_head * stride_kh + start.to(tl.int64) * stride_kt
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    longest_k = tl.zeros([BLOCK_N], tl.float32)
    broken_k, longest_v, broken_v = longest_k, longest_k, longest_k
    if USE_OUT:
        v += batch * stride_vb + key_head * stride_vh + start.to(tl.int64) * stride_vt
        lengths += key_head * places + batch * tokens
        scores += (head * probes + probe) * places + batch * tokens
        output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for begin in range(start, stop, BLOCK_N):
        s = begin + tl.arange(0, BLOCK_N)
        key = load_tile(k, stride_kt, begin, stop, SIZE, BLOCK_D, BLOCK_N)
        score = multiply(query, key) * scale
        if USE_SOFTCAP:
            score = _cap(score, cap)
        visible = is_within(t[:, None] - s[None, :], sliding_window)
        longest_k, broken_k = _longer(longest_k, broken_k, _lengths(key))
        if USE_OUT:
            tl.store(scores[:, None] + s[None, :], score, mask=visible)
        score = tl.where(visible, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        shrink = tl.exp(peak - new_peak)
        weights = tl.exp(score - new_peak[:, None])
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
        if USE_OUT:
            value = load_tile(v, stride_vt, begin, stop, SIZE_V, BLOCK_DV, BLOCK_N)
            length = _lengths(value)
            longest_v, broken_v = _longer(longest_v, broken_v, length)
            tl.store(lengths + s, length, mask=s < stop)
            output = _add_weighted(output * shrink[:, None], weights, value, GAIN)
            v += BLOCK_N * stride_vt
        k += BLOCK_N * stride_kt

    longest += (chunk * key_heads + key_head) * 2
    tl.store(longest, tl.max(longest_k) + tl.sum(broken_k))
    tl.store(longest + 1, tl.max(longest_v) + tl.sum(broken_v))
    at = (chunk * heads + head) * probes + probe
    tl.store(peaks + at, peak, mask=exists)
    tl.store(totals + at, total, mask=exists)
    if USE_OUT:
        d = tl.arange(0, BLOCK_DV)
        inside = exists[:, None] & (d < SIZE_V)[None, :]
        tl.store(outputs + at[:, None] * SIZE_V + d[None, :], output / GAIN, mask=inside)


@triton.jit(do_not_specialize=["places", "tokens", "heads", "probes", "rows_count", "sliding_window"])
def probe_errors_kernel(
    q,
    out,  # [B, T, HQ, SIZE_V] of the call
    lse,  # [B, HQ, T] of the call
    bounds,  # [S, 3]: batch row, first key, one past the last
    first_chunk,  # [S] the index of a sequence's first chunk
    rows,  # [S, P]
    wanted,  # [S, HQ], read with USE_WANTED
    sinks,  # [HQ]
    scores,  # this and the next five: of `probe_scores_kernel`
    lengths,
    longest,
    peaks,
    totals,
    outputs,
    errors,  # [2, 4, S, P, HQ] for the output and the lse: the excess, and the returned, expected and allowed values
    stride_qb,
    stride_qh,
    stride_qt,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_lb,
    stride_lh,
    stride_lt,
    stride_ws,
    stride_wh,
    places,
    tokens,
    heads,
    probes,
    rows_count,  # S * P * HQ
    sliding_window,
    scale,
    slip,  # Rounding.weights, a part of the relative error of a weight
    slip_of_reach,  # the error of a weight for each unit of |q| |k|
    slip_of_score,  # and for each unit of its score
    rounding_out,
    smallest,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SIZE_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    USE_SINKS: tl.constexpr,
    USE_WANTED: tl.constexpr,
    USE_LSE: tl.constexpr,
    USE_OUT: tl.constexpr,
):
    """Applies the rule of `verify._output_errors` and `verify._lse_errors` to one probed row and query head."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    sequence, probe = row // probes, row % probes
    errors += tl.program_id(0).to(tl.int64)
    t = tl.load(rows + row).to(tl.int32)
    known = t >= 0
    if USE_WANTED:
        known = known & (tl.load(wanted + sequence * stride_ws + head * stride_wh) != 0)
    if not known:
        for i in tl.static_range(8):
            tl.store(errors + i * rows_count, 0.0)
        return
    batch = tl.load(bounds + sequence * 3)
    begin, end = tl.load(bounds + sequence * 3 + 1).to(tl.int32), tl.load(bounds + sequence * 3 + 2).to(tl.int32)
    key_head, key_heads = head // GROUP, heads // GROUP
    lowest = tl.maximum(begin, t - sliding_window + 1)  # the first key that the row sees

    # the row sees only some of its sequence's chunks
    chunk = tl.load(first_chunk + sequence).to(tl.int64)
    chunks, seen_from, seen_to = tl.cdiv(end - begin, CHUNK), (lowest - begin) // CHUNK, (t - begin) // CHUNK
    longest += (chunk * key_heads + key_head) * 2
    part = (chunk * heads + head) * probes + probe
    c = tl.arange(0, BLOCK_C)
    peak = tl.full([BLOCK_C], LOWEST, tl.float32)
    longest_k = tl.zeros([BLOCK_C], tl.float32)
    broken_k, longest_v, broken_v = longest_k, longest_k, longest_k
    for at in range(0, chunks, BLOCK_C):
        index = at + c
        length = tl.load(longest + index * key_heads * 2, mask=index < chunks, other=0.0)
        longest_k, broken_k = _longer(longest_k, broken_k, length)
        length = tl.load(longest + index * key_heads * 2 + 1, mask=index < chunks, other=0.0)
        longest_v, broken_v = _longer(longest_v, broken_v, length)
        seen = (index >= seen_from) & (index <= seen_to)
        peak = tl.maximum(peak, tl.load(peaks + part + index * heads * probes, mask=seen, other=LOWEST))
    highest = tl.max(peak)
    if USE_SINKS:
        sink = tl.load(sinks + head)
        highest = tl.maximum(highest, sink)
    total = tl.zeros([BLOCK_C], tl.float32)
    dv = tl.arange(0, BLOCK_DV)
    expected = tl.zeros([BLOCK_DV], tl.float32)
    for at in range(seen_from, seen_to + 1, BLOCK_C):
        index = at + c
        seen = index <= seen_to
        share = tl.exp(tl.load(peaks + part + index * heads * probes, mask=seen, other=LOWEST) - highest)
        total += share * tl.load(totals + part + index * heads * probes, mask=seen, other=0.0)
        if USE_OUT:
            inside = seen[:, None] & (dv < SIZE_V)[None, :]
            start = outputs + (part + index * heads * probes)[:, None] * SIZE_V
            expected += tl.sum(share[:, None] * tl.load(start + dv[None, :], mask=inside, other=0.0), 0)
    total = tl.sum(total)
    if USE_SINKS:
        sink_share = tl.exp(sink - highest)
        total += sink_share
    d = tl.arange(0, BLOCK_D)
    at_q = q + batch * stride_qb + head * stride_qh + t.to(tl.int64) * stride_qt + d
    query = tl.load(at_q, mask=d < SIZE, other=0.0).to(tl.float32)
    reach = tl.abs(scale) * tl.sqrt(tl.sum(query * query)) * (tl.max(longest_k) + tl.sum(broken_k))

    if USE_LSE:
        expected_lse = highest + tl.log(total)
        got_lse = tl.load(lse + batch * stride_lb + head * stride_lh + t.to(tl.int64) * stride_lt)
        allowed = SLACK * ACCUMULATED * (8 + tl.abs(expected_lse) + reach)
        excess = _excess(tl.abs(got_lse - expected_lse), allowed)
        _store_row(errors + 4 * rows_count, rows_count, excess, got_lse, expected_lse, allowed)
    if USE_OUT:
        at_out = out + batch * stride_ob + head * stride_oh + t.to(tl.int64) * stride_ot + dv
        got = tl.load(at_out, mask=dv < SIZE_V, other=0.0).to(tl.float32)
        expected /= total
        size = tl.sqrt(tl.sum(expected * expected))
        slip += slip_of_reach * reach
        sink_slip = slip
        if USE_SINKS:
            sink_size = tl.where(sink == float("-inf"), 0.0, tl.abs(sink))
            sink_size = slip_of_score * (sink_size + tl.abs(highest))  # the maximum is subtracted in the dtype
            sink_slip = tl.where(slip_of_score > 0, sink_size, slip)
            slip += sink_size
        # sums of the weights' errors (`together`) and of their squares (`apart`), alone and times the lengths of v
        together = tl.zeros([BLOCK_N], tl.float32)
        together_v, apart, apart_v = together, together, together
        scores += (head * probes + probe) * places + batch * tokens
        lengths += key_head * places + batch * tokens
        for at in range(lowest, t + 1, BLOCK_N):
            s = at + tl.arange(0, BLOCK_N)
            score = tl.load(scores + s, mask=s <= t, other=0.0)
            length = tl.load(lengths + s, mask=s <= t, other=0.0)
            weight = tl.where(s <= t, tl.exp(score - highest) / total, 0.0)
            error = weight * (slip + slip_of_score * tl.abs(score))
            vanish = tl.where(s <= t, smallest, 0.0)
            bias = error + 2 * tl.minimum(weight, vanish)  # weights below the smallest vanish, each of them
            together, together_v = together + bias, together_v + bias * length
            noise = error * error + vanish * vanish
            apart, apart_v = apart + noise, apart_v + noise * length * length
        half, half_v = tl.sum(together) / 2, tl.sum(together_v) / 2
        if USE_SINKS:
            half += sink_share / total * sink_slip / 2
        noise = tl.sum(apart_v) + half_v * half_v
        noise += size * size * (tl.sum(apart) + half * half + rounding_out * rounding_out)
        sums = ACCUMULATED * (tl.max(longest_v) + tl.sum(broken_v))
        least = tl.maximum(smallest, VANISHING)
        noise += sums * sums + SIZE_V * least * least
        allowed = SLACK * tl.sqrt(noise)
        error = got - expected
        excess = _excess(tl.sqrt(tl.sum(error * error)), allowed)
        magnitude = tl.where(error == error, tl.abs(error), float("inf"))
        worst = dv == tl.argmax(magnitude, 0)
        got, expected = tl.sum(tl.where(worst, got, 0.0)), tl.sum(tl.where(worst, expected, 0.0))
        _store_row(errors, rows_count, excess, got, expected, allowed)


@triton.jit
def _excess(error, allowed):
    """Returns error / allowed: infinity where only the call is not finite, and 0 where the map itself is not finite."""
    excess = tl.where(error == error, error / allowed, float("inf"))
    return tl.where(allowed < float("inf"), excess, 0.0)


@triton.jit
def _store_row(errors, rows_count, excess, got, expected, allowed):
    """Stores the four numbers of a probed row and query head."""
    tl.store(errors, excess)
    tl.store(errors + rows_count, got)
    tl.store(errors + 2 * rows_count, expected)
    tl.store(errors + 3 * rows_count, allowed)


@triton.jit(do_not_specialize=["heads", "probes", "rows_count", "first"])
def probe_worst_kernel(
    errors,  # [2, 4, S, P, HQ]
    bounds,  # [S, 3]
    rows,  # [S, P]
    values,  # [2, 4] the four numbers of the worst row
    places,  # [2, 3] its batch row, token and query head
    heads,
    probes,
    rows_count,
    first,  # 0 begins with the output; 1 where there is only the lse
    BLOCK: tl.constexpr,
):
    """Finds the row of the largest excess, of the output or of the log-sum-exp; the first one on a tie."""
    name = (first + tl.program_id(0)).to(tl.int64)
    errors += name * 4 * rows_count
    i = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -1.0, tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for at in range(0, rows_count, BLOCK):
        excess = tl.load(errors + at + i, mask=at + i < rows_count, other=-1.0)
        where = tl.where(excess > highest, at + i, where)
        highest = tl.maximum(highest, excess)
    worst = tl.min(tl.where(highest == tl.max(highest), where, rows_count)).to(tl.int64)
    for field in tl.static_range(4):
        tl.store(values + name * 4 + field, tl.load(errors + field * rows_count + worst))
    row = worst // heads
    places += name * 3
    tl.store(places, tl.load(bounds + row // probes * 3))
    tl.store(places + 1, tl.maximum(tl.load(rows + row), 0))
    tl.store(places + 2, worst % heads)
