"""Samples answers from the policy: the protocol of an engine, and the engine on transformers' generate.

The other engine is vLLM, in vllm_engine.py.
"""

import inspect
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rhythm_kernels.analysis.decoding import grouped_decoding, own_distribution

STAGE = 24  # tokens; shorter stages drop finished answers sooner, and cut the cache more often

Progress = Callable[[int, int], object]
"""Takes the numbers of answers finished and of tokens sampled since the last call."""


class Sampling(NamedTuple):
    """The settings of sampling; the same seed, prompts and weights give the same answers."""

    max_completion_length: int
    """Tokens, the end of sequence included."""
    temperature: float | None = 1.0
    """None is greedy; log-probabilities are then those at 1."""
    seed: int = 0


class Completion(NamedTuple):
    ids: list[int]
    """The answer's tokens, the end of sequence included if it ended by itself."""
    log_probs: list[float]
    """Natural log-probability of each id at the temperature, as the engine computed it."""
    finish_reason: str
    """"stop": ended by itself; "length": cut off."""


class Engine(Protocol):
    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """Returns `n` answers to each prompt; completions i*n .. i*n+n-1 answer prompt i."""

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights: whole tensors under the names of the model's parameters."""

    def sleep(self) -> None:
        """Frees memory until `wake`."""

    def wake(self) -> None:
        """Makes ready to generate."""

    def close(self) -> None:
        """Frees all memory; the engine cannot be used afterwards."""


class TransformersEngine:
    """Samples in batches with a key-value cache, from the policy itself or, where that is sharded, from a copy.

    transformers' generate() would compute finished answers to the end of the longest. It is therefore called for STAGE
    tokens at a time; then the answers that ended leave the batch, and their rows leave the cache.

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
        ids, mask = self._pad(prompts)
        stops = torch.tensor(self.stops, device=ids.device)
        tokens: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        reasons = ["length"] * len(prompts)
        open_rows, left, cache = list(range(len(prompts))), sampling.max_completion_length, None
        while open_rows and left:
            new, new_log_probs, cache = self._continue(ids, mask, cache, min(STAGE, left), sampling.temperature)
            left -= new.shape[1]
            is_stop = torch.isin(new, stops)
            ended = is_stop.any(-1)
            counts = (is_stop.cumsum(-1) - is_stop.long() == 0).sum(-1)  # up to and with the first stop
            for row, new_ids, values, count, has_ended in zip(
                open_rows, new.tolist(), new_log_probs.tolist(), counts.tolist(), ended.tolist(), strict=True
            ):
                tokens[row] += new_ids[:count]
                log_probs[row] += values[:count]
                reasons[row] = "stop" if has_ended else "length"
            progress(int(ended.sum()), int(counts.sum()))
            open_rows = [row for row in open_rows if reasons[row] != "stop"]
            if ended.any() and open_rows:
                cache.batch_select_indices((~ended).nonzero().flatten())
            ids, mask = torch.cat([ids, new], 1)[~ended], torch.cat([mask, torch.ones_like(new)], 1)[~ended]
        progress(len(open_rows), 0)
        return list(map(Completion, tokens, log_probs, reasons))

    def _pad(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Returns the prompts padded on the left and their attention mask, [rows, width] int64."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return ids.to(self.model.device), mask.to(self.model.device)

    def _continue(
        self, ids: Tensor, mask: Tensor, cache: Cache | None, most: int, temperature: float | None
    ) -> tuple[Tensor, Tensor, Cache]:
        """Samples up to `most` tokens of each row, fewer where all rows have ended.

        Args:
            ids, mask: [rows, length] all tokens so far, and their attention mask, 0 in padding.
            cache: the keys and values of all but the last token, from an earlier stage; None in the first.

        Returns:
            The new tokens and their log-probabilities, [rows, new], and the cache of all but the last.
        """
        greedy = temperature is None
        settings = GenerationConfig(
            max_new_tokens=most,
            do_sample=not greedy,
            **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
            eos_token_id=self.stops,
            pad_token_id=self.pad,
            return_dict_in_generate=True,
        )
        chosen = ChosenLogProbs(1.0 if greedy else temperature)
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        output = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([chosen]),
            **({} if cache is None else {name: cache}),
        )
        return output.sequences[:, ids.shape[1] :], chosen.finish(output.sequences), output[name]


class ChosenLogProbs(LogitsProcessor):
    """Brings logits to the temperature, and keeps the log-probability of each token that generate() then chooses.

    It holds the logits of one step; generate() itself would return those of all steps.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.scores: Tensor | None = None
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self.scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / self.temperature
        return self.scores

    def _take(self, input_ids: Tensor) -> None:
        if self.scores is not None:
            chosen = self.scores.gather(-1, input_ids[:, -1:]).squeeze(-1)
            self.log_probs.append(chosen - self.scores.logsumexp(-1))

    def finish(self, sequences: Tensor) -> Tensor:
        """Returns the log-probabilities of all chosen tokens, [rows, new tokens]."""
        self._take(sequences)
        return torch.stack(self.log_probs, 1)


@contextmanager
def _generating(model: PreTrainedModel):
    """Switches to transformers' attention, for left-padded batches, and to evaluation, for a key-value cache.

    On a CPU a new token attends without copies of the keys and values for each query head.
    """
    attention, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("sdpa")
    model.eval()
    try:
        with own_distribution(model), grouped_decoding(model) if model.device.type == "cpu" else nullcontext():
            yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
