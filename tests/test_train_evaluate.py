"""Evaluation: averages over problems and answers, the paper's table, and the command line on a run's folder."""

import json
import math
import re

import pytest
import torch
from matplotlib.axes import Axes
from train_cases import ALONE, TOKENIZER, settings

from rhythm_kernels.tasks import VERIFIERS, Problem
from train.config import Config, flag_name
from train.console import Phases
from train.distributed import World
from train.evaluate import FLAGS, choose_settings, find_model, main
from train.launch import launch
from train.loop import is_due
from train.metrics import read_metrics
from train.plots import plot_learning_curve, smooth
from train.presets import load_preset
from train.problems import EvalSet, Prompts, load_held_out, load_task
from train.report import report
from train.rewards import Rewards
from train.rollout import Completion
from train.solve_rates import Evaluation, SolveRate, cut_off, evaluate, peak_average, peak_averages

PROBLEMS = [Problem(f"{a} {b} ? {a + b} >", json.dumps({"numbers": [a, b], "target": a + b}), "words") for a, b in
            ((1, 2), (3, 4), (5, 6), (7, 8))]  # fmt: skip


class Scripted:
    """Solves the i-th problem in the first i of its answers; every fourth answer is cut off, solved or not."""

    def __init__(self):
        self.calls = []

    def generate(self, prompts, n, sampling, progress=None):
        self.calls.append((len(prompts), n, sampling))
        made = []
        for prompt in prompts:
            a, b = (int(word) for word in TOKENIZER.decode(prompt).split()[:2])
            for answer in range(n):
                right = TOKENIZER.encode(f"A {a} + {b}")
                wrong = TOKENIZER.encode(f"A {a} - {b}")
                ids = right if answer < a // 2 + 1 else wrong
                made.append(Completion(ids, [0.0] * len(ids), "length" if answer % 4 == 3 else "stop"))
        return made

    def sync(self, weights):
        pass

    def sleep(self):
        pass

    wake = close = sleep


def test_means_over_answers_and_errors_over_problems():
    engine, config = Scripted(), settings()
    sets = [EvalSet("four", PROBLEMS, 4, 0.6), EvalSet("greedy", PROBLEMS, 1, None)]
    with Rewards(1, 1.0) as rewards:
        found = evaluate(engine, sets, Prompts(TOKENIZER, config), rewards, config, ALONE).rates
    # 1, 2, 3 and 4 of 4 answers are right, and the fourth is cut off, so that it does not count
    expected = torch.tensor([0.25, 0.5, 0.75, 0.75])
    assert found["four"].solved == pytest.approx(expected.mean().item())
    assert found["four"].standard_error == pytest.approx(expected.std(correction=0).item() / 2)
    assert (found["four"].finished, found["four"].problems, found["four"].answers) == (0.75, 4, 4)
    assert found["four"].errors == found["greedy"].errors == 0 and "VERIFIED" not in str(found["four"])
    assert found["greedy"].solved == 1.0 and found["greedy"].standard_error == 0
    assert [call[:2] for call in engine.calls] == [(4, 4), (4, 1)]
    assert [call[2].temperature for call in engine.calls] == [0.6, None]


def test_answers_that_could_not_be_verified_are_told(monkeypatch, capsys):
    def verify(completion, answer):
        raise MemoryError(completion) if "-" in completion else KeyError("no such number")

    monkeypatch.setitem(VERIFIERS, "words", verify)
    config = settings()
    with Rewards(1, 1.0) as rewards:
        found = evaluate(
            Scripted(), [EvalSet("four", PROBLEMS, 4, 0.6)], Prompts(TOKENIZER, config), rewards, config, ALONE
        )
    assert found.rates["four"].errors == found.metrics()["eval/four/errors"] == 16
    assert "NOT VERIFIED 16" in str(found) and Evaluation.from_metrics(found.metrics()) == found
    printed = capsys.readouterr().out
    assert "warning: 16 of 16 answers to four could not be verified and count as wrong: KeyError: 'no such" in printed


