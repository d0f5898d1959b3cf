"""The three calls on q and k: checks what arrives, brings it to one form and hands it to a backend."""

from types import ModuleType

import torch
from torch import Tensor

from rhythm_kernels.checks import check_choice
from rhythm_kernels.isolation import isolated
from rhythm_kernels.statistics import blockwise
from rhythm_kernels.statistics.layout import Layout, make_layout
from rhythm_kernels.statistics.options import Options, check_options, check_values
from rhythm_kernels.statistics.poison import factor_of, scaled
from rhythm_kernels.statistics.verify import probe_lse
from rhythm_kernels.tensor_checks import can_look, check_tensor
from rhythm_kernels.types import AttentionStats, GroupStats

BACKENDS = ("auto", "triton", "torch")


def attention_stats(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    response_mask: Tensor | None = None,
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
        lse: [B, HQ, T] fp32, natural log, of the scores of each row of R, a sink included, if the caller has it. Then
            only a band of each map is computed, unless the span or an open horizon asks for more. Two rows of each
            sequence are computed again to check it: on a GPU, which is not waited for, a wrong one gives NaN.
        window: W of WAAD, in tokens, 1 to 256.
        horizon: (lo, hi) of FAI, in tokens, lo >= 0; hi None: to the end of the sequence.
        response_mask: [B, T] bool, R, holes allowed; every valid token if None.
        attention_mask: [B, T] bool or int, 1 for tokens, padded on the left or the right.
        cu_seqlens: int32 [S + 1], bounds of packed sequences; then B = 1. Both may be on the CPU: those on a GPU are
            waited for.
        sliding_window: row t sees the keys with t - s < sliding_window.
        softcap: scores become softcap * tanh(score / softcap), before the mask.
        sinks: [HQ] floating, a logit per head that takes its share of each row and belongs to no token.
        need_span: False skips the span, which needs every key of every row of R.
        backend: "triton", "torch" (blockwise), or "auto": Triton on a GPU, else torch; torch also for what the kernels
            do not take (heads above 256 in 16 bits, above 128 in fp32).

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
    layout = _checked_layout(q, lse, response_mask, attention_mask, cu_seqlens)
    factor = None if lse is None else _check_lse(q, k, lse, layout, options, None, backend)
    stats = run_stats(q, k, lse, layout, options, backend)
    return stats if factor is None else scaled([stats], factor)[0]


def group_stats(
    q: Tensor,
    k: Tensor,
    local_heads: Tensor,
    global_heads: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    response_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> GroupStats:
    """WAAD summed over a layer's local heads and FAI summed over its global heads; other heads are skipped (Eq. 8-10).

    The same maps and the same options as `attention_stats`, for head groups that are known from an earlier batch.

    Args:
        local_heads: bool [HQ], or [S, HQ] where each sequence has its own groups (S = B if not packed).
        global_heads: the same.

    Returns:
        GroupStats(waad [B, T], fai [B, T]), fp32: sums, so that the layers' results add up. A NaN in a head outside
        the groups stays outside.

    Raises:
        TypeError, ValueError: as `attention_stats`.
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
        need_span=False,
    )
    layout = _checked_layout(q, lse, response_mask, attention_mask, cu_seqlens)
    for name, group in (("local_heads", local_heads), ("global_heads", global_heads)):
        each = isinstance(group, Tensor) and group.ndim == 2
        shape = [layout.sequences, q.shape[1]] if each else [q.shape[1]]
        check_tensor(name, group, shape, [torch.bool], q.device)
    heads = (local_heads | global_heads).expand(layout.sequences, -1)
    factor = None if lse is None else _check_lse(q, k, lse, layout, options, heads, backend)
    stats = run_group_stats(q, k, lse, local_heads, global_heads, layout, options, backend)
    return stats if factor is None else scaled([stats], factor)[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    response_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    need_span: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, AttentionStats]:
    """Causal attention and its statistics: the forward whose log-sum-exp the statistics read.

    The same maps and the same options as `attention_stats`. Inference only.

    Args:
        v: [B, H, T, Dv], q's dtype; last dimension contiguous. Dv may differ from D.

    Returns:
        (out [B, HQ, T, Dv] in q's dtype, contiguous, 0 in padding; AttentionStats, whose rows are those of R).

    Raises:
        TypeError, ValueError: as `attention_stats`; also if a gradient would be lost (use torch.no_grad()).
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
    check_values(v, k)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("attention has no backward, got an input that requires a gradient: call it in torch.no_grad()")
    layout = _checked_layout(q, None, response_mask, attention_mask, cu_seqlens)
    with isolated(q.device):
        return _implementation(backend, q=q, k=k, v=v).attention(q.detach(), k.detach(), v.detach(), layout, options)


def run_stats(
    q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options, backend: str = "auto"
) -> AttentionStats:
    """`attention_stats` behind its checks, for callers that prepare the layout once for many layers."""
    with isolated(q.device):
        return _implementation(backend, q=q, k=k).attention_stats(q.detach(), k.detach(), lse, layout, options)


def run_group_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    local_heads: Tensor,
    global_heads: Tensor,
    layout: Layout,
    options: Options,
    backend: str = "auto",
) -> GroupStats:
    """`group_stats` behind its checks; groups bool [HQ] or [sequences, HQ]."""
    local_heads, global_heads = (group.expand(layout.sequences, -1) for group in (local_heads, global_heads))
    with isolated(q.device):
        run = _implementation(backend, q=q, k=k).group_stats
        return run(q.detach(), k.detach(), lse, local_heads, global_heads, layout, options)


def _checked_layout(q: Tensor, lse, response_mask, attention_mask, cu_seqlens) -> Layout:
    batch, query_heads, tokens, _ = q.shape
    if lse is not None:
        check_tensor("lse", lse, [batch, query_heads, tokens], [torch.float32], q.device)
    return make_layout(batch, tokens, q.device, response_mask, attention_mask, cu_seqlens)


def _check_lse(
    q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, heads: Tensor | None, backend: str
) -> Tensor | None:
    """Raises for a log-sum-exp that is not that of the rows' scores, in base 2, say, or of scaled ones.

    Where a GPU would have to be waited for, returns the factor of the statistics: 1, or NaN if it is one.
    """
    with isolated(q.device):
        deviation = probe_lse(q.detach(), k.detach(), lse.detach(), layout, options, heads, backend)
    if deviation is None:
        return None
    if not can_look(deviation.excess):
        return factor_of(deviation.excess)
    if deviation.excess.item() > 1:
        row, token, head = deviation.place.tolist()
        got, exact, _ = deviation.values.tolist()
        raise ValueError(
            "lse must be the natural log-sum-exp of each row's scores, a sink included, got "
            f"{got:.6g} for token {token} of row {row}, head {head}, whose scores have {exact:.6g}"
        )
    return None


def _implementation(backend: str, **inputs: Tensor) -> ModuleType:
    """The module whose `attention_stats`, `group_stats` and `attention` run behind these checks."""
    check_choice("backend", backend, BACKENDS)
    if backend == "torch" or (backend == "auto" and not inputs["q"].is_cuda):
        return blockwise
    # imported here, since Triton decides at its import whether it interprets or compiles
    from rhythm_kernels.statistics import triton_backend

    return blockwise if backend == "auto" and triton_backend.unsupported(**inputs) else triton_backend
