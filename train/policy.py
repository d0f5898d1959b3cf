"""The policy: how it is built, and what one forward says about each token of a batch."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from rhythm_kernels import GroupDrift, GroupSchedule, Rhythm, collect
from train.config import Credit, Model
from train.loss import token_entropy, token_log_probs
from train.rollout import Rollouts, micro_batches

RHYTHM_STRATEGIES = ("local", "global", "coupled")  # the ones that read attention statistics


def credit_options(credit: Credit) -> dict[str, float | int | bool]:
    """What `token_credit` takes beside the strategy and the signals."""
    return {
        "q": credit.credit_q,
        "amp": credit.credit_amp,
        "alpha": credit.credit_alpha,
        "k": credit.credit_k,
        "largest": credit.credit_largest,
    }


class TokenStats(NamedTuple):
    """What the old-log-prob pass knows: `rhythm` only where a strategy asks for it."""

    log_probs: Tensor  # float [B, T]
    entropy: Tensor  # float [B, T]
    rhythm: Rhythm | None = None  # waad and fai, float [B, T]
    drift: GroupDrift | None = None  # of the head groups, where this pass was a calibration and not the first
    statistics_seconds: float = 0.0


def build_policy(shape: Model, tokenizer: PreTrainedTokenizerBase, context: int) -> PreTrainedModel:
    """A Qwen3 with random weights from the global generator, in evaluation mode (it has no dropout)."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config).to(getattr(torch, shape.dtype)).eval()


def wide(model: PreTrainedModel) -> torch.dtype:
    """What log-probabilities are kept in: the model's dtype, float32 at least."""
    return torch.promote_types(model.dtype, torch.float32)


def token_logits(model: PreTrainedModel, ids: Tensor, attention_mask: Tensor, temperature: float = 1.0) -> Tensor:
    """[B, T, V], float32 or wider: row t predicts token t + 1. Positions count the real tokens, as in generation."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits
    return logits.to(wide(model)) / temperature


@torch.no_grad()
def old_log_prob_pass(
    model: PreTrainedModel,
    batch: Rollouts,
    *,
    temperature: float,
    micro_batch_size: int,
    credit: Credit,
    schedule: GroupSchedule | None,
) -> TokenStats:
    """Log-probabilities and entropies under the policy that drew the batch, and, in the same forward, its rhythm.

    Nothing is run twice: the statistics are read from the attention calls of this pass, in every layer. `schedule` has
    the head groups and takes this pass as one step; None: no rhythm.
    """
    log_probs, entropy, waad, fai = torch.zeros(4, *batch.ids.shape, device=model.device, dtype=wide(model))
    layers = list(range(model.config.num_hidden_layers))
    seconds = 0.0
    for rows, width in micro_batches(batch, torch.arange(len(batch.ids)), micro_batch_size):
        ids, attention_mask = batch.ids[rows, :width], batch.attention_mask[rows, :width]
        collected = None
        if schedule is not None:
            collected = collect(
                model,
                layers=layers,
                window=credit.window,
                horizon=credit.horizon,
                response_mask=batch.response_mask[rows, :width],
                groups=schedule.groups,
                groups_per=credit.groups_per,
            )
        with collected or nullcontext():
            logits = token_logits(model, ids, attention_mask, temperature)
        log_probs[rows, :width] = token_log_probs(logits, ids)
        entropy[rows, :width] = token_entropy(logits)
        if collected:
            rhythm = collected.rhythm()
            waad[rows, :width], fai[rows, :width] = rhythm.waad, rhythm.fai
            schedule.add(rhythm.spans, batch.response_mask[rows].sum(-1))
            seconds += collected.seconds
    if schedule is None:
        return TokenStats(log_probs, entropy)
    return TokenStats(log_probs, entropy, Rhythm(waad=waad, fai=fai), schedule.advance(), seconds)
