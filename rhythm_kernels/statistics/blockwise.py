"""Statistics, group sums and the fused forward in torch, a tile at a time: for every device, without an N x N map.

There are two passes, and a call needs one of them. The row pass reads every visible key of a row; with v it is the
forward as well. The band pass needs the log-sum-exp of the rows. It computes only the heads that are asked for and
reads only the keys that the window or a finite horizon reaches. Memory beside the results is O(T x tile) for each head.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v; S sequences.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.statistics.layout import Layout, mean_over_rows
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.types import AttentionStats, GroupStats

ROW_TILE = 64  # rows
TILE_BYTES = 32 << 20  # of fp32 scores held at once in the row pass; a few temporaries of this size come on top
BAND_TILE = 32  # tokens
BAND_BYTES = 3 << 20  # of fp32 queries, keys and scores held at once in the band pass: what fits a cache is faster
LOG2_E = 1 / math.log(2)


def attention_stats(q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options) -> AttentionStats:
    """Computes `api.attention_stats` on checked arguments; `options.sinks` may be [B, HQ]."""
    if lse is None or options.need_span or options.horizon[1] is None:
        return _stats(_row_pass(q, k, layout, options, lse=lse), layout, options)
    all_heads = torch.ones(layout.sequences, k.shape[1], dtype=torch.bool, device=q.device)
    waad, fai = _band_stats(q, k, lse, layout, options, all_heads, all_heads)
    return AttentionStats(waad, fai, None, torch.where(layout.rows[:, None], lse, 0.0))


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
        per_head = _band_stats(q, k, lse, layout, options, local_heads, global_heads)
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
    results = _row_pass(q, k, layout, options, v=v)
    return results.out, _stats(results, layout, options)


def _row_sums(lse: Tensor, sinks: Tensor | None) -> Tensor | float:
    """Returns the sum of each row of A: 1 less the sink's share. lse: [B, HQ, T]; sinks: [HQ] or [B, HQ]."""
    return 1.0 if sinks is None else 1.0 - torch.exp(sinks[..., None] - lse)


def _softcapped(scores: Tensor, options: Options) -> Tensor:
    """Applies the soft cap, if there is one, to scores of any shape, in place."""
    return scores if options.softcap is None else scores.div_(options.softcap).tanh_().mul_(options.softcap)


# ---- the row pass ----------------------------------------------------------------------------------------------------


class _RowResults(NamedTuple):
    """The results of the row pass: fp32 [B, HQ, T], 0 outside R, and the output of every valid row."""

    waad: Tensor
    fai_sums: Tensor
    """Sums of the columns of A over the horizon."""
    looked_back: Tensor
    """sum_s A[t, s] (t - s)."""
    lse: Tensor
    out: Tensor | None
    """[B, HQ, T, Dv] in q's dtype."""


class _RowTile(NamedTuple):
    """A tile of the row pass: some rows, and the keys that any of them sees."""

    rows: slice
    keys: slice
    computed: Tensor
    """bool [B, rows]: the rows that are computed."""
    distance: Tensor
    """int64 [rows, keys]: t - s, in tokens."""
    hidden: Tensor
    """bool [B, rows, keys]: the keys that a row does not see; all of them in rows that are not computed."""


def _stats(results: _RowResults, layout: Layout, options: Options) -> AttentionStats:
    """Returns the statistics: the column sums divided by their numbers of rows, and the means of the distances."""
    fai = results.fai_sums / layout.rows_looking_back(options.horizon)[:, None]
    span = mean_over_rows(results.looked_back, layout) if options.need_span else None
    return AttentionStats(results.waad, fai, span, results.lse)


