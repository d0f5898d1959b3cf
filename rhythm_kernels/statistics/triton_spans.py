"""The spans from the sums that the forward pass leaves of its rows' mean distances: over all rows of R or a sample.

Shapes: HQ query heads; S sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm_kernels.checks import SPAN_BLOCK
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.spans import SPAN_UNIT, SpanSample

PLACE_FIELDS = tl.constexpr(5)  # of a row of Layout.tiles
PER_TOKEN = tl.constexpr(1 / SPAN_UNIT)
BROKEN = tl.constexpr(-(1 << 62))  # in place of a sum with a distance that is not finite
SPAN_TILES = 128  # a program of `span_kernel` adds so many sums at a time
SPAN_SLOTS = 32  # a program of `sampled_span_kernel` reads so many slots at a time


@triton.jit
def span_units(distance):
    """Returns finite mean distances as int64 multiples of `SPAN_UNIT`, rounded to the nearest, halves to even."""
    units = distance * PER_TOKEN
    below = tl.floor(units)
    rest, number = units - below, below.to(tl.int64)
    return number + ((rest > 0.5) | ((rest == 0.5) & (number % 2 != 0))).to(tl.int64)


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
    mean = _mean_of(tl.sum(units, 0), tl.max(broken, 0), row_count)
    tl.store(span + sequence.to(tl.int64) * heads + head, mean)


@triton.jit(do_not_specialize=["tokens", "heads", "slots", "parts"])
def sampled_span_kernel(
    totals,  # [parts, HQ, slots], of `forward_kernel`, sums for TOTAL_ROWS rows
    tiles,  # [sample slots, PLACE_FIELDS], of `SpanSample`
    sample_bounds,  # [S + 1], of `SpanSample`
    row_counts,  # [S], of `SpanSample`
    span,  # [S, HQ]
    tokens,
    heads,
    slots,
    parts,
    TOTAL_ROWS: tl.constexpr,
    SPAN_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the span of one sequence and head over its sampled rows, with the bits of `mean_over_rows`."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    begin, end = tl.load(sample_bounds + sequence), tl.load(sample_bounds + sequence + 1)
    row_count = tl.load(row_counts + sequence)
    totals += head.to(tl.int64) * slots
    PARTS: tl.constexpr = SPAN_BLOCK // TOTAL_ROWS
    part = tl.arange(0, PARTS)[None, :]
    units, broken = tl.zeros([BLOCK, PARTS], tl.int64), tl.zeros([BLOCK, PARTS], tl.int32)
    for at in range(begin, end, BLOCK):
        i = at + tl.arange(0, BLOCK)
        tile, exists = tiles + i * PLACE_FIELDS, i < end
        batch = tl.load(tile, mask=exists, other=0).to(tl.int64)
        start, first = tl.load(tile + 1, mask=exists, other=0), tl.load(tile + 2, mask=exists, other=0)
        last = tl.load(tile + 3, mask=exists, other=0)  # 0 in a slot without a block
        slot = first_slot(batch, first, sequence, tokens, TOTAL_ROWS) + (start - first) // TOTAL_ROWS
        inside = start[:, None] + part * TOTAL_ROWS < last[:, None]
        place = totals + slot[:, None] + part
        for _ in range(parts):
            total = tl.load(place, mask=inside, other=0)
            broken |= (total == BROKEN).to(tl.int32)
            units += total
            place += heads.to(tl.int64) * slots
    mean = _mean_of(tl.sum(tl.sum(units, 1), 0), tl.max(tl.max(broken, 1), 0), row_count)
    tl.store(span + sequence.to(tl.int64) * heads + head, mean)


@triton.jit
def _mean_of(units, broken, row_count):
    mean = units.to(tl.float64) / PER_TOKEN / tl.maximum(row_count, 1).to(tl.float64)
    return tl.where(broken > 0, float("nan"), mean.to(tl.float32))


def mean_spans(totals: Tensor, layout: Layout, block_m: int) -> Tensor:
    """Returns the spans, fp32 [S, HQ], from the sums of `forward_kernel` over tiles of block_m rows.

    totals: int64 [1, HQ, slots].
    """
    _, heads, slots = totals.shape  # one part
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
        BLOCK=SPAN_TILES,
        num_warps=1,
    )
    return span


def sampled_mean_spans(totals: Tensor, layout: Layout, sample: SpanSample, total_rows: int) -> Tensor:
    """Returns the spans over the sampled rows, fp32 [S, HQ], from sums of `forward_kernel`, each over total_rows rows.

    totals: int64 [parts, HQ, slots]; only those of the sampled rows are read.
    """
    parts, heads, slots = totals.shape
    span = torch.empty((layout.sequences, heads), dtype=torch.float32, device=totals.device)
    sampled_span_kernel[(layout.sequences * heads,)](
        totals=totals,
        tiles=sample.tiles,
        sample_bounds=sample.bounds,
        row_counts=sample.row_counts,
        span=span,
        tokens=layout.rows.shape[1],
        heads=heads,
        slots=slots,
        parts=parts,
        TOTAL_ROWS=total_rows,
        SPAN_BLOCK=SPAN_BLOCK,
        BLOCK=SPAN_SLOTS,
        num_warps=1,
    )
    return span
