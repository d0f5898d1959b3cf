"""How models generate here: from their own distribution, and with attention that reads each key once.

On a CPU transformers' sdpa attention copies every key and value for each query head of its group, at each new token. In
a batch of many answers these copies take longer than the model's own products.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rhythm_grouped"


@contextmanager
def own_distribution(model: PreTrainedModel) -> Iterator[None]:
    """Lets `model.generate` draw from the model's own probabilities, at the temperature that the call names.

    transformers takes what a call leaves open from the model's generation_config: penalties, min_p, suppressed tokens,
    beams. Only its special tokens are kept here.
    """
    before = model.generation_config
    kept = {name: getattr(before, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def grouped_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Lets a model with sdpa attention decode without copies; other attention stays as it is."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """Returns the output [B, 1, HQ, Dv] of one new token; more tokens are left to sdpa.

    Args:
        query: [B, HQ, 1, D].
        key, value: [B, H, T, D] and [B, H, T, Dv].
        attention_mask: [B, 1, 1, T], bool or added to the scores, or None.
    """
    batch, query_heads, tokens, size = query.shape
    if tokens != 1 or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling")
    grouped = query.reshape(batch, key.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling)
    scores = grouped @ key.transpose(-1, -2)  # [B, H, HQ / H, T]
    if attention_mask is not None and attention_mask.dtype.is_floating_point:
        scores = scores + attention_mask
    elif attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    return (scores.softmax(-1) @ value).reshape(batch, 1, query_heads, -1), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
