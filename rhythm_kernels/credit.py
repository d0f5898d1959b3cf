"""From the rhythm to the factor of each token's advantage (Eq. 13-18)."""

from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import can_look, check_bool, check_choice, check_float, check_int, check_tensor
from rhythm_kernels.composed import ALONE, DOMINATED, FIRST_SIGNAL, INTRO, PREPLAN, SECOND_SIGNAL
from rhythm_kernels.selection import DTYPES, check_packing, ops
from rhythm_kernels.types import Rhythm

STRATEGIES = ("none", "random", "entropy", "local", "global", "coupled")
MOST_AMP = 1e37  # so that every factor is finite in fp32


class CoupledSets(NamedTuple):
    """The token sets of coupled credit, each [B, T] bool, and which token introduces which anchor."""

    t_loc: Tensor
    """Preplan tokens: TopQ of Delta (Eq. 13)."""
    t_glob: Tensor
    """Anchors: TopQ of FAI (Eq. 15)."""
    dominated: Tensor
    """D: anchors with a low WAAD just after a preplan peak (Eq. 17)."""
    intros: Tensor
    """I(D): the preplan peaks that introduce them."""
    intro_of: Tensor
    """[B, T] int64: for each token of D the position in its row of the token that introduces it; -1 elsewhere."""


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
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """gamma: the factor of each token's advantage (Eq. 14, 16, 18), [B, T] fp32, 1 outside R.

    Args:
        strategy: "none" (all 1), "random" (TopQ of a draw from `seed`), "entropy" (TopQ of `entropy`), "local" (TopQ of
            Delta, Eq. 14), "global" (TopQ of FAI, Eq. 16), "coupled" (anchors, of which the locally dominated share
            their credit with the token that introduces them, Eq. 18).
        mask: [B, T] bool, R.
        rhythm: "local" needs rhythm.waad, "global" rhythm.fai, "coupled" both; each [B, T] floating, finite in R.
        entropy: [B, T] floating, nats, finite in R; only for "entropy".
        q: the fraction of R that is selected, ceil(q n - 1e-9) of n.
        amp: the factor of a selected token, 0 to 1e37.
        alpha: the share of a locally dominated anchor's credit that goes to its intro, 0 to 1.
        k: how many tokens back an intro may be.
        largest: False selects the bottom (the paper's ablation); in "coupled" it changes the anchors alone.
        tau_waad: an anchor is dominated if its WAAD is at most this; the lower median of R if None. Tokens.
        tau_delta: and if a Delta of at least this comes before it; the smallest of the preplan tokens' if None. Tokens.
        seed: of "random"; give each step its own. A compiled graph cannot make the generator: draw outside of it.
        cu_seqlens: [S + 1] int32 or int64, packed sequences, as in `attention_stats`; then B = 1. R is that of each
            sequence, and no Delta or intro crosses from one to another.
        backend: "extension" (on a GPU one launch for fp32 signals, a fill before it for packed ones; the host does not
            wait), "torch", or "auto": the extension where it is built for the device, else torch.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, or a signal that is missing
            or, on a CPU, not finite in R.
        RuntimeError: backend="extension" where it is not built for the device.

    The extension does not wait for a GPU. What is raised on a CPU for the content of a tensor comes out as NaN there:
    gamma is NaN in R of a sequence with a signal that is not finite in R, also in a compiled graph on a CPU, and
    everywhere if cu_seqlens does not rise from 0 to T ("none" reads neither). The composed torch ops give the same NaN
    for signals; they read cu_seqlens on the host.
    """
    check_choice("strategy", strategy, STRATEGIES)
    check_tensor("mask", mask, ["B", "T"], [torch.bool])
    check_float("amp", amp, 0.0, MOST_AMP)
    check_float("alpha", alpha, 0.0, 1.0)
    check_int("seed", seed, 0, 2**64 - 1)
    _check_options(rhythm, q, k, largest, tau_waad, tau_delta)
    cu_seqlens = check_packing(cu_seqlens, mask)
    of = ops(backend, mask.device)
    if strategy == "none":
        return torch.ones(mask.shape, dtype=torch.float32, device=mask.device)
    if strategy == "coupled":
        waad, fai = _check_both(rhythm, mask)
        options = (q, amp, alpha, k, largest, tau_waad, tau_delta)
        gamma, faults, *_ = of.coupled_credit(waad, fai, mask, cu_seqlens, *options, False)
        _raise_faults(faults, "rhythm.waad", "rhythm.fai")
        return gamma
    if strategy == "random":
        name, generator = "the draw", torch.Generator(mask.device).manual_seed(seed)
        signal = torch.rand(mask.shape, generator=generator, dtype=torch.float32, device=mask.device)
    elif strategy == "entropy":
        name, signal = "entropy", _check_signal("entropy", entropy, mask)
    elif strategy == "local":
        name, signal = "rhythm.waad", _check_signal("rhythm.waad", getattr(rhythm, "waad", None), mask)
    else:
        name, signal = "rhythm.fai", _check_signal("rhythm.fai", getattr(rhythm, "fai", None), mask)
    gamma, faults = of.topq_credit(signal, mask, cu_seqlens, strategy == "local", q, amp, largest)
    _raise_faults(faults, name)
    return gamma


