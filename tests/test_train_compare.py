"""Comparisons of credits over seeds: tables, intervals and power from made-up metrics, and refused mixtures."""

import json
import math
import re
from pathlib import Path

import numpy
import pytest
from compare_cases import STEPS, make_grid, make_run, settings
from scipy import stats

from rhythm_kernels.options import STRATEGIES
from train.compare import figures, scores
from train.compare.__main__ import main
from train.compare.cells import CELLS, Groups, choose_cells, label, name_cells
from train.compare.runs import find_runs, is_finished
from train.config import BadSetting, Config
from train.launch import write_config
from train.metrics import FILE
from train.presets import PREFIXES, PRESETS, load_preset
from train.solve_rates import peak_average

GAINS = [0.02, -0.01, 0.03, 0.04, 0.0, 0.01]


def test_kept_runs_give_the_same_report(tmp_path):
    make_grid(tmp_path / "grid", {"none": [0.0, 0.0], "coupled": [0.02, 0.03]})
    wide = tmp_path / "grid" / "none" / "seed-0" / FILE
    wide.write_text(wide.read_text().replace('"reward": 0.2', '"reward": 0.2, "grad_norm": 0.125'))
    kept = tmp_path / "kept"
    one, two = (str(tmp_path / "grid" / "none" / f"seed-{seed}") for seed in (0, 1))
    assert main([one, "--keep", str(kept)]) == 0
    assert main([str(tmp_path / "grid"), "--keep", str(kept)]) == 0, "more runs come beside what is there"
    assert main([str(kept)]) == 0
    for name in ("report.md", "report.json"):
        assert (kept / name).read_text() == (tmp_path / "grid" / name).read_text().replace("/grid/", "/kept/")
    files = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file() and path.parent != kept}
    assert files == {
        f"{cell}/seed-{n}/{name}" for cell in ("none", "coupled") for n in (0, 1) for name in (FILE, "config.json")
    }
    assert str(tmp_path) not in "".join((kept / name).read_text() for name in files)
    assert "grad_norm" not in (kept / "none" / "seed-0" / FILE).read_text()


def test_keeping_goes_on_after_a_kill(tmp_path):
    """A kill between two files of a run leaves metrics without a configuration, whole or torn."""
    make_grid(tmp_path / "grid", {"none": [0.0, 0.0]}, cache="here")
    kept = tmp_path / "kept" / "none" / "seed-1"
    kept.mkdir(parents=True)
    (kept / FILE).write_text('{"step": 0, "ev')
    assert main([str(tmp_path / "grid"), "--keep", str(tmp_path / "kept")]) == 0
    make_grid(tmp_path / "grid", {"none": [0.0, 0.0]}, cache="there")
    assert main([str(tmp_path / "grid"), "--keep", str(tmp_path / "kept")]) == 0, "the cache changes no result"
    assert len(find_runs([tmp_path / "kept"])) == 2


def test_what_is_kept_is_not_replaced_by_another_run(tmp_path, capsys):
    make_grid(tmp_path / "grid", {"none": [0.0, 0.0]})
    make_grid(tmp_path / "other", {"none": [0.1, 0.1]})
    assert main([str(tmp_path / "grid"), "--keep", str(tmp_path / "kept")]) == 0
    before = (tmp_path / "kept" / "none" / "seed-0" / FILE).read_text()
    assert main([str(tmp_path / "other"), "--keep", str(tmp_path / "kept")]) == 2
    assert "--keep must name a folder without another run of none, seed 0" in capsys.readouterr().err
    assert (tmp_path / "kept" / "none" / "seed-0" / FILE).read_text() == before
    assert main(["--out", str(tmp_path / "new"), "--keep", str(tmp_path / "kept")]) == 2
    assert "--keep is for finished runs" in capsys.readouterr().err
    for flag, places in (("--out", [str(tmp_path / "grid")]), ("--keep", [str(tmp_path / "grid")]), ("--out", [])):
        assert main([*places, flag, ""]) == 2
        assert re.search(f"{flag} must name (a|the) folder", capsys.readouterr().err)


