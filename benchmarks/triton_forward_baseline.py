"""Computes causal attention in Triton without statistics, as a baseline for the fused forward of this package.

The kernel has the usual form: a program owns a tile of rows, walks over the keys with an online softmax in base 2, and
masks only the tiles on the diagonal. It computes the output and the log-sum-exp, for 16-bit or fp32 inputs and grouped
heads, without masks.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# (rows, keys, warps, stages). The tuner picks the fastest once for each head size and size class.
TILES = ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3))
CONFIGS = [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in TILES]
if triton.knobs.runtime.interpret:
    CONFIGS = CONFIGS[-1:]  # there is nothing to tune
SIZE_CLASSES = (4096, 16_384)  # most tokens of a short sequence and of a middle one


@triton.jit
def _visit(
    acc,
    total,
    peak,
    q,
    k,
    v,
    stride_kt,
    stride_vt,
    begin,
    end,
    row,
    tokens,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    size = tl.arange(0, D)
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        column = start + tl.arange(0, BLOCK_N)
        key_pointers = k + column[None, :] * stride_kt + size[:, None]
        value_pointers = v + column[:, None] * stride_vt + size[None, :]
        if MASKED:
            keys = tl.load(key_pointers, mask=column[None, :] < tokens, other=0.0)
        else:
            keys = tl.load(key_pointers)
        scores = tl.dot(q, keys, input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(row[:, None] >= column[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        if MASKED:
            values = tl.load(value_pointers, mask=column[:, None] < tokens, other=0.0)
        else:
            values = tl.load(value_pointers)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.autotune(CONFIGS, key=["D", "size_class"])
@triton.jit(do_not_specialize=["size_class"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    tokens,
    heads,
    repeats,
    scale,
    size_class,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes BLOCK_M rows of one head a program. The longest rows come first. Only the tuner reads `size_class`."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head // repeats * stride_kh
    v += batch * stride_vb + head // repeats * stride_vh
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    size = tl.arange(0, D)
    inside = row < tokens
    queries = tl.load(q + row[:, None] * stride_qt + size[None, :], mask=inside[:, None], other=0.0)

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    diagonal = tile * BLOCK_M
    acc, total, peak = _visit(
        acc, total, peak, queries, k, v, stride_kt, stride_vt, 0, diagonal, row, tokens, scale, D, BLOCK_N, False
    )
    acc, total, peak = _visit(
        acc,
        total,
        peak,
        queries,
        k,
        v,
        stride_kt,
        stride_vt,
        diagonal,
        diagonal + BLOCK_M,
        row,
        tokens,
        scale,
        D,
        BLOCK_N,
        True,
    )

    at = tl.program_id(1).to(tl.int64) * tokens + row
    tl.store(out + at[:, None] * D + size[None, :], (acc / total[:, None]).to(out.dtype.element_ty), inside[:, None])
    tl.store(lse + at, (peak + tl.log2(total)) * 0.6931471805599453, inside)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output [B, HQ, T, D] in q's dtype and the log-sum-exp [B, HQ, T] in fp32, natural logarithm.

    Args:
        q: [B, HQ, T, D]; D is a power of two from 16, the last dimension is contiguous, and a head has fewer than 2^31
            elements.
        k, v: [B, H, T, D]
    """
    batch, heads, tokens, size = q.shape
    if size < 16 or size & (size - 1):
        raise ValueError(f"the head size must be a power of two from 16, got {size}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    forward_kernel[lambda config: (triton.cdiv(tokens, config["BLOCK_M"]), batch * heads)](
        q,
        k,
        v,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        tokens,
        heads,
        heads // k.shape[1],
        size**-0.5 * math.log2(math.e),
        sum(tokens > most for most in SIZE_CLASSES),
        D=size,
    )
    return out, lse
