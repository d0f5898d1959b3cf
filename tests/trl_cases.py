"""Runs TRL's GRPOTrainer on a tiny model, and computes the advantages of its loss from whole attention maps."""

import copy
import math

import pytest
import torch
from models import dense_rhythm, eager_maps
from transformers import Qwen3Config, Qwen3ForCausalLM

from rhythm_kernels import reference
from train.words import build_tokenizer

pytest.importorskip("trl", reason="TRL is not installed", exc_type=ImportError)
import datasets
from trl import GRPOTrainer

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer, RhythmMixin

TOKENIZER = build_tokenizer()
PROMPTS = ["3 5 ? 8 >", "1 7 10 ? 2 >", "2 2 2 9 ? 30 >", "4 ? 4 >"]  # of four lengths
HORIZON = [2, 6]
LAYERS = reference.sampled_layers(4, 2)
TWO_LAYERS = {"credit_layers": 2, "credit_horizon": HORIZON}
OLD_PASS = {"gradient_accumulation_steps": 1, "steps_per_generation": 2}  # two optimizer steps a generation batch
ONE_STEP = {"gradient_accumulation_steps": 2, "steps_per_generation": 2}
WAYS = pytest.mark.parametrize("way", [OLD_PASS, ONE_STEP], ids=["old pass", "loss"])
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo", "cispo", "vespo")


def make_model(seed: int = 0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,  # so that attention is far from uniform
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def reward(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def rollout(prompts, trainer):
    """Returns answers of 9 to 24 tokens, some of which end by themselves, with two tokens of a tool in each."""
    made = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    draw = torch.Generator().manual_seed(100 + trainer._step)
    for number, prompt in enumerate(prompts):
        length = int(torch.randint(9, 25, (), generator=draw))
        ids = torch.randint(5, len(TOKENIZER), (length,), generator=draw).tolist()
        if number % 2:
            ids[-1] = TOKENIZER.eos_token_id
        made["prompt_ids"].append(TOKENIZER.encode(prompt))
        made["completion_ids"].append(ids)
        made["logprobs"].append([-3.0] * length)
        made["env_mask"].append([int(not 3 <= place < 5) for place in range(length)])
    return made


def make_config(folder, kind=RhythmGRPOConfig, **changes):
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 24,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return kind(**values | changes)


def make_trainer(folder, kind=RhythmGRPOTrainer, model=None, config=RhythmGRPOConfig, rollout_func=rollout, **changes):
    names = ("reward_funcs", "peft_config", "eval_dataset", "callbacks", "tools")
    outside = {"reward_funcs": reward} | {name: changes.pop(name) for name in names if name in changes}
    return kind(
        make_model() if model is None else model,
        args=make_config(folder, config, **changes),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 4]),
        processing_class=TOKENIZER,
        rollout_func=rollout_func,
        **outside,
    )


class Recorder(GRPOTrainer):
    """Stands below the mixin, and keeps the arguments and results of TRL's own methods."""

    def __init__(self, *args, **named):
        self.generations, self.losses = [], []
        super().__init__(*args, **named)
        self.forwards = 0
        self.model.register_forward_hook(self.count)

    def count(self, *_):
        self.forwards += 1

    def _generate_and_score_completions(self, inputs):
        weights = copy.deepcopy(self.model.state_dict())
        output = super()._generate_and_score_completions(inputs)
        self.generations.append((weights, output))
        return output

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.losses.append((len(self.generations) - 1, {name: inputs[name] for name in inputs}))
        return loss


class Recording(RhythmMixin, Recorder):
    pass


def run(folder, kind, **changes):
    """Returns a trainer that has trained."""
    trainer = make_trainer(folder, kind, **changes)
    trainer.train()
    return trainer


def key_of(batch, row):
    return (*batch["prompt_ids"][row].tolist(), *batch["completion_ids"][row].tolist())


def advantages_of(trainer) -> dict:
    """Returns the advantages that the loss was given, by generation batch, iteration and tokens of the row."""
    found = {}
    for generation, batch in trainer.losses:
        for row, advantages in enumerate(batch["advantages"]):
            found.setdefault((generation, *key_of(batch, row)), []).append(advantages)
    return found


def dense_parts(weights, batch, model=None):
    """Returns (eager maps of all layers, R [B, P + C], segments) of a generation batch."""
    model, ids, valid, rows = whole_rows(weights, batch, model)
    return eager_maps(model, input_ids=ids, attention_mask=valid), rows, torch.arange(len(ids))[:, None].expand_as(ids)


def whole_rows(weights, batch, model=None):
    """Returns (model, input ids, attention mask, R), each but the model [B, P + C]."""
    model = make_model() if model is None else model
    model.load_state_dict(weights)
    ids, valid = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    trained = batch["completion_mask"] * batch.get("tool_mask", 1)
    return model.eval(), ids, valid, torch.cat([torch.zeros_like(batch["prompt_mask"]), trained], 1).bool()


@torch.no_grad()
def expected(weights, batch, strategy="coupled", layers=LAYERS, model=None, **options):
    """Returns the advantages [B, C] of a generation batch, from eager attention maps in fp64; and gamma."""
    cut = batch["prompt_ids"].shape[1]
    if strategy == "entropy":
        model, ids, valid, rows = whole_rows(weights, batch, model)
        log_probs = model(ids, attention_mask=valid).logits.double().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).roll(1, 1)
        gamma = reference.gamma(strategy, rows, entropy=entropy, **options)[:, cut:]
    else:
        maps, rows, segments = dense_parts(weights, batch, model)
        waad, fai, _ = dense_rhythm(maps, layers, rows, segments, len(rows), horizon=tuple(HORIZON))
        gamma = reference.gamma(strategy, rows, waad, fai, **options)[:, cut:]
    return reference.shape_advantages(batch["advantages"], gamma), gamma


def assert_expected(trainer, iterations: int = 1, **options):
    """Checks every micro-batch of every generation batch, and that credit makes a difference."""
    found = advantages_of(trainer)
    assert len(found) == sum(len(batch["advantages"]) for _, batch in trainer.generations)
    for generation, (weights, batch) in enumerate(trainer.generations):
        advantages, gamma = expected(weights, batch, **options)
        assert (gamma != 1).any() and (advantages != batch["advantages"][:, None]).any()
        for row in range(len(advantages)):
            reached = found[(generation, *key_of(batch, row))]
            assert len(reached) == iterations
            for each in reached:
                torch.testing.assert_close(each, advantages[row])


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_trained(trainer, before):
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(math.isfinite(record["loss"]) for record in trainer.state.log_history if "loss" in record)