def test_the_interval_is_that_of_scipys_paired_t_test():
    base = [0.2 + 0.01 * seed for seed in range(len(GAINS))]
    test = stats.ttest_rel([a + b for a, b in zip(base, GAINS)], base)
    interval = test.confidence_interval(0.95)
    difference = scores.Difference.of(GAINS)
    assert difference.seeds == 6 and difference.mean == pytest.approx(0.015)
    assert difference.low == pytest.approx(interval.low) and difference.high == pytest.approx(interval.high)
    assert difference.deviation == pytest.approx(math.sqrt(sum((x - 0.015) ** 2 for x in GAINS) / 5))


def test_an_interval_by_hand():
    difference = scores.Difference.of([0.01, 0.03])  # t(0.975, 1) = 12.7062, sd / sqrt(2) = 0.01
    assert difference.low == pytest.approx(0.02 - 0.127062, abs=1e-6)
    assert difference.high == pytest.approx(0.02 + 0.127062, abs=1e-6)


def test_one_seed_has_no_interval_and_no_power():
    assert scores.Difference.of([0.02]) == (1, 0.02, None, None, None, None)


@pytest.mark.parametrize("count, of_deviation", [(10, 0.9960022), (20, 0.6604424)])
def test_the_smallest_difference_that_shows_is_that_of_published_tables(count, of_deviation):
    # R: power.t.test(n = 10, power = 0.8, type = "paired")$delta, and n = 20
    assert scores.detectable(3.0, count) == pytest.approx(3 * of_deviation, rel=1e-5)


def test_a_difference_of_that_size_is_found_four_times_in_five():
    draw, count = numpy.random.default_rng(0), 5
    samples = draw.normal(scores.detectable(2.0, count), 2.0, (40_000, count))
    found = stats.ttest_1samp(samples, 0.0, axis=1)
    assert numpy.mean((found.pvalue < 0.05) & (found.statistic > 0)) == pytest.approx(0.8, abs=0.01)


