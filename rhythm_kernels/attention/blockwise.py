"""The statistics in plain torch, one tile of rows at a time: right on every device, linear memory, no N x N map."""

import math

import torch
from torch import Tensor

from rhythm_kernels.attention.layout import Layout, mean_over_rows, rows_looking_back
from rhythm_kernels.attention.options import Options
from rhythm_kernels.types import AttentionStats

TILE_ROWS = 128
TILE_BYTES = 32 << 20  # of fp32 scores held at once; several temporaries of this size live beside it


def blockwise_stats(q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options) -> AttentionStats:
    """`attention_stats` behind its checks."""
    batch, query_heads, tokens, _ = q.shape
    shape = (batch, query_heads, tokens)
    waad, fai, looked_back, row_lse = (torch.zeros(shape, device=q.device) for _ in range(4))
    tile_rows = max(1, min(TILE_ROWS, tokens, TILE_BYTES // (4 * query_heads * max(tokens, 1))))
    chunk = max(1, TILE_BYTES // (4 * query_heads * tile_rows * max(tokens, 1)))
    for begin in range(0, batch, chunk):
        part = slice(begin, begin + chunk)
        _batch_chunk(
            q[part],
            k[part],
            None if lse is None else lse[part],
            layout.slice(begin, begin + chunk),
            options,
            tile_rows,
            (waad[part], fai[part], looked_back[part], row_lse[part]),
        )
    fai /= rows_looking_back(layout, options.horizon).clamp(min=1)[:, None]
    span = mean_over_rows(looked_back, layout) if options.need_span else None
    return AttentionStats(waad, fai, span, row_lse)


def _batch_chunk(
    q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options, tile_rows: int, out: tuple[Tensor, ...]
) -> None:
    """Fills waad, the sums of fai, the rows' distances and lse of a few batch rows."""
    waad, fai_sums, looked_back, row_lse = out
    batch, query_heads, tokens, size = q.shape
    key_heads = k.shape[1]
    lo, hi = options.horizon
    reach = max(options.window - 1, tokens if hi is None else hi)  # how far back WAAD and FAI read
    band_only = lse is not None and not options.need_span
    for begin in range(0, tokens, tile_rows):
        end = min(begin + tile_rows, tokens)
        rows = layout.rows[:, begin:end]
        if not rows.any():
            continue
        first_key = min(begin, int(layout.first[:, begin:end][rows].min()))
        if options.sliding_window is not None:
            first_key = max(first_key, begin - options.sliding_window + 1)
        first_band_key = max(first_key, begin - reach)
        if band_only:
            first_key = first_band_key

        queries = q[:, :, begin:end].float().reshape(batch, key_heads, -1, size)
        scores = queries @ k[:, :, first_key:end].float().mT  # [B, H, HQ / H * rows, keys]
        scores = scores.view(batch, query_heads, end - begin, -1).mul_(options.scale)
        if options.softcap is not None:
            scores.div_(options.softcap).tanh_().mul_(options.softcap)
        position = torch.arange(first_key, end, device=q.device)
        distance = position[begin - first_key :, None] - position  # [rows, keys], tokens
        hidden = (position < layout.first[:, begin:end, None]) | (distance < 0) | ~rows[..., None]
        if options.sliding_window is not None:
            hidden |= distance >= options.sliding_window
        scores.masked_fill_(hidden[:, None], -math.inf)

        if lse is not None:
            tile_lse = lse[:, :, begin:end].masked_fill(~rows[:, None], 0.0)
            weights = scores.sub_(tile_lse[..., None]).exp_()  # A, 0 outside R
        else:
            shift = scores.amax(-1, keepdim=True)
            if options.sinks is not None:
                shift = torch.maximum(shift, options.sinks[:, None, None])
            shift.masked_fill_(~rows[:, None, :, None], 0.0)
            weights = scores.sub_(shift).exp_()
            total = weights.sum(-1, keepdim=True)
            if options.sinks is not None:
                total += torch.exp(options.sinks[:, None, None] - shift)
            total.masked_fill_(~rows[:, None, :, None], 1.0)
            weights.div_(total)
            tile_lse = (shift + total.log()).squeeze(-1)
        row_lse[:, :, begin:end] = tile_lse

        if options.need_span:
            looked_back[:, :, begin:end] = (weights * distance).sum(-1)
        band = weights[..., first_band_key - first_key :]
        band_distance = distance[:, first_band_key - first_key :]
        # min(d, W) = W - max(W - d, 0): the rest of the row counts W each, and the row sums to 1 less the sink's share
        row_sum = 1.0 if options.sinks is None else 1.0 - torch.exp(options.sinks[:, None] - tile_lse)
        near = (options.window - band_distance).clamp(min=0)
        tile_waad = options.window * row_sum - (band * near).sum(-1)
        waad[:, :, begin:end] = torch.where(rows[:, None], tile_waad, 0.0)
        future = band_distance >= lo if hi is None else (band_distance >= lo) & (band_distance <= hi)
        # selected, not multiplied: a row of NaN has NaN also where it sees nothing, in the columns of its neighbours
        counted = future & ~hidden[..., first_band_key - first_key :]
        fai_sums[:, :, first_band_key:end] += torch.where(counted[:, None], band, 0.0).sum(-2)
