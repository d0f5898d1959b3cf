"""The parts of the check of an attention call that all backends share: the probed rows, the tolerance and the result.

Shapes: S sequences, P probed rows of each.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.host import send
from rhythm_kernels.statistics.layout import Layout

PROBES = 12
"""Probed rows of a batch row. A packed row shares them among its sequences, but each gets at least FEWEST."""
FEWEST = 4
END_ROWS = 2
"""Probed rows of a sequence where only a log-sum-exp is checked: the first and the last one."""
SLACK = 2.0
"""How many times its estimated rounding error a row may be off. The estimate takes every error at its largest."""
FP32 = 2.0**-24  # the unit roundoff
TINY = torch.finfo(torch.float32).tiny
VANISHING = 1e-18  # the squares of smaller values are 0 in fp32, so their norms say nothing
ACCUMULATED = 24 * FP32
"""Error of a sum of fp32 products, relative to the lengths of the vectors: once in the call, once in the check."""


class Rounding(NamedTuple):
    """The rounding of an attention call: unit roundoffs, each relative to the value that is rounded."""

    factors: float
    """Rounding of q and k before their product, beyond that of the dtype that they arrive in."""
    scores: float
    """Rounding of the scores; 0 where it is smaller than the error of their sum in fp32."""
    weights: float
    """Rounding of the weights and of v."""
    out: float
    """Rounding of the output."""
    smallest: float
    """Absolute error of a weight near 0: half of the smallest positive number; 0 where fp32 has no number so small."""


class Deviation(NamedTuple):
    """The place where an attention call differs most from the assumed map, relative to the allowed difference."""

    excess: Tensor
    """0-dim fp32: the difference divided by the allowed one. Above 1 the call does not match the map."""
    place: Tensor
    """int64 [3]: batch row, token, query head."""
    values: Tensor
    """fp32 [3]: what the call returned there, what the assumed map gives, and the allowed difference."""


def rounding_of(
    dtype: torch.dtype, *, lowered: torch.dtype | None = None, fused: bool = False, softcap: bool = False
) -> Rounding:
    """Returns the rounding of an attention call on inputs of `dtype`.

    Args:
        lowered: dtype that the call rounds fp32 factors of its products to (autocast, TF32); None if it does not.
        fused: whether the scores stay in fp32, inside one kernel. The eager formula rounds them to the dtype twice:
            after the product and after the scale.
        softcap: whether the call has a soft cap, which adds three roundings.
    """
    unit, coarse = (torch.finfo(x).eps / 2 for x in (dtype, lowered or dtype))
    scores = 0.0 if fused else (3.0 if softcap else 1.5) * coarse
    smallest = torch.finfo(lowered or dtype).smallest_normal * coarse
    return Rounding(
        factors=coarse if coarse > unit else 0.0,
        scores=scores if scores > ACCUMULATED else 0.0,
        weights=coarse,
        out=coarse,
        smallest=smallest if smallest > TINY else 0.0,
    )


def probed_rows(layout: Layout, most: int = PROBES) -> Tensor:
    """Returns the rows of R that are probed, int64 [S, P], -1 where a sequence has no row of R.

    They are the first and the last row of each sequence and some between them, by a fixed rule. More of them lie near
    the beginning, where a token of another sequence or of the padding would have the largest weight.

    Args:
        most: the number of rows for a batch row, as `PROBES`.
    """
    return layout.keep(("probes", most), lambda: _probed_rows(layout, most))


def _probed_rows(layout: Layout, most: int) -> Tensor:
    batch, tokens = layout.rows.shape
    device = layout.rows.device
    probes = most if layout.sequences <= batch else max(min(FEWEST, most), most * batch // layout.sequences)
    bounds = torch.tensor(layout.bounds, dtype=torch.int64, device="cpu").view(-1, 3)
    squares, most_square = torch.arange(probes, device="cpu") ** 2, max(1, (probes - 1) ** 2)
    if layout.whole:
        _, begin, end = bounds[..., None].unbind(1)
        rows = begin + (end - begin - 1) * squares // most_square
        return send(torch.where(begin < end, rows, -1), device)
    # positions run through all batch rows; rows_before[i] is the number of rows of R below position i
    rows_before = pad(layout.rows.flatten().cumsum(0), (1, 0))
    offset = bounds[:, 0] * tokens
    sent = send(torch.cat([offset, (bounds[:, 1:] + offset[:, None]).flatten(), squares]), device)
    offset, ends, squares = sent.split([len(bounds), 2 * len(bounds), probes])
    before = rows_before[ends.view(-1, 2)]
    count = before[:, 1:] - before[:, :1]
    rank = (count - 1) * squares // most_square  # 0 to count - 1
    position = torch.searchsorted(rows_before[1:], before[:, :1] + rank, right=True)
    return (position - offset[:, None]).masked_fill(count == 0, -1)
