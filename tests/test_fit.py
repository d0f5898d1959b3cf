"""Tests the limits of models: the positions and token ids that they take, and weights that are no numbers."""

from types import SimpleNamespace

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

from rhythm_kernels.fit import embedding_rows, most_positions, padding_token
from rhythm_kernels.weights import DIGESTED, broken_weight, load_whole, weights_digest


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


@pytest.mark.parametrize("own, pad", [(None, 0), (0, 0), (3, 3), (39, 39), (40, 0), (99, 0)])
def test_what_pads_has_a_row(own, pad):
    assert padding_token(SimpleNamespace(pad_token_id=own), Qwen3Config(vocab_size=40)) == pad


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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_weights_of_few_bits_are_looked_at(dtype):
    layer = torch.nn.Linear(4, 4)
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    assert broken_weight(layer) is None
    layer.weight.data[3, 3] = torch.tensor(float("nan")).to(dtype)
    assert broken_weight(layer) == "weight"


def test_a_digest_tells_weights_apart_wherever_they_differ():
    """Also by their dtype, and in bits that no sum would show."""
    weights = {"big": torch.randn(300, 200), "few": torch.randn(3, dtype=torch.bfloat16), "one": torch.tensor(0.0)}
    digests = {weights_digest(weights.items()), weights_digest((name, x.clone()) for name, x in weights.items())}
    assert len(digests) == 1
    for name in weights:
        digests.add(weights_digest({**weights, name: weights[name] + 1}.items()))
        digests.add(weights_digest({**weights, name: weights[name].half()}.items()))
    later = weights["big"].clone()
    later[1:] += 1
    digests |= {weights_digest({**weights, "big": later}.items()), weights_digest([*weights.items()][:2])}
    for columns in (1, 2, 14, 64, 96, 4096):  # of which the first is the same
        wide = torch.zeros(DIGESTED, columns) if columns < DIGESTED else torch.zeros(64, columns)
        other = wide.clone()
        other[:, 1:] += 1
        assert (weights_digest([("x", wide)]) != weights_digest([("x", other)])) == (columns > 1)
    digests |= {weights_digest({**weights, "one": torch.tensor(-0.0)}.items())}
    assert len(digests) == 10


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
