"""Continuations of sequences after one of their tokens was replaced, greedy or sampled."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rhythm_kernels.analysis.decoding import grouped_decoding
from rhythm_kernels.analysis.room import roomy_cache
from rhythm_kernels.analysis.sources import end_tokens, generate


class Start(NamedTuple):
    """A sequence and where it is forked."""

    ids: list[int]
    positions: list[int]
    """The indices of the tokens that are replaced, in 1..T-1, at least one."""
    limit: int
    """The largest number of tokens of the sequence with a continuation."""


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
    ended: list[bool]
    """Whether the model ended each continuation itself."""


class Row(NamedTuple):
    """A continuation to compute."""

    sequence: int
    """The index of its sequence."""
    position: int
    """The index in the sequence of the token that is replaced."""
    token: int
    """The token that is put there. If it ends an answer, nothing follows."""
    new_tokens: int
    """The largest number of tokens after it."""


@torch.no_grad()
def roll_out(
    model: PreTrainedModel,
    tokenizer,
    starts: list[Start],
    *,
    alternatives: int,
    new_tokens: int | None = None,
    refused: set[int] = frozenset(),
    shared: bool = True,
    progress: Callable[[int], object] = lambda _: None,
) -> list[list[Fork]]:
    """Forks sequences at their positions into the token that is there and the most likely other tokens.

    The sequence's own token is rolled out in the same batch as its alternatives, so that their continuations differ
    because of the token, and not because of the batch or the settings that the sequence was generated with.

    Args:
        starts: the sequences, [n].
        alternatives: the number of alternatives at each position.
        new_tokens: the largest number of tokens after the forked one; None: up to the limit of the sequence.
        refused: tokens that are never alternatives, beside those that end an answer.
        shared: whether all continuations share one batch. It begins from the caches of the sequences where all layers
            see all tokens; with sliding windows it computes the prefix of every row. With a recurrent state, which
            padding would change, each position has its own batch in any case.
        progress: is called with 1 for each token by which a batch has grown.

    Returns:
        The forks of each sequence, [n].

    Raises:
        ValueError: `alternatives` is not below the number of allowed tokens.
    """
    if not starts:
        return []
    ends = end_tokens(model)
    caches, forks, rows = [], [], []
    for index, start in enumerate(starts):
        ids = torch.tensor(start.ids, device=model.device)
        at = torch.tensor(start.positions, device=model.device)
        output = model(ids[None, : max(start.positions)], use_cache=True, logits_to_keep=at - 1)
        log_probs = output.logits[0].float().log_softmax(-1)  # [positions, V]
        tokens = _candidates(log_probs, ids[at], alternatives, ends | refused)
        caches.append(output.past_key_values)
        for position, chosen, likely in zip(start.positions, tokens.tolist(), log_probs.exp(), strict=True):
            room = max(0, start.limit - position - 1)
            room = room if new_tokens is None else min(room, new_tokens)
            rows += [Row(index, position, token, room) for token in chosen]
            forks.append(Fork(position, chosen, likely[chosen].tolist(), [], []))
    sequences = [start.ids for start in starts]
    grown = iter(continue_rows(model, tokenizer, sequences, caches, rows, shared=shared, progress=progress))
    for fork in forks:
        for tokens in (next(grown) for _ in fork.tokens):
            fork.continuations.append([token for token in tokens if token not in ends])
            fork.ended.append(bool(tokens) and tokens[-1] in ends)
    of_each = iter(forks)
    return [[next(of_each) for _ in start.positions] for start in starts]


@torch.no_grad()
def continue_rows(
    model: PreTrainedModel,
    tokenizer,
    sequences: list[list[int]],
    caches: list[Cache],
    rows: list[Row],
    *,
    temperature: float = 0.0,
    shared: bool = True,
    progress: Callable[[int], object] = lambda _: None,
) -> list[list[int]]:
    """Returns the tokens after the token of each row, up to the end of the answer (included) or the row's limit.

    Args:
        sequences: token ids, [n].
        caches: the keys and values of each sequence, at least up to the last position of its rows.
        rows: the continuations, sorted by sequence.
        temperature: 0 for the most likely tokens, else they are drawn by torch's generator.
        shared, progress: as in `roll_out`.
    """
    ends = end_tokens(model)
    if shared and all(map(_sees_all, caches)):
        return _on_one_cache(model, caches, rows, ends, temperature, progress)
    shared = shared and all(map(_only_attends, caches))
    return _from_the_beginning(model, tokenizer, sequences, rows, ends, temperature, shared, progress)


@torch.no_grad()
def answer_prompts(
    model: PreTrainedModel,
    tokenizer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    progress: Callable[[int], object] = lambda _: None,
) -> list[list[int]]:
    """Returns what `generate` returns, faster for many prompts: answers that have ended leave the batch.

    An answer is the continuation of its prompt's last token. Prompts of one token, and those that end with a token that
    ends answers, are left to `generate`.
    """
    ends = end_tokens(model)
    if any(len(prompt) < 2 or prompt[-1] in ends for prompt in prompts):
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "progress": progress}
        return generate(model, tokenizer, prompts, **options)
    befores = (torch.tensor([prompt[:-1]], device=model.device) for prompt in prompts)
    caches = [model(before, use_cache=True, logits_to_keep=1).past_key_values for before in befores]
    rows = [Row(index, len(prompt) - 1, prompt[-1], max_new_tokens) for index, prompt in enumerate(prompts)]
    return continue_rows(model, tokenizer, prompts, caches, rows, temperature=temperature, progress=progress)


def _candidates(log_probs: Tensor, own: Tensor, alternatives: int, refused: set[int]) -> Tensor:
    """Returns each position's own token and its alternatives, [positions, 1 + alternatives]."""
    allowed = log_probs.clone().scatter_(1, own[:, None], -torch.inf)
    banned = sorted(refused & set(range(log_probs.shape[1])))
    allowed[:, torch.tensor(banned, dtype=torch.long, device=own.device)] = -torch.inf
    if alternatives > int(allowed.isfinite().sum(1).min()):
        raise ValueError(f"alternatives must be fewer than the tokens of the model, got {alternatives}")
    return torch.cat([own[:, None], allowed.topk(alternatives, dim=1).indices], 1)