def coupled_sets(
    rhythm: Rhythm | None,
    mask: Tensor,
    *,
    q: float = 0.4,
    k: int = 3,
    largest: bool = True,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> CoupledSets:
    """T_loc, T_glob, D and I(D) of Eq. 13, 15 and 17; arguments and errors as in `token_credit`.

    Where `token_credit` would give NaN, the sets are empty.
    """
    check_tensor("mask", mask, ["B", "T"], [torch.bool])
    _check_options(rhythm, q, k, largest, tau_waad, tau_delta)
    cu_seqlens = check_packing(cu_seqlens, mask)
    waad, fai = _check_both(rhythm, mask)
    options = (q, 1.0, 0.0, k, largest, tau_waad, tau_delta)
    _, faults, sets, back = ops(backend, mask.device).coupled_credit(waad, fai, mask, cu_seqlens, *options, True)
    _raise_faults(faults, "rhythm.waad", "rhythm.fai")
    members = ((sets & bits) != 0 for bits in (PREPLAN, ALONE | DOMINATED, DOMINATED, INTRO))
    position = torch.arange(mask.shape[1], device=mask.device)
    return CoupledSets(*members, torch.where(back > 0, position - back, -1))


def shape_advantages(advantages: Tensor, gamma: Tensor) -> Tensor:
    """The advantages that the loss reads: A_t gamma_t where A_t >= 0, else A_t.

    Args:
        advantages: [B], of each sequence, or [B, T], of each token; floating.
        gamma: [B, T] floating, of `token_credit`. No gradient flows into it.

    Returns:
        [B, T], in the wider dtype of the two.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    floating = (*DTYPES, torch.float64)
    check_tensor("gamma", gamma, ["B", "T"], floating)
    per_sequence = isinstance(advantages, Tensor) and advantages.ndim == 1
    shape = gamma.shape[:1] if per_sequence else gamma.shape
    check_tensor("advantages", advantages, list(shape), floating, gamma.device)
    per_token = advantages[:, None].expand_as(gamma) if per_sequence else advantages
    return torch.where(per_token >= 0, per_token * gamma.detach(), per_token)


def _check_options(
    rhythm: Rhythm | None, q: float, k: int, largest: bool, tau_waad: float | None, tau_delta: float | None
) -> None:
    if rhythm is not None and not isinstance(rhythm, Rhythm):
        raise TypeError(f"rhythm must be a Rhythm, got {type(rhythm).__name__}")
    check_float("q", q, 0.0, 1.0)
    check_int("k", k, 1, 2**63 - 1)
    check_bool("largest", largest)
    for name, tau in (("tau_waad", tau_waad), ("tau_delta", tau_delta)):
        if tau is not None:
            check_float(name, tau)


def _check_signal(name: str, signal: Tensor | None, mask: Tensor) -> Tensor:
    if signal is None:
        raise ValueError(f"{name} is needed by this strategy, got None")
    check_tensor(name, signal, list(mask.shape), DTYPES, mask.device)
    return signal.detach().float()


def _check_both(rhythm: Rhythm | None, mask: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(_check_signal(f"rhythm.{name}", getattr(rhythm, name, None), mask) for name in ("waad", "fai"))


def _raise_faults(faults: Tensor, *names: str) -> None:
    """Raises where looking at the result costs nothing; elsewhere the NaN in it stands for the fault."""
    if not can_look(faults):
        return
    for name, bit in zip(names, (FIRST_SIGNAL, SECOND_SIGNAL)):
        sequences = ((faults & bit) != 0).nonzero().flatten().tolist()
        if sequences:
            raise ValueError(
                f"{name} must be finite in R, got NaN or infinity in {len(sequences)} sequence(s), "
                f"first in sequence {sequences[0]}"
            )
