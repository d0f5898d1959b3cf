"""The masses of the blockwise backend: how much of a row lies on the first tokens of its sequence, or on itself.

Given the log-sum-exp, only the keys that count are read, for one sequence at a time.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k; S sequences.
"""

import torch
from torch import Tensor

from rhythm_kernels.statistics.blockwise_scores import softcapped
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.more import masses_of
from rhythm_kernels.statistics.options import Options

MASS_BYTES = 4 << 20  # of fp32 scores held at once: what fits a cache is faster


def masses(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options) -> dict[str, Tensor]:
    """Returns the masses that are asked for by their names, each fp32 [B, HQ, T], 0 outside R. lse: [B, HQ, T]."""
    if lse.numel() == 0:  # no token, or no head of a group
        return {name: torch.zeros_like(lse) for name in masses_of(options)}
    inputs = q, k, lse, layout, options
    definitions = {
        "first_mass": lambda: _prefix_mass(*inputs, [options.first_keys] * layout.sequences),
        "prefix_mass": lambda: _prefix_mass(*inputs, options.prefix_lengths.tolist()),
        "self_mass": lambda: _self_mass(*inputs),
    }
    return {name: definitions[name]() for name in masses_of(options)}


def _prefix_mass(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, lengths: list[int]) -> Tensor:
    """Returns the weight of each row on the first tokens of its sequence, so many in each sequence."""
    mass = q.new_zeros(q.shape[:3], dtype=torch.float32)
    for (batch_row, begin, end), length in zip(layout.bounds, lengths, strict=True):
        key_end = min(begin + max(length, 0), end)
        if key_end == begin:
            continue
        row_end = end
        if options.sliding_window is not None:  # rows further on see none of these keys
            row_end = min(end, key_end + options.sliding_window - 1)
        keys = k[batch_row, :, begin:key_end].float().mT  # [H, D, keys]
        most = max(1, MASS_BYTES // (4 * q.shape[1] * keys.shape[-1]))
        for at in range(begin, row_end, most):
            rows = slice(at, min(at + most, row_end))
            in_response = layout.rows[batch_row, rows]
            if in_response.any():
                seen = keys[..., : rows.stop - begin]
                weights = _weights(q[batch_row, :, rows], seen, lse[batch_row, :, rows], at - begin, options)
                mass[batch_row, :, rows] = torch.where(in_response, weights.sum(-1), 0.0)
    return mass


def _weights(q: Tensor, keys: Tensor, lse: Tensor, behind: int, options: Options) -> Tensor:
    """Returns A of a few rows and the first keys of their sequence, fp32 [HQ, rows, keys], 0 where it is hidden.

    Args:
        q: [HQ, rows, D].
        keys: [H, D, keys].
        lse: [HQ, rows].
        behind: how many tokens the first row is behind the first key.
    """
    queries = q.float().mul(options.scale).reshape(len(keys), -1, q.shape[-1])  # [H, HQ / H * rows, D]
    scores = softcapped((queries @ keys).view(*q.shape[:2], -1), options)
    row, key = (torch.arange(size, device=q.device) for size in scores.shape[1:])
    distance = behind + row[:, None] - key
    hidden = distance < 0
    if options.sliding_window is not None:
        hidden |= distance >= options.sliding_window
    return scores.sub_(lse[..., None]).exp_().masked_fill_(hidden, 0.0)


def _self_mass(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options) -> Tensor:
    """Returns the weight of each row on its own token."""
    batch, heads, tokens, size = q.shape
    mass = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    most = max(1, MASS_BYTES // (4 * batch * heads * size))
    for at in range(0, tokens, most):
        part = slice(at, at + most)
        queries = q[:, :, part].float().mul(options.scale).unflatten(1, (k.shape[1], -1))  # [B, H, HQ / H, rows, D]
        scores = softcapped((queries * k[:, :, None, part].float()).sum(-1).flatten(1, 2), options)
        mass[:, :, part] = torch.where(layout.rows[:, None, part], scores.sub_(lse[:, :, part]).exp_(), 0.0)
    return mass
