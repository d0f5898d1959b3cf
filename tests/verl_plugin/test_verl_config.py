"""The plug-in takes or refuses settings of verl's config, and verl has the properties that this rests on."""

import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import verl
import verl_cases as cases
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.config import omega_conf_to_dataclass, validate_config

import rhythm_kernels.integrations.verl as plugin
import rhythm_kernels.integrations.verl_config as verl_config
from rhythm_kernels.options import CreditOptions


def read(*overrides: str):
    return plugin.read_options(cases.composed(*overrides))


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
        ["+rhythm.strategy=coupled", "model_engine=veomni"],
        ValueError,
        "needs the FSDP or the Megatron engine: set actor_rollout_ref.actor.strategy to fsdp, fsdp2, megatron, got veo",
    ),
    "stages of several parts": (
        [
            "+rhythm.strategy=coupled",
            "model_engine=megatron",
            "actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size=2",
        ],
        ValueError,
        "set actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size=null, got 2",
    ),
    "other ranks for each sequence": (
        [
            "+rhythm.strategy=coupled",
            "model_engine=megatron",
            "actor_rollout_ref.actor.megatron.dynamic_context_parallel=True",
        ],
        ValueError,
        "set actor_rollout_ref.actor.megatron.dynamic_context_parallel=False",
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
    config = cases.composed("+rhythm.strategy=coupled", f"{name}=4", *overrides)
    assert plugin.read_options(config).strategy == "coupled"
    OmegaConf.update(config, "actor_rollout_ref.actor.use_dynamic_bsz", True)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert plugin.sequence_ranks(config) == {"Ulysses": actor.engine.ulysses_sequence_parallel_size} == {"Ulysses": 4}


def test_ranks_may_share_a_gpt_model():
    sizes = {"tensor_model_parallel_size": 4, "context_parallel_size": 2, "pipeline_model_parallel_size": 3}
    overrides = [f"{verl_config.MEGATRON}.{name}={size}" for name, size in sizes.items()]
    config = cases.composed("+rhythm.strategy=coupled", "model_engine=megatron", *overrides)
    assert plugin.read_options(config).strategy == "coupled"
    assert plugin.sequence_ranks(config) == {"tensor": 4, "context": 2, "pipeline": 3}


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
    config = cases.composed(*(f"++actor_rollout_ref.actor.{setting}" for setting in settings)).actor_rollout_ref.actor
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
    config = cases.composed(
        "+algorithm.gdpo_reward_keys=[score]", *(f"algorithm.{k}={v}" for k, v in algorithm.items())
    )
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
        config = cases.composed(*sizes, *overrides)
        validate_config(config, need_reference_policy(config), need_critic(config))
    config = cases.composed(*sizes, "+rhythm.strateg=coupled")
    with pytest.raises(ValueError, match="unknown keys"):
        validate_config(config, need_reference_policy(config), need_critic(config))


def test_the_trainers_refuse_too():
    for other in (RayPPOTrainer, OneStepOffRayTrainer):
        trainer = object.__new__(other)
        trainer.config = cases.composed("+rhythm.strategy=coupled")
        with pytest.raises(ValueError, match=f"needs verl's V1 trainer, got {other.__name__}"):
            trainer.init_workers()
    with pytest.raises(ValueError, match="unknown keys"):
        PPOTrainerSync(cases.composed("+rhythm.strateg=coupled"))
