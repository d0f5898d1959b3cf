"""The span of the blockwise backend from a sample of rows, with a given log-sum-exp: only those rows are read.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k; S sequences. A slot is a place
for one block of rows of each head (`SpanSample`); N slots are computed at once.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import SPAN_BLOCK
from rhythm_kernels.statistics.blockwise_scores import LOG2_E, softcapped
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.spans import mean_of_units, span_sample, to_units

SAMPLE_BYTES = 4 << 20  # of fp32 scores held at once: what fits a cache is faster


class _Blocks(NamedTuple):
    """The blocks of some slots and all heads, and the keys that any of them sees. Each tensor is int64."""

    batch_row: Tensor
    """[N]"""
    start: Tensor
    """[N, HQ]: the block's first token."""
    end: Tensor
    """[N, HQ]: one past the block's last token; `start` where the head has no block in this slot."""
    first_key: Tensor
    """[N]: the first key that a row of the slot sees; the keys of a slot lie side by side."""


class _Run(NamedTuple):
    """Slots that are computed at once."""

    slots: Tensor
    """int64 [N], on the device."""
    rows: slice
    """The rows of each block that are computed."""
    keys: int
    """How many keys are read for each slot."""
    seen_by_all: int
    """The number of the first of these keys that not every row sees, without a sliding window."""


def sampled_span(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options) -> Tensor:
    """Returns the spans over the rows of `options.span_rows`, fp32 [S, HQ]; `options.sinks` are part of the lse."""
    heads = q.shape[1]
    sample = span_sample(layout, options.span_rows, heads)
    total, broken = (torch.zeros(layout.sequences, heads, dtype=torch.int64, device=q.device) for _ in range(2))
    for run in _runs(layout, options, heads):
        units, is_broken = to_units(_mean_distances(q, k, lse, run, layout, options))
        total.index_add_(0, sample.sequences[run.slots], units.sum(-1))
        broken.index_add_(0, sample.sequences[run.slots], is_broken.sum(-1))
    return mean_of_units(total, broken, sample.row_counts)


def _runs(layout: Layout, options: Options, heads: int) -> Iterator[_Run]:
    """Yields runs of slots of like lengths, as many as SAMPLE_BYTES hold."""
    kept = ("sample lengths", options.span_rows, options.sliding_window, heads)
    lengths, starts, order = layout.keep(kept, lambda: _lengths(layout, options, heads))
    at = 0
    while at < len(lengths) and lengths[at] > 0:
        row_bytes = 4 * heads * lengths[at]
        rows = max(1, min(SPAN_BLOCK, SAMPLE_BYTES // row_bytes))
        most = max(1, SAMPLE_BYTES // (row_bytes * rows))
        seen_by_all = min(starts[at : at + most])
        for begin in range(0, SPAN_BLOCK, rows):
            part = slice(begin, min(begin + rows, SPAN_BLOCK))
            yield _Run(order[at : at + most], part, lengths[at], seen_by_all)
        at += most


def _lengths(layout: Layout, options: Options, heads: int) -> tuple[list[int], list[int], Tensor]:
    """Returns how many keys the slots need, descending; how many of them lie before all blocks; the slots' order.

    The order is int64 [slots], on the device.
    """
    slots = len(span_sample(layout, options.span_rows, heads).blocks)
    blocks = _blocks_of(torch.arange(slots, device=layout.rows.device), layout, options, heads)
    is_read = blocks.end > blocks.start
    start, end = (x - blocks.first_key[:, None] for x in (blocks.start, blocks.end))
    lengths, order = torch.where(is_read, end, 0).amax(-1).sort(descending=True, stable=True)
    return lengths.tolist(), torch.where(is_read, start, layout.rows.shape[1]).amin(-1)[order].tolist(), order


def _blocks_of(slots: Tensor, layout: Layout, options: Options, heads: int) -> _Blocks:
    tiles = layout.tiles(SPAN_BLOCK).long()
    block = span_sample(layout, options.span_rows, heads).blocks[slots].long()
    is_read = block >= 0
    batch_row, start, first, last, _ = tiles[block.clamp(min=0)].unbind(-1)  # [N, HQ]; one sequence for each slot
    end = torch.where(is_read, torch.minimum(start + SPAN_BLOCK, last), start)
    first_key = first[:, 0]
    if options.sliding_window is not None:
        nearest = torch.where(is_read, start, layout.rows.shape[1]).amin(-1)
        first_key = torch.maximum(first_key, nearest - options.sliding_window + 1)
    return _Blocks(batch_row[:, 0], start, end, first_key)


def _mean_distances(q: Tensor, k: Tensor, lse: Tensor, run: _Run, layout: Layout, options: Options) -> Tensor:
    """Returns sum_s A[t, s] (t - s) of a run's rows, fp32 [N, HQ, rows], 0 outside R."""
    blocks = _blocks_of(run.slots, layout, options, q.shape[1])
    heads, tokens, size = q.shape[1:]
    batch_row = blocks.batch_row[:, None, None]
    head = torch.arange(heads, device=q.device)[None, :, None]
    row = blocks.start[..., None] + torch.arange(run.rows.start, run.rows.stop, device=q.device)  # [N, HQ, rows]
    is_inside = row < blocks.end[..., None]
    row = row.clamp(max=tokens - 1)
    in_response = is_inside & layout.rows[batch_row, row]
    key = blocks.first_key[:, None] + torch.arange(run.keys, device=q.device)  # [N, keys]

    # scores are base-2 logarithms here: exp2 takes half the time of exp
    queries = q[batch_row, head, row].float().mul_(options.scale * LOG2_E).reshape(len(key), k.shape[1], -1, size)
    near = k[blocks.batch_row[:, None], :, key.clamp(max=tokens - 1)].transpose(1, 2).float()  # [N, H, keys, D]
    softcap = None if options.softcap is None else options.softcap * LOG2_E
    scores = softcapped((queries @ near.mT).view(*row.shape, run.keys), options._replace(softcap=softcap))
    open_keys = slice(run.seen_by_all if options.sliding_window is None else 0, None)
    distance = row[..., None].int() - key[:, None, None, open_keys].int()
    hidden = distance < 0
    if options.sliding_window is not None:
        hidden |= distance >= options.sliding_window
    scores[..., open_keys].masked_fill_(hidden, -math.inf)
    row_lse = lse[batch_row, head, row].masked_fill(~in_response, 0.0)
    weights = scores.sub_(row_lse[..., None] * LOG2_E).exp2_()
    return torch.where(in_response, _looked_back(weights, run.keys - 1 + blocks.first_key[:, None, None] - row), 0.0)


def _looked_back(weights: Tensor, behind: Tensor) -> Tensor:
    """Returns sum_s A[t, s] (t - s), [N, HQ, rows], of weights A [N, HQ, rows, keys].

    Distances are counted from the last key and then moved: a sum with factors that all rows share is a product. Most
    weight lies near the last key where distances are short, so that little cancels.

    Args:
        behind: int64 [N, HQ, rows], how many tokens the last key is behind the row.
    """
    keys = weights.shape[-1]
    from_last = torch.arange(keys - 1, -1, -1, device=weights.device, dtype=torch.float32)
    total, distance = (weights @ torch.stack([torch.ones_like(from_last), from_last], -1)).unbind(-1)
    return distance - behind * total
