"""Which rows of R the spans are read from, and the mean over them.

A span only ranks heads, so a sample of the rows serves. A sequence is cut into blocks of SPAN_BLOCK tokens, beginning
with its own first one; those that hold a row of R are active. Of the active blocks the one in the middle of each of
span_rows / SPAN_BLOCK equal parts is read, for all heads alike: a head that was read further back than another one
would have the larger span for that alone. All of this is integers and depends on the sequence alone, so a sequence has
the same sample alone and in any batch. The tables are made from R on its device, which the host does not wait for.

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


class SpanSample(NamedTuple):
    """The blocks that spans are read from. A sequence has a slot for each, at most span_rows / SPAN_BLOCK."""

    tiles: Tensor
    """int32 [slots, 5]: the blocks, as in `Layout.tiles`. A slot without a block has 0 everywhere, and the index -1."""
    bounds: Tensor
    """int32 [S + 1]: the first slot of each sequence, and one past the last slot."""
    sequences: Tensor
    """int64 [slots]: the sequence of each slot."""
    row_counts: Tensor
    """int64 [S]: the sampled rows."""

    def cut(self, block: int) -> Tensor:
        """Returns the tiles cut into tiles of `block` tokens, a part of SPAN_BLOCK: int32 [slots * parts, 5].

        A tile behind the end of its sequence has the index -1.
        """
        part = torch.arange(0, SPAN_BLOCK, block, dtype=torch.int32, device=self.tiles.device)
        batch_row, start, first, end, index = self.tiles[:, None].expand(-1, len(part), -1).unbind(-1)
        start = start + part
        return torch.stack([batch_row, start, first, end, index.where(start < end, -1)], -1).flatten(0, 1)


def leaves_out_rows(layout: Layout, span_rows: int | None) -> bool:
    """Returns whether a sequence is so long that not all of its rows may be sampled. The host knows it.

    Otherwise the sample is R, and needs no tables.
    """
    if span_rows is None:
        return False
    return any(end - begin > span_rows for _, begin, end in layout.bounds)


def span_sample(layout: Layout, span_rows: int) -> SpanSample:
    """Returns the blocks that spans are read from; span_rows is a multiple of SPAN_BLOCK."""
    return layout.keep(("span sample", span_rows), lambda: _span_sample(layout, span_rows))


def sampled_rows(layout: Layout, span_rows: int) -> Tensor:
    """Returns the rows of R in the blocks that spans are read from: bool [B, T]."""
    return layout.keep(("sampled rows", span_rows), lambda: _sampled_rows(layout, span_rows))


def mean_over_rows(values: Tensor, layout: Layout, span_rows: int | None = None) -> Tensor:
    """Returns the mean over the rows of R, or a sample of them, in each sequence: fp32 [S, HQ].

    It is 0 without such a row, and NaN if the value of one is not finite. The values are summed as integers of
    `SPAN_UNIT`. So a sequence has the same mean alone and in any batch.

    Args:
        values: [B, HQ, T] below 2^22, 0 outside R.
        span_rows: None for all rows of R.
    """
    units, broken = to_units(values)
    if not leaves_out_rows(layout, span_rows):
        counts = layout.row_counts()
    else:
        sample = sampled_rows(layout, span_rows)[:, None]
        units, broken = units * sample, broken & sample
        counts = span_sample(layout, span_rows).row_counts
    return mean_of_units(sum_over_tokens(units, layout), sum_over_tokens(broken, layout), counts[:, None])


def to_units(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values below 2^22 as int64 multiples of `SPAN_UNIT`, 0 where they are not finite, and where that is."""
    finite = values.isfinite()
    return torch.where(finite, values.double() / SPAN_UNIT, 0.0).round().long(), ~finite


def mean_of_units(total: Tensor, broken: Tensor, counts: Tensor) -> Tensor:
    """Returns total * SPAN_UNIT / counts in fp32, 0 where nothing is counted, NaN where `broken` is not 0."""
    mean = total.double() * SPAN_UNIT / counts.clamp(min=1)
    return mean.masked_fill(broken > 0, torch.nan).float()


def _span_sample(layout: Layout, span_rows: int) -> SpanSample:
    device, most = layout.rows.device, span_rows // SPAN_BLOCK
    first_block, first_slot, sequence, slot = (send(x, device) for x in _slots(layout, most))

    tiles = layout.tiles(SPAN_BLOCK)
    batch_row, start, _, end, _ = tiles.long().unbind(-1)
    rows_before = pad(layout.rows.long().cumsum(-1), (1, 0))  # [B, T + 1]: the number of rows of R below t
    stop = torch.minimum(start + SPAN_BLOCK, end)
    row_counts = rows_before[batch_row, stop] - rows_before[batch_row, start]  # [blocks]
    is_active = row_counts > 0
    active_before = pad(is_active.cumsum(0), (1, 0))  # [blocks + 1]
    # active[r] is the r-th block that holds a row of R; the last entry collects the others, and is never read
    rank = torch.where(is_active, active_before[:-1], len(start))
    active = rank.new_zeros(len(start) + 1).scatter_(0, rank, torch.arange(len(start), device=device))

    first_active = active_before[first_block[sequence]]  # [slots]
    active_count = active_before[first_block[sequence + 1]] - first_active
    chosen = torch.where(active_count <= most, slot, (2 * slot + 1) * active_count // (2 * most))
    is_read = slot < active_count
    block = active[(first_active + chosen).clamp(max=len(start))].where(is_read, 0)

    counts = torch.zeros(layout.sequences, dtype=torch.int64, device=device)
    counts.index_add_(0, sequence, row_counts[block].where(is_read, 0))
    nothing = torch.tensor([0, 0, 0, 0, -1], dtype=torch.int32, device="cpu")
    tiles = tiles[block].where(is_read[:, None], send(nothing, device))
    return SpanSample(tiles, first_slot.int(), sequence, counts)


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


def _sampled_rows(layout: Layout, span_rows: int) -> Tensor:
    batch_row, start, _, end, index = span_sample(layout, span_rows).tiles.long().unbind(-1)
    tokens = layout.rows.shape[1]
    token = start[:, None] + torch.arange(SPAN_BLOCK, device=start.device)  # [slots, SPAN_BLOCK]
    inside = (token < end[:, None]) & (index >= 0)[:, None]
    # one more token takes what lies outside
    sample = torch.zeros(layout.rows.numel() + 1, dtype=torch.bool, device=start.device)
    sample[torch.where(inside, batch_row[:, None] * tokens + token, layout.rows.numel())] = True
    return sample[:-1].view(layout.rows.shape) & layout.rows
