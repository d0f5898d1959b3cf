"""Signals, refused runs, lost metrics, output that lacks characters: nothing is lost and nothing is made up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train_run import command, environment, timeless
from torch.distributed.launcher.api import LaunchConfig
from train_cases import ALONE, TOKENIZER

import train.loop
from rhythm_kernels.tasks import Problem
from train import command as commands
from train.checkpoint import list_checkpoints
from train.config import BadSetting, Config, RunError
from train.evaluate import main as evaluate_main
from train.launch import environment_of_run, launch, run_side_by_side
from train.metrics import FILE, MetricsLog, read_metrics, whole_lines
from train.presets import load_preset
from train.problems import Prompts, check_fit, load_evaluations
from train.rewards import Rewards, Score
from train.rollout import Completion
from train.stop import Stopped, asked, heeded, held


def smoke(folder: Path, **changes) -> Config:
    here = {"cache": str(folder.parent / "cache"), "output": str(folder), "sample_answers": 0, "sft_steps": 2}
    return load_preset("countdown-smoke").change(**here | changes)


def flags_of(folder: Path, **changes) -> list[str]:
    given = {"cache": folder.parent / "cache", "output": folder, "sample_answers": 0, "sft_steps": 2} | changes
    return ["--preset", "countdown-smoke", *(f"--{k.replace('_', '-')}={v}" for k, v in given.items())]


def wait_until(holds, process) -> None:
    for _ in range(3000):
        if holds() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert holds(), f"the run ended early, with {process.poll()}"


def lines(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in folder.rglob(FILE))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.slow
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_continues_bit_for_bit(tmp_path, number):
    changes = {"max_steps": 30, "save_steps": 100}
    run = subprocess.Popen(
        command(*flags_of(tmp_path / "run", **changes)),
        env=environment(),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup has it ignored, and so would the run
    )
    wait_until(lambda: lines(tmp_path / "run") > 3, run)
    run.send_signal(number)
    said = run.communicate()[1].decode()
    assert run.returncode == 128 + number and number.name in said and "Traceback" not in said
    assert 3 <= int(list_checkpoints(tmp_path / "run")[-1].name[5:]) < 30
    assert launch(Config.load(tmp_path / "run" / "config.json"), tmp_path / "run") == 0
    assert launch(smoke(tmp_path / "whole", **changes)) == 0
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


@pytest.mark.parametrize("when, saved", [("scoring", 1), ("update", 2)])
def test_a_step_that_is_stopped_after_its_scoring_is_kept_whatever_failed_in_it(tmp_path, monkeypatch, when, saved):
    """A signal in the second step: before its scores are there it may be why they fail, and the first step is saved."""
    config, run, calls = smoke(tmp_path / "run", max_steps=3, save_steps=100), tmp_path / "run", []

    def stopping(original):
        def wrapped(*arguments, **options):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(Rewards, "score", lambda self, texts, *rest: [Score(0.0, "worker died") for _ in texts])
        if when == "scoring":
            patch.setattr(train.loop, "pack", stopping(train.loop.pack))
        else:
            patch.setattr(train.loop, "update_policy", stopping(train.loop.update_policy))
        assert commands.run("python -m train", lambda: launch(config)) == 143
    assert list_checkpoints(run)[-1].name == f"step-00000{saved}"
    assert [record["step"] for record in read_metrics(run)] == [0, *range(1, saved + 1)]


def test_a_step_that_is_not_kept_is_made_again_bit_for_bit(tmp_path, monkeypatch):
    changes = {"max_steps": 3, "save_steps": 100}
    score = Rewards.score

    def stopped(self, texts, *rest):
        if len(read_metrics(tmp_path / "run")) == 2:  # the first evaluation and the first step
            os.kill(os.getpid(), signal.SIGTERM)
            return [Score(0.0, "worker died") for _ in texts]
        return score(self, texts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Rewards, "score", stopped)
        assert commands.run("python -m train", lambda: launch(smoke(tmp_path / "run", **changes))) == 143
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-000001"
    assert launch(Config.load(tmp_path / "run" / "config.json"), tmp_path / "run") == 0
    assert launch(smoke(tmp_path / "whole", **changes)) == 0
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_seeds_end_with_their_run_however_it_ends(tmp_path, number):
    given = command(*flags_of(tmp_path / "run", max_steps=3000, save_steps=3000), "--seeds", 0, 1)
    run = subprocess.Popen(given, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: lines(tmp_path / "run") > 4, run)
    run.send_signal(number)
    run.wait()
    here = str(tmp_path).encode()
    for _ in range(600):
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if here in _read(path)]
        if not left:
            break
        time.sleep(0.1)
    assert not left
    assert list((tmp_path / "run").glob("seed-*/checkpoints/step-*[1-9]*"))  # what began to train is saved


@pytest.mark.parametrize("failing, how, status", [(0, "exit 3", 3), (1, "exit 3", 3), (1, "kill -9 $$", 1)])
def test_a_seed_that_fails_ends_the_others(tmp_path, monkeypatch, failing, how, status):
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\ncase "$4" in *seed-{failing}) {how};; *) exec sleep 60;; esac\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    folders = [tmp_path / f"seed-{seed}" for seed in (0, 1)]
    assert run_side_by_side(smoke(tmp_path / "run", seeds=(0, 1)), folders) == status


@pytest.mark.parametrize("visible, own", [("4,5", ["4", "5", "4"]), ("", ["0", "1", "0"]), (None, ["-", "-", "-"])])
def test_seeds_take_turns_at_the_gpus(tmp_path, monkeypatch, visible, own):
    """Three seeds share two GPUs. Without one nothing is said of GPUs."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "${CUDA_VISIBLE_DEVICES--} $OMP_NUM_THREADS" > "$4/seen"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr("train.distributed.choose_device", lambda name: "cuda")
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    folders = [tmp_path / f"seed-{seed}" for seed in range(3)]
    assert run_side_by_side(smoke(tmp_path / "run", seeds=(0, 1, 2)), folders) == 0
    assert [(folder / "seen").read_text().split() for folder in folders] == [[gpu, "1"] for gpu in own]


