"""Tests the limits of models: the positions and token ids that they take, and weights that are no numbers."""

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rhythm_kernels.fit import broken_weight, embedding_rows, load_whole, most_positions


def llama(**rope) -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=100, rope_parameters={"rope_theta": 10000.0, **rope})


@pytest.mark.parametrize(
    "config, most",
    [
        (GPT2Config(n_positions=64), 64),
        (OPTConfig(max_position_embeddings=48), 48),
        (MistralConfig(max_position_embeddings=300, sliding_window=50), 300),
        (Gemma3TextConfig(max_position_embeddings=400, sliding_window=32), 400),
        (BloomConfig(), None),
        (llama(rope_type="default"), 100),
        (llama(rope_type="linear", factor=4.0), 400),
        (llama(rope_type="dynamic", factor=2.0), 200),
        (llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=100), 400),
        (llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=25), 100),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int | None) else str(value),
)
def test_positions_of_a_model(config, most):
    assert most_positions(config) == most


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named(value):
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=8)
    )  # fmt: skip
    assert broken_weight(model) is None and embedding_rows(model.config) == 40
    with torch.no_grad():
        model.model.embed_tokens.weight[39, 3] = value  # a row that no prompt may ever ask for
    assert broken_weight(model) == "model.embed_tokens.weight"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("harm", ["none", "lacks", "shape"])
def test_a_model_is_loaded_with_all_its_weights_or_not_at_all(tmp_path, harm, tied):
    models.llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(file)
    expected = weights.pop(name)
    if harm != "lacks":
        weights[name] = expected if harm == "none" else torch.zeros(3, 3)
    save_file(weights, file, {"format": "pt"})
    if harm == "none":
        assert torch.equal(load_whole(tmp_path).state_dict()[name], expected)
        return
    said = f"its checkpoint lacks {name}$" if harm == "lacks" else "a weight has another shape than its configuration"
    with pytest.raises(ValueError, match=said):
        load_whole(tmp_path)
