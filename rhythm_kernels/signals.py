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
) -> Rhythm:
    """Returns WAAD of the local heads' mean map and FAI of the global heads' (Eq. 8-10).

    Both are linear in the map, so the mean of the heads' values is the value of the mean map.

    Args:
        stats: by layer, statistics of each head or their sums over the `groups`; summed in ascending order of layers.
        layout: where the sequences of the batch are.
        groups: [L, HQ] or [sequences, L, HQ]; ranked from the spans if None. Sums have no spans, so they need groups.
        group_by: "sequence": each sequence has its own groups, from its own spans; "batch": one grouping from the
            spans over all of R in the batch, for which those of the sequences are weighted by their rows of R.

    Raises:
        TypeError, ValueError: the groups are wrong or missing for sums, or a span is NaN. The host does not wait for
            a GPU: there the rhythm of a sequence with a NaN span is NaN.
    """
    check_choice("group_by", group_by, GROUP_BY)
    layers = [stats[index] for index in sorted(stats)]
    summed = isinstance(layers[0], GroupStats)
    spans, broken = None, None
    if groups is not None:
        check_groups(groups, len(layers), "HQ" if summed else layers[0].waad.shape[1], layout.sequences)
    elif summed:
        raise ValueError("groups must be those that the statistics were summed over, got None")
    else:
        spans = torch.stack([layer.span for layer in layers], 1)  # [sequences, L, HQ]
        if group_by == "batch":
            spans = _pool(spans, layout)
        if can_look(spans):
            groups = group_heads(spans, local_fraction=local_fraction, global_fraction=global_fraction)
        else:
            groups, broken = rank_heads(spans, local_fraction, global_fraction), spans.isnan().flatten(-2).any(-1)
    waad, fai = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("waad", "fai"))
    rhythm = Rhythm(_mean(waad, groups.local_heads, layout), _mean(fai, groups.global_heads, layout), spans, groups)
    if broken is None:
        return rhythm
    unknown = broken.expand(layout.sequences)[layout.segments]  # [B, T]
    return rhythm._replace(waad=rhythm.waad.masked_fill_(unknown, nan), fai=rhythm.fai.masked_fill_(unknown, nan))


def check_groups(groups: HeadGroups, layers: int, heads: int, sequences: int) -> None:
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


def _mean(values: Tensor, group: Tensor, layout: Layout) -> Tensor:
    """Returns each token's mean over the heads of its sequence's group, [B, T]; 0 if the group is empty.

    Args:
        values: [L, B, HQ, T], one value a head, overwritten; or [L, B, T], sums over each layer's heads of the group.
        group: [L, HQ] or [sequences, L, HQ] bool.
    """
    of_sequences = group.to(values.device).expand(layout.sequences, -1, -1)  # [sequences, L, HQ]
    if values.ndim == 4:
        member = of_sequences[layout.segments].permute(2, 0, 3, 1)  # [L, B, HQ, T]
        # filled, not multiplied: a NaN of a head outside the group must not reach the sum
        values = values.masked_fill_(~member, 0.0).sum(2)
    heads = of_sequences.flatten(1).sum(1)[layout.segments]
    return values.sum(0) / heads.clamp(min=1)
