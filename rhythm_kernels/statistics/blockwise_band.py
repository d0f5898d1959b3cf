"""The band pass of the blockwise backend: a tile of tokens with those that the window or the horizon reaches.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k; S sequences; N tokens of a
tile, R its rows, M its keys, G query heads of an item.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.statistics.blockwise_scores import LOG2_E, all_bits, row_sums, softcapped
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.lines import lines_of
from rhythm_kernels.statistics.options import Options

BAND_TILE = 32  # tokens
SHORT_TILE = 16  # of sequences of SHORT tokens on average: less of a tile lies behind their end
SHORT = 128
MASK_BYTES = 8 << 20  # of the masks of a band, which are kept for all layers if they are no larger
BAND_BYTES = 11 << 18  # of fp32 queries, keys and scores held at once: what fits a cache is faster


class _Band(NamedTuple):
    """The least and the largest distance t - s, in tokens, of the weights that are summed; None for none."""

    window: tuple[int, int] | None = None
    """WAAD sums each row over these distances."""
    horizon: tuple[int, int] | None = None
    """FAI sums each column over these distances."""

    @property
    def both(self) -> bool:
        return None not in self

    @property
    def reach(self) -> tuple[int, int]:
        """The least and the largest distance of either."""
        ends = [end for distances in self if distances is not None for end in distances]
        return min(ends), max(ends)

    def keys(self, distances: tuple[int, int], rows: int) -> slice:
        """Returns the keys of a tile with so many rows that have these distances from any of its rows."""
        return slice(self.reach[1] - distances[1], self.reach[1] - distances[0] + rows)


class _BandTiles(NamedTuple):
    """All tiles of a band, which the layers of a forward share. Positions are counted from a tile's first token.

    The tokens of a tile are its rows. If the band has the horizon alone, they are its keys: then all rows that a column
    is summed over lie in one tile.
    """

    size: int
    """N."""
    row: Tensor
    """int64 [R]."""
    key: Tensor
    """int64 [M]."""
    distance: Tensor
    """int32 [R, M]: t - s inside the band, else T, which is further than any row sees."""
    nearest: Tensor | None
    """fp32 [R, keys of the window]: W - (t - s), 0 outside the window. None if the band has no window."""
    in_horizon: Tensor | None
    """int32 [R, keys of the horizon]: -1, all bits, inside the horizon, else 0. None if the band has one part."""
    batch_row: Tensor
    """int64 [tiles]."""
    start: Tensor
    """int64 [tiles], the tile's first token."""
    sequence: Tensor
    """int64 [tiles]."""
    used: Tensor
    """bool [tiles]: whether it has a row of R."""
    sight: Tensor
    """int32 [tiles, R, 1]: how far back each row sees. A row of R sees to the beginning of its own sequence; any other
    row sees nothing, -1. A row sees a key if their distance is at most this: T, outside the band, never is."""
    place: Tensor
    """int64 [B * T]: the place of each token in [tiles, N]; the first place behind them for padding."""
    masks: Tensor | None
    """`mask` of all tiles, if they are few."""

    def mask(self, tiles: Tensor) -> Tensor:
        """Returns int32 [n, R, M] for the indices of n tiles: -1, all bits, where a row sees a key, else 0."""
        if self.masks is not None:
            return self.masks.index_select(0, tiles)
        return (self.distance - self.sight[tiles]).le_(0).neg_()


class _Items(NamedTuple):
    """The pairs of a tile that has rows of R and a head, each field int64 [items]. A head stands for G query heads."""

    tile: Tensor
    batch_row: Tensor
    head: Tensor
    start: Tensor
    """The tile's first token."""


