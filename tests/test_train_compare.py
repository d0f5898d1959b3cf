"""Comparisons of credits over seeds: tables, intervals and power from made-up metrics, refused mixtures, and grids."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
from scipy import stats
from train_cases import ALONE

import train
from rhythm_kernels.options import STRATEGIES
from train.compare import scores
from train.compare.__main__ import main
from train.compare.cells import CELLS, Groups, choose_cells, label, name_cells
from train.compare.grid import Cell, Share, default_ranks, next_ready, open_grid
from train.compare.runs import find_runs, is_finished, read_runs
from train.config import BadSetting, Config
from train.launch import write_config
from train.metrics import FILE
from train.presets import PREFIXES, PRESETS, load_preset
from train.solve_rates import Evaluation, SolveRate, peak_average
from train.supervise import warm_start, warm_start_path

STEPS = (0, 2, 4)


def settings(**changes) -> Config:
    return load_preset("countdown-smoke").change(eval_steps=2, **changes)


def make_run(folder: Path, config: Config, seed: int, sampled=(0.1, 0.3, 0.2), greedy=(0.4, 0.4, 0.5)) -> Path:
    """Writes the folder of a finished run of four steps, whose evaluations have these solve rates."""
    write_config(config.change(seeds=(seed,), output=str(folder)), folder)
    records = []
    for step, of_step in zip(STEPS, zip(sampled, greedy, strict=True), strict=True):
        if step:
            both = [(step - 1, 0.2, 30.0, 0.5), (step, 0.4 + seed / 10, 20.0 + seed, 0.25)]
            names = ("step", "reward", "completions/mean_length", "completions/clipped_ratio")
            records += [dict(zip(names, values, strict=True)) for values in both]
        rates = [SolveRate(solved, 0.9, 0.01, 16) for solved in of_step]
        records.append({"step": step, **Evaluation(dict(zip(("sampled", "greedy"), rates, strict=True))).metrics()})
    (folder / FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def make_grid(out: Path, gains: dict[str, list[float]], **changes) -> list[Path]:
    """Writes runs of these cells whose last sampled rate is 0.2 + 0.01 seed, and a gain for each seed above it."""
    return [
        make_run(out / cell / f"seed-{seed}", settings(**changes, **CELLS[cell]), seed,
                 sampled=(0.1, 0.15, 0.2 + 0.01 * seed + gain))
        for cell, of_cell in gains.items()
        for seed, gain in enumerate(of_cell)
    ]  # fmt: skip


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
    rows = [line.split(" | ")[0] for line in last.split("##")[0].splitlines() if line.startswith("| ")][2:]
    assert rows == ["| GRPO", "| Global (bottom 40 %)", "| Coupled (top 40 %)", "| Coupled (top 20 %)"]
    assert "| Global (bottom 40 %) | 2 | 10.5 ± 1.0 -10.0 [-10.0, -10.0]" in last  # against the same two seeds
    assert "| GRPO | 0.650 | 22.5 | 25.0% | 10.0% | 10.0% |" in text  # the last tenth of four steps is the last one
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
    for name in ("strategies.png", "bottom.png", "top.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


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
    assert "fewer than two seeds there is no interval: coupled, local" in text.replace("\n", " ")
    assert "one seed" in text.split("## What these seeds can show")[1]


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
            "lacks evaluations that other runs have: greedy at step 0, sampled at step 0",
        ),
        (lambda run: make_run(run.with_name("again"), Config.load(run / "config.json"), 0), "has the credit and the"),
    ],
    ids=["unfinished", "torn", "lost", "first-lost", "twice"],
)
def test_runs_that_lack_an_evaluation_are_refused_by_name(tmp_path, harm, said):
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


def test_a_run_is_named_by_its_settings_and_two_cells_of_the_same_are_one():
    cells = choose_cells("countdown-smoke", list(CELLS), {})
    assert "top-40" not in cells and name_cells(list(cells.values())) == [*cells]
    drops = [settings(credit=name, credit_delta=delta) for name in ("local", "none") for delta in ("absolute", "drop")]
    assert name_cells(drops) == ["local --credit-delta absolute", "local --credit-delta drop", "none", "none"]
    assert (
        name_cells([settings(credit_top_fraction=0.3)])[0] == "coupled --credit-largest True --credit-top-fraction 0.3"
    )
    groups = Groups.of(["top-80", "coupled", "bottom-local", "none", "top-20"])
    assert groups == (["none", "coupled"], ["bottom-local"], ["top-20", "top-80"])
    assert [label("coupled"), label("coupled", True)] == ["+ coupled rhythm credit", "Coupled (top 40 %)"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--cells", "none", "bottom"], "--cells must be among none, random"),
        (["--cells", "none", "--credit-delta", "drop"], "--credit-delta would have no effect"),
        (["--engine", "vllm"], "--engine must be transformers"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--ranks", "2", "--device", "cpu"], "--ranks must be 1 without GPUs, got 2"),
        (["--seeds", "1", "1"], "--seeds must be different numbers"),
        (["--preset", "tiny"], "--preset must be one of"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(tmp_path, capsys, flags, said):
    assert main(["--preset", "countdown-smoke", "--out", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--out must name the folder of the grid"),
        (["a", "--seeds", "0"], "finished runs are read as they are, but also got --seeds"),
        (["a", "b"], "--out must name a folder for the report"),
    ],
)
def test_a_command_that_says_too_little_or_too_much_is_refused(capsys, arguments, said):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_grid_with_other_settings_is_refused_with_their_flags(tmp_path):
    cells = choose_cells("countdown-smoke", ["none", "coupled"], {"eval_steps": 2})
    for cell, config in cells.items():
        folder = make_run(tmp_path / cell / "seed-0", config, 0)
        (folder / "checkpoints" / "step-000000").mkdir(parents=True)
    others = choose_cells("countdown-smoke", ["none", "coupled"], {"eval_steps": 1, "max_steps": 9})
    with pytest.raises(BadSetting, match="other settings: --max-steps 4 there, 9 now; --eval-steps 2 there, 1 now$"):
        open_grid(tmp_path, others, None, None).__enter__()
    more = choose_cells("countdown-smoke", ["local"], {"eval_steps": 1})  # a cell that is not there yet
    with pytest.raises(BadSetting, match="other settings: --eval-steps 2 there, 1 now$"):
        open_grid(tmp_path, more, None, None).__enter__()
    with open_grid(tmp_path, choose_cells("countdown-smoke", ["local"], {"eval_steps": 2}), None, None) as grid:
        assert [cell.is_finished for cell in grid.cells] == [False]
    with open_grid(tmp_path, cells, None, None) as grid:
        assert all(cell.is_finished for cell in grid.cells)
        with pytest.raises(BadSetting, match="another process is training"):
            open_grid(tmp_path, cells, None, None).__enter__()


@pytest.mark.parametrize("place", ["a-file", "a-file/below", "a-run"])
def test_a_folder_that_cannot_be_a_grids_is_refused(tmp_path, place):
    (tmp_path / "a-file").write_text("")
    make_run(tmp_path / "a-run", settings(), 0)
    with pytest.raises(BadSetting, match="--out must be a"):
        open_grid(tmp_path / place, choose_cells("countdown-smoke", ["none"], {}), None, None).__enter__()


def test_a_run_waits_for_a_warm_start_that_another_one_makes(tmp_path):
    def cell(name: str, seed: int, **changes) -> Cell:
        config = settings(credit=name, cache=str(tmp_path), seeds=(seed,), **changes)
        return Cell(name, tmp_path / name, config)

    first, same, other = cell("none", 0), cell("local", 0), cell("none", 1)
    assert first.warm_start == same.warm_start != other.warm_start
    assert next_ready([same, other], [first]) == other and next_ready([same], [first]) is None
    first.warm_start.mkdir()
    assert next_ready([same, other], [first]) == same
    given = cell("none", 0, model="a-model", train_data="maths:a.jsonl")
    assert given.warm_start is None and next_ready([given], [given]) == given


def test_two_runs_that_need_the_same_warm_start_make_it_once(tmp_path, monkeypatch):
    """Locks belong to open files, so two threads stand for two processes."""
    config, made = settings(cache=str(tmp_path / "cache")), []

    def make(folder, *others):
        made.append(folder)
        time.sleep(0.3)
        folder.mkdir()

    monkeypatch.setattr("train.supervise.make_warm_start", make)
    threads = [threading.Thread(target=warm_start, args=(config, 0, [], ALONE)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [warm_start_path(config, 0)]


def test_gpus_are_shared_among_the_runs_that_fit(monkeypatch):
    monkeypatch.setattr("train.compare.grid.choose_device", lambda name: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,0,1,2,3")
    paper = load_preset("countdown-4b")
    share = Share.of_machine(paper, None, None)
    assert (share.jobs, share.ranks) == (2, 4)  # an optimizer step has four problems, so four ranks share it
    assert share.environment(1)["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert share.command(Path("run"))[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "train", "--resume", "run")
    ]
    tiny = Share.of_machine(load_preset("countdown-tiny"), None, None)
    assert (tiny.jobs, tiny.ranks, tiny.environment(7)["CUDA_VISIBLE_DEVICES"]) == (8, 1, "3")
    assert [default_ranks(paper, count) for count in (1, 2, 3, 8)] == [1, 2, 2, 4]
    with pytest.raises(BadSetting, match="--ranks 4 and --jobs 3 must fit the 8 GPUs"):
        Share.of_machine(paper, 3, 4)


def test_a_run_that_fails_ends_the_others_and_is_named_with_its_log(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\ncase "$4" in *seed-1) echo no room >&2; exit 1;; *) exec sleep 60;; esac\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    cells = choose_cells("countdown-smoke", ["none"], {"seeds": "0 1", "cache": str(tmp_path)})
    began = time.monotonic()
    with (
        open_grid(tmp_path / "out", cells, 2, None) as grid,
        pytest.raises(train.config.RunError, match="no room") as no,
    ):
        grid.run()
    assert time.monotonic() - began < 30
    assert "none, seed 1 ended with status 1" in str(no.value) and "seed-1.log" in str(no.value)


GRID = ["--preset", "countdown-smoke", "--seeds", "0", "1", "--cells", "none", "local", "--sft-steps", "2"]
GRID += ["--sample-answers", "0", "--max-steps", "12", "--save-steps", "1", "--eval-steps", "6"]


def environment() -> dict[str, str]:
    paths = [str(Path(train.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def processes_of(folder: Path) -> list[Path]:
    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError:
            return b""

    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in read(path)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_grid_that_is_stopped_goes_on_where_it_was(tmp_path):
    """Ends a grid by SIGTERM, then by SIGKILL, then lets it finish; its runs are those of a grid that never stopped."""
    flags = [*GRID, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    command = [sys.executable, "-m", "train.compare", *flags]

    def steps() -> int:
        return sum(len(path.read_bytes().splitlines()) for path in tmp_path.glob(f"out/*/*/{FILE}"))

    goals = {signal.SIGTERM: 8, signal.SIGKILL: 40}  # lines of all runs: in the first runs, and after them
    for number, goal in goals.items():
        grid = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while steps() < goal and grid.poll() is None:
            time.sleep(0.05)
        assert grid.poll() is None
        grid.send_signal(number)
        said = grid.communicate()[1].decode()
        assert grid.returncode == (143 if number == signal.SIGTERM else -9)
        assert "Traceback" not in said and ("the same command goes on" in said) == (number == signal.SIGTERM)
        for _ in range(600):
            if not processes_of(tmp_path):
                break
            time.sleep(0.1)
        assert not processes_of(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/seed-*/learning_curve.png")}
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"4 runs, {len(kept)} of them finished" in done.stdout
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())  # finished runs are not started
    assert (tmp_path / "out" / "report.md").is_file() and len(list((tmp_path / "cache").glob("*[!.lock]"))) == 2
    whole = [sys.executable, "-m", "train", *GRID[:2], *GRID[8:], "--cache", str(tmp_path / "cache"), "--seeds", "1"]
    whole += ["--credit", "local", "--output", str(tmp_path / "whole"), "--threads", "1"]
    subprocess.run(whole, env=environment(), check=True, capture_output=True)
    ours, alone = read_runs([tmp_path / "out" / "local" / "seed-1"])[0], read_runs([tmp_path / "whole"])[0]
    assert [rate.rates for _, rate in ours.evaluations] == [rate.rates for _, rate in alone.evaluations]
    assert [line["loss"] for line in ours.steps] == [line["loss"] for line in alone.steps]
