"""A model for the tests of the benchmarks."""

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
}
"""An entry of `benchmarks.forward.MODELS`."""
