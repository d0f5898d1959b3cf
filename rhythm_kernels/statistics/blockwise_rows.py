"""The row pass of the blockwise backend: every visible key of each row, a tile of rows at a time; the forward too.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v; S sequences.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.host import send
from rhythm_kernels.statistics.blockwise_scores import all_bits, row_sums, softcapped, weighted_sum
from rhythm_kernels.statistics.layout import Layout, make_layout
from rhythm_kernels.statistics.lines import lines_of
from rhythm_kernels.statistics.more import MASSES, NEED_EVERY_KEY
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.spans import mean_over_rows
from rhythm_kernels.types import AttentionStats

ROW_TILE = 64  # rows
SHORT = 128  # tokens: packed sequences up to this length are computed side by side
SHORT_BYTES = 2 << 20  # of fp32 scores of such sequences at once: what fits a cache is faster
OF_ROWS = (*NEED_EVERY_KEY, *MASSES)  # what the pass gives of `more`
LEAST_LOG = -128.0  # the logarithm of a weight that is 0 in fp32
TILE_BYTES = 32 << 20  # of fp32 scores held at once; a few temporaries of this size come on top


class _RowResults(NamedTuple):
    """The results of the row pass: fp32 [B, HQ, T], 0 outside R, and the output of every valid row.

    Those that are not asked for are None.
    """

    waad: Tensor
    fai_sums: Tensor
    """Sums of the columns of A over the horizon."""
    looked_back: Tensor
    """sum_s A[t, s] (t - s)."""
    lse: Tensor
    row_entropy: Tensor | None
    largest_score: Tensor | None
    first_mass: Tensor | None
    prefix_mass: Tensor | None
    self_mass: Tensor | None
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
    near: slice
    """The keys that the window or the horizon reaches."""
    cleared: slice
    """The keys of which hidden weights are cleared: all of them if the log-sum-exp is given, else those that are near,
    since a softmax gives hidden keys 0."""
    seen: Tensor
    """int32 [B, rows, cleared keys]: -1, all bits, where a row of R sees a key, else 0."""


class _ShortBatch(NamedTuple):
    """Packed sequences of like lengths as a padded batch of S' sequences of L tokens."""

    taken: Tensor
    """int64 [S', L]: the place of each token in the packed row. Padding is some token, which no row sees."""
    own: Tensor
    """int64 [n]: which of the S' L are tokens of their sequence."""
    sequences: Tensor
    """int64 [S']: the number of each sequence in the packed row."""
    layout: Layout


def row_statistics(results: _RowResults, layout: Layout, options: Options) -> AttentionStats:
    """Returns the statistics: the column sums divided by their numbers of rows, and the means of the distances.

    Of `more` they have all but the column sums.
    """
    fai = results.fai_sums / layout.rows_looking_back(options.horizon)[:, None]
    span = mean_over_rows(results.looked_back, layout, options.span_rows) if options.need_span else None
    more = {name: getattr(results, name) for name in OF_ROWS if name in options.more}
    return AttentionStats(results.waad, fai, span, results.lse, more)