def band_pass(
    q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, local_heads: Tensor, global_heads: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns WAAD of the local heads and FAI of the global heads over a finite horizon, [B, HQ, T].

    The values of other heads mean nothing. The groups are bool [S, HQ], or [S, H] for all query heads of a key head. If
    they are one tensor, both come from the same weights.
    """
    sums_of_rows = row_sums(lse, options.sinks)
    # scores are base-2 logarithms here: exp takes many times as long as exp2 where a weight is almost 0
    lse = lse * LOG2_E
    softcap = None if options.softcap is None else options.softcap * LOG2_E
    options = options._replace(scale=options.scale * LOG2_E, softcap=softcap)
    most = q.shape[2] - 1  # the largest distance of a key that a row sees
    if options.sliding_window is not None:
        most = min(most, options.sliding_window - 1)
    lo, hi = options.horizon
    band = _Band((0, min(options.window - 1, most)), (lo, min(hi, most)) if lo <= most else None)
    inputs = q, k, lse, layout, options
    if local_heads is global_heads and lo <= options.window + BAND_TILE:
        nearness, received = _band_sums(*inputs, local_heads, band)
    else:  # of few heads, or of keys far apart, each sum has weights of its own
        nearness, _ = _band_sums(*inputs, local_heads, band._replace(horizon=None))
        _, received = _band_sums(*inputs, global_heads, band._replace(window=None))
    # min(d, W) = W - max(W - d, 0), and the second term is 0 outside the window
    waad = torch.where(layout.rows[:, None], options.window * sums_of_rows - nearness, 0.0)
    if received is None:  # no row sees that far back
        return waad, torch.zeros_like(waad)
    return waad, received / layout.rows_looking_back(options.horizon)[:, None]


def _band_sums(
    q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, heads: Tensor, band: _Band
) -> tuple[Tensor | None, Tensor | None]:
    """Returns sums of A over a band: of rows, weighted by W - (t - s), and of columns. fp32 [B, HQ, T].

    A sum that the band does not ask for is None.

    Args:
        lse: [B, HQ, T], base 2; the scale and the soft cap in `options` are for base-2 scores too.
        heads: bool [S, HQ], the heads that are summed, or [S, H] for all query heads of a key head.
    """
    if q.numel() == 0 or band == _Band() or not heads.any():
        nothing = q.new_zeros(q.shape[:3], dtype=torch.float32)
        return tuple(None if distances is None else nothing for distances in band)
    tiles = layout.keep(("band", options.window, *band), lambda: _band_tiles(layout, options.window, band))
    items, head_count = _band_items(tiles, heads), heads.shape[1]
    q, lse = (x.unflatten(1, (head_count, -1)) for x in (q, lse[..., None]))  # [B, heads, G, T, D]
    read_q, read_lse = (_reader(x, items, tiles.row) for x in (q, lse))
    key_items = items._replace(head=items.head // (head_count // k.shape[1]))
    read_k = _reader(k[:, :, None], key_items, tiles.key)

    group, size = q.shape[2], tiles.size
    # The rows of tile i look back at the tiles i - tiles_back .. i, so their sums of columns are added to the lines of
    # those. A line holds the N tokens of a tile and head; there are tiles_back empty tiles in front, so that line i
    # belongs to tile i - tiles_back, and one behind for padding, which stays 0.
    tiles_back = -(-band.horizon[1] // size) if band.both else 0
    line = items.tile * head_count + items.head
    nearness, received = (
        None
        if distances is None
        else q.new_zeros((tiles_back + len(tiles.start) + 1) * head_count, group * size, dtype=torch.float32)
        for distances in band
    )
    run = _items_at_once(group, q.shape[-1], tiles)
    for at in range(0, len(items.start), run):
        part = slice(at, at + run)
        mask = tiles.mask(items.tile[part])
        weights = _item_weights(read_q(part), read_k(part)[:, 0], read_lse(part), mask, options)
        if band.window is not None:
            sums = (weights[..., band.keys(band.window, size)] * tiles.nearest).sum(-1)  # [n, G, N]
            nearness.index_copy_(0, line[part] + tiles_back * head_count, sums.flatten(1))
        if band.both:
            lo, hi = band.horizon
            weights = weights[..., band.keys(band.horizon, size)]
            weights.view(torch.int32).bitwise_and_(tiles.in_horizon)
            columns_of_tiles = pad(weights.sum(-2), (tiles_back * size - hi, lo))
            sums = columns_of_tiles.unflatten(-1, (-1, size))  # [n, G, tiles_back + 1, N]
            for i, columns in enumerate(sums.unbind(2)):
                lines = line[part] + i * head_count  # a tile and head occur once in a run; index_add_ would sort
                received.index_copy_(0, lines, received.index_select(0, lines).add_(columns.flatten(1)))
        elif band.horizon is not None:
            received.index_copy_(0, line[part], weights.sum(-2).flatten(1))
    return tuple(
        None if x is None else _at_tokens(x.view(-1, head_count, group, size)[tiles_back:], tiles, q.shape)
        for x in (nearness, received)
    )


def _band_tiles(layout: Layout, window: int, band: _Band) -> _BandTiles:
    tokens, device = layout.rows.shape[1], layout.rows.device
    size = SHORT_TILE if layout.rows.numel() <= SHORT * layout.sequences else BAND_TILE
    least, largest = band.reach
    own = torch.arange(size, device=device)
    if band.window is None:
        row, key = torch.arange(least, size + largest, device=device), own
    else:
        row, key = own, torch.arange(-largest, size - least, device=device)
    distance = row[:, None] - key
    distance = torch.where((least <= distance) & (distance <= largest), distance, tokens).int()
    nearest = in_horizon = None
    if band.window is not None:
        nearest = (window - distance[:, band.keys(band.window, size)]).clamp_(min=0).float()
    if band.both:
        far = distance[:, band.keys(band.horizon, size)]
        in_horizon = all_bits((band.horizon[0] <= far) & (far <= band.horizon[1]))

    batch_row, start, _, end, sequence = layout.tiles(size).long().unbind(-1)
    next_row = layout.next_row()[batch_row, (start + row[0]).clamp(max=tokens)]
    used = next_row < torch.minimum(start + row[-1] + 1, end)
    sight = torch.where(layout.rows, torch.arange(tokens, device=device) - layout.first, -1).int()
    sight = pad(sight.flatten(), (0, 1), value=-1)[_tokens_of(layout, size, row), None]
    place = layout.keep(("band place", size), lambda: _place(layout, size, own))
    fixed = size, row, key, distance, nearest, in_horizon
    tiles = _BandTiles(*fixed, batch_row, start, sequence, used, sight, place, None)
    if len(start) * distance.nbytes > MASK_BYTES:
        return tiles
    return tiles._replace(masks=tiles.mask(torch.arange(len(start), device=device)))


def _tokens_of(layout: Layout, size: int, offset: Tensor) -> Tensor:
    """Returns the token of each offset in each tile, int64 [tiles, offsets] in B * T; B * T behind a sequence's end."""
    batch_row, start, _, end, _ = layout.tiles(size).long()[..., None].unbind(1)
    token = start + offset
    return torch.where(token < end, batch_row * layout.rows.shape[1] + token, layout.rows.numel())


def _place(layout: Layout, size: int, own: Tensor) -> Tensor:
    """Returns `_BandTiles.place`."""
    tokens = _tokens_of(layout, size, own)
    place = torch.full((layout.rows.numel() + 1,), tokens.numel(), device=own.device)
    place[tokens] = torch.arange(tokens.numel(), device=own.device).view_as(tokens)
    return place[:-1]


def _band_items(tiles: _BandTiles, heads: Tensor) -> _Items:
    """Returns the items of the heads, bool [S, heads], and of the tiles that are used."""
    tile, head = (heads[tiles.sequence] & tiles.used[:, None]).nonzero().unbind(-1)
    return _Items(tile, tiles.batch_row[tile], head, tiles.start[tile])


def _items_at_once(group: int, size: int, tiles: _BandTiles) -> int:
    """Returns how many items BAND_BYTES hold: queries, keys and scores of `group` query heads of this head size."""
    rows, keys = group * len(tiles.row), len(tiles.key)
    return max(1, BAND_BYTES // (4 * (rows * keys + size * (rows + keys))))


def _reader(x: Tensor, items: _Items, token: Tensor) -> Callable[[slice], Tensor]:
    """Returns a function that reads x [B, heads, G, T, D] for a slice of the items, as a new fp32 [n, G, M, D].

    It returns x[batch_row, head, :, start + token] of each item; token is int64 [M]. Where a token lies outside the
    batch row, it returns some other element of x.
    """
    stride, lines = x.stride(), lines_of(x)
    first = items.batch_row * stride[0] + items.head * stride[1] + items.start * stride[3]
    offset = torch.arange(x.shape[2], device=x.device)[:, None] * stride[2] + token * stride[3]

    def read(part: slice) -> Tensor:
        index = (first[part, None, None] + offset).clamp_(0, len(lines) - 1)
        return lines.index_select(0, index.flatten()).view(*index.shape, -1).float()

    return read


def _item_weights(queries: Tensor, keys: Tensor, lse: Tensor, mask: Tensor, options: Options) -> Tensor:
    """Returns A of some items, fp32 [n, G, R, M], 0 outside the band and where it is hidden.

    Args:
        queries: [n, G, R, D].
        keys: [n, M, D], which are multiplied by the scale in place.
        lse: [n, G, R, 1], base 2.
        mask: int32 [n, R, M], see `_BandTiles.mask`.
    """
    scores = (queries.flatten(1, 2) @ keys.mul_(options.scale).mT).unflatten(1, queries.shape[1:3])
    weights = softcapped(scores, options).sub_(lse).exp2_()
    # after the exponential, since a NaN log-sum-exp must not reach the keys that its row does not see
    weights.view(torch.int32).bitwise_and_(mask[:, None])
    return weights


def _at_tokens(sums: Tensor, tiles: _BandTiles, shape: torch.Size) -> Tensor:
    """Returns sums [tiles + 1, heads, G, N] at their tokens, [B, HQ, T]; `shape` is [B, heads, G, T, D]."""
    places = sums.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # [HQ, places]
    return places.index_select(1, tiles.place).view(-1, shape[0], shape[3]).transpose(0, 1).contiguous()
