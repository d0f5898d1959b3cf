"""Turns the rhythm into the factor of each token's advantage (Eq. 13-18)."""

from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import check_bool, check_choice, check_float, check_int
from rhythm_kernels.credit.composed import ALONE, DOMINATED, FIRST_SIGNAL, INTRO, PREPLAN, SECOND_SIGNAL
from rhythm_kernels.credit.selection import DTYPES, check_packing, ops
from rhythm_kernels.options import DELTAS, MOST_AMPLIFICATION, STRATEGIES
from rhythm_kernels.tensor_checks import can_look, check_tensor
from rhythm_kernels.types import Rhythm


class CoupledSets(NamedTuple):
    """The token sets of coupled credit, each [B, T] bool, and which token introduces which anchor."""

    preplan: Tensor
    """Preplan tokens: TopQ of Delta (Eq. 13)."""
    anchors: Tensor
    """Anchors: TopQ of FAI (Eq. 15)."""
    dominated: Tensor
    """D, the locally dominated anchors: they have a low WAAD just after a preplan peak (Eq. 17)."""
    intros: Tensor
    """I(D), the intros: the preplan peaks that introduce the dominated anchors."""
    intro_of: Tensor
    """[B, T] int64: for each dominated anchor the position of its intro in the row; -1 elsewhere."""