def test_ranks_share_the_problems():
    class WithAnother(World):
        def sum(self, values):
            return values + torch.tensor([1.25, 0.25**2 + 1, 1.5, 2], dtype=values.dtype)  # solved 0.25 and 1

    engine, config = Scripted(), settings()
    with Rewards(1, 1.0) as rewards:
        sets = [EvalSet("four", PROBLEMS, 4, 1.0)]
        rate = evaluate(engine, sets, Prompts(TOKENIZER, config), rewards, config, WithAnother(1, 2, ALONE.device))
    assert rate.rates["four"].errors == 2
    assert engine.calls[0][0] == 2  # the second and the fourth: 0.5 and 0.75
    assert rate.rates["four"].solved == pytest.approx((0.5 + 0.75 + 0.25 + 1) / 4)


def test_evaluations_come_back_from_metrics():
    rates = {"aime24": SolveRate(0.2, 0.9, 0.05, 30, 16), "math-500": SolveRate(0.7, 1.0, 0.02, 500)}
    found = Evaluation(rates)
    assert Evaluation.from_metrics({"step": 3, **found.metrics()}) == found
    heads, _, cells = found.table().splitlines()
    assert heads == "| | aime24 (avg@16) | math-500 | mean |"
    assert cells == "| solved | 20.0 ± 5.0 | 70.0 ± 2.0 | 45.0 |"
    assert found.table({"math-500": 0.72, "aime24": 0.24, "amc23": 0.9}, 0.5).splitlines()[3] == (
        "| peak average of the run, a = 0.5 | 24.0 | 72.0 | 48.0 |"
    )
    assert found.table({"aime24": 0.24}, 0.5).splitlines()[3].endswith("| 24.0 | - | - |")


