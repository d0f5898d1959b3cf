"""Composes the extension's ops of torch ops, for builds without it and for benchmarks.

They have the names, arguments and results of `torch.ops.rhythm_kernels`, bit for bit; csrc/ops.cpp has the shapes.
The host reads cu_seqlens, to pad packed sequences.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.checks import check_cuts

# Keys compare as the float32 numbers do. These two are below the keys of all numbers:
NAN = -(2**31) + 1
OUTSIDE = -(2**31)  # the key of a position outside the response_mask

# The codes of csrc/rows/credit.h. A sequence has a fault if that signal is not finite in R.
FIRST_SIGNAL, SECOND_SIGNAL = 1, 2
# Bits of the sets to which a token belongs.
INTRO, ALONE, DOMINATED, PREPLAN = 1, 2, 4, 8


# ---- the ops ---------------------------------------------------------------------------------------------------------


def segment_topq(
    values: Tensor, response_mask: Tensor, cu_seqlens: Tensor | None, top_fraction: float, largest: bool
) -> tuple[Tensor, Tensor]:
    rows = _Rows(response_mask, cu_seqlens)
    keys = _keys(rows.pad(values), rows.response_mask)
    return rows.unpad(_topq(_ranks(keys, largest), rows.response_mask, top_fraction)), (keys == NAN).any(-1)


def find_peaks(values: Tensor, response_mask: Tensor, cu_seqlens: Tensor | None, min_quantile: float) -> Tensor:
    rows = _Rows(response_mask, cu_seqlens)
    keys = _keys(rows.pad(values), rows.response_mask)
    if keys.shape[1] == 0:
        return torch.zeros_like(response_mask)
    edge = keys.new_full((keys.shape[0], 1), OUTSIDE)
    before, after = torch.cat([edge, keys[:, :-1]], -1), torch.cat([keys[:, 1:], edge], -1)
    rises = (before > NAN) & (before < keys)
    falls = (after > NAN) & (after < keys)
    position = torch.arange(keys.shape[1], device=keys.device).expand_as(keys)
    plateau_end = torch.where(keys != after, position, keys.shape[1] - 1).flip(-1).cummin(-1).values.flip(-1)
    peaks = rises & falls.gather(-1, plateau_end)

    count = _selection_count(rows.response_mask, min_quantile)
    last = _last_taken(_ranks(keys, largest=False), count)
    reaches = (last > NAN) & (keys >= ~last)
    return rows.unpad(peaks & (reaches | (count == 0)))


def topq_credit(
    values: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor | None,
    of_delta: bool,
    drops: bool,
    top_fraction: float,
    amplification: float,
    largest: bool,
) -> tuple[Tensor, Tensor]:
    rows = _Rows(response_mask, cu_seqlens)
    values = rows.pad(values)
    faults = FIRST_SIGNAL * _is_broken(values, rows.response_mask)
    signal = delta(values, rows.response_mask, drops, largest) if of_delta else values
    selected = _topq(_ranks(_keys(signal, rows.response_mask), largest), rows.response_mask, top_fraction)
    gamma = torch.ones_like(values).masked_fill(selected, 1 + (amplification - 1))
    return rows.unpad(_void(gamma, rows.response_mask, faults)), faults


def coupled_credit(
    waad: Tensor,
    fai: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor | None,
    top_fraction: float,
    preplan_fraction: float,
    amplification: float,
    shared_fraction: float,
    max_lookback: int,
    largest: bool,
    drops: bool,
    tau_waad: float | None,
    tau_delta: float | None,
    with_sets: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _Rows(response_mask, cu_seqlens)
    waad, fai, response_mask = rows.pad(waad), rows.pad(fai), rows.response_mask
    faults = FIRST_SIGNAL * _is_broken(waad, response_mask) + SECOND_SIGNAL * _is_broken(fai, response_mask)
    change = delta(waad, response_mask, drops)
    preplan = _topq(_keys(change, response_mask), response_mask, preplan_fraction)
    anchors = _topq(_ranks(_keys(fai, response_mask), largest), response_mask, top_fraction)
    # compared in fp64, so that a threshold is not rounded to the signal's precision
    low = _lower_median(waad, response_mask).double() if tau_waad is None else tau_waad
    if tau_delta is not None:
        high = tau_delta
    else:
        smallest = change.double().masked_fill(~preplan, torch.inf)
        smallest = smallest.amin(-1, keepdim=True) if response_mask.shape[1] else 0.0
        high = torch.where(preplan.any(-1, keepdim=True), smallest, torch.nan)  # no Delta reaches NaN

    best = torch.full_like(waad, -torch.inf)  # the largest Delta before each token, and how far back it is
    back = torch.zeros_like(waad, dtype=torch.int32)
    before = change.masked_fill(~response_mask, -torch.inf)
    reach = range(1, min(max_lookback, response_mask.shape[1] - 1) + 1)
    for steps in reach:
        earlier = pad(before[:, :-steps], (steps, 0), value=-torch.inf)
        better = earlier > best  # strictly larger: the latest token wins a tie, and NaN never
        best, back = torch.where(better, earlier, best), torch.where(better, steps, back)
    dominated = anchors & (waad.double() <= low) & (best.double() >= high) & (back > 0)
    back = torch.where(dominated, back, 0)
    intros = torch.zeros_like(response_mask)
    for steps in reach:
        intros = intros | pad(back[:, steps:] == steps, (0, steps))

    sets = PREPLAN * preplan + DOMINATED * dominated + ALONE * (anchors & ~dominated) + INTRO * intros
    # the factors of Eq. 18 by the sets of a token, in fp64 and rounded once; torch 2.11 compiles no bool times a number
    cases = range(INTRO + ALONE + DOMINATED + 1)
    parts = [[float(case & part > 0) for part in (DOMINATED, ALONE, INTRO)] for case in cases]
    shares = [
        (1 - shared_fraction) * dominates + stands + shared_fraction * introduces
        for dominates, stands, introduces in parts
    ]
    table = torch.tensor(
        [1 + (amplification - 1) * share for share in shares], dtype=torch.float64, device=waad.device
    ).float()
    gamma = rows.unpad(_void(table[sets.long() % len(cases)], response_mask, faults))
    if not with_sets:
        none = faults[:0]
        return gamma, faults, none, none.int()
    sound = (faults == 0)[:, None]
    return gamma, faults, rows.unpad((sets * sound).to(torch.uint8)), rows.unpad(back * sound)


def delta(waad: Tensor, response_mask: Tensor, drops: bool = False, largest: bool = True) -> Tensor:
    """Returns |WAAD_t - WAAD_{t+1}| where both are in R, else 0 (Eq. 13), [B, T].

    With `drops` it is WAAD_t - WAAD_{t+1} where that is positive, else NaN, which is never taken, or 0 for the bottom.
    """
    both = response_mask[:, :-1] & response_mask[:, 1:]
    change = waad[:, :-1] - waad[:, 1:]
    counts, size = (both & (change > 0), change) if drops else (both, change.abs())
    none = torch.nan if drops and largest else 0.0
    return pad(torch.where(counts, size, none), (0, min(1, waad.shape[1])), value=none)


# ---- rows ------------------------------------------------------------------------------------------------------------


class _Rows:
    """Turns packed sequences into padded rows and back; a padded batch stays as it is."""

    def __init__(self, response_mask: Tensor, cu_seqlens: Tensor | None):
        self.index = None
        if cu_seqlens is not None:
            cuts = cu_seqlens.tolist()
            check_cuts(cuts, response_mask.shape[1])
            lengths = cu_seqlens.diff()
            longest = max((end - begin for begin, end in itertools.pairwise(cuts)), default=0)
            column = torch.arange(longest, device=response_mask.device)
            self.inside = column < lengths[:, None]
            self.index = (cu_seqlens[:-1, None] + column).clamp(max=response_mask.shape[1] - 1)
        self.response_mask = self.pad(response_mask)

    def pad(self, values: Tensor) -> Tensor:
        """Returns values [1, T] as padded rows, [S, longest], 0 after the end of a sequence."""
        return values if self.index is None else torch.where(self.inside, values[0][self.index], 0).to(values.dtype)

    def unpad(self, values: Tensor) -> Tensor:
        """Returns padded rows as one packed row, [1, T]."""
        return values if self.index is None else values[self.inside][None]


# ---- selection in a row ----------------------------------------------------------------------------------------------


def _keys(values: Tensor, response_mask: Tensor) -> Tensor:
    """Returns the keys of values, int32 [B, T]; -0.0 has the key of +0.0."""
    bits = values.resolve_neg().contiguous().view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = torch.where(bits == -(2**31), 0, keys)  # the bits of -0.0
    return torch.where(response_mask, torch.where(values.isnan(), NAN, keys), OUTSIDE)


def _ranks(keys: Tensor, largest: bool) -> Tensor:
    """Returns ranks: the largest is selected first, NaN and OUTSIDE last."""
    return keys if largest else torch.where(keys > NAN, ~keys, keys)


def _selection_count(response_mask: Tensor, fraction: float) -> Tensor:
    """Returns ceil(fraction * n - 1e-9) for each row, int64 [B, 1]."""
    n = response_mask.sum(-1, keepdim=True)
    return (n.double() * fraction - 1e-9).ceil().long().clamp(min=0)


def _last_taken(ranks: Tensor, count: Tensor) -> Tensor:
    """Returns each row's count-th largest rank, [B, 1]; the largest where count is 0. Needs T > 0."""
    return ranks.sort(dim=-1, descending=True).values.gather(-1, (count - 1).clamp(min=0))