def test_torchrun_waits_for_a_step_and_a_checkpoint(monkeypatch):
    """It waits as long as the runs of a grid or the user ask it to. Before torch 2.12 it cannot be asked."""
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    if "shutdown_timeout" not in LaunchConfig.__dataclass_fields__:
        pytest.skip("torchrun waits for 30 seconds with a torch before 2.12; the usual environment has 2.13")
    for given, waits in ((None, 3600), ("60", 60)):
        monkeypatch.delenv(name, raising=False) if given is None else monkeypatch.setenv(name, given)
        monkeypatch.setenv(name, environment_of_run([], 1)[name])
        assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == waits


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_signal_waits_for_the_end_of_what_must_not_be_torn():
    done = []
    with pytest.raises(Stopped, match="SIGTERM"), heeded(), held():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        assert asked() == signal.SIGTERM
        done.append("the step")
    assert done and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with heeded():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def record(step: int) -> bytes:
    return json.dumps({"step": step, "reward": 0.5}).encode() + b"\n"


WHOLE = record(0) + record(1) + record(2)


@pytest.mark.parametrize(
    "content, kept",
    [
        (WHOLE, WHOLE),
        (WHOLE + record(3), WHOLE),
        (b"", b""),
        (WHOLE[:-5], record(0) + record(1)),
        (b"\0" * len(WHOLE), b""),
        (record(1) + record(2) + record(3) + record(4), record(1) + record(2)),
        (record(0) + b"my notes\n" + record(1) + record(2), record(0)),
        (b'"step"\n' * 30, b""),
        (b"[" * 100_000 + b"\n", b""),
    ],
    ids=["whole", "longer", "empty", "torn", "nul", "first-line-lost", "foreign-line", "other-json", "nested"],
)
def test_only_lines_of_the_run_are_kept_and_lost_ones_are_told(tmp_path, content, kept):
    (tmp_path / FILE).write_bytes(content)
    assert whole_lines(tmp_path / FILE, 2, len(WHOLE)) == len(kept)
    log = MetricsLog(tmp_path, 2, len(WHOLE), ALONE)
    log.close()
    assert (tmp_path / FILE).read_bytes() == kept
    assert bool(log.missing) == (kept != WHOLE)


def test_a_run_without_its_metrics_says_so_and_makes_no_number_up(tmp_path, capsys):
    run = tmp_path / "run"
    assert launch(smoke(run, max_steps=2, save_steps=1)) == 0
    (run / FILE).unlink()
    capsys.readouterr()
    assert launch(Config.load(run / "config.json"), run) == 0
    said = capsys.readouterr().out
    assert f"{run / FILE} lacks" in said and "not known" in said and "points of" not in said


def test_a_refused_run_does_not_refuse_the_next(tmp_path):
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    with pytest.raises(BadSetting):
        launch(smoke(run, model="-", train_data=f"maths:{rows}", eval_data=(f"maths:{rows}",)))
    (run / "config.json.tmp").write_text("{")  # of a process that was killed while it wrote
    assert launch(smoke(run, max_steps=0)) == 0
    with pytest.raises(BadSetting, match="holds a run with other settings"):
        launch(smoke(run, max_steps=1))


@pytest.mark.parametrize("place", ["a-file", "a-file/below", "/proc/nowhere/run"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, place):
    (tmp_path / "a-file").write_text("")
    with pytest.raises(BadSetting, match="--output must be a folder to write in"):
        launch(smoke(tmp_path / place))
    with pytest.raises(BadSetting, match="--cache must be a folder to write in"):
        launch(smoke(tmp_path / "run", cache=str(tmp_path / place)))


def test_output_without_unicode_is_escaped():
    program = "from train.command import run; run('x', lambda: print('1 ± 2 \u23ce') or 0)"
    plain = environment() | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], env=plain, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("1 \\xb1 2 \\u23ce\n", "", 0)


