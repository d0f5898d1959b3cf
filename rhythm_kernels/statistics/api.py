"""The three public calls on q and k: they check the arguments, bring them to one form and run a backend.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v; S sequences, B
where the batch is not packed. R is the set of rows (query positions) that the statistics are computed for.
"""

from collections.abc import Collection
from types import ModuleType

import torch
from torch import Tensor

from rhythm_kernels.checks import check_choice
from rhythm_kernels.isolation import isolated
from rhythm_kernels.statistics import blockwise
from rhythm_kernels.statistics.backends import BACKENDS, kernels_for
from rhythm_kernels.statistics.layout import Layout, make_layout
from rhythm_kernels.statistics.more import check_more, with_more
from rhythm_kernels.statistics.options import Options, check_options, check_values
from rhythm_kernels.statistics.poison import Stats, factor_of, scaled
from rhythm_kernels.statistics.verify import probe_lse
from rhythm_kernels.tensor_checks import can_look, check_tensor
from rhythm_kernels.types import AttentionStats, GroupStats


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
    span_rows: int | None = None,
    more: Collection[str] = (),
    first_keys: int = 4,
    prefix_lengths: Tensor | None = None,
    backend: str = "auto",
) -> AttentionStats:
    """Returns WAAD, FAI, span and log-sum-exp of causal attention maps without computing whole maps.

    Windowed average attention distance (WAAD) is Eq. 9 of arXiv 2510.13554, future attention influence (FAI) Eq. 10,
    and the span Eq. 7. Memory beside the results is O(T x tile) for each head. Gradients do not flow: q and k are
    detached.

    Args:
        q: [B, HQ, T, D] bf16, fp16 or fp32, after norms and rotary positions. The last dimension is contiguous; other
            strides are free.
        k: [B, H, T, D] in q's dtype. Query head h reads key head h // (HQ / H).
        scale: factor of the scores; None for D ** -0.5. A model with another scale must pass it.
        lse: [B, HQ, T] fp32, natural log: the log-sum-exp of the scores of each row of R, a sink included. With it only
            a band of each map is computed, unless the span or an open horizon needs more. It is checked at two rows of
            each sequence. A wrong one raises on a CPU and turns the results into NaN on a GPU, which is not waited for.
        window: W of WAAD, in tokens, 1 to 256.
        horizon: (lo, hi) of FAI, in tokens, lo >= 0. hi = None reaches to the end of the sequence.
        response_mask: [B, T] bool, the rows R; holes are allowed. None for all tokens that are not padding.
        attention_mask: [B, T] bool or int, 1 for tokens and 0 for padding, which is on the left or on the right.
        cu_seqlens: [S + 1] int32 or int64, bounds of packed sequences; then B = 1. This and attention_mask may be on
            the CPU. On a GPU they are waited for.
        sliding_window: row t sees the keys s with t - s < sliding_window, in tokens; None for all earlier keys.
        softcap: scores become softcap * tanh(score / softcap) before the mask; None for no cap.
        sinks: [HQ] floating, a logit for each head that takes a share of every row and belongs to no token.
        need_span: False skips the span, which needs every key of every row of R.
        span_rows: reads the span of each head from so many rows of R at most in each sequence, a multiple of 64; None
            for all rows of R. They are whole blocks of 64 tokens, spread evenly over R, the same for all heads, so a
            sequence of up to `span_rows` tokens has all of them (DESIGN.md has the rule). With `lse` and a finite
            horizon no other row is read for the span.
        more: names of further statistics, which are computed only where they are named. Rows, 0 outside R:
            "row_entropy", -sum_s A[t,s] ln A[t,s] in nats; "largest_score", the largest score of a visible key, after
            scale and soft cap; "first_mass", the weight on the first `first_keys` tokens of the row's sequence, where
            attention sinks are; "prefix_mass", the weight on the first `prefix_lengths` tokens of its sequence, such as
            the prompt; "self_mass", A[t,t]. Columns: "column_sum", the sum over the rows that FAI is the mean of, so
            `response_mask` and `horizon` choose the rows ((0, None) for all later ones and the token itself). A sink
            counts as no key; its rows sum to less than 1. The first two read every key of every row of R.
        first_keys: how many tokens "first_mass" counts, at least 1; padding does not count.
        prefix_lengths: [S] int32 or int64, how many tokens "prefix_mass" counts in each sequence, at least 0; needed
            with "prefix_mass", and only then. It may be on the CPU.
        backend: "triton", "torch" (blockwise) or "auto". "auto" is Triton on a GPU and torch elsewhere, and also torch
            for head sizes that the kernels do not take (above 256 in 16 bits, above 128 in fp32).

    Returns:
        AttentionStats of waad [B, HQ, T] in tokens, fai [B, HQ, T], span [S, HQ] in tokens (None without `need_span`)
        and lse [B, HQ, T], all fp32, and `more`, a dict of fp32 [B, HQ, T] by name. A span over an empty R is 0. A NaN
        in a sequence stays in that sequence.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, rank, size, device or value, before anything runs.
    """
    options = check_options(q, k, scale, window, horizon, sliding_window, softcap, sinks, need_span, span_rows)
    more = check_more(more, first_keys, prefix_lengths)
    layout = _check_layout(q, lse, response_mask, attention_mask, cu_seqlens)
    options = with_more(options, more, first_keys, prefix_lengths, layout)
    lse_factor = _check_lse(q, k, lse, layout, options, backend)
    return _marked(run_stats(q, k, lse, layout, options, backend), lse_factor)


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
    more: Collection[str] = (),
    first_keys: int = 4,
    prefix_lengths: Tensor | None = None,
    backend: str = "auto",
) -> GroupStats:
    """Returns WAAD summed over a layer's local heads and FAI summed over its global heads (Eq. 8-10).

    Heads in neither group are not computed, except their log-sum-exp on a GPU where `lse` is not given. The groups come
    from an earlier batch. All other arguments are those of `attention_stats`. Of `more`, "row_entropy" and
    "largest_score" are refused, since they are not linear in the map.

    Args:
        local_heads: bool [HQ], or [S, HQ] where each sequence has its own group.
        global_heads: bool [HQ] or [S, HQ], the same.

    Returns:
        GroupStats of waad [B, T] in tokens and fai [B, T], fp32, and `more`, a dict of fp32 [B, T] by name: masses
        summed over the local heads, as WAAD is, and column sums over the global heads, as FAI is. They are sums, so
        that those of several layers can be added. A NaN in a head outside the groups changes nothing.

    Raises:
        TypeError, ValueError: as `attention_stats`.
    """
    options = check_options(q, k, scale, window, horizon, sliding_window, softcap, sinks, need_span=False)
    more = check_more(more, first_keys, prefix_lengths, grouped=True)
    layout = _check_layout(q, lse, response_mask, attention_mask, cu_seqlens)
    options = with_more(options, more, first_keys, prefix_lengths, layout)
    for name, group in (("local_heads", local_heads), ("global_heads", global_heads)):
        by_sequence = isinstance(group, Tensor) and group.ndim == 2
        shape = [layout.sequences, q.shape[1]] if by_sequence else [q.shape[1]]
        check_tensor(name, group, shape, [torch.bool], q.device)
    heads = (local_heads | global_heads).expand(layout.sequences, -1)
    lse_factor = _check_lse(q, k, lse, layout, options, backend, heads)
    return _marked(run_group_stats(q, k, lse, local_heads, global_heads, layout, options, backend), lse_factor)


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
    span_rows: int | None = None,
    more: Collection[str] = (),
    first_keys: int = 4,
    prefix_lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, AttentionStats]:
    """Returns the output of causal attention and the statistics of its map, from one forward.

    It has no backward. All other arguments are those of `attention_stats`.

    Args:
        v: [B, H, T, Dv] in q's dtype, contiguous in its last dimension. Dv may differ from D.

    Returns:
        (out [B, HQ, T, Dv] in q's dtype, contiguous, 0 in padding; AttentionStats of the rows of R).

    Raises:
        TypeError, ValueError: as `attention_stats`, and if a gradient would be lost (use torch.no_grad()).
    """
    options = check_options(q, k, scale, window, horizon, sliding_window, softcap, sinks, need_span, span_rows)
    more = check_more(more, first_keys, prefix_lengths)
    check_values(v, k)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("attention has no backward, got an input that requires a gradient: call it in torch.no_grad()")
    layout = _check_layout(q, None, response_mask, attention_mask, cu_seqlens)
    options = with_more(options, more, first_keys, prefix_lengths, layout)
    return run_attention(q, k, v, layout, options, backend)


