"""A small random model of each architecture that `collect` is tested on."""

from typing import NamedTuple

import models
import torch
import transformers

SIZES = models.SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {  # multi-head latent attention: q and k of 16, v of 12
    "num_key_value_heads": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    **EXPERTS,
}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = MAMBA | {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_n_groups": 1}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 3
EVERY_THIRD = ["linear_attention", "linear_attention", "full_attention"] * 2


class Architecture(NamedTuple):
    name: str
    """The name of the model class, with or without ForCausalLM."""
    options: dict
    """Settings of its configuration beside SIZES."""
    softmax: tuple[int, ...] = tuple(range(6))
    """Its layers with an attention map."""

    def build(self, attention: str, **sizes):
        model_class = getattr(transformers, self.name, None) or getattr(transformers, f"{self.name}ForCausalLM")
        config = model_class.config_class(**SIZES | self.options | sizes)
        torch.manual_seed(1)
        return model_class._from_config(config, attn_implementation=attention).eval()


WINDOW = {"sliding_window": 12}
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("Apertus", {}),
        Architecture("Cohere", {}),
        Architecture("Cohere2", WINDOW | {"layer_types": ALTERNATING}),
        Architecture("DeepseekV2", LATENT),
        Architecture("DeepseekV3", LATENT),
        Architecture("Ernie4_5", {"head_dim": 8}),
        Architecture("Exaone4", WINDOW | {"layer_types": ALTERNATING}),
        Architecture("Gemma", {"head_dim": 8}),
        Architecture("Gemma2", WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 30, "attn_logit_softcapping": 4.0}),
        Architecture("Gemma3", WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 30, "layer_types": ALTERNATING}),
        Architecture("Glm", {"head_dim": 8}),
        Architecture("Glm4", {"head_dim": 8}),
        Architecture("Glm4Moe", EXPERTS | {"head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 1}),
        Architecture("GPT2LMHeadModel", {"n_embd": 48, "n_layer": 6, "n_head": 6, "n_positions": 256}),
        Architecture("GPTNeoX", {}),
        Architecture("GptOss", WINDOW | EXPERTS | {"head_dim": 8, "num_local_experts": 4}),
        Architecture("Granite", {"attention_multiplier": 0.3}),
        Architecture("GraniteMoe", {"attention_multiplier": 0.3, "num_local_experts": 4}),
        Architecture("HunYuanDenseV1", {"head_dim": 8}),
        Architecture("Llama", {}),
        Architecture("Llama4", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}),
        Architecture("Ministral", WINDOW | {"head_dim": 8}),
        Architecture("Mistral", WINDOW),
        Architecture("Mixtral", WINDOW | {"num_local_experts": 4}),
        Architecture("Olmo2", {}),
        Architecture("Olmo3", WINDOW),
        Architecture("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 48}),
        Architecture("Phi", {}),
        Architecture("Phi3", WINDOW),
        Architecture("Phimoe", WINDOW | {"num_local_experts": 4}),
        Architecture("Qwen2", WINDOW | {"use_sliding_window": True, "max_window_layers": 3}),
        Architecture("Qwen2Moe", EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}),
        Architecture("Qwen3", WINDOW | {"head_dim": 8, "use_sliding_window": True, "max_window_layers": 3}),
        Architecture("Qwen3Moe", EXPERTS | {"head_dim": 8, "num_experts": 4}),
        Architecture("SeedOss", {"head_dim": 8}),
        Architecture("SmolLM3", {"no_rope_layer_interval": 2}),
        Architecture("StableLm", {}),
        Architecture("Starcoder2", WINDOW),
        # hybrids: other layers have no map
        Architecture("Bamba", MAMBA2 | {"attn_layer_indices": [1, 3, 5]}, (1, 3, 5)),
        Architecture("FalconH1", MAMBA2 | {"head_dim": 8, "mamba_d_ssm": 96}),
        Architecture("Jamba", MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}, (1, 3, 5)),
        Architecture("Lfm2", {"layer_types": ["conv", "conv", "full_attention"] * 2}, (2, 5)),
        Architecture("MiniMax", {"head_dim": 8, "layer_types": EVERY_THIRD, "num_local_experts": 4}, (2, 5)),
        Architecture(
            "Qwen3Next",
            LINEAR | EXPERTS | {"head_dim": 8, "num_experts": 4, "layer_types": EVERY_THIRD},
            (2, 5),
        ),
        Architecture("Qwen3_5", LINEAR | {"head_dim": 8, "layer_types": EVERY_THIRD}, (2, 5)),
    )
}
