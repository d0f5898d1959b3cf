"""The statistics in plain torch, in tiles: right on every device, linear memory, no N x N map.

Two passes, of which a call needs one. The row pass reads every visible key of a row. The band pass is for a row whose
log-sum-exp is known: it reads only the keys that the window and a finite horizon reach.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.attention.layout import Layout, mean_over_rows
from rhythm_kernels.attention.options import Options
from rhythm_kernels.types import AttentionStats

ROW_TILE = 64  # rows
BAND_TILE = 32  # rows; a band tile reads 32 rows and as many keys as the band is wide before them
TILE_BYTES = 32 << 20  # of fp32 scores held at once in the row pass; a few temporaries of this size live beside it
BAND_BYTES = 2 << 20  # in the band pass, where what fits a cache is faster


def attention_stats(q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options) -> AttentionStats:
    """As in api.py, behind its checks."""
    if q.shape[0] * q.shape[2] == 0:
        waad, fai, row_lse = (torch.zeros(q.shape[:3], device=q.device) for _ in range(3))
        return AttentionStats(waad, fai, mean_over_rows(waad, layout) if options.need_span else None, row_lse)
    known_lse = None if lse is None else torch.where(layout.rows[:, None], lse, 0.0)
    if known_lse is not None and not options.need_span and options.horizon[1] is not None:
        waad, fai_sums = _band_pass(q, k, known_lse, layout, options)
        span, row_lse = None, known_lse
    else:
        waad, fai_sums, looked_back, row_lse = _row_pass(q, k, known_lse, layout, options)
        span = mean_over_rows(looked_back, layout) if options.need_span else None
    fai = fai_sums / layout.rows_looking_back(options.horizon).clamp(min=1)[:, None]
    return AttentionStats(waad, fai, span, row_lse)


def _window_sums(weights: Tensor, before: int, rows: Tensor, lse: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(WAAD [..., M], sums of the columns over the horizon [..., N]) of a tile of A [..., M, N], 0 where hidden.

    Its last key is its last row's own, and `before` of its keys come before its first row.
    """
    count, keys = weights.shape[-2:]
    row, column = (torch.arange(n, device=weights.device) for n in (count, keys))
    distance = row[:, None] + before - column  # tokens
    # min(d, W) = W - max(W - d, 0): the rest of the row counts W each, and the row sums to 1 less the sink's share
    nearest = slice(max(0, before - options.window + 1), keys)
    near = (options.window - distance[:, nearest]).clamp(min=0).float()
    nearness = (weights[..., nearest] * near).sum(-1)
    row_sum = 1.0
    if options.sinks is not None:
        row_sum = 1.0 - torch.exp(options.sinks.view(-1, *[1] * (lse.ndim - 2)) - lse)
    waad = torch.where(rows, options.window * row_sum - nearness, 0.0)

    lo, hi = options.horizon
    latest = slice(0, max(0, keys - lo))  # no later key is lo behind a row
    future = distance[:, latest] >= lo
    if hi is not None:
        future &= distance[:, latest] <= hi
    received = torch.where(future, weights[..., latest], 0.0).sum(-2)
    return waad, pad(received, (0, keys - received.shape[-1]))


def _reach(options: Options, tokens: int) -> int:
    """How many keys before a row the window and the horizon read."""
    hi = options.horizon[1]
    return min(tokens, max(options.window - 1, tokens if hi is None else hi))


def _softcapped(scores: Tensor, options: Options) -> Tensor:
    return scores if options.softcap is None else scores.div_(options.softcap).tanh_().mul_(options.softcap)


# ---- the row pass ----------------------------------------------------------------------------------------------------


