"""Which rows of R the span of each head is read from, and the mean over them.

A span only ranks heads, so a sample of the rows serves. A sequence is cut into blocks of SPAN_BLOCK tokens, beginning
with its own first one; those that hold a row of R are active. Each head reads some of the active blocks, and of them
all rows of R. Everything here is integers and depends on the sequence alone, so a sequence has the same sample alone
and in any batch. The tables are made from R on its device, which the host does not wait for.

Shapes: B batch rows, T tokens, HQ query heads; S sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.checks import SPAN_BLOCK
from rhythm_kernels.host import send
from rhythm_kernels.statistics.layout import Layout, sum_over_tokens

SPAN_UNIT = 2.0**-20  # tokens: spans are summed as integers of this unit, so that the order does not matter
SPAN_OFFSET = 39  # of SPAN_BLOCK, from head to head: 39/64 is near the golden ratio, which spreads any number of heads


class SpanSample(NamedTuple):
    """The blocks that each head reads. A sequence has a slot for each of them, at most span_rows / SPAN_BLOCK."""

    blocks: Tensor
    """int32 [slots, HQ]: the block's index in `layout.tiles(SPAN_BLOCK)`; -1 in a slot that the head does not need."""
    bounds: Tensor
    """int32 [S + 1]: the first slot of each sequence, and one past the last slot."""
    sequences: Tensor
    """int64 [slots]: the sequence of each slot."""
    row_counts: Tensor
    """int64 [S, HQ]: the sampled rows."""


def leaves_out_rows(layout: Layout, span_rows: int | None) -> bool:
    """Returns whether a sequence may be so long that not all of its rows are sampled; the host knows it."""
    if span_rows is None:
        return False
    return any(end - begin > span_rows for _, begin, end in layout.bounds)


def span_sample(layout: Layout, span_rows: int, heads: int) -> SpanSample:
    """Returns the blocks that each of the heads reads for its span; span_rows is a multiple of SPAN_BLOCK."""
    return layout.keep(("span sample", span_rows, heads), lambda: _span_sample(layout, span_rows, heads))


def sampled_rows(layout: Layout, span_rows: int, heads: int) -> Tensor:
    """Returns the rows of R in the blocks of each head: bool [B, HQ, T]."""
    return layout.keep(("sampled rows", span_rows, heads), lambda: _sampled_rows(layout, span_rows, heads))


def mean_over_rows(values: Tensor, layout: Layout, span_rows: int | None = None) -> Tensor:
    """Returns the mean over the rows of R, or a sample of them, in each sequence: fp32 [S, HQ].

    It is 0 without such a row, and NaN if the value of one is not finite. The values are summed as integers of
    `SPAN_UNIT`. So a sequence has the same mean alone and in any batch.

    Args:
        values: [B, HQ, T] below 2^20, 0 outside R.
        span_rows: None for all rows of R.
    """
    units, broken = to_units(values)
    if span_rows is None:
        counts = layout.row_counts()[:, None]
    else:
        sample = sampled_rows(layout, span_rows, values.shape[1])
        units, broken = units * sample, broken & sample
        counts = span_sample(layout, span_rows, values.shape[1]).row_counts
    return mean_of_units(sum_over_tokens(units, layout), sum_over_tokens(broken, layout), counts)


def to_units(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values below 2^20 as int64 multiples of `SPAN_UNIT`, 0 where they are not finite, and where that is."""
    finite = values.isfinite()
    return torch.where(finite, values.double() / SPAN_UNIT, 0.0).round().long(), ~finite


def mean_of_units(total: Tensor, broken: Tensor, counts: Tensor) -> Tensor:
    """Returns total * SPAN_UNIT / counts in fp32, 0 where nothing is counted, NaN where `broken` is not 0."""
    mean = total.double() * SPAN_UNIT / counts.clamp(min=1)
    return mean.masked_fill(broken > 0, torch.nan).float()


def _span_sample(layout: Layout, span_rows: int, heads: int) -> SpanSample:
    device, most = layout.rows.device, span_rows // SPAN_BLOCK
    first_block, first_slot, sequence, slot = (send(x, device) for x in _slots(layout, most))

    batch_row, start, _, end, _ = layout.tiles(SPAN_BLOCK).long().unbind(-1)
    rows_before = pad(layout.rows.long().cumsum(-1), (1, 0))  # [B, T + 1]: the number of rows of R below t
    stop = torch.minimum(start + SPAN_BLOCK, end)
    row_counts = rows_before[batch_row, stop] - rows_before[batch_row, start]  # [blocks]
    is_active = row_counts > 0
    active_before = pad(is_active.cumsum(0), (1, 0))  # [blocks + 1]
    # the active blocks in order; one more place takes those that are not
    place = torch.where(is_active, active_before[:-1], len(start))
    active = place.new_zeros(len(start) + 1).scatter_(0, place, torch.arange(len(start), device=device))

    base = active_before[first_block[sequence], None]  # [slots, 1]
    number = active_before[first_block[sequence + 1], None] - base
    offset = torch.arange(heads, device=device) * SPAN_OFFSET % SPAN_BLOCK
    slot = slot[:, None]
    spread = (slot * SPAN_BLOCK + offset) * number // (most * SPAN_BLOCK)
    chosen = torch.where(number <= most, slot, spread)  # [slots, HQ]
    is_read = slot < number
    blocks = active[(base + chosen).clamp(max=len(start))]

    counts = torch.where(is_read, row_counts[blocks], 0)
    row_counts = counts.new_zeros(layout.sequences, heads).index_add_(0, sequence, counts)
    return SpanSample(torch.where(is_read, blocks, -1).int(), first_slot.int(), sequence, row_counts)


def _slots(layout: Layout, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns what the host knows of the slots: the bounds of the sequences and the length of R at most.

    Returns:
        int64, on the host: the first block and the first slot of each sequence, [S + 1]; the sequence of each slot and
        its number in its sequence, [slots].
    """
    bounds = torch.tensor(layout.bounds, dtype=torch.int64, device="cpu").view(-1, 3)
    blocks = (bounds[:, 2] - bounds[:, 1] + SPAN_BLOCK - 1) // SPAN_BLOCK
    slots = blocks.clamp(max=most)
    first_block, first_slot = (pad(counts.cumsum(0), (1, 0)) for counts in (blocks, slots))
    sequence = torch.repeat_interleave(torch.arange(len(slots), device="cpu"), slots)
    return first_block, first_slot, sequence, torch.arange(len(sequence), device="cpu") - first_slot[sequence]


def _sampled_rows(layout: Layout, span_rows: int, heads: int) -> Tensor:
    device, tiles = layout.rows.device, layout.tiles(SPAN_BLOCK).long()
    blocks = span_sample(layout, span_rows, heads).blocks.long()
    read = torch.zeros(len(tiles) + 1, heads, dtype=torch.bool, device=device)
    read.scatter_(0, torch.where(blocks < 0, len(tiles), blocks), True)  # one more place for slots that are not needed
    first_block = send(_slots(layout, 1)[0], device)
    position = torch.arange(layout.rows.shape[1], device=device)
    block = first_block[layout.segments] + (position - layout.first).clamp(min=0) // SPAN_BLOCK  # [B, T]
    return (read[block.clamp(max=len(tiles))] & layout.rows[..., None]).transpose(1, 2)
