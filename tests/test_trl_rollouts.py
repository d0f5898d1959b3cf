"""Rhythm credit in TRL with rollouts, models and arguments that are not the usual ones."""

import pytest
import torch
from models import dense_rhythm, eager_maps
from transformers import Qwen3ForCausalLM

from rhythm_kernels import reference

pytest.importorskip("trl", reason="TRL is not installed", exc_type=ImportError)
import datasets
from trl import GRPOTrainer
from trl_cases import (
    HORIZON,
    LAYERS,
    OLD_PASS,
    ONE_STEP,
    PROMPTS,
    TOKENIZER,
    TWO_LAYERS,
    WAYS,
    Recorder,
    Recording,
    advantages_of,
    assert_expected,
    assert_trained,
    key_of,
    make_config,
    make_model,
    make_trainer,
    reward,
    rollout,
    run,
    weights_of,
)

from rhythm_kernels.integrations import trl as integration
from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer, RhythmMixin
from rhythm_kernels.integrations.virtual_tokens import VirtualTokensCollector

pytestmark = pytest.mark.xdist_group("trl")

DATA = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 4])


# ---- how a trainer is made -------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Makes default configurations, which are for a GPU, those for a CPU."""

    class OnACpu(RhythmGRPOConfig):
        def __post_init__(self):
            self.use_cpu, self.bf16 = True, False
            super().__post_init__()

    monkeypatch.setattr(integration, "RhythmGRPOConfig", OnACpu)


@pytest.mark.parametrize("as_a_path", [False, True], ids=["model", "path"])
def test_without_args_the_config_is_trls_default(tmp_path, monkeypatch, on_a_cpu, as_a_path):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("some/tiny")
    model = "some/tiny" if as_a_path else Qwen3ForCausalLM.from_pretrained("some/tiny")
    trainer = RhythmGRPOTrainer(model=model, reward_funcs=reward, train_dataset=DATA, processing_class=TOKENIZER)
    default = integration.RhythmGRPOConfig("tiny-GRPO")
    assert trainer.args.output_dir == "tiny-GRPO" and trainer.args.credit_options == default.credit_options
    same = ("learning_rate", "loss_type", "beta", "num_generations", "steps_per_generation", "gradient_checkpointing")
    assert all(getattr(trainer.args, name) == getattr(default, name) for name in same)
    trainer = RhythmGRPOTrainer(model, reward, None, DATA, processing_class=TOKENIZER)
    assert trainer.args.output_dir == "tiny-GRPO"


def test_a_trainer_with_defaults_of_its_own_needs_args():
    class Own(GRPOTrainer):
        def __init__(self, model, reward_funcs=None, args=None, **named):
            super().__init__(model, reward_funcs, args or make_config("own"), **named)

    with pytest.raises(TypeError, match="got None: Own may have defaults of its own"):
        type("Mixed", (RhythmMixin, Own), {})(make_model(), reward, train_dataset=DATA)


def test_arguments_by_position_and_by_name(tmp_path):
    config = make_config(tmp_path)
    by_position = (make_model(), reward, config, DATA, DATA, TOKENIZER)
    by_name = {"processing_class": TOKENIZER, "train_dataset": DATA, "args": config, "reward_funcs": [reward]}
    for trainer in (
        RhythmGRPOTrainer(*by_position),
        RhythmGRPOTrainer(**by_name, model=make_model()),
        RhythmGRPOTrainer(make_model(), **by_name),
    ):
        assert trainer.args is config and trainer.train_dataset is DATA and trainer.reward_func_names == ["reward"]


def test_a_trainer_that_was_never_initialized_does_what_trls_does():
    trainer = RhythmGRPOTrainer.__new__(RhythmGRPOTrainer)
    plain = GRPOTrainer.__new__(GRPOTrainer)
    for each in (trainer, plain):
        each.model, each.use_vllm, each.tools, each.loss_type = make_model(), False, [], "grpo"
        each.rollout_func = lambda prompts, _: {"completion_ids": [[1]], "prompt_ids": [[2]]}
        each.accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
        with pytest.raises(ValueError, match="rollout_func must return keys"):
            each._generate(["a"])
    assert not trainer._is_credited()
    values = [torch.tensor([[1.0], [-1.0]]), torch.rand(2, 5) - 0.5, torch.ones(2, 5), None]
    weights = [kind.get_gamma_weights(*values) for kind in (GRPOTrainer, RhythmGRPOTrainer, trainer)]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    fields = {"_credit", "_pass", "_draws", "_layers", "_sequence_ratios", "_is_proven", "_is_reached"}
    assert all(hasattr(trainer, field) for field in fields)


