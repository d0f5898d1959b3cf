"""Whole runs of the smallest preset: they repeat a golden record, survive a kill, and run with every credit."""

import errno
import itertools
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from train_cases import ALONE
from transformers import AutoModelForCausalLM, AutoTokenizer

import train.checkpoint
import train.loop
import train.reading
import train.setup
from rhythm_kernels import collect, group_heads
from rhythm_kernels.options import STRATEGIES
from rhythm_kernels.tasks import VERIFIERS
from train.checkpoint import MODEL, list_checkpoints
from train.command import run as run_command
from train.config import Config
from train.distributed import World
from train.launch import claim, launch
from train.metrics import UNVERIFIED, MetricsLog, learning_warnings, read_metrics
from train.presets import load_preset
from train.samples import SHOWN, render

GOLDEN = Path(__file__).parent / "golden" / "countdown-smoke.json"
REGENERATE = "REGENERATE_GOLDEN"  # set it to 1 to write the golden record anew instead of comparing with it
GOLDEN_METRICS = ("reward", "loss", "entropy", "completions/mean_length", "grad_norm", "rhythm/gamma_mean")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder of warm starts for all the runs here, so that the first of them trains it and the others find it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def smoke(cache, tmp_path):
    def make(**changes) -> Config:
        here = {"cache": str(cache), "output": str(tmp_path / "run")}
        return load_preset("countdown-smoke").change(**here | changes)

    return make


def timeless(run: Path) -> list[dict]:
    """A run's metrics without the clock's."""
    clock = ("time/", "step_time", "rhythm/statistics_", "memory/", "tokens_per_second")
    return [{k: v for k, v in record.items() if not k.startswith(clock)} for record in read_metrics(run)]


def steps_of(records: list[dict]) -> list[dict]:
    return [record for record in records if "reward" in record]


def command(*flags) -> list[str]:
    return [sys.executable, "-m", "train", *map(str, flags)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent.parent)}


EVERY_THIRD = {"credit_groups_every": 3, "credit_group_by": "batch"}


def digit_share(completion: str, answer: str) -> float:
    """A dense reward in place of the task's own, so that a barely trained policy has something to learn."""
    words = completion.split()
    return sum(word.isdigit() for word in words) / max(1, len(words))


def test_golden_run(smoke, tmp_path, monkeypatch):
    """Fixed seeds give the recorded losses: a short warm start, then GRPO with coupled credit on a dense reward.

    Short, because rounding that differs from CPU to CPU grows with every step; the tolerance is for what is left.
    After a change that is meant to change training: REGENERATE_GOLDEN=1 pytest tests/test_train_run.py -k golden
    """
    monkeypatch.setitem(VERIFIERS, "words", digit_share)
    assert launch(smoke(sft_steps=10, sft_learning_rate=1e-3)) == 0
    got = [
        {name: record[name] for name in ("step", *GOLDEN_METRICS)}
        for record in steps_of(read_metrics(tmp_path / "run"))
    ]
    if os.environ.get(REGENERATE):
        GOLDEN.write_text("[\n" + ",\n".join(f"  {json.dumps(record)}" for record in got) + "\n]\n")
    expected = json.loads(GOLDEN.read_text())
    assert len(got) == len(expected) == load_preset("countdown-smoke").grpo.max_steps
    for record, want in zip(got, expected, strict=True):
        assert record == pytest.approx(want, rel=5e-3, abs=5e-4)


