"""What every Triton kernel here shares: who a program works for, which keys a row sees, and a tile of scores.

Scores are base-2 logarithms: exp2 of them is what exp of the natural ones is. A position is an int32 token index, and
pointers move to a tile in int64, so that no tensor is too large.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from rhythm_kernels.attention.options import Options
from rhythm_kernels.attention.triton_tiles import Tile

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
LOWEST = tl.constexpr(-3.4028235e38)  # the least fp32: stands for -inf where a difference must not be NaN
NOWHERE = tl.constexpr(1 << 30)  # a position behind every token


@triton.jit
def program_place(batch, query_heads):
    """(tile, batch row, head) of this program; the heads of one tile run side by side and share its keys in L2."""
    program = tl.program_id(0)
    tile = program // (query_heads * batch)
    return tile, (program // query_heads % batch).to(tl.int64), (program % query_heads).to(tl.int64)


@triton.jit
def load_rows(first, rows, t, tokens, sliding_window):
    """(R, the first key that the row sees) of rows t [M]; a row outside R sees none. The last key is t."""
    active = tl.load(rows + t, mask=t < tokens, other=0) != 0
    lower = tl.maximum(tl.load(first + t, mask=active, other=0), t - sliding_window + 1)
    return active, tl.where(active, lower, NOWHERE)


@triton.jit
def load_tile(x, stride_t, start, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens start..end of x as [BLOCK, BLOCK_D], 0 elsewhere; x points to token `start`."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (start + i < end)[:, None]
    if HEAD_DIM < BLOCK_D:
        inside = inside & (d < HEAD_DIM)[None, :]
    return tl.load(x + i[:, None] * stride_t + d[None, :], mask=inside, other=0.0)


@triton.jit
def score_tile(query, key, factor, cap, USE_SOFTCAP: tl.constexpr):
    """Scores [M, N] of query [M, D] and key [N, D], hidden pairs included."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
    if USE_SOFTCAP:  # cap * tanh(x) = cap - 2 cap / (1 + exp(2 x)), and exp2(scores) = exp(2 x)
        scores = cap - 2 * cap / (1 + tl.exp2(scores))
    return scores


@triton.jit
def is_between(low, s, high):
    """[M, N]: which keys s [N] each row takes, from low [M] to high [M], both included."""
    return (low[:, None] <= s[None, :]) & (s[None, :] <= high[:, None])


def common_arguments(q: Tensor, k: Tensor, options: Options) -> tuple:
    """The arguments of every kernel from stride_qb to cap."""
    batch, query_heads, tokens, _ = q.shape
    group = query_heads // k.shape[1]
    sliding_window = tokens if options.sliding_window is None else min(options.sliding_window, tokens)
    factor, cap = options.scale * LOG2E.value, 0.0
    if options.softcap is not None:
        factor, cap = 2 * factor / options.softcap, options.softcap * LOG2E.value
    return *q.stride()[:3], *k.stride()[:3], tokens, batch, query_heads, group, sliding_window, factor, cap


def common_constants(q: Tensor, options: Options, tile: Tile) -> dict[str, int | bool]:
    """The compile-time arguments of every kernel."""
    size = q.shape[-1]
    return {
        "HEAD_DIM": size,
        "BLOCK_D": max(triton.next_power_of_2(size), 16),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "USE_SOFTCAP": options.softcap is not None,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
