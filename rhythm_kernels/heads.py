"""Which layers are sampled, and which of their heads are local and global."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rhythm_kernels.checks import check_float, check_int, check_tensor
from rhythm_kernels.types import HeadGroups


def sampled_layers(num_layers: int, layers: int | Sequence[int] = 5) -> list[int]:
    """The layer indices to collect from.

    An int: so many layers, evenly spaced over floor(L/3)..floor(2L/3), both ends in, each rounded to the nearest layer
    (halves up), without repeats in a shallow model. A list: these layers, in ascending order; negative indices count
    from the end.
    """
    check_int("num_layers", num_layers, 1)
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
        raise TypeError(f"layers must be an int or a list of layer indices, got {layers!r}")
    chosen = sorted({check_int("layers", i, -num_layers, num_layers - 1) % num_layers for i in layers})
    if len(chosen) != len(layers):
        raise ValueError(f"layers must not repeat, got {list(layers)} of {num_layers} layers")
    return chosen


def group_heads(spans: Tensor, *, local: float = 0.3, global_: float = 0.3) -> HeadGroups:
    """The heads with the lowest and the highest spans (Eq. 8): ceil(local n) and ceil(global_ n) of all n = L HQ pairs.

    Args:
        spans: [L, HQ] or, for each sequence, [B, L, HQ]; floating, tokens. A GPU that holds them is waited for.
        local, global_: fractions of all heads, together at most 1.

    Returns:
        HeadGroups of the same shape, bool, disjoint. Ties go to the lower (layer, head); local heads are taken first.

    Raises:
        TypeError, ValueError: wrong shape or dtype, a NaN, fractions that do not leave disjoint groups.
    """
    groups = rank_heads(spans, local, global_)
    if spans.isnan().any():
        raise ValueError(f"spans must not hold NaN, got {int(spans.isnan().sum())} of {spans.numel()}")
    return groups


def rank_heads(spans: Tensor, local: float, global_: float) -> HeadGroups:
    """`group_heads` without a wait for the device: what it returns for spans that hold NaN means nothing."""
    floating = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    check_tensor("spans", spans, ["L", "HQ"] if getattr(spans, "ndim", 2) == 2 else ["B", "L", "HQ"], floating)
    heads = spans.shape[-2] * spans.shape[-1]
    low = math.ceil(check_float("local", local, 0.0, 1.0) * heads - 1e-9)
    high = math.ceil(check_float("global_", global_, 0.0, 1.0) * heads - 1e-9)
    if low + high > heads:
        raise ValueError(
            f"local and global_ must leave disjoint groups: {local} and {global_} of {heads} heads, rounded up, "
            f"are {low} + {high}"
        )
    flat = spans.flatten(-2)
    is_local = _first(flat.argsort(dim=-1, stable=True), low)
    rest = flat.masked_fill(is_local, -math.inf)
    is_global = _first(rest.argsort(dim=-1, descending=True, stable=True), high)
    return HeadGroups(is_local.view(spans.shape), is_global.view(spans.shape))


def _first(order: Tensor, count: int) -> Tensor:
    """bool mask of the first `count` indices of each row of `order`."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :count], True)
