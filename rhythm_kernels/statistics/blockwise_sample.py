"""The span of the blockwise backend from a sample of rows, with a given log-sum-exp: only those rows are read.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k; S sequences. A slot is the
place of a block of rows (`SpanSample`); N slots are computed at once.
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


class _Run(NamedTuple):
    """Slots that are computed at once."""

    slots: Tensor
    """int64 [N], on the device."""
    rows: slice
    """The rows of each block that are computed."""
    keys: int
    """How many keys are read for each slot."""
    seen: int
    """How many of them, the first ones, all rows see where there is no sliding window."""


def sampled_span(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options) -> Tensor:
    """Returns the spans over the rows of `options.span_rows`, fp32 [S, HQ]; `options.sinks` are part of the lse."""
    sample = span_sample(layout, options.span_rows)
    total, broken = (torch.zeros(layout.sequences, q.shape[1], dtype=torch.int64, device=q.device) for _ in range(2))
    for run in _runs(layout, options, q.shape[1]):
        units, is_broken = to_units(_mean_distances(q, k, lse, run, layout, options))
        total.index_add_(0, sample.sequences[run.slots], units.sum(-1))
        broken.index_add_(0, sample.sequences[run.slots], is_broken.sum(-1))
    return mean_of_units(total, broken, sample.row_counts[:, None])


def _runs(layout: Layout, options: Options, heads: int) -> Iterator[_Run]:
    """Yields runs of slots of like lengths, as many as SAMPLE_BYTES hold."""
    kept = ("sample lengths", options.span_rows, options.sliding_window)
    lengths, before, order = layout.keep(kept, lambda: _lengths(layout, options))
    at = 0
    while at < len(lengths) and lengths[at] > 0:
        row_bytes = 4 * heads * lengths[at]
        rows = max(1, min(SPAN_BLOCK, SAMPLE_BYTES // row_bytes))
        most = max(1, SAMPLE_BYTES // (row_bytes * rows))
        for begin in range(0, SPAN_BLOCK, rows):
            part = slice(begin, min(begin + rows, SPAN_BLOCK))
            yield _Run(order[at : at + most], part, lengths[at], min(before[at : at + most]))
        at += most


def _lengths(layout: Layout, options: Options) -> tuple[list[int], list[int], Tensor]:
    """Returns how many keys the slots need, descending, and how many of them lie before their blocks, on the host.

    The third result is the slots in that order, int64 [slots].
    """
    _, start, first, end, index = span_sample(layout, options.span_rows).tiles.long().unbind(-1)
    first_key = _first_key(start, first, options)
    needed = torch.minimum(start + SPAN_BLOCK, end) - first_key
    lengths, order = needed.where(index >= 0, 0).sort(descending=True, stable=True)
    return lengths.tolist(), (start - first_key)[order].tolist(), order


def _first_key(start: Tensor, first: Tensor, options: Options) -> Tensor:
    """Returns the first key that a row of a block sees."""
    return first if options.sliding_window is None else torch.maximum(first, start - options.sliding_window + 1)


def _mean_distances(q: Tensor, k: Tensor, lse: Tensor, run: _Run, layout: Layout, options: Options) -> Tensor:
    """Returns sum_s A[t, s] (t - s) of a run's rows, fp32 [N, HQ, rows], 0 outside R."""
    heads, tokens, size = q.shape[1:]
    tiles = span_sample(layout, options.span_rows).tiles[run.slots].long()
    batch_row, start, first, end, _ = tiles[..., None].unbind(1)  # [N, 1]
    row = start + torch.arange(run.rows.start, run.rows.stop, device=q.device)  # [N, rows]
    key = _first_key(start, first, options) + torch.arange(run.keys, device=q.device)  # [N, keys]
    is_inside = row < end
    row, near = row.clamp(max=tokens - 1), key.clamp(max=tokens - 1)
    in_response = (is_inside & layout.rows[batch_row, row])[:, None]

    # scores are base-2 logarithms here: exp2 takes half the time of exp
    queries = q[batch_row, :, row].transpose(1, 2).float().mul_(options.scale * LOG2_E)  # [N, HQ, rows, D]
    keys = k[batch_row, :, near].transpose(1, 2).float()  # [N, H, keys, D]
    scores = queries.reshape(len(row), k.shape[1], -1, size) @ keys.mT
    softcap = None if options.softcap is None else options.softcap * LOG2_E
    scores = softcapped(scores.view(len(row), heads, -1, run.keys), options._replace(softcap=softcap))
    rest = slice(run.seen if options.sliding_window is None else 0, None)
    distance = row[..., None] - key[:, None, rest]  # [N, rows, keys]
    hidden = distance < 0
    if options.sliding_window is not None:
        hidden |= distance >= options.sliding_window
    scores[..., rest].masked_fill_(hidden[:, None], -math.inf)
    row_lse = lse[batch_row, :, row].transpose(1, 2).masked_fill(~in_response, 0.0)  # [N, HQ, rows]
    weights = scores.sub_(row_lse[..., None] * LOG2_E).exp2_()
    return torch.where(in_response, _looked_back(weights, key[:, -1:] - row), 0.0)


def _looked_back(weights: Tensor, behind: Tensor) -> Tensor:
    """Returns sum_s A[t, s] (t - s), [N, HQ, rows], of weights A [N, HQ, rows, keys].

    Distances are counted from the last key and then moved: with factors that all rows share the sum is a product. Most
    of the weight lies near the last key, where they are short, so that little cancels.

    Args:
        behind: int64 [N, rows], how many tokens the last key is behind the row.
    """
    keys = weights.shape[-1]
    from_last = torch.arange(keys - 1, -1, -1, dtype=torch.float32, device=weights.device)
    total, looked_back = (weights @ torch.stack([torch.ones_like(from_last), from_last], -1)).unbind(-1)
    return looked_back - behind[:, None] * total
