"""Tests the GPU suite without a GPU: its steps are valid, end in time, and leave one report."""

import importlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu_build, gpu_kernels, gpu_report, gpu_run, gpu_suite
from benchmarks.gpu_run import Outcome, Step

TINY = ["--device", "cpu", "--rounds", "1", "--heads", "2", "1", "--head-size", "16", "--tokens", "64"]
NAME = "gpu-nvidia-pretended-80gb"
MOST_FILES = 8  # in one folder, as benchmarks/gpu_report.py says


def python(name: str, code: str, estimate: int = 1) -> Step:
    return Step(name, 1, [sys.executable, "-c", code], estimate, 60, {"A_VARIABLE": "7"})


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_each_half_fits_its_budget_and_the_first_has_what_matters_most():
    halves = {half: [step for step in gpu_suite.steps() if step.half == half] for half in gpu_suite.HALVES}
    for steps in halves.values():
        build = 0 if steps[0].name == "build" else gpu_suite.steps()[0].estimate  # each half begins with the build
        seconds = sum(max(step.estimate for step in together) for together in gpu_suite.side_by_side(steps))
        assert build + seconds <= gpu_suite.BUDGET - gpu_run.GRACE
        assert all(step.estimate <= step.limit <= gpu_suite.BUDGET for step in steps)
    checks = ["gpu-tests", "memcheck", "racecheck", "triton-tests", "architectures"]
    times = ["ceilings", "attention", "tiles", "selection", "forward", "trainer"]
    assert [step.name for step in halves[1]] == ["build", *checks, *times]
    groups = [[step.name for step in together] for together in gpu_suite.side_by_side(gpu_suite.steps())]
    assert [names for names in groups if len(names) > 1] == [checks]
    names = [step.name for step in gpu_suite.steps()]
    assert len(set(names)) == len(names) and all(re.fullmatch("[a-z-]+", name) for name in names)


@pytest.mark.slow
def test_the_commands_name_what_is_there():
    for step in gpu_suite.steps():
        paths = [argument for argument in step.command if argument.startswith("tests/")]
        assert all((gpu_run.ROOT / path).exists() for path in paths)
        assert bool(paths) == ("pytest" in step.command)
        if "-m" in step.command and step.command[step.command.index("-m") + 1].startswith("benchmarks."):
            at = step.command.index("-m") + 1
            module = importlib.import_module(step.command[at])
            arguments = step.command[at + 1 :]
            if hasattr(module, "parse"):
                module.parse([*arguments, *([] if step.name in ("tiles", "ceilings") else ["--device", "cpu"])])
            else:
                assert not arguments
    assert (gpu_run.ROOT / "setup.py").exists()


def test_a_bare_machine_leaves_nothing_out(monkeypatch):
    absent = {"vllm", "trl", "datasets", "math_verify", "reasoning_gym", "pebble", "gguf"}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    assert gpu_suite.missing_modules(gpu_run.ROOT / "train" / "rewards.py") == {"pebble"}
    assert gpu_suite.left_out_tests() == {}
    assert {gpu_suite.why_not(step) for step in gpu_suite.steps()} <= {"", "compute-sanitizer is not installed"}
    absent.add("transformers")
    reasons = {step.name: gpu_suite.why_not(step) for step in gpu_suite.steps()}
    assert reasons["trainer"] == "transformers not installed"
    assert reasons["architectures"] == "none of its test files can be imported" and reasons["gpu-tests"] == ""


# ---- the build -------------------------------------------------------------------------------------------------------


def test_the_extension_is_compiled_for_the_card_alone():
    for capability, arch in {(9, 0): "90a", (8, 0): "80", (10, 0): "100a", (8, 9): "89"}.items():
        assert gpu_build.arch_of(capability) == arch


