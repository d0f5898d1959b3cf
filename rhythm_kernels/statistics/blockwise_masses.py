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
    lengths = {"first_mass": [options.first_keys] * layout.sequences}
    if "prefix_mass" in options.more:
        lengths["prefix_mass"] = options.prefix_lengths.tolist()
    return {
        name: _prefix_mass(q, k, lse, layout, options, lengths[name])
        if name in lengths
        else _self_mass(q, k, lse, layout, options)
        for name in masses_of(options)
    }


def _prefix_mass(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options, lengths: list[int]) -> Tensor:
    """Returns the weight of each row on the first tokens of its sequence, so many in each sequence."""
    mass = q.new_zeros(q.shape[:3], dtype=torch.float32)
    for (batch_row, begin, end), length in zip(layout.bounds, lengths, strict=True):
        key_end = min(begin + max(length, 0), end)
        row_end = end
        if options.sliding_window is not None:  # rows further on see none of these keys
            row_end = min(end, key_end + options.sliding_window - 1)
        if key_end == begin:
            continue
        keys = k[batch_row, :, begin:key_end].float().mT  # [H, D, keys]
        most = max(1, MASS_BYTES // (4 * q.shape[1] * keys.shape[-1]))
        for at in range(begin, row_end, most):
            rows = slice(at, min(at + most, row_end))
            in_response = layout.rows[batch_row, rows]
            if in_response.any():
                weights = _weights(q[batch_row, :, rows], keys, lse[batch_row, :, rows], options)
                row, key = (
                    torch.arange(*ends, device=q.device) for ends in ((rows.start, rows.stop), (begin, key_end))
                )
                distance = row[:, None] - key
                visible = distance >= 0
                if options.sliding_window is not None:
                    visible &= distance < options.sliding_window
                total = weights.masked_fill_(~visible, 0.0).sum(-1)
                mass[batch_row, :, rows] = torch.where(in_response, total, 0.0)
    return mass


def _weights(q: Tensor, keys: Tensor, lse: Tensor, options: Options) -> Tensor:
    """Returns A of a few rows, hidden keys too, fp32 [HQ, rows, keys]. q: [HQ, rows, D], keys: [H, D, keys]."""
    queries = q.float().mul(options.scale).reshape(len(keys), -1, q.shape[-1])  # [H, HQ / H * rows, D]
    scores = softcapped((queries @ keys).view(*q.shape[:2], -1), options)
    return scores.sub_(lse[..., None]).exp_()


def _self_mass(q: Tensor, k: Tensor, lse: Tensor, layout: Layout, options: Options) -> Tensor:
    """Returns the weight of each row on its own token."""
    queries = q.float().mul(options.scale).unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))  # [B, H, HQ / H, T, D]
    scores = softcapped((queries * k.float()[:, :, None]).sum(-1).flatten(1, 2), options)
    return torch.where(layout.rows[:, None], scores.sub_(lse).exp_(), 0.0)
