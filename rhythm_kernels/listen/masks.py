"""Reads the sliding window from a model's own attention mask."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rhythm_kernels.host import fetch
from rhythm_kernels.statistics.layout import Layout

PROBES = 64
"""The number of rows at which a mask function is evaluated."""
MOST_SCORES = 2**24
"""The most mask entries held at a time."""


def is_mask(mask) -> bool:
    """Returns whether an attention mask says which keys each row sees; a [B, T] mask only marks padding."""
    return (isinstance(mask, Tensor) and mask.ndim == 4) or hasattr(mask, "mask_mod")


def packing_hint(layout: Layout) -> str:
    """Returns sentences on how to keep packed sequences apart; "" if none are packed."""
    if layout.sequences <= len(layout.rows):
        return ""
    return (
        " The row is packed. transformers' sdpa and eager attention keep its sequences apart only where position_ids "
        "say so: pass use_cache=False to the model, and no attention_mask. FlashAttention also does with all four "
        "of cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k. Megatron's own core attention only does with "
        "an attention_mask, Transformer Engine's with packed_seq_params."
    )


def window_of(mask, layout: Layout, layer: int) -> int | None:
    """Returns the sliding window of a mask, in tokens; None if the rows of R see the whole past of their sequence.

    Args:
        mask: [B or 1, heads or 1, T, T], bool or added to the scores; or a BlockMask of FlexAttention, which is
            evaluated at some rows of R.
        layer: named in the error.

    Raises:
        ValueError: rows of R see anything else, such as a chunk, a sparse choice or later tokens.

    The host waits twice for a GPU.
    """
    rows = layout.rows.any(0).nonzero().flatten()
    if not len(rows):
        return None
    if not isinstance(mask, Tensor):
        rows = _spread(rows)
    past = torch.arange(layout.rows.shape[1], device=rows.device) + 1 - layout.first  # [B, T]
    past = past.masked_fill(~layout.rows, 0)
    most = torch.zeros((), dtype=torch.long, device=rows.device)
    for part, seen in _parts(mask, rows, layout):
        most = torch.maximum(most, seen.sum(-1).masked_fill(~layout.rows[:, None, part], 0).amax())
    most = most.clamp(min=1)
    facts = [torch.stack([most, past.amax()])]
    for part, seen in _parts(mask, rows, layout):
        key, query = torch.arange(seen.shape[-1], device=part.device), part[:, None]
        begin = torch.maximum(layout.first[:, part], part + 1 - most)[:, None, :, None]
        wrong = ((seen != ((begin <= key) & (key <= query))).any(-1)) & layout.rows[:, None, part]
        # [1] and not 0-dim: the host would read an index without dimensions, and wait for the device
        first = wrong.flatten().long().argmax(keepdim=True)
        row, token = first // wrong[0].numel(), part[first % len(part)]
        sees = seen.sum(-1).flatten()[first]
        facts.append(torch.cat([wrong.any().long()[None], row, token, sees, past[row, token]]))
    (window, longest), *parts = (fact.tolist() for fact in fetch(facts))
    for is_wrong, row, token, sees, known in parts:
        if is_wrong:
            more = ": the model does not keep it from later tokens or from those of other sequences" * (sees > known)
            raise ValueError(
                f"collect needs attention to every earlier token or in a sliding window, got layer {layer}, where "
                f"token {token} of row {row} sees {sees} tokens of {known}{more}.{packing_hint(layout)}"
            )
    return None if window >= longest else window


def _parts(mask, rows: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the rows in parts, each with what it sees, bool [B, heads or 1, rows, T]. `rows` ascend."""
    batch, tokens = layout.rows.shape
    heads = mask.shape[1] if isinstance(mask, Tensor) else 1
    for part in rows.split(max(1, MOST_SCORES // max(1, batch * heads * tokens))):
        if isinstance(mask, Tensor):
            seen = mask[:, :, part]
            yield part, (seen if seen.dtype == torch.bool else seen == 0).expand(batch, -1, -1, -1)
        else:
            index = torch.arange(batch, device=rows.device)[:, None, None]
            key = torch.arange(tokens, device=rows.device)
            seen = mask.mask_mod(index, torch.zeros_like(index), part[:, None], key)
            yield part, seen.expand(batch, len(part), tokens)[:, None]


def _spread(positions: Tensor) -> Tensor:
    """Returns at most PROBES of these positions, evenly spaced, the first and the last among them."""
    if len(positions) <= PROBES:
        return positions
    return positions[torch.arange(PROBES, device=positions.device) * (len(positions) - 1) // (PROBES - 1)]
