"""What flows between the steps: per-head statistics -> head groups -> the rhythm of the tokens."""

from typing import NamedTuple

import torch


class AttentionStats(NamedTuple):
    """Statistics of one layer's attention maps, per query head. S is the number of packed sequences."""

    waad: torch.Tensor
    """[B, HQ, T] fp32, tokens: windowed average attention distance of each row (Eq. 9); 0 outside R."""
    fai: torch.Tensor
    """[B, HQ, T] fp32, a probability: future attention influence of each column (Eq. 10); 0 where no row looks back."""
    span: torch.Tensor | None
    """[B, HQ], packed [S, HQ], fp32, tokens: mean attention distance over R (Eq. 7); None if it was not asked for."""
    lse: torch.Tensor
    """[B, HQ, T] fp32, natural log: log-sum-exp of each row of R, a sink included; 0 outside R."""


class GroupStats(NamedTuple):
    """What one layer adds to the rhythm when its local and global heads are known (Eq. 8-10, before the mean)."""

    waad: torch.Tensor
    """[B, T] fp32, tokens: the sum of WAAD over the layer's local heads; 0 outside R."""
    fai: torch.Tensor
    """[B, T] fp32: the sum of FAI over the layer's global heads, for every column; 0 where no row looks back."""


class HeadGroups(NamedTuple):
    """The heads with the shortest and the longest spans, for the whole batch or for each sequence (Eq. 8)."""

    local_heads: torch.Tensor
    """[L, HQ] or [B, L, HQ] bool."""
    global_heads: torch.Tensor
    """[L, HQ] or [B, L, HQ] bool."""


class Rhythm(NamedTuple):
    """The preplan-and-anchor rhythm of a batch: one WAAD and one FAI for each token."""

    waad: torch.Tensor | None = None
    """[B, T] fp32, tokens: WAAD of the mean map of the local heads; 0 outside R."""
    fai: torch.Tensor | None = None
    """[B, T] fp32: FAI of the mean map of the global heads, for every column."""
    spans: torch.Tensor | None = None
    """[B, L, HQ] or [L, HQ] fp32, tokens: the spans that the groups come from; None if the groups were given."""
    groups: HeadGroups | None = None
    """The groups of which WAAD and FAI are means. On a GPU they mean nothing where a span, and so a signal, is NaN."""
