"""Attention-rhythm statistics for LLM reinforcement learning: WAAD and FAI without N x N maps, and credit from them."""

from rhythm_kernels.attention import attention, attention_stats, group_stats
from rhythm_kernels.collect import collect
from rhythm_kernels.credit import CoupledSets, coupled_sets, shape_advantages, token_credit
from rhythm_kernels.group_schedule import GroupDrift, GroupSchedule
from rhythm_kernels.heads import group_heads, sampled_layers
from rhythm_kernels.selection import find_peaks, segment_topq
from rhythm_kernels.types import AttentionStats, GroupStats, HeadGroups, Rhythm

__all__ = [
    "AttentionStats",
    "CoupledSets",
    "GroupDrift",
    "GroupSchedule",
    "GroupStats",
    "HeadGroups",
    "Rhythm",
    "attention",
    "attention_stats",
    "collect",
    "coupled_sets",
    "find_peaks",
    "group_heads",
    "group_stats",
    "sampled_layers",
    "segment_topq",
    "shape_advantages",
    "token_credit",
]
