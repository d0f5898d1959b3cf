"""The mean attention map of the local and of the global heads: of a window of tokens, or of all tokens in bins.

A map of N x N is never held: rows come in tiles, and what is kept is the window or the bins.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rhythm_kernels.checks import check_int
from rhythm_kernels.listen.collect import Collector
from rhythm_kernels.statistics.api import run_stats
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.tensor_checks import check_tensor
from rhythm_kernels.types import AttentionStats, HeadGroups

MOST_BINS = 256
TILE = 2**18  # scores of a head held at once, 1 MiB in float32


class MeanMaps(NamedTuple):
    """Mean maps of the local and the global heads over tokens begin..end of a sequence (Eq. 8)."""

    local_map: Tensor
    """[n, n] fp32 on the CPU: what a row of a bin gives to the tokens of another, on average over its rows."""
    global_map: Tensor
    begin: int
    end: int
    bin: int
    """Tokens in a row or column; 1 is the map itself."""


def mean_maps(
    model: nn.Module,
    ids: Tensor,
    layers: list[int],
    groups: HeadGroups,
    *,
    begin: int = 0,
    end: int | None = None,
    bins: int = MOST_BINS,
) -> MeanMaps:
    """One forward over a sequence, of which the mean maps are kept.

    Args:
        model: as of `collect`.
        ids: [1, T].
        layers, groups: of a `Reading`: the sampled layers, and [L, HQ] bool.
        begin, end: the window of tokens, all if left out.
        bins: rows and columns at most; a longer window has several tokens in each.

    Raises:
        TypeError, ValueError: a window outside of the sequence, and as `collect`.
    """
    check_tensor("ids", ids, [1, "T"], [torch.int64])
    tokens = ids.shape[1]
    end = tokens if end is None else end
    check_int("begin", begin, 0, tokens - 1)
    check_int("end", end, begin + 1, tokens)
    size = -(-(end - begin) // check_int("bins", bins, 1))
    with torch.no_grad(), _MapCollector(model, layers, groups, begin, end, size) as c:
        model(ids, use_cache=False)
    heads = [int(group.sum()) for group in groups]
    maps = [total / max(1, count) for total, count in zip(c.totals, heads, strict=True)]
    return MeanMaps(*(each.float().cpu() for each in maps), begin, end, size)


class _MapCollector(Collector):
    """Adds up the maps of both groups over the sampled layers."""

    def __init__(self, model: nn.Module, layers: list[int], groups: HeadGroups, begin: int, end: int, size: int):
        super().__init__(model, layers=layers, window=1, horizon=(0, 0), groups=groups)
        self.begin, self.end, self.size = begin, end, size
        bins = -(-(end - begin) // size)
        self.totals = [torch.zeros(bins, bins, dtype=torch.float64) for _ in range(2)]

    def measure(self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, options: Options) -> AttentionStats:
        stats = run_stats(q, k, lse, self.layout, options._replace(need_span=False), self._backend)
        shared = q.shape[1] // k.shape[1]
        place = self.layers.index(layer)
        for total, group in zip(self.totals, self._grouping["groups"], strict=True):
            for head in group[place].nonzero().flatten().tolist():
                total += self._binned(q[0, head], k[0, head // shared], stats.lse[0, head], options).cpu()
        return stats

    def _binned(self, q: Tensor, k: Tensor, lse: Tensor, options: Options) -> Tensor:
        """[bins, bins] fp64 of one head: q, k [T, D], lse [T]."""
        begin, end, size = self.begin, self.end, self.size
        bins = -(-(end - begin) // size)
        key = torch.arange(begin, end, device=q.device)
        found = torch.zeros(bins, bins, dtype=torch.float64, device=q.device)
        for rows in key.split(max(1, TILE // (end - begin))):
            past = key[: int(rows[-1]) + 1 - begin]  # no row of the tile sees a later one
            scores = q[rows].float() @ k[begin : begin + len(past)].float().T * options.scale
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            distance = rows[:, None] - past
            seen = distance >= 0
            if options.sliding_window is not None:
                seen &= distance < options.sliding_window
            weights = (scores - lse[rows, None]).exp().masked_fill(~seen, 0.0)
            filled = pad(weights, (0, bins * size - len(past))).view(len(rows), bins, size)
            found.index_add_(0, (rows - begin) // size, filled.sum(-1, dtype=torch.float64))
        rows_in = torch.bincount((key - begin) // size, minlength=bins)
        return found / rows_in[:, None]
