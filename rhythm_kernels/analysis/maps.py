"""The mean attention maps of the local and of the global heads, over a window of tokens or over all tokens in bins.

No N x N map is ever held: rows are computed in tiles, and only the window or the bins are kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rhythm_kernels.checks import check_int
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.statistics.api import run_stats
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.tensor_checks import check_tensor
from rhythm_kernels.types import AttentionStats, HeadGroups

MOST_BINS = 256
TILE = 2**18  # scores of one head that are held at once, 1 MiB in fp32


class MeanMaps(NamedTuple):
    """The mean maps of the local and of the global heads over the tokens begin..end-1 of a sequence (Eq. 8)."""

    local_map: Tensor
    """[n, n] fp32 on the CPU: the attention that the rows of one bin pay to the tokens of another, averaged over the
    rows."""
    global_map: Tensor
    begin: int
    end: int
    bin: int
    """The number of tokens in a row or column; 1 is the map itself."""


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
    """Returns the mean maps of one sequence, from one forward.

    Args:
        model: a model that `collect` takes.
        ids: [1, T] int64.
        layers: the layers whose maps are averaged, `Reading.sampled`.
        groups: their local and global heads, [L, HQ] bool each, `Reading.groups`.
        begin, end: the window of tokens; all tokens if left out.
        bins: the largest number of rows and columns; a longer window has several tokens in each.

    Raises:
        TypeError, ValueError: the window is not within the sequence, or `collect` refuses the model or the layers.
    """
    check_tensor("ids", ids, [1, "T"], [torch.int64])
    tokens = ids.shape[1]
    end = tokens if end is None else end
    check_int("begin", begin, 0, tokens - 1)
    check_int("end", end, begin + 1, tokens)
    size = -(-(end - begin) // check_int("bins", bins, 1))
    with torch.no_grad(), _MapCollector(model, layers, groups, begin, end, size) as c:
        model(ids, use_cache=False)
    maps = [(total / max(1, int(heads.sum()))).float().cpu() for total, heads in zip(c.totals, groups, strict=True)]
    return MeanMaps(*maps, begin, end, size)


class _MapCollector(collect):
    """Adds up the maps of the heads of both groups over the sampled layers."""

    def __init__(self, model: nn.Module, layers: list[int], groups: HeadGroups, begin: int, end: int, size: int):
        super().__init__(model, layers=layers, window=1, horizon=(0, 0), groups=groups)
        self.begin, self.end, self.size = begin, end, size
        self.bins = -(-(end - begin) // size)
        self.totals = [torch.zeros(self.bins, self.bins, dtype=torch.float64) for _ in range(2)]

    def measure(self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, options: Options) -> AttentionStats:
        stats = run_stats(q, k, lse, self.layout, options._replace(need_span=False), self.backend)
        heads_per_key = q.shape[1] // k.shape[1]
        row = self.layers.index(layer)
        for total, group in zip(self.totals, self.groups, strict=True):
            for head in group[row].nonzero().flatten().tolist():
                total += self._binned(q[0, head], k[0, head // heads_per_key], stats.lse[0, head], options).cpu()
        return stats

    def _binned(self, q: Tensor, k: Tensor, lse: Tensor, options: Options) -> Tensor:
        """Returns one head's map in bins, [bins, bins] fp64; q, k [T, D], lse [T]."""
        begin, end, size, bins = self.begin, self.end, self.size, self.bins
        key = torch.arange(begin, end, device=q.device)
        sums = torch.zeros(bins, bins, dtype=torch.float64, device=q.device)
        for rows in key.split(max(1, TILE // (end - begin))):
            past = key[: int(rows[-1]) + 1 - begin]  # no row of the tile sees a later token
            scores = q[rows].float() @ k[begin : begin + len(past)].float().T * options.scale
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            distance = rows[:, None] - past
            visible = distance >= 0
            if options.sliding_window is not None:
                visible &= distance < options.sliding_window
            weights = (scores - lse[rows, None]).exp().masked_fill(~visible, 0.0)
            in_bins = pad(weights, (0, bins * size - len(past))).view(len(rows), bins, size)
            sums.index_add_(0, (rows - begin) // size, in_bins.sum(-1, dtype=torch.float64))
        rows_of_bin = torch.bincount((key - begin) // size, minlength=bins)
        return sums / rows_of_bin[:, None]