def _topq(ranks: Tensor, response_mask: Tensor, top_fraction: float) -> Tensor:
    """Returns the selected positions, bool [B, T]: higher ranks first, then lower positions."""
    if ranks.shape[1] == 0:
        return torch.zeros_like(response_mask)
    count = _selection_count(response_mask, top_fraction)
    last = _last_taken(ranks, count)
    above, ties = ranks > last, ranks == last
    first_ties = ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True))
    return (above | first_ties) & (ranks > NAN)


def _lower_median(values: Tensor, response_mask: Tensor) -> Tensor:
    """Returns the ceil(n / 2)-th smallest of a row's n masked values, [B, 1]; anything where n is 0."""
    if not response_mask.shape[1]:
        return values.new_zeros(response_mask.shape[0], 1)
    ordered = values.masked_fill(~response_mask, torch.inf).sort(-1).values
    rank = (response_mask.sum(-1, keepdim=True) + 1) // 2
    return ordered.gather(-1, (rank - 1).clamp(min=0))


# ---- faults ----------------------------------------------------------------------------------------------------------


def _is_broken(values: Tensor, response_mask: Tensor) -> Tensor:
    """Returns 1 for a row with a value in R that is not finite, else 0, uint8 [B]."""
    return (~values.isfinite() & response_mask).any(-1).to(torch.uint8)


def _void(gamma: Tensor, response_mask: Tensor, faults: Tensor) -> Tensor:
    """Returns gamma with the sequences that have a fault set to NaN in R and 1 elsewhere."""
    broken = (faults != 0)[:, None]
    return gamma.masked_fill(broken & response_mask, torch.nan).masked_fill(broken & ~response_mask, 1.0)
