"""`attention_stats`: checks what arrives, brings it to one form and hands it to a backend."""

import torch
from torch import Tensor

from rhythm_kernels.attention.blockwise import blockwise_stats
from rhythm_kernels.attention.layout import Layout, make_layout
from rhythm_kernels.attention.options import Options, check_options
from rhythm_kernels.checks import check_choice, check_tensor
from rhythm_kernels.types import AttentionStats

BACKENDS = ("auto", "triton", "torch")


def attention_stats(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    row_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    need_span: bool = True,
    backend: str = "auto",
) -> AttentionStats:
    """WAAD, FAI, span and log-sum-exp of causal attention maps, without the maps (Eq. 7, 9, 10 of arXiv 2510.13554).

    Memory beside the results is O(T x tile) per head. Nothing is differentiated: q and k are detached.

    Args:
        q: [B, HQ, T, D] bf16, fp16 or fp32, positions and norms applied; last dimension contiguous, others free.
        k: [B, H, T, D], same dtype; query head h reads key head h // (HQ / H).
        scale: factor of the scores; D ** -0.5 if None. Models that scale otherwise must pass theirs.
        lse: [B, HQ, T] fp32, natural log, of each row's scores, a sink included, if the caller has it. Then only a band
            of each map is computed, unless the span or an open horizon asks for more.
        window: W of WAAD, in tokens, 1 to 256.
        horizon: (lo, hi) of FAI, in tokens, lo >= 0; hi None: to the end of the sequence.
        row_mask: [B, T] bool, R, holes allowed; every valid token if None.
        attention_mask: [B, T] bool or int, 1 for tokens, padded on the left or the right.
        cu_seqlens: int32 [S + 1], bounds of packed sequences; then B = 1.
        sliding_window: row t sees the keys with t - s < sliding_window.
        softcap: scores become softcap * tanh(score / softcap), before the mask.
        sinks: [HQ] floating, a logit per head that takes its share of each row and belongs to no token.
        need_span: False skips the span, which needs every key of every row of R.
        backend: "triton", "torch" (blockwise), or "auto": Triton on a GPU, else torch.

    Returns:
        AttentionStats(waad [B, HQ, T], fai [B, HQ, T], span [B, HQ] ([S, HQ] if packed; None without `need_span`),
        lse [B, HQ, T]), fp32. A span over an empty R is 0. A NaN in a sequence stays in that sequence.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, rank, size, device or value, before anything runs.
    """
    options = check_options(
        q,
        k,
        scale=scale,
        window=window,
        horizon=horizon,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        need_span=need_span,
    )
    batch, query_heads, tokens, _ = q.shape
    if lse is not None:
        check_tensor("lse", lse, [batch, query_heads, tokens], [torch.float32], q.device)
    layout = make_layout(batch, tokens, q.device, row_mask, attention_mask, cu_seqlens)
    return run_backend(q, k, lse, layout, options, backend)


def run_backend(
    q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options, backend: str = "auto"
) -> AttentionStats:
    """The part behind the checks, for callers that prepare the layout once for many layers."""
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        backend = "triton" if q.is_cuda else "torch"
    with torch.no_grad():
        if backend == "torch":
            return blockwise_stats(q.detach(), k.detach(), lse, layout, options)
        # imported here, since Triton decides at its import whether it interprets or compiles
        from rhythm_kernels.attention.triton_backend import triton_stats

        return triton_stats(q.detach(), k.detach(), lse, layout, options)
