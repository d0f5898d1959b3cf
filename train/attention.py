"""Attends within each sequence of a packed row, without padding and without a [T, T] mask.

Importing this file registers it with transformers under the name "packed". The decoder then takes position_ids that
restart and, like transformers' kernels for packed input, `cu_seq_lens_q` and `max_length_q`. For 16 bits on a GPU it
calls torch's variable-length FlashAttention, otherwise torch's attention once for each sequence.
Shapes: T tokens in S sequences, HQ query heads, H key heads, D channels of a head.
"""

import inspect
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sequence_bounds: tuple[int, ...] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Maps query [1, HQ, T, D], key and value [1, H, T, D], cu_seq_lens_q int32 [S + 1] to the output [1, T, HQ, D].

    Args:
        sequence_bounds: cu_seq_lens_q as numbers. Without it a GPU's are waited for, unless it computes in 16 bits.

    Raises:
        ValueError: the model needs what the kernels cannot do: a mask, dropout, soft-capping, sinks or bidirectional
            attention.
    """
    given = {"a mask": attention_mask, "soft-capping": softcap, "sinks": s_aux, "dropout": dropout or None}
    wrong = [name for name, value in given.items() if value is not None]
    if wrong or is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(
            f"--attention packed cannot do {', '.join(wrong) or 'bidirectional attention'}, which this model has: "
            "take one of transformers' own"
        )
    if cu_seq_lens_q is None or query.shape[0] != 1:
        raise ValueError(f"--attention packed needs one row with cu_seq_lens_q, got {query.shape[0]} rows")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):  # FlashAttention takes no others
        out = _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        bounds = cu_seq_lens_q.tolist() if sequence_bounds is None else sequence_bounds
        out = _one_by_one(query, key, value, bounds, scaling, sliding_window)
    return out, None


def _varlen(query, key, value, cu_seqlens, longest, scale, window) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # later torch versions need a flag for shared key heads
    shared = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    reach = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=reach, **shared)
    return out[None]


def _one_by_one(query, key, value, bounds: Sequence[int], scale, window) -> Tensor:
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    if query.is_cuda:  # torch's memory-efficient kernel, which is that of float32, shares no key heads
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    outs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        near = None
        if window is not None and q.shape[2] > window:
            place = torch.arange(q.shape[2], device=q.device)
            distance = place[:, None] - place
            near = (distance >= 0) & (distance < window)
        options = {"is_causal": near is None, "scale": scale, "enable_gqa": True}
        outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, near, **options))
    return torch.cat(outs, dim=2).transpose(1, 2)


AttentionInterface.register(NAME, packed_attention)