@pytest.fixture
def built(monkeypatch, tmp_path) -> list[str]:
    """Collects the architectures of each call of setup.py, in a folder without .git on a machine with an H100."""
    architectures: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    run = gpu_build.subprocess.run
    monkeypatch.setattr(
        gpu_build.subprocess,
        "run",
        lambda command, **options: (
            architectures.append(options["env"]["RHYTHM_KERNELS_CUDA_ARCHS"])
            if "setup.py" in command
            else run(command, **options)
        ),
    )
    monkeypatch.delenv("RHYTHM_KERNELS_CUDA_ARCHS", raising=False)
    return architectures


def test_an_extension_that_came_along_and_runs_is_used(built, monkeypatch, capsys):
    monkeypatch.setattr(gpu_build, "PROBE", "")
    gpu_build.main()
    assert built == [] and capsys.readouterr().out == "the extension that came along runs\n"


def test_an_extension_that_does_not_run_is_built_anew_and_has_to_run_then(built, monkeypatch, tmp_path, capsys):
    once = tmp_path / "once"
    probe = f"import pathlib; p = pathlib.Path({str(once)!r}); there = p.exists(); p.touch(); assert there, 'too old'"
    monkeypatch.setattr(gpu_build, "PROBE", probe)
    gpu_build.main()
    assert built == ["90a"] and "(AssertionError: too old): building one" in capsys.readouterr().out
    monkeypatch.setattr(gpu_build, "PROBE", "raise RuntimeError('no kernel image')")
    with pytest.raises(SystemExit, match="built for 90a does not run: RuntimeError: no kernel image"):
        gpu_build.main()
    monkeypatch.setattr(gpu_build, "PROBE", "import os; os._exit(7)")
    with pytest.raises(SystemExit, match="does not run: exit code 7"):
        gpu_build.main()


def test_a_checkouts_extension_is_always_built(built, monkeypatch, tmp_path):
    (tmp_path / ".git").touch()
    monkeypatch.setattr(gpu_build, "PROBE", "")
    gpu_build.main()
    assert built == ["90a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_probe_asks_the_gpu():
    assert re.search("CUDA|NVIDIA|cuda", gpu_build.why_not())


def test_the_dry_run_lists_every_step(capsys):
    for half in gpu_suite.HALVES:
        assert gpu_suite.main(["--dry-run", "--half", str(half)]) == 0
        lines = capsys.readouterr().out.splitlines()
        names = [step.name for step in gpu_suite.steps() if step.half == half or step.name == "build"]
        assert [line.split(":")[0] for line in lines[: len(names)]] == names
        assert not any("beyond the budget" in line for line in lines)
    assert gpu_suite.main(["--dry-run", "--only", "racecheck", "--budget", "20"]) == 0
    assert re.match(r"racecheck: half 1, about \d+ s, .* beyond the budget of 20 s: ", capsys.readouterr().out)


def test_another_assembler_repeats_the_first_tests_and_memcheck(capsys):
    assert gpu_suite.main(["--dry-run", "--ptxas", sys.executable]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:3]] == [
        "build",
        "gpu-tests-ptxas",
        "memcheck-ptxas",
    ]
    for step in gpu_suite.ptxas_steps(gpu_suite.steps(), Path("/a/ptxas")):
        assert step.environment["TRITON_PTXAS_PATH"] == "/a/ptxas"
    with pytest.raises(SystemExit):
        gpu_suite.main(["--dry-run", "--ptxas", "/not/there"])
    assert "--ptxas must be an assembler that runs, got /not/there" in capsys.readouterr().err


