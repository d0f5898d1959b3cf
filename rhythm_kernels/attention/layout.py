"""Where sequences begin and end inside a [B, T] batch, padded or packed: the one form that every backend reads."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import check_tensor


class Layout(NamedTuple):
    """Key s is visible from row t of the same batch row if first[t] <= s <= t (and within the layer's window)."""

    first: Tensor
    """[B, T] int32: the first position of the token's own sequence; t + 1 for padding, which so sees nothing."""
    last: Tensor
    """[B, T] int32: the last position of the token's own sequence; t - 1 for padding."""
    rows: Tensor
    """[B, T] bool: R, without padding."""
    segments: Tensor
    """[B, T] int64: the sequence of each token, 0 to sequences - 1; padding counts to its row's sequence."""
    sequences: int
    """B, or S for packed sequences."""

    def slice(self, part: slice) -> "Layout":
        """The layout of some rows of the batch."""
        first, last, rows, segments = (x[part] for x in self[:4])
        return Layout(first, last, rows, segments, self.sequences)


def make_layout(
    batch: int,
    tokens: int,
    device: torch.device,
    row_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Layout:
    """Checks the masks and brings padding (left or right) and packing to one form.

    Raises: TypeError or ValueError for a mask of the wrong dtype, shape, device or content; reading the content
    synchronizes with the device once.
    """
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask and cu_seqlens exclude each other: packed sequences have no padding")
    position = torch.arange(tokens, device=device, dtype=torch.int32).expand(batch, tokens)
    if cu_seqlens is not None:
        valid, first, last, segments, sequences = _packed(cu_seqlens, batch, tokens, device)
    elif attention_mask is not None:
        valid, first, last, segments, sequences = _padded(attention_mask, position)
    else:
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        first, last = torch.zeros_like(position), torch.full_like(position, tokens - 1)
        segments, sequences = torch.arange(batch, device=device)[:, None].expand(batch, tokens), batch
    rows = valid
    if row_mask is not None:
        check_tensor("row_mask", row_mask, [batch, tokens], [torch.bool], device)
        rows = valid & row_mask
    first, last = torch.where(valid, first, position + 1), torch.where(valid, last, position - 1)
    return Layout(first.contiguous(), last.contiguous(), rows.contiguous(), segments.contiguous(), sequences)


def _padded(attention_mask: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    batch, tokens = position.shape
    dtypes = [torch.bool, torch.int64, torch.int32, torch.uint8]
    check_tensor("attention_mask", attention_mask, [batch, tokens], dtypes, position.device)
    valid = attention_mask != 0
    first = torch.where(valid, position, tokens).amin(-1, keepdim=True) if tokens else position
    last = torch.where(valid, position, -1).amax(-1, keepdim=True) if tokens else position
    # one synchronization for both checks
    binary, gapless = torch.stack([
        ((attention_mask == 0) | (attention_mask == 1)).all(),
        (valid == ((position >= first) & (position <= last))).all(),
    ]).tolist()  # fmt: skip
    if not binary:
        raise ValueError(f"attention_mask must hold only 0 and 1, got values up to {attention_mask.max().item()}")
    if not gapless:
        row = int((valid != ((position >= first) & (position <= last))).any(-1).nonzero()[0])
        raise ValueError(f"attention_mask must be padded on the left or the right only, row {row} has a hole")
    segments = torch.arange(batch, device=position.device)[:, None].expand(batch, tokens)
    return valid, first.expand_as(position), last.expand_as(position), segments, batch


def _packed(
    cu_seqlens: Tensor, batch: int, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    check_tensor("cu_seqlens", cu_seqlens, ["S + 1"], [torch.int32, torch.int64], device)
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of one row, got B = {batch}")
    bounds = cu_seqlens.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or not rising:
        raise ValueError(f"cu_seqlens must rise from 0 to T = {tokens}, got {bounds[:8]}{' ...' * (len(bounds) > 8)}")
    position = torch.arange(tokens, device=device)
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    # an empty sequence begins where the next one does: `right` passes over it
    segments = torch.searchsorted(cu_seqlens.long()[1:], position, right=True)[None]
    valid = torch.ones(1, tokens, dtype=torch.bool, device=device)
    first, last = begin[segments].int(), (end[segments] - 1).int()
    return valid, first, last, segments, len(bounds) - 1


def rows_looking_back(layout: Layout, horizon: tuple[int, int | None]) -> Tensor:
    """|T(s)|: how many rows of R look at column s from the horizon (Eq. 10). [B, T] int64."""
    tokens = layout.rows.shape[1]
    before = torch.nn.functional.pad(layout.rows.long().cumsum(-1), (1, 0))  # before[t]: rows of R below t
    position = torch.arange(tokens, device=layout.rows.device)
    lo, hi = horizon
    end = layout.last.long() + 1 if hi is None else torch.minimum(layout.last.long(), position + hi) + 1
    begin = torch.minimum(position + lo, end).clamp(min=0)
    return before.gather(1, end.clamp(min=0)) - before.gather(1, begin)


def mean_over_rows(values: Tensor, layout: Layout) -> Tensor:
    """Mean over R of values [B, HQ, T] (0 outside R), in a fixed order: [sequences, HQ] fp32, 0 if R is empty."""
    if layout.sequences == values.shape[0]:
        total, count = values.double().sum(-1), layout.rows.sum(-1)
    else:
        lengths = torch.bincount(layout.segments[0], minlength=layout.sequences)
        total = torch.segment_reduce(values[0].T.double().contiguous(), "sum", lengths=lengths, axis=0)
        count = torch.segment_reduce(layout.rows[0].double(), "sum", lengths=lengths)
    return (total / count.clamp(min=1)[:, None]).float()
