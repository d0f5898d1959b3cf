"""Two ranks on a CPU (gloo, FSDP2) train as one does on the same answers, and continue each other's checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import Raised, on_ranks
from train_cases import ALONE, make_policy, settings

import train
from train.checkpoint import list_checkpoints
from train.config import BadSetting
from train.distributed import World, sharing_ranks
from train.loading import digest_of_policy, load_policy
from train.metrics import read_metrics
from train.presets import load_preset
from train.setup import check_ranks

# Answers that depend on the problem alone, so that ranks and a single process train on the same; digits are worth some.
RUN = """
import hashlib, json, random, sys
from pathlib import Path
import train.setup
from train.__main__ import leave
from train.config import Config
from train.launch import launch
from train.presets import load_preset
from train.rollout import Completion
from rhythm_kernels.tasks import VERIFIERS

class Scripted:
    def __init__(self, tokenizer, group, rank):
        self.tokenizer, self.group, self.rank = tokenizer, group, rank
    def generate(self, prompts, n, sampling, progress=None):
        made = []
        for prompt in prompts:
            draw = random.Random(hashlib.sha256(bytes(prompt)).hexdigest())
            answers = []
            for _ in range(max(n, self.group)):
                ids = [draw.randrange(2, len(self.tokenizer)) for _ in range(draw.randint(1, 15))]
                answers.append(Completion([*ids, self.tokenizer.eos_token_id], [-4.0] * (len(ids) + 1), "stop"))
            first = self.rank * n % len(answers)  # of a group that ranks share
            made += answers[first : first + n] if 1 < n else answers[:1]
        return made
    def sync(self, weights):
        self.weights = dict(weights)
    def sleep(self):
        pass
    wake = close = sleep

train.setup.load_engine = lambda start, policy, prompts, config, world: Scripted(
    prompts.tokenizer, config.rollout.num_generations, world.rank)
VERIFIERS["words"] = lambda completion, answer: sum(w.isdigit() for w in completion.split()) / 16
folder = sys.argv[2] if len(sys.argv) > 2 else None
config = load_preset("countdown-smoke").change(**json.loads(sys.argv[1]))
leave(launch(Config.load(Path(folder) / "config.json"), Path(folder)) if folder else launch(config))
"""
BASE = {"sample_answers": 0, "vllm_logp_tolerance": 100.0, "save_steps": 2, "save_total_limit": 9}
COMPARED = ("reward", "reward_std", "loss", "grad_norm", "entropy", "approx_kl", "rhythm/gamma_mean", "num_tokens")
COMPARED += ("rhythm/waad_mean", "completions/mean_length", "completions/max_length", "clip_ratio/high_mean")


def run(ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-c", RUN, *arguments]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *torchrun, *command]
    root = str(Path(train.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return BASE | {"cache": str(tmp_path_factory.mktemp("cache"))}


def of_two(folder: str) -> str:
    """Runs on each of two ranks; returns a digest of the policy that they share."""
    return digest_of_policy(load_policy(folder, settings(), World.join("cpu")))


@pytest.mark.parametrize("value", [0.5, torch.nan])
def test_a_model_that_the_first_rank_refuses_is_refused_on_all(tmp_path, value):
    model = make_policy().model
    model.model.norm.weight.data[0] = value
    model.save_pretrained(tmp_path)
    both = on_ranks(2, of_two, str(tmp_path))
    if value == 0.5:
        assert both == 2 * [digest_of_policy(load_policy(str(tmp_path), settings(), ALONE))]
    else:
        assert all(isinstance(one, Raised) and one.args[0] == "BadSetting" for one in both), both
        assert all("--model must have finite weights" in one.args[1] for one in both)


def test_ranks_that_cannot_share_a_step_are_refused():
    paper = load_preset("maths-8b-1k")
    assert sharing_ranks(paper, 40) == [1, 2, 4, 8, 16, 32]
    with pytest.raises(BadSetting, match="must be 1, 2, 4, 8, 16, 32, got 6: .* step, 4 .*, or the 8 answers to each"):
        check_ranks(paper, World(0, 6, torch.device("cpu")))


def steps(folder: Path) -> list[dict]:
    return [record for record in read_metrics(folder) if "reward" in record]


def without_clock(record: dict) -> dict:
    clock = ("time/", "step_time", "rhythm/statistics_", "memory/", "tokens_per_second")
    return {name: value for name, value in record.items() if not name.startswith(clock)}


def assert_same(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for name in COMPARED:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), f"{name} of step {a['step']}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_steps": 1, "scale_rewards": "batch", "loss_type": "grpo", "beta": 0.02},
        {"gradient_steps": 1, "gradient_checkpointing": True, "micro_batch_tokens": 60},
        {"gradient_steps": 2, "prompts_per_step": 2},
    ],
    ids=["two-steps-a-batch", "one-step", "one-step-recomputed", "halves-of-groups"],
)
def test_two_ranks_train_as_one(base, tmp_path, changes):
    both = {name: str(tmp_path / name) for name in ("one", "two")}
    run(1, json.dumps(base | changes | {"output": both["one"]}))
    run(2, json.dumps(base | changes | {"output": both["two"]}))
    assert_same(steps(tmp_path / "one"), steps(tmp_path / "two"))
    assert any(record["grad_norm"] > 1e-3 for record in steps(tmp_path / "one"))


@pytest.mark.slow
def test_two_ranks_continue_as_if_never_stopped(base, tmp_path):
    """Two ranks to step 4 and on to 8 in a new process, against two that never stopped: equal to the bit; and against
    one process that goes on from the same checkpoint."""
    run(2, json.dumps(base | {"max_steps": 8, "output": str(tmp_path / "whole")}))
    records = steps(tmp_path / "whole")
    for ranks in (2, 1):
        copy = tmp_path / f"continued-by-{ranks}"
        shutil.copytree(tmp_path / "whole", copy)
        for checkpoint in list_checkpoints(copy)[3:]:
            shutil.rmtree(checkpoint)
        assert list_checkpoints(copy)[-1].name == "step-000004"
        run(ranks, "{}", str(copy))
        if ranks == 2:
            assert [without_clock(record) for record in steps(copy)] == [without_clock(record) for record in records]
        else:
            assert_same(steps(copy), records)