@pytest.mark.slow
def test_tables_have_the_papers_rows_with_differences_within_each_seed(tmp_path, capsys):
    make_grid(tmp_path, {"none": [0.0] * 6, "coupled": GAINS, "bottom-global": [-0.1] * 2, "top-20": [0.0, 0.02]})
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    strategies, ablations = text.split("## Ablations")
    last = strategies.split("Scores are the last checkpoint.")[1]
    assert "| GRPO | 6 | 22.5 ± 1.0 | 50.0 ± 1.0 |" in last
    low, high = (100 * x for x in scores.Difference.of(GAINS)[2:4])
    assert f"| + coupled rhythm credit | 6 | 24.0 ± 1.0 +1.5 [{low:+.1f}, {high:+.1f}] | 50.0 ± 1.0 +0.0" in last
    last = ablations.split("Scores are the last checkpoint.")[1]
    rows = [line.split(" | ")[0] for line in last.split("##")[0].splitlines() if line.startswith("| ")][1:]
    assert rows == ["| GRPO", "| Global (bottom 40 %)", "| Coupled (top 40 %)", "| Coupled (top 20 %)"]
    assert "| GRPO | 2 | 20.5 ± 1.0 |" in last  # of the two seeds that all rows of this table have
    assert "| Global (bottom 40 %) | 2 | 10.5 ± 1.0 -10.0 [-10.0, -10.0]" in last
    assert "all of them have, 0, 1, without 2, 3, 4, 5." in ablations.replace("\n", " ")
    assert "| GRPO | 0.450 | 20.5 | 25.0% | 10.0% | 10.0% |" in text  # the last tenth of four steps is the last one
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
    for name in ("strategies.png", "bottom.png", "top.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_top_of_a_strategy_is_compared_with_its_bottom(tmp_path):
    cells = {"none": [0.0, 0.0], "global": [0.1, 0.2], "bottom-global": [0.0, 0.05], "bottom-local": [0.0, 0.0]}
    make_grid(tmp_path, cells)
    assert main([str(tmp_path)]) == 0
    table = (tmp_path / "report.md").read_text().split("Differences against the bottom")[1].split("##")[0]
    (row,) = [line for line in table.splitlines() if line.startswith("| ")][1:]
    difference = scores.Difference.of([0.1, 0.15])
    assert row.startswith("| Global (top 40 %) | 2 | ")
    assert f"| +12.5 [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}] |" in row


def test_the_endpoint_is_the_moving_average_of_the_peak(tmp_path):
    make_grid(tmp_path, {"none": [0.0, 0.0], "local": [0.1, 0.2]})
    assert main([str(tmp_path), "--peak-weight", "0.5"]) == 0
    numbers = json.loads((tmp_path / "report.json").read_text())
    gain = peak_average([0.1, 0.15, 0.3], 0.5)[-1] - peak_average([0.1, 0.15, 0.2], 0.5)[-1]
    assert gain == pytest.approx(0.05)  # by hand: a new peak counts half
    pair = numbers["differences"]["peak"]["sampled"]["local"]
    assert pair["seeds"] == 2 and pair["mean"] == pytest.approx((0.05 + 0.1) / 2)
    assert numbers["differences"]["last"]["sampled"]["local"]["mean"] == pytest.approx(0.15)
    assert numbers["peak_weight"] == 0.5 and len(numbers["evaluations"]) == 4 * 2 * len(STEPS)


def test_power_stands_beside_the_scores(tmp_path):
    make_grid(tmp_path, {"none": [0.0] * 6, "coupled": GAINS})
    assert main([str(tmp_path)]) == 0
    difference = scores.Difference.of(GAINS)
    cell = f"{100 * difference.detectable:.1f} (sd {100 * difference.deviation:.1f}) | 0.0 (sd 0.0) |"
    assert cell in (tmp_path / "report.md").read_text()


def test_one_seed_is_reported_without_intervals_and_says_so(tmp_path):
    make_grid(tmp_path, {"none": [0.0], "coupled": [0.1], "local": [0.1]})
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "+10.0" in text and "[" not in text
    assert "that of a single seed has none" in text.replace("\n", " ")
    assert "| + coupled rhythm credit | 1 | - | - | - | - |" in text.split("## What these seeds can show")[1]


def test_differences_against_random_credit_stand_beside_those_against_grpo(tmp_path):
    make_grid(tmp_path, {"none": [0.0] * 6, "random": [0.05] * 6, "coupled": GAINS})
    assert main([str(tmp_path)]) == 0
    table = (tmp_path / "report.md").read_text().split("Random credit raises")[1].split("##")[0]
    low, high = (100 * x - 5 for x in scores.Difference.of(GAINS)[2:4])
    assert f"| -3.5 [{low:+.1f}, {high:+.1f}] | +0.0 [+0.0, +0.0] |" in table and "random credit |" not in table


def test_few_pairs_say_nothing_about_power():
    assert scores.Difference.of(GAINS[:3]).detectable is None
    assert scores.Difference.of(GAINS[:4]).detectable > 0


def change(run: Path, line: int, **values) -> None:
    """Changes numbers in a line of a run's metrics; ... takes one out."""
    lines = (run / FILE).read_text().splitlines()
    record = json.loads(lines[line]) | values
    lines[line] = json.dumps({name: value for name, value in record.items() if value is not ...})
    (run / FILE).write_text("".join(text + "\n" for text in lines))


def test_answers_that_were_not_verified_are_told(tmp_path):
    make_grid(tmp_path, {"none": [0.0, 0.0], "coupled": [0.1, 0.1]})
    change(tmp_path / "coupled" / "seed-1", -1, **{"eval/sampled/errors": 4})
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text().replace("\n", " ")
    assert "could not be verified count as wrong. There are up to 25.0% in an evaluation: coupled, seed 1" in text


def test_runs_that_began_with_other_policies_are_told(tmp_path):
    make_grid(tmp_path, {"none": [0.0, 0.0], "coupled": [0.1, 0.1]})
    change(tmp_path / "coupled" / "seed-1", 0, **{"eval/sampled/solved": 0.11})
    assert main([str(tmp_path)]) == 0
    assert "runs of seed 1 do not begin with the same solve rates" in (tmp_path / "report.md").read_text()


def test_a_run_that_is_named_twice_counts_once(tmp_path):
    make_grid(tmp_path, {"none": [0.0, 0.0]})
    assert len(find_runs([tmp_path, tmp_path / "none", tmp_path / "none" / ".." / "none"])) == 2


def test_a_seed_that_another_cell_lacks_is_left_out_of_both(tmp_path):
    make_grid(tmp_path, {"none": [0.0, 0.3], "coupled": [0.1]})
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| GRPO | 1 | 20.0 ± 1.0 |" in text and "| + coupled rhythm credit | 1 | 30.0 ± 1.0 +10.0 |" in text
    assert "| GRPO | 0.400 | 20.0 |" in text and "without 1." in text


def test_without_the_baseline_there_are_scores_and_no_differences(tmp_path):
    make_grid(tmp_path, {"coupled": [0.0, 0.1], "local": [0.1, 0.1]})
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "No run is GRPO" in text and "[" not in text and "There are no differences." in text


def test_benchmarks_have_a_column_of_their_mean_and_the_tiny_task_has_none(tmp_path):
    make_grid(tmp_path / "tiny", {"none": [0.0]})
    config = {"model": "a-model", "train_data": "maths:a.jsonl", "eval_data": ("maths:b.jsonl", "maths:c.jsonl")}
    make_grid(tmp_path / "maths", {"none": [0.0]}, **config)
    sets = []
    for name in ("tiny", "maths"):
        table = scores.evaluations_of(find_runs([tmp_path / name]), 0.2)
        sets.append(table["set"].unique().tolist())
    assert sets == [["sampled", "greedy"], ["sampled", "greedy", "mean"]]
    means = table[table["set"] == "mean"]
    assert means["solved"].tolist() == pytest.approx([0.25, 0.275, 0.35])
    assert means["error"].tolist() == pytest.approx([math.hypot(0.01, 0.01) / 2] * 3)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"learning_rate": 1e-3}, "--learning-rate 0.001 there, 0.0002 in the other"),
        ({"max_completion_length": 20}, "--max-completion-length 20 there, 24"),
    ],
)
def test_runs_that_differ_in_more_than_credit_and_seed_are_refused(tmp_path, capsys, changes, said):
    make_grid(tmp_path / "a", {"none": [0.0]})
    make_grid(tmp_path / "b", {"coupled": [0.0]}, **changes)
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'b' / 'coupled' / 'seed-0'} differs from" in error and said in error


