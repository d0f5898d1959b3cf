"""Reads where the sequences of a forward begin and end, from the arguments of its decoder."""

from types import EllipsisType

import torch
from torch import Tensor

from rhythm_kernels.host import fetch
from rhythm_kernels.tensor_checks import check_binary

SHARED = "ranks that share a sequence are named by parallel=Parallel(tokens=group)"


def find_sequences(
    arguments: dict, batch: int, outer_mask: object = ..., known: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Returns (attention_mask [B, T], cu_seqlens [S + 1]) of a forward, on the CPU; at least one of them is None.

    Args:
        arguments: the arguments of the decoder's forward, by name. The host waits for a GPU once, to fetch them.
        outer_mask: the attention_mask of a model around the decoder, None if it got none; ... without such a model.
        known: cu_seqlens on the CPU, if the caller has it; positions and bounds are then not read.

    Raises:
        ValueError: a mask of another kind, padding in a packed row, packed rows in a batch of several, positions of
            a shard.
    """
    mask, cu_seqlens, position_ids = _padding_mask(arguments.get("attention_mask"), outer_mask), known, None
    if known is None:
        cu_seqlens, position_ids = arguments.get("cu_seq_lens_q"), arguments.get("position_ids")
    fetched = iter(fetch([x for x in (mask, cu_seqlens, position_ids) if x is not None]))
    mask, cu_seqlens, position_ids = (None if x is None else next(fetched) for x in (mask, cu_seqlens, position_ids))
    if mask is not None and mask.is_floating_point():  # PEFT makes it one where it adds virtual tokens
        check_binary("attention_mask", mask)
        mask = mask.bool()
    if position_ids is not None:
        position_ids = _text_positions(position_ids, mask is None)
        _check_begin(position_ids)
        if cu_seqlens is None:
            cu_seqlens = _packed_bounds(position_ids, mask, batch)
    if cu_seqlens is None or mask is None:
        return mask, cu_seqlens
    if not (mask == 1).all():
        raise ValueError(
            "packed sequences have no padding, got sequence bounds (position_ids that restart, or cu_seq_lens_q) "
            f"beside an attention_mask with {int((mask != 1).sum())} masked tokens"
        )
    return None, cu_seqlens


def _padding_mask(mask: object, outer: object | EllipsisType) -> Tensor | None:
    """Returns the attention_mask [B, T]: the decoder's, or the outer model's if it built the decoder's from that."""
    if mask is not None and not _is_2d(mask):
        shown = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        mask = outer
        if mask is not None and not _is_2d(mask):
            raise ValueError(f"collect needs attention_mask as [B, T], got {shown}")
    return mask


def _is_2d(mask: object) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _text_positions(position_ids: Tensor, must_separate: bool) -> Tensor:
    """Returns positions [B or 1, T]: the text axis of those that models of images have, [3 or 4, B, T].

    Raises:
        ValueError: sequences must be told apart by the positions, and these are positions in images.
    """
    if position_ids.ndim <= 2:
        return position_ids.view(-1, position_ids.shape[-1]) if position_ids.ndim else position_ids.view(1, 1)
    if len(position_ids) == 3 and must_separate and (position_ids != position_ids[:1]).any():
        raise ValueError(
            "position_ids must be of text where there is no attention_mask to tell sequences apart, "
            f"got {list(position_ids.shape)} with positions in images"
        )
    return position_ids[0]


def _check_begin(position_ids: Tensor) -> None:
    """Raises ValueError for rows that begin inside a sequence. By custom, padding at the left has position 0 or 1."""
    first = position_ids[:, :1]
    if (first > 1).any():
        raise ValueError(f"collect needs whole sequences, got position_ids that begin at {int(first.max())}: {SHARED}")


def _packed_bounds(position_ids: Tensor, mask: Tensor | None, batch: int) -> Tensor | None:
    """Returns cu_seqlens int32 [S + 1] where positions restart inside a row; None if they do not.

    With an attention_mask, only a return to 0 between two tokens counts: padding may have any position.
    """
    restarts = torch.diff(position_ids, dim=-1) != 1
    if mask is not None:
        is_token = mask.bool()
        restarts = restarts & is_token[:, 1:] & is_token[:, :-1] & (position_ids[:, 1:] == 0)
    if not restarts.any():
        return None
    if batch != 1:
        raise ValueError(f"packed sequences need a batch of one row, got B = {batch} with position_ids that restart")
    starts = restarts[0].nonzero().flatten() + 1
    wrong = starts[position_ids[0, starts] != 0]
    if len(wrong):
        token = int(wrong[0])
        raise ValueError(
            f"position_ids must go on by 1 in a packed row or restart at 0, got {int(position_ids[0, token])} after "
            f"{int(position_ids[0, token - 1])} at token {token}: padding is a sequence too, and {SHARED}"
        )
    ends = starts.new_tensor([position_ids.shape[1]])
    return torch.cat([starts.new_zeros(1), starts, ends]).int()
