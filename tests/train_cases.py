"""A tiny policy and a batch of its answers, for the tests of the trainer."""

import torch

from train.batch import Rollouts, micro_batches, pack
from train.config import Config, Model
from train.distributed import World
from train.loading import build_model
from train.policy import Policy
from train.presets import load_preset
from train.rollout import Completion, Sampling, TransformersEngine
from train.words import build_tokenizer

ALONE = World(0, 1, torch.device("cpu"))
TOKENIZER = build_tokenizer()
PROMPTS = ["3 5 ? 8 >", "1 7 10 ? 2 >", "2 2 2 9 ? 30 >"]  # of three lengths
SHAPE = Model(layers=3, hidden_size=32, heads=4, key_heads=2, head_size=8, mlp_size=64)


def make_policy(attention: str = "packed", temperature: float = 1.0, layers: int = 3) -> Policy:
    torch.manual_seed(0)
    shape = Model(**{**SHAPE.__dict__, "layers": layers})
    model = build_model(shape, TOKENIZER, context=64)
    model.set_attn_implementation(attention)
    return Policy(model, temperature).eval()


def engine_of(policy: Policy, **options) -> TransformersEngine:
    stops, pad = [TOKENIZER.eos_token_id], TOKENIZER.pad_token_id
    return TransformersEngine(policy.model, **{"stops": stops, "pad": pad, "batch_size": 256, **options})


def encode(prompts: list[str]) -> list[list[int]]:
    return [TOKENIZER.encode(prompt) for prompt in prompts]


def sample(
    policy: Policy, n: int = 4, length: int = 20, temperature: float | None = 1.0, **options
) -> list[Completion]:
    return engine_of(policy, **options).generate(encode(PROMPTS), n, Sampling(length, temperature, 1))


def make_batch(policy: Policy, **options) -> Rollouts:
    """Answers of different lengths, some of which end by themselves: with random weights few do, so three are cut."""
    completions = sample(policy, **options)
    for row, cut in ((0, 7), (5, 3), (7, 10)):
        made = completions[row]
        ids = [*made.ids[:cut], TOKENIZER.eos_token_id]
        completions[row] = Completion(ids, [*made.log_probs[:cut], -4.0], "stop")
    return pack(encode(PROMPTS), completions, len(completions) // len(PROMPTS), ALONE.device)


def on_device(batch: Rollouts, device: str) -> Rollouts:
    return Rollouts(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in batch))


def settings(**changes) -> Config:
    """Returns the settings of a run on `make_batch`: three problems, four answers to each."""
    three = {"prompts_per_step": 3, "num_generations": 4, "gradient_steps": 3, "credit_horizon": (2, 6)}
    return load_preset("countdown-smoke").change(**three | changes)


def all_micros(batch: Rollouts, tokens: int = 60):
    return micro_batches(batch, range(len(batch.lengths)), tokens, ALONE)