def test_run_folder_holds_everything(smoke, tmp_path, capsys):
    config, run = smoke(), tmp_path / "run"
    assert launch(config) == 0
    assert Config.load(run / "config.json") == config
    records = read_metrics(run)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 4]
    assert {"eval/sampled/solved", "eval/greedy/standard_error", "eval/sampled/finished"} <= set(records[0])
    trl = {"reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio"}
    own = {"entropy", "step_time", "learning_rate", "rhythm/gamma_mean", "rhythm/statistics_share"}
    assert all(trl | own <= set(record) for record in steps_of(records))
    assert all(0 < record["rhythm/statistics_share"] < 1 for record in steps_of(records))
    assert all(record["sampling/sampling_logp_difference/max"] < 1e-4 for record in steps_of(records))
    tokens = [record["num_tokens"] for record in steps_of(records)]
    of_steps = [record["tokens_per_second"] * record["step_time"] for record in steps_of(records)]
    assert tokens == pytest.approx([*itertools.accumulate(of_steps)]) and tokens[0] > 32 * 5  # as TRL counts them
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*"))
    checkpoint = list_checkpoints(run)[-1]
    assert checkpoint.name == "step-000004" and len(list_checkpoints(run)) == config.run.save_total_limit
    model = AutoModelForCausalLM.from_pretrained(checkpoint / MODEL)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(checkpoint / MODEL))
    kinds = {path.suffix for path in checkpoint.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed and "±" in printed and "finished" in printed
    assert "statistics" in printed and str(run) in printed


@pytest.mark.parametrize("credit", STRATEGIES)
def test_every_credit_runs(smoke, tmp_path, credit):
    assert launch(smoke(credit=credit, max_steps=2)) == 0
    steps = steps_of(read_metrics(tmp_path / "run"))
    assert len(steps) == 2
    for record in steps:
        share, mean = record["rhythm/credited_share"], record["rhythm/gamma_mean"]
        assert (share == 0 and mean == 1) if credit == "none" else (0.2 < share < 0.8 and 1 < mean < 1.5)
        assert ("rhythm/waad_mean" in record) == (credit in ("local", "global", "coupled"))
        assert (record["time/statistics"] > 0) == (credit in ("local", "global", "coupled"))


@pytest.mark.parametrize(
    "changes",
    [
        {
            "loss_type": "grpo",
            "scale_rewards": "none",
            "num_iterations": 2,
            "temperature": 0.8,
            "credit_group_by": "batch",
        },
        {"loss_type": "dr_grpo", "gradient_steps": 4, "credit_largest": False, "credit": "local", "operators": "+-*/"},
        {"numbers": 3, "largest": 5, "dtype": "bfloat16", "sample_answers": 0, "credit": "entropy", "sft_steps": 2},
        {"max_steps": 0},
        {
            "gradient_steps": 1,
            "gradient_checkpointing": True,
            "scale_rewards": "batch",
            "layers": 6,
            "credit_layers": 2,
        },
        {"gradient_steps": 1, "credit": "none", "attention": "sdpa", "mask_truncated_completions": True},
        {"beta": 0.05, "vllm_importance_sampling_correction": True, "weight_decay": 0.1, "final_learning_rate": 1.0},
    ],
    ids=["grpo", "dr_grpo", "bfloat16", "no-steps", "one-step-checkpointed", "one-step-no-credit", "kl-and-correction"],
)
@pytest.mark.slow
def test_other_settings_run(smoke, tmp_path, changes):
    assert launch(smoke(**{"max_steps": 1, **changes})) == 0
    records = read_metrics(tmp_path / "run")
    assert all(map(_finite, records))
    assert all(("kl" in record) == ("beta" in changes) for record in steps_of(records))


def test_pages_and_evaluations_come_when_they_are_due(smoke, tmp_path):
    assert launch(smoke(max_steps=5, eval_steps=2, credit="none")) == 0
    run = tmp_path / "run"
    assert [record["step"] for record in read_metrics(run) if "reward" not in record] == [0, 2, 4, 5]
    pages = sorted((run / "samples").iterdir())
    assert [path.name for path in pages] == [f"step-00000{step}.html" for step in (0, 2, 4, 5)]
    for page in pages:
        assert page.read_text().count("<article>") == 4 and page.read_text().count('class="row"') == 12


def _finite(record: dict) -> bool:
    return all(abs(value) < float("inf") for value in record.values())


def test_head_groups_are_kept_between_calibrations(smoke, tmp_path, monkeypatch, capsys):
    """Steps 1 and 4, of two passes each, compute spans; steps 2 and 3 get the groups of the first."""
    passes = []

    def recorded(*arguments, **options):
        passes.append((options["groups"], options["response_mask"], collect(*arguments, **options)))
        return passes[-1][-1]

    monkeypatch.setattr(train.reading, "collect", recorded)
    assert launch(smoke(**EVERY_THIRD, sample_answers=0)) == 0
    del passes[0]  # the check before the run
    rhythms = [collected.rhythm() for *_, collected in passes]
    assert [rhythm.spans is not None for rhythm in rhythms] == [True] * 2 + [False] * 4 + [True] * 2
    tokens = [mask.sum() for _, mask, _ in passes[:2]]
    pooled = sum(rhythm.spans.double() * n for rhythm, n in zip(rhythms, tokens)) / sum(tokens)
    for groups, *_ in passes[2:6]:
        assert all(map(torch.equal, groups, group_heads(pooled)))
    drift = {"rhythm/groups_spearman", "rhythm/groups_local_overlap", "rhythm/groups_global_overlap"}
    steps = steps_of(read_metrics(tmp_path / "run"))
    assert [drift & set(record) for record in steps] == [set(), set(), set(), drift]
    assert f"Spearman {steps[3]['rhythm/groups_spearman']:.3f}" in capsys.readouterr().out


class Killed(BaseException):
    pass


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # nobody closes the files of a run that stops so
@pytest.mark.parametrize(
    "where, changes",
    [("rollout", {}), ("save", {}), ("rollout", EVERY_THIRD)],
    ids=["rollout", "save", "with-kept-groups"],
)
def test_a_stopped_run_continues_bit_for_bit(smoke, tmp_path, monkeypatch, where, changes):
    """Stopped in the middle of a step, or between the checkpoint's files and its name.

    Kept groups are those of step 1 at step 3, done again, and what the calibration of step 4 is compared with.
    """
    assert launch(smoke(output=str(tmp_path / "whole"), **changes)) == 0
    run, config = tmp_path / "run", smoke(**changes)
    calls = []

    def stop(original, at):
        def wrapped(*arguments, **options):
            calls.append(1)
            if len(calls) == at:
                raise Killed
            return original(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        if where == "rollout":
            patch.setattr(train.loop, "update_policy", stop(train.loop.update_policy, at=4))
        else:
            patch.setattr(train.checkpoint, "_publish", stop(train.checkpoint._publish, at=2))
        with pytest.raises(Killed):
            launch(config)
    assert not (run / "samples" / "step-000004.html").exists()
    if where == "rollout":
        assert len(steps_of(read_metrics(run))) == 3  # beyond the checkpoint of step 2: to be cut off and done again
    assert launch(Config.load(run / "config.json"), run) == 0
    assert timeless(run) == timeless(tmp_path / "whole")
    last = [list_checkpoints(folder)[-1] / MODEL / "model.safetensors" for folder in (run, tmp_path / "whole")]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.slow
def test_two_seeds_run_side_by_side(smoke, tmp_path):
    """Through the command line; each seed is the run that it would be alone."""
    flags = ["--preset", "countdown-smoke", "--cache", smoke().run.cache, "--max-steps", 2, "--seeds", 0, 1]
    done = subprocess.run(
        command(*flags, "--output", tmp_path / "both"), env=environment(), capture_output=True, text=True, check=True
    )
    assert re.search(r"seed 0 +sampled.*\n.*greedy.*\nseed 1 +sampled.*\n.*greedy.*\nmean +sampled", done.stdout)
    assert (tmp_path / "both" / "learning_curve.png").exists()
    for seed in (0, 1):
        assert launch(smoke(max_steps=2, seeds=(seed,), output=str(tmp_path / f"alone-{seed}"))) == 0
        assert timeless(tmp_path / "both" / f"seed-{seed}") == timeless(tmp_path / f"alone-{seed}")
    assert timeless(tmp_path / "alone-0") != timeless(tmp_path / "alone-1")


def test_output_of_another_run_is_refused(smoke, tmp_path):
    assert launch(smoke(max_steps=0)) == 0
    with pytest.raises(ValueError, match="--learning-rate 0.0002 there, 0.1 now"):
        launch(smoke(max_steps=0, learning_rate=0.1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="--output must be a new folder"):
        launch(smoke(output=str(tmp_path / "other")))


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(smoke, tmp_path, monkeypatch, capsys):
    def full(self, step, metrics):
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, step, metrics)

    write = MetricsLog.write
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", full)
        assert run_command("python -m train", lambda: launch(smoke())) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "--resume" in said
    assert launch(Config.load(tmp_path / "run" / "config.json"), tmp_path / "run") == 0
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 4]


def test_a_damaged_checkpoint_is_named_with_the_older_one(smoke, tmp_path, capsys):
    assert launch(smoke()) == 0
    run = tmp_path / "run"
    (list_checkpoints(run)[-1] / "rank-0.safetensors").write_bytes(b"")
    assert run_command("python -m train", lambda: launch(Config.load(run / "config.json"), run)) == 1
    said = capsys.readouterr().err
    assert "step-000004" in said and "rank-0.safetensors" in said and "step-000002" in said


def test_changed_settings_are_named_on_resume(smoke, tmp_path, capsys):
    assert launch(smoke()) == 0
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"epsilon": 0.2', '"epsilon": 0.3'))
    assert run_command("python -m train", lambda: launch(Config.load(path), tmp_path / "run")) == 1
    assert "epsilon" in (said := capsys.readouterr().err) and "0.2" in said and "0.3" in said


def test_models_are_folders_or_come_from_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or "/there")
    assert train.setup.local_model(str(tmp_path), ALONE) == str(tmp_path) and not asked
    assert train.setup.local_model("Qwen/Qwen3-4B-Base", ALONE) == "/there" and set(asked) == {"Qwen/Qwen3-4B-Base"}
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="--model must be a folder or a model on the Hugging Face hub, got 'no/such/thing'"
    ):
        train.setup.local_model("no/such/thing", ALONE)


