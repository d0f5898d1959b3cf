"""Answers sampled from the policy by an engine; the embedded one is transformers' generate."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Tokens. Shorter stages drop finished answers sooner, and read the open ones anew more often.
STAGE = 24


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
    """Batched KV-cache sampling with the policy's own weights; draws from torch's global generator.

    generate() computes finished answers on to the end of the longest. So it is called for STAGE tokens at a time, and
    only the answers that are still open go into the next stage, which reads them anew (a fraction of what it saves).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], n: int, sampling: Sampling) -> Rollouts:
        repeated = [prompt for prompt in prompts for _ in range(n)]
        batch = self.tokenizer(repeated, return_tensors="pt", padding=True, return_token_type_ids=False)
        batch = batch.to(self.model.device)
        width, length = batch.input_ids.shape[1], sampling.max_completion_length
        room = (0, length)
        ids = torch.nn.functional.pad(batch.input_ids, room, value=self.tokenizer.pad_token_id)
        attention_mask = torch.nn.functional.pad(batch.attention_mask, room)
        wide = torch.promote_types(self.model.dtype, torch.float32)
        log_probs = torch.zeros(ids.shape, dtype=wide, device=ids.device)
        finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        end = width
        while end < width + length and not finished.all():
            going = (~finished).nonzero().flatten()
            begin, most = end, min(STAGE, width + length - end)
            made = self._continue(ids[going, :begin], attention_mask[going, :begin], most, sampling)
            end = made.sequences.shape[1]
            new = made.sequences[:, begin:]
            ended = new == self.tokenizer.eos_token_id
            real = ended.cumsum(-1) - ended.long() == 0  # up to and with the first end of sequence
            ids[going, begin:end] = new
            attention_mask[going, begin:end] = real.long()
            scores = torch.stack(made.logits, dim=1).to(wide) / (sampling.temperature or 1.0)
            chosen = scores.log_softmax(-1).gather(-1, new[..., None]).squeeze(-1)
            log_probs[going, begin:end] = chosen * real
            finished[going] = ended.any(-1)

        ids, attention_mask, log_probs = ids[:, :end], attention_mask[:, :end], log_probs[:, :end]
        response_mask = attention_mask.bool() & (torch.arange(end, device=ids.device) >= width)
        texts = self.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        return Rollouts(ids, attention_mask, response_mask, log_probs, finished, texts)

    def _continue(self, ids: Tensor, attention_mask: Tensor, most: int, sampling: Sampling):
        """Up to `most` more tokens for each row: generate()'s `sequences` and, a step each, `logits`."""
        greedy = sampling.temperature is None
        how = GenerationConfig(
            max_new_tokens=most,
            do_sample=not greedy,
            **({} if greedy else {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}),
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return self.model.generate(ids, attention_mask=attention_mask, generation_config=how)