# ---- rollouts --------------------------------------------------------------------------------------------------------


class Vllm:
    """Stands for vLLM's workers: there is nothing to send weights to."""

    def sync_weights(self):
        pass


def with_vllm(trainer, mode="token_truncate"):
    """Makes the trainer correct for the rollout's log-probs, as if vLLM had sampled."""
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Vllm(), -1
    trainer.vllm_importance_sampling_correction, trainer.vllm_importance_sampling_mode = True, mode
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = 0.0, 3.0
    return trainer


@torch.no_grad()
def scored(prompts, trainer):
    """A rollout that asks the policy for the log-probs of its answers, one by one."""
    made = rollout(prompts, trainer)
    for index, (asked, answer) in enumerate(zip(made["prompt_ids"], made["completion_ids"])):
        ids = torch.tensor([asked + answer])
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), len(answer))
        made["logprobs"][index] = found[0][0].tolist()
    return made


@torch.no_grad()
def scored_together(prompts, trainer):
    """The same over a batch of the shape that TRL's own pass will have, with other tokens."""
    made = rollout(prompts, trainer)
    width = max(map(len, made["prompt_ids"])) + max(map(len, made["completion_ids"]))
    ids = torch.full((len(prompts), width), 7)
    trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, torch.ones_like(ids), max(map(len, made["completion_ids"])), 2
    )
    return made


@pytest.mark.parametrize("vllm", [False, True], ids=["", "vllm"])
@pytest.mark.parametrize("strategy", ["coupled", "entropy"])
@pytest.mark.parametrize("answers", [scored, scored_together])
@WAYS
def test_a_pass_that_the_rollout_runs_is_not_the_one(tmp_path, way, answers, strategy, vllm):
    trainer = make_trainer(tmp_path, Recording, rollout_func=answers, credit=strategy, **TWO_LAYERS, **way)
    if vllm:
        with_vllm(trainer)
    trainer.train()
    assert_expected(trainer, strategy=strategy)


@pytest.mark.parametrize("vllm", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize(
    "way", [OLD_PASS, ONE_STEP, {"num_iterations": 2, **ONE_STEP}], ids=["two steps", "one", "twice"]
)
def test_importance_sampling_of_another_sampler(tmp_path, way, vllm):
    trainer = with_vllm(make_trainer(tmp_path, Recording, rollout_func=scored, **TWO_LAYERS, **way), vllm)
    before = weights_of(trainer)
    trainer.train()
    assert "importance_sampling_ratio" in trainer.generations[0][1]
    assert_expected(trainer, iterations=way.get("num_iterations", 1))
    assert_trained(trainer, before)


def test_a_reward_or_an_environment_may_run_the_policy(tmp_path):
    def judge(completion_ids, trainer_state, **_):
        ids = torch.tensor([[7, 8, 9, 10]])
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 3)
        return reward(completion_ids)

    trainer = make_trainer(tmp_path, Recording, reward_funcs=[reward, judge], **TWO_LAYERS, **OLD_PASS)
    trainer.train()
    assert_expected(trainer)


@WAYS
def test_an_env_mask_may_be_shorter_than_its_answer(tmp_path, way):
    def cut(prompts, trainer):
        made = rollout(prompts, trainer)
        longest = max(map(len, made["env_mask"]))
        for number, mask in enumerate(made["env_mask"]):
            if len(mask) < longest:
                del mask[number % 7 :]  # some to nothing
        return made

    trainer = run(tmp_path, Recording, rollout_func=cut, **TWO_LAYERS, **way)
    assert_expected(trainer)
    batch = trainer.generations[0][1]
    assert (batch["tool_mask"] * batch["completion_mask"]).sum() > 0


def test_a_generation_that_is_done_again_is_read_again(tmp_path):
    """Dynamic sampling throws the first batch away."""

    class Twice(Recorder):
        def _generate_and_score_completions(self, inputs):
            super()._generate_and_score_completions(inputs)
            self.generations.clear()
            self._step += 1
            output = super()._generate_and_score_completions(inputs)
            self._step -= 1
            return output

    assert_expected(run(tmp_path, type("Mixed", (RhythmMixin, Twice), {}), max_steps=2, **TWO_LAYERS, **OLD_PASS))