def test_problems_are_shared_out_evenly_or_not_at_all(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(World, "join", lambda device: ALONE._replace(size=3))
    monkeypatch.setattr(World, "from_first", lambda self, make: make())
    says = "the ranks of torchrun must be 1, 2, 4, 8, 16, got 3: they share the problems of an optimizer step, 4 "
    with pytest.raises(ValueError, match=says):
        launch(smoke())


def test_one_process_a_folder(tmp_path):
    with claim(tmp_path), pytest.raises(ValueError, match="another process is training"), claim(tmp_path):
        pass


METRICS = {"frac_reward_zero_std": 0.5, "completions/clipped_ratio": 0.5, "reward": 0.1}


def test_warnings_when_nothing_can_be_learned(smoke, capsys, monkeypatch):
    metrics = METRICS
    assert not learning_warnings(metrics)
    assert "equal rewards" in learning_warnings(metrics | {"frac_reward_zero_std": 1.0}).pop()
    assert "cut off" in learning_warnings(metrics | {"completions/clipped_ratio": 1.0}).pop()
    monkeypatch.setattr(train.setup, "stop_ids", lambda *_: [114])  # a token that the barely trained policy avoids
    assert launch(smoke(max_completion_length=2, max_steps=3, sft_steps=20)) == 0
    printed = capsys.readouterr().out
    assert printed.count("every answer was cut off") == printed.count("every group's answers got equal rewards") == 1


def test_verification_that_fails_is_told_and_not_taken_for_a_hard_task(smoke, capsys, monkeypatch):
    def verify(completion, answer):
        raise MemoryError

    assert learning_warnings(METRICS | {"frac_reward_zero_std": 1.0, "rewards/error_share": 0.6}) == {UNVERIFIED}
    assert not learning_warnings(METRICS | {"rewards/error_share": 0.4})
    monkeypatch.setitem(VERIFIERS, "words", verify)
    config = smoke(max_steps=2)
    assert launch(config) == 0
    printed, answers = capsys.readouterr().out, config.rollout.prompts_per_step * config.rollout.num_generations
    assert printed.count(UNVERIFIED) == 1 and f"{UNVERIFIED}: MemoryError:  ({answers})" in printed
    assert "equal rewards" not in printed and f"NOT VERIFIED {answers}" in printed
    assert "answers to sampled could not be verified and count as wrong: MemoryError" in printed
    [*_, last] = [record for record in read_metrics(Path(config.run.output)) if "reward" in record]
    assert (last["rewards/errors"], last["rewards/error_share"]) == (answers, 1.0)


class Texts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.outside = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def answer_of(words: list[str], prompt: str = "1 2 ? 3 >") -> dict:
    signals = {name: [0.1] * len(words) for name in ("waad", "fai", "entropy")}
    return {
        "prompt": prompt,
        "verdict": "solved",
        "words": words,
        "gamma": [1.5] * len(words),
        "signals": signals,
    }


def read_page(page: str) -> Texts:
    reader = Texts()
    reader.feed(page)
    return reader


def test_sample_page_escapes_what_the_model_wrote():
    evil = "<script>alert('&\"1\"')</script>"
    page = render([answer_of([evil], prompt=evil)], Config(preset=evil))
    reader = read_page(page)
    assert "script" not in reader.tags and not reader.outside
    assert reader.texts.count(evil) == 4  # the prompt, and the token in three rows
    assert page.count('class="credited"') == 3
    turned = read_page(render([answer_of(["a\u202eb\n"])], Config()))  # the mark would turn the text behind it
    assert turned.texts.count("a⟨U+202E⟩b⏎") == 3


def test_sample_page_shortens_long_answers():
    words = [f"w{t}" for t in range(SHOWN + 700)]
    reader = read_page(render([answer_of(words)], Config()))
    shown = [text for text in reader.texts if re.fullmatch(r"w\d+", text)]
    assert len(shown) == 3 * SHOWN and shown[0] == "w0" and shown[-1] == words[-1]
    assert reader.texts.count("700 tokens left out") == 3
    assert f"solved, {len(words)} tokens" in reader.texts


def test_sample_page_shows_the_run(smoke, tmp_path):
    config = smoke(max_steps=0)
    assert launch(config) == 0
    page = (tmp_path / "run" / "samples" / "step-000000.html").read_text()
    assert page.count("<article>") == config.run.sample_answers
    assert "WAAD" in page and 'class="credited"' in page
