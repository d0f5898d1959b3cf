"""Named settings; each says only what differs from the defaults in config.py."""

from train.config import BadSetting, Config

PRESETS = {
    # Learns to search for Countdown answers on two CPU cores, in a few minutes.
    "countdown-tiny": {
        "hidden_size": 96,
        "head_size": 24,
        "mlp_size": 192,
        "sft_steps": 1200,
        "sft_learning_rate": 4e-3,
        "max_completion_length": 96,
        "max_steps": 90,
        "loss_type": "grpo",
        "micro_batch_size": 32,
    },
    # Runs every part within seconds and learns little: for tests and for a first look at a run folder.
    "countdown-smoke": {
        "numbers": 2,
        "largest": 9,
        "operators": "+-",
        "held_out": 16,
        "held_out_pool": 1,
        "layers": 2,
        "hidden_size": 32,
        "heads": 4,
        "key_heads": 2,
        "head_size": 8,
        "mlp_size": 64,
        "sft_steps": 150,
        "sft_batch_size": 16,
        "sft_learning_rate": 1e-2,
        "prompts_per_step": 8,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 4,
        "micro_batch_size": 16,
        "horizon": (4, 20),
        "seeds": (0,),
        "threads": 1,
        "save_steps": 2,
        "logging_steps": 1,
        "sample_answers": 4,
    },
}


def load_preset(name: str) -> Config:
    if name not in PRESETS:
        raise BadSetting(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return Config(preset=name).change(**PRESETS[name])
