"""From the rhythm to the factor of each token's advantage (Eq. 13-18)."""

from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import check_choice, check_float, check_int, check_tensor
from rhythm_kernels.selection import segment_topq
from rhythm_kernels.signals import delta
from rhythm_kernels.types import Rhythm

STRATEGIES = ("none", "random", "entropy", "local", "global", "coupled")
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


class CoupledSets(NamedTuple):
    """The token sets of coupled credit, each [B, T] bool."""

    t_loc: Tensor
    """Preplan tokens: TopQ of Delta (Eq. 13)."""
    t_glob: Tensor
    """Anchors: TopQ of FAI (Eq. 15)."""
    dominated: Tensor
    """D: anchors with a low WAAD just after a preplan peak (Eq. 17)."""
    intros: Tensor
    """I(D): the preplan peaks that introduce them."""


def token_credit(
    strategy: str,
    *,
    mask: Tensor,
    rhythm: Rhythm | None = None,
    entropy: Tensor | None = None,
    q: float = 0.4,
    amp: float = 1.5,
    alpha: float = 0.5,
    k: int = 3,
    largest: bool = True,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
    seed: int = 0,
) -> Tensor:
    """gamma: the factor of each token's advantage (Eq. 14, 16, 18), [B, T] fp32, 1 outside R.

    Args:
        strategy: "none" (all 1), "random" (TopQ of a draw from `seed`), "entropy" (TopQ of `entropy`), "local" (TopQ of
            Delta, Eq. 14), "global" (TopQ of FAI, Eq. 16), "coupled" (anchors, of which the locally dominated share
            their credit with the token that introduces them, Eq. 18).
        mask: [B, T] bool, R.
        rhythm: "local" needs rhythm.waad, "global" rhythm.fai, "coupled" both; each [B, T] floating, finite in R.
        entropy: [B, T] floating, nats; only for "entropy".
        q: the fraction of R that is selected, ceil(q n - 1e-9) of n.
        amp: the factor of a selected token.
        alpha: the share of a locally dominated anchor's credit that goes to its intro, 0 to 1.
        k: how many tokens back an intro may be.
        largest: False selects the bottom (the paper's ablation); in "coupled" it changes the anchors alone.
        tau_waad: an anchor is dominated if its WAAD is at most this; the lower median of R if None. Tokens.
        tau_delta: and if a Delta of at least this comes before it; the smallest of the preplan tokens' if None. Tokens.
        seed: of "random"; give each step its own.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, or a signal that is missing
            or not finite in R.
    """
    check_choice("strategy", strategy, STRATEGIES)
    check_tensor("mask", mask, ["B", "T"], [torch.bool])
    check_float("q", q, 0.0, 1.0)
    check_float("amp", amp, 0.0)
    check_float("alpha", alpha, 0.0, 1.0)
    check_int("seed", seed, 0)
    _check_rhythm(rhythm)
    if strategy == "none":
        return torch.ones(mask.shape, device=mask.device)
    if strategy == "coupled":
        sets = coupled_sets(rhythm, mask, q=q, k=k, largest=largest, tau_waad=tau_waad, tau_delta=tau_delta)
        return _weigh(sets, amp, alpha)
    if strategy == "random":
        generator = torch.Generator(mask.device).manual_seed(seed)
        signal = torch.rand(mask.shape, generator=generator, device=mask.device)
    elif strategy == "entropy":
        signal = _check_signal("entropy", entropy, mask)
    elif strategy == "local":
        signal = delta(_check_signal("rhythm.waad", getattr(rhythm, "waad", None), mask), mask)
    else:
        signal = _check_signal("rhythm.fai", getattr(rhythm, "fai", None), mask)
    selected = segment_topq(signal, mask, q, largest=largest)
    return torch.where(selected, 1 + (amp - 1), 1.0).float()


