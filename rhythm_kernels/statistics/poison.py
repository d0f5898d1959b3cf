"""Turns wrong statistics into NaN on a device that the host does not wait for."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rhythm_kernels.types import AttentionStats, GroupStats

Stats = TypeVar("Stats", AttentionStats, GroupStats)


def factor_of(excess: Tensor) -> Tensor:
    """Returns NaN where a 0-dim excess is above 1, else 1; 0-dim fp32."""
    return torch.where(excess > 1, torch.nan, 1.0)


def scaled(stats: Sequence[Stats], factor: Tensor) -> list[Stats]:
    """Returns the statistics of some layers times a 0-dim factor on their device, in one launch.

    A factor of 1 keeps every bit; a factor of NaN marks all of them.
    """
    values = [value for layer in stats for value in (*layer[:-1], *layer.more.values()) if value is not None]
    products = iter(torch._foreach_mul(values, factor))

    def product_of(layer: Stats) -> Stats:
        own = [None if value is None else next(products) for value in layer[:-1]]
        return type(layer)(*own, {name: next(products) for name in layer.more})

    return [product_of(layer) for layer in stats]
