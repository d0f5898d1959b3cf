"""Computes the metrics of credit that a run inside another trainer logs."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.credit.tokens import coupled_sets
from rhythm_kernels.options import CreditOptions
from rhythm_kernels.tensor_checks import check_tensor
from rhythm_kernels.types import Rhythm

DIVISORS = {"rhythm/preplan_rises": "preplan"}
"""The sums that other sums than "tokens" divide."""


def credit_sums(
    gamma: Tensor, response_mask: Tensor, options: CreditOptions, rhythm: Rhythm | None = None
) -> dict[str, Tensor]:
    """Returns sums over R for `credit_means`; they add up over parts of a batch and over ranks.

    Args:
        gamma: [B, T] floating.
        response_mask: [B, T] bool, R.
        options: those that gamma was computed with.
        rhythm: WAAD and FAI [B, T], if the strategy reads them.

    Returns:
        Sums by name, 0-dim fp64 on the device of gamma: "tokens" (the number in R, which divides the
        others), "rhythm/gamma_mean", "rhythm/credited_share" and, with a rhythm, "rhythm/waad_mean" (tokens),
        "rhythm/fai_mean", and "rhythm/preplan_rises", which "preplan" divides: the number of preplan tokens.
    """
    check_tensor("gamma", gamma, ["B", "T"])
    check_tensor("response_mask", response_mask, list(gamma.shape), [torch.bool], gamma.device)
    values = {"tokens": torch.ones_like(gamma), "rhythm/gamma_mean": gamma, "rhythm/credited_share": gamma != 1}
    if rhythm is not None:
        preplan = coupled_sets(response_mask, rhythm, **options.set_arguments).preplan
        values |= {"rhythm/waad_mean": rhythm.waad, "rhythm/fai_mean": rhythm.fai}
        values |= {"preplan": preplan, "rhythm/preplan_rises": preplan & rises(rhythm.waad, response_mask)}
    return {name: value.double().masked_fill(~response_mask, 0.0).sum() for name, value in values.items()}


def credit_means(sums: dict[str, float]) -> dict[str, float]:
    """Returns the means from the sums of `credit_sums`; without those of no token."""
    divisors = {name: sums[DIVISORS.get(name, "tokens")] for name in sums if name.startswith("rhythm/")}
    return {name: sums[name] / divisor for name, divisor in divisors.items() if divisor}


def rises(waad: Tensor, response_mask: Tensor) -> Tensor:
    """Returns whether WAAD is below that of the next token and both are in R, [B, T] bool.

    In a packed row each sequence must begin with a token outside R.
    """
    both = response_mask[:, :-1] & response_mask[:, 1:]
    return pad(both & (waad[:, :-1] < waad[:, 1:]), (0, min(1, waad.shape[1])))