def coupled_sets(
    rhythm: Rhythm | None,
    mask: Tensor,
    *,
    q: float = 0.4,
    k: int = 3,
    largest: bool = True,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
) -> CoupledSets:
    """T_loc, T_glob, D and I(D) of Eq. 13, 15 and 17; arguments as in `token_credit`."""
    check_tensor("mask", mask, ["B", "T"], [torch.bool])
    _check_rhythm(rhythm)
    waad = _check_signal("rhythm.waad", getattr(rhythm, "waad", None), mask)
    fai = _check_signal("rhythm.fai", getattr(rhythm, "fai", None), mask)
    check_int("k", k, 1)
    for name, tau in (("tau_waad", tau_waad), ("tau_delta", tau_delta)):
        if tau is not None:
            check_float(name, tau)
    change = delta(waad, mask)
    t_loc = segment_topq(change, mask, q)
    t_glob = segment_topq(fai, mask, q, largest=largest)
    # compared in fp64, so that a threshold is not rounded to the signal's precision
    low = _lower_median(waad, mask).double() if tau_waad is None else tau_waad
    if tau_delta is not None:
        high = tau_delta
    else:
        high = change.double().masked_fill(~t_loc, torch.inf).amin(-1, keepdim=True) if mask.shape[1] else 0.0

    best = torch.full_like(waad, -torch.inf)  # the largest Delta among the k tokens before, and how far back it is
    back = torch.zeros_like(waad, dtype=torch.long)
    for steps in range(1, min(k, mask.shape[1] - 1) + 1):
        earlier = torch.full_like(waad, -torch.inf)
        earlier[:, steps:] = change[:, :-steps].masked_fill(~mask[:, :-steps], -torch.inf)
        better = earlier > best  # strictly: the latest wins a tie
        best, back = torch.where(better, earlier, best), torch.where(better, steps, back)
    dominated = t_glob & (waad.double() <= low) & (best.double() >= high) & (back > 0)
    intros = torch.zeros_like(mask)
    for steps in range(1, min(k, mask.shape[1] - 1) + 1):
        intros[:, :-steps] |= (dominated & (back == steps))[:, steps:]
    return CoupledSets(t_loc, t_glob, dominated, intros)


def shape_advantages(advantages: Tensor, gamma: Tensor) -> Tensor:
    """A_t gamma_t where A_t >= 0, else A_t: [B] or [B, T] floating advantages and gamma [B, T] -> [B, T]."""
    floating = (*FLOATING, torch.float64)
    check_tensor("gamma", gamma, ["B", "T"], floating)
    per_sequence = isinstance(advantages, Tensor) and advantages.ndim == 1
    shape = gamma.shape[:1] if per_sequence else gamma.shape
    check_tensor("advantages", advantages, list(shape), floating, gamma.device)
    per_token = advantages[:, None].expand_as(gamma) if per_sequence else advantages
    return torch.where(per_token >= 0, per_token * gamma.detach(), per_token)


def _check_rhythm(rhythm: Rhythm | None) -> None:
    if rhythm is not None and not isinstance(rhythm, Rhythm):
        raise TypeError(f"rhythm must be a Rhythm, got {type(rhythm).__name__}")


def _check_signal(name: str, signal: Tensor | None, mask: Tensor) -> Tensor:
    if signal is None:
        raise ValueError(f"{name} is needed by this strategy, got None")
    check_tensor(name, signal, list(mask.shape), FLOATING, mask.device)
    broken = (~signal.isfinite() & mask).any(-1)
    if broken.any():
        rows = broken.nonzero().flatten().tolist()
        raise ValueError(
            f"{name} must be finite in R, got NaN or infinity in {len(rows)} sequence(s), first in row {rows[0]}"
        )
    return signal.detach().float()


def _lower_median(values: Tensor, mask: Tensor) -> Tensor:
    """The ceil(n / 2)-th smallest of a row's n masked values, [B, 1]; anything where n is 0."""
    if not mask.shape[1]:
        return values.new_zeros(mask.shape[0], 1)
    ordered = values.masked_fill(~mask, torch.inf).sort(-1).values
    rank = (mask.sum(-1, keepdim=True) + 1) // 2
    return ordered.gather(-1, (rank - 1).clamp(min=0))


def _weigh(sets: CoupledSets, amp: float, alpha: float) -> Tensor:
    """Eq. 18 by a table of its eight cases: the sum in fp64, rounded once."""
    cases = [(anchor, alone, intro) for anchor in (0, 1) for alone in (0, 1) for intro in (0, 1)]
    table = [1 + (amp - 1) * ((1 - alpha) * anchor + alone + alpha * intro) for anchor, alone, intro in cases]
    case = 4 * sets.dominated.long() + 2 * (sets.t_glob & ~sets.dominated).long() + sets.intros.long()
    return torch.tensor(table, dtype=torch.float64, device=case.device).float()[case]
