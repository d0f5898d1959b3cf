"""Turns the heads' statistics into one WAAD and one FAI for each token.

WAAD is the windowed average attention distance, FAI the future attention influence.
"""

from collections.abc import Mapping
from math import nan

import torch
from torch import Tensor

from rhythm_kernels.checks import check_choice
from rhythm_kernels.heads import group_heads, rank_heads
from rhythm_kernels.options import GROUP_BY
from rhythm_kernels.ranks import HeadShards
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.tensor_checks import can_look, check_tensor
from rhythm_kernels.types import AttentionStats, GroupStats, HeadGroups, Rhythm


def rhythm_of(
    stats: Mapping[int, AttentionStats] | Mapping[int, GroupStats],
    layout: Layout,
    *,
    groups: HeadGroups | None = None,
    group_by: str = "sequence",
    local_fraction: float = 0.3,
    global_fraction: float = 0.3,
    heads: HeadShards | None = None,
) -> Rhythm:
    """Returns WAAD of the local heads' mean map and FAI of the global heads' (Eq. 8-10).

    Both are linear in the map, so the mean of the heads' values is the value of the mean map.

    Args:
        stats: by layer, statistics of each head or their sums over the `groups`; summed in ascending order of layers.
        layout: where the sequences of the batch are.
        groups: [L, HQ] or [sequences, L, HQ]; ranked from the spans if None. Sums have no spans, so they need groups.
        group_by: "sequence": each sequence has its own groups, from its own spans; "batch": one grouping from the
            spans over all of R in the batch, for which those of the sequences are weighted by their rows of R.
        heads: this rank's, whose statistics `stats` are, where several share a layer's heads; sums over groups are
            then those of all ranks already.

    Raises:
        TypeError, ValueError: the groups are wrong or missing for sums, or a span is NaN. The host does not wait for
            a GPU: there the rhythm of a sequence with a NaN span is NaN.
    """
    check_choice("group_by", group_by, GROUP_BY)
    layers = [stats[index] for index in sorted(stats)]
    summed = isinstance(layers[0], GroupStats)
    spans, broken = None, None
    if groups is not None:
        all_heads = "HQ" if summed or heads else layers[0].waad.shape[1]
        check_groups(groups, "L" if heads else len(layers), all_heads, layout.sequences)
    elif summed:
        raise ValueError("groups must be those that the statistics were summed over, got None")
    else:
        spans = torch.stack([layer.span for layer in layers], 1)  # [sequences, L, HQ]
        if heads is not None:
            spans = heads.all_heads(spans)
        if group_by == "batch":
            spans = _pool(spans, layout)
        if can_look(spans):
            groups = group_heads(spans, local_fraction=local_fraction, global_fraction=global_fraction)
        else:
            groups, broken = rank_heads(spans, local_fraction, global_fraction), spans.isnan().flatten(-2).any(-1)
    waad, fai = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("waad", "fai"))
    sums = torch.stack([_sum(waad, groups.local_heads, layout, heads), _sum(fai, groups.global_heads, layout, heads)])
    if heads is not None and not summed:
        sums = heads.total(sums)
    waad, fai = (x / _count(group, layout, x) for x, group in zip(sums, groups, strict=True))
    rhythm = Rhythm(waad, fai, spans, groups)
    if broken is None:
        return rhythm
    unknown = broken.expand(layout.sequences)[layout.segments]  # [B, T]
    return rhythm._replace(waad=rhythm.waad.masked_fill_(unknown, nan), fai=rhythm.fai.masked_fill_(unknown, nan))


def check_groups(groups: HeadGroups, layers: int | str, heads: int | str, sequences: int | str) -> None:
    """Raises TypeError or ValueError for groups that are not [L, HQ] or [sequences, L, HQ], bool."""
    if not isinstance(groups, HeadGroups):
        raise TypeError(f"groups must be HeadGroups, got {type(groups).__name__}")
    for name, group in zip(("groups.local_heads", "groups.global_heads"), groups, strict=True):
        per_sequence = isinstance(group, Tensor) and group.ndim == 3
        check_tensor(name, group, [sequences, layers, heads] if per_sequence else [layers, heads], [torch.bool])


def _pool(spans: Tensor, layout: Layout) -> Tensor:
    """Returns the spans over R of the whole batch, [L, HQ], from those of each sequence, [sequences, L, HQ]."""
    tokens = torch.zeros(layout.sequences, dtype=torch.long, device=spans.device)
    tokens.scatter_add_(0, layout.segments.flatten(), layout.rows.flatten().long())
    weighted = (spans.double() * tokens[:, None, None]).sum(0)
    return (weighted / tokens.sum().clamp(min=1)).float()


def _sum(values: Tensor, group: Tensor, layout: Layout, heads: HeadShards | None) -> Tensor:
    """Returns each token's sum over the heads of its sequence's group that this rank has, [B, T].

    Args:
        values: [L, B, HQ, T], one value a head, overwritten; or [L, B, T], sums over each layer's heads of the group.
        group: [L, HQ] or [sequences, L, HQ] bool.
    """
    if values.ndim == 4:
        group = group if heads is None else heads.own_heads(group)
        of_sequences = group.to(values.device).expand(layout.sequences, -1, -1)  # [sequences, L, HQ]
        member = of_sequences[layout.segments].permute(2, 0, 3, 1)  # [L, B, HQ, T]
        # filled, not multiplied: a NaN of a head outside the group must not reach the sum
        values = values.masked_fill_(~member, 0.0).sum(2)
    return values.sum(0)


def _count(group: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """Returns the number of heads in the group of each token's sequence, at least 1, [B, T]."""
    of_sequences = group.to(like.device).expand(layout.sequences, -1, -1)
    return of_sequences.flatten(1).sum(1)[layout.segments].clamp(min=1)
