"""FlashAttention's two functions on a CPU, with its conventions, for transformers' own code around them."""

from contextlib import contextmanager
from unittest.mock import patch

import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor

from rhythm_kernels import reference


def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens, scale, causal, window_size, softcap, sinks) -> Tensor:
    """[B, T, HQ, D] -> [B, T, HQ, Dv], or of one row of tokens [T, HQ, D] -> [T, HQ, Dv]."""
    assert causal
    unpadded = q.ndim == 3
    q, k, v = ((x[None] if unpadded else x).transpose(1, 2) for x in (q, k, v))
    bounds = cu_seqlens.long() if unpadded else None
    segments = reference.segment_ids(len(q), q.shape[2], cu_seqlens=bounds)
    window = None if window_size[0] < 0 else window_size[0] + 1
    options = {"scale": scale, "sliding_window": window, "softcap": softcap or None, "sinks": sinks}
    weights, _ = reference.attention_map(q, k, segments, **options)
    out = reference.attention_out(weights, v).to(q.dtype).transpose(1, 2)
    return out[0] if unpadded else out


def dense(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, s_aux=None):
    return attend(q, k, v, None, softmax_scale, causal, window_size, softcap, s_aux)


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, s_aux=None,
):  # fmt: skip
    # transformers 5.17 leaves out lengths that it was not given
    return attend(q, k, v, cu_seqlens_q, softmax_scale, causal, window_size, softcap, s_aux)


@contextmanager
def flash_attention():
    """transformers' flash_attention_2 calls the stand-ins inside; set `config._attn_implementation` by hand."""
    functions = dense, varlen, None, flash_utils._pad_input, flash_utils._unpad_input
    with (
        patch.object(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions),
        patch.object(flash_utils, "_loaded_implementation", None),
    ):
        yield
