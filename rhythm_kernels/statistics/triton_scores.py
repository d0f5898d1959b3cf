"""What the Triton kernels here share: who a program works for, how a tile is loaded, and a tile of scores.

Scores are base-2 logarithms: exp2 of them is what exp of the natural ones is. A position is an int32 token index, and
pointers move to a tile in int64, so that no tensor is too large.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.statistics.options import Options

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
LOWEST = tl.constexpr(-3.4028235e38)  # the least fp32: stands for -inf where a difference must not be NaN
NOWHERE = tl.constexpr(1 << 30)  # a position behind every token
UNIT_BYTES = 16  # what a thread reads at a time


@triton.jit
def load_place(tiles, heads, FIELDS: tl.constexpr):
    """(batch row, first token, the sequence's begin and end, its index, head) of this program.

    tiles: [tiles, FIELDS], which begin with those of `Layout.tiles`. The heads of one tile run side by side and share
    what they read in L2.
    """
    program = tl.program_id(0)
    tile = tiles + program // heads * FIELDS
    batch, start, begin = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    return batch, start, begin, tl.load(tile + 3), tl.load(tile + 4).to(tl.int64), (program % heads).to(tl.int64)


@triton.jit
def load_tile(
    x,
    stride_t,
    start,
    end,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Tokens start..end of x as [BLOCK, BLOCK_D], 0 elsewhere; x points to token `start`. WHOLE: all are there."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    at = x + i[:, None] * stride_t + d[None, :]
    if WHOLE:
        if SIZE == BLOCK_D:
            return tl.load(at)
        return tl.load(at, mask=(d < SIZE)[None, :], other=0.0)
    inside = (start + i < end)[:, None]
    if SIZE < BLOCK_D:
        inside = inside & (d < SIZE)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def load_parts(
    x,
    stride_t,
    start,
    end,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """`load_tile` in two parts along the head size, so that 80 is 64 + 16 and not 128; without REST_D in one."""
    if REST_D > 0:
        part = load_tile(x, stride_t, start, end, BLOCK_D, BLOCK_D, BLOCK, WHOLE)
        rest = load_tile(x + BLOCK_D, stride_t, start, end, SIZE - BLOCK_D, REST_D, BLOCK, WHOLE)
    else:
        part = load_tile(x, stride_t, start, end, SIZE, BLOCK_D, BLOCK, WHOLE)
        rest = part
    return part, rest


@triton.jit
def multiply(query, key):
    """q k^T [M, N] of query [M, D] and key [N, D]."""
    return tl.dot(query, tl.trans(key), input_precision="ieee")


@triton.jit
def multiply_parts(query, key, REST_D: tl.constexpr):
    """q k^T [M, N] of what `load_parts` gives."""
    product = multiply(query[0], key[0])
    if REST_D > 0:
        product = tl.dot(query[1], tl.trans(key[1]), product, input_precision="ieee")
    return product


@triton.jit
def scores_of(product, factor, cap, SCALE_FIRST: tl.constexpr, USE_SOFTCAP: tl.constexpr):
    """Scores of q k^T [M, N], hidden pairs included; without SCALE_FIRST scores / factor."""
    if SCALE_FIRST:
        product *= factor
    if USE_SOFTCAP:  # cap * tanh(x) = cap - 2 cap / (1 + exp(2 x)), and exp2(product) = exp(2 x)
        product = cap - 2 * cap / (1 + tl.exp2(product))
    return product


@triton.jit
def weights_of(scores, factor, minus, SCALE_FIRST: tl.constexpr):
    """exp2(score - minus) [M, N] of what `scores_of` gives: one FMA and one exp2 each."""
    if not SCALE_FIRST:
        scores *= factor
    return tl.exp2(scores - minus[:, None])


@triton.jit
def is_within(distance, limit):
    """0 <= distance < limit, int32, in one comparison: as an unsigned number, what is negative is far away."""
    return distance.to(tl.uint32, bitcast=True) < limit.to(tl.uint32, bitcast=True)


def score_arguments(q: Tensor, k: Tensor, options: Options) -> dict[str, int | float | bool | Tensor | None]:
    """The arguments of both kernels that say what a score is, and where q and k, `aligned`, lie."""
    factor, cap = options.scale * LOG2E.value, 0.0
    if options.softcap is not None:
        factor, cap = 2 * factor / options.softcap, options.softcap * LOG2E.value
    return {
        "q": q,
        "k": k,
        "sinks": None if options.sinks is None else options.sinks.contiguous(),
        **stride_arguments("q", q),
        **stride_arguments("k", k),
        "tokens": q.shape[2],
        "query_heads": q.shape[1],
        "key_heads": k.shape[1],
        "factor": factor,
        "cap": cap,
        "SIZE": q.shape[-1],
        "UNIT": unit_of(q),
        # a factor after the maximum must not change the order of the scores
        "SCALE_FIRST": options.softcap is not None or options.scale <= 0,
        "USE_SOFTCAP": options.softcap is not None,
        "USE_SINKS": options.sinks is not None,
    }


def aligned(x: Tensor) -> Tensor:
    """x [B, H, T, D], or a copy that can be read 16 bytes at a time, with zeros behind a head size that is odd there.

    The compiler reads what may begin anywhere one element at a time, with an address for each: twice the instructions
    of a row pass, and hundreds of bytes of spills in the band. A copy, one launch (two with zeros), reads and writes x
    once, and costs less than that (DESIGN.md). Slices of the joint projections of models that exist are aligned.
    """
    unit = unit_of(x)
    if x.shape[-1] % unit:
        x = pad(x, (0, -x.shape[-1] % unit))
    if x.data_ptr() % UNIT_BYTES or any(stride % unit for stride in _strides(x)):
        x = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    return x


def stride_arguments(name: str, x: Tensor | None) -> dict[str, int]:
    """The strides of x [B, H, T, D], `aligned`, in units of 16 bytes, by which the compiler knows that they are."""
    strides = (0, 0, 0) if x is None else (stride // unit_of(x) for stride in _strides(x))
    return {f"stride_{name}{axis}": stride for axis, stride in zip("bht", strides, strict=True)}


def unit_of(x: Tensor) -> int:
    """How many elements 16 bytes hold."""
    return UNIT_BYTES // x.element_size()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Those of x [B, H, T, D] but the last; 0 where only one index is there, since then it may be anything."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3]))


def size_parts(size: int) -> tuple[int, int]:
    """Powers of two that hold a head size, from 16: 80 -> (64, 16), 128 -> (128, 0), 20 -> (32, 0)."""
    whole = padded_size(size)
    rest = padded_size(size - whole // 2)
    return (whole, 0) if size <= 16 or rest * 2 >= whole else (whole // 2, rest)


def padded_size(size: int) -> int:
    """What a head of this size takes in a tile."""
    return max(triton.next_power_of_2(size), 16)