def _sees_all(cache) -> bool:
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _only_attends(cache) -> bool:
    """Returns whether padding before a sequence, which is masked, leaves its states as they are."""
    return isinstance(cache, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def _from_the_beginning(
    model,
    tokenizer,
    sequences: list[list[int]],
    rows: list[Row],
    ends: set[int],
    temperature: float,
    shared: bool,
    progress,
) -> list[list[int]]:
    """Continues rows without a cache of their sequences: all in one batch if `shared`, else position by position."""
    grown: list[list[int]] = [[] for _ in rows]
    for _, group in groupby(enumerate(rows), lambda one: None if shared else (*one[1][:2], one[1].new_tokens)):
        going = [(index, row) for index, row in group if row.new_tokens and row.token not in ends]
        prompts = [[*sequences[row.sequence][: row.position], row.token] for _, row in going]
        if prompts:
            most = max(row.new_tokens for _, row in going)
            options = {"max_new_tokens": most, "temperature": temperature, "progress": progress}
            for (index, row), tokens in zip(going, generate(model, tokenizer, prompts, **options), strict=True):
                grown[index] = tokens[: row.new_tokens]
    return grown


def _on_one_cache(
    model, caches: list[DynamicCache], rows: list[Row], ends: set[int], temperature: float, progress
) -> list[list[int]]:
    """Continues all rows in one batch: each sees its sequence up to its own position and counts on from there.

    Rows that have ended leave the batch when they are a quarter of it.
    """
    device = model.device
    cache = _joined(caches, rows)
    at = torch.tensor([row.position for row in rows], device=device)
    visible = torch.arange(cache.get_seq_length(), device=device) < at[:, None]
    token = torch.tensor([row.token for row in rows], device=device)
    room = torch.tensor([row.new_tokens for row in rows], device=device)
    index = torch.arange(len(rows), device=device)  # of the rows in the batch
    end = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    grown: list[list[int]] = [[] for _ in rows]
    going, step = (room > 0) & ~torch.isin(token, end), 0
    with grouped_decoding(model):
        while going.any():
            if 4 * going.sum() <= 3 * len(going):
                kept = going.nonzero().flatten()
                cache.batch_select_indices(kept)
                at, visible, token, room, index, going = (x[kept] for x in (at, visible, token, room, index, going))
            visible = pad(visible, (0, 1), value=True)
            output = model(
                token[:, None],
                attention_mask=visible.long(),
                position_ids=(at + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            token, step = _choose(output.logits[:, -1], temperature), step + 1
            for row, new, goes in zip(index.tolist(), token.tolist(), going.tolist(), strict=True):
                if goes:
                    grown[row].append(new)
            going &= (room > step) & ~torch.isin(token, end)
            progress(1)
    return grown


def _choose(logits: Tensor, temperature: float) -> Tensor:
    """Returns a token for each row of logits [n, V], [n]."""
    if temperature == 0:
        return logits.argmax(-1)
    # torch.multinomial would draw a number for each word, which on a CPU takes longer than a model's own products.
    # The sum is in fp64: in fp32 it would lose the many words whose probability is below its rounding.
    sums = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    drawn = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=sums.shape[1] - 1)


def _joined(caches: list[DynamicCache], rows: list[Row]) -> Cache:
    """Returns one cache with a row for each continuation; caches that are shorter than others end in zeros."""
    counts = Counter(row.sequence for row in rows)
    size = max(row.position for row in rows)
    joined = roomy_cache()
    for layer in range(len(caches[0].layers)):

        def parts(name: str, layer: int = layer) -> Iterator[Tensor]:
            for sequence, count in counts.items():
                values = getattr(caches[sequence].layers[layer], name)[:, :, :size]  # [1, H, tokens, D]
                yield pad(values, (0, 0, 0, size - values.shape[2])).expand(count, -1, -1, -1)

        joined.update(torch.cat(list(parts("keys"))), torch.cat(list(parts("values"))), layer)
    return joined
