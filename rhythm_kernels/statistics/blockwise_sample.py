"""The span of the blockwise backend from a sample of rows, with a given log-sum-exp: only those rows are read.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k; S sequences. A block has n rows
of one sequence. G is HQ / H.
"""

import itertools
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
    """Returns sum_t sum_s A[t, s] (t - s) over the rows of R in a block, fp64 [HQ]. memory: fp32, for scores.

    With t0 the first row this is sum_s (t0 - s) sum_t A[t, s] + sum_s sum_t (t - t0) A[t, s]. So the weights are read
    once, by a product with two factors for each row, and a distance is multiplied once for each key.
    """
    group, (begin, end) = q.shape[1] // k.shape[1], (block.rows.start, block.rows.stop)
    in_response = layout.rows[block.batch_row, block.rows]
    # a row outside R has weights of 0, also where its query is NaN
    queries = (q[block.batch_row, :, block.rows].float() * options.scale).masked_fill_(~in_response[:, None], 0.0)
    queries = queries.reshape(k.shape[1], -1, q.shape[-1])  # [H, G n, D]
    row_lse = (lse[block.batch_row, :, block.rows] * LOG2_E).masked_fill_(~in_response, math.inf)[..., None]
    row = torch.arange(end - begin, device=q.device)  # counted from the first row
    row_factors = torch.stack([torch.ones_like(row), row]).float().expand(q.shape[1], -1, -1)  # [HQ, 2, n]

    first_key, all_see_from = block.first, block.first
    if options.sliding_window is not None:
        first_key, all_see_from = (max(block.first, t - options.sliding_window + 1) for t in (begin, end - 1))
    size = min(KEY_TILE, len(memory) // queries.shape[1])
    bounds = [*range(first_key, begin, size), *range(begin, end, size), end]
    heads_at_once = len(memory) // (queries.shape[1] * size)
    sums = []  # [heads, 2, keys] of all heads
    for head in range(0, k.shape[1], heads_at_once):
        key_heads, heads = (slice(head * n, (head + heads_at_once) * n) for n in (1, group))
        tile_queries, tile_lse, tile_factors = queries[key_heads], row_lse[heads], row_factors[heads]
        sums.append([])
        for key_begin, key_end in itertools.pairwise(bounds):
            keys = k[block.batch_row, key_heads, key_begin:key_end].float()
            scores = memory[: tile_lse.numel() * keys.shape[1]].view(len(keys), -1, keys.shape[1])
            torch.bmm(tile_queries, keys.mT, out=scores)
            scores = softcapped(scores.view(len(tile_lse), len(row), -1), options)  # [heads, n, keys]
            if key_begin < all_see_from or key_end > begin:
                key = torch.arange(key_begin, key_end, device=q.device) - begin
                scores.masked_fill_(_hidden(row, key, in_response, options), -math.inf)
            sums[-1].append(tile_factors @ scores.sub_(tile_lse).exp2_())
    sums = torch.cat([torch.cat(x, -1) for x in sums])  # [HQ, 2, keys]
    behind = begin - torch.arange(first_key, end, device=q.device)
    return sums.double().flatten(1) @ torch.cat([behind, torch.ones_like(behind)]).double()


def _hidden(row: Tensor, key: Tensor, in_response: Tensor, options: Options) -> Tensor:
    """Returns which keys a row does not see, bool [rows, keys]: all of them outside R, where NaN may be."""
    distance = row[:, None] - key
    hidden = (distance < 0) | ~in_response[:, None]
    if options.sliding_window is not None:
        hidden |= distance >= options.sliding_window
    return hidden
