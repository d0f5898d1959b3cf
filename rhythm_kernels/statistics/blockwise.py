"""Statistics, group sums and the fused forward in torch, a tile at a time: for every device, without an N x N map.

There are two passes, and a call needs one of them. The row pass (`blockwise_rows`) reads every visible key of a row;
with v it is the forward as well. The band pass (`blockwise_band`) needs the log-sum-exp of the rows. It computes only
the heads that are asked for and reads only the keys that the window or a finite horizon reaches. Beside it, a span from
a sample of rows is read from them alone (`blockwise_sample`), and so is a mass from its keys (`blockwise_masses`). The
row pass sums masses from its own weights: scores of another product, of another shape, would be rounded otherwise than
its log-sum-exp, and a row that sees one key would have a weight off 1.
Memory beside the results is O(T x tile) for each head.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v; S sequences.
"""

import torch
from torch import Tensor

from rhythm_kernels.statistics.blockwise_band import band_pass
from rhythm_kernels.statistics.blockwise_masses import masses
from rhythm_kernels.statistics.blockwise_rows import row_pass, row_statistics
from rhythm_kernels.statistics.blockwise_sample import sampled_span
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.more import column_sums, in_order, masses_of, needs_every_key
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.spans import leaves_out_rows
from rhythm_kernels.types import AttentionStats, GroupStats


def attention_stats(q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options) -> AttentionStats:
    """Computes `api.attention_stats` on checked arguments; `options.sinks` may be [B, HQ]."""
    reads_all_rows = options.need_span and not leaves_out_rows(layout, options.span_rows)
    if lse is None or reads_all_rows or options.horizon[1] is None or needs_every_key(options):
        return _complete(row_statistics(row_pass(q, k, layout, options, lse=lse), layout, options), layout, options)
    span = sampled_span(q, k, lse, layout, options) if options.need_span else None
    all_heads = torch.ones(layout.sequences, k.shape[1], dtype=torch.bool, device=q.device)
    waad, fai = band_pass(q, k, lse, layout, options, all_heads, all_heads)
    lse = torch.where(layout.rows[:, None], lse, 0.0)
    stats = AttentionStats(waad, fai, span, lse, masses(q, k, lse, layout, options))
    return _complete(stats, layout, options)


def _complete(stats: AttentionStats, layout: Layout, options: Options) -> AttentionStats:
    """Returns the statistics with the column sums, if they are asked for, and `more` in its order."""
    more = stats.more | column_sums(stats.fai, layout, options)
    return stats._replace(more=in_order(options, more))


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
        waad, fai = band_pass(q, k, lse, layout, options, local_heads, global_heads)
        more = {}
        if masses_of(options):
            heads = _heads_of(local_heads, layout, len(q))
            is_local = _taken(members[0], heads)
            inputs = (*_heads_taken(q, k, lse, heads), layout, options)
            more = {name: _sum(is_local, x) for name, x in masses(*inputs).items()}
    else:
        heads = _heads_of(local_heads | global_heads, layout, len(q))
        q, k, lse = _heads_taken(q, k, lse, heads)
        sinks = None if options.sinks is None else options.sinks[heads]
        of_heads = options._replace(sinks=sinks, more=masses_of(options))  # column sums are taken of the group's
        members = [_taken(member, heads) for member in members]
        stats = attention_stats(q, k, lse, layout, of_heads)
        waad, fai = stats.waad, stats.fai
        more = {name: _sum(members[0], stats.more[name]) for name in masses_of(options)}
    sums = GroupStats(_sum(members[0], waad), _sum(members[1], fai))
    return sums._replace(more=in_order(options, more | column_sums(sums.fai, layout, options)))


def _heads_of(group: Tensor, layout: Layout, batch: int) -> Tensor:
    """Returns the heads that the batch rows compute for a group bool [S, HQ], int64 [B, heads].

    Every batch row takes as many heads as the one that needs most; the sums leave the surplus out.
    """
    needed = group if layout.sequences == batch else group.any(0, keepdim=True)  # the one row of a packed batch
    most = int(needed.sum(-1).amax()) if needed.numel() else 0
    return needed.int().sort(dim=-1, descending=True, stable=True).indices[:, :most]


def _taken(x: Tensor, heads: Tensor) -> Tensor:
    """Returns the heads [B, n] of x [B, HQ, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], heads]


def _heads_taken(q: Tensor, k: Tensor, lse: Tensor | None, heads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns q, k and lse of some query heads [B, n], k with a key head for each of them."""
    key_heads = heads // (q.shape[1] // k.shape[1])
    return _taken(q, heads), _taken(k, key_heads), None if lse is None else _taken(lse, heads)


def _sum(member: Tensor, x: Tensor) -> Tensor:
    """Returns the sum of x [B, heads, T] over the heads where `member` is true, [B, T]."""
    return torch.where(member, x, 0.0).sum(1)


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, options: Options) -> tuple[Tensor, AttentionStats]:
    """Computes `api.attention` on checked arguments."""
    results = row_pass(q, k, layout, options, v=v)
    return results.out, _complete(row_statistics(results, layout, options), layout, options)