def row_pass(
    q: Tensor, k: Tensor, layout: Layout, options: Options, *, lse: Tensor | None = None, v: Tensor | None = None
) -> _RowResults:
    """Runs the row pass over chunks of batch rows that TILE_BYTES hold; `options.sinks` may be [HQ] or [B, HQ]."""
    batch, query_heads, tokens, _ = q.shape

    def zeros() -> Tensor:
        return q.new_zeros(batch, query_heads, tokens, dtype=torch.float32)

    results = _RowResults(
        *(zeros() for _ in range(4)),
        *(zeros() if name in options.more else None for name in OF_ROWS),
        out=None if v is None else q.new_zeros(batch, query_heads, tokens, v.shape[3]),
    )
    if batch * query_heads * tokens == 0:
        return results
    is_packed = layout.sequences > batch == 1
    if v is None and is_packed and max(end - begin for _, begin, end in layout.bounds) <= SHORT:
        _short_sequences(q, k, lse, layout, options, results)
        return results
    row_bytes = 4 * query_heads * tokens
    tile_rows = max(1, min(ROW_TILE, tokens, TILE_BYTES // row_bytes))
    chunk = max(1, TILE_BYTES // (row_bytes * tile_rows))
    sinks = None if options.sinks is None else options.sinks.expand(batch, -1)
    for at in range(0, batch, chunk):
        part = slice(at, at + chunk)
        *inputs, part_sinks = (None if x is None else x[part] for x in (q, k, v, lse, sinks))
        part_layout, part_options = layout, options._replace(sinks=part_sinks)
        if chunk < batch:  # then each batch row is a sequence
            part_layout = layout.slice(part)
            part_options = _with_prefixes_of(part, part_options)
        part_results = _RowResults(*(None if x is None else x[part] for x in results))
        _row_tiles(*inputs, part_layout, part_options, tile_rows, part_results)
    return results


def _with_prefixes_of(sequences: slice | Tensor, options: Options) -> Options:
    """Returns the options for some of the sequences."""
    lengths = options.prefix_lengths
    return options if lengths is None else options._replace(prefix_lengths=lengths[sequences])


def _short_sequences(
    q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options, results: _RowResults
) -> None:
    """Writes the results of packed sequences of at most SHORT tokens, those of like lengths as one padded batch.

    Tiles of the packed row would hold two or three sequences each: for answers of 50 tokens many small operations.
    """
    heads = q.shape[1]
    for few in layout.keep(("short sequences", heads), lambda: _short_batches(layout, heads)):
        few_q, few_k = _taken(q, few), _taken(k, few)
        few_lse = None if lse is None else _taken(lse[..., None], few)[..., 0]
        few_results = row_pass(few_q, few_k, few.layout, _with_prefixes_of(few.sequences, options), lse=few_lse)
        for whole, part in zip(results, few_results, strict=True):
            if whole is not None:  # the output is None
                whole[0, :, few.taken.flatten()[few.own]] = part.transpose(0, 1).flatten(1)[:, few.own]


def _taken(x: Tensor, few: _ShortBatch) -> Tensor:
    """Returns x [1, heads, T, D] at the tokens of a batch, [S', heads, L, D]."""
    _, heads, _, size = x.shape
    _, head_stride, stride, _ = x.stride()
    line = torch.arange(heads, device=x.device)[:, None] * head_stride + (few.taken * stride)[:, None]
    return lines_of(x).index_select(0, line.flatten()).view(*line.shape, size)


def _short_batches(layout: Layout, heads: int) -> list[_ShortBatch]:
    """Returns the packed sequences in batches of like lengths, which depend on a sequence's own length alone.

    A batch has as many sequences as SHORT_BYTES hold with so many heads.
    """
    device, tokens = layout.rows.device, layout.rows.shape[1]
    by_length: dict[int, list[tuple[int, int, int]]] = {}
    for number, (_, begin, end) in enumerate(layout.bounds):
        if end > begin:
            by_length.setdefault(-(-(end - begin) // 32) * 32, []).append((begin, end - begin, number))
    batches = []
    for length, sequences in by_length.items():
        most = max(1, SHORT_BYTES // (4 * heads * min(ROW_TILE, length) * length))
        for at in range(0, len(sequences), most):
            begin, count, number = torch.tensor(sequences[at : at + most], device="cpu").unbind(1)
            position = torch.arange(length, device="cpu")
            is_own = position < count[:, None]
            taken = send((begin[:, None] + position).clamp(max=tokens - 1), device)
            padded = make_layout(*is_own.shape, device, layout.rows[0, taken], is_own)
            own = send(is_own.flatten().nonzero()[:, 0], device)
            batches.append(_ShortBatch(taken, own, send(number, device), padded))
    return batches


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
    fills = lse is None or results.row_entropy is not None or results.largest_score is not None
    reach = _reach(options, tokens)
    for begin in range(0, tokens, tile_rows):
        end = min(begin + tile_rows, tokens)
        make = partial(_row_tile, begin, end, reach, computed, layout, options, lse is not None)
        key = ("row tile", begin, end, reach, options.sliding_window, v is None, lse is None)
        tile = layout.keep(key, make) if tokens <= SHORT else make()
        if tile is None:
            continue
        scores = _tile_scores(q, k, tile, options)
        if fills:  # it takes several times as long as clearing the bits of weights, and then exp of -inf does
            scores.masked_fill_(tile.hidden[:, None], -math.inf)
        largest = None if results.largest_score is None else scores.amax(-1)
        kept_scores = None if results.row_entropy is None else scores.clone()
        weights, row_lse = _tile_weights(scores, lse, tile, options)
        if largest is not None:  # NaN where the map is NaN
            broken_rows = row_lse.isnan() | (torch.isposinf(row_lse) & (lse is None))
            _write_rows(results.largest_score, largest.masked_fill_(broken_rows, math.nan), tile, layout)
        if kept_scores is not None:
            _write_rows(results.row_entropy, _entropy(weights, kept_scores, row_lse), tile, layout)
        if values is not None:
            _write_output(weights, values, broken, tile, results)
        _write_statistics(weights, row_lse, tile, layout, options, results)


def _row_tile(
    begin: int, end: int, reach: int, computed: Tensor, layout: Layout, options: Options, lse_given: bool
) -> _RowTile | None:
    """Returns the tile of the rows begin..end; None if none of them is computed.

    Args:
        reach: how many keys before a row the window or the horizon reaches.
        computed: bool [B, T].
    """
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
    near = slice(max(0, begin - reach - first_key), None)
    cleared = slice(None) if lse_given else near
    seen = all_bits(~hidden[..., cleared] & layout.rows[:, begin:end, None])
    return _RowTile(slice(begin, end), slice(first_key, end), computed, distance, hidden, near, cleared, seen)


def _tile_scores(q: Tensor, k: Tensor, tile: _RowTile, options: Options) -> Tensor:
    """Returns the scores of a tile, fp32 [B, HQ, rows, keys], also where they are hidden. k is contiguous fp32."""
    batch, query_heads, _, size = q.shape
    queries = q[:, :, tile.rows].float().mul(options.scale).reshape(batch, k.shape[1], -1, size)
    scores = queries @ k[:, :, tile.keys].mT  # [B, H, HQ / H * rows, keys]
    return softcapped(scores.view(batch, query_heads, *tile.distance.shape), options)


def _tile_weights(scores: Tensor, lse: Tensor | None, tile: _RowTile, options: Options) -> tuple[Tensor, Tensor]:
    """Returns A [B, HQ, rows, keys], in the memory of the scores, and the rows' log-sum-exp [B, HQ, rows].

    With a given log-sum-exp they mean nothing where they are hidden.
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


def _entropy(weights: Tensor, scores: Tensor, row_lse: Tensor) -> Tensor:
    """Returns -sum_s A ln A of each row, [B, HQ, rows]; overwrites the scores [B, HQ, rows, keys].

    ln A is the score less the log-sum-exp [B, HQ, rows]: a logarithm takes 15 times as long as an exponential here.
    """
    log_weights = scores.sub_(row_lse[..., None]).clamp_(min=LEAST_LOG)  # a weight of 0 times -inf would be NaN
    return log_weights.mul_(weights).sum(-1).neg_()


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
    out[:] = weighted_sum(weights, values[:, :, tile.keys])
    if broken is not None:
        reached = weighted_sum(weights.ne(0).float(), broken[:, :, tile.keys]) > 0
        out.masked_fill_(reached, math.nan)


def _write_rows(result: Tensor, values: Tensor, tile: _RowTile, layout: Layout) -> None:
    """Writes values [B, HQ, rows] of a tile's rows, 0 outside R."""
    result[:, :, tile.rows] = torch.where(layout.rows[:, None, tile.rows], values, 0.0)


def _write_statistics(
    weights: Tensor, row_lse: Tensor, tile: _RowTile, layout: Layout, options: Options, results: _RowResults
) -> None:
    """Writes the statistics of a tile's rows of R, and adds the sums of its columns. Overwrites the weights."""
    # a row of NaN is NaN at hidden keys too, which lie in columns of other sequences
    weights[..., tile.cleared].view(torch.int32).bitwise_and_(tile.seen[:, None])
    _write_masses(weights, tile, layout, options, results)
    if options.need_span:
        _write_rows(results.looked_back, (weights * tile.distance.float()).sum(-1), tile, layout)
    nearness, received = _window_sums(weights[..., tile.near], tile.distance[:, tile.near], options)
    waad = options.window * row_sums(row_lse, options.sinks) - nearness
    _write_rows(results.waad, waad, tile, layout)
    _write_rows(results.lse, row_lse, tile, layout)
    results.fai_sums[:, :, tile.keys][..., tile.near] += received


def _write_masses(weights: Tensor, tile: _RowTile, layout: Layout, options: Options, results: _RowResults) -> None:
    """Writes the masses of a tile's rows that are asked for. weights: A, 0 where a near key is hidden."""
    if results.self_mass is not None:
        own = weights[..., -weights.shape[2] :]  # the last keys of a tile are its rows
        _write_rows(results.self_mass, own.diagonal(dim1=-2, dim2=-1), tile, layout)
    if results.first_mass is not None:
        lengths = torch.full_like(layout.first[:, tile.rows], options.first_keys)
        _write_rows(results.first_mass, _prefix_mass(weights, lengths, tile, layout), tile, layout)
    if results.prefix_mass is not None:
        lengths = options.prefix_lengths[layout.segments[:, tile.rows]]
        _write_rows(results.prefix_mass, _prefix_mass(weights, lengths, tile, layout), tile, layout)


def _prefix_mass(weights: Tensor, lengths: Tensor, tile: _RowTile, layout: Layout) -> Tensor:
    """Returns the weight of each row on the first tokens of its sequence, [B, HQ, rows]; lengths: int [B, rows]."""
    prefix_end = layout.first[:, tile.rows] + lengths.clamp(max=layout.rows.shape[1])  # a sum that cannot overflow
    keys = slice(0, max(0, int(prefix_end[tile.computed].max()) - tile.keys.start))  # those that any row counts
    key = torch.arange(tile.keys.start, tile.keys.stop, device=weights.device)[keys]
    counted = (key < prefix_end[..., None]) & ~tile.hidden[..., keys]
    return (weights[..., keys].view(torch.int32) & all_bits(counted)[:, None]).view(torch.float32).sum(-1)


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
    received = (weights[..., earlier].view(torch.int32) & all_bits(future)).view(torch.float32).sum(-2)
    return nearness, pad(received, (0, keys - received.shape[-1]))
