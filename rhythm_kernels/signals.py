"""From the heads' statistics to one WAAD and one FAI for each token."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rhythm_kernels.attention.layout import Layout
from rhythm_kernels.checks import check_choice, check_tensor
from rhythm_kernels.heads import group_heads
from rhythm_kernels.types import AttentionStats, HeadGroups, Rhythm

GROUPS_PER = ("sequence", "batch")


def rhythm_of(
    stats: Mapping[int, AttentionStats],
    layout: Layout,
    *,
    groups: HeadGroups | None = None,
    groups_per: str = "sequence",
    local: float = 0.3,
    global_: float = 0.3,
) -> Rhythm:
    """WAAD of the local heads' mean map and FAI of the global heads' (Eq. 8-10), by linearity from per-head values.

    Args:
        stats: the statistics of each sampled layer, in ascending order of the layers.
        layout: where the sequences of the batch are.
        groups: [L, HQ] or [sequences, L, HQ]; made from the spans if None.
        groups_per: "sequence": each sequence has its own groups, from its own spans; "batch": one grouping from the
            spans over all of R in the batch.
    """
    check_choice("groups_per", groups_per, GROUPS_PER)
    layers = [stats[index] for index in sorted(stats)]
    spans = None
    if groups is None:
        spans = torch.stack([layer.span for layer in layers], 1)  # [sequences, L, HQ]
        if groups_per == "batch":
            spans = _pool(spans, layout)
        groups = group_heads(spans, local=local, global_=global_)
    else:
        check_groups(groups, len(layers), layers[0].waad.shape[1], layout.sequences)
    return Rhythm(
        waad=_group_mean([layer.waad for layer in layers], groups.local, layout),
        fai=_group_mean([layer.fai for layer in layers], groups.global_, layout),
        spans=spans,
        groups=groups,
    )


def delta(waad: Tensor, mask: Tensor) -> Tensor:
    """Delta_t = |WAAD_t - WAAD_{t+1}| (Eq. 13); 0 where t or t + 1 is not in R. waad, mask [B, T] -> [B, T]."""
    out = torch.zeros_like(waad)
    inside = mask[:, :-1] & mask[:, 1:]
    out[:, :-1] = (waad[:, :-1] - waad[:, 1:]).abs().masked_fill(~inside, 0.0)
    return out


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


def _group_mean(values: list[Tensor], group: Tensor, layout: Layout) -> Tensor:
    """Mean over a group's heads, of each token's own sequence: L x [B, HQ, T] -> [B, T]; 0 for an empty group."""
    group = group.to(values[0].device)
    if group.ndim == 2:
        group = group[None].expand(layout.sequences, -1, -1)
    total = torch.zeros_like(values[0][:, 0])
    for layer, value in enumerate(values):
        member = group[:, layer][layout.segments].transpose(1, 2)  # [B, HQ, T]
        total += value.masked_fill(~member, 0.0).sum(1)  # a NaN of a head outside the group stays outside
    heads = group.flatten(1).sum(1)[layout.segments]
    return total / heads.clamp(min=1)
