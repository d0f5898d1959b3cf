"""Chooses the sampled layers, and the local and global heads among theirs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rhythm_kernels.checks import check_float, check_int
from rhythm_kernels.tensor_checks import check_tensor
from rhythm_kernels.types import HeadGroups


def sampled_layers(num_layers: int, layers: int | str | Sequence[int] = 5) -> list[int]:
    """Returns the indices of the layers to collect from, in ascending order.

    Args:
        num_layers: the number of layers of the model, L.
        layers: "all"; or a list of indices, where negative ones count from the end; or a number of layers, evenly
            spaced over floor(L/3)..floor(2L/3), both ends included, each rounded to the nearest layer (halves up). A
            shallow model has fewer; none is repeated.

    Raises:
        TypeError, ValueError: `layers` has the wrong type, repeats an index, or has one that the model lacks.
    """
    check_int("num_layers", num_layers, 1)
    if layers == "all":
        return list(range(num_layers))
    if isinstance(layers, int):
        count = check_int("layers", layers, 1)
        first, last = num_layers // 3, 2 * num_layers // 3
        if count == 1:
            return [(first + last) // 2]
        # halves up in integers: floor(x + 1/2) with x = first + (last - first) i / (count - 1)
        steps = range(count)
        rounded = [first + (2 * (last - first) * i + count - 1) // (2 * (count - 1)) for i in steps]
        return sorted({min(layer, num_layers - 1) for layer in rounded})
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise TypeError(f'layers must be "all", an int or a list of layer indices, got {layers!r}')
    chosen = sorted({check_int("layers", i, -num_layers, num_layers - 1) % num_layers for i in layers})
    if len(chosen) != len(layers):
        raise ValueError(f"layers must not repeat, got {list(layers)} of {num_layers} layers")
    return chosen


def group_heads(spans: Tensor, *, local_fraction: float = 0.3, global_fraction: float = 0.3) -> HeadGroups:
    """Returns the heads with the lowest and with the highest spans (Eq. 8).

    Of all n = L HQ heads, ceil(local_fraction n) are local and ceil(global_fraction n) are global.

    Args:
        spans: [L, HQ] or, for each sequence, [B, L, HQ]; floating, in tokens. The host waits for a GPU that holds them.
        local_fraction, global_fraction: fractions of all heads, together at most 1.

    Returns:
        HeadGroups of the same shape, bool, disjoint. Ties go to the lower (layer, head); local heads are taken first.

    Raises:
        TypeError, ValueError: wrong shape or dtype, a NaN, fractions that do not leave disjoint groups.
    """
    groups = rank_heads(spans, local_fraction, global_fraction)
    if spans.isnan().any():
        raise ValueError(f"spans must not hold NaN, got {int(spans.isnan().sum())} of {spans.numel()}")
    return groups


def rank_heads(spans: Tensor, local_fraction: float, global_fraction: float) -> HeadGroups:
    """Does what `group_heads` does without a wait of the host; groups of spans with NaN are meaningless."""
    floating = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    check_tensor("spans", spans, ["L", "HQ"] if getattr(spans, "ndim", 2) == 2 else ["B", "L", "HQ"], floating)
    heads = spans.shape[-2] * spans.shape[-1]
    low = math.ceil(check_float("local_fraction", local_fraction, 0.0, 1.0) * heads - 1e-9)
    high = math.ceil(check_float("global_fraction", global_fraction, 0.0, 1.0) * heads - 1e-9)
    if low + high > heads:
        raise ValueError(
            f"local_fraction and global_fraction must leave disjoint groups: {local_fraction} and {global_fraction} of "
            f"{heads} heads, rounded up, are {low} + {high}"
        )
    flat = spans.flatten(-2)
    is_local = _first(flat.argsort(dim=-1, stable=True), low)
    rest = flat.masked_fill(is_local, -math.inf)
    is_global = _first(rest.argsort(dim=-1, descending=True, stable=True), high)
    return HeadGroups(is_local.view(spans.shape), is_global.view(spans.shape))


def _first(order: Tensor, count: int) -> Tensor:
    """Returns a bool mask of the first `count` indices in each row of `order`."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :count], True)
