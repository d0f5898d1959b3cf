"""The checks of verify.py on a GPU: three launches, which read q, k, v, the output and the log-sum-exp where they lie.

The keys of each sequence are cut into chunks. The first kernel finds a chunk's part of the softmax of each probed row
and leaves the scores, the second forms each row's expectation and what its rounding explains, the third finds the worst
row. The order of all sums depends on the sequence alone.

Shapes: S sequences, P probed rows of each, C chunks of all sequences, HQ query heads, H key heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm_kernels.host import send
from rhythm_kernels.statistics import verify
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.triton_scores import LOWEST, is_within, load_tile, multiply, padded_size
from rhythm_kernels.statistics.verify import Deviation, Rounding

CHUNK = 256  # keys of a program of the first kernel: a sequence of 8,192 tokens with 8 key heads gives 256 programs
CHUNK_FIELDS = tl.constexpr(4)
# Few rows at a time: tiles of the same keys run side by side and share them in L2, and nothing spills on any target.
BLOCK_M, WARPS, STAGES = 16, 8, 2
BLOCK_N = {16: 32, 32: 16}  # keys, by the bits of q and k
SLACK, ACCUMULATED, VANISHING = (tl.constexpr(x) for x in (verify.SLACK, verify.ACCUMULATED, verify.VANISHING))


@triton.jit
def _cap(scores, cap):
    """cap * tanh(scores / cap) to the last bits also near 0, where the formula with exp loses them."""
    x = scores / cap
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return cap * tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (1 + tl.exp(2 * x)))


@triton.jit
def _add_weighted(output, weights, value, GAIN: tl.constexpr):
    """output + GAIN * weights @ value in fp32.

    Values of 16 bits stay as they are, for the tensor core: the weights go in three parts of their dtype. GAIN lifts
    the last parts of small weights over the smallest number of fp16.
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
    """The norms [BLOCK_N] of the rows of a tile."""
    tile = tile.to(tl.float32)
    return tl.sqrt(tl.sum(tile * tile, 1))


@triton.jit
def _longer(longest, broken, lengths):
    """The largest so far, and 0 or, where any was not finite, NaN, which a maximum may lose."""
    return tl.maximum(longest, lengths), broken + lengths * 0


