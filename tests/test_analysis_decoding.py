"""Decoding without copies: of keys for the heads of a group, and of a whole cache for a token."""

import pytest
import torch
from study_cases import tiny_model
from transformers import DynamicCache

from rhythm_kernels.analysis import decoding
from rhythm_kernels.analysis.decoding import grouped_decoding
from rhythm_kernels.analysis.room import ROOM, roomy_cache


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


@pytest.mark.parametrize("selected", [[0, 2], [3, 1, 0]])
def test_a_cache_with_room_holds_what_transformers_cache_holds(selected):
    """It grows past its room, some rows leave it, and it grows again; new memory holds NaN."""
    torch.manual_seed(0)
    plain, roomy = DynamicCache(), roomy_cache()
    sizes = [5, *[1] * (ROOM + 3), 7, 1]
    for step, size in enumerate([*sizes, *sizes]):
        if step == len(sizes):
            for cache in (plain, roomy):
                cache.batch_select_indices(torch.tensor(selected))
        rows = 4 if step < len(sizes) else len(selected)
        for layer in range(2):
            keys, values = torch.randn(rows, 3, size, 8), torch.randn(rows, 3, size, 6)
            for one, other in zip(plain.update(keys, values, layer), roomy.update(keys, values, layer)):
                assert torch.equal(one, other)
        assert plain.get_seq_length() == roomy.get_seq_length()
    assert roomy.layers[0].rooms["keys"].shape[2] <= plain.get_seq_length() + ROOM


def test_a_cache_with_room_copies_a_token_alone():
    cache = roomy_cache()
    cache.update(torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8), 0)
    places = {cache.update(torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 1, 8), 0)[0].data_ptr() for _ in range(ROOM)}
    assert len(places) == 1
    assert cache.update(torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 1, 8), 0)[0].data_ptr() not in places
