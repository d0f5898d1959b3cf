"""Statistics, group sums and the fused forward in plain torch, in tiles: right on every device, no N x N map.

Two passes, of which a call needs one. The row pass reads every visible key of a row; with v it is the forward as well.
The band pass is for rows whose log-sum-exp is known: of the heads that are asked for, it reads only the keys that the
window or a finite horizon reaches. Memory beside the results is O(T x tile) per head.
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
TILE_BYTES = 32 << 20  # of fp32 scores held at once in the row pass; a few temporaries of this size live beside it
BAND_TILE = 32  # tokens
BAND_BYTES = 3 << 20  # of fp32 queries, keys and scores held at once in the band pass: what fits a cache is faster
LOG2_E = 1 / math.log(2)


def attention_stats(q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options) -> AttentionStats:
    """As in api.py, behind its checks; `options.sinks` may be [B, HQ]."""
    if lse is None or options.need_span or options.horizon[1] is None:
        return _stats(_row_pass(q, k, layout, options, lse=lse), layout, options)
    every = torch.ones(layout.sequences, k.shape[1], dtype=torch.bool, device=q.device)
    waad, fai = _band_stats(q, k, lse, layout, options, every, every)
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
    """As in api.py, behind its checks; local_heads and global_heads bool [sequences, HQ]."""
    members = [group[layout.segments].transpose(1, 2) for group in (local_heads, global_heads)]  # [B, HQ, T]
    if lse is not None and options.horizon[1] is not None:
        per_head = _band_stats(q, k, lse, layout, options, local_heads, global_heads)
    else:
        wanted = local_heads | global_heads
        if layout.sequences != len(q):  # packed
            wanted = wanted.any(0, keepdim=True)
        # a batch row with fewer heads than another one is filled up with heads that the sums leave out
        most = int(wanted.sum(-1).amax()) if wanted.numel() else 0
        heads = wanted.int().sort(dim=-1, descending=True, stable=True).indices[:, :most]  # [B, heads]
        row = torch.arange(len(q), device=q.device)[:, None]
        q, k = q[row, heads], k[row, heads // (q.shape[1] // k.shape[1])]
        lse = None if lse is None else lse[row, heads]
        options = options._replace(sinks=None if options.sinks is None else options.sinks[heads])
        per_head = attention_stats(q, k, lse, layout, options)[:2]
        members = [member[row, heads] for member in members]
    return GroupStats(*(torch.where(member, x, 0.0).sum(1) for member, x in zip(members, per_head, strict=True)))


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, options: Options) -> tuple[Tensor, AttentionStats]:
    """As in api.py, behind its checks."""
    found = _row_pass(q, k, layout, options, v=v)
    return found.out, _stats(found, layout, options)


def _row_sums(lse: Tensor, sinks: Tensor | None) -> Tensor | float:
    """What a row of A sums to: 1 less the sink's share. lse [B, HQ, T], sinks [HQ] or [B, HQ]."""
    return 1.0 if sinks is None else 1.0 - torch.exp(sinks[..., None] - lse)


def _softcapped(scores: Tensor, options: Options) -> Tensor:
    return scores if options.softcap is None else scores.div_(options.softcap).tanh_().mul_(options.softcap)


# ---- the row pass ----------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """What the row pass finds: fp32 [B, HQ, T], for rows of R (else 0), and the output for every valid row."""

    waad: Tensor
    fai_sums: Tensor
    """Sums of the columns of A over the horizon."""
    looked_back: Tensor
    """sum_s A[t, s] (t - s)."""
    lse: Tensor
    out: Tensor | None
    """[B, HQ, T, Dv] in q's dtype."""


def _stats(found: _Rows, layout: Layout, options: Options) -> AttentionStats:
    fai = found.fai_sums / layout.rows_looking_back(options.horizon)[:, None]
    span = mean_over_rows(found.looked_back, layout) if options.need_span else None
    return AttentionStats(found.waad, fai, span, found.lse)


