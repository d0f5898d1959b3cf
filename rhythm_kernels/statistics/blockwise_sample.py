"""The span of the blockwise backend from a sample of rows, with a given log-sum-exp: only those rows are read.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k; S sequences. A block has n rows
of one sequence. G is HQ / H.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import SPAN_BLOCK
from rhythm_kernels.statistics.blockwise_scores import LOG2_E, all_bits, softcapped
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.spans import mean_of_units, span_sample, to_units

SCORES = 5 << 16  # held at once: with their queries and keys they fit a core's second-level cache
KEY_TILE = 512  # keys; a product with fewer takes longer for each


class _Block(NamedTuple):
    """A block of rows that are read, on the host."""

    slot: int
    batch_row: int
    rows: slice
    first: int
    """The first token of the rows' sequence."""


def sampled_span(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options) -> Tensor:
    """Returns the spans over the rows of `options.span_rows`, fp32 [S, HQ]; `options.sinks` are part of the lse."""
    sample = span_sample(layout, options.span_rows)
    # scores are base-2 logarithms here: exp2 takes half the time of exp
    softcap = None if options.softcap is None else options.softcap * LOG2_E
    options = options._replace(scale=options.scale * LOG2_E, softcap=softcap)
    memory = q.new_empty(max(SCORES, SPAN_BLOCK * q.shape[1] // k.shape[1]), dtype=torch.float32)
    looked_back = q.new_zeros(len(sample.sequences), q.shape[1], dtype=torch.float64)
    for block in layout.keep(("sampled blocks", options.span_rows), lambda: _blocks(layout, options.span_rows)):
        looked_back[block.slot] = _looked_back(q, k, lse, block, layout, options, memory)
    units, is_broken = to_units(looked_back)
    total, broken = (torch.zeros(layout.sequences, q.shape[1], dtype=torch.int64, device=q.device) for _ in range(2))
    total.index_add_(0, sample.sequences, units)
    broken.index_add_(0, sample.sequences, is_broken.long())
    return mean_of_units(total, broken, sample.row_counts[:, None])


def _blocks(layout: Layout, span_rows: int) -> list[_Block]:
    return [
        _Block(slot, batch_row, slice(start, min(start + SPAN_BLOCK, end)), first)
        for slot, (batch_row, start, first, end, index) in enumerate(span_sample(layout, span_rows).tiles.tolist())
        if index >= 0
    ]


def _looked_back(
    q: Tensor, k: Tensor, lse: Tensor, block: _Block, layout: Layout, options: Options, memory: Tensor
) -> Tensor:
    """Returns sum_s A[t, s] (t - s) summed over the rows of R in a block, fp64 [HQ]. memory: fp32, for scores.

    Distances are counted from the first row t0, sum_s A[t, s] (t0 - s) + (t - t0) sum_s A[t, s]: with factors that all
    rows share, both sums are one product, which reads the weights once.
    """
    in_response = layout.rows[block.batch_row, block.rows]
    # a row outside R has weights of 0, also where its query is NaN
    queries = (q[block.batch_row, :, block.rows].float() * options.scale).masked_fill_(~in_response[:, None], 0.0)
    row_lse = (lse[block.batch_row, :, block.rows] * LOG2_E).masked_fill_(~in_response, math.inf)
    queries = queries.reshape(k.shape[1], -1, q.shape[-1]).mT  # [H, D, G n]
    row_lse = row_lse.reshape(k.shape[1], 1, -1)  # [H, 1, G n]

    begin, end = block.rows.start, block.rows.stop
    first_key, all_see_from = block.first, block.first
    if options.sliding_window is not None:
        first_key, all_see_from = (max(block.first, t - options.sliding_window + 1) for t in (begin, end - 1))
    behind = begin - torch.arange(first_key, end, device=q.device)  # t0 - s
    factors = torch.stack([torch.ones_like(behind), behind]).float()  # [2, keys]
    size = min(KEY_TILE, len(memory) // queries.shape[2])
    bounds = [*range(first_key, begin, size), *range(begin, end, size), end]
    sums = q.new_zeros(k.shape[1], 2, queries.shape[2], dtype=torch.float32)
    heads_at_once = len(memory) // (queries.shape[2] * size)
    for head in range(0, k.shape[1], heads_at_once):
        heads = slice(head, head + heads_at_once)
        for key_begin, key_end in itertools.pairwise(bounds):
            keys = k[block.batch_row, heads, key_begin:key_end].float()
            scores = memory[: row_lse[heads].numel() * keys.shape[1]].view(*keys.shape[:2], -1)
            torch.bmm(keys, queries[heads], out=scores)  # [heads, keys, G n]
            weights = softcapped(scores, options).sub_(row_lse[heads]).exp2_()
            tile = slice(key_begin - first_key, key_end - first_key)
            if key_begin < all_see_from or key_end > begin:
                mask = _mask(behind[tile], in_response, options)
                weights.view(torch.int32).unflatten(-1, (-1, end - begin)).bitwise_and_(mask[:, None])
            sums[heads].baddbmm_(factors[:, tile].expand(len(keys), -1, -1), weights)
    total, looked_back = sums.view(k.shape[1], 2, -1, end - begin).unbind(1)
    row = torch.arange(end - begin, device=q.device)
    return (total * row + looked_back).double().sum(-1).flatten()


def _mask(behind: Tensor, in_response: Tensor, options: Options) -> Tensor:
    """Returns int32 [keys, n]: -1, all bits, where a row sees a key, else 0: everywhere outside R, where NaN may be.

    behind: int64 [keys], how many tokens the first row is behind the key.
    """
    distance = behind[:, None] + torch.arange(len(in_response), device=behind.device)
    seen = (distance >= 0) & in_response
    if options.sliding_window is not None:
        seen &= distance < options.sliding_window
    return all_bits(seen)
