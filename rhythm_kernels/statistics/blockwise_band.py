"""The band pass of the blockwise backend: the keys near each row, and the rows a horizon after each key.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v; S sequences, N
tokens of a tile.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.statistics.blockwise_scores import LOG2_E, row_sums, softcapped
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options

BAND_TILE = 32  # tokens
SHORT_TILE = 16  # of sequences of SHORT tokens on average: less of a tile lies outside the band or behind their end
SHORT = 128
MASK_BYTES = 8 << 20  # of the masks of a band, which are kept for all layers if they are no larger
BAND_BYTES = 3 << 20  # of fp32 queries, keys and scores held at once: what fits a cache is faster


class _BandTile(NamedTuple):
    """The positions of a tile of the band pass, counted from its first token. All tiles of a band share them.

    A tile sums over the band lo <= t - s <= hi, for each of its own tokens. `others` are the tokens on the other side
    of the band: keys where the own tokens are rows, rows where they are columns. So each sum is complete in one tile.
    """

    own: Tensor
    """int64 [N]."""
    others: Tensor
    """int64 [M]."""
    rows: Tensor
    """Those of the two that are rows."""
    keys: Tensor
    """The others of the two."""
    distance: Tensor
    """int32 [M, N]: t - s inside the band, else T, which is further than any row sees."""


class _BandTiles(NamedTuple):
    """All tiles of a band, which the layers of a forward share."""

    tile: _BandTile
    batch_row: Tensor
    """int64 [tiles]."""
    start: Tensor
    """int64 [tiles], the tile's first token."""
    end: Tensor
    """int64 [tiles], one past the last token of the tile's sequence."""
    sequence: Tensor
    """int64 [tiles]."""
    used: Tensor
    """bool [tiles]: whether there is a row of R among the rows."""
    sight: Tensor
    """int32 [tiles, 1, N] where the own tokens are rows, else [tiles, M, 1]: how far back each row sees. A row
    of R sees to the beginning of its own sequence; any other row sees nothing, -1."""
    masks: Tensor | None
    """`mask` of all tiles, if they are few."""

    def mask(self, tiles: Tensor) -> Tensor:
        """Returns int32 [n, M, N] for the indices of n tiles: -1, all bits, where a row sees a key, else 0."""
        if self.masks is not None:
            return self.masks.index_select(0, tiles)
        return (self.tile.distance - self.sight[tiles]).le_(0).neg_()


class _Items(NamedTuple):
    """The pairs of a tile that has rows of R and a head, each field int64 [items]. A head stands for G query heads."""

    tile: Tensor
    batch_row: Tensor
    head: Tensor
    start: Tensor
    """The tile's first token."""
    end: Tensor
    """One past the last token of the tile's sequence."""


