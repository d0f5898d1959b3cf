"""Attention-rhythm statistics for LLM reinforcement learning: WAAD and FAI without N x N maps, and credit from them.

Each public name is loaded at its first use, so `options` and `tasks` can be imported without loading torch.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rhythm_kernels.credit.selection import find_peaks, segment_topq
    from rhythm_kernels.credit.tokens import CoupledSets, coupled_sets, shape_advantages, token_credit
    from rhythm_kernels.group_schedule import GroupDrift, GroupSchedule
    from rhythm_kernels.heads import group_heads, sampled_layers
    from rhythm_kernels.listen.collect import collect
    from rhythm_kernels.options import CreditOptions
    from rhythm_kernels.ranks import Parallel
    from rhythm_kernels.statistics.api import attention, attention_stats, group_stats
    from rhythm_kernels.types import AttentionStats, GroupStats, HeadGroups, Rhythm

__version__ = "0.1.0"

_NAMES = {
    "credit.selection": ("find_peaks", "segment_topq"),
    "credit.tokens": ("CoupledSets", "coupled_sets", "shape_advantages", "token_credit"),
    "group_schedule": ("GroupDrift", "GroupSchedule"),
    "heads": ("group_heads", "sampled_layers"),
    "listen.collect": ("collect",),
    "options": ("CreditOptions",),
    "ranks": ("Parallel",),
    "statistics.api": ("attention", "attention_stats", "group_stats"),
    "types": ("AttentionStats", "GroupStats", "HeadGroups", "Rhythm"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