@pytest.mark.slow
def test_command_line_on_a_run(tmp_path, capsys):
    """A run's folder stands for its last checkpoint, with the run's settings: the rates are those that the run had."""
    config = load_preset("countdown-smoke").change(
        cache=str(tmp_path / "cache"), output=str(tmp_path / "run"), max_steps=2, sample_answers=0
    )
    assert launch(config) == 0
    capsys.readouterr()
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000002"):
        assert main([str(place)]) == 0
        printed = capsys.readouterr().out
        rates = Evaluation.from_metrics(read_metrics(tmp_path / "run")[-1]).rates
        assert f"| {100 * rates['sampled'].solved:.1f} ± " in printed and "| sampled | greedy | mean |" in printed
        assert ("peak average of the run, a = 0.2" in printed) == (place.name == "run")
    before, after = (
        Evaluation.from_metrics(read_metrics(tmp_path / "run")[at]).rates["greedy"].solved for at in (0, -1)
    )
    peak = before + 0.5 * max(0, after - before)
    assert main([str(tmp_path / "run"), "--eval-temperature", "0", "--peak-weight", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert f"| | greedy | mean |\n|---|---|---|\n| solved | {100 * after:.1f} ± " in printed
    assert f"| peak average of the run, a = 0.5 | {100 * peak:.1f} | {100 * peak:.1f} |" in printed
    model, settings_of_run = find_model(str(tmp_path / "run"))
    assert model.endswith("step-000002/model") and settings_of_run == config
    assert main([str(tmp_path / "run"), "--eval-temperature", "-1"]) == 2
    assert "--eval-temperature must be at least 0" in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "2 3 ? 5 >", "answer": "5"}\n{"problem": "1 1 ? 2 >"}\n')
    assert main([str(tmp_path / "run"), "--eval-data", f"aime24:{rows}"]) == 2
    assert "line 2" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_named(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(load_preset("countdown-smoke").to_json())
    assert main([str(tmp_path)]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset", "no-such"],
        ["--seeds", "1", "2"],
        [],
        ["--preset", "countdown-tiny", "--vllm-gpu-memory-utilization", "1"],
    ],
)
def test_settings_that_an_evaluation_cannot_have_are_refused(flags, capsys):
    assert main(["a-model", *flags]) == 2
    assert "Traceback" not in (said := capsys.readouterr().err) and said.startswith("python -m train.evaluate: --")


def test_an_evaluation_has_the_flags_that_it_reads_and_no_others(capsys):
    fields_of_all = list(Config().flat())
    assert set(FLAGS) < set(fields_of_all)
    for name in (*(set(fields_of_all) - set(FLAGS)), "resume"):
        with pytest.raises(SystemExit) as ended:
            main(["a-model", flag_name(name), "1"])
        assert ended.value.code == 2 and flag_name(name) in capsys.readouterr().err
    changed = {"eval_temperature": "0.5", "max_completion_length": "9", "eval_data": "aime24", "seeds": "4"}
    config = choose_settings("m", None, "maths-4b-8k", {name: changed[name] for name in ("eval_temperature", "seeds")})
    rollout = config.rollout
    assert (rollout.eval_temperature, rollout.max_completion_length, config.run.seeds) == (0.5, 8192, (4,))
    of_run = load_preset("countdown-smoke")
    assert choose_settings("m", of_run, None, {}) == of_run.change(model="m")
    with pytest.raises(ValueError, match="--preset is for a model that no run made"):
        choose_settings("m", of_run, "countdown-tiny", {})


def test_a_model_that_no_run_made_needs_problems_and_a_length(capsys):
    """The defaults are those of the tiny task: 64 tokens would be taken for the model's failure."""
    for flags, missing in (
        ([], "--eval-data must say what to evaluate on"),
        (["--eval-data", "aime24"], "--max-completion-length must say the most tokens of an answer"),
        (["--max-completion-length", "9"], "--eval-data must say what to evaluate on"),
    ):
        assert main(["a-model", *flags]) == 2
        assert f"{missing}, or --preset both, for 'a-model', which no run made" in capsys.readouterr().err
    given = {"eval_data": "aime24", "max_completion_length": "9"}
    assert choose_settings("m", None, None, given).rollout.max_completion_length == 9
    assert choose_settings("m", load_preset("countdown-smoke"), None, {}).rollout.max_completion_length == 24


def test_answers_that_were_cut_off_are_told():
    rates = {"cut": SolveRate(0.0, 0.25, 0.0, 4), "whole": SolveRate(0.0, 1.0, 0.0, 4)}
    assert cut_off(Evaluation(rates), Config()) == [
        "cut: 75.0% of the answers were cut off at --max-completion-length 64"
    ]


def test_a_run_of_several_seeds_names_its_runs(tmp_path, capsys):
    for seed in (0, 1):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "config.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "seed-0" in (said := capsys.readouterr().err) and "seed-1" in said


def test_training_data_is_apart_from_what_is_evaluated_on(tmp_path, capsys):
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text("".join(json.dumps({"nums": [n, 2, 3], "target": n + 5}) + "\n" for n in range(1, 5)))
    held.write_text(json.dumps({"nums": [3, 2, 1], "target": 6}) + "\n")  # the first, in another order
    config = settings(model="-", train_data=f"countdown:{train}", eval_data=(f"countdown-test:{held}",))
    task = load_task(config, ALONE)
    assert [len(task.train), [each.name for each in task.evaluations]] == [3, ["countdown-test:held"]]
    assert "1 problems left out that are evaluated on" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no problem that is not evaluated on"):
        load_task(settings(model="-", train_data=f"countdown:{held}", eval_data=(f"countdown:{held}",)), ALONE)
    with pytest.raises(ValueError, match="--eval-data must name what to evaluate on"):
        load_task(settings(model="-", train_data=f"maths:{train}"), ALONE)


def test_long_problems_are_left_out_and_counted(capsys):
    config = settings(max_prompt_length=5)
    prompts = Prompts(TOKENIZER, config)
    longer = Problem("1 2 3 4 ? 10 >", "", "words")
    assert prompts.fitting([*PROBLEMS, longer], "the set") == PROBLEMS
    assert "the set: 1 of 5 problems left out, over 5 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--max-prompt-length must let problems in, got 5"):
        prompts.fitting([longer], "the set")


@pytest.mark.parametrize(
    "scores, weight, averages",
    [
        ([], 0.5, []),
        ([0.3], 0.5, [0.3]),
        ([0.2, 0.4, 0.8, 0.1, 0.6], 0.5, [0.2, 0.3, 0.55, 0.55, 0.575]),  # flat where a score is below the average
        ([0.8, 0.4, 0.2], 0.5, [0.8, 0.8, 0.8]),
        ([0.2, 0.4, 0.1, 0.8], 1.0, [0.2, 0.4, 0.4, 0.8]),  # the best score so far
        ([0.0, 1.0, 1.0], 0.2, [0.0, 0.2, 0.36]),
    ],
)
def test_the_moving_average_of_the_peak_by_hand(scores, weight, averages):
    assert peak_average(scores, weight) == pytest.approx(averages)


