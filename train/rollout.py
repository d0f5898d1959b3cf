"""Answers sampled from the policy by an engine; the embedded one is transformers' generate."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from train.loss import token_log_probs


class Sampling(NamedTuple):
    """`temperature` None is greedy; `max_completion_length` in tokens, the end-of-sequence token included."""

    max_completion_length: int
    temperature: float | None = 1.0


class Rollouts(NamedTuple):
    """A batch of B answers: left-padded prompts, right-padded completions, T tokens in all.

    `response_mask` marks the completion's tokens up to and with the end of sequence; `log_probs` are the sampler's own
    (0 outside that mask); `finished` says which completions ended by themselves.
    """

    ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # int64 [B, T]
    response_mask: Tensor  # bool [B, T]
    log_probs: Tensor  # float [B, T]
    finished: Tensor  # bool [B]
    texts: list[str]


def micro_batches(batch: Rollouts, rows: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """`rows` in runs of at most `size` of similar length, each with the columns that hold its tokens."""
    columns = torch.arange(1, batch.ids.shape[1] + 1, device=batch.ids.device)
    ends = (batch.attention_mask * columns).amax(-1).cpu()[rows]
    for part in ends.argsort(stable=True).split(size):
        if len(part):
            yield rows[part], int(ends[part].max())


class Engine(Protocol):
    def generate(self, prompts: Sequence[str], n: int, sampling: Sampling) -> Rollouts:
        """`n` answers to each prompt, an answer's group adjacent: rows i*n .. i*n+n-1 answer prompt i."""


class TransformersEngine:
    """Batched KV-cache sampling with the policy's own weights; draws from torch's global generator."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], n: int, sampling: Sampling) -> Rollouts:
        tokenizer, device = self.tokenizer, self.model.device
        repeated = [prompt for prompt in prompts for _ in range(n)]
        batch = tokenizer(repeated, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)
        greedy = sampling.temperature is None
        how = GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            do_sample=not greedy,
            **({} if greedy else {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        made = self.model.generate(**batch, generation_config=how)
        return self._pack(made.sequences, batch.attention_mask, made.logits, sampling)

    def _pack(self, ids: Tensor, prompt_mask: Tensor, logits: tuple[Tensor, ...], sampling: Sampling):
        width = prompt_mask.shape[1]
        completion = ids[:, width:]
        ended = completion == self.tokenizer.eos_token_id
        real = ended.cumsum(-1) - ended.long() == 0  # up to and with the first end of sequence
        response_mask = torch.cat([torch.zeros_like(ids[:, :width], dtype=torch.bool), real], dim=-1)
        attention_mask = torch.cat([prompt_mask, real.long()], dim=-1)
        scores = torch.stack(logits, dim=1) / (sampling.temperature or 1.0)
        scores = torch.nn.functional.pad(scores, (0, 0, width - 1, 1))  # row t predicts token t + 1
        log_probs = token_log_probs(scores, ids) * response_mask
        texts = self.tokenizer.batch_decode(completion, skip_special_tokens=True)
        return Rollouts(ids, attention_mask, response_mask, log_probs, ended.any(-1), texts)