def cut_lines(folder: Path, count: int) -> None:
    lines = (folder / FILE).read_bytes().splitlines(keepends=True)
    (folder / FILE).write_bytes(b"".join(lines[:count]))


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda run: cut_lines(run, -1), "must be a finished run, but has no evaluation after step 4"),
        (lambda run: (run / FILE).write_bytes((run / FILE).read_bytes()[:-9]), "last step in its metrics.jsonl is 4"),
        (lambda run: (run / FILE).unlink(), "last step in its metrics.jsonl is none"),
        (
            lambda run: (run / FILE).write_bytes(b"".join((run / FILE).read_bytes().splitlines(keepends=True)[1:])),
            r"evaluations after the steps \[0, 2, 4\], got 4 steps and evaluations after \[2, 4\]",
        ),
        (lambda run: change(run, 1, step=2), "must have each of 4 steps once"),
        (lambda run: change(run, -1, **{"eval/sampled/solved": math.nan}), "must have possible solve rates, got"),
        (lambda run: change(run, -1, **{"eval/sampled/solved": 39.8}), "sampled at step 4"),
        (
            lambda run: change(run, -1, **{"eval/sampled/solved": "0.4"}),
            "must have possible solve rates, got",
        ),
        (lambda run: change(run, -1, **{"eval/sampled/solved": True}), "must have possible solve rates, got"),
        (lambda run: change(run, -1, **{"eval/sampled/solved": 10**400}), "must have possible solve rates, got"),
        (lambda run: change(run, -1, **{"eval/sampled/solved": 0.95}), "finished=0.9"),
        (
            lambda run: change(run, -1, **{"eval/greedy/standard_error": math.inf}),
            "must have possible solve rates, got",
        ),
        (lambda run: change(run, -1, **{"eval/greedy/problems": 0}), "must have possible solve rates, got"),
        (lambda run: change(run, -1, **{"eval/greedy/errors": 17}), "must have possible solve rates, got"),
        (
            lambda run: change(run, -1, **{"eval/greedy/answers": 4}),
            "must have the problems and the answers to each of",
        ),
        (lambda run: change(run, 0, **{"eval/greedy/finished": ...}), "must hold the metrics of a run, got TypeError"),
        (
            lambda run: change(run, 0, **{"eval/greedy/problems": 64}),
            "must have the problems and the answers to each of",
        ),
        (lambda run: change(run, 1, reward=math.nan), "must have a possible reward, got nan at step 1"),
        (
            lambda run: change(run, 1, **{"completions/clipped_ratio": 7}),
            "must have a possible completions/clipped_ratio",
        ),
        (lambda run: change(run, 1, **{"completions/mean_length": -3}), "must have a possible completions/mean_length"),
        (lambda run: change(run, 1, **{"completions/mean_length": ...}), "got KeyError: 'completions/mean_length'"),
        (lambda run: make_run(run.with_name("again"), Config.load(run / "config.json"), 0), "has the credit and the"),
    ],
)
def test_runs_with_wrong_metrics_are_refused_by_name(tmp_path, harm, said):
    make_grid(tmp_path, {"none": [0.0], "coupled": [0.1]})
    run = tmp_path / "coupled" / "seed-0"
    harm(run)
    with pytest.raises(BadSetting, match=said) as refused:
        find_runs(
            [tmp_path / "none", tmp_path / "coupled", *(place for place in [run.with_name("again")] if place.exists())]
        )
    assert str(run.parent) in str(refused.value)


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert f"got '{tmp_path}', which holds none" in capsys.readouterr().err


