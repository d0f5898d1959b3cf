"""Continued runs: which settings may change, more steps than before, and problems that must be the same."""

import json
import re
from pathlib import Path

import pytest
import torch
from compare_cases import make_run
from test_train_run import digit_share, steps_of, timeless
from test_train_stop import smoke
from train_cases import TOKENIZER, make_policy

from rhythm_kernels.tasks import VERIFIERS
from train.checkpoint import list_checkpoints
from train.compare.cells import choose_cells
from train.compare.grid import open_grid
from train.config import MAY_CHANGE, BadSetting, Config, RunError, flag_name
from train.flags import parse
from train.launch import launch, write_config, written
from train.metrics import FILE
from train.setup import open_run

CONSTANT = {"final_learning_rate": 1.0, "warmup_steps": 1}


@pytest.fixture(autouse=True)
def dense_reward(monkeypatch):
    """Lets a barely trained policy learn something."""
    monkeypatch.setitem(VERIFIERS, "words", digit_share)


def resume(run: Path, *flags: str) -> Config:
    """Continues a run as the command line would, and returns its configuration."""
    config, folder = parse(["--resume", str(run), *flags])
    assert launch(config, folder) == 0
    return Config.load(run / "config.json")


def test_what_does_not_change_what_is_learned_may_change(tmp_path):
    """A run that had too little memory goes on with less, and its configuration says so."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    changes = {"max_steps": 3, "save_steps": 1, **CONSTANT}
    assert launch(smoke(whole, **changes)) == 0
    assert launch(smoke(run, **{**changes, "max_steps": 1})) == 0
    flags = ["--max-steps", "3", "--micro-batch-tokens", "60", "--gradient-checkpointing", "--save-steps", "2"]
    config = resume(run, *flags)
    assert (config.grpo.micro_batch_tokens, config.model.gradient_checkpointing, config.grpo.max_steps) == (60, True, 3)
    for got, want in zip(steps_of(timeless(run)), steps_of(timeless(whole)), strict=True):
        for name in ("step", "reward", "loss", "grad_norm", "num_tokens"):
            assert got[name] == pytest.approx(want[name], rel=1e-3), (name, want["step"])
    assert [path.name for path in list_checkpoints(run)] == ["step-000002", "step-000003"]


def test_a_run_of_more_steps_is_the_run_that_had_them_from_the_start(tmp_path):
    """Also its evaluations: one was due at the step that was the last."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert launch(smoke(whole, max_steps=3, eval_steps=2, **CONSTANT)) == 0
    assert launch(smoke(run, max_steps=2, eval_steps=2, **CONSTANT)) == 0
    resume(run, "--max-steps", "3")
    assert timeless(run) == timeless(whole)
    resume(run)
    assert timeless(run) == timeless(whole)
    with pytest.raises(BadSetting, match="--max-steps must be at least the 3 steps that the run has made, got 2"):
        resume(run, "--max-steps", "2")
    assert Config.load(run / "config.json").grpo.max_steps == 3


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    """Of one seed, and of seeds that say it in processes of their own."""
    run = tmp_path / "run"
    assert launch(smoke(run, max_steps=1)) == 0
    before = (run / "config.json").read_bytes()
    with pytest.raises(BadSetting, match="--attention flash_attention_2 needs a package that is not installed"):
        resume(run, "--attention", "flash_attention_2")
    assert (run / "config.json").read_bytes() == before
    resume(run)

    both = tmp_path / "both"
    assert launch(smoke(both, max_steps=1, seeds=(0, 1))) == 0
    before = [file.read_bytes() for file in sorted(both.rglob("config.json")) if "checkpoints" not in file.parts]
    assert launch(*parse(["--resume", str(both), "--attention", "flash_attention_2"])) == 2
    after = [file.read_bytes() for file in sorted(both.rglob("config.json")) if "checkpoints" not in file.parts]
    assert len(before) == 3 and before == after


