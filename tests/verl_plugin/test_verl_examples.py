"""The run scripts of examples/verl: flags through verl's own config, data and reward through its loaders."""

import os
import subprocess
import sys

import pytest
import verl_cases as cases
import yaml
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset

import rhythm_kernels.integrations.verl as plugin


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return cases.write_countdown(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(data):
    """Returns the config that the script's own command prints, by verl's main_ppo and Hydra."""
    env = os.environ | {"PYTHON": sys.executable, "DATA": str(data), "STRATEGY": "global"}
    command = ["bash", str(cases.EXAMPLES / "one_node.sh"), "+rhythm.top_fraction=0.2", "--cfg", "job"]
    printed = subprocess.run(command, env=env, text=True, capture_output=True)
    assert printed.returncode == 0, printed.stderr[-3000:]
    return OmegaConf.create(yaml.safe_load(printed.stdout[printed.stdout.index("actor_rollout_ref:") :]))


def test_verl_and_the_plugin_take_the_config(config):
    validate_config(config, need_reference_policy(config), need_critic(config))
    options = plugin.read_options(config)
    assert (options.strategy, options.top_fraction) == ("global", 0.2)
    assert not need_reference_policy(config) and not need_critic(config)
    answers = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    assert answers == 512 and config.actor_rollout_ref.actor.ppo_mini_batch_size * 8 == 32


def test_verl_reads_the_problems(config, data, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for name, count in (("train", 24), ("test", 8)):
        rows = RLHFDataset(str(data / f"{name}.parquet"), tokenizer, OmegaConf.create(dict(config.data)))
        assert len(rows) == count
        assert rows[0]["data_source"] == "countdown"
        assert "<answer>" in rows[0]["raw_prompt"][0]["content"]


def test_verl_finds_the_reward(config):
    score = get_custom_reward_fn(config)
    truth = '{"numbers": [2, 3, 4], "target": 24}'
    assert score(data_source="countdown", solution_str="<answer>2 * 3 * 4</answer>", ground_truth=truth) == 1.0
    assert score(data_source="countdown", solution_str="<answer>2 * 3 + 4</answer>", ground_truth=truth) == 0.0
    with pytest.raises(ValueError, match="this reward is of countdown, got a problem of 'gsm8k'"):
        score(data_source="gsm8k", solution_str="", ground_truth="")


def test_the_script_makes_its_data_and_passes_flags_on(tmp_path):
    flags = cases.script_flags(tmp_path, "one_node.sh", "trainer.test_freq=5", DATA=f"{tmp_path}/absent")
    made, run = flags[: flags.index("-m")], flags[flags.index("-m") :]
    assert made[0].endswith("countdown.py") and made[1:] == ["--out", f"{tmp_path}/absent"]
    assert run[:2] == ["-m", "verl.trainer.main_ppo"] and run[-1] == "trainer.test_freq=5"


def test_two_nodes_start_ray_and_then_the_run(tmp_path, data):
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\n[ "$1" = status ] && echo " 0.0/16.0 GPU" || echo "ray $*"\n')
    ray.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    head = cases.script_flags(tmp_path, "two_nodes.sh", "head", "+rhythm.top_fraction=0.2", DATA=str(data), PATH=path)
    assert head[0] == "ray start --head --port=6379 --num-gpus=8"
    assert {"trainer.nnodes=2", "+ray_kwargs.ray_init.address=auto", "+rhythm.strategy=coupled"} < set(head)
    assert head[-1] == "+rhythm.top_fraction=0.2"
    join = cases.script_flags(tmp_path, "two_nodes.sh", "join", "first", PATH=path)
    assert join == ["ray start --address=first:6379 --num-gpus=8 --block"]