def token_credit(
    strategy: str,
    response_mask: Tensor,
    rhythm: Rhythm | None = None,
    *,
    entropy: Tensor | None = None,
    top_fraction: float = 0.4,
    amplification: float = 1.5,
    shared_fraction: float = 0.5,
    max_lookback: int = 3,
    largest: bool = True,
    preplan_fraction: float | None = None,
    delta: str = "absolute",
    tau_waad: float | None = None,
    tau_delta: float | None = None,
    seed: int = 0,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Returns gamma, the factor of each token's advantage (Eq. 14, 16, 18), [B, T] fp32, 1 outside R.

    WAAD is the windowed average attention distance of a token, FAI its future attention influence. Delta is the change
    of WAAD from a token to the next.

    Args:
        strategy: "none" (all 1), "random" (TopQ of a draw from `seed`), "entropy" (TopQ of `entropy`), "local" (TopQ of
            Delta, Eq. 14), "global" (TopQ of FAI, Eq. 16), "coupled" (anchors; each dominated one shares its
            credit with the token that introduces it, Eq. 18).
        response_mask: [B, T] bool, R.
        rhythm: "local" needs rhythm.waad, "global" rhythm.fai, "coupled" both; each [B, T] fp32, fp16 or bf16, finite
            in R.
        entropy: [B, T] fp32, fp16 or bf16, nats, finite in R; only for "entropy".
        top_fraction: q of the paper: the fraction of R that is selected, ceil(top_fraction n - 1e-9) of n.
        amplification: gamma_amp of the paper: the factor of a selected token, 0 to 1e37.
        shared_fraction: alpha of the paper: the fraction of a dominated anchor's credit that goes to its intro, 0 to 1.
        max_lookback: k of the paper: how many tokens back an intro may be.
        largest: False selects the bottom (the paper's ablation); in "coupled" it changes the anchors alone.
        preplan_fraction: the fraction of R that is preplan tokens: those that "local" selects, and in "coupled" those
            whose smallest Delta is the default of tau_delta. None for top_fraction.
        delta: "absolute" is the size of the change of WAAD (Eq. 13). "drop" counts only tokens whose WAAD is above the
            next token's: no other is a preplan token or an intro, so that these may be fewer.
        tau_waad: the largest WAAD of a dominated anchor, in tokens; the lower median of R if None.
        tau_delta: the smallest Delta that comes before a dominated anchor, in tokens; the smallest of the preplan
            tokens if None.
        seed: the seed of "random"; give each step its own. A compiled graph cannot make the generator: call
            "random" outside of it.
        cu_seqlens: [S + 1] int32 or int64, bounds of packed sequences, as in `attention_stats`; then B = 1. Each
            sequence has its own R, and no Delta or intro crosses from one to another.
        backend: "extension" (on a GPU one launch for fp32 signals, preceded by a fill if packed; the host does not
            wait), "torch", or "auto": the extension where it is built for the device, else torch.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, or a signal that is missing
            or, on a CPU, not finite in R.
        RuntimeError: backend="extension" where it is not built for the device.

    With the extension the host does not wait for a GPU, and so cannot raise there for what a tensor holds. Instead
    gamma is NaN in R of a sequence whose signal is not finite in R, and everywhere if cu_seqlens does not rise from 0
    to T; "none" reads neither. The same holds in a compiled graph on a CPU. The composed torch ops give the same NaN
    for signals, and read cu_seqlens on the host.
    """
    check_choice("strategy", strategy, STRATEGIES)
    check_tensor("response_mask", response_mask, ["B", "T"], [torch.bool])
    check_float("amplification", amplification, 0.0, MOST_AMPLIFICATION)
    check_float("shared_fraction", shared_fraction, 0.0, 1.0)
    check_int("seed", seed, 0, 2**64 - 1)
    _check_options(rhythm, top_fraction, max_lookback, largest, preplan_fraction, delta, tau_waad, tau_delta)
    cu_seqlens = check_packing(cu_seqlens, response_mask)
    _check_sequences(rhythm, response_mask, cu_seqlens)
    of_preplan, drops = top_fraction if preplan_fraction is None else preplan_fraction, delta == "drop"
    op = ops(backend, response_mask.device)
    if strategy == "none":
        return torch.ones(response_mask.shape, dtype=torch.float32, device=response_mask.device)
    if strategy == "coupled":
        waad, fai = _check_both(rhythm, response_mask)
        shares = (top_fraction, of_preplan, amplification, shared_fraction)
        options = (*shares, max_lookback, largest, drops, tau_waad, tau_delta)
        gamma, faults, *_ = op.coupled_credit(waad, fai, response_mask, cu_seqlens, *options, False)
        _raise_faults(faults, "rhythm.waad", "rhythm.fai")
        return gamma
    if strategy == "random":
        name, generator = "the draw", torch.Generator(response_mask.device).manual_seed(seed)
        signal = torch.rand(response_mask.shape, generator=generator, dtype=torch.float32, device=response_mask.device)
    elif strategy == "entropy":
        name, signal = "entropy", _check_signal("entropy", entropy, response_mask)
    elif strategy == "local":
        name, signal = "rhythm.waad", _check_signal("rhythm.waad", getattr(rhythm, "waad", None), response_mask)
    else:
        name, signal = "rhythm.fai", _check_signal("rhythm.fai", getattr(rhythm, "fai", None), response_mask)
    is_local = strategy == "local"
    fraction = of_preplan if is_local else top_fraction
    gamma, faults = op.topq_credit(signal, response_mask, cu_seqlens, is_local, drops, fraction, amplification, largest)
    _raise_faults(faults, name)
    return gamma


def coupled_sets(
    response_mask: Tensor,
    rhythm: Rhythm,
    *,
    top_fraction: float = 0.4,
    max_lookback: int = 3,
    largest: bool = True,
    preplan_fraction: float | None = None,
    delta: str = "absolute",
    tau_waad: float | None = None,
    tau_delta: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> CoupledSets:
    """Returns the sets of coupled credit (Eq. 13, 15, 17), each [B, T].

    Arguments and errors are those of `token_credit`. The sets are empty where `token_credit` would give NaN.
    """
    check_tensor("response_mask", response_mask, ["B", "T"], [torch.bool])
    _check_options(rhythm, top_fraction, max_lookback, largest, preplan_fraction, delta, tau_waad, tau_delta)
    cu_seqlens = check_packing(cu_seqlens, response_mask)
    _check_sequences(rhythm, response_mask, cu_seqlens)
    waad, fai = _check_both(rhythm, response_mask)
    shares = (top_fraction, top_fraction if preplan_fraction is None else preplan_fraction, 1.0, 0.0)
    options = (*shares, max_lookback, largest, delta == "drop", tau_waad, tau_delta)
    _, faults, sets, back = ops(backend, response_mask.device).coupled_credit(
        waad, fai, response_mask, cu_seqlens, *options, True
    )
    _raise_faults(faults, "rhythm.waad", "rhythm.fai")
    members = ((sets & bits) != 0 for bits in (PREPLAN, ALONE | DOMINATED, DOMINATED, INTRO))
    position = torch.arange(response_mask.shape[1], device=response_mask.device)
    return CoupledSets(*members, torch.where(back > 0, position - back, -1))


def shape_advantages(advantages: Tensor, gamma: Tensor) -> Tensor:
    """Returns the advantages for the loss: A_t gamma_t where A_t >= 0, else A_t.

    Args:
        advantages: [B], one for each sequence, or [B, T], one for each token; floating.
        gamma: [B, T] floating, from `token_credit`. No gradient flows into it.

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
    rhythm: Rhythm | None,
    top_fraction: float,
    max_lookback: int,
    largest: bool,
    preplan_fraction: float | None,
    delta: str,
    tau_waad: float | None,
    tau_delta: float | None,
) -> None:
    if rhythm is not None and not isinstance(rhythm, Rhythm):
        raise TypeError(f"rhythm must be a Rhythm, got {type(rhythm).__name__}")
    check_float("top_fraction", top_fraction, 0.0, 1.0)
    check_int("max_lookback", max_lookback, 1, 2**63 - 1)
    check_bool("largest", largest)
    if preplan_fraction is not None:
        check_float("preplan_fraction", preplan_fraction, 0.0, 1.0)
    check_choice("delta", delta, DELTAS)
    for name, tau in (("tau_waad", tau_waad), ("tau_delta", tau_delta)):
        if tau is not None:
            check_float(name, tau)


def _check_signal(name: str, signal: Tensor | None, response_mask: Tensor) -> Tensor:
    """Returns the signal in float32, without a graph."""
    if signal is None:
        raise ValueError(f"{name} is needed by this strategy, got None")
    check_tensor(name, signal, list(response_mask.shape), DTYPES, response_mask.device)
    return signal.detach().float()


def _check_sequences(rhythm: Rhythm | None, response_mask: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError for the rhythm of packed sequences without their bounds, where it shows by the spans."""
    spans, rows = getattr(rhythm, "spans", None), response_mask.shape[0]
    if cu_seqlens is None and isinstance(spans, Tensor) and spans.ndim == 3 and len(spans) != rows:
        raise ValueError(
            f"cu_seqlens must be the bounds of packed sequences, got None for a rhythm.spans of {len(spans)} sequences "
            f"and a response_mask of {rows} row(s)"
        )


def _check_both(rhythm: Rhythm | None, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(
        _check_signal(f"rhythm.{name}", getattr(rhythm, name, None), response_mask) for name in ("waad", "fai")
    )


def _raise_faults(faults: Tensor, *names: str) -> None:
    """Raises ValueError for faults that the host can read without waiting; otherwise gamma is NaN."""
    if not can_look(faults):
        return
    for name, bit in zip(names, (FIRST_SIGNAL, SECOND_SIGNAL)):
        sequences = ((faults & bit) != 0).nonzero().flatten().tolist()
        if sequences:
            raise ValueError(
                f"{name} must be finite in R, got NaN or infinity in {len(sequences)} sequence(s), "
                f"first in sequence {sequences[0]}"
            )
