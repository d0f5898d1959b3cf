"""From the heads' statistics to one WAAD and one FAI for each token."""

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
    """WAAD of the local heads' mean map and FAI of the global heads' (Eq. 8-10), by linearity from per-head values.

    Args:
        stats: of each sampled layer, which are added in ascending order: of each head, or sums over the `groups`.
        layout: where the sequences of the batch are.
        groups: [L, HQ] or [sequences, L, HQ]; made from the spans if None, which sums do not have.
        group_by: "sequence": each sequence has its own groups, from its own spans; "batch": one grouping from the
            spans over all of R in the batch.

    Raises: TypeError, ValueError: wrong groups, or none for sums; a span that is NaN. A GPU is not waited for: there
    the rhythm of that span's sequence is NaN.
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
    if not isinstance(groups, HeadGroups):
        raise TypeError(f"groups must be HeadGroups, got {type(groups).__name__}")
    for name, group in zip(("groups.local_heads", "groups.global_heads"), groups, strict=True):
        per_sequence = isinstance(group, Tensor) and group.ndim == 3
        check_tensor(name, group, [sequences, layers, heads] if per_sequence else [layers, heads], [torch.bool])


def _pool(spans: Tensor, layout: Layout) -> Tensor:
    """[sequences, L, HQ] -> [L, HQ]: the mean over R of the whole batch."""
    tokens = torch.zeros(layout.sequences, dtype=torch.long, device=spans.device)
    tokens.scatter_add_(0, layout.segments.flatten(), layout.rows.flatten().long())
    weighted = (spans.double() * tokens[:, None, None]).sum(0)
    return (weighted / tokens.sum().clamp(min=1)).float()


def _mean(values: Tensor, group: Tensor, layout: Layout) -> Tensor:
    """The mean over the heads in the group of each token's own sequence, of all layers; 0 if there are none: [B, T].

    values: [L, B, HQ, T], of each head, which it overwrites; or [L, B, T], sums over each layer's heads of the group.
    """
    each = group.to(values.device).expand(layout.sequences, -1, -1)  # [sequences, L, HQ]
    if values.ndim == 4:
        member = each[layout.segments].permute(2, 0, 3, 1)  # [L, B, HQ, T]
        # a NaN of a head outside the group stays outside
        values = values.masked_fill_(~member, 0.0).sum(2)
    heads = each.flatten(1).sum(1)[layout.segments]
    return values.sum(0) / heads.clamp(min=1)
