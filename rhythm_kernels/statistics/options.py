"""A layer's attention options, which are checked once and read by every backend.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import check_bool, check_float, check_horizon, check_int, check_span_rows
from rhythm_kernels.options import MAX_WINDOW
from rhythm_kernels.tensor_checks import check_tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_TOKENS = 2**22  # of a row: with more the sum of its spans, in units of 2^-20 tokens, may not fit int64


class Options(NamedTuple):
    """The options of `attention_stats` that a backend reads beside q, k and the layout."""

    scale: float
    """The factor of the scores."""
    window: int
    """W of WAAD, in tokens."""
    horizon: tuple[int, int | None]
    """(lo, hi) of FAI, in tokens, each at most T; hi is None for the end of the sequence."""
    sliding_window: int | None
    """Row t sees the keys s with t - s < sliding_window; at most T."""
    softcap: float | None
    sinks: Tensor | None
    """fp32 [HQ]; the blockwise backend also has [B, HQ] here, where groups of heads differ between sequences."""
    need_span: bool
    span_rows: int | None = None
    """The rows of R that the span of each head is read from, in blocks (`span_sample`); None for all."""
    more: tuple[str, ...] = ()
    """The names of the further statistics that are asked for, in the order of `more.MORE`."""
    first_keys: int = 4
    """How many tokens "first_mass" counts."""
    prefix_lengths: Tensor | None = None
    """int [S], how many tokens "prefix_mass" counts in each sequence."""


def check_options(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    window: int,
    horizon: tuple[int, int | None],
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    need_span: bool,
    span_rows: int | None = None,
) -> Options:
    """Checks q, k and the options of a layer, and returns the options; `attention_stats` describes them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, rank, size, device or value.
    """
    check_tensor("q", q, ["B", "HQ", "T", "D"], DTYPES)
    batch, query_heads, tokens, size = q.shape
    check_tensor("k", k, [batch, "H", tokens, size], [q.dtype], q.device)
    if tokens > MOST_TOKENS:
        raise ValueError(f"q must have at most {MOST_TOKENS} tokens in a row, got {tokens}")
    if k.shape[1] == 0 or query_heads % k.shape[1]:
        raise ValueError(
            f"the query heads of q must be a multiple of the key heads of k, got {query_heads}, {k.shape[1]}"
        )
    _check_heads("q", q)
    _check_heads("k", k)
    if sinks is not None:
        check_tensor("sinks", sinks, [query_heads], (*DTYPES, torch.float64), q.device)
    check_bool("need_span", need_span)
    if sliding_window is not None:
        sliding_window = min(check_int("sliding_window", sliding_window, 1), max(tokens, 1))
    lo, hi = check_horizon(horizon)
    if softcap is not None and check_float("softcap", softcap, 0.0) == 0.0:
        raise ValueError(f"softcap must be above 0, or None, got {softcap}")
    return Options(
        scale=size**-0.5 if scale is None else check_float("scale", scale),
        window=check_int("window", window, 1, MAX_WINDOW),
        horizon=(min(lo, tokens), None if hi is None else min(hi, tokens)),  # no distance is T: the kernels hold int32
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=None if sinks is None else sinks.detach().float(),
        need_span=need_span,
        span_rows=check_span_rows(span_rows),
    )


def check_values(v: Tensor, k: Tensor) -> None:
    """Checks v [B, H, T, Dv] of the fused forward against k [B, H, T, D]."""
    check_tensor("v", v, [*k.shape[:3], "Dv"], [k.dtype], k.device)
    _check_heads("v", v)


def _check_heads(name: str, x: Tensor) -> None:
    """Checks the head size of q, k or v, and that each head's numbers lie side by side."""
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have a head size of at least 1, got shape {list(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