@pytest.mark.parametrize("says", ["#$ TOP={toolkit}/bin/..", "nothing"], ids=["a script", "the toolkit's own"])
def test_without_a_path_the_assembler_is_that_of_the_toolkit(tmp_path, monkeypatch, says):
    toolkit, scripts = tmp_path / "cuda", tmp_path / ("scripts" if "TOP" in says else "cuda/bin")
    for path, text in (
        (toolkit / "bin" / "ptxas", "echo ptxas"),
        (scripts / "nvcc", f"echo '{says.format(toolkit=toolkit)}' >&2"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scripts}:/usr/bin:/bin")
    assert gpu_suite.toolkit_ptxas() == toolkit / "bin" / "ptxas"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_suite.toolkit_ptxas() == Path("ptxas")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_suite.main([]) == 2
    assert "needs a GPU, and torch" in capsys.readouterr().err


def test_a_file_whose_imports_are_missing_is_left_out(tmp_path, monkeypatch):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_triton_a.py").write_text("import json\nfrom helper import x\n")
    (tests / "test_triton_b.py").write_text("import pytest  # pytest.mark." + "gpu\n")
    (tests / "helper.py").write_text("import torch\nfrom absent_package.part import y\n")
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    (tests / "test_triton_c.py").write_text("from own import part\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "part.py").write_text("import another_absent_package\n")
    assert gpu_suite.left_out_tests() == {
        "test_triton_a.py": ["absent_package"],
        "test_triton_c.py": ["another_absent_package"],
    }
    assert gpu_suite.runnable(gpu_suite.triton_tests()) == ["tests/test_triton_b.py"]
    assert gpu_suite.runnable(gpu_suite.gpu_tests()) == ["tests/test_triton_b.py"]


# ---- a step ----------------------------------------------------------------------------------------------------------


def test_a_step_passes_or_fails(tmp_path):
    passed = gpu_run.run(python("step", "import os; print('hello', os.environ['A_VARIABLE'])"), 60, tmp_path)
    assert (passed.status, passed.tail) == ("passed", "hello 7")
    failed = gpu_run.run(python("step", "for i in range(99): print(i)\nraise ValueError('the reason')"), 60, tmp_path)
    assert failed.status == "failed" and failed.tail.endswith("the reason")
    assert "\n0\n" not in failed.tail and failed.log.startswith("0\n1\n")


def test_a_step_out_of_time_is_asked_to_stop_and_then_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "GRACE", 1.0)
    beat = tmp_path / "beat"
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"{ignoring}\nimport time\nwhile True: open({str(beat)!r}, 'a').write('.'); time.sleep(0.02)"
    code = f"{ignoring}\nimport subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    stuck = gpu_run.run(python("step", code), 3, tmp_path)
    assert stuck.status == "out of time" and beat.exists()
    beats = beat.stat().st_size
    time.sleep(0.2)
    assert beat.stat().st_size == beats, "a process that the step started lives on"


def test_a_step_out_of_time_says_what_it_has_so_far(tmp_path):
    code = "import time\ntry:\n    print('one of two'); time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    stopped = gpu_run.run(python("step", code), 5, tmp_path)
    assert stopped.status == "out of time" and stopped.tail == "one of two\nkept"


@pytest.mark.slow
def test_tests_that_hang_in_workers_leave_what_failed_in_the_report(tmp_path):
    """pytest waits for a worker that does not answer, and prints the failures after that."""
    begun = tmp_path / "begun"
    (tmp_path / "test_it.py").write_text(
        "import pathlib, signal, time\ndef test_wrong(): assert 1 == 2, 'the reason'\n"
        "def test_hangs():\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(120)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-n", "1", str(tmp_path)]
    stopped = gpu_run.run(Step("tests", 1, command, 1, 60), 12, tmp_path / "tests")
    assert begun.exists(), stopped.tail
    assert stopped.status == "out of time" and "AssertionError: the reason" in stopped.tail


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "workers"])
@pytest.mark.slow
def test_tests_that_are_interrupted_say_what_failed(tmp_path, workers):
    tests = "import pathlib, time\ndef test_wrong(): assert 1 == 2\n"
    tests += "def test_slow():\n    pathlib.Path('begun').touch()\n    time.sleep(120)\n"
    (tmp_path / "test_it.py").write_text(tests)
    command = next(step.command for step in gpu_suite.steps() if step.name == "gpu-tests")
    options = command[command.index("pytest") + 1 : command.index("-p") + 2]
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *workers, "test_it.py"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        time.sleep(1)  # for a failure on its way from another worker
        process.send_signal(signal.SIGINT)
        output = process.communicate()[0]
    assert "assert 1 == 2" in output and "FAILED test_it.py::test_wrong" in output


