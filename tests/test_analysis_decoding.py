"""Decoding without copies of keys gives the logits of transformers' sdpa attention."""

import pytest
import torch
from study_cases import tiny_model

from rhythm_kernels.analysis import decoding
from rhythm_kernels.analysis.decoding import grouped_decoding


@torch.no_grad()
def logits_of(model, ids, mask, steps: int) -> torch.Tensor:
    """Returns the logits of each of `steps` greedy tokens after left-padded prompts, [B, steps, V]."""
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=position, use_cache=True)
    found = []
    for step in range(steps):
        found.append(output.logits[:, -1])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        output = model(
            found[-1].argmax(-1, keepdim=True),
            attention_mask=mask,
            position_ids=position[:, -1:] + 1 + step,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return torch.stack(found, 1)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"num_key_value_heads": 4}, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}],
    ids=["grouped", "a key head each", "windows"],
)
def test_logits_are_those_of_sdpa(sizes, monkeypatch):
    model = tiny_model(**sizes)
    ids = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = 0
    expected = logits_of(model, ids, mask, 9)
    with grouped_decoding(model):
        assert model.config._attn_implementation == decoding.NAME
        got = logits_of(model, ids, mask, 9)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, expected), "the sums were the same: sdpa has decoded"


def test_other_attention_stays_and_an_error_ends_it():
    model = tiny_model(attn_implementation="eager")
    with grouped_decoding(model):
        assert model.config._attn_implementation == "eager"
    model = tiny_model()
    with pytest.raises(KeyError), grouped_decoding(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
