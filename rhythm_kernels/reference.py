"""Defines every quantity with dense maps: one function for each row of the table in DESIGN.md, "Definitions".

All other code of this package is tested against this file. It is slow, and no fast code imports it. Equation numbers
are those of Li et al., arXiv 2510.13554.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v, L layers, S
sequences (S = B in a batch that is not packed).

- A, the attention map: [B, HQ, T, T], with a row t for each query and a column s for each key.
- R, the response positions: `rows` or `response_mask`, [B, T] bool.
- `segments`: [B, T] int64, the sequence of each token, -1 for padding.
- WAAD is windowed average attention distance, FAI future attention influence.
"""

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from rhythm_kernels.types import AttentionStats, GroupStats, HeadGroups

Horizon = tuple[int, int | None]
"""(lo, hi) in tokens; hi is None for the end of the sequence."""


# ---- attention maps and their statistics -----------------------------------------------------------------------------


def segment_ids(
    batch: int, tokens: int, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Returns `segments` [B, T] of a batch with attention_mask [B, T] or with packed bounds cu_seqlens [S + 1]."""
    if cu_seqlens is not None:
        ids = torch.full((1, tokens), -1)
        for s in range(len(cu_seqlens) - 1):
            ids[0, cu_seqlens[s] : cu_seqlens[s + 1]] = s
        return ids
    ids = torch.arange(batch)[:, None].expand(batch, tokens)
    return ids if attention_mask is None else ids.masked_fill(~attention_mask.bool().to(ids.device), -1)


def attention_scores(
    q: Tensor,
    k: Tensor,
    segments: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Returns the scores of the visible keys, -inf where a key is hidden: [B, HQ, T, T] in `dtype`.

    Args:
        q: [B, HQ, T, D].
        k: [B, H, T, D].
        segments: [B, T].
        scale: factor of the scores; None for D ** -0.5.
        sliding_window: row t sees the keys s with t - s < sliding_window.
        softcap: scores become softcap * tanh(score / softcap) before the mask.
    """
    tokens, groups = q.shape[2], q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.to(dtype) @ k.to(dtype).repeat_interleave(groups, 1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = distances(tokens)
    visible = (distance >= 0) & (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    if sliding_window is not None:
        visible &= distance < sliding_window
    return torch.where(visible[:, None], scores, -math.inf)


def attention_map(
    q: Tensor,
    k: Tensor,
    segments: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Returns A and the rows' log-sum-exp [B, HQ, T], natural log, in `dtype`. Rows of padding are 0 in A.

    Args:
        q, k, segments, scale, sliding_window, softcap: those of `attention_scores`.
        sinks: [HQ], a logit for each head that takes a share of every row and belongs to no token.
    """
    options = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    scores = attention_scores(q, k, segments, **options, dtype=dtype)
    tokens, visible = q.shape[2], scores != -math.inf
    if sinks is not None:  # one more column, which belongs to no token
        sink = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None])[..., :tokens]
    return torch.where(visible, weights, 0.0), lse


def attention_out(attention: Tensor, v: Tensor) -> Tensor:
    """Returns sum_s A[t, s] v[s] for v [B, H, T, Dv]: [B, HQ, T, Dv] in A's dtype, 0 in padding.

    A key with a weight of 0 does not count, even if its value is NaN. So a NaN in padding does not spread.
    """
    v = v.to(attention.dtype).repeat_interleave(attention.shape[1] // v.shape[1], 1)
    finite = v.isfinite()
    out = attention @ torch.where(finite, v, 0.0)
    broken_keys = attention.ne(0).to(attention.dtype) @ (~finite).to(attention.dtype)
    return out.masked_fill(broken_keys > 0, math.nan)


def distances(tokens: int) -> Tensor:
    """Returns t - s for each row t and column s, int64 [T, T], in tokens."""
    position = torch.arange(tokens)
    return position[:, None] - position[None, :]


def span_sample(rows: Tensor, segments: Tensor, sequences: int, span_rows: int | None) -> Tensor:
    """Returns the rows of R that spans are read from, the same for all heads: bool [B, T].

    A sequence is cut into blocks of 64 tokens, beginning with its own first one. Those that hold a row of R are its A
    active blocks. With K = span_rows / 64, all of them are read where A <= K. Otherwise these K of them are read, in
    order and counted from 0: (2 i + 1) A // (2 K) for i = 0..K-1, the middle of each of K equal parts.

    Args:
        rows: [B, T] bool, R.
        segments: [B, T].
        sequences: S.
        span_rows: a multiple of 64; None for all rows of R.
    """
    sample = rows.clone()
    if span_rows is None:
        return sample
    most = span_rows // 64
    for sequence in range(sequences):
        row, token = (segments == sequence).nonzero().unbind(-1)
        if not len(token):
            continue
        block = (token - token[0]) // 64
        active = sorted(set(block[rows[row, token]].tolist()))
        if len(active) > most:
            read = [active[(2 * i + 1) * len(active) // (2 * most)] for i in range(most)]
            sample[row, token] &= torch.isin(block, torch.tensor(read, device=block.device))
    return sample


def span(attention: Tensor, rows: Tensor, segments: Tensor, sequences: int, span_rows: int | None = None) -> Tensor:
    """Returns the mean over t in R of sum_s A[t, s] (t - s), for each sequence: [S, HQ], in tokens (Eq. 7).

    It is 0 where R is empty. With `span_rows` it is the mean over the rows of `span_sample`.
    """
    looked_back = (attention * distances(attention.shape[-1])).sum(-1)
    out = attention.new_zeros(sequences, attention.shape[1])
    sample = span_sample(rows, segments, sequences, span_rows)
    for sequence in range(sequences):
        own_rows = sample & (segments == sequence)
        if own_rows.any():
            out[sequence] = looked_back.transpose(1, 2)[own_rows].mean(0)
    return out


def waad(attention: Tensor, rows: Tensor, window: int = 10) -> Tensor:
    """Returns sum_s A[t, s] min(t - s, W) for t in R, else 0: [B, HQ, T], in tokens (Eq. 9). `window` is W."""
    clipped = distances(attention.shape[-1]).clamp(max=window)
    return torch.where(rows[:, None], (attention * clipped).sum(-1), 0.0)


def fai(attention: Tensor, rows: Tensor, segments: Tensor, horizon: Horizon = (10, 50)) -> Tensor:
    """Returns the mean of A[t, s] over T(s) = {t in R : s + lo <= t <= min(N, s + hi)}: [B, HQ, T] (Eq. 10).

    It is 0 where T(s) is empty. N is the last position of the sequence of s.
    """
    count = looking_back(rows, segments, horizon).sum(-2)
    return column_sum(attention, rows, segments, horizon) / count.clamp(min=1)[:, None]


def looking_back(rows: Tensor, segments: Tensor, horizon: Horizon) -> Tensor:
    """Returns whether row t is in T(s) of Eq. 10, for each row t and column s: bool [B, T, T]."""
    distance = distances(rows.shape[-1])
    lo, hi = horizon
    future = (distance >= lo) if hi is None else (distance >= lo) & (distance <= hi)
    return future & rows[:, :, None] & (segments[:, :, None] == segments[:, None, :])


# Statistics that are computed where their names are asked for: `more` of `attention_stats`.


def column_sum(attention: Tensor, rows: Tensor, segments: Tensor, horizon: Horizon = (10, 50)) -> Tensor:
    """Returns the sum of A[t, s] over T(s): [B, HQ, T]. It is FAI before its division."""
    return torch.where(looking_back(rows, segments, horizon)[:, None], attention, 0.0).sum(-2)


def row_entropy(attention: Tensor, rows: Tensor) -> Tensor:
    """Returns -sum_s A[t, s] ln A[t, s] for t in R, else 0: [B, HQ, T], in nats. A sink is no key of the sum."""
    return torch.where(rows[:, None], torch.special.entr(attention).sum(-1), 0.0)


def largest_score(scores: Tensor, rows: Tensor) -> Tensor:
    """Returns max_s of the visible scores, scaled and soft-capped, for t in R, else 0: [B, HQ, T]. No sink counts."""
    largest = scores.amax(-1) if scores.numel() else scores.new_zeros(scores.shape[:3])
    return torch.where(rows[:, None], largest, 0.0)


def prefix_mass(attention: Tensor, rows: Tensor, segments: Tensor, lengths: Tensor) -> Tensor:
    """Returns the sum of A[t, s] over the first tokens s of the row's sequence for t in R, else 0: [B, HQ, T].

    Args:
        lengths: int [S], how many tokens count in each sequence. In a longer prefix than the sequence all count.
    """
    counted = torch.zeros_like(rows)
    for sequence, length in enumerate(lengths.tolist()):
        row, token = (segments == sequence).nonzero().unbind(-1)
        counted[row[:length], token[:length]] = True
    mass = torch.where(counted[:, None, None], attention, 0.0).sum(-1)
    return torch.where(rows[:, None], mass, 0.0)


def self_mass(attention: Tensor, rows: Tensor) -> Tensor:
    """Returns A[t, t] for t in R, else 0: [B, HQ, T]."""
    return torch.where(rows[:, None], attention.diagonal(dim1=-2, dim2=-1), 0.0)


def attention_stats(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    window: int = 10,
    horizon: Horizon = (10, 50),
    response_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    span_rows: int | None = None,
    more: Collection[str] = (),
    first_keys: int = 4,
    prefix_lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> AttentionStats:
    """Returns what `rhythm_kernels.attention_stats` must return for the same arguments, in `dtype`."""
    batch, _, tokens, _ = q.shape
    segments = segment_ids(batch, tokens, attention_mask, cu_seqlens)
    rows = segments >= 0 if response_mask is None else (segments >= 0) & response_mask
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    options = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "dtype": dtype}
    attention, lse = attention_map(q, k, segments, sinks=sinks, **options)
    definitions = {
        "row_entropy": lambda: row_entropy(attention, rows),
        "largest_score": lambda: largest_score(attention_scores(q, k, segments, **options), rows),
        "first_mass": lambda: prefix_mass(attention, rows, segments, torch.full([sequences], first_keys)),
        "prefix_mass": lambda: prefix_mass(attention, rows, segments, prefix_lengths),
        "self_mass": lambda: self_mass(attention, rows),
        "column_sum": lambda: column_sum(attention, rows, segments, horizon),
    }
    return AttentionStats(
        waad=waad(attention, rows, window),
        fai=fai(attention, rows, segments, horizon),
        span=span(attention, rows, segments, sequences, span_rows),
        lse=torch.where(rows[:, None], lse, 0.0),
        more={name: definitions[name]() for name in more},
    )


def group_sums(
    waad_h: Tensor,
    fai_h: Tensor,
    local_heads: Tensor,
    global_heads: Tensor,
    segments: Tensor,
    more_h: Mapping[str, Tensor] = MappingProxyType({}),
) -> GroupStats:
    """Returns WAAD summed over the local heads and FAI summed over the global heads, [B, T]: Eq. 8 before its mean.

    The masses of `more_h` are summed as WAAD is, the column sums as FAI is.

    Args:
        waad_h: [B, HQ, T], WAAD of each head.
        fai_h: [B, HQ, T], FAI of each head.
        local_heads: bool [HQ], or [S, HQ] where each sequence has its own group.
        global_heads: bool [HQ] or [S, HQ], the same.
        segments: [B, T].
        more_h: by name, [B, HQ, T] each.
    """

    def total(values: Tensor, group: Tensor) -> Tensor:
        member = group[segments.clamp(min=0)] if group.ndim == 2 else group.expand(*segments.shape, -1)  # [B, T, HQ]
        return torch.where(member.mT, values, 0.0).sum(1)

    group_of = {name: global_heads if name == "column_sum" else local_heads for name in more_h}
    more = {name: total(values, group_of[name]) for name, values in more_h.items()}
    return GroupStats(waad=total(waad_h, local_heads), fai=total(fai_h, global_heads), more=more)


# ---- layers and heads ------------------------------------------------------------------------------------------------


def sampled_layers(num_layers: int, count: int = 5) -> list[int]:
    """Returns `count` layers, evenly spaced over floor(L/3)..floor(2L/3), both ends included.

    Halves are rounded up; a layer occurs once.
    """
    first, last = num_layers // 3, 2 * num_layers // 3
    if count == 1:
        return [(first + last) // 2]
    spaced = [first + (last - first) * i / (count - 1) for i in range(count)]
    return sorted({min(math.floor(x + 0.5), num_layers - 1) for x in spaced})


def group_heads(spans: Tensor, local_fraction: float = 0.3, global_fraction: float = 0.3) -> HeadGroups:
    """Returns the ceil(local_fraction n) heads of lowest and the ceil(global_fraction n) of highest span (Eq. 8).

    Ties go to the lower head. The local heads are taken first, so that the groups are disjoint also when all spans are
    equal.

    Args:
        spans: [L, HQ] floating, in tokens; n = L x HQ.
    """
    flat = spans.flatten().tolist()
    take = [math.ceil(fraction * len(flat) - 1e-9) for fraction in (local_fraction, global_fraction)]
    ascending = sorted(range(len(flat)), key=lambda head: (flat[head], head))
    low = ascending[: take[0]]
    high = sorted(ascending[take[0] :], key=lambda head: (-flat[head], head))[: take[1]]
    masks = [torch.tensor([head in chosen for head in range(len(flat))]).view(spans.shape) for chosen in (low, high)]
    return HeadGroups(*masks)


# ---- selection and credit --------------------------------------------------------------------------------------------


def segment_topq(values: Tensor, response_mask: Tensor, top_fraction: float, largest: bool = True) -> Tensor:
    """Returns TopQ: the ceil(top_fraction n) largest (smallest) of the n values of R in each batch row, [B, T] bool.

    Ties go to the lower position. A NaN is never selected, but counts in n. values: [B, T].
    """
    out = torch.zeros_like(response_mask)
    for b in range(len(values)):
        positions = response_mask[b].nonzero().flatten().tolist()
        count = math.ceil(top_fraction * len(positions) - 1e-9)
        sign = -1 if largest else 1
        numbers = [p for p in positions if not math.isnan(values[b, p])]
        ranked = sorted(numbers, key=lambda p: (sign * values[b, p].item(), p))
        out[b, ranked[:count]] = True
    return out


def find_peaks(values: Tensor, response_mask: Tensor, min_quantile: float = 0.0) -> Tensor:
    """Returns the strict local maxima inside runs of consecutive positions of R, [B, T] bool.

    A plateau counts at its first position. A plateau that touches an end of its run is
    no peak, as in scipy.signal.find_peaks. Comparisons with NaN are false.

    Args:
        values: [B, T].
        min_quantile: a peak must reach the ceil(min_quantile n)-th smallest of the batch row's n values in R, where
            NaN counts as the largest; with 0 every peak stays.
    """
    out = torch.zeros_like(response_mask)
    for b in range(len(values)):
        x, inside = values[b].tolist(), response_mask[b].tolist()
        floor = lower_quantile([v for v, m in zip(x, inside, strict=True) if m], min_quantile)
        for first in range(1, len(x)):
            last = first
            while last + 1 < len(x) and inside[last + 1] and x[last + 1] == x[first]:
                last += 1
            enclosed = last + 1 < len(x) and inside[first - 1] and inside[first] and inside[last + 1]
            if enclosed and x[first - 1] < x[first] and x[last + 1] < x[first] and (floor is None or x[first] >= floor):
                out[b, first] = True
    return out


def lower_quantile(values: list[float], p: float) -> float | None:
    """Returns the ceil(p n)-th smallest of n values, NaN last; None if p n is 0."""
    rank = math.ceil(p * len(values) - 1e-9)
    return sorted(values, key=lambda v: (math.isnan(v), v))[rank - 1] if rank > 0 else None


def delta(waad_t: Tensor, response_mask: Tensor, kind: str = "absolute") -> Tensor:
    """Returns Delta_t where t and t + 1 are in R, else 0: [B, T], in tokens (Eq. 13).

    "absolute" is |WAAD_t - WAAD_{t+1}|, "drop" is max(WAAD_t - WAAD_{t+1}, 0).
    """
    out = torch.zeros_like(waad_t)
    both = response_mask[:, :-1] & response_mask[:, 1:]
    change = waad_t[:, :-1] - waad_t[:, 1:]
    out[:, :-1] = torch.where(both, change.abs() if kind == "absolute" else change.clamp(min=0.0), 0.0)
    return out


_delta = delta  # the option of this name hides the function


def preplan(
    waad_t: Tensor, response_mask: Tensor, fraction: float = 0.4, largest: bool = True, delta: str = "absolute"
) -> Tensor:
    """Returns the preplan tokens T_loc = TopQ(Delta), [B, T] bool (Eq. 13). With "drop" the top takes no Delta of 0."""
    change = _delta(waad_t, response_mask, delta)
    taken = segment_topq(change, response_mask, fraction, largest)
    return taken & (change > 0) if delta == "drop" and largest else taken


def rises(waad_t: Tensor, response_mask: Tensor) -> Tensor:
    """Returns whether t and t + 1 are in R and WAAD_t < WAAD_{t+1}: [B, T] bool."""
    return delta(-waad_t, response_mask, "drop") > 0


def coupled_sets(
    waad_t: Tensor,
    fai_t: Tensor,
    response_mask: Tensor,
    top_fraction: float = 0.4,
    max_lookback: int = 3,
    largest: bool = True,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
    preplan_fraction: float | None = None,
    delta: str = "absolute",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the anchors T_glob, the dominated ones D, and their intros I(D), each [B, T] bool (Eq. 15, 17).

    Args:
        waad_t: [B, T], in tokens.
        fai_t: [B, T].
        tau_waad: a dominated anchor has at most this WAAD; None for the lower median of WAAD over R.
        tau_delta: its intro has at least this Delta; None for the smallest Delta of T_loc.
        preplan_fraction: the fraction of T_loc; None for top_fraction.
        delta: "absolute" or "drop". With "drop" a token whose Delta is 0 is no intro, whatever tau_delta is.
    """
    change = _delta(waad_t, response_mask, delta)
    of_preplan = top_fraction if preplan_fraction is None else preplan_fraction
    preplan_t = preplan(waad_t, response_mask, of_preplan, delta=delta)
    anchors = segment_topq(fai_t, response_mask, top_fraction, largest)
    dominated, intros = torch.zeros_like(response_mask), torch.zeros_like(response_mask)
    for b in range(len(response_mask)):
        positions = response_mask[b].nonzero().flatten().tolist()
        most_waad = tau_waad if tau_waad is not None else lower_quantile([waad_t[b, p].item() for p in positions], 0.5)
        least_delta = tau_delta if tau_delta is not None else min(change[b][preplan_t[b]].tolist(), default=math.nan)
        for t in anchors[b].nonzero().flatten().tolist():
            before = [u for u in range(t - max_lookback, t) if u >= 0 and response_mask[b, u]]
            if not before or waad_t[b, t].item() > most_waad:
                continue
            intro = max(before, key=lambda u: (change[b, u].item(), u))
            if change[b, intro].item() >= least_delta and (delta == "absolute" or change[b, intro] > 0):
                dominated[b, t], intros[b, intro] = True, True
    return anchors, dominated, intros


def gamma(
    strategy: str,
    response_mask: Tensor,
    waad_t: Tensor | None = None,
    fai_t: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    draw: Tensor | None = None,
    top_fraction: float = 0.4,
    amplification: float = 1.5,
    shared_fraction: float = 0.5,
    max_lookback: int = 3,
    largest: bool = True,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
    preplan_fraction: float | None = None,
    delta: str = "absolute",
) -> Tensor:
    """Returns the factor of each token's advantage, [B, T] fp32, 1 outside R (Eq. 14, 16, 18 and the baselines).

    Args:
        strategy: as in `token_credit`.
        waad_t, fai_t: [B, T]; WAAD in tokens.
        entropy: [B, T], for the strategy "entropy".
        draw: [B, T] random numbers, for the strategy "random".
        top_fraction and all after it: as in `token_credit`.
    """
    of_preplan = top_fraction if preplan_fraction is None else preplan_fraction
    if strategy == "coupled":
        options = (max_lookback, largest, tau_waad, tau_delta, of_preplan, delta)
        anchors, dominated, intros = coupled_sets(waad_t, fai_t, response_mask, top_fraction, *options)
        alone = (anchors & ~dominated).double()
        share = alone + (1 - shared_fraction) * dominated.double() + shared_fraction * intros.double()
    elif strategy == "none":
        share = torch.zeros(response_mask.shape, dtype=torch.float64)
    elif strategy == "local":
        share = preplan(waad_t, response_mask, of_preplan, largest, delta).double()
    else:
        signal = {"global": fai_t, "random": draw, "entropy": entropy}[strategy]
        share = segment_topq(signal, response_mask, top_fraction, largest).double()
    return (1 + (amplification - 1) * share).float()


def shape_advantages(advantages: Tensor, gamma_t: Tensor) -> Tensor:
    """Returns A_t gamma_t where A_t >= 0, else A_t: [B, T]. advantages: [B] or [B, T]; gamma_t: [B, T]."""
    per_token = advantages[:, None].expand_as(gamma_t) if advantages.ndim == 1 else advantages
    return torch.where(per_token >= 0, per_token * gamma_t, per_token)