def band_pass(
    q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, local_heads: Tensor, global_heads: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns WAAD of the local heads and FAI of the global heads over a finite horizon, [B, HQ, T].

    The values of other heads mean nothing. The groups are bool [S, HQ], or [S, H] for all query heads of a key head.
    """
    sums_of_rows = row_sums(lse, options.sinks)
    # scores are base-2 logarithms here: exp2 takes half the time of exp
    lse = lse * LOG2_E
    softcap = None if options.softcap is None else options.softcap * LOG2_E
    options = options._replace(scale=options.scale * LOG2_E, softcap=softcap)
    # min(d, W) = W - max(W - d, 0), and the second term is 0 outside the band
    nearness = _band_sums(q, k, lse, layout, options, local_heads, (0, options.window - 1), of_rows=True)
    waad = torch.where(layout.rows[:, None], options.window * sums_of_rows - nearness, 0.0)
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
    tiles = layout.keep(("band", lo, hi, of_rows), lambda: _band_tiles(layout, lo, hi, of_rows))
    tile, items = tiles.tile, _band_items(tiles, heads)
    q, lse = (x.unflatten(1, (head_count, -1)) for x in (q, lse[..., None]))  # [B, heads, G, T, D]
    read_q, read_lse = (_reader(x, items, tile.rows) for x in (q, lse))
    key_items = items._replace(head=items.head // (head_count // k.shape[1]))
    read_k = _reader(k[:, :, None], key_items, tile.keys)

    near = (options.window - tile.distance).float()
    run = _items_at_once(q.shape[2], q.shape[-1], tile)
    sums = [q.new_empty(0, q.shape[2], len(tile.own), dtype=torch.float32)]
    for at in range(0, len(items.start), run):
        part = slice(at, at + run)
        queries = read_q(part).mul_(options.scale)
        mask = tiles.mask(items.tile[part])
        weights = _item_weights(queries, read_k(part)[:, 0], read_lse(part), mask, options, of_rows)
        sums.append((weights.mul_(near) if of_rows else weights).sum(-2))
    return _at_tokens(torch.cat(sums), items, tile.own, q.shape)


def _band_tile(size: int, lo: int, hi: int, tokens: int, of_rows: bool, device: torch.device) -> _BandTile:
    """Returns the tile of a band, of `size` tokens; of_rows: these are rows, else columns."""
    own = torch.arange(size, device=device)
    others = torch.arange(size + hi - lo, device=device) + (-hi if of_rows else lo)
    rows, keys = (own, others) if of_rows else (others, own)
    distance = own - others[:, None] if of_rows else others[:, None] - own
    distance = torch.where((lo <= distance) & (distance <= hi), distance, tokens).int()
    return _BandTile(own, others, rows, keys, distance)


def _band_tiles(layout: Layout, lo: int, hi: int, of_rows: bool) -> _BandTiles:
    """Returns the tiles of a band; of_rows: their own tokens are rows, else columns."""
    tokens, device = layout.rows.shape[1], layout.rows.device
    size = SHORT_TILE if layout.rows.numel() <= SHORT * layout.sequences else BAND_TILE
    tile = _band_tile(size, lo, hi, tokens, of_rows, device)
    batch_row, start, _, end, sequence = layout.tiles(size).long().unbind(-1)
    next_row = layout.next_row()[batch_row, (start + tile.rows[0]).clamp(max=tokens)]
    used = next_row < torch.minimum(start + tile.rows[-1] + 1, end)
    sight = torch.where(layout.rows, torch.arange(tokens, device=device) - layout.first, -1).int()
    sight = pad(sight.flatten(), (0, size + hi), value=-1)  # a tile may reach behind the last batch row
    sight = sight[(batch_row * tokens + start)[:, None] + tile.rows]
    sight = sight[:, None] if of_rows else sight[..., None]
    tiles = _BandTiles(tile, batch_row, start, end, sequence, used, sight, None)
    if len(start) * tile.distance.nbytes > MASK_BYTES:
        return tiles
    return tiles._replace(masks=tiles.mask(torch.arange(len(start), device=device)))


def _band_items(tiles: _BandTiles, heads: Tensor) -> _Items:
    """Returns the items of the heads, bool [S, heads], and of the tiles that are used."""
    tile, head = (heads[tiles.sequence] & tiles.used[:, None]).nonzero().unbind(-1)
    return _Items(tile, tiles.batch_row[tile], head, tiles.start[tile], tiles.end[tile])


def _items_at_once(group: int, size: int, tile: _BandTile) -> int:
    """Returns how many items BAND_BYTES hold: queries, keys and scores of `group` query heads of this head size."""
    own, others = len(tile.own), len(tile.others)
    item_bytes = 4 * group * (own * others + size * (own + others))
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


def _item_weights(queries: Tensor, keys: Tensor, lse: Tensor, mask: Tensor, options: Options, of_rows: bool) -> Tensor:
    """Returns A of some items, fp32 [n, G, M, N], 0 outside the band and where it is hidden.

    Args:
        queries: [n, G, rows, D], times the scale.
        keys: [n, keys, D].
        lse: [n, G, rows, 1], base 2.
        mask: int32 [n, M, N], see `_BandTiles.mask`.
    """
    queries = queries.flatten(1, 2)
    if of_rows:
        scores = (keys @ queries.mT).view(len(keys), mask.shape[1], -1, mask.shape[2]).transpose(1, 2)
        lse = lse.mT
    else:
        scores = (queries @ keys.mT).view(len(keys), -1, *mask.shape[1:])
    weights = softcapped(scores, options).sub_(lse).exp2_()
    # This clears all bits of hidden weights, those of a NaN too; a fill by a bool mask takes several times as long. It
    # comes after the exponential, since a NaN log-sum-exp must not reach the keys that its row does not see.
    weights.view(torch.int32).bitwise_and_(mask[:, None])
    return weights


def _at_tokens(sums: Tensor, items: _Items, own: Tensor, shape: torch.Size) -> Tensor:
    """Returns the items' sums [items, G, N] at their tokens, [B, HQ, T], 0 elsewhere.

    `shape` is [B, heads, G, T, D]. One more token takes the sums that a tile has behind the end of its sequence.
    """
    tokens = shape[3]
    out = sums.new_zeros(*shape[:3], tokens + 1)
    token = items.start[:, None] + own
    token = token.where(token < items.end[:, None], tokens)
    out[items.batch_row[:, None], items.head[:, None], :, token] = sums.mT
    return out[..., :tokens].flatten(1, 2)
