"""What a model writes after a token that it is made to take: greedy continuations of one sequence's prefixes."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rhythm_kernels.analysis.sources import generate


class Fork(NamedTuple):
    """A place in a sequence, the tokens that could stand there, and what follows each."""

    place: int
    """In the sequence."""
    tokens: list[int]
    """The sequence's own token, then its alternatives, the likeliest first."""
    probabilities: list[float]
    continuations: list[list[int]]
    """Of each token, without it; to the end of the answer, its end token left out, or as far as it was let."""


@torch.no_grad()
def roll_out(
    model: PreTrainedModel,
    tokenizer,
    ids: Tensor,
    places: list[int],
    *,
    alternatives: int,
    new_tokens: int,
    refused: set[int] = frozenset(),
    shared: bool = True,
    progress=None,
) -> list[Fork]:
    """Forks a sequence at each place into its own token and the ones next most likely there.

    The sequence's own token is rolled out as well, beside its alternatives: a continuation differs from it by the token
    alone, not by the batch or the settings that the sequence was generated with.

    Args:
        ids: [T] int64, on the model's device.
        places: in 1..T-1.
        alternatives: at each place.
        new_tokens: at most, after the forked token.
        refused: tokens that are no alternatives; those that end an answer never are.
        shared: one batch for all places, on one cache, where every layer sees all tokens. With a sliding window, a
            state or False, each place is a batch of its own, and its prefix is computed for every row.
        progress: called with 1 for each token that all rows of the batch have grown by.
    """
    ends = _ends(model)
    rows = torch.tensor(places, device=ids.device)
    output = model(ids[None, : int(rows.max())], use_cache=True, logits_to_keep=rows - 1)
    log_probs = output.logits[0].float().log_softmax(-1)  # [places, V]
    own = ids[rows]
    allowed = log_probs.clone().scatter_(1, own[:, None], -torch.inf)
    banned = sorted({*ends, *refused} & set(range(log_probs.shape[1])))
    allowed[:, torch.tensor(banned, dtype=torch.long, device=ids.device)] = -torch.inf
    if alternatives > int(allowed.isfinite().sum(1).min()):
        raise ValueError(f"alternatives must be fewer than the tokens of the model, got {alternatives}")
    likely = allowed.topk(alternatives, dim=1).indices
    tokens = torch.cat([own[:, None], likely], 1)  # [places, 1 + alternatives]
    cache = output.past_key_values
    if shared and isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
        made = _on_one_cache(model, cache, rows, tokens, new_tokens, ends, progress)
    else:
        made = []
        for place, forced in zip(places, tokens.tolist(), strict=True):
            prompts = [[*ids[:place].tolist(), token] for token in forced]
            made += generate(model, tokenizer, prompts, max_new_tokens=new_tokens, progress=progress)
    made = [[token for token in row if token not in ends] for row in made]
    width = tokens.shape[1]
    return [
        Fork(place, tokens[i].tolist(), log_probs[i, tokens[i]].exp().tolist(), made[i * width : (i + 1) * width])
        for i, place in enumerate(places)
    ]


def _on_one_cache(
    model, cache: DynamicCache, places: Tensor, tokens: Tensor, new_tokens: int, ends: set[int], progress
) -> list[list[int]]:
    """All rows in one batch: each sees the cache up to its own place, and its tokens' positions go on from there."""
    width = tokens.shape[1]
    at = places.repeat_interleave(width)  # [rows]
    cache.batch_repeat_interleave(len(at))
    seen = torch.arange(int(places.max()), device=at.device) < at[:, None]
    token = tokens.flatten()
    made, ended = [], torch.zeros_like(at, dtype=torch.bool)
    end_tokens = torch.tensor(sorted(ends), dtype=torch.long, device=at.device)
    for step in range(new_tokens):
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        output = model(
            token[:, None],
            attention_mask=seen.long(),
            position_ids=(at + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        token = output.logits[:, -1].argmax(-1)
        made.append(torch.where(ended, -1, token))
        ended |= torch.isin(token, end_tokens)
        if progress:
            progress(1)
        if ended.all():
            break
    return [[token for token in row if token >= 0] for row in torch.stack(made, 1).tolist()]


def _ends(model: PreTrainedModel) -> set[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) - {None}
