"""Statistics, group sums and the fused forward in torch, a tile at a time: for every device, without an N x N map.

There are two passes, and a call needs one of them. The row pass (`blockwise_rows`) reads every visible key of a row;
with v it is the forward as well. The band pass (`blockwise_band`) needs the log-sum-exp of the rows. It computes only
the heads that are asked for and reads only the keys that the window or a finite horizon reaches. Beside it, a span from
a sample of rows is read from them alone (`blockwise_sample`). Memory beside the results is O(T x tile) for each head.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v; S sequences.
"""

import torch
from torch import Tensor

from rhythm_kernels.statistics.blockwise_band import band_pass
from rhythm_kernels.statistics.blockwise_rows import row_pass, row_statistics
from rhythm_kernels.statistics.blockwise_sample import sampled_span
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.spans import leaves_out_rows
from rhythm_kernels.types import AttentionStats, GroupStats


def attention_stats(q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options) -> AttentionStats:
    """Computes `api.attention_stats` on checked arguments; `options.sinks` may be [B, HQ]."""
    reads_all_rows = options.need_span and not leaves_out_rows(layout, options.span_rows)
    if lse is None or reads_all_rows or options.horizon[1] is None:
        return row_statistics(row_pass(q, k, layout, options, lse=lse), layout, options)
    span = sampled_span(q, k, lse, layout, options) if options.need_span else None
    all_heads = torch.ones(layout.sequences, k.shape[1], dtype=torch.bool, device=q.device)
    waad, fai = band_pass(q, k, lse, layout, options, all_heads, all_heads)
    return AttentionStats(waad, fai, span, torch.where(layout.rows[:, None], lse, 0.0))


def group_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    local_heads: Tensor,
    global_heads: Tensor,
    layout: Layout,
    options: Options,
) -> GroupStats:
    """Computes `api.group_stats` on checked arguments; local_heads and global_heads are bool [S, HQ]."""
    members = [group[layout.segments].transpose(1, 2) for group in (local_heads, global_heads)]  # [B, HQ, T]
    if lse is not None and options.horizon[1] is not None:
        per_head = band_pass(q, k, lse, layout, options, local_heads, global_heads)
    else:
        needed = local_heads | global_heads
        if layout.sequences != len(q):  # packed
            needed = needed.any(0, keepdim=True)
        # every batch row takes as many heads as the one that needs most; the sums leave the surplus out
        most = int(needed.sum(-1).amax()) if needed.numel() else 0
        heads = needed.int().sort(dim=-1, descending=True, stable=True).indices[:, :most]  # [B, heads]
        row = torch.arange(len(q), device=q.device)[:, None]
        q, k = q[row, heads], k[row, heads // (q.shape[1] // k.shape[1])]
        lse = None if lse is None else lse[row, heads]
        options = options._replace(sinks=None if options.sinks is None else options.sinks[heads])
        per_head = attention_stats(q, k, lse, layout, options)[:2]
        members = [member[row, heads] for member in members]
    return GroupStats(*(torch.where(member, x, 0.0).sum(1) for member, x in zip(members, per_head, strict=True)))


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, options: Options) -> tuple[Tensor, AttentionStats]:
    """Computes `api.attention` on checked arguments."""
    results = row_pass(q, k, layout, options, v=v)
    return results.out, row_statistics(results, layout, options)
