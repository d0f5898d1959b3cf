"""The functions that the Triton kernels share: the place of a program, the load of a tile, and a tile of scores.

Scores are base-2 logarithms, so that exp2 of them gives what exp of the natural ones does. A position is an int32 token
index. Pointers move to a tile in int64, so that a tensor may be of any size.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size; in a tile M rows, N keys.
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
LOWEST = tl.constexpr(-3.4028235e38)  # the lowest fp32, in place of -inf where a difference must not be NaN
NO_WEIGHT = tl.constexpr(152.0)  # exp2 of minus this is 0 in fp32
NOWHERE = tl.constexpr(1 << 30)  # a position behind all tokens
UNIT_BYTES = 16  # a thread reads so many at a time


@triton.jit
def load_place(tiles, heads, FIELDS: tl.constexpr):
    """Returns this program's batch row, first token, its sequence's begin, end and index, and its head.

    tiles: [tiles, FIELDS]; the first five fields are those of `Layout.tiles`. The heads of a tile run side by side and
    share in L2 what they read.
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
    """Returns the tokens start..end of x as [BLOCK, BLOCK_D], 0 elsewhere. x points to token `start`.

    WHOLE: all BLOCK tokens lie before `end`.
    """
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
    """Returns a tile, loaded by `load_tile`, in two parts along the head size: 80 takes 64 + 16 elements, not 128.

    Without REST_D both parts are the whole tile.
    """
    if REST_D > 0:
        part = load_tile(x, stride_t, start, end, BLOCK_D, BLOCK_D, BLOCK, WHOLE)
        rest = load_tile(x + BLOCK_D, stride_t, start, end, SIZE - BLOCK_D, REST_D, BLOCK, WHOLE)
    else:
        part = load_tile(x, stride_t, start, end, SIZE, BLOCK_D, BLOCK, WHOLE)
        rest = part
    return part, rest


@triton.jit
def multiply(query, key):
    """Returns q k^T, fp32 [M, N], of query [M, D] and key [N, D]."""
    return tl.dot(query, tl.trans(key), input_precision="ieee")


@triton.jit
def multiply_parts(query, key, REST_D: tl.constexpr):
    """Returns q k^T, fp32 [M, N], of the parts that `load_parts` returns."""
    product = multiply(query[0], key[0])
    if REST_D > 0:
        product = tl.dot(query[1], tl.trans(key[1]), product, input_precision="ieee")
    return product


@triton.jit
def scores_of(product, factor, cap, SCALE_FIRST: tl.constexpr, USE_SOFTCAP: tl.constexpr):
    """Returns the scores of a product q k^T [M, N], hidden ones too; without SCALE_FIRST they are not scaled yet."""
    if SCALE_FIRST:
        product *= factor
    if USE_SOFTCAP:  # cap * tanh(x) = cap - 2 cap / (1 + exp(2 x)), and exp2(product) = exp(2 x)
        product = cap - 2 * cap / (1 + tl.exp2(product))
    return product


@triton.jit
def weights_of(scores, factor, minus, SCALE_FIRST: tl.constexpr):
    """Returns exp2(score - minus) of the result of `scores_of`, by one FMA and exp2 each. minus: like it or [M, 1]."""
    if not SCALE_FIRST:
        scores *= factor
    return tl.exp2(scores - minus)


@triton.jit
def rounded_product(x, y):
    """Returns x y, rounded before it is added to anything.

    For sums over the threads of a warp, where each adds the product of another thread to its own. If the compiler made
    an FMA of that, each thread would round the other's product only, and they would get sums of different bits.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def is_within(distance, limit):
    """Returns 0 <= distance < limit of int32 numbers by one comparison: as unsigned, a negative distance is large."""
    return distance.to(tl.uint32, bitcast=True) < limit.to(tl.uint32, bitcast=True)


def score_arguments(q: Tensor, k: Tensor, options: Options) -> dict[str, int | float | bool | Tensor | None]:
    """Returns the arguments that `forward_kernel` and `band_kernel` share, which say how a score is formed.

    q [B, HQ, T, D] and k [B, H, T, D] are `aligned`.
    """
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
        # a factor that is applied after the maximum must not change the order of the scores
        "SCALE_FIRST": options.softcap is not None or options.scale <= 0,
        "USE_SOFTCAP": options.softcap is not None,
        "USE_SINKS": options.sinks is not None,
    }


def aligned(x: Tensor) -> Tensor:
    """Returns x [B, H, T, D], or a copy of it that can be read 16 bytes at a time.

    In a copy, zeros fill a head size up to whole units of 16 bytes. Without that alignment the compiler reads one
    element at a time, with an address for each. That doubles the instructions of a row pass, and the band spills
    hundreds of bytes. The copy costs less (DESIGN.md): one launch, or two with zeros. Slices of the joint projections
    of existing models are aligned.
    """
    unit = unit_of(x)
    if x.shape[-1] % unit:
        x = pad(x, (0, -x.shape[-1] % unit))
    if x.data_ptr() % UNIT_BYTES or any(stride % unit for stride in _strides(x)):
        x = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    return x


def stride_arguments(name: str, x: Tensor | None) -> dict[str, int]:
    """Returns the strides of x [B, H, T, D], `aligned`, in units of 16 bytes, so that the compiler knows it is."""
    strides = (0, 0, 0) if x is None else (stride // unit_of(x) for stride in _strides(x))
    return {f"stride_{name}{axis}": stride for axis, stride in zip("bht", strides, strict=True)}


def unit_of(x: Tensor) -> int:
    """Returns how many elements 16 bytes hold."""
    return UNIT_BYTES // x.element_size()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Returns the first three strides of x [B, H, T, D]; 0 for an axis of one index, whose stride may be anything."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3]))


def size_parts(size: int) -> tuple[int, int]:
    """Returns two powers of two from 16 that hold a head size: 80 -> (64, 16), 128 -> (128, 0), 20 -> (32, 0)."""
    whole = padded_size(size)
    rest = padded_size(size - whole // 2)
    return (whole, 0) if size <= 16 or rest * 2 >= whole else (whole // 2, rest)


def padded_size(size: int) -> int:
    """Returns the elements that a head of this size takes in a tile: a power of two from 16."""
    return max(triton.next_power_of_2(size), 16)