def _row_pass(
    q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(WAAD, column sums of A over the horizon, sum_s A (t - s) of each row, lse), each [B, HQ, T]."""
    batch, query_heads, tokens, _ = q.shape
    out = tuple(torch.zeros(batch, query_heads, tokens, device=q.device) for _ in range(4))
    row_bytes = 4 * query_heads * tokens
    tile = max(1, min(ROW_TILE, tokens, TILE_BYTES // row_bytes))
    chunk = max(1, TILE_BYTES // (row_bytes * tile))
    for at in range(0, batch, chunk):
        part = slice(at, at + chunk)
        some_lse = None if lse is None else lse[part]
        _row_tiles(q[part], k[part], some_lse, layout.slice(part), options, tile, tuple(x[part] for x in out))
    return out


def _row_tiles(
    q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options, tile: int, out: tuple[Tensor, ...]
) -> None:
    waad, fai_sums, looked_back, row_lse = out
    batch, query_heads, tokens, size = q.shape
    for begin in range(0, tokens, tile):
        end = min(begin + tile, tokens)
        rows = layout.rows[:, begin:end]
        if not rows.any():
            continue
        first_key = min(begin, int(layout.first[:, begin:end][rows].min()))
        if options.sliding_window is not None:
            first_key = max(first_key, begin - options.sliding_window + 1)

        queries = q[:, :, begin:end].float().mul(options.scale).reshape(batch, k.shape[1], -1, size)
        scores = queries @ k[:, :, first_key:end].float().mT  # [B, H, HQ / H * rows, keys]
        scores = _softcapped(scores.view(batch, query_heads, end - begin, -1), options)
        position = torch.arange(first_key, end, device=q.device)
        distance = position[begin - first_key :, None] - position  # [rows, keys], tokens
        hidden = (position < layout.first[:, begin:end, None]) | (distance < 0) | ~rows[..., None]
        if options.sliding_window is not None:
            hidden |= distance >= options.sliding_window
        scores.masked_fill_(hidden[:, None], -math.inf)

        if lse is not None:
            tile_lse = lse[:, :, begin:end]
            weights = scores.sub_(tile_lse[..., None]).exp_()  # A, 0 outside R
        else:
            weights, tile_lse = _softmax(scores, rows, options.sinks)
        row_lse[:, :, begin:end] = tile_lse
        if options.need_span:
            looked_back[:, :, begin:end] = (weights * distance.float()).sum(-1)

        first_seen = max(first_key, begin - _reach(options, tokens))
        seen = slice(first_seen - first_key, None)
        # a row of NaN has NaN also where it sees nothing, in other sequences' columns
        band = weights[..., seen].masked_fill(hidden[:, None, :, seen], 0.0)
        tile_waad, received = _window_sums(band, begin - first_seen, rows[:, None], tile_lse, options)
        waad[:, :, begin:end] = tile_waad
        fai_sums[:, :, first_seen:end] += received


def _softmax(scores: Tensor, rows: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(A, lse) of masked scores [B, HQ, rows, keys], in place; 0 in rows outside R."""
    outside = ~rows[:, None, :, None]
    shift = scores.amax(-1, keepdim=True)
    if sinks is not None:
        shift = torch.maximum(shift, sinks[:, None, None])
    shift.masked_fill_(outside, 0.0)
    weights = scores.sub_(shift).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total += torch.exp(sinks[:, None, None] - shift)
    total.masked_fill_(outside, 1.0)
    return weights.div_(total), (shift + total.log()).squeeze(-1)


# ---- the band pass ---------------------------------------------------------------------------------------------------


def _band_pass(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options) -> tuple[Tensor, Tensor]:
    """(WAAD, column sums of A over a finite horizon), each [B, HQ, T]; `lse` is 0 outside R."""
    batch, query_heads, tokens, _ = q.shape
    reach = -(-_reach(options, tokens) // BAND_TILE) * BAND_TILE  # whole tiles, so that column sums line up
    chunk = max(1, BAND_BYTES // (4 * query_heads * BAND_TILE * (reach + BAND_TILE)))
    parts = [slice(at, at + chunk) for at in range(0, batch, chunk)]
    done = [_band_tiles(q[part], k[part], lse[part], layout.slice(part), options, reach) for part in parts]
    waad, fai_sums = (torch.cat(x) for x in zip(*done))
    return waad, fai_sums


def _band_tiles(
    q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, reach: int
) -> tuple[Tensor, Tensor]:
    """All tiles have one shape: BAND_TILE rows, and the keys from `reach` before the first of them to the last, with
    padding before the first token and behind the last. So a run of tiles is one batched product.
    """
    batch, query_heads, tokens, size = q.shape
    key_heads, tile = k.shape[1], BAND_TILE
    tiles = -(-tokens // tile)
    behind, keys = tiles * tile - tokens, reach + tile

    row, column = torch.arange(tile, device=q.device), torch.arange(-reach, tile, device=q.device)
    unseen = row[:, None] < column
    if options.sliding_window is not None:
        unseen |= row[:, None] - column >= options.sliding_window

    k_windows = pad(k, (0, 0, reach, behind)).unfold(2, keys, tile)  # [B, H, tiles, D, keys]
    q_tiles = pad(q, (0, 0, 0, behind)).unflatten(2, (tiles, tile)).unflatten(1, (key_heads, -1))
    rows = pad(layout.rows, (0, behind)).unflatten(1, (tiles, tile))
    first = pad(layout.first, (0, behind)).unflatten(1, (tiles, tile))
    tile_lse = pad(lse, (0, behind)).unflatten(2, (tiles, tile))
    waad = torch.zeros_like(tile_lse)
    sums = torch.zeros(batch, query_heads, reach // tile + tiles, tile, device=q.device)
    run = max(1, BAND_BYTES // (4 * batch * query_heads * tile * keys))
    for at in range(0, tiles, run):
        part = slice(at, min(at + run, tiles))
        own = rows[:, part]
        if not own.any():
            continue
        queries = q_tiles[:, :, :, part].float().mul(options.scale).transpose(2, 3)  # [B, H, run, HQ / H, rows, D]
        scores = queries.reshape(batch, key_heads, part.stop - at, -1, size) @ k_windows[:, :, part].float()
        scores = scores.unflatten(3, (-1, tile)).transpose(2, 3).flatten(1, 2)  # [B, HQ, run, rows, keys]
        position = torch.arange(at, part.stop, device=q.device)[:, None] * tile + column
        hidden = (position[:, None] < first[:, part, :, None]) | unseen | ~own[..., None]
        weights = _softcapped(scores, options).sub(tile_lse[:, :, part, :, None]).exp_()
        # selected after the exponential: a NaN log-sum-exp must not reach what its row does not see
        weights.masked_fill_(hidden[:, None], 0.0)
        waad[:, :, part], received = _window_sums(weights, reach, own[:, None], tile_lse[:, :, part], options)
        received = received.unflatten(-1, (-1, tile))
        for step in range(keys // tile):
            sums[:, :, at + step : part.stop + step] += received[..., step, :]
    return waad.flatten(2)[..., :tokens], sums[:, :, reach // tile :].flatten(2)[..., :tokens]
