"""Greedy continuations of a sequence after one of its tokens was replaced."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rhythm_kernels.analysis.sources import end_tokens, generate


class Fork(NamedTuple):
    """One position of a sequence, the tokens that were put there, and the continuation after each of them."""

    position: int
    """The index in the sequence."""
    tokens: list[int]
    """The sequence's own token, then its alternatives, the most likely first."""
    probabilities: list[float]
    """The probability of each token."""
    continuations: list[list[int]]
    """The tokens after each token, up to the end of the answer or the limit; the token itself and the end token are not
    included."""


@torch.no_grad()
def roll_out(
    model: PreTrainedModel,
    tokenizer,
    ids: Tensor,
    positions: list[int],
    *,
    alternatives: int,
    new_tokens: int,
    refused: set[int] = frozenset(),
    shared: bool = True,
    progress=None,
) -> list[Fork]:
    """Forks a sequence at each position into its own token and the most likely other tokens.

    The sequence's own token is rolled out in the same batch as its alternatives, so that their continuations differ
    because of the token, and not because of the batch or the settings that the sequence was generated with.

    Args:
        ids: [T] int64, on the model's device.
        positions: the positions to fork at, in 1..T-1.
        alternatives: the number of alternatives at each position.
        new_tokens: the largest number of tokens after the forked one.
        refused: tokens that are never alternatives, beside those that end an answer.
        shared: whether all positions share one batch and one cache. Needs layers that see all tokens: with a sliding
            window or a recurrent state, each position gets its own batch, which computes its prefix for every row.
        progress: is called with 1 for each token by which all rows of the batch have grown.

    Raises:
        ValueError: `alternatives` is not below the number of allowed tokens.
    """
    ends = end_tokens(model)
    at = torch.tensor(positions, device=ids.device)
    output = model(ids[None, : int(at.max())], use_cache=True, logits_to_keep=at - 1)
    log_probs = output.logits[0].float().log_softmax(-1)  # [positions, V]
    own = ids[at]
    allowed = log_probs.clone().scatter_(1, own[:, None], -torch.inf)
    banned = sorted({*ends, *refused} & set(range(log_probs.shape[1])))
    allowed[:, torch.tensor(banned, dtype=torch.long, device=ids.device)] = -torch.inf
    if alternatives > int(allowed.isfinite().sum(1).min()):
        raise ValueError(f"alternatives must be fewer than the tokens of the model, got {alternatives}")
    most_likely = allowed.topk(alternatives, dim=1).indices
    tokens = torch.cat([own[:, None], most_likely], 1)  # [positions, 1 + alternatives]
    cache = output.past_key_values
    if shared and isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
        continuations = _on_one_cache(model, cache, at, tokens, new_tokens, ends, progress)
    else:
        continuations = []
        for position, forced in zip(positions, tokens.tolist(), strict=True):
            prompts = [[*ids[:position].tolist(), token] for token in forced]
            continuations += generate(model, tokenizer, prompts, max_new_tokens=new_tokens, progress=progress)
    continuations = [[token for token in row if token not in ends] for row in continuations]
    forks, width = [], tokens.shape[1]
    for i, position in enumerate(positions):
        probabilities = log_probs[i, tokens[i]].exp().tolist()
        forks.append(Fork(position, tokens[i].tolist(), probabilities, continuations[i * width : (i + 1) * width]))
    return forks


def _on_one_cache(
    model, cache: DynamicCache, positions: Tensor, tokens: Tensor, new_tokens: int, ends: set[int], progress
) -> list[list[int]]:
    """Continues all rows in one batch: each sees the cache up to its own position and counts on from there."""
    width = tokens.shape[1]
    at = positions.repeat_interleave(width)  # [rows]
    cache.batch_repeat_interleave(len(at))
    visible = torch.arange(int(positions.max()), device=at.device) < at[:, None]
    token = tokens.flatten()
    columns, ended = [], torch.zeros_like(at, dtype=torch.bool)
    end_tokens = torch.tensor(sorted(ends), dtype=torch.long, device=at.device)
    for step in range(new_tokens):
        visible = torch.cat([visible, torch.ones_like(visible[:, :1])], 1)
        output = model(
            token[:, None],
            attention_mask=visible.long(),
            position_ids=(at + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        token = output.logits[:, -1].argmax(-1)
        columns.append(torch.where(ended, -1, token))
        ended |= torch.isin(token, end_tokens)
        if progress:
            progress(1)
        if ended.all():
            break
    return [[token for token in row if token >= 0] for row in torch.stack(columns, 1).tolist()]