def missing_behind_another() -> ImportError:
    error = ImportError("Could not import module 'X'")
    error.__cause__ = ModuleNotFoundError("No module named 'reasoning_gym.x'", name="reasoning_gym.x")
    return error


@pytest.mark.parametrize(
    "error, status, said",
    [
        (BadSetting("--x must be 1"), 2, "--x must be 1"),
        (RunError("a checkpoint\n  is damaged"), 1, "a checkpoint is damaged"),
        (PermissionError(13, "Permission denied", "/x"), 1, "[Errno 13] Permission denied: '/x'"),
        (ModuleNotFoundError("No module named 'math_verify'", name="math_verify"), 1, "pip install math-verify"),
        (ModuleNotFoundError("No module named 'datasets.x'", name="datasets.x"), 1, "pip install datasets"),
        (ModuleNotFoundError("vLLM: pip install vllm", name="vllm"), 1, "vLLM: pip install vllm"),
        (missing_behind_another(), 1, "pip install reasoning-gym"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_expected_errors_are_one_line(error, status, said, capsys):
    def work():
        raise error

    assert commands.run("python -m train", work) == status
    told = capsys.readouterr().err.strip()
    assert told.startswith("python -m train: ") and said in told and "\n" not in told


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"), MemoryError("full")])
def test_memory_that_does_not_suffice_is_told_with_the_flags_that_take_it(tmp_path, monkeypatch, capsys, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(train.loop, "update_policy", full)
    config = smoke(tmp_path / "run")
    assert commands.run("python -m train", lambda: launch(config)) == 1
    flags = "--micro-batch-tokens 400 and --rollout-batch-size 256"
    text = " ".join(str(error).split())
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"python -m train: out of memory with {flags}, of which less takes less memory: {text}"
    model = str(list_checkpoints(tmp_path / "run")[-1])
    monkeypatch.setattr("train.rollout.TransformersEngine.generate", full)
    assert evaluate_main([model]) == 1
    assert "out of memory with --rollout-batch-size 256, of which less" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("a fault"), ImportError("no name x", name="train.loop"), KeyError("x")])
def test_faults_of_the_program_are_raised(error):
    def work():
        raise error

    with pytest.raises(type(error)):
        commands.run("python -m train", work)


def test_evaluation_sets_have_names_of_their_own(tmp_path):
    names = []
    for folder, file in (("x", "held.jsonl"), ("y", "held.jsonl"), ("x", "held.json")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text('{"problem": "1+1?", "answer": 2}\n')
        names.append(f"maths:{tmp_path / folder / file}")
    for pair in ((names[0], names[1]), (names[0], names[2]), (names[0], names[0])):
        with pytest.raises(BadSetting, match="--eval-data must be sets of different names.*maths:held"):
            load_evaluations(pair, None)
    assert [each.name for each in load_evaluations([names[0]], None)] == ["maths:held"]


class Ending:
    """A tokenizer of numbers that ends every text, twice, and has tags."""

    chat_template = None
    eos_token_id, sep_token_id, bos_token_id, pad_token_id = 1, 2, 3, 0

    def encode(self, text):
        return [3, *map(int, text.split()), 1, 2]

    def batch_decode(self, rows, skip_special_tokens):
        assert not skip_special_tokens
        return [" ".join(map(str, row)) for row in rows]


def test_prompts_do_not_end_and_answers_keep_their_tags():
    prompts = Prompts(Ending(), Config(), stops=[1, 9])
    assert prompts.encode(Problem("7 8", "", "words")) == [3, 7, 8]
    assert prompts.encode(Problem("7 9", "", "words")) == [3, 7]  # 9 ends an answer of this model
    ids = [3, 50, 7, 51, 1, 0, 0]
    assert prompts.decode([Completion(ids, [0.0] * len(ids), "stop")]) == ["50 7 51"]


def test_a_prompt_and_its_answer_go_into_the_model(tmp_path):
    config = smoke(tmp_path / "run", max_steps=0)
    assert launch(config) == 0
    model = str(list_checkpoints(tmp_path / "run")[-1] / "model")
    prompts = Prompts(TOKENIZER, config, [TOKENIZER.eos_token_id])
    prompts.longest, prompts.largest_id = 5, 20
    check_fit(model, prompts, config.change(max_completion_length=24))
    with pytest.raises(
        BadSetting, match="--max-completion-length must leave a sequence within the model's 29 positions"
    ):
        check_fit(model, prompts, config.change(max_completion_length=25))
    prompts.largest_id = len(TOKENIZER)
    with pytest.raises(BadSetting, match="--model must have a row for every token"):
        check_fit(model, prompts, config)
    prompts.largest_id, prompts.stops = 20, [-1, len(TOKENIZER)]
    with pytest.raises(BadSetting, match=r"--model must have a row for a token that ends an answer, got \d+ rows, and"):
        check_fit(model, prompts, config)
