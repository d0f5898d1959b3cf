"""Turns statistics that are wrong into NaN on a device that is not waited for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rhythm_kernels.types import AttentionStats, GroupStats

Stats = AttentionStats | GroupStats


def factor_of(excess: Tensor) -> Tensor:
    """Returns NaN where a 0-dim excess is above 1, else 1; 0-dim fp32."""
    return torch.where(excess > 1, torch.nan, 1.0)


def scaled(stats: Sequence[Stats], factor: Tensor) -> list[Stats]:
    """Returns the statistics of some layers times a number on their device, by one launch; 1 keeps their bits."""
    products = iter(torch._foreach_mul([value for each in stats for value in each if value is not None], factor))
    return [type(each)(*(None if value is None else next(products) for value in each)) for each in stats]