def test_runs_of_several_seeds_and_single_runs_are_found(tmp_path):
    write_config(settings(seeds=(0, 1)), tmp_path / "both")
    for seed in (0, 1):
        make_run(tmp_path / "both" / f"seed-{seed}", settings(), seed)
    single = make_run(tmp_path / "single", settings(credit="none"), 0)
    runs = find_runs([tmp_path / "both", single])
    assert [(run.cell, run.seed) for run in runs] == [("coupled", 0), ("coupled", 1), ("none", 0)]
    assert len(find_runs([tmp_path])) == 3
    assert runs[0].steps[-1]["step"] == 4 and [step for step, _ in runs[0].evaluations] == list(STEPS)


def test_runs_are_found_however_deep_and_models_are_none(tmp_path):
    make_grid(tmp_path / "studies" / "first", {"none": [0.0]})
    make_grid(tmp_path / "studies" / "second", {"coupled": [0.0]})
    make_run(tmp_path / "alone", settings(credit="local"), 0)
    for folder in (tmp_path / "model", tmp_path / "alone" / "checkpoints" / "step-000004" / "model"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "around").symlink_to(tmp_path)
    assert sorted(run.cell for run in find_runs([tmp_path])) == ["coupled", "local", "none"]


def test_a_report_of_runs_without_steps_or_without_strategies(tmp_path):
    make_grid(tmp_path / "ablations", {"bottom-local": [0.0, 0.1], "top-20": [0.1, 0.1]})
    assert main([str(tmp_path / "ablations")]) == 0
    assert "Table 5" in (tmp_path / "ablations" / "report.md").read_text()
    for cell in ("none", "random"):
        run = make_run(tmp_path / "no steps" / cell / "seed-0", settings(max_steps=0, **CELLS[cell]), 0)
        cut_lines(run, 1)
        (run / FILE).write_bytes(2 * (run / FILE).read_bytes())
    assert main([str(tmp_path / "no steps")]) == 0
    assert "| GRPO | - | - | - |" in (tmp_path / "no steps" / "report.md").read_text()


def test_a_single_seed_in_common_is_said_beside_its_table(tmp_path):
    make_grid(tmp_path, {"none": [0.0, 0.1, 0.2], "coupled": [0.1, 0.2, 0.3], "top-20": [0.1]})
    assert main([str(tmp_path)]) == 0
    strategies, ablations = (tmp_path / "report.md").read_text().split("## Ablations")
    assert "+10.0 [+10.0, +10.0]" in strategies and "without" not in strategies
    assert "that all of them have, 0, without 1, 2." in ablations and "single seed has none" in strategies
    beside = ablations.split("## Beside the scores")[1]
    assert "that all of them have, 0, without 1, 2." in " ".join(beside.split())


