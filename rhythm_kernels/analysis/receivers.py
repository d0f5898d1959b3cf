"""Receiver heads: heads in which the attention of later tokens falls on few tokens (Bogdan et al., 2025).

The source is "Thought Anchors: Which LLM Reasoning Steps Matter?", arXiv 2506.19143. A head's columns are its future
attention influence (FAI) up to the end of the sequence: `attention_stats` returns it per head and token with
horizon=(lo, None), without an N x N map. This module keeps only the moments of each head's columns.

Shapes: B sequences, T tokens, L layers of HQ query heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import check_int
from rhythm_kernels.tensor_checks import check_tensor

RECEIVERS = 16
"""The number of receiver heads if nothing else is asked for; all heads of a model with fewer."""
FEWEST_ROWS = 32
"""A column counts where at least so many rows look back at it: a mean over fewer mostly shows their distance."""


class ColumnMoments(NamedTuple):
    """The central moments of each head's columns, fp64."""

    count: Tensor
    """[...], the number of columns."""
    mean: Tensor
    """[..., HQ]"""
    m2: Tensor
    """[..., HQ], the mean of (x - mean)^2."""
    m4: Tensor
    """[..., HQ], the mean of (x - mean)^4."""

    @property
    def kurtosis(self) -> Tensor:
        """Returns m4 / m2^2 - 3, [..., HQ], which is 0 for a normal distribution.

        It is 0 where all columns are equal or none counts, and NaN where a column is NaN.
        """
        square = self.m2.square().clamp(min=torch.finfo(torch.float64).tiny)
        return torch.where(self.m2 == 0, 0.0, self.m4 / square - 3)


def column_moments(fai: Tensor, columns: Tensor) -> ColumnMoments:
    """Returns the moments of FAI over the columns that count.

    Args:
        fai: [B, HQ, T] fp32, `AttentionStats.fai`.
        columns: [B, T] bool, the columns that count.

    Returns:
        `count` [B], the moments [B, HQ].
    """
    check_tensor("fai", fai, ["B", "HQ", "T"], [torch.float32])
    check_tensor("columns", columns, [fai.shape[0], fai.shape[2]], [torch.bool], fai.device)
    count = columns.sum(-1)

    def mean(values: Tensor) -> Tensor:
        return values.masked_fill(~columns[:, None], 0.0).sum(-1) / count.clamp(min=1)[:, None]

    center = mean(fai.double())
    deviation = fai.double() - center[..., None]
    return ColumnMoments(count, center, *(mean(deviation**power) for power in (2, 4)))


def counted_columns(response: Tensor, lo: int) -> Tensor:
    """Returns the columns of R that enough rows of R look back at, bool [B, T].

    Args:
        response: [B, T] bool, R.
        lo: the smallest distance, in tokens, at which a row counts; FEWEST_ROWS rows are enough.
    """
    check_tensor("response", response, ["B", "T"], [torch.bool])
    check_int("lo", lo, 0)
    rows_from = response.flip(-1).long().cumsum(-1).flip(-1)  # rows of R at or after each position
    rows_behind = torch.nn.functional.pad(rows_from, (0, lo))[:, lo:]
    return response & (rows_behind >= FEWEST_ROWS)


def receiver_heads(kurtosis: Tensor, count: int) -> Tensor:
    """Returns the `count` heads with the largest kurtosis, bool [L, HQ]; ties go to the lower (layer, head)."""
    check_tensor("kurtosis", kurtosis, ["L", "HQ"], [torch.float64])
    check_int("count", count, 1, kurtosis.numel())
    if kurtosis.isnan().any():
        raise ValueError(f"kurtosis must not hold NaN, got {int(kurtosis.isnan().sum())} of {kurtosis.numel()}")
    order = kurtosis.flatten().argsort(descending=True, stable=True)
    return (
        torch.zeros(kurtosis.numel(), dtype=torch.bool).index_fill_(0, order[:count].cpu(), True).view(kurtosis.shape)
    )