def test_steps_side_by_side_have_limits_and_outputs_of_their_own(tmp_path):
    meet = (
        "import pathlib, sys, time\npathlib.Path({mine!r}).touch()\nwhile not pathlib.Path({other!r}).exists(): pass\n"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    steps = [
        python("a", meet.format(mine=a, other=b) + "print('done')"),
        python("b", meet.format(mine=b, other=a) + "time.sleep(60)"),
    ]
    done = gpu_run.run_together(steps, [30, 2], tmp_path)
    assert (done[0].name, done[0].status, done[0].tail.splitlines()[:1]) == ("a", "passed", ["done"])
    assert done[1].status == "out of time" and done[1].seconds < 60  # which b would take


def test_a_long_log_keeps_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "LOG_CHARACTERS", (20, 30))
    log = gpu_run.run(python("step", "print('begin'); print('x' * 999); print('end')"), 60, tmp_path).log
    assert log.startswith("begin\nx") and log.endswith("x\nend") and "characters ..." in log and len(log) < 90


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretended_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    where = {"device": "NVIDIA Pretended 80GB", "torch": "2.11.0", "commit": "abc1234"}
    monkeypatch.setattr(gpu_suite, "environment", lambda device: where)
    monkeypatch.setattr(gpu_suite, "sanitizer_path", lambda: None)
    return where


def plan(monkeypatch, *steps: Step) -> None:
    monkeypatch.setattr(gpu_suite, "steps", lambda: list(steps))


@pytest.mark.slow
def test_the_report_holds_what_passed_and_what_did_not(pretended_gpu, monkeypatch, tmp_path, capsys):
    rates = {"flops": 1e9, "bytes": 1e9, "exps": 1e9}
    write = f"open('{{out}}.md', 'w').write('rates'); open('{{out}}.json', 'w').write({json.dumps(json.dumps(rates))})"
    measured = [sys.executable, "-m", "benchmarks.attention", *TINY, "--variants", "sdpa", "band"]
    selected = [sys.executable, "-m", "benchmarks.selection", "--device", "cpu", "--rounds", "1"]
    plan(
        monkeypatch,
        python("gpu-tests", "print('== 12 passed in 3 s ==')"),
        python("ceilings", write),
        Step("attention", 1, [*measured, "--out", "{out}"], 1, 120),
        Step("selection", 1, [*selected, "--shapes", "1x8K", "--calls", "topq", "--out", "{out}"], 1, 120),
        python("forward", "raise ValueError('too slow a day')"),
        python("memcheck", ""),
        python("trainer", "", estimate=2000),
    )
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    text = (tmp_path / f"{NAME}.md").read_text()
    for line in (
        "| forward | failed |",
        "ValueError: too slow a day",
        "gpu-tests: 12 passed in 3 s",
        "| memcheck | left",
        "| trainer | out of time | 0 |",
        "of 540 s are left, and it takes about 2000 s",
    ):
        assert line in text
    assert f"![attention]({NAME}-attention.png)" in text
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"{NAME}{end}" for end in ("-attention.png", ".json", ".log", ".md")]
    data = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert [step["status"] for step in data["steps"]] == ["passed"] * 4 + ["failed", "left out", "out of time"]
    assert "==== forward: failed ====\nTraceback" in (tmp_path / f"{NAME}.log").read_text()

    by_name = {step["name"]: step["data"] for step in data["steps"]}
    row = by_name["attention"]["tokens"]["64"]
    work, seconds = row["work"]["band"], row["measured"]["band"]["seconds"]
    assert work["flops"] == max(work.values())
    assert f"\n| band | {work['flops'] / 1e9 / seconds:.0%} |" in text.split("fraction of the floor")[1]

    seconds = by_name["selection"]["shapes"]["1x8K"]["measured"]["topq, extension"]["seconds"]
    floor = 8192 * (4 + 1 + 1) / rates["bytes"]
    assert "\n## selection\n" in text and "| 1x8K | topq | " in text
    assert f"| fraction of the floor | 1x8K |\n|---|---|\n| topq, extension | {floor / seconds:.0%} |" in text


