"""The masses of the Triton backend: how much of a row lies on the first tokens of its sequence, or on itself.

Given the log-sum-exp, a program reads only the keys that count. It owns one tile of rows of one query head; with a head
group, the programs of other heads end at once.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, SIZE (D) the head size of q and k; S sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.more import masses_of
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.triton_band import STRIDES
from rhythm_kernels.statistics.triton_scores import (
    LOG2E,
    NOWHERE,
    is_within,
    load_parts,
    load_place,
    multiply_parts,
    score_arguments,
    scores_of,
    size_parts,
    weights_of,
)
from rhythm_kernels.statistics.triton_spans import PLACE_FIELDS
from rhythm_kernels.statistics.triton_tiles import Tile


@triton.jit(
    do_not_specialize=[*STRIDES, "stride_gs", "stride_gh", "tokens", "query_heads", "key_heads", "sliding_window"]
)
def mass_kernel(
    q,  # [B, HQ, T, SIZE]
    k,  # [B, H, T, SIZE]
    tiles,  # [tiles, PLACE_FIELDS], of `Layout.tiles`
    rows,  # [B, T]
    lse,  # [B, HQ, T]; outside R it may hold anything
    key_ends,  # [S], one past the last key that counts; not read with ITSELF
    group,  # [S, HQ]; None for all heads
    mass,  # [B, HQ, T]; GROUPED: written only for heads of the group, in tiles of sequences
    stride_qb,  # the strides of q and k are in UNITs
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_gs,
    stride_gh,
    tokens,
    query_heads,
    key_heads,
    sliding_window,
    factor,
    cap,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    GROUPED: tl.constexpr,
    ITSELF: tl.constexpr,
):
    """Computes the weight of one tile of rows of one query head on the first keys of the sequence, or on itself."""
    batch, row, first, last, sequence, head = load_place(tiles, query_heads, PLACE_FIELDS)
    if GROUPED:
        is_in_group = tl.load(group + sequence * stride_gs + head * stride_gh, mask=sequence >= 0, other=0) != 0
        if not is_in_group:
            return
    stride_qt, stride_kt = stride_qt * UNIT, stride_kt * UNIT
    t = row + tl.arange(0, BLOCK_M)
    active = tl.load(rows + batch * tokens + t, mask=t < last, other=0) != 0
    row_end = tl.max(tl.where(active, t + 1, 0))
    if ITSELF:
        begin, end = row, row_end
    else:
        begin, end = first, tl.minimum(tl.load(key_ends + sequence, mask=sequence >= 0, other=0), row_end)
        if USE_WINDOW:
            begin = tl.maximum(begin, tl.min(tl.where(active, t - sliding_window + 1, NOWHERE)))
    q += (batch * stride_qb + head * stride_qh) * UNIT + row.to(tl.int64) * stride_qt
    k += (batch * stride_kb + head // (query_heads // key_heads) * stride_kh) * UNIT + begin.to(tl.int64) * stride_kt
    at = (batch * query_heads + head) * tokens + t
    query = load_parts(q, stride_qt, row, row_end, SIZE, BLOCK_D, REST_D, BLOCK_M)
    log_sum = tl.load(lse + at, mask=active, other=0.0) * LOG2E
    total = tl.zeros([BLOCK_M], tl.float32)
    j = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        key = load_parts(k, stride_kt, start, end, SIZE, BLOCK_D, REST_D, BLOCK_N)
        scores = scores_of(multiply_parts(query, key, REST_D), factor, cap, SCALE_FIRST, USE_SOFTCAP)
        weights = weights_of(scores, factor, log_sum[:, None], SCALE_FIRST)
        past = t[:, None] - tl.where(start + j < end, start + j, NOWHERE)[None, :]  # tokens
        if ITSELF:
            visible = past == 0
        else:
            visible = is_within(past, sliding_window) if USE_WINDOW else past >= 0
        total += tl.sum(tl.where(visible, weights, 0.0), 1)
        k += BLOCK_N * stride_kt
    tl.store(mass + at, tl.where(active, total, 0.0), mask=t < last)


def masses(
    q: Tensor, k: Tensor, lse: Tensor, group: Tensor | None, layout: Layout, options: Options, tile: Tile
) -> dict[str, Tensor]:
    """Returns the masses that are asked for by their names, each fp32 [B, HQ, T], 0 outside R.

    Args:
        q, k: [B, HQ, T, D] and [B, H, T, D], `aligned`.
        lse: [B, HQ, T] fp32; outside R it may hold anything.
        group: bool [S, HQ], the heads that are computed, or None; the values of others mean nothing.
    """
    return {name: _mass(q, k, lse, group, layout, options, tile, name) for name in masses_of(options)}


def _mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    group: Tensor | None,
    layout: Layout,
    options: Options,
    tile: Tile,
    name: str,
) -> Tensor:
    batch, heads, tokens, size = q.shape
    mass = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    tiles = layout.tiles(tile.block_m, "past", padding=True)
    block_d, rest_d = size_parts(size)
    arguments = score_arguments(q, k, options)
    del arguments["sinks"], arguments["USE_SINKS"]  # the log-sum-exp has them
    mass_kernel[(len(tiles) * heads,)](
        tiles=tiles,
        rows=layout.rows,
        lse=lse,
        key_ends=None if name == "self_mass" else _key_ends(name, layout, options),
        group=group,
        mass=mass,
        **arguments,
        stride_gs=0 if group is None else group.stride(0),
        stride_gh=0 if group is None else group.stride(1),
        sliding_window=options.sliding_window or tokens,
        BLOCK_D=block_d,
        REST_D=rest_d,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        USE_WINDOW=options.sliding_window is not None,
        GROUPED=group is not None,
        ITSELF=name == "self_mass",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return mass


def _key_ends(name: str, layout: Layout, options: Options) -> Tensor:
    """Returns one past the last key that counts in each sequence, int32 [S]."""
    begin, end = layout.table[:, 1], layout.table[:, 2]

    def ends(lengths: Tensor | int) -> Tensor:
        return (begin + (end - begin).clamp(max=lengths)).int()

    if name == "first_mass":
        return layout.keep(("first keys", options.first_keys), lambda: ends(options.first_keys))
    return ends(options.prefix_lengths)
