"""Answers sampled from the policy: what an engine is, and the embedded one, transformers' generate.

The other engine is vLLM, in vllm_engine.py.
"""

import inspect
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from train.distributed import copy_weights

# Tokens. Shorter stages drop finished answers sooner, and cut the cache more often.
STAGE = 24

Progress = Callable[[int, int], object]
"""Told of answers that are done and tokens that were made since the last call."""


class Sampling(NamedTuple):
    """How to sample; the same seed, prompts and weights give the same answers."""

    max_completion_length: int
    """Tokens, the end of sequence included."""
    temperature: float | None = 1.0
    """None is greedy; log-probabilities are then those at 1."""
    seed: int = 0


class Completion(NamedTuple):
    ids: list[int]
    """With the end of sequence, if it ended by itself."""
    log_probs: list[float]
    """Natural log, of each id at the temperature, as the engine computed them."""
    finish_reason: str
    """"stop": ended by itself; "length": cut off."""


class Engine(Protocol):
    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """`n` answers to each prompt, a group adjacent: i*n .. i*n+n-1 answer prompt i."""

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights: whole tensors under the names of the model's parameters."""

    def sleep(self) -> None:
        """Gives up what memory it can until `wake`."""

    def wake(self) -> None:
        """Makes ready to generate."""

    def close(self) -> None:
        """Frees what it holds; it is of no use afterwards."""


class TransformersEngine:
    """Batched sampling with a key-value cache, from the policy itself or, where that is sharded, from a copy.

    generate() computes finished answers on to the end of the longest. So it is called for STAGE tokens at a time, and
    only the answers that are still open go into the next stage, with their part of the cache.
    """

    def __init__(self, model: PreTrainedModel, *, stops: list[int], pad: int, batch_size: int, is_copy: bool = False):
        """`stops` are the tokens that end an answer; `is_copy`: the model is not the policy, so weights are copied."""
        self.model, self.stops, self.pad, self.batch_size, self.is_copy = model, stops, pad, batch_size, is_copy

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.is_copy:
            copy_weights(self.model, weights)

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        asked = [prompt for prompt in prompts for _ in range(n)]
        made: list[Completion] = []
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _generating(self.model):
            torch.manual_seed(sampling.seed)
            for start in range(0, len(asked), self.batch_size):
                made += self._batch(asked[start : start + self.batch_size], sampling, progress or (lambda *_: None))
        return made

    def _batch(self, prompts: list[list[int]], sampling: Sampling, progress: Progress) -> list[Completion]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        attention_mask = (torch.arange(width) >= width - lengths[:, None]).long()
        ids, attention_mask = ids.to(self.model.device), attention_mask.to(self.model.device)
        stops = torch.tensor(self.stops, device=ids.device)
        tokens: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        finished: set[int] = set()
        going, made, cache = list(range(len(prompts))), 0, None
        while going and made < sampling.max_completion_length:
            most = sampling.max_completion_length - made
            new, scores, cache = self._continue(ids, attention_mask, cache, most, sampling)
            made += new.shape[1]
            ended = torch.isin(new, stops)
            real = ended.cumsum(-1) - ended.long() == 0  # up to and with the first end of sequence
            done = ended.any(-1)
            for row, ids_row, scores_row, count in zip(going, new.tolist(), scores.tolist(), real.sum(-1).tolist()):
                tokens[row] += ids_row[:count]
                log_probs[row] += scores_row[:count]
            finished.update(row for row, end in zip(going, done.tolist()) if end)
            progress(int(done.sum()), int(real.sum()))
            going = [row for row in going if row not in finished]
            if done.any() and going:
                cache.batch_select_indices((~done).nonzero().flatten())
            ids = torch.cat([ids, new], 1)[~done]
            attention_mask = torch.cat([attention_mask, torch.ones_like(new)], 1)[~done]
        progress(len(going), 0)
        reasons = ("stop" if row in finished else "length" for row in range(len(prompts)))
        return list(map(Completion, tokens, log_probs, reasons))

    def _continue(
        self, ids: Tensor, attention_mask: Tensor, cache: Cache | None, most: int, sampling: Sampling
    ) -> tuple[Tensor, Tensor, Cache]:
        """Up to STAGE more tokens of each row, [rows, new], their log-probabilities, and the cache of all but the last.

        `cache` is that of an earlier stage, for the same rows.
        """
        greedy = sampling.temperature is None
        how = GenerationConfig(
            max_new_tokens=min(STAGE, most),
            do_sample=not greedy,
            **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
            eos_token_id=self.stops,
            pad_token_id=self.pad,
            return_dict_in_generate=True,
        )
        chosen = ChosenLogProbs(1.0 if greedy else sampling.temperature)
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        made = self.model.generate(
            ids,
            attention_mask=attention_mask,
            generation_config=how,
            logits_processor=LogitsProcessorList([chosen]),
            **({} if cache is None else {name: cache}),
        )
        return made.sequences[:, ids.shape[1] :], chosen.finish(made.sequences), made[name]


class ChosenLogProbs(LogitsProcessor):
    """Brings logits to the temperature, and keeps the log-probability of each token that generate() then chooses.

    It holds one step's logits, not those of all, which generate() itself would return.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.before: Tensor | None = None
        self.found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self.before = scores.to(torch.promote_types(scores.dtype, torch.float32)) / self.temperature
        return self.before

    def _take(self, input_ids: Tensor) -> None:
        if self.before is not None:
            chosen = self.before.gather(-1, input_ids[:, -1:]).squeeze(-1)
            self.found.append(chosen - self.before.logsumexp(-1))

    def finish(self, sequences: Tensor) -> Tensor:
        """[rows, new tokens]."""
        self._take(sequences)
        return torch.stack(self.found, 1)


@contextmanager
def _generating(model: PreTrainedModel):
    """Left-padded batches need transformers' own attention, and a cache that gradient checkpointing would forbid."""
    attention, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
