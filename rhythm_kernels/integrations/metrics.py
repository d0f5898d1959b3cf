"""Computes the metrics of credit that a run inside another trainer logs."""

import torch
from torch import Tensor

from rhythm_kernels.tensor_checks import check_tensor
from rhythm_kernels.types import Rhythm


def credit_sums(gamma: Tensor, response_mask: Tensor, rhythm: Rhythm | None = None) -> dict[str, Tensor]:
    """Returns sums over R for `credit_means`; they add up over parts of a batch and over ranks.

    Args:
        gamma: [B, T] floating.
        response_mask: [B, T] bool, R.
        rhythm: WAAD and FAI [B, T], if the strategy reads them.

    Returns:
        Sums by name, 0-dim fp64 on the device of gamma: "tokens" (the number in R, which divides the
        others), "rhythm/gamma_mean", "rhythm/credited_share" and, with a rhythm, "rhythm/waad_mean" (tokens) and
        "rhythm/fai_mean".
    """
    check_tensor("gamma", gamma, ["B", "T"])
    check_tensor("response_mask", response_mask, list(gamma.shape), [torch.bool], gamma.device)
    values = {"tokens": torch.ones_like(gamma), "rhythm/gamma_mean": gamma, "rhythm/credited_share": gamma != 1}
    if rhythm is not None:
        values |= {"rhythm/waad_mean": rhythm.waad, "rhythm/fai_mean": rhythm.fai}
    return {name: value.double().masked_fill(~response_mask, 0.0).sum() for name, value in values.items()}


def credit_means(sums: dict[str, float]) -> dict[str, float]:
    """Returns the means from the sums of `credit_sums`; none if there was no token."""
    tokens = sums["tokens"]
    return {name: total / tokens for name, total in sums.items() if name != "tokens"} if tokens else {}