def test_a_later_call_replaces_the_steps_that_it_runs_and_keeps_the_others(pretended_gpu, monkeypatch, tmp_path):
    plan(monkeypatch, python("gpu-tests", "print('1 failed'); exit(1)"), python("selection", "print('one')"))
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    plan(monkeypatch, python("gpu-tests", "print('2 passed')"), python("selection", "print('two')"))
    assert gpu_suite.main(["--out", str(tmp_path), "--only", "gpu-tests"]) == 0
    data = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert [(step["name"], step["status"], step["tail"]) for step in data["steps"]] == [
        ("gpu-tests", "passed", "2 passed"),
        ("selection", "passed", "one"),
    ]
    log = (tmp_path / f"{NAME}.log").read_text()
    assert log == "==== gpu-tests: passed ====\n2 passed\n==== selection: passed ====\none\n"


def test_a_step_that_finds_no_time_takes_nothing_away(pretended_gpu, monkeypatch, tmp_path, capsys):
    plan(monkeypatch, python("gpu-tests", "print('2 passed')"))
    assert gpu_suite.main(["--out", str(tmp_path / "first")]) == 0
    assert gpu_suite.main(["--out", str(tmp_path / "first"), "--budget", "0"]) == 1
    assert gpu_suite.main(["--out", str(tmp_path / "second"), "--budget", "0"]) == 1
    folders = [str(tmp_path / name) for name in ("first", "second")]
    assert gpu_suite.main(["--merge", *folders, "--out", str(tmp_path / "both")]) == 0
    for folder in ("first", "both"):
        data = json.loads((tmp_path / folder / f"{NAME}.json").read_text())
        assert [(step["status"], step["tail"]) for step in data["steps"]] == [("passed", "2 passed")]
        assert "2 passed" in (tmp_path / folder / f"{NAME}.log").read_text()


@pytest.mark.parametrize("commit", ["abc1234-dirty", "unknown"])
def test_reports_that_no_commit_names_are_not_joined(commit, pretended_gpu, monkeypatch, tmp_path, capsys):
    where = {"device": "Some GPU", "commit": commit}
    folders = [str(report_in(tmp_path / name, where, "forward")) for name in ("first", "second")]
    assert gpu_suite.main(["--merge", *folders, "--out", str(tmp_path / "both")]) == 2
    assert f"got {commit} in {folders[0]}" in capsys.readouterr().err
    plan(monkeypatch, python("gpu-tests", ""))
    monkeypatch.setattr(gpu_suite, "environment", lambda device: pretended_gpu | {"commit": commit})
    assert gpu_suite.main(["--out", str(tmp_path / "third")]) == 0
    assert gpu_suite.main(["--out", str(tmp_path / "third")]) == 2
    assert re.search(f"--out: .*got {commit} .*name another folder", capsys.readouterr().err)


def report_in(folder: Path, where: dict[str, str], *names: str) -> Path:
    report = gpu_report.Report(where)
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    for name in names:
        for end, content in ((".md", f"of {folder.name}"), (".json", "{}"), (".png", "a picture")):
            (scratch / f"{name}{end}").write_text(content)
        report.add(Outcome(name, "passed", 1.0, "", f"log of {name} in {folder.name}"), scratch, folder)
    report.save(folder)
    return folder


