"""Steps of verl's own training run, on a CPU, with two Ray workers that shard the model: see cpu_run.py."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import verl_cases as cases

import rhythm_kernels.integrations.verl as plugin
from rhythm_kernels import Rhythm, shape_advantages, token_credit

TINY = [
    "+rhythm.groups_every=2",
    "trainer.total_training_steps=3",
    "trainer.v1.trainer_mode=cpu",
    "trainer.device=cpu",
    "trainer.logger=[console]",
    "trainer.val_before_train=False",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "data.train_batch_size=2",
    "data.dataloader_num_workers=0",
    "actor_rollout_ref.actor.use_kl_loss=True",  # so that a reference model runs
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=130",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
    "actor_rollout_ref.ref.strategy=fsdp2",
    "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.rollout.name=fixed",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=130",
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=cpu_run.FixedAnswers",
    "reward.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    # Ray is told of two GPUs that are not there: its workers are placed by them
    "ray_kwargs.ray_init.num_cpus=8",
    "+ray_kwargs.ray_init.num_gpus=2",
    "+ray_kwargs.ray_init.include_dashboard=False",
]


class Run(NamedTuple):
    steps: list[dict]  # what the actor was trained on, and the metrics
    text: str  # what was printed


SHARING = [
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
    "actor_rollout_ref.model.override_config.attn_implementation=flash_attention_2",
]
"""Lets the two workers share each sequence."""


def three_steps(model_folder, make_folder, *sharing: str) -> Run:
    """Runs three steps with the flags of the example's script that TINY does not change."""
    folder, data = make_folder("run"), cases.write_countdown(make_folder("data"))
    env = {"MODEL": str(model_folder), "DATA": str(data), "GPUS": "2", "RUNS": str(data)}
    flags = [*cases.script_flags(data, "one_node.sh", **env)[2:], *TINY, *sharing]
    command = [sys.executable, "-W", "ignore", "-m", "cpu_run", str(folder), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    if sharing:
        env["VERL_USE_EXTERNAL_MODULES"] += ",cpu_flash"
    ended = subprocess.run(command, env=env, text=True, capture_output=True, timeout=480)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    steps = [torch.load(folder / f"step{step}.pt", weights_only=False) for step in (1, 2, 3)]
    return Run(steps, ended.stdout + ended.stderr)


@pytest.fixture(scope="module")
def whole_run(model_folder, tmp_path_factory) -> Run:
    return three_steps(model_folder, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def shared_run(model_folder, tmp_path_factory) -> Run:
    return three_steps(model_folder, tmp_path_factory.mktemp, *SHARING)


@pytest.fixture(params=["whole_run", "shared_run"])
def run(request) -> Run:
    return request.getfixturevalue(request.param)


def fields_of(step: dict) -> dict[str, torch.Tensor]:
    return {name: cases.nested(rows) for name, rows in step["batch"].items() if name != "uid"}


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def test_the_rhythm_of_the_first_step_is_the_dense_one(run, model_folder):
    fields = fields_of(run.steps[0])
    cases.assert_rhythm(fields, model_folder, fields)


def test_the_second_step_uses_the_groups_of_the_first(run, model_folder):
    """Pooled over both workers' sequences; the weights have moved by one update."""
    fields = fields_of(run.steps[0])
    tokens = torch.tensor([int(mask.sum()) for mask in run.steps[0]["batch"]["response_mask"]])
    spans = torch.stack(cases.dense_of_each(model_folder, fields).spans)
    pooled = (spans[tokens > 0] * tokens[tokens > 0, None]).sum(0) / tokens.sum()
    groups = cases.group_heads(pooled[None])
    fields = fields_of(run.steps[1])
    cases.assert_rhythm(fields, model_folder, fields, groups=groups, atol=1e-3)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_the_actor_is_trained_on(run, index):
    batch, metrics = run.steps[index]["batch"], run.steps[index]["metrics"]
    masks = batch["response_mask"]
    mask = padded(masks).bool()
    rhythm = Rhythm(*(padded([row[-len(m) :] for row, m in zip(batch[name], masks)]) for name in plugin.SIGNALS))
    gamma = token_credit("coupled", mask, rhythm)
    scores = torch.stack([row.sum() for row in batch["rm_scores"]])
    plain = torch.zeros(len(masks))
    for uid in set(batch["uid"]):
        group = torch.tensor([other == uid for other in batch["uid"]])
        if group.sum() > 1:
            plain[group] = (scores[group] - scores[group].mean()) / (scores[group].std() + 1e-6)
    wanted = shape_advantages(plain[:, None] * mask, gamma)
    torch.testing.assert_close(padded(batch["advantages"]), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted != plain[:, None] * mask).any()
    assert metrics["rhythm/gamma_mean"] == pytest.approx(gamma[mask].mean().item())


def test_workers_that_share_sequences_give_the_same_advantages(whole_run, shared_run):
    """The first step's; later ones have other weights, by rounding. The order of the answers is another."""
    whole, shared = (
        {tuple(ids.tolist()): row for ids, row in zip(batch["input_ids"], batch["advantages"])}
        for batch in (run.steps[0]["batch"] for run in (whole_run, shared_run))
    )
    assert whole.keys() == shared.keys()
    for ids, advantages in whole.items():
        torch.testing.assert_close(shared[ids], advantages)


def test_the_batch_had_a_row_of_padding(run):
    """Seven answers for two workers: verl adds a row without a response token."""
    tokens = [int(mask.sum()) for mask in run.steps[0]["batch"]["response_mask"]]
    assert len(tokens) == 8 and tokens.count(0) == 1


def test_the_lines_say_that_workers_share_sequences(whole_run, shared_run):
    line = "; 2 ranks share each sequence (Ulysses)"
    assert [run.text.count(line) for run in (whole_run, shared_run)] == [0, 3]  # the trainer, two workers


def test_metrics_and_banners(run):
    steps, text = run.steps, run.text
    names = {"gamma_mean", "credited_share", "waad_mean", "fai_mean", "preplan_rises"}
    drift = {"groups_spearman", "groups_local_overlap", "groups_global_overlap"}
    for step, wanted in zip(steps, (names, names, names | drift), strict=True):
        assert {name for name in step["metrics"] if name.startswith("rhythm/")} == {f"rhythm/{w}" for w in wanted}
    assert text.count("[rhythm_kernels] rhythm credit is on: strategy coupled") == 1  # the trainer
    assert text.count("[rhythm_kernels] reads the attention rhythm") == 2  # the workers
    assert "rhythm/gamma_mean:" in text


def test_the_log_probs_are_those_of_a_pass_without_the_block(run, model_folder):
    fields = fields_of(run.steps[0])
    positions = cases.nested(torch.arange(len(row)) for row in fields["input_ids"].unbind())
    fields |= {"loss_mask": fields["response_mask"], "position_ids": positions}
    batch = cases.make_batch(fields, max_token_len_per_gpu=130)
    plain = cases.log_prob_pass(cases.make_engine(model_folder), batch)
    for name, other in (("old_log_probs", "log_probs"), ("entropy", "entropy")):
        for row, whole in zip(run.steps[0]["batch"][name], plain[other].unbind(), strict=True):
            torch.testing.assert_close(row, whole[-len(row) - 1 : -1])