def test_the_first_policy_must_be_the_same_where_beta_compares_with_it(tmp_path):
    for beta in (0.0, 0.1):
        first, run = tmp_path / f"first {beta}", tmp_path / f"run {beta}"
        model = make_policy().model
        model.save_pretrained(first)
        TOKENIZER.save_pretrained(first)
        assert launch(smoke(run, model=str(first), max_steps=1, beta=beta, **CONSTANT)) == 0
        model.save_pretrained(first, max_shard_size="20KB")  # the same weights in other files
        (first / "notes.safetensors").write_bytes(b"no weights")
        resume(run)
        model.lm_head.weight.data[1:] += 0.1
        model.save_pretrained(first)
        if beta:
            with pytest.raises(BadSetting, match="--beta compares with the policy that the run began with, but"):
                resume(run, "--max-steps", "2")
        else:
            resume(run, "--max-steps", "2")  # its weights come from the checkpoint


def test_a_policy_that_diverged_is_not_saved(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with open_run(smoke(folder), folder) as run:
        run.save(0)
        run.policy.model.model.norm.weight.data[0] = torch.nan
        with pytest.raises(RunError, match="the policy diverged by step 1, with NaN or infinity in model.norm.weight"):
            run.save(1)
    assert [path.name for path in list_checkpoints(folder)] == ["step-000000"]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"credit_layers": "7,9"}, "--credit-layers: layers must be between -2 and 1, got 7$"),
        (
            {"credit_layers": "7,9", "credit": "none", "sample_answers": 2},
            "--credit-layers: .*; --sample-answers 0 leaves",
        ),
        (
            {"credit_local_fraction": 0.34, "credit_global_fraction": 0.66},
            "--model must have attention that can be read with these flags of credit, got Qwen3.*: .* 0.34 and",
        ),
    ],
)
def test_attention_that_cannot_be_read_is_named_before_the_model_answers(tmp_path, settings, says):
    with pytest.raises(BadSetting, match=says), open_run(smoke(tmp_path / "run", **settings), tmp_path / "run"):
        pass


def test_attention_that_nothing_reads_is_not_looked_at(tmp_path):
    (tmp_path / "run").mkdir()
    config = smoke(tmp_path / "run", credit="entropy", credit_layers="7,9", sample_answers=0)
    with open_run(config, tmp_path / "run") as run:
        assert run.step == 0


def test_the_configuration_of_a_refused_run_is_given_back_only_if_no_step_was_made(tmp_path):
    """Another seed may have gone on with the new one; and a copy of the checkpoints alone has none."""
    run, longer = tmp_path / "run", smoke(tmp_path / "run", max_steps=9)
    step = run / "checkpoints" / "step-000001"
    step.mkdir(parents=True)
    for made in (None, "step-000002"):
        write_config(smoke(run), run)
        with pytest.raises(BadSetting), written(longer, run):
            if made:
                (run / "checkpoints" / made).mkdir()
            raise BadSetting("refused")
        assert Config.load(run / "config.json").grpo.max_steps == (9 if made else 4)
    (run / "config.json").unlink()
    with written(longer, run):
        pass
    assert Config.load(run / "config.json") == longer


def test_words_that_the_model_does_not_know_are_named(tmp_path):
    problems = write_problems(tmp_path / "held-out.jsonl", [10**6])
    with pytest.raises(BadSetting, match="the model's tokenizer cannot read the problem .*1000000"):
        launch(smoke(tmp_path / "run", eval_data=(f"words:{problems}",)))


def test_the_same_output_takes_what_may_change(tmp_path):
    run = tmp_path / "run"
    assert launch(smoke(run, max_steps=1)) == 0
    assert launch(smoke(run, max_steps=1, micro_batch_tokens=60)) == 0
    assert Config.load(run / "config.json").grpo.micro_batch_tokens == 60
    with pytest.raises(BadSetting, match="holds a run with other settings: --beta 0.0 there, 0.5 now$"):
        launch(smoke(run, max_steps=1, micro_batch_tokens=60, beta=0.5))