def _row_pass(
    q: Tensor, k: Tensor, layout: Layout, options: Options, *, lse: Tensor | None = None, v: Tensor | None = None
) -> _Rows:
    """`options.sinks` may be [HQ] or [B, HQ]."""
    batch, query_heads, tokens, _ = q.shape
    found = _Rows(
        *(q.new_zeros(batch, query_heads, tokens, dtype=torch.float32) for _ in range(4)),
        out=None if v is None else q.new_zeros(batch, query_heads, tokens, v.shape[3]),
    )
    if batch * query_heads * tokens == 0:
        return found
    row_bytes = 4 * query_heads * tokens
    tile = max(1, min(ROW_TILE, tokens, TILE_BYTES // row_bytes))
    chunk = max(1, TILE_BYTES // (row_bytes * tile))
    sinks = None if options.sinks is None else options.sinks.expand(batch, -1)
    for at in range(0, batch, chunk):
        part = slice(at, at + chunk)
        *some, some_sinks = (None if x is None else x[part] for x in (q, k, v, lse, sinks))
        some_layout = layout if chunk >= batch else layout.slice(part)
        some_found = _Rows(*(None if x is None else x[part] for x in found))
        _row_tiles(*some, some_layout, options._replace(sinks=some_sinks), tile, some_found)
    return found


def _row_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lse: Tensor | None,
    layout: Layout,
    options: Options,
    tile: int,
    found: _Rows,
) -> None:
    batch, query_heads, tokens, size = q.shape
    token = torch.arange(tokens, device=q.device)
    wanted = layout.rows if v is None else layout.first <= token  # the rows that are computed
    k = k.float().contiguous()
    values, broken = (None, None) if v is None else _finite_values(v, wanted)
    for begin in range(0, tokens, tile):
        end = min(begin + tile, tokens)
        rows = wanted[:, begin:end]
        if not rows.any():
            continue
        first_key = min(begin, int(layout.first[:, begin:end][rows].min()))
        if options.sliding_window is not None:
            first_key = max(first_key, begin - options.sliding_window + 1)

        queries = q[:, :, begin:end].float().mul(options.scale).reshape(batch, k.shape[1], -1, size)
        scores = queries @ k[:, :, first_key:end].mT  # [B, H, HQ / H * rows, keys]
        scores = _softcapped(scores.view(batch, query_heads, end - begin, -1), options)
        position = token[first_key:end]
        distance = token[begin:end, None] - position  # [rows, keys], tokens
        hidden = (position < layout.first[:, begin:end, None]) | (distance < 0) | ~rows[..., None]
        if options.sliding_window is not None:
            hidden |= distance >= options.sliding_window
        scores.masked_fill_(hidden[:, None], -math.inf)

        if lse is None:
            weights, row_lse = _softmax(scores, rows, options.sinks)
        else:
            row_lse = lse[:, :, begin:end].masked_fill(~rows[:, None], 0.0)
            weights = scores.sub_(row_lse[..., None]).exp_()  # A, 0 in other rows
        if values is not None:
            keys = slice(first_key, end)
            found.out[:, :, begin:end] = _weighted(weights, values[:, :, keys])
            if broken is not None:
                reached = _weighted(weights.ne(0).float(), broken[:, :, keys]) > 0
                found.out[:, :, begin:end].masked_fill_(reached, math.nan)
            rows = layout.rows[:, begin:end]
            hidden |= ~rows[..., None]
        inside = rows[:, None]
        if options.need_span:
            looked_back = (weights * distance.float()).sum(-1)
            found.looked_back[:, :, begin:end] = torch.where(inside, looked_back, 0.0)

        first_seen = max(first_key, begin - _reach(options, tokens))
        seen = slice(first_seen - first_key, None)
        # a row of NaN has NaN also where it sees nothing, in other sequences' columns
        weights[..., seen].masked_fill_(hidden[:, None, :, seen], 0.0)
        nearness, received = _window_sums(weights[..., seen], distance[:, seen], options)
        waad = options.window * _row_sums(row_lse, options.sinks) - nearness
        found.waad[:, :, begin:end] = torch.where(inside, waad, 0.0)
        found.lse[:, :, begin:end] = torch.where(inside, row_lse, 0.0)
        found.fai_sums[:, :, first_seen:end] += received


def _reach(options: Options, tokens: int) -> int:
    """How many keys before a row the window and the horizon read."""
    hi = options.horizon[1]
    return min(tokens, max(options.window - 1, tokens if hi is None else hi))


def _softmax(scores: Tensor, rows: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(A, lse) of masked scores [B, HQ, rows, keys], in place; 0 in other rows. sinks [B, HQ]."""
    outside = ~rows[:, None, :, None]
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
    """v without what is not finite, and where that was in valid tokens (None: nowhere), both fp32 [B, H, T, Dv].

    A weight of 0 times NaN is NaN, and the keys of a tile reach into padding and other sequences.
    """
    finite = v.isfinite()
    broken = ~finite & valid[:, None, :, None]
    values = torch.where(finite, v, 0.0).float().contiguous()
    return values, broken.float() if broken.any() else None


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """sum_s A[t, s] v[s]: [B, HQ, rows, keys] and [B, H, keys, Dv] -> [B, HQ, rows, Dv]."""
    grouped = weights.reshape(len(values), values.shape[1], -1, weights.shape[3])
    return (grouped @ values).view(*weights.shape[:3], -1)


def _window_sums(weights: Tensor, distance: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(sum_s max(W - d, 0) A[t, s] of the rows, sums of the columns over the horizon) of A [B, HQ, rows, keys].

    A is 0 where it is hidden. The last key is the last row's own; distance [rows, keys].
    """
    rows, keys = distance.shape
    nearest = slice(max(0, keys - rows - options.window + 1), keys)
    near = (options.window - distance[:, nearest]).clamp(min=0).float()
    nearness = (weights[..., nearest] * near).sum(-1)

    lo, hi = options.horizon
    latest = slice(0, max(0, keys - lo))  # no later key is lo behind a row
    future = distance[:, latest] >= lo
    if hi is not None:
        future &= distance[:, latest] <= hi
    received = torch.where(future, weights[..., latest], 0.0).sum(-2)
    return nearness, pad(received, (0, keys - received.shape[-1]))


# ---- the band pass ---------------------------------------------------------------------------------------------------


def _band_stats(
    q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, local_heads: Tensor, global_heads: Tensor
) -> tuple[Tensor, Tensor]:
    """(WAAD of the local heads, FAI of the global heads over a finite horizon), [B, HQ, T]; of no meaning for others.

    The heads are bool [sequences, HQ], or [sequences, H] for all query heads of a key head.
    """
    row_sums = _row_sums(lse, options.sinks)
    # scores are base-2 logarithms here: exp2 takes half the time of exp
    lse = lse * LOG2_E
    softcap = None if options.softcap is None else options.softcap * LOG2_E
    options = options._replace(scale=options.scale * LOG2_E, softcap=softcap)
    # min(d, W) = W - max(W - d, 0): the rest of the row counts W each
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
    """Sums [B, HQ, T] of A over the band lo <= t - s <= hi: of its rows, weighted by W - (t - s), or of its columns.

    A tile's own tokens are the rows, or the columns, that it sums for, all of one sequence; `others` are the tokens on
    the other side of the band. So a sum is complete in its tile, and all tiles have one shape. An item is a tile and
    one of `heads`, with G query heads; a run of items is one batched product.
    """
    batch, query_heads, tokens, size = q.shape
    (lo, hi), groups = band, heads.shape[1]
    hi = min(hi, tokens - 1 if options.sliding_window is None else min(tokens, options.sliding_window) - 1)
    if hi < lo or q.numel() == 0:
        return q.new_zeros(batch, query_heads, tokens, dtype=torch.float32)
    own = torch.arange(BAND_TILE, device=q.device)
    others = torch.arange(BAND_TILE + hi - lo, device=q.device) + (-hi if of_rows else lo)
    t, s = (own, others) if of_rows else (others, own)  # both from the tile's first token
    distance = own - others[:, None] if of_rows else others[:, None] - own  # [others, own], tokens
    distance = torch.where((lo <= distance) & (distance <= hi), distance, tokens).int()  # what no row sees: too far
    near = (options.window - distance).float()

    row, head, start, end = _band_items(layout, heads, t)
    q, lse = (x.unflatten(1, (groups, -1)) for x in (q, lse[..., None]))  # [B, heads, G, T, D]
    read_q, read_lse = (_reader(x, row, head, start, t) for x in (q, lse))
    read_k = _reader(k[:, :, None], row, head // (groups // k.shape[1]), start, s)
    # how far back a row sees, in tokens: not as far as to any key of another sequence
    sees = torch.where(layout.rows, torch.arange(tokens, device=q.device) - layout.first, -1).int()
    sees, token = pad(sees.flatten(), (0, BAND_TILE + hi), value=-1), row * tokens + start
    item_bytes = 4 * q.shape[2] * (BAND_TILE * len(others) + size * (BAND_TILE + len(others)))
    run = max(1, BAND_BYTES // item_bytes)
    done = [q.new_empty(0, q.shape[2], BAND_TILE, dtype=torch.float32)]
    for at in range(0, len(row), run):
        some = slice(at, at + run)
        queries, keys, row_lse = read_q(some).mul_(options.scale).flatten(1, 2), read_k(some)[:, 0], read_lse(some)
        seen = sees[token[some, None] + t]
        if of_rows:
            scores = (keys @ queries.mT).view(len(keys), len(others), -1, BAND_TILE).transpose(1, 2)
            row_lse, seen = row_lse.mT, seen[:, None]
        else:
            scores = (queries @ keys.mT).view(len(keys), -1, len(others), BAND_TILE)
            seen = seen[..., None]
        weights = _softcapped(scores, options).sub_(row_lse).exp2_()  # [items, G, others, own]
        # All bits of what is hidden are cleared: NaN goes too, and a fill by a bool mask takes several times as long.
        # After the exponential, since a NaN log-sum-exp must not reach what its row does not see.
        weights.view(torch.int32).bitwise_and_((distance - seen).le_(0).neg_()[:, None])
        done.append((weights.mul_(near) if of_rows else weights).sum(-2))

    sums = q.new_zeros(*q.shape[:3], tokens + 1, dtype=torch.float32)  # the last one is for what lies behind a sequence
    token = start[:, None] + own
    sums[row[:, None], head[:, None], :, token.where(token < end[:, None], tokens)] = torch.cat(done).mT
    return sums[..., :tokens].flatten(1, 2)


def _band_items(layout: Layout, heads: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """(batch row, head, first token, end of the sequence), each [items], of the tiles with rows of R among their t."""
    row, start, _, end, sequence = layout.tiles(BAND_TILE).long().unbind(-1)
    next_row = layout.next_row()[row, (start + t[0]).clamp(max=layout.rows.shape[1])]
    used = next_row < torch.minimum(start + t[-1] + 1, end)
    tile, head = (heads[sequence] & used[:, None]).nonzero().unbind(-1)
    return row[tile], head, start[tile], end[tile]


def _reader(x: Tensor, row: Tensor, head: Tensor, start: Tensor, token: Tensor) -> Callable[[slice], Tensor]:
    """A function of a slice of the items: their x[row, head, :, start + token] of x [B, heads, G, T, D].

    row, head, start [items], token [M]; the result is a new fp32 tensor [n, G, M, D], with anything of x where a token
    lies outside the batch row. x is read as lines that begin at each of its elements, so that one index_select serves
    all strides without a copy of x.
    """
    stride, size = x.stride(), x.shape[-1]
    begins = 1 + sum((n - 1) * step for n, step in zip(x.shape[:-1], stride[:-1], strict=True))
    lines = x.as_strided((begins, size), (1, 1))
    first = row * stride[0] + head * stride[1] + start * stride[3]
    offset = torch.arange(x.shape[2], device=x.device)[:, None] * stride[2] + token * stride[3]

    def read(some: slice) -> Tensor:
        index = (first[some, None, None] + offset).clamp_(0, begins - 1)
        return lines.index_select(0, index.flatten()).view(*index.shape, size).float()

    return read
