"""Engines, which sample answers from the policy; and the one that is embedded, on transformers.

The other engine is vLLM, in vllm_engine.py.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

STAGE = 24  # tokens; shorter stages drop finished answers sooner, and cut the cache more often

Progress = Callable[[int, int], object]
"""Called with the answers that are done and the tokens that were made since the last call."""


class Sampling(NamedTuple):
    """How to sample; the same seed, prompts and weights give the same answers."""

    max_completion_length: int
    """Tokens, the end of sequence included."""
    temperature: float | None = 1.0
    """None is greedy; log-probabilities are then those at 1."""
    seed: int = 0


class Completion(NamedTuple):
    ids: list[int]
    """The answer's tokens, the end of sequence included if it ended by itself."""
    log_probs: list[float]
    """Natural logarithms, at the temperature, as the engine computed them."""
    finish_reason: str
    """"stop": ended by itself; "length": cut off."""


class Engine(Protocol):
    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """Returns `n` answers to each prompt, a group adjacent: i*n .. i*n+n-1 answer prompt i."""

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights: whole tensors under the names of the model's parameters."""

    def sleep(self) -> None:
        """Gives up what memory it can until `wake`."""

    def wake(self) -> None:
        """Makes ready to generate."""

    def close(self) -> None:
        """Frees what it holds; it is of no use afterwards."""


class TransformersEngine:
    """Samples in batches with a key-value cache, from the policy itself or, where that is sharded, from a copy.

    It samples STAGE tokens of all rows; then the answers that ended leave the batch, and their rows leave the cache.

    Args:
        stops: tokens that end an answer.
        is_copy: the model is not the policy, so weights are copied into it.
    """

    def __init__(self, model: PreTrainedModel, *, stops: list[int], pad: int, batch_size: int, is_copy: bool = False):
        self.model, self.stops, self.pad, self.batch_size, self.is_copy = model, stops, pad, batch_size, is_copy

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.is_copy:
            own = self.model.state_dict()
            for name, weight in weights:
                own[name].copy_(weight)

    def sleep(self) -> None:
        pass

    wake = close = sleep

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        rows = [prompt for prompt in prompts for _ in range(n)]
        completions: list[Completion] = []
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _generating(self.model):
            torch.manual_seed(sampling.seed)
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                completions += self._answer(batch, sampling, progress or (lambda answers, tokens: None))
        return completions

    def _answer(self, prompts: list[list[int]], sampling: Sampling, progress: Progress) -> list[Completion]:
        """Returns an answer to each prompt of one batch."""
        inputs, mask = self._pad(prompts)
        tokens: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        reasons = ["length"] * len(prompts)
        going, left, cache = list(range(len(prompts))), sampling.max_completion_length, None
        while going and left:
            new, new_log_probs, cache = self._continue(inputs, mask, cache, min(STAGE, left), sampling.temperature)
            left -= new.shape[1]
            is_stop = self._is_stop(new)
            ended, counts = is_stop.any(-1), (is_stop.cumsum(-1) - is_stop.long() == 0).sum(-1)  # with the first stop
            for row, new_ids, values, count, end in zip(
                going, new.tolist(), new_log_probs.tolist(), counts.tolist(), ended.tolist(), strict=True
            ):
                tokens[row] += new_ids[:count]
                log_probs[row] += values[:count]
                reasons[row] = "stop" if end else "length"
            progress(int(ended.sum()), int(counts.sum()))
            going = [row for row in going if reasons[row] != "stop"]
            if ended.any() and going:
                cache.batch_select_indices((~ended).nonzero().flatten())
            inputs, mask = new[~ended, -1:], torch.cat([mask, torch.ones_like(new)], 1)[~ended]
        progress(len(going), 0)
        return list(map(Completion, tokens, log_probs, reasons))

    def _pad(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Returns the prompts padded on the left and their attention mask, [rows, width] int64."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return ids.to(self.model.device), mask.to(self.model.device)

    def _is_stop(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.stops, device=ids.device))

    def _continue(
        self, inputs: Tensor, mask: Tensor, cache: Cache | None, most: int, temperature: float | None
    ) -> tuple[Tensor, Tensor, Cache]:
        """Samples up to `most` tokens of each row, fewer where all rows have ended.

        Args:
            inputs: [rows, width] the prompts; in later stages [rows, 1] the last tokens.
            mask: [rows, length] which of all tokens so far are no padding.
            cache: holds all tokens before `inputs`; None in the first stage.

        Returns:
            The new tokens and their log-probabilities, [rows, new], and the cache of all but the last.
        """
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        tokens, log_probs = [], []
        has_ended = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        while len(tokens) < most and not has_ended.all():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            output = self.model(
                inputs,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{name: cache},
            )
            cache, logits = output[name], output.logits[:, -1]
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (temperature or 1.0)
            token = scores.argmax(-1, True) if temperature is None else scores.softmax(-1).multinomial(1)
            tokens.append(token)
            log_probs.append(scores.gather(-1, token) - scores.logsumexp(-1, True))
            has_ended |= self._is_stop(token[:, 0])
            inputs, mask = token, torch.cat([mask, torch.ones_like(token)], 1)
        return torch.cat(tokens, 1), torch.cat(log_probs, 1), cache


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Gives the model transformers' own attention, for batches padded on the left, and evaluation mode, for a cache."""
    attention, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