def run_stats(
    q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options, backend: str = "auto"
) -> AttentionStats:
    """Does the work of `attention_stats` on checked arguments; several layers can share one layout."""
    with isolated(q.device):
        return _backend_module(backend, q=q, k=k).attention_stats(q.detach(), k.detach(), lse, layout, options)


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
    """Does the work of `group_stats` on checked arguments; the groups are bool [HQ] or [S, HQ]."""
    local_heads, global_heads = (group.expand(layout.sequences, -1) for group in (local_heads, global_heads))
    with isolated(q.device):
        run = _backend_module(backend, q=q, k=k).group_stats
        return run(q.detach(), k.detach(), lse, local_heads, global_heads, layout, options)


def run_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, options: Options, backend: str = "auto"
) -> tuple[Tensor, AttentionStats]:
    """Does the work of `attention` on checked arguments."""
    with isolated(q.device):
        return _backend_module(backend, q=q, k=k, v=v).attention(q.detach(), k.detach(), v.detach(), layout, options)


def _check_layout(q: Tensor, lse: object, response_mask: object, attention_mask: object, cu_seqlens: object) -> Layout:
    """Returns the layout of the masks; checks them, and the shape and dtype of lse."""
    batch, query_heads, tokens, _ = q.shape
    if lse is not None:
        check_tensor("lse", lse, [batch, query_heads, tokens], [torch.float32], q.device)
    return make_layout(batch, tokens, q.device, response_mask, attention_mask, cu_seqlens)