def test_reports_of_two_folders_are_joined(tmp_path, capsys):
    where = {"device": "Some GPU", "commit": "abc1234"}
    first = report_in(tmp_path / "first", where, "attention", "forward")
    second = report_in(tmp_path / "second", where, "forward", "attention-long")
    out = tmp_path / "both"
    assert gpu_suite.main(["--merge", str(first), str(second), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"written: {out}/gpu-some-gpu.md\n"
    text = (out / "gpu-some-gpu.md").read_text()
    assert (
        "## attention\n\nof first" in text
        and "## forward\n\nof second" in text
        and "of first\n\n![forward]" not in text
    )
    assert len([*out.iterdir()]) == 6 <= MOST_FILES
    log = (out / "gpu-some-gpu.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("log")] == [
        "log of attention in first",
        "log of forward in second",
        "log of attention-long in second",
    ]


@pytest.mark.parametrize("other", [{"commit": "def5678"}, {"device": "Another GPU"}, {"torch": "2.12.0"}])
def test_reports_of_other_things_are_not_joined(tmp_path, capsys, other):
    where = {"device": "Some GPU", "commit": "abc1234"}
    first = report_in(tmp_path / "first", where, "attention")
    second = report_in(tmp_path / "second", where | other, "forward")
    [(key, value)] = other.items()
    assert gpu_suite.main(["--merge", str(first), str(second), "--out", str(tmp_path / "both")]) == 2
    assert f"reports must be of one {key}, got {value!r} in {second}" in capsys.readouterr().err
    assert not (tmp_path / "both" / "gpu-some-gpu.md").exists()
    (tmp_path / "empty").mkdir()
    assert gpu_suite.main(["--merge", str(tmp_path / "empty"), "--out", str(tmp_path / "both")]) == 2
    assert "must hold a report" in capsys.readouterr().err


def test_results_of_another_commit_are_not_overwritten(pretended_gpu, monkeypatch, tmp_path, capsys):
    plan(monkeypatch, python("gpu-tests", ""))
    report_in(tmp_path / "old", pretended_gpu | {"commit": "def5678"}, "forward")
    before = {path: path.read_bytes() for path in (tmp_path / "old").glob("gpu-*")}
    assert gpu_suite.main(["--out", str(tmp_path / "old")]) == 2
    assert "--out: reports must be of one commit" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "old").glob("gpu-*")} == before


def test_an_unknown_commit_is_told(pretended_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_suite, "environment", lambda device: pretended_gpu | {"commit": "unknown"})
    plan(monkeypatch, python("gpu-tests", ""))
    assert gpu_suite.main(["--out", str(tmp_path)]) == 0
    assert "WARNING: the commit is unknown" in capsys.readouterr().err


def test_all_steps_leave_few_files(tmp_path):
    """Each benchmark of attention may leave a picture; the others draw none."""
    drawing = [step.name for step in gpu_suite.steps() if "benchmarks.attention" in step.command]
    folder = report_in(tmp_path / "all", {"device": "Some GPU"}, *drawing)
    assert len([*folder.glob("gpu-*")]) == 3 + len(drawing) <= MOST_FILES


# ---- what the sanitizers see -----------------------------------------------------------------------------------------


def test_what_runs_under_the_sanitizers_runs_every_op():
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            packed = any(isinstance(x, torch.Tensor) and x.dtype == torch.int32 for x in args)
            called.add((str(op), packed))
            return op(*args, **(kwargs or {}))

    with Record():
        gpu_kernels.run_all("cpu")
    schemas = (gpu_run.ROOT / "csrc" / "ops.cpp").read_text()
    names = re.findall(r'm\.def\(\s*"(\w+)\(', schemas)
    wanted = {(f"rhythm_kernels.{name}.default", packed) for name in names for packed in (False, True)}
    assert len(wanted) >= 8 and wanted <= called