@WAYS
@pytest.mark.parametrize("bf16, dropout", [(True, 0.0), (False, 0.3)], ids=["bf16", "dropout"])
def test_autocast_and_dropout_train(tmp_path, way, bf16, dropout):
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    trainer = make_trainer(tmp_path, Recording, model=model, bf16=bf16, **TWO_LAYERS, **way)
    before = weights_of(trainer)
    trainer.train()
    assert_trained(trainer, before)
    assert 1 < trainer.state.log_history[0]["rhythm/gamma_mean"] < 1.5


# ---- virtual tokens --------------------------------------------------------------------------------------------------


def adapter(name: str, **options):
    peft = pytest.importorskip("peft")
    if name == "prompt tuning":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **options)
    if name == "p-tuning":
        return peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16, encoder_dropout=0.0, **options
        )
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)


@torch.no_grad()
def dense_with_virtual_tokens(model, weights, batch, virtual):
    """Advantages [B, C]: eager maps over the batch as it is, of which each row's real tokens are kept."""
    model.load_state_dict(weights)
    model.eval()
    ids, valid = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    maps = eager_maps(model, input_ids=ids, attention_mask=valid, use_cache=False)
    trained = batch["completion_mask"] * batch["tool_mask"]
    rows = torch.cat([torch.zeros(len(ids), virtual), torch.zeros_like(batch["prompt_mask"]), trained], 1).bool()
    real = torch.cat([torch.ones(len(ids), virtual), valid], 1).bool()
    width, gamma = trained.shape[1], torch.ones(trained.shape)
    for row, keep in enumerate(real):
        own = [layer[row : row + 1][:, :, keep][..., keep] for layer in maps]
        own_rows = rows[row : row + 1, keep]
        segments = torch.zeros(own_rows.shape, dtype=torch.long)
        waad, fai, _ = dense_rhythm(own, LAYERS, own_rows, segments, 1, horizon=tuple(HORIZON))
        found = reference.gamma("coupled", own_rows, waad, fai)[0]
        gamma[row, keep[-width:]] = found[-int(keep[-width:].sum()) :].float()
    return reference.shape_advantages(batch["advantages"], gamma)


@WAYS
@pytest.mark.parametrize("name", ["prompt tuning", "p-tuning"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_virtual_tokens_are_counted(tmp_path, way, name, attention):
    peft = pytest.importorskip("peft")
    model = make_model()
    model.set_attn_implementation(attention)
    config = adapter(name)
    trainer = make_trainer(tmp_path, Recording, model=model, peft_config=config, beta=0.1, **TWO_LAYERS, **way)
    before = weights_of(trainer)
    trainer.train()
    assert_trained(trainer, before)
    found = advantages_of(trainer)
    twin = peft.get_peft_model(make_model(), config)
    for generation, (weights, batch) in enumerate(trainer.generations):
        assert len(set(batch["prompt_mask"].sum(-1).tolist())) > 1  # so that padding lies behind the virtual tokens
        wanted = dense_with_virtual_tokens(twin, weights, batch, config.num_virtual_tokens)
        assert (wanted != batch["advantages"][:, None]).any()
        for row in range(len(wanted)):
            for each in found[(generation, *key_of(batch, row))]:
                torch.testing.assert_close(each, wanted[row])


def test_no_mask_outlives_the_context():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), adapter("prompt tuning"))
    real = torch.arange(30) >= torch.tensor([[0], [7]])
    with torch.no_grad(), VirtualTokensCollector(model, 5, real, layers=TWO_LAYERS["credit_layers"]) as collector:
        model(torch.full((2, 30), 5), attention_mask=real.long(), use_cache=False)
    assert collector.rhythm().waad.shape == (2, 35)
    held, seen = [vars(collector)], []
    while held:
        item = held.pop()
        seen += [item] if isinstance(item, torch.Tensor) else []
        held += [*item.values()] if isinstance(item, dict) else [*item] if isinstance(item, (list, tuple)) else []
    assert seen and all(tensor.numel() < 35 * 35 for tensor in seen)


def test_virtual_tokens_with_head_groups_of_an_earlier_batch(tmp_path):
    changes = {"credit_groups_every": 2, "peft_config": adapter("prompt tuning")}
    trainer = run(tmp_path, Recording, max_steps=3, **changes, **TWO_LAYERS, **ONE_STEP)
    assert trainer._schedule.state_dict()["age"] == 1
    assert all(batch["advantages"].isfinite().all() for _, batch in trainer.losses)


def test_prefix_tuning_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="peft_config must not be PREFIX_TUNING .* 4 keys into the cache"):
        make_trainer(tmp_path, peft_config=adapter("prefix tuning"))
    make_trainer(tmp_path, peft_config=adapter("prefix tuning"), credit="random")
