"""The plug-in's loading, its checks of a config, and the trainer's side on verl's own methods."""

import itertools
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import verl
import verl_cases as cases
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl_cases import CONFIG

import rhythm_kernels.integrations.verl as plugin
import rhythm_kernels.integrations.verl_config as verl_config
from rhythm_kernels import Rhythm, reference, shape_advantages, token_credit
from rhythm_kernels.group_schedule import GroupSchedule
from rhythm_kernels.options import CreditOptions


@cache
def composed_once(*overrides: str):
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose("ppo_trainer", overrides=["algorithm.adv_estimator=grpo", *overrides])


def composed(*overrides: str):
    return deepcopy(composed_once(*overrides))


def in_a_fresh_process(code: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")} | environment
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


WRAPPED = """
import verl, sys
assert "verl.trainer.ppo.v1.trainer_base" not in sys.modules and "verl.workers" not in sys.modules
from verl.utils.config import validate_config
print(hasattr(validate_config, "__wrapped__"))
"""


@pytest.mark.parametrize(
    "environment, wrapped",
    [
        ({}, True),  # the entry point
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, False),
        ({"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "rhythm_kernels.integrations.verl"}, True),
    ],
    ids=["entry point", "switched off", "external module"],
)
def test_verl_loads_it(environment, wrapped):
    assert in_a_fresh_process(WRAPPED, **environment).split()[-1] == str(wrapped)


def test_every_place_is_wrapped_once():
    for module, paths in plugin.WRAPPED.items():
        for path in paths:
            found = sys.modules[module]
            for name in path.split("."):
                found = getattr(found, name)
            assert found.__globals__ is vars(plugin) and found.__wrapped__.__globals__ is not vars(plugin), path
    assert not verl_config.missing


def read(*overrides: str):
    return plugin.read_options(composed(*overrides))


def test_without_a_block_nothing_is_asked_for():
    assert read() is None


def test_a_block_is_read():
    options = read(
        "+rhythm.strategy=local", "+rhythm.layers=[1,2]", "+rhythm.horizon=[10,null]", "+rhythm.top_fraction=0.2"
    )
    assert options.strategy == "local" and options.layers == (1, 2) and options.horizon == (10, None)
    assert options.top_fraction == 0.2 and options.amplification == 1.5
    options = read("+rhythm.tau_waad=7.5", "+rhythm.tau_delta=null", "+rhythm.span_rows=null")
    assert (
        options.strategy == "coupled"
        and options.span_rows is None
        and options.tau_waad == 7.5
        and options.tau_delta is None
    )


def test_every_option_is_a_key_of_the_block():
    taus = {"tau_waad": 7.5, "tau_delta": 0.25, "preplan_fraction": 0.3, "delta": "drop"}
    options = CreditOptions(**taus, horizon=(4, None), layers=(1, 2), largest=False)
    values = {name: value if value is not None else "null" for name, value in asdict(options).items()}
    values |= {"horizon": "[4,null]", "layers": "[1,2]"}
    assert read(*(f"+rhythm.{name}={value}" for name, value in values.items())) == options


REFUSED = {
    "an unknown key": (["+rhythm.stratgey=local"], ValueError, "unknown keys in the block rhythm: stratgey; there are"),
    "a wrong value": (["+rhythm.top_fraction=1.5"], ValueError, "in the block rhythm: top_fraction must be"),
    "a wrong type": (["+rhythm.layers=five"], TypeError, "in the block rhythm: layers must be"),
    "no block but a word": (["+rhythm=coupled"], TypeError, "rhythm must be a block of options"),
    "attention that Ulysses does not reach": (
        [
            "+rhythm.strategy=global",
            "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2",
            "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        ],
        ValueError,
        "needs FlashAttention where 2 ranks share each sequence: set "
        "actor_rollout_ref.model.override_config.attn_implementation to flash_attention_2, got sdpa",
    ),
    "the same under Ulysses' older name": (
        [
            "+rhythm.strategy=coupled",
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=4",
            "+actor_rollout_ref.model.override_config.attn_implementation=flex_attention",
        ],
        ValueError,
        "where 4 ranks share each sequence.*got flex_attention",
    ),
    "bypass mode": (
        ["+rhythm.strategy=coupled", "algorithm.rollout_correction.bypass_mode=True"],
        ValueError,
        "which bypass mode skips: set algorithm.rollout_correction.bypass_mode=False",
    ),
    "bypass mode, entropy": (
        ["+rhythm.strategy=entropy", "algorithm.rollout_correction.bypass_mode=True"],
        ValueError,
        "which bypass mode skips",
    ),
    "another engine": (
        ["+rhythm.strategy=coupled", "model_engine=megatron"],
        ValueError,
        "needs the FSDP engine: set actor_rollout_ref.actor.strategy to fsdp or fsdp2, got megatron",
    ),
    "trajectories that are drawn anew": (
        ["+rhythm.strategy=random", "algorithm.use_pf_ppo=True", "algorithm.adv_estimator=gae"],
        ValueError,
        "set algorithm.use_pf_ppo=False; preference feedback draws trajectories anew",
    ),
    "the same where verl does not read it": (
        ["+rhythm.strategy=coupled", "algorithm.use_pf_ppo=True"],
        ValueError,
        "set algorithm.use_pf_ppo=False",
    ),
    "a loss of whole sequences": (
        ["+rhythm.strategy=coupled", "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean"],
        ValueError,
        "set actor_rollout_ref.actor.policy_loss.loss_mode to one of vanilla, .*, got geo_mean",
    ),
    "a loss that is not known": (
        ["+rhythm.strategy=random", "actor_rollout_ref.actor.policy_loss.loss_mode=mine"],
        ValueError,
        "needs a loss in which each token has its own advantage.*got mine",
    ),
    "distillation alone": (
        [
            "+rhythm.strategy=global",
            "distillation.enabled=True",
            "distillation.distillation_loss.use_task_rewards=False",
        ],
        ValueError,
        "set distillation.distillation_loss.use_task_rewards=True",
    ),
    "the old trainer": (["+rhythm.strategy=random", "trainer.use_v1=False"], ValueError, "set trainer.use_v1=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configs(case):
    overrides, error, text = REFUSED[case]
    with pytest.raises(error, match=text.replace("[", r"\[")):
        read(*overrides)


def test_settings_that_keep_only_the_statistics_away_leave_random_credit():
    assert read("+rhythm.strategy=random", "algorithm.rollout_correction.bypass_mode=True").strategy == "random"
    ulysses = [
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    ]
    assert read("+rhythm.strategy=entropy", *ulysses) is not None


@pytest.mark.parametrize("name", verl_config.SEQUENCE_PARALLEL)
@pytest.mark.parametrize("attention", [None, "flash_attention_2", "flash_attention_3"])
def test_ranks_may_share_sequences(name, attention):
    overrides = [] if attention is None else [f"+{verl_config.ATTENTION}={attention}"]
    config = composed("+rhythm.strategy=coupled", f"{name}=4", *overrides)
    assert plugin.read_options(config).strategy == "coupled"
    OmegaConf.update(config, "actor_rollout_ref.actor.use_dynamic_bsz", True)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert plugin.sequence_ranks(config) == actor.engine.ulysses_sequence_parallel_size == 4


def test_a_block_without_credit_leaves_every_loss_alone():
    assert read("+rhythm.strategy=none", "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean") is not None


def test_a_distillation_with_rewards_is_credited():
    assert read("+rhythm.strategy=global", "distillation.enabled=True") is not None


def loss_gradient(loss_mode: str, advantages: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of one of verl's policy losses by the log-probs of two answers of seven tokens."""
    draw = torch.Generator().manual_seed(0)
    old = -torch.rand(2, 7, generator=draw, dtype=torch.float64)
    new = (old + 0.1 * torch.rand(2, 7, generator=draw, dtype=torch.float64)).requires_grad_()
    settings = ["use_dynamic_bsz=True", "policy_loss.ppo_kl_coef=0.0", "policy_loss.dro_beta=0.1"]
    config = composed(*(f"++actor_rollout_ref.actor.{setting}" for setting in settings)).actor_rollout_ref.actor
    OmegaConf.update(config, "policy_loss.rollout_correction", {"loss_type": "ppo_clip"}, force_add=True)
    config = omega_conf_to_dataclass(config)
    loss, _ = core_algos.get_policy_loss_fn(loss_mode)(
        old_log_prob=old,
        log_prob=new,
        advantages=advantages,
        response_mask=torch.ones(2, 7, dtype=torch.bool),
        loss_agg_mode="token-mean",
        config=config,
    )
    return torch.autograd.grad(loss, new)[0]


@pytest.mark.parametrize("loss_mode", sorted(core_algos.POLICY_LOSS_REGISTRY))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_list_of_losses_is_right(loss_mode, sign):
    weights = 1 + torch.arange(14, dtype=torch.float64).view(2, 7).cos() ** 2
    ones = torch.full((2, 7), sign, dtype=torch.float64)
    rest = loss_gradient(loss_mode, 0 * ones)
    each = loss_gradient(loss_mode, ones) - rest
    found = loss_gradient(loss_mode, weights * ones) - rest
    assert torch.allclose(found, weights * each, atol=1e-12) == (loss_mode in verl_config.TOKEN_LOSSES)
    assert each.any()


ORDER = [4, 1, 5, 0, 3, 2]


def advantages_of(estimator: str, order: list[int], **algorithm) -> torch.Tensor:
    """Returns verl's advantages of six answers, [6, 5], that come in this order, in the order in which they came."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 3, 4, 2, 5, 1])
    mask = (torch.arange(5) < lengths[:, None]).long()
    ends = torch.nn.functional.one_hot(lengths - 1, 5)
    scores, values = torch.rand(6, generator=draw), torch.rand(6, 5, generator=draw)
    fields = {
        "response_mask": mask,
        "token_level_scores": ends * scores[:, None],
        "token_level_rewards": ends * scores[:, None],
        "values": values,
        **({"reward_baselines": scores / 2} if estimator == "remax" else {}),
        "old_log_probs": -values,
        "sum_pi_squared": values,
        "prompts": torch.zeros(6, 1, dtype=torch.long),
        "attention_mask": torch.cat([torch.ones(6, 1, dtype=torch.long), mask], 1),
    }
    uids = np.array(["a", "a", "b", "b", "b", "a"], dtype=object)
    data = DataProto.from_single_dict({name: value[order] for name, value in fields.items()} | {"uid": uids[order]})
    data.non_tensor_batch["score"] = scores.numpy()[order]
    config = composed("+algorithm.gdpo_reward_keys=[score]", *(f"algorithm.{k}={v}" for k, v in algorithm.items()))
    keys = [f"{uids[row]}_{row}_0" for row in order]
    torch.manual_seed(0)  # preference feedback draws
    return compute_advantage_for_multi_trajectories(data, keys, estimator, num_repeat=3, config=config.algorithm).batch[
        "advantages"
    ]


@pytest.mark.parametrize("estimator", sorted(core_algos.ADV_ESTIMATOR_REGISTRY))
def test_every_estimator_keeps_the_rows_in_their_order(estimator):
    """The plug-in multiplies row by row."""
    in_order = advantages_of(estimator, list(range(6)))
    assert len(set(in_order.sum(1).tolist())) > 2
    torch.testing.assert_close(advantages_of(estimator, ORDER), in_order[ORDER])


def test_preference_feedback_does_not():
    """The plug-in refuses it; verl's V1 trainer would write these advantages to the rows in their first order."""
    drawn, in_order = (advantages_of("gae", list(range(6)), use_pf_ppo=drawn) for drawn in (True, False))
    assert all(any(torch.equal(row, other) for other in in_order) for row in drawn)
    assert not torch.equal(drawn, in_order)


def test_another_verl_is_refused_but_not_without_a_block(monkeypatch):
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    assert read() is None
    with pytest.raises(RuntimeError, match="the block rhythm needs verl 0.9.1, got verl 0.10.0"):
        read("+rhythm.strategy=coupled")


def test_a_verl_without_what_is_wrapped_is_refused(monkeypatch):
    lacking = []
    monkeypatch.setattr(plugin, "missing", lacking)
    monkeypatch.setattr(verl_config, "missing", lacking)
    monkeypatch.setitem(plugin.WRAPPED, "verl.utils.config", {"validate_all.deep": plugin.wrap_validate})
    plugin._wrap(sys.modules["verl.utils.config"])
    with pytest.raises(RuntimeError, match="this one has no verl.utils.config.validate_all.deep"):
        read("+rhythm.strategy=coupled")


def test_the_driver_refuses_before_anything_starts():
    sizes = ["actor_rollout_ref.actor.use_dynamic_bsz=True", "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True"]
    for overrides in ([], ["+rhythm.strategy=coupled"]):
        config = composed(*sizes, *overrides)
        validate_config(config, need_reference_policy(config), need_critic(config))
    config = composed(*sizes, "+rhythm.strateg=coupled")
    with pytest.raises(ValueError, match="unknown keys"):
        validate_config(config, need_reference_policy(config), need_critic(config))


def test_the_trainers_refuse_too():
    for other in (RayPPOTrainer, OneStepOffRayTrainer):
        trainer = object.__new__(other)
        trainer.config = composed("+rhythm.strategy=coupled")
        with pytest.raises(ValueError, match=f"needs verl's V1 trainer, got {other.__name__}"):
            trainer.init_workers()
    with pytest.raises(ValueError, match="unknown keys"):
        PPOTrainerSync(composed("+rhythm.strateg=coupled"))


class Store:
    """verl's transfer queue in this process, as far as the trainer's methods call it."""

    def __init__(self, fields: dict, keys: list[str]):
        self.fields, self.keys = fields, keys

    def kv_batch_get(self, keys, partition_id, select_fields):
        places = [self.keys.index(key) for key in keys]
        fields = {name: self.fields[name] for name in select_fields if name in self.fields}
        return tu.get_tensordict({name: rows_of(field, places) for name, field in fields.items()})

    def kv_batch_put(self, keys, partition_id, fields):
        for name, field in fields.items():
            rows = dict(zip(self.keys, self.fields[name].unbind())) if name in self.fields else {}
            rows |= zip(keys, field.unbind(), strict=True)
            self.fields[name] = cases.nested(rows[key] for key in self.keys)
        return KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id=partition_id)


def rows_of(field: torch.Tensor | list, places: list[int]) -> torch.Tensor | list:
    if isinstance(field, list):
        return [field[place] for place in places]
    rows = field.unbind()
    return cases.nested(rows[place] for place in places)


class Workers:
    """The actor's worker group: verl's FSDP engine in this process, fed as the tqbridge feeds it."""

    def __init__(self, engine, store: Store):
        self.engine, self.store = engine, store

    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        fields = {name: value for name, value in self.store.fields.items() if isinstance(value, torch.Tensor)}
        self.store.fields |= cases.log_prob_pass(self.engine, cases.make_batch(fields, **batch.extra_info))
        return batch


UIDS = ["a", "a", "a", "b", "b", "b"]
SCORES = [1.0, 0.0, 0.5, 0.0, 1.0, 1.0]


@pytest.fixture
def run(model_folder, monkeypatch):
    """Returns a function that gives (trainer, store, batch) at the start of a step, from options of the block."""
    engine = cases.make_engine(model_folder)

    def start(*overrides):
        fields = cases.make_fields()
        scores = [torch.zeros(len(row)) for row in fields["responses"].unbind()]
        for row, score in zip(scores, SCORES):
            row[-1] = score
        fields["rm_scores"] = cases.nested(scores)
        fields["rollout_log_probs"] = cases.nested(-torch.rand(len(row)) for row in scores)
        keys = [f"{uid}_{place}_0" for place, uid in enumerate(UIDS)]
        store = Store(fields | {"uid": UIDS}, keys)
        monkeypatch.setattr(trainer_base, "tq", store)
        monkeypatch.setitem(sys.modules, "transfer_queue", store)
        trainer = object.__new__(PPOTrainerSync)
        trainer.config = composed(*overrides)
        trainer.actor_rollout_wg, trainer.ref_in_actor = Workers(engine, store), True
        return trainer, store, KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id="train")

    return start


def padded(nested: torch.Tensor) -> torch.Tensor:
    return torch.nested.to_padded_tensor(nested, 0)


def response_part(nested: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return padded(cases.nested(row[-len(part) :] for row, part in zip(nested.unbind(), mask.unbind())))


def grpo(mask: torch.Tensor) -> torch.Tensor:
    scores = torch.tensor(SCORES).view(2, 3)
    normal = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)
    return normal.flatten()[:, None] * mask


@pytest.mark.parametrize("strategy", ["none", "random", "entropy", "local", "global", "coupled"])
def test_advantages_of_a_step(run, model_folder, strategy):
    trainer, store, batch = run(f"+rhythm.strategy={strategy}", "+rhythm.top_fraction=0.3")
    metrics = {}
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)

    mask = padded(store.fields["response_mask"]).bool()
    rhythm = None
    if strategy in ("local", "global", "coupled"):
        cases.assert_rhythm(store.fields, model_folder, store.fields)
        rhythm = Rhythm(*(response_part(store.fields[name], store.fields["response_mask"]) for name in plugin.SIGNALS))
    gamma = token_credit(strategy, mask, rhythm, entropy=padded(store.fields["entropy"]), top_fraction=0.3)
    torch.testing.assert_close(padded(store.fields["advantages"]), shape_advantages(grpo(mask), gamma))
    assert metrics["rhythm/gamma_mean"] == pytest.approx(gamma[mask].mean().item())
    assert metrics["rhythm/credited_share"] == pytest.approx((gamma[mask] != 1).double().mean().item())
    assert ("rhythm/waad_mean" in metrics) == ("rhythm/preplan_rises" in metrics) == (rhythm is not None)
    if rhythm is not None:
        preplan = reference.preplan(rhythm.waad, mask, 0.3)
        rises = (reference.rises(rhythm.waad, mask) & preplan).sum() / preplan.sum()
        assert 0 < metrics["rhythm/preplan_rises"] == pytest.approx(rises.item())
    assert all(isinstance(value, float) for name, value in metrics.items() if name.startswith("rhythm/"))


def test_rows_that_are_dropped_and_reordered_after_the_pass_keep_their_credit(run):
    """A row's key leads to its signals and its advantages. No part of verl 0.9.1 does this between the two."""
    trainer, store, batch = run("+rhythm.strategy=coupled")
    batch = trainer._compute_old_log_prob(batch, {})
    trainer._compute_advantage(batch, {})
    wanted = store.fields["advantages"].unbind()
    trainer._compute_advantage(KVBatchMeta(keys=[batch.keys[row] for row in (5, 3, 4)], tags=[{}] * 3), {})
    found = store.fields["advantages"].unbind()
    assert any((row > 1.4 * row[row > 0].min()).any() for row in found[3:] if (row > 0).any())  # some are credited
    for row in (3, 4, 5):
        assert found[row] is not wanted[row]
        torch.testing.assert_close(found[row], wanted[row])


def test_thresholds_of_the_block_reach_the_credit(run):
    credits = []
    for thresholds in ({}, {"tau_waad": 1e6, "tau_delta": 0.0}, {"delta": "drop", "preplan_fraction": 0.05}):
        overrides = [f"+rhythm.{name}={value}" for name, value in thresholds.items()]
        trainer, store, batch = run("+rhythm.strategy=coupled", "+rhythm.top_fraction=0.3", *overrides)
        trainer._compute_advantage(trainer._compute_old_log_prob(batch, {}), {})
        mask = store.fields["response_mask"]
        rhythm = Rhythm(*(response_part(store.fields[name], mask) for name in plugin.SIGNALS))
        gamma = token_credit("coupled", padded(mask).bool(), rhythm, top_fraction=0.3, **thresholds)
        torch.testing.assert_close(padded(store.fields["advantages"]), shape_advantages(grpo(padded(mask)), gamma))
        credits.append(gamma)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(credits, 2))


def test_without_a_block_verl_is_as_it_was(run, monkeypatch):
    monkeypatch.setattr(plugin, "shape_advantages", None)
    trainer, store, batch = run()
    metrics = {}
    batch = trainer._compute_advantage(trainer._compute_old_log_prob(batch, metrics), metrics)
    assert not [name for name in (*store.fields, *metrics) if "rhythm" in name]
    mask = padded(store.fields["response_mask"])
    torch.testing.assert_close(padded(store.fields["advantages"]), grpo(mask))


def test_tokens_that_verl_rejects_are_not_credited(run):
    """Rollout correction takes tokens out of the response mask, after the statistics were read."""
    limit = "algorithm.rollout_correction.rollout_rs_threshold='0.3_3'"
    trainer, store, batch = run("+rhythm.strategy=global", "algorithm.rollout_correction.rollout_rs=token_k1", limit)
    before = padded(store.fields["response_mask"]).bool()
    trainer._compute_advantage(trainer._compute_old_log_prob(batch, {}), {})
    mask = padded(store.fields["response_mask"]).bool()
    assert mask.sum() < before.sum()
    rhythm = Rhythm(fai=response_part(store.fields["rhythm_fai"], store.fields["response_mask"]))
    gamma = token_credit("global", mask, rhythm)
    advantages = padded(store.fields["advantages"])
    assert torch.equal(advantages[~mask], torch.zeros_like(advantages[~mask]))
    positive = mask & (advantages > 0)
    ratio = advantages / torch.where(positive, advantages / gamma, 1)
    torch.testing.assert_close(ratio[positive], gamma[positive])


def test_the_references_pass_is_not_read(run):
    """LoRA makes it a call of the same method of the same workers."""
    trainer, store, asked = run("+rhythm.strategy=coupled")
    returned = trainer._compute_old_log_prob(asked, {})
    for name in plugin.SIGNALS:
        del store.fields[name]
    for batch in (asked, returned):
        trainer._compute_ref_log_prob(batch, {})
        assert "ref_log_prob" in store.fields and "rhythm_waad" not in store.fields


def test_workers_without_the_plugin(run, monkeypatch):
    trainer, _, batch = run("+rhythm.strategy=coupled")
    engine = type(trainer.actor_rollout_wg.engine)
    monkeypatch.setattr(engine, "forward_step", engine.forward_step.__wrapped__)
    with pytest.raises(RuntimeError, match="no rhythm_spans: the plug-in must be installed where"):
        trainer._compute_old_log_prob(batch, {})


def test_head_groups_that_serve_two_steps(run, model_folder):
    trainer, store, batch = run("+rhythm.strategy=coupled", "+rhythm.groups_every=2")
    metrics = {}
    trainer._compute_old_log_prob(batch, metrics)
    spans = torch.stack(store.fields.pop("rhythm_spans").unbind())
    tokens = torch.tensor([int(mask.sum()) for mask in store.fields["response_mask"].unbind()])
    pooled = GroupSchedule(2)
    pooled.add(spans[:, None], tokens)
    pooled.advance()

    trainer._compute_old_log_prob(batch, metrics)
    assert "rhythm_spans" not in store.fields
    cases.assert_rhythm(store.fields, model_folder, store.fields, groups=pooled.groups)
    assert "rhythm/groups_spearman" not in metrics

    trainer._compute_old_log_prob(batch, metrics)  # ranks again: the same weights, the same groups
    assert metrics["rhythm/groups_spearman"] == pytest.approx(1)
    assert metrics["rhythm/groups_local_overlap"] == metrics["rhythm/groups_global_overlap"] == 1


def test_padding_rows_of_verl_do_not_count():
    credit = plugin.TrainerCredit(verl_config.make_options({"groups_every": 2}))
    spans = torch.rand(3, 30)
    spans[2] = float("nan")
    credit.end_pass(spans, torch.tensor([4, 2, 0]))
    wanted = (spans[0] * 4 + spans[1] * 2) / 6
    torch.testing.assert_close(credit.schedule.state_dict()["spans"], wanted[None])


def test_random_draws_differ_from_step_to_step():
    credit = plugin.TrainerCredit(verl_config.make_options({"strategy": "random"}))
    mask = torch.ones(2, 50, dtype=torch.bool)
    first, again = (credit.shape(torch.ones(2, 50), mask, {})[0] for _ in range(2))
    assert not torch.equal(first, again)


def test_it_says_once_that_it_is_on(capsys, monkeypatch):
    monkeypatch.setattr(plugin, "_said", set())
    for _ in range(2):
        plugin.credit_of(SimpleNamespace(config=composed("+rhythm.strategy=local")))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        "[rhythm_kernels] rhythm credit is on: strategy local, top_fraction 0.4"
    )
    assert lines[0].endswith("groups_every 1, seed 0")


def test_it_says_what_is_shared(capsys, monkeypatch):
    monkeypatch.setattr(plugin, "_said", set())
    config = composed("+rhythm.strategy=local", "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=4")
    plugin.credit_of(SimpleNamespace(config=config))
    assert capsys.readouterr().out.endswith("; 4 ranks share each sequence (Ulysses)\n")