def test_random_credit_is_compared_where_as_many_tokens_are_credited(tmp_path):
    make_grid(
        tmp_path / "a", {"none": [0.0, 0.0], "random": [0.0, 0.1], "coupled": [0.1, 0.1]}, credit_amplification=3.0
    )
    for seed in (0, 1):
        make_run(tmp_path / "b" / f"seed-{seed}", settings(credit="entropy", credit_top_fraction=0.2), seed)
        make_run(tmp_path / "c" / f"seed-{seed}", settings(credit="none"), seed)  # reads no amplification
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    against = (
        (tmp_path / "out" / "report.md").read_text().split("## What these")[0].split("raises the advantages of 40%")
    )
    assert (
        len(against) == 2 and "coupled" in against[1].split("\n\n")[1] and "entropy" not in against[1].split("\n\n")[1]
    )


def test_the_figure_has_the_differences_of_each_seed(tmp_path):
    make_grid(tmp_path, {"none": [0.0, 0.1], "coupled": [0.3, 0.05, 0.2]})
    table = scores.evaluations_of(find_runs([tmp_path]), 0.2)
    table["difference"] = figures._differences(table)
    last = table[(table["step"] == 4) & (table["set"] == "sampled")].set_index(["cell", "seed"])["difference"]
    assert last["none"].tolist() == [0.0, 0.0]
    assert last["coupled"].tolist() == pytest.approx([0.3, -0.05, math.nan], nan_ok=True)
    alone = table[table["cell"] == "coupled"]
    assert figures._differences(alone).isna().all()


def test_a_run_without_steps_is_finished_by_its_second_evaluation():
    config, before = settings(max_steps=0), {"step": 0, "eval/greedy/solved": 0.1}
    assert not is_finished(config, [before]) and is_finished(config, [before, before])


def test_cells_are_the_strategies_and_the_presets_of_the_papers_ablations():
    ablations = {name for name in PRESETS if name.startswith(PREFIXES["the paper's ablations"])}
    assert [*CELLS][:6] == [*STRATEGIES] and len(CELLS) == 6 + len(ablations) == 14
    base = load_preset("maths-8b-1k")
    for name in ablations:
        config = base.change(**CELLS[name.removeprefix("ablation-")])
        assert config.flat() == load_preset(name).flat()


def test_a_setting_is_checked_with_the_strategies_that_are_compared():
    given = {"credit_local_fraction": "0", "credit_global_fraction": "1"}  # all heads are global, for credit by FAI
    cells = choose_cells("countdown-smoke", ["none", "global"], given)
    assert cells["global"].credit.global_fraction == 1.0
    with pytest.raises(BadSetting, match="--credit-local-fraction must be above 0, so that coupled credit reads"):
        choose_cells("countdown-smoke", ["none", "coupled"], given)


def test_a_run_is_named_by_its_settings_and_two_cells_of_the_same_are_one():
    cells = choose_cells("countdown-smoke", list(CELLS), {})
    assert "top-40" not in cells and name_cells(list(cells.values())) == [*cells]
    drops = [settings(credit=name, credit_delta=delta) for name in ("local", "none") for delta in ("absolute", "drop")]
    assert name_cells(drops) == ["local --credit-delta absolute", "local --credit-delta drop", "none", "none"]
    assert (
        name_cells([settings(credit_top_fraction=0.3)])[0] == "coupled --credit-largest True --credit-top-fraction 0.3"
    )
    unread = [settings(credit=name, credit_window=window) for name in ("random", "global") for window in (5, 20)]
    assert name_cells(unread) == ["random", "random", "global", "global"]
    louder = [settings(credit=name, credit_amplification=3.0) for name in ("random", "coupled")]
    assert name_cells([settings(credit="none"), *louder]) == ["none", "random", "coupled"]
    groups = Groups.of(["top-80", "coupled", "bottom-local", "none", "top-20"])
    assert groups == (["none", "coupled"], ["bottom-local"], ["top-20", "top-80"])
    assert [label("coupled"), label("coupled", True)] == ["+ coupled rhythm credit", "Coupled (top 40 %)"]
