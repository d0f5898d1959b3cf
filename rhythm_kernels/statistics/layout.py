"""Where sequences begin and end in a batch, padded or packed: the one form that every backend reads.

Shapes: B batch rows, T tokens, S sequences (B where the batch is not packed), H heads, HQ query heads.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhythm_kernels.checks import check_cuts
from rhythm_kernels.host import send
from rhythm_kernels.tensor_checks import at_hand, check_binary, check_cu_seqlens, check_tensor

Kept = TypeVar("Kept")


@dataclass(frozen=True, eq=False)
class Layout:
    """The sequences and rows of a batch. Row t sees key s of its batch row if first[t] <= s <= t.

    A layer may narrow that by a sliding window. One layout serves all layers of a batch and keeps what they derive
    from it.
    """

    first: Tensor
    """[B, T] int32: the first position of the token's own sequence; t + 1 for padding, which then sees nothing."""
    last: Tensor
    """[B, T] int32: the last position of the token's own sequence; t - 1 for padding."""
    rows: Tensor
    """[B, T] bool: the rows R, which are never padding."""
    segments: Tensor
    """[B, T] int64: the sequence of each token, 0 to S - 1; padding has that of its batch row."""
    bounds: tuple[tuple[int, int, int], ...]
    """(batch row, first position, one past the last position) of each sequence, on the host."""
    table: Tensor
    """[S, 3] int64: the bounds, on the device."""
    whole: bool = False
    """Whether R is known to be every token that is not padding. What follows from R then follows from the bounds, which
    the host has: on a GPU it takes a few launches in place of dozens."""
    _kept: dict = field(default_factory=dict, repr=False)

    @property
    def sequences(self) -> int:
        """S, the number of sequences."""
        return len(self.bounds)

    @property
    def padded(self) -> bool:
        """Whether the batch has padding."""
        return sum(end - begin for _, begin, end in self.bounds) < self.rows.numel()

    def slice(self, part: slice) -> "Layout":
        """Returns the layout of some batch rows; the batch is not packed."""
        begin = part.indices(len(self.rows))[0]
        bounds = tuple((b - begin, *ends) for b, *ends in self.bounds[part])
        table = self.table[part].clone()
        table[:, 0] -= begin
        tensors = self.first[part], self.last[part], self.rows[part], self.segments[part] - begin
        return Layout(*tensors, bounds, table, self.whole)

    def rows_looking_back(self, horizon: tuple[int, int | None]) -> Tensor:
        """Returns how many rows of R look at each column from its horizon, |T(s)| of Eq. 10, at least 1: [B, T] int32.

        Args:
            horizon: (lo, hi), in tokens; hi is None for the end of the sequence.
        """
        return self.keep(("looking back", *horizon), lambda: _rows_looking_back(self, horizon))

    def row_counts(self) -> Tensor:
        """Returns how many rows of R each sequence has: [S] int64."""
        return self.keep("row counts", lambda: _row_counts(self))

    def next_row(self) -> Tensor:
        """Returns the first row of R at or behind each position, T if there is none: [B, T + 1] int32."""
        return self.keep("next row", lambda: _next_row(self))

    def row_end(self) -> Tensor:
        """Returns one past the last row of R before each position, 0 if there is none: [B, T + 1] int32."""
        return self.keep("row end", lambda: _row_end(self))

    def tiles(self, block: int, order: str = "position", padding: bool = False) -> Tensor:
        """Cuts every sequence into tiles of `block` tokens, beginning with its own first token.

        A tile never holds tokens of two sequences, and its place in its sequence does not depend on the batch.

        Args:
            order: "position"; "past", the tiles with the most tokens of their sequence before them first; "future", the
                tiles with the most tokens behind their first one first.
            padding: adds tiles of padding, last. A kernel that writes its tiles then writes every token.

        Returns:
            int32 [tiles, 5], on the device: batch row, the tile's first token, the sequence's first token, one past
            its last token, and its index. A tile of padding has the bounds of its run of padding, and the index -1.
        """
        return self.keep(("tiles", block, order, padding), lambda: _tiles(self, block, order, padding))

    def keep(self, key: tuple | str, make: Callable[[], Kept]) -> Kept:
        """Returns what `make` returned for this key, and calls it only the first time."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def make_layout(
    batch: int,
    tokens: int,
    device: torch.device,
    response_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Layout:
    """Checks the masks and returns the layout of the batch.

    Args:
        response_mask: [B, T] bool on `device`, the rows R; None for all tokens that are not padding.
        attention_mask: [B, T] bool or int, 1 for tokens and 0 for padding, which is on the left or on the right.
        cu_seqlens: [S + 1] int32 or int64, the bounds of packed sequences. This and attention_mask may be on the CPU.
            On `device` they are waited for once.

    Raises:
        TypeError, ValueError: a mask of the wrong dtype, shape, device or content.
    """
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask and cu_seqlens exclude each other: packed sequences have no padding")
    if response_mask is not None:
        check_tensor("response_mask", response_mask, [batch, tokens], [torch.bool], device)
    if cu_seqlens is not None:
        bounds = _packed_bounds(cu_seqlens, batch, tokens, device)
    elif attention_mask is not None:
        bounds = _padded_bounds(attention_mask, batch, tokens, device)
    else:
        bounds = tuple((b, 0, tokens) for b in range(batch))

    # one copy: the bounds, the sequences' ends once more, side by side, and their first and last positions
    on_host = torch.tensor(bounds, dtype=torch.int64, device="cpu").view(-1, 3)
    ends_on_host = on_host[:, 1:] - torch.tensor([0, 1], device="cpu")
    parts = send(torch.cat([on_host.flatten(), on_host[:, 2], ends_on_host.flatten()]), device)
    table, behind, ends = parts.split([on_host.numel(), len(bounds), ends_on_host.numel()])
    table, ends = table.view(-1, 3), ends.view(-1, 2)
    every_token = None  # where there is no padding
    if cu_seqlens is not None:  # an empty sequence ends where the one before it does; `right` passes over both
        segments = torch.searchsorted(behind, torch.arange(tokens, device=device), right=True)[None]
        first, last = ends[segments[0]].mT.to(torch.int32, memory_format=torch.contiguous_format)[:, None]
    else:
        segments = torch.arange(batch, device=device)[:, None].expand(batch, tokens).contiguous()
        if attention_mask is None:
            first = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
            last = torch.full_like(first, tokens - 1)
        else:
            position, ends = torch.arange(tokens, dtype=torch.int32, device=device), ends.int()
            begin, end = ends[:, :1], ends[:, 1:]
            every_token = (begin <= position) & (position <= end)
            first, last = torch.where(every_token, begin, position + 1), torch.where(every_token, end, position - 1)
    if response_mask is None:
        rows = torch.ones_like(first, dtype=torch.bool) if every_token is None else every_token
    elif every_token is None:
        rows = response_mask.clone(memory_format=torch.contiguous_format)
    else:
        rows = (every_token & response_mask).contiguous()
    return Layout(first, last, rows, segments, bounds, table, response_mask is None)


def _padded_bounds(attention_mask: Tensor, batch: int, tokens: int, device: torch.device) -> tuple:
    dtypes = [torch.bool, torch.int64, torch.int32, torch.uint8]
    check_tensor("attention_mask", attention_mask, [batch, tokens], dtypes, at_hand(attention_mask, device))
    if batch * tokens == 0:
        return tuple((b, 0, tokens) for b in range(batch))
    valid = attention_mask != 0
    position = torch.arange(tokens, device=attention_mask.device)
    first = torch.where(valid, position, tokens).amin(-1)
    end = torch.where(valid, position, -1).amax(-1) + 1
    binary = ((attention_mask == 0) | (attention_mask == 1)).all(-1)
    gapless = valid.sum(-1) == (end - first).clamp(min=0)
    facts = torch.stack([first, end, binary.long(), gapless.long()], -1).tolist()  # the one synchronization
    for row, (_, _, is_binary, is_gapless) in enumerate(facts):
        if not is_binary:
            check_binary("attention_mask", attention_mask)
        if not is_gapless:
            raise ValueError(f"attention_mask must be padded on the left or the right only, row {row} has a hole")
    return tuple((row, min(first, end), end) for row, (first, end, *_) in enumerate(facts))


def _packed_bounds(cu_seqlens: Tensor, batch: int, tokens: int, device: torch.device) -> tuple:
    cuts = check_cu_seqlens(cu_seqlens, batch, at_hand(cu_seqlens, device)).tolist()
    check_cuts(cuts, tokens)
    return tuple((0, begin, end) for begin, end in itertools.pairwise(cuts))


def _rows_looking_back(layout: Layout, horizon: tuple[int, int | None]) -> Tensor:
    tokens, device = layout.rows.shape[1], layout.rows.device
    lo, hi = horizon
    if layout.whole:  # the tokens from s + lo to the last one, at most hi - lo + 1
        lo = min(lo, tokens)
        most = None if hi is None else max(1, min(hi, tokens) - lo + 1)
        return (layout.last - torch.arange(lo - 1, lo - 1 + tokens, dtype=torch.int32, device=device)).clamp(1, most)
    rows_before = pad(layout.rows.cumsum(-1), (1, 0))  # [B, T + 1] int64: the number of rows of R below t
    end = layout.last.long() + 1  # in padding the token itself
    if hi is not None:
        end = torch.minimum(end, torch.arange(hi + 1, hi + 1 + tokens, device=device))
    begin = torch.minimum(end, torch.arange(lo, lo + tokens, device=device))
    return (rows_before.gather(1, end) - rows_before.gather(1, begin)).clamp(min=1).int()


def _row_counts(layout: Layout) -> Tensor:
    if layout.whole:
        return layout.table[:, 2] - layout.table[:, 1]
    return sum_over_tokens(layout.rows[:, None], layout)[:, 0].contiguous()


def _next_row(layout: Layout) -> Tensor:
    batch, tokens = layout.rows.shape
    if layout.whole and not layout.padded:
        return torch.arange(tokens + 1, dtype=torch.int32, device=layout.rows.device).expand(batch, -1).contiguous()
    position = torch.arange(tokens, dtype=torch.int32, device=layout.rows.device)
    row_or_none = pad(torch.where(layout.rows, position, tokens), (0, 1), value=tokens)
    return row_or_none.flip(-1).cummin(-1).values.flip(-1).int().contiguous()


def _row_end(layout: Layout) -> Tensor:
    if layout.whole and not layout.padded:
        return layout.next_row()  # both are the position itself
    position_after = torch.arange(1, layout.rows.shape[1] + 1, dtype=torch.int32, device=layout.rows.device)
    return pad(position_after * layout.rows, (1, 0)).cummax(-1).values.int()


def _tiles(layout: Layout, block: int, order: str, padding: bool) -> Tensor:
    runs = [(*bounds, sequence) for sequence, bounds in enumerate(layout.bounds)]
    if padding:
        runs += [(*bounds, -1) for bounds in _padding(layout)]
    batch_row, begin, end, sequence = torch.tensor(runs, dtype=torch.int64, device="cpu").view(-1, 4).unbind(-1)
    count = (end - begin + block - 1) // block
    run = torch.repeat_interleave(torch.arange(len(count), device="cpu"), count)
    index = torch.arange(len(run), device="cpu") - (count.cumsum(0) - count)[run]
    start = begin[run] + index * block
    table = torch.stack([batch_row[run], start, begin[run], end[run], sequence[run]], -1)
    if order != "position":
        tokens = start - begin[run] if order == "past" else end[run] - start
        table = table[torch.where(table[:, 4] < 0, -1, tokens).argsort(descending=True, stable=True)]
    return send(table.int(), layout.rows.device)


def _padding(layout: Layout) -> list[tuple[int, int, int]]:
    """Returns (batch row, first position, one past the last position) of the padding before and behind sequences."""
    batch, tokens = layout.rows.shape
    if layout.sequences != batch:  # packed
        return []
    return [(row, *ends) for row, begin, end in layout.bounds for ends in ((0, begin), (end, tokens))]


def sum_over_tokens(x: Tensor, layout: Layout) -> Tensor:
    """Returns the sum of integers or bools [B, H, T] over the tokens of each sequence: int64 [S, H]."""
    if layout.sequences == len(x):
        return x.long().sum(-1)
    out = torch.zeros(layout.sequences, x.shape[1], dtype=torch.int64, device=x.device)
    return out.index_add_(0, layout.segments.flatten(), x.long().transpose(1, 2).flatten(0, 1))
