"""Operations on scores that both passes of the blockwise backend use."""

import math

import torch
from torch import Tensor

from rhythm_kernels.statistics.options import Options

LOG2_E = 1 / math.log(2)


def row_sums(lse: Tensor, sinks: Tensor | None) -> Tensor | float:
    """Returns the sum of each row of A: 1 less the sink's share. lse: [B, HQ, T]; sinks: [HQ] or [B, HQ]."""
    return 1.0 if sinks is None else 1.0 - torch.exp(sinks[..., None] - lse)


def softcapped(scores: Tensor, options: Options) -> Tensor:
    """Applies the soft cap, if there is one, to scores of any shape, in place."""
    return scores if options.softcap is None else scores.div_(options.softcap).tanh_().mul_(options.softcap)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Returns sum_s A[t, s] v[s]: [B, HQ, rows, keys] and [B, H, keys, Dv] -> [B, HQ, rows, Dv]."""
    grouped = weights.reshape(len(values), values.shape[1], -1, weights.shape[3])
    return (grouped @ values).view(*weights.shape[:3], -1)


def all_bits(kept: Tensor) -> Tensor:
    """Returns int32: all bits, -1, where `kept` is true, else none.

    A bitwise "and" with it clears fp32 weights, those of a NaN too; a fill by a bool mask takes several times as long.
    """
    return kept.int().neg_()
