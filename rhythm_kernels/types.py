"""The results that flow between the steps: statistics of each head -> head groups -> the rhythm of the tokens.

Shapes: B batch rows, T tokens, L collected layers, HQ query heads, S sequences (S = B in a batch that is not packed). R
is the set of response positions (rows) of a sequence. WAAD is windowed average attention distance, FAI future
attention influence. Equations are those of Li et al., arXiv 2510.13554.
"""

from typing import NamedTuple

import torch


class AttentionStats(NamedTuple):
    """Statistics of one layer's attention maps, for each query head."""

    waad: torch.Tensor
    """[B, HQ, T] fp32, in tokens: WAAD of each row (Eq. 9); 0 outside R."""
    fai: torch.Tensor
    """[B, HQ, T] fp32, a mean weight between 0 and 1: FAI of each column (Eq. 10); 0 where no row of R looks back."""
    span: torch.Tensor | None
    """[S, HQ] fp32, in tokens: mean attention distance over R (Eq. 7); None if it was not requested."""
    lse: torch.Tensor
    """[B, HQ, T] fp32, natural log: log-sum-exp of the scores of each row of R, a sink included; 0 outside R."""
    more: dict[str, torch.Tensor] = {}  # noqa: RUF012, since nothing writes to it
    """The statistics that `more=` asked for by their names, each fp32 [B, HQ, T]; those of rows are 0 outside R."""


class GroupStats(NamedTuple):
    """One layer's sums over known local and global heads: the parts of Eq. 8-10 before the mean over all layers."""

    waad: torch.Tensor
    """[B, T] fp32, in tokens: the sum of WAAD over the layer's local heads; 0 outside R."""
    fai: torch.Tensor
    """[B, T] fp32: the sum of FAI over the layer's global heads, for every column; 0 where no row of R looks back."""
    more: dict[str, torch.Tensor] = {}  # noqa: RUF012, since nothing writes to it
    """The statistics that `more=` asked for by their names, each fp32 [B, T]: sums of the masses over the layer's local
    heads, 0 outside R, and of "column_sum" over its global heads."""


class HeadGroups(NamedTuple):
    """The heads with the shortest and the longest spans, of the whole batch or of each sequence (Eq. 8)."""

    local_heads: torch.Tensor
    """[L, HQ], or [S, L, HQ] for each sequence, bool: the heads with the shortest spans."""
    global_heads: torch.Tensor
    """[L, HQ], or [S, L, HQ] for each sequence, bool: the heads with the longest spans."""


class Rhythm(NamedTuple):
    """The preplan-and-anchor rhythm of a batch: one WAAD and one FAI for each token."""

    waad: torch.Tensor | None = None
    """[B, T] fp32, in tokens: WAAD of the mean map of the local heads; 0 outside R."""
    fai: torch.Tensor | None = None
    """[B, T] fp32: FAI of the mean map of the global heads, for every column."""
    spans: torch.Tensor | None = None
    """[S, L, HQ] or [L, HQ] fp32, in tokens: the spans that the groups come from; None if the groups were given."""
    groups: HeadGroups | None = None
    """The groups over which WAAD and FAI are means. On a GPU, where a span is NaN, they mean nothing; WAAD and FAI
    are then NaN."""