@triton.jit(do_not_specialize=["places", "tokens", "heads", "probes", "sliding_window"])
def probe_scores_kernel(
    q,
    k,
    v,
    chunks,  # [C, 4]: sequence, batch row, first key, one past the last of the sequence
    rows,  # [S, P], -1 where there is none
    scores,  # [HQ, P, B, T], of what is visible
    lengths,  # [H, B, T], of v
    longest,  # [C, H, 2], of k and of v; NaN if any is not finite
    peaks,  # [C, HQ, P] the largest score of a chunk
    totals,  # [C, HQ, P] the sum of exp(score - peak)
    outputs,  # [C, HQ, P, SIZE_V] the same sum of v
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
    """Chunk of keys and key head fixed: its part of the probed rows of the query heads that read it."""
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
    out,
    lse,
    bounds,  # [S, 3]: batch row, first key, one past the last
    first_chunk,  # [S]
    rows,  # [S, P]
    wanted,  # [S, HQ], read with USE_WANTED
    sinks,
    scores,
    lengths,
    longest,
    peaks,
    totals,
    outputs,
    found,  # [2, 4, S, P, HQ]: of the output and of the lse the excess, what was got, what is expected and allowed
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
    slip,  # Rounding.weights
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
    """Probed row and query head fixed: the rule of `verify._output_errors` and `verify._lse_errors`."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    sequence, probe = row // probes, row % probes
    found += tl.program_id(0).to(tl.int64)
    t = tl.load(rows + row).to(tl.int32)
    known = t >= 0
    if USE_WANTED:
        known = known & (tl.load(wanted + sequence * stride_ws + head * stride_wh) != 0)
    if not known:
        for i in tl.static_range(8):
            tl.store(found + i * rows_count, 0.0)
        return
    batch = tl.load(bounds + sequence * 3)
    begin, end = tl.load(bounds + sequence * 3 + 1).to(tl.int32), tl.load(bounds + sequence * 3 + 2).to(tl.int32)
    key_head, key_heads = head // GROUP, heads // GROUP
    lowest = tl.maximum(begin, t - sliding_window + 1)  # the first key that the row sees

    # the chunks of the sequence, of which the row sees some
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
        _store_row(found + 4 * rows_count, rows_count, excess, got_lse, expected_lse, allowed)
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
        # of the errors of the weights the sums and the sums of squares, alone and times the lengths of v
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
            bias = error + 2 * tl.minimum(weight, vanish)  # weights below the smallest vanish, all of them
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
        _store_row(found, rows_count, excess, got, expected, allowed)


@triton.jit
def _excess(error, allowed):
    """Returns the error over what is allowed: infinity if it is not finite where the map is; 0 where the map is not."""
    excess = tl.where(error == error, error / allowed, float("inf"))
    return tl.where(allowed < float("inf"), excess, 0.0)


@triton.jit
def _store_row(found, rows_count, excess, got, expected, allowed):
    tl.store(found, excess)
    tl.store(found + rows_count, got)
    tl.store(found + 2 * rows_count, expected)
    tl.store(found + 3 * rows_count, allowed)


@triton.jit(do_not_specialize=["heads", "probes", "rows_count", "first"])
def probe_worst_kernel(
    found,  # [2, 4, S, P, HQ]
    bounds,
    rows,
    values,  # [2, 4]: the worst row's
    places,  # [2, 3]: batch row, token, query head
    heads,
    probes,
    rows_count,
    first,  # 1 where there is no output
    BLOCK: tl.constexpr,
):
    """The output or the log-sum-exp fixed: the first of its rows of the largest excess."""
    name = (first + tl.program_id(0)).to(tl.int64)
    found += name * 4 * rows_count
    i = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -1.0, tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for at in range(0, rows_count, BLOCK):
        excess = tl.load(found + at + i, mask=at + i < rows_count, other=-1.0)
        where = tl.where(excess > highest, at + i, where)
        highest = tl.maximum(highest, excess)
    worst = tl.min(tl.where(highest == tl.max(highest), where, rows_count)).to(tl.int64)
    for field in tl.static_range(4):
        tl.store(values + name * 4 + field, tl.load(found + field * rows_count + worst))
    row = worst // heads
    places += name * 3
    tl.store(places, tl.load(bounds + row // probes * 3))
    tl.store(places + 1, tl.maximum(tl.load(rows + row), 0))
    tl.store(places + 2, worst % heads)


def probe(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    layout: Layout,
    options: Options,
    rounding: Rounding | None,
    wanted: Tensor | None = None,
) -> list[tuple[str, Deviation]]:
    """Does the work of `verify.probe_output`; of `verify.probe_lse` for heads wanted [S, HQ], without v, rounding."""
    rounding = rounding or Rounding(0.0, 0.0, 0.0, 0.0, 0.0)  # which a log-sum-exp does not depend on
    rows = verify.probed_rows(layout, verify.END_ROWS if v is None else verify.PROBES)
    chunks, first_chunk = layout.keep(("chunks", CHUNK), lambda: _chunks(layout))
    if len(chunks) == 0:
        return []
    batch, heads, tokens, size = q.shape
    key_heads, probes, device = k.shape[1], rows.shape[1], q.device
    v, out = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (v, out))
    size_v = 1 if v is None else v.shape[-1]
    tiles = triton.cdiv(heads // key_heads * probes, BLOCK_M)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with_out = v is not None
    found = scratch(2, 4, *rows.shape, heads)
    shared = {
        "q": q,
        "rows": rows,
        "scores": scratch(heads, probes, batch, tokens) if with_out else None,
        "lengths": scratch(key_heads, batch, tokens) if with_out else None,
        "longest": scratch(len(chunks), key_heads, 2),
        "peaks": scratch(len(chunks), heads, probes),
        "totals": scratch(len(chunks), heads, probes),
        "outputs": scratch(len(chunks), heads, probes, size_v) if with_out else None,
        **_strides("q", q, "bht"),
        "places": batch * tokens,
        "tokens": tokens,
        "heads": heads,
        "probes": probes,
        "sliding_window": tokens if options.sliding_window is None else min(options.sliding_window, tokens),
        "scale": options.scale,
        "GROUP": heads // key_heads,
        "SIZE": size,
        "BLOCK_D": padded_size(size),
        "SIZE_V": size_v,
        "BLOCK_DV": padded_size(size_v),
        "CHUNK": CHUNK,
        "USE_OUT": with_out,
    }
    with torch.cuda.device_of(q):
        probe_scores_kernel[(len(chunks) * key_heads * tiles,)](
            k=k,
            v=v,
            chunks=chunks,
            **_strides("k", k, "bht"),
            **_strides("v", v, "bht"),
            cap=options.softcap or 0.0,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N[8 * q.element_size()],
            GAIN=2.0**15 if with_out and v.dtype == torch.float16 else 1.0,
            USE_SOFTCAP=options.softcap is not None,
            num_warps=WARPS,
            num_stages=STAGES,
            **shared,
        )
        probe_errors_kernel[(rows.numel() * heads,)](
            out=out,
            lse=lse,
            bounds=layout.table,
            first_chunk=first_chunk,
            wanted=wanted,
            sinks=None if options.sinks is None else options.sinks.contiguous(),
            found=found,
            **_strides("o", out, "bth"),
            **_strides("l", lse, "bht"),
            **_strides("w", wanted, "sh"),
            rows_count=rows.numel() * heads,
            slip=rounding.weights,
            slip_of_reach=rounding.factors + verify.ACCUMULATED,
            slip_of_score=rounding.scores,
            rounding_out=rounding.out,
            smallest=rounding.smallest,
            BLOCK_C=16,
            BLOCK_N=512,
            USE_SINKS=options.sinks is not None,
            USE_WANTED=wanted is not None,
            USE_LSE=lse is not None,
            **shared,
        )
        names = ["output"] * with_out + ["log-sum-exp"] * (lse is not None)
        values, places = scratch(2, 4), scratch(2, 3, dtype=torch.int64)
        first = 0 if with_out else 1
        probe_worst_kernel[(len(names),)](
            found=found,
            bounds=layout.table,
            rows=rows,
            values=values,
            places=places,
            heads=heads,
            probes=probes,
            rows_count=rows.numel() * heads,
            first=first,
            BLOCK=1024,
        )
    worst = zip(names, values[first:], places[first:])
    return [(name, Deviation(value[0], place, value[1:])) for name, value, place in worst]


def _chunks(layout: Layout) -> tuple[Tensor, Tensor]:
    """(sequence, batch row, first key, one past the last of the sequence) of each chunk, and each sequence's first."""
    bounds = torch.tensor(layout.bounds, dtype=torch.int64, device="cpu").view(-1, 3)
    batch, begin, end = bounds.unbind(-1)
    count = (end - begin + CHUNK - 1) // CHUNK
    first = count.cumsum(0) - count
    sequence = torch.repeat_interleave(torch.arange(len(count), device="cpu"), count)
    start = begin[sequence] + (torch.arange(len(sequence), device="cpu") - first[sequence]) * CHUNK
    table = torch.stack([sequence, batch[sequence], start, end[sequence]], -1)
    sent = send(torch.cat([table.flatten(), first]).int(), layout.rows.device)
    return sent[: table.numel()].view(-1, CHUNK_FIELDS.value), sent[table.numel() :]


def _strides(letter: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """The strides of a tensor's first axes, by name."""
    return {f"stride_{letter}{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate(axes)}
