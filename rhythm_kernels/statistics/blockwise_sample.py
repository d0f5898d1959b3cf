"""The span of the blockwise backend from a sample of rows, with a given log-sum-exp: only those rows are read.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k; S sequences; G is HQ / H. A
block has n = SPAN_BLOCK rows of one sequence.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import SPAN_BLOCK
from rhythm_kernels.statistics.blockwise_scores import LOG2_E, all_bits, softcapped
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.spans import mean_of_units, span_sample, to_units

SCORES = 5 << 16  # held at once: with their queries and keys they fit a core's second-level cache
NEAR = 64.0  # the largest absolute base-2 log-sum-exp that divides sums; a larger one is subtracted from scores


class _Tile(NamedTuple):
    """Some of the keys that the rows of a block see."""

    keys: slice
    factors: Tensor
    """fp32 [2, keys]: 1, and t0 - s, how far the block's first row is behind the key."""
    seen: list[tuple[slice, Tensor]]
    """For its first or last keys int32 [keys, 1, n]: -1, all bits, where a row sees a key, else 0. All rows see the
    keys that are not in the list."""


class _Block(NamedTuple):
    """A block of n rows that are read. Those behind the end of its sequence are some other tokens."""

    slot: int
    batch_row: int
    tiles: list[_Tile]


class _Blocks(NamedTuple):
    """The blocks of a batch, which the layers of a forward share."""

    blocks: list[_Block]
    rows: Tensor
    """int64 [slots, n]: the rows of each slot."""
    sampled: Tensor
    """bool [slots, n]: whether a row belongs to the sample."""


def sampled_span(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options) -> Tensor:
    """Returns the spans over the rows of `options.span_rows`, fp32 [S, HQ]; `options.sinks` are part of the lse."""
    key_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    key = ("sampled blocks", options.span_rows, options.sliding_window, group)
    blocks, rows, sampled = layout.keep(key, lambda: _blocks(layout, options, group))
    sample = span_sample(layout, options.span_rows)
    # scores are base-2 logarithms here: exp takes up to a hundred times as long as exp2 where a weight is almost 0
    softcap = None if options.softcap is None else options.softcap * LOG2_E
    options = options._replace(scale=options.scale * LOG2_E, softcap=softcap)
    row_lse = lse.transpose(1, 2)[sample.tiles[:, :1].long(), rows].transpose(1, 2) * LOG2_E  # [slots, HQ, n]
    row_lse = row_lse.reshape(len(rows), key_heads, 1, group * SPAN_BLOCK)
    # where the log-sum-exp divides the sums, no exponential of a score overflows, and a pass over the scores is saved
    is_far = ~(row_lse.abs() <= NEAR)
    shift = row_lse.where(is_far, 0.0) if is_far.any() else None
    sums = row_lse.new_zeros(len(rows), key_heads, 2, group * SPAN_BLOCK)
    for block in blocks:
        queries = q[block.batch_row][:, rows[block.slot]].float() * options.scale
        queries = queries.view(key_heads, -1, q.shape[3]).mT  # [H, D, G n]
        shifts = [None] * key_heads if shift is None else shift[block.slot]
        by_head = zip(k[block.batch_row], queries, shifts, sums[block.slot], strict=True)
        for head_keys, head_queries, head_shift, head_sums in by_head:
            for keys, factors, seen in block.tiles:
                weights = softcapped(head_keys[keys].float() @ head_queries, options)  # [keys, G n]
                if head_shift is not None:
                    weights -= head_shift
                weights.exp2_()
                for part, is_seen in seen:
                    bits = weights[part].view(torch.int32).view(-1, group, SPAN_BLOCK)
                    bits &= is_seen
                head_sums.addmm_(factors, weights)  # both sums at once, which reads the weights once
    sums *= torch.where(is_far, 1.0, row_lse.neg().exp2_())
    total, looked_back = sums.unflatten(3, (-1, SPAN_BLOCK)).unbind(2)  # [slots, H, G, n]
    # distances were counted from the first row t0: sum_s A[t, s] (t0 - s) + (t - t0) sum_s A[t, s]
    looked_back = looked_back + total * torch.arange(SPAN_BLOCK, device=q.device)
    looked_back = looked_back.where(sampled[:, None, None], 0.0).double().sum(-1).flatten(1)
    units, is_broken = to_units(looked_back)
    total, broken = (torch.zeros(layout.sequences, q.shape[1], dtype=torch.int64, device=q.device) for _ in range(2))
    total.index_add_(0, sample.sequences, units)
    broken.index_add_(0, sample.sequences, is_broken.long())
    return mean_of_units(total, broken, sample.row_counts[:, None])


def _blocks(layout: Layout, options: Options, group: int) -> _Blocks:
    table = span_sample(layout, options.span_rows).tiles
    batch_row, start, _, end, index = table.long()[..., None].unbind(1)
    rows = start + torch.arange(SPAN_BLOCK, device=table.device)
    inside = (rows < end) & (index >= 0)
    rows.clamp_(max=layout.rows.shape[1] - 1)
    size = max(SPAN_BLOCK, SCORES // (group * SPAN_BLOCK))
    blocks = [
        _Block(slot, batch_row, _tiles(start, min(start + SPAN_BLOCK, end), first, options, size, table.device))
        for slot, (batch_row, start, first, end, index) in enumerate(table.tolist())
        if index >= 0
    ]
    return _Blocks(blocks, rows, layout.rows[batch_row, rows] & inside)


def _tiles(begin: int, end: int, first: int, options: Options, size: int, device: torch.device) -> list[_Tile]:
    """Returns tiles of at most `size` keys for the rows begin..end of a sequence that begins with the token `first`."""
    window = end if options.sliding_window is None else options.sliding_window
    first_key, all_see_from = (max(first, t - window + 1) for t in (begin, end - 1))
    tiles = []
    for start, stop in itertools.pairwise([*range(first_key, end, size), end]):
        behind = begin - torch.arange(start, stop, device=device)
        seen = []
        for part in (slice(0, max(0, all_see_from - start)), slice(max(0, begin - start), None)):
            distance = behind[part, None, None] + torch.arange(SPAN_BLOCK, device=device)
            if len(distance) > 0:
                seen.append((part, all_bits((distance >= 0) & (distance < window))))
        tiles.append(_Tile(slice(start, stop), torch.stack([torch.ones_like(behind), behind]).float(), seen))
    return tiles
