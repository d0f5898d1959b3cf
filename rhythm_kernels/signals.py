"""From the heads' statistics to one WAAD and one FAI for each token."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rhythm_kernels.attention.layout import Layout
from rhythm_kernels.checks import check_choice, check_tensor
from rhythm_kernels.heads import group_heads
from rhythm_kernels.types import AttentionStats, GroupStats, HeadGroups, Rhythm

GROUPS_PER = ("sequence", "batch")


def rhythm_of(
    stats: Mapping[int, AttentionStats] | Mapping[int, GroupStats],
    layout: Layout,
    *,
    groups: HeadGroups | None = None,
    groups_per: str = "sequence",
    local: float = 0.3,
    global_: float = 0.3,
) -> Rhythm:
    """WAAD of the local heads' mean map and FAI of the global heads' (Eq. 8-10), by linearity from per-head values.

    Args:
        stats: of each sampled layer, which are added in ascending order: of each head, or sums over the `groups`.
        layout: where the sequences of the batch are.
        groups: [L, HQ] or [sequences, L, HQ]; made from the spans if None, which sums do not have.
        groups_per: "sequence": each sequence has its own groups, from its own spans; "batch": one grouping from the
            spans over all of R in the batch.

    Raises: TypeError, ValueError: wrong groups, or none for sums.
    """
    check_choice("groups_per", groups_per, GROUPS_PER)
    layers = [stats[index] for index in sorted(stats)]
    summed = isinstance(layers[0], GroupStats)
    spans = None
    if groups is not None:
        check_groups(groups, len(layers), "HQ" if summed else layers[0].waad.shape[1], layout.sequences)
    elif summed:
        raise ValueError("groups must be those that the statistics were summed over, got None")
    else:
        spans = torch.stack([layer.span for layer in layers], 1)  # [sequences, L, HQ]
        if groups_per == "batch":
            spans = _pool(spans, layout)
        groups = group_heads(spans, local=local, global_=global_)
    waad, fai = [layer.waad for layer in layers], [layer.fai for layer in layers]
    if not summed:
        waad, fai = _group_sums(waad, groups.local, layout), _group_sums(fai, groups.global_, layout)
    return Rhythm(_mean(waad, groups.local, layout), _mean(fai, groups.global_, layout), spans, groups)


def check_groups(groups: HeadGroups, layers: int, heads: int, sequences: int) -> None:
    if not isinstance(groups, HeadGroups):
        raise TypeError(f"groups must be HeadGroups, got {type(groups).__name__}")
    for name, group in zip(("groups.local", "groups.global_"), groups, strict=True):
        per_sequence = isinstance(group, Tensor) and group.ndim == 3
        check_tensor(name, group, [sequences, layers, heads] if per_sequence else [layers, heads], [torch.bool])


def _pool(spans: Tensor, layout: Layout) -> Tensor:
    """[sequences, L, HQ] -> [L, HQ]: the mean over R of the whole batch."""
    tokens = torch.zeros(layout.sequences, dtype=torch.long, device=spans.device)
    tokens.scatter_add_(0, layout.segments.flatten(), layout.rows.flatten().long())
    weighted = (spans.double() * tokens[:, None, None]).sum(0)
    return (weighted / tokens.sum().clamp(min=1)).float()


def _group_sums(values: list[Tensor], group: Tensor, layout: Layout) -> list[Tensor]:
    """Sums over the heads of a group, of each token's own sequence: L x [B, HQ, T] -> L x [B, T]."""
    members = _per_sequence(group, values[0].device, layout)[layout.segments].unbind(2)  # L x [B, T, HQ]
    # a NaN of a head outside the group stays outside
    return [value.masked_fill(~member.mT, 0.0).sum(1) for value, member in zip(values, members, strict=True)]


def _mean(sums: list[Tensor], group: Tensor, layout: Layout) -> Tensor:
    """The layers' sums L x [B, T] over the number of heads in the group of each token's own sequence; 0 if it is 0."""
    heads = _per_sequence(group, sums[0].device, layout).flatten(1).sum(1)[layout.segments]
    total = torch.zeros_like(sums[0])
    for layer in sums:
        total += layer
    return total / heads.clamp(min=1)


def _per_sequence(group: Tensor, device: torch.device, layout: Layout) -> Tensor:
    """[L, HQ] or [sequences, L, HQ] -> [sequences, L, HQ]."""
    return group.to(device).expand(layout.sequences, -1, -1)