def test_the_peak_of_each_set_stands_beside_its_last_score(tmp_path, capsys, monkeypatch):
    """In the report and in the figure, for two seeds, whose mean is that of the ends."""
    curves = {
        0: {"aime24": [0.1, 0.3, 0.2], "amc23": [0.4, 0.4, 0.6]},
        1: {"aime24": [0.2, 0.2, 0.6], "amc23": [0, 1, 0]},
    }
    runs = {f"seed {seed}": tmp_path / f"seed-{seed}" for seed in curves}
    for folder, of_sets in zip(runs.values(), curves.values(), strict=True):
        folder.mkdir()
        rates = ({name: SolveRate(scores[at], 1.0, 0.01, 30) for name, scores in of_sets.items()} for at in range(3))
        records = ({"step": 20 * at, **Evaluation(each).metrics()} for at, each in enumerate(rates))
        steps = [{"step": 1, "reward": 0.9, "entropy": 1.0, "completions/mean_length": 9.0, "step_time": 1.0}]
        steps[0]["time/statistics"] = 0.1
        lines = sorted([*records, *steps], key=lambda record: record["step"])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert peak_averages(read_metrics(runs["seed 0"]), 0.5)["aime24"] == ([0, 20, 40], pytest.approx([0.1, 0.2, 0.2]))
    config = Config().change(peak_weight=0.5, eval_data=("aime24", "amc23"))
    report(config, tmp_path, runs, 60.0)
    printed = capsys.readouterr().out
    rows = re.findall(r"(aime24|amc23) .* ([\d.]+)% ± 1\.0%.* ([\d.]+)%   [+-]", printed)  # also of the mean: 0.7%
    assert rows == [
        ("aime24", "20.0", "20.0"),
        ("amc23", "60.0", "50.0"),
        ("aime24", "60.0", "40.0"),
        ("amc23", "0.0", "50.0"),
    ]
    assert re.findall(r"(aime24|amc23) .* ± 0\.7%.* ([\d.]+)%   [+-]", printed) == [
        ("aime24", "30.0"),
        ("amc23", "50.0"),
    ]
    assert "--peak-weight 0.5" in printed

    drawn = {}
    monkeypatch.setattr(Axes, "plot", lambda axes, steps, values, **style: drawn.update({style.get("label"): values}))
    plot_learning_curve(runs, tmp_path / "curve.png", "two seeds", 0.5)
    assert drawn["seed 0, aime24: 0.200, last 0.200"] == pytest.approx([0.1, 0.2, 0.2])
    assert drawn["seed 1, amc23: 0.500, last 0.000"] == pytest.approx([0, 0.5, 0.5])
    assert (tmp_path / "curve.png").exists()


def test_the_smoothed_reward_has_no_bias_towards_0():
    assert smooth([0.3]) == [pytest.approx(0.3)]


def test_the_temperature_of_evaluations(tmp_path):
    """That of the sampling, or its own; greedily each problem is answered once."""
    rows = tmp_path / "aime.jsonl"
    rows.write_text('{"problem": "2 + 3 ?", "answer": "5"}\n')

    def sets(**changes):
        held_out = load_held_out(settings(model="-", **changes), ALONE)
        return [(each.name, each.temperature, each.answers) for each in held_out]

    of_file = {"train_data": f"maths:{rows}", "eval_data": (f"aime24:{rows}",)}
    assert sets(temperature=0.7, **of_file) == [("aime24:aime", 0.7, 16)]
    assert sets(temperature=0.7, eval_temperature="0.3", **of_file) == [("aime24:aime", 0.3, 16)]
    assert sets(eval_temperature=0, **of_file) == [("aime24:aime", None, 1)]
    assert sets(eval_temperature="none") == [("sampled", 1.0, 1), ("greedy", None, 1)]
    assert sets(eval_temperature=0.6) == [("sampled", 0.6, 1), ("greedy", None, 1)]
    assert sets(eval_temperature=0.0) == [("greedy", None, 1)]


def test_what_is_due():
    assert [step for step in range(1, 11) if is_due(3, step, 9)] == [3, 6]
    assert not any(is_due(0, step, 9) for step in range(10))


def test_phases_keep_time_and_draw_lines(capsys):
    phase = Phases("step 1")
    with phase("rollout", 4, "answer") as advance:
        advance(2, 100)
        advance(2, 50)
    with phase("old log-probs"):
        pass
    metrics = phase.metrics(statistics=0.0)
    assert set(metrics) >= {"time/rollout", "time/old_log-probs", "step_time"}
    assert math.isclose(metrics["step_time"], sum(phase.seconds.values()))
