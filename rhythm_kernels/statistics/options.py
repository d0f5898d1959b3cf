"""A layer's attention options: checked once, read by every backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import check_float, check_horizon, check_int
from rhythm_kernels.options import MAX_WINDOW
from rhythm_kernels.tensor_checks import check_tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Options(NamedTuple):
    """What a backend needs beside q, k and the layout."""

    scale: float
    window: int
    horizon: tuple[int, int | None]
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None
    need_span: bool


def check_options(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None,
    window: int,
    horizon: tuple[int, int | None],
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    need_span: bool,
) -> Options:
    """Checks q, k and the options of a layer, whatever the layout."""
    check_tensor("q", q, ["B", "HQ", "T", "D"], DTYPES)
    batch, query_heads, tokens, size = q.shape
    check_tensor("k", k, [batch, "H", tokens, size], [q.dtype], q.device)
    if k.shape[1] == 0 or query_heads % k.shape[1]:
        raise ValueError(
            f"the query heads of q must be a multiple of the key heads of k, got {query_heads}, {k.shape[1]}"
        )
    if size == 0:
        raise ValueError(f"q must have a head size of at least 1, got shape {list(q.shape)}")
    for name, x in (("q", q), ("k", k)):
        if x.stride(-1) != 1 and size > 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
    if sinks is not None:
        check_tensor("sinks", sinks, [query_heads], (*DTYPES, torch.float64), q.device)
    if not isinstance(need_span, bool):
        raise TypeError(f"need_span must be a bool, got {type(need_span).__name__}: {need_span!r}")
    if sliding_window is not None:
        check_int("sliding_window", sliding_window, 1)
    if softcap is not None and check_float("softcap", softcap, 0.0) == 0.0:
        raise ValueError(f"softcap must be above 0, or None, got {softcap}")
    return Options(
        scale=size**-0.5 if scale is None else check_float("scale", scale),
        window=check_int("window", window, 1, MAX_WINDOW),
        horizon=check_horizon(horizon),
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=None if sinks is None else sinks.detach().float(),
        need_span=need_span,
    )


def check_values(v: Tensor, k: Tensor) -> None:
    """Checks v of the fused forward against k."""
    check_tensor("v", v, [*k.shape[:3], "Dv"], [k.dtype], k.device)
    if v.shape[-1] == 0:
        raise ValueError(f"v must have a head size of at least 1, got shape {list(v.shape)}")
    if v.stride(-1) != 1 and v.shape[-1] > 1:
        raise ValueError(f"v must be contiguous in its last dimension, got strides {v.stride()}")