def _check_lse(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    layout: Layout,
    options: Options,
    backend: str,
    heads: Tensor | None = None,
) -> Tensor | None:
    """Raises for a given log-sum-exp of other scores, for example of scores in base 2 or without their scale.

    Args:
        heads: bool [S, HQ], the query heads that are checked; None for all.

    Returns:
        None where the host has looked. On a GPU, which is not waited for, the factor of `_marked`.
    """
    if lse is None:
        return None
    with isolated(q.device):
        deviation = probe_lse(q.detach(), k.detach(), lse.detach(), layout, options, heads, backend)
    if deviation is None:
        return None
    if not can_look(deviation.excess):
        return factor_of(deviation.excess)
    if deviation.excess.item() > 1:
        row, token, head = deviation.place.tolist()
        given, exact, _ = deviation.values.tolist()
        raise ValueError(
            "lse must be the natural log-sum-exp of each row's scores, a sink included, got "
            f"{given:.6g} for token {token} of row {row}, head {head}, whose scores have {exact:.6g}"
        )
    return None


def _marked(stats: Stats, lse_factor: Tensor | None) -> Stats:
    """Returns the statistics times a factor of 1 or NaN, or as they are without one."""
    return stats if lse_factor is None else scaled([stats], lse_factor)[0]


def _backend_module(backend: str, **inputs: Tensor) -> ModuleType:
    """Returns the module whose `attention_stats`, `group_stats` and `attention` run on q, k and v."""
    return kernels_for(check_choice("backend", backend, BACKENDS), **inputs) or blockwise
