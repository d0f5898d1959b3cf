"""Grids of runs: what is refused before anything runs, who gets which GPU, and grids that are stopped and go on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from compare_cases import make_run, settings
from train_cases import ALONE

import train
from train.compare.__main__ import main
from train.compare.cells import choose_cells
from train.compare.grid import Cell, Share, default_ranks, make_cell, next_ready, open_grid
from train.compare.runs import read_runs
from train.config import BadSetting
from train.metrics import FILE
from train.presets import load_preset
from train.supervise import warm_start, warm_start_path


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
    for checkpoints in tmp_path.glob("*/*/checkpoints"):  # runs that were kept have none
        (checkpoints / "step-000000").rmdir()
    with pytest.raises(BadSetting, match="other settings: --max-steps 4 there, 9 now; --eval-steps 2 there, 1 now$"):
        open_grid(tmp_path, others, None, None).__enter__()
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
        config = settings(credit=name, cache=str(tmp_path), **changes)
        return make_cell(tmp_path, name, config, seed, Share(1, 1, 1, []))

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
    monkeypatch.setattr("train.distributed.choose_device", lambda name: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,0,1,2,3")
    paper = load_preset("countdown-4b")
    share = Share.of_machine(paper, None, None)
    assert (share.jobs, share.ranks) == (1, 8)  # an optimizer step has four problems, of which two ranks each have half
    share = Share.of_machine(paper, 2, 4)
    assert share.environment(1)["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert share.command(Path("run"))[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "train", "--resume", "run")
    ]
    tiny = Share.of_machine(load_preset("countdown-tiny"), None, None)
    assert (tiny.jobs, tiny.ranks, tiny.environment(7)["CUDA_VISIBLE_DEVICES"]) == (8, 1, "3")
    assert [default_ranks(paper, count) for count in (1, 2, 3, 7, 8, 16, 99)] == [1, 2, 2, 4, 8, 16, 32]
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