def test_the_seeds_of_a_run_take_what_may_change(tmp_path, monkeypatch):
    config, started = smoke(tmp_path / "run", seeds=(0, 1)), []
    monkeypatch.setattr("train.launch.run_side_by_side", lambda config, folders: started.append(config) or 1)
    assert launch(config) == 1 and Config.load(tmp_path / "run" / "config.json") == config
    assert launch(*parse(["--resume", str(tmp_path / "run"), "--micro-batch-tokens", "60"])) == 1
    assert started[1] == config.change(micro_batch_tokens=60) == Config.load(tmp_path / "run" / "config.json")


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--epsilon", "0.3", "--save-steps", "7"], "--epsilon 0.2 there, 0.3 now; these may change: --micro-batch"),
        (["--max-steps", "9"], "--max-steps 4 there, 9 now; these may change: "),
        (["--output", "elsewhere"], "there, 'elsewhere' now; "),
        (["--preset", "countdown-tiny"], "but also got --preset countdown-tiny"),
        (["--vllm-gpu-memory-utilization", "0.3"], "would have no effect: the answers do not come from --engine vllm"),
        (["--micro-batch-tokens", "0"], "--micro-batch-tokens must be at least 1, got 0"),
    ],
)
def test_other_settings_are_refused_with_those_that_may_change(tmp_path, flags, says):
    (tmp_path / "config.json").write_text(smoke(tmp_path).to_json())
    with pytest.raises(BadSetting, match=re.escape(says)) as refused:
        parse(["--resume", str(tmp_path), *flags])
    if "may change" in says:
        assert all(flag_name(name) in str(refused.value) for name in (*MAY_CHANGE, "max_steps"))


def test_settings_that_may_change_are_settings_and_are_told():
    text = (Path(__file__).parent.parent / "docs" / "how-to" / "train.md").read_text(encoding="utf-8")
    assert set(MAY_CHANGE) < set(Config().flat())
    assert [name for name in MAY_CHANGE if f"`{flag_name(name)}`" not in text] == []


def test_settings_of_the_present_value_are_no_change(tmp_path):
    (tmp_path / "config.json").write_text(smoke(tmp_path).to_json())
    assert parse(["--resume", str(tmp_path), "--epsilon", "0.2", "--max-steps", "4"])[0] == smoke(tmp_path)


def write_problems(path: Path, targets) -> Path:
    path.write_text("".join(json.dumps({"numbers": [n, 2], "target": n + 2}) + "\n" for n in targets))
    return path


@pytest.mark.parametrize("name, targets", [("train", range(1, 9)), ("train", range(20, 0, -1)), ("held", [50, 52])])
def test_problems_that_changed_are_refused_on_resume(tmp_path, name, targets):
    """A file that shrank, one in another order, and another one to evaluate on."""
    files = {"train": range(1, 21), "held": [50, 51]}
    places = {name: write_problems(tmp_path / f"{name}.jsonl", numbers) for name, numbers in files.items()}
    data = {"train_data": f"words:{places['train']}", "eval_data": (f"words:{places['held']}",)}
    start, run = tmp_path / "start", tmp_path / "run"
    assert launch(smoke(start, max_steps=0)) == 0
    model = str(list_checkpoints(start)[-1] / "model")
    assert launch(smoke(run, model=model, max_steps=1, **data)) == 0
    resume(run)
    write_problems(places[name], targets)
    flag = f"--train-data words:{places['train']}" if name == "train" else "--eval-data words:held"
    then, now = (f"{len(numbers)} with SHA-256" for numbers in (files[name], targets))
    with pytest.raises(BadSetting, match=f"{flag} must hold the problems with which the run began, {then} .*got {now}"):
        resume(run)


def test_a_grid_goes_on_with_what_may_change_and_leaves_finished_runs(tmp_path):
    cells = choose_cells("countdown-smoke", ["none", "coupled"], {"eval_steps": 2})
    for cell, config in cells.items():
        folder = make_run(tmp_path / cell / "seed-0", config, 0)
        (folder / "checkpoints" / "step-000000").mkdir(parents=True)
    (tmp_path / "coupled" / "seed-0" / FILE).unlink()
    smaller = choose_cells("countdown-smoke", ["none", "coupled"], {"eval_steps": 2, "micro_batch_tokens": 60})
    with open_grid(tmp_path, smaller, None, None) as grid:
        assert [cell.is_finished for cell in grid.cells] == [True, False]
    tokens = [Config.load(tmp_path / cell / "seed-0" / "config.json").grpo.micro_batch_tokens for cell in cells]
    assert tokens == [400, 60]
