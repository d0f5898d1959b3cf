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


@triton.jit
def load_sampled_place(tiles, blocks, heads, FIELDS: tl.constexpr, BLOCK_M: tl.constexpr, SPAN_BLOCK: tl.constexpr):
    """Returns what `load_place` returns, for the tile of BLOCK_M rows that this program reads for its head's span.

    Where the head has no block in the slot, the tile lies behind the end of its sequence, which is then 0.

    tiles: [blocks, FIELDS], `Layout.tiles(SPAN_BLOCK)`; blocks: [sample slots, heads], `SpanSample.blocks`.
    """
    program, PARTS = tl.program_id(0), SPAN_BLOCK // BLOCK_M
    head, part = program % heads, program // heads % PARTS
    block = tl.load(blocks + (program // heads // PARTS).to(tl.int64) * heads + head)
    tile = tiles + tl.maximum(block, 0) * FIELDS
    batch, start, begin = tl.load(tile).to(tl.int64), tl.load(tile + 1) + part * BLOCK_M, tl.load(tile + 2)
    end = tl.where(block >= 0, tl.load(tile + 3), 0)
    return batch, start, begin, end, tl.load(tile + 4).to(tl.int64), head.to(tl.int64)


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


@triton.jit(do_not_specialize=["tokens", "heads", "slots"])
def sampled_span_kernel(
    totals,  # [HQ, slots], of `forward_kernel`, a sum for TOTAL_ROWS rows
    tiles,  # [blocks, PLACE_FIELDS], `Layout.tiles(SPAN_BLOCK)`
    blocks,  # [sample slots, HQ], `SpanSample.blocks`
    sample_bounds,  # [S + 1], `SpanSample.bounds`
    row_counts,  # [S, HQ], `SpanSample.row_counts`
    span,  # [S, HQ]
    tokens,
    heads,
    slots,
    TOTAL_ROWS: tl.constexpr,
    SPAN_BLOCK: tl.constexpr,
    SAMPLE_ONLY: tl.constexpr,  # whether totals holds the sample alone, slot by slot
    BLOCK: tl.constexpr,
):
    """Computes the span of one sequence and head over its sampled rows, with the bits of `mean_over_rows`."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    to = sequence.to(tl.int64) * heads + head
    row_count = tl.load(row_counts + to)
    begin, end = tl.load(sample_bounds + sequence), tl.load(sample_bounds + sequence + 1)
    totals += head.to(tl.int64) * slots
    PARTS: tl.constexpr = SPAN_BLOCK // TOTAL_ROWS
    part = tl.arange(0, PARTS)[None, :]
    units, broken = tl.zeros([BLOCK, PARTS], tl.int64), tl.zeros([BLOCK, PARTS], tl.int32)
    for first in range(begin, end, BLOCK):
        slot = (first + tl.arange(0, BLOCK)).to(tl.int64)
        block = tl.load(blocks + slot * heads + head, mask=slot < end, other=-1)
        tile = tiles + tl.maximum(block, 0) * PLACE_FIELDS
        start, last = tl.load(tile + 1), tl.load(tile + 3)
        inside = (block >= 0)[:, None] & (start[:, None] + part * TOTAL_ROWS < last[:, None])
        if not SAMPLE_ONLY:
            batch, sequence_begin = tl.load(tile).to(tl.int64), tl.load(tile + 2)
            slot = first_slot(batch, sequence_begin, sequence, tokens, TOTAL_ROWS)
            at = (slot + (start - sequence_begin) // TOTAL_ROWS)[:, None] + part
        else:
            at = slot[:, None] * PARTS + part
        total = tl.load(totals + at, mask=inside, other=0)
        broken |= (total == BROKEN).to(tl.int32)
        units += total
    mean = _mean_of(tl.sum(tl.sum(units, 1), 0), tl.max(tl.max(broken, 1), 0), row_count)
    tl.store(span + to, mean)


@triton.jit
def _mean_of(units, broken, row_count):
    mean = units.to(tl.float64) / PER_TOKEN / tl.maximum(row_count, 1).to(tl.float64)
    return tl.where(broken > 0, float("nan"), mean.to(tl.float32))


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
        BLOCK=SPAN_TILES,
        num_warps=1,
    )
    return span


def sampled_mean_spans(
    totals: Tensor, layout: Layout, sample: SpanSample, total_rows: int, sample_only: bool
) -> Tensor:
    """Returns the spans over the sampled rows, fp32 [S, HQ], from sums of `forward_kernel`, each over total_rows rows.

    Args:
        totals: int64 [HQ, slots].
        sample_only: whether they are those of the sample alone, slot by slot.
    """
    heads, slots = totals.shape
    span = torch.empty((layout.sequences, heads), dtype=torch.float32, device=totals.device)
    sampled_span_kernel[(layout.sequences * heads,)](
        totals=totals,
        tiles=layout.tiles(SPAN_BLOCK),
        blocks=sample.blocks,
        sample_bounds=sample.bounds,
        row_counts=sample.row_counts,
        span=span,
        tokens=layout.rows.shape[1],
        heads=heads,
        slots=slots,
        TOTAL_ROWS=total_rows,
        SPAN_BLOCK=SPAN_BLOCK,
        SAMPLE_ONLY=sample_only,
        BLOCK=SPAN_SLOTS,
        num_warps=1,
    )
    return span
