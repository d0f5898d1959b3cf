"""Receiver heads: those whose attention, from all that comes later, falls on few tokens (Bogdan et al., 2025).

The source is "Thought Anchors: Which LLM Reasoning Steps Matter?", arXiv 2506.19143. A head's columns are its FAI to
the end of the sequence, which `attention_stats` has for each head with horizon=(lo, None): one number a token, no N x N
map. Of them only moments are kept here, one set a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import check_int
from rhythm_kernels.tensor_checks import check_tensor

FEWEST_ROWS = 32
"""Rows that must look back at a column: the mean of a few is mostly their distance."""


class ColumnMoments(NamedTuple):
    """Central moments of each head's columns, fp64."""

    count: Tensor
    """[...] columns."""
    mean: Tensor
    """[..., HQ]"""
    m2: Tensor
    """[..., HQ] the mean of (x - mean)^2, and so on."""
    m3: Tensor
    m4: Tensor

    @property
    def kurtosis(self) -> Tensor:
        """[..., HQ]: m4 / m2^2 - 3, 0 for a normal distribution; 0 where all columns are equal or there are none, NaN
        where one of them is."""
        square = self.m2.square().clamp(min=torch.finfo(torch.float64).tiny)
        return torch.where(self.m2 == 0, 0.0, self.m4 / square - 3)


def column_moments(fai: Tensor, columns: Tensor) -> ColumnMoments:
    """Moments of FAI over the columns that count.

    Args:
        fai: [B, HQ, T] fp32, of each head: `AttentionStats.fai`.
        columns: [B, T] bool.

    Returns:
        count [B], the others [B, HQ].
    """
    check_tensor("fai", fai, ["B", "HQ", "T"], [torch.float32])
    check_tensor("columns", columns, [fai.shape[0], fai.shape[2]], [torch.bool], fai.device)
    count = columns.sum(-1)
    taken = columns[:, None]

    def mean(values: Tensor) -> Tensor:
        return values.masked_fill(~taken, 0.0).sum(-1) / count.clamp(min=1)[:, None]

    middle = mean(fai.double())
    away = fai.double() - middle[..., None]
    return ColumnMoments(count, middle, *(mean(away**power) for power in (2, 3, 4)))


def counted_columns(response: Tensor, lo: int) -> Tensor:
    """Columns of R at which at least FEWEST_ROWS rows of R look back from `lo` tokens or more; bool [B, T]."""
    check_tensor("response", response, ["B", "T"], [torch.bool])
    check_int("lo", lo, 0)
    behind = response.flip(-1).long().cumsum(-1).flip(-1)  # rows of R from each position on
    later = torch.nn.functional.pad(behind, (0, lo))[:, lo:]
    return response & (later >= FEWEST_ROWS)


def receiver_heads(kurtosis: Tensor, count: int) -> Tensor:
    """The heads with the largest kurtosis, [L, HQ] -> bool [L, HQ]; ties go to the lower (layer, head)."""
    check_tensor("kurtosis", kurtosis, ["L", "HQ"], [torch.float64])
    check_int("count", count, 1, kurtosis.numel())
    if kurtosis.isnan().any():
        raise ValueError(f"kurtosis must not hold NaN, got {int(kurtosis.isnan().sum())} of {kurtosis.numel()}")
    order = kurtosis.flatten().argsort(descending=True, stable=True)
    return (
        torch.zeros(kurtosis.numel(), dtype=torch.bool).index_fill_(0, order[:count].cpu(), True).view(kurtosis.shape)
    )