def _row_pass(
    q: Tensor, k: Tensor, layout: Layout, options: Options, *, lse: Tensor | None = None, v: Tensor | None = None
) -> _RowResults:
    """Runs the row pass over chunks of batch rows that TILE_BYTES hold; `options.sinks` may be [HQ] or [B, HQ]."""
    batch, query_heads, tokens, _ = q.shape
    results = _RowResults(
        *(q.new_zeros(batch, query_heads, tokens, dtype=torch.float32) for _ in range(4)),
        out=None if v is None else q.new_zeros(batch, query_heads, tokens, v.shape[3]),
    )
    if batch * query_heads * tokens == 0:
        return results
    row_bytes = 4 * query_heads * tokens
    tile_rows = max(1, min(ROW_TILE, tokens, TILE_BYTES // row_bytes))
    chunk = max(1, TILE_BYTES // (row_bytes * tile_rows))
    sinks = None if options.sinks is None else options.sinks.expand(batch, -1)
    for at in range(0, batch, chunk):
        part = slice(at, at + chunk)
        *inputs, part_sinks = (None if x is None else x[part] for x in (q, k, v, lse, sinks))
        part_layout = layout if chunk >= batch else layout.slice(part)
        part_results = _RowResults(*(None if x is None else x[part] for x in results))
        _row_tiles(*inputs, part_layout, options._replace(sinks=part_sinks), tile_rows, part_results)
    return results


def _row_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lse: Tensor | None,
    layout: Layout,
    options: Options,
    tile_rows: int,
    results: _RowResults,
) -> None:
    """Writes the results of some batch rows, a tile at a time. `options.sinks` is [B, HQ]."""
    tokens = q.shape[2]
    computed = layout.rows if v is None else layout.first <= torch.arange(tokens, device=q.device)
    k = k.float().contiguous()
    values, broken = (None, None) if v is None else _finite_values(v, computed)
    for begin in range(0, tokens, tile_rows):
        tile = _row_tile(begin, min(begin + tile_rows, tokens), computed, layout, options)
        if tile is None:
            continue
        scores = _tile_scores(q, k, tile, options)
        weights, row_lse = _tile_weights(scores, lse, tile, options)
        if values is not None:
            _write_output(weights, values, broken, tile, results)
        _write_statistics(weights, row_lse, tile, layout, options, results)


def _row_tile(begin: int, end: int, computed: Tensor, layout: Layout, options: Options) -> _RowTile | None:
    """Returns the tile of the rows begin..end; None if none of them is computed. computed: bool [B, T]."""
    computed = computed[:, begin:end]
    if not computed.any():
        return None
    first_key = min(begin, int(layout.first[:, begin:end][computed].min()))
    if options.sliding_window is not None:
        first_key = max(first_key, begin - options.sliding_window + 1)
    row = torch.arange(begin, end, device=computed.device)
    key = torch.arange(first_key, end, device=computed.device)
    distance = row[:, None] - key
    hidden = (key < layout.first[:, begin:end, None]) | (distance < 0) | ~computed[..., None]
    if options.sliding_window is not None:
        hidden |= distance >= options.sliding_window
    return _RowTile(slice(begin, end), slice(first_key, end), computed, distance, hidden)


def _tile_scores(q: Tensor, k: Tensor, tile: _RowTile, options: Options) -> Tensor:
    """Returns the scores of a tile, fp32 [B, HQ, rows, keys], -inf where they are hidden. k is contiguous fp32."""
    batch, query_heads, _, size = q.shape
    queries = q[:, :, tile.rows].float().mul(options.scale).reshape(batch, k.shape[1], -1, size)
    scores = queries @ k[:, :, tile.keys].mT  # [B, H, HQ / H * rows, keys]
    scores = _softcapped(scores.view(batch, query_heads, *tile.distance.shape), options)
    return scores.masked_fill_(tile.hidden[:, None], -math.inf)


def _tile_weights(scores: Tensor, lse: Tensor | None, tile: _RowTile, options: Options) -> tuple[Tensor, Tensor]:
    """Returns A [B, HQ, rows, keys], in the memory of the scores, and the rows' log-sum-exp [B, HQ, rows].

    Rows that are not computed have weights of 0.
    """
    if lse is None:
        return _softmax(scores, tile.computed, options.sinks)
    row_lse = lse[:, :, tile.rows].masked_fill(~tile.computed[:, None], 0.0)
    return scores.sub_(row_lse[..., None]).exp_(), row_lse


def _softmax(scores: Tensor, computed: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (A, log-sum-exp) of masked scores [B, HQ, rows, keys], in place. computed bool [B, rows], sinks [B, HQ].

    Rows that are not computed have weights of 0.
    """
    outside = ~computed[:, None, :, None]
    shift = scores.amax(-1, keepdim=True)
    if sinks is not None:
        shift = torch.maximum(shift, sinks[..., None, None])
    shift.masked_fill_(outside, 0.0)
    weights = scores.sub_(shift).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total += torch.exp(sinks[..., None, None] - shift)
    total.masked_fill_(outside, 1.0)
    return weights.div_(total), (shift + total.log()).squeeze(-1)


def _finite_values(v: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns v with 0 for values that are not finite, and a 1 at each of their places; both fp32 [B, H, T, Dv].

    The second is None if all values of the valid tokens are finite. The two are multiplied apart because a weight of 0
    times NaN is NaN, and the keys of a tile reach into padding and other sequences. valid: bool [B, T].
    """
    finite = v.isfinite()
    broken = ~finite & valid[:, None, :, None]
    values = torch.where(finite, v, 0.0).float().contiguous()
    return values, broken.float() if broken.any() else None


def _write_output(weights: Tensor, values: Tensor, broken: Tensor | None, tile: _RowTile, results: _RowResults) -> None:
    """Writes the output of a tile; it is NaN where a row gives a weight to a value that is not finite."""
    out = results.out[:, :, tile.rows]
    out[:] = _weighted(weights, values[:, :, tile.keys])
    if broken is not None:
        reached = _weighted(weights.ne(0).float(), broken[:, :, tile.keys]) > 0
        out.masked_fill_(reached, math.nan)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Returns sum_s A[t, s] v[s]: [B, HQ, rows, keys] and [B, H, keys, Dv] -> [B, HQ, rows, Dv]."""
    grouped = weights.reshape(len(values), values.shape[1], -1, weights.shape[3])
    return (grouped @ values).view(*weights.shape[:3], -1)


def _write_statistics(
    weights: Tensor, row_lse: Tensor, tile: _RowTile, layout: Layout, options: Options, results: _RowResults
) -> None:
    """Writes the statistics of a tile's rows of R, and adds the sums of its columns. Overwrites the weights."""
    rows = layout.rows[:, tile.rows]
    in_response = rows[:, None]
    if options.need_span:
        looked_back = (weights * tile.distance.float()).sum(-1)
        results.looked_back[:, :, tile.rows] = torch.where(in_response, looked_back, 0.0)

    first_key = max(tile.keys.start, tile.rows.start - _reach(options, layout.rows.shape[1]))
    near = slice(first_key - tile.keys.start, None)  # the keys that the window or the horizon reaches
    hidden = tile.hidden[..., near] | ~rows[..., None]
    # a row of NaN is NaN at hidden keys too, which lie in columns of other sequences
    weights[..., near].masked_fill_(hidden[:, None], 0.0)
    nearness, received = _window_sums(weights[..., near], tile.distance[:, near], options)
    waad = options.window * _row_sums(row_lse, options.sinks) - nearness
    results.waad[:, :, tile.rows] = torch.where(in_response, waad, 0.0)
    results.lse[:, :, tile.rows] = torch.where(in_response, row_lse, 0.0)
    results.fai_sums[:, :, first_key : tile.keys.stop] += received


def _reach(options: Options, tokens: int) -> int:
    """Returns how many keys before a row the window or the horizon reaches."""
    hi = options.horizon[1]
    return min(tokens, max(options.window - 1, tokens if hi is None else hi))


def _window_sums(weights: Tensor, distance: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns sum_s max(W - (t - s), 0) A[t, s], [B, HQ, rows], and the column sums over the horizon, [B, HQ, keys].

    Args:
        weights: A [B, HQ, rows, keys], 0 where it is hidden; the last key is that of the last row.
        distance: [rows, keys], t - s.
    """
    rows, keys = distance.shape
    nearest = slice(max(0, keys - rows - options.window + 1), keys)
    near = (options.window - distance[:, nearest]).clamp(min=0).float()
    nearness = (weights[..., nearest] * near).sum(-1)

    lo, hi = options.horizon
    earlier = slice(0, max(0, keys - lo))  # no row is lo tokens behind a later key
    future = distance[:, earlier] >= lo
    if hi is not None:
        future &= distance[:, earlier] <= hi
    received = torch.where(future, weights[..., earlier], 0.0).sum(-2)
    return nearness, pad(received, (0, keys - received.shape[-1]))


# ---- the band pass ---------------------------------------------------------------------------------------------------


class _BandTile(NamedTuple):
    """The positions of a tile of the band pass, counted from its first token. All tiles of a band share them.

    A tile sums over the band lo <= t - s <= hi, for each of its own tokens. `others` are the tokens on the other side
    of the band: keys where the own tokens are rows, rows where they are columns. So each sum is complete in one tile.
    """

    own: Tensor
    """int64 [BAND_TILE]."""
    others: Tensor
    """int64 [M]."""
    rows: Tensor
    """Those of the two that are rows."""
    keys: Tensor
    """The others of the two."""
    distance: Tensor
    """int32 [M, BAND_TILE]: t - s inside the band, else T, which is further than any row sees."""


class _Items(NamedTuple):
    """The pairs of a tile that has rows of R and a head, each field int64 [items]. A head stands for G query heads."""

    batch_row: Tensor
    head: Tensor
    start: Tensor
    """The tile's first token."""
    end: Tensor
    """One past the last token of the tile's sequence."""


def _band_stats(
    q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, local_heads: Tensor, global_heads: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns WAAD of the local heads and FAI of the global heads over a finite horizon, [B, HQ, T].

    The values of other heads mean nothing. The groups are bool [S, HQ], or [S, H] for all query heads of a key head.
    """
    row_sums = _row_sums(lse, options.sinks)
    # scores are base-2 logarithms here: exp2 takes half the time of exp
    lse = lse * LOG2_E
    softcap = None if options.softcap is None else options.softcap * LOG2_E
    options = options._replace(scale=options.scale * LOG2_E, softcap=softcap)
    # min(d, W) = W - max(W - d, 0), and the second term is 0 outside the band
    nearness = _band_sums(q, k, lse, layout, options, local_heads, (0, options.window - 1), of_rows=True)
    waad = torch.where(layout.rows[:, None], options.window * row_sums - nearness, 0.0)
    received = _band_sums(q, k, lse, layout, options, global_heads, options.horizon, of_rows=False)
    return waad, received / layout.rows_looking_back(options.horizon)[:, None]


def _band_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    layout: Layout,
    options: Options,
    heads: Tensor,
    band: tuple[int, int],
    of_rows: bool,
) -> Tensor:
    """Returns sums of A over a band: of its rows, weighted by W - (t - s), or of its columns. fp32 [B, HQ, T].

    Args:
        lse: [B, HQ, T], base 2; the scale and the soft cap in `options` are for base-2 scores too.
        heads: bool [S, HQ], the heads that are summed, or [S, H] for all query heads of a key head.
        band: (lo, hi), the least and the largest t - s, in tokens.
    """
    tokens, (lo, hi), head_count = q.shape[2], band, heads.shape[1]
    hi = min(hi, tokens - 1 if options.sliding_window is None else min(tokens, options.sliding_window) - 1)
    if hi < lo or q.numel() == 0:
        return q.new_zeros(q.shape[:3], dtype=torch.float32)
    tile = _band_tile(lo, hi, tokens, of_rows, q.device)
    items = _band_items(layout, heads, tile.rows)
    q, lse = (x.unflatten(1, (head_count, -1)) for x in (q, lse[..., None]))  # [B, heads, G, T, D]
    read_q, read_lse = (_reader(x, items, tile.rows) for x in (q, lse))
    key_items = items._replace(head=items.head // (head_count // k.shape[1]))
    read_k = _reader(k[:, :, None], key_items, tile.keys)
    read_sight = _sight_reader(layout, items, tile.rows, hi)

    near = (options.window - tile.distance).float()
    run = _items_at_once(q.shape[2], q.shape[-1], len(tile.others))
    sums = [q.new_empty(0, q.shape[2], BAND_TILE, dtype=torch.float32)]
    for at in range(0, len(items.start), run):
        part = slice(at, at + run)
        queries = read_q(part).mul_(options.scale)
        weights = _item_weights(queries, read_k(part)[:, 0], read_lse(part), read_sight(part), tile, options, of_rows)
        sums.append((weights.mul_(near) if of_rows else weights).sum(-2))
    return _at_tokens(torch.cat(sums), items, tile.own, q.shape)


def _band_tile(lo: int, hi: int, tokens: int, of_rows: bool, device: torch.device) -> _BandTile:
    """Returns the tile of a band; of_rows: its own tokens are rows, else columns."""
    own = torch.arange(BAND_TILE, device=device)
    others = torch.arange(BAND_TILE + hi - lo, device=device) + (-hi if of_rows else lo)
    rows, keys = (own, others) if of_rows else (others, own)
    distance = own - others[:, None] if of_rows else others[:, None] - own
    distance = torch.where((lo <= distance) & (distance <= hi), distance, tokens).int()
    return _BandTile(own, others, rows, keys, distance)


def _band_items(layout: Layout, heads: Tensor, rows: Tensor) -> _Items:
    """Returns the items of the heads, bool [S, heads], and of the tiles with a row of R among their rows."""
    batch_row, start, _, end, sequence = layout.tiles(BAND_TILE).long().unbind(-1)
    next_row = layout.next_row()[batch_row, (start + rows[0]).clamp(max=layout.rows.shape[1])]
    used = next_row < torch.minimum(start + rows[-1] + 1, end)
    tile, head = (heads[sequence] & used[:, None]).nonzero().unbind(-1)
    return _Items(batch_row[tile], head, start[tile], end[tile])


def _items_at_once(group: int, size: int, others: int) -> int:
    """Returns how many items BAND_BYTES hold: queries, keys and scores of `group` query heads of this head size."""
    item_bytes = 4 * group * (BAND_TILE * others + size * (BAND_TILE + others))
    return max(1, BAND_BYTES // item_bytes)


def _reader(x: Tensor, items: _Items, token: Tensor) -> Callable[[slice], Tensor]:
    """Returns a function that reads x [B, heads, G, T, D] for a slice of the items, as a new fp32 [n, G, M, D].

    It returns x[batch_row, head, :, start + token] of each item; token is int64 [M]. Where a token lies outside the
    batch row, it returns some other element of x. It reads x as lines that begin at each of its elements: then one
    index_select serves all strides, and x is not copied.
    """
    stride, size = x.stride(), x.shape[-1]
    lines = 1 + sum((n - 1) * step for n, step in zip(x.shape[:-1], stride[:-1], strict=True))
    x_lines = x.as_strided((lines, size), (1, 1))
    first = items.batch_row * stride[0] + items.head * stride[1] + items.start * stride[3]
    offset = torch.arange(x.shape[2], device=x.device)[:, None] * stride[2] + token * stride[3]

    def read(part: slice) -> Tensor:
        index = (first[part, None, None] + offset).clamp_(0, lines - 1)
        return x_lines.index_select(0, index.flatten()).view(*index.shape, size).float()

    return read


def _sight_reader(layout: Layout, items: _Items, rows: Tensor, hi: int) -> Callable[[slice], Tensor]:
    """Returns a function of a slice of the items: how far back each row sees, in tokens, int32 [n, len(rows)].

    A row of R sees to the beginning of its own sequence; any other row sees nothing, -1. `hi` is that of the band.
    """
    tokens = layout.rows.shape[1]
    sight = torch.where(layout.rows, torch.arange(tokens, device=rows.device) - layout.first, -1).int()
    sight = pad(sight.flatten(), (0, BAND_TILE + hi), value=-1)  # a tile may reach behind the last batch row
    first = items.batch_row * tokens + items.start
    return lambda part: sight[first[part, None] + rows]


def _item_weights(
    queries: Tensor, keys: Tensor, lse: Tensor, sight: Tensor, tile: _BandTile, options: Options, of_rows: bool
) -> Tensor:
    """Returns A of some items, fp32 [n, G, M, BAND_TILE], 0 outside the band and where it is hidden.

    Args:
        queries: [n, G, rows, D], times the scale.
        keys: [n, keys, D].
        lse: [n, G, rows, 1], base 2.
        sight: int32 [n, rows], how far back a row sees.
    """
    queries = queries.flatten(1, 2)
    if of_rows:
        scores = (keys @ queries.mT).view(len(keys), len(tile.others), -1, BAND_TILE).transpose(1, 2)
        lse, sight = lse.mT, sight[:, None]
    else:
        scores = (queries @ keys.mT).view(len(keys), -1, len(tile.others), BAND_TILE)
        sight = sight[..., None]
    weights = _softcapped(scores, options).sub_(lse).exp2_()
    # This clears all bits of hidden weights, those of a NaN too; a fill by a bool mask takes several times as long. It
    # comes after the exponential, since a NaN log-sum-exp must not reach the keys that its row does not see.
    weights.view(torch.int32).bitwise_and_((tile.distance - sight).le_(0).neg_()[:, None])
    return weights


def _at_tokens(sums: Tensor, items: _Items, own: Tensor, shape: torch.Size) -> Tensor:
    """Returns the items' sums [items, G, BAND_TILE] at their tokens, [B, HQ, T], 0 elsewhere.

    `shape` is [B, heads, G, T, D]. One more token takes the sums that a tile has behind the end of its sequence.
    """
    tokens = shape[3]
    out = sums.new_zeros(*shape[:3], tokens + 1)
    token = items.start[:, None] + own
    token = token.where(token < items.end[:, None], tokens)
    out[items.batch_row[:, None], items.head[:, None], :, token] = sums.mT
    return out[..., :tokens].flatten(1, 2)
