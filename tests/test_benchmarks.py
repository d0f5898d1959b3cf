"""Tests the benchmarks: they run to the end, refuse wrong results, and say what they left out and why."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark_cases import TINY_LLAMA

from benchmarks import attention, attention_variants, ceilings, forward, forward_trace, measure
from benchmarks.attention_variants import VARIANTS, Answer, Shape, Variant
from benchmarks.forward_trace import Kernel
from benchmarks.pretended_cuda import pretended_cuda
from benchmarks.triton_forward_baseline import causal_attention
from rhythm_kernels.statistics import api

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # for the Triton kernels, interpreted on a CPU
SMALL = Shape(4, 2, 16, torch.float32)
ON_A_CPU = ["maps", "eager", "sdpa", "colreduce", "full", "band", "groups", "fused"]  # flex takes a compiler
TINY = ["--device", "cpu", "--heads", "4", "2", "--head-size", "16", "--rounds", "1"]


# ---- measure ---------------------------------------------------------------------------------------------------------


def test_variants_take_turns_and_rounds_stop_at_the_limit():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    measured = measure.interleave(variants, 50, "test", limit=0.0)
    rounds = 2 + measure.FEWEST_ROUNDS  # two are not timed
    assert calls == ["a", "b"] * rounds
    assert len(measured["a"].samples) == measure.FEWEST_ROUNDS
    assert len(measure.interleave(variants, 5, "test")["a"].samples) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is pretended")
def test_a_gpu_waits_as_long_as_a_caller_says(monkeypatch):
    cycles = []
    monkeypatch.setattr("rhythm_kernels.analysis.measure._kernel_seconds", lambda run, device: None)
    with pretended_cuda() as device:
        monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
        for head_start in ({}, {"head_start": forward.HEAD_START}):
            measure.interleave({"a": lambda: None}, 1, "test", device, **head_start)
    assert cycles == [2_000_000, 100_000_000]


@pytest.mark.parametrize("seconds", [-1e-3, 1.1, float("nan")])
def test_a_head_start_that_no_gpu_can_wait_is_refused(seconds):
    with pytest.raises(ValueError, match=f"^head_start must be between 0 and 1.07 seconds, got {seconds}$"):
        measure.interleave({}, 1, "test", head_start=seconds)


def test_extra_bytes_are_the_peak():
    def run(size):
        return torch.ones(size // 4).add(1).sum()

    size = 64 << 20
    run(16)  # loads the code, which takes memory too
    extra = measure.extra_bytes(lambda: run(size), CPU)
    assert 1.95 * size < extra < 2.1 * size


def test_ratio_compares_rounds():
    slow, fast = (measure.Measured(0.0, samples, 0) for samples in ((2.0, 30.0, 2.0), (1.0, 10.0, 1.0)))
    assert measure.ratio(slow, fast) == 2.0
    assert measure.median_and_range(measure.ratios(slow, fast), 1) == "2.0x (2.0, 3.0)"


def test_a_cell_of_a_table_is_one_cell():
    table = measure.markdown_table(["a", "b|c"], [["1|2\n3", ""]])
    assert table == "| a | b\\|c |\n|---|---|\n| 1\\|2 3 | |"


def test_a_report_has_no_long_lines_outside_of_tables_and_fences(tmp_path):
    sentence = "word " * 60
    table = measure.markdown_table(["", "a column"], [[sentence, ""]])
    text = f"{sentence}\n\n{table}\n\n- {sentence}\n```\n{sentence}\n```\n{'x' * 130}\n"
    folded = measure.publish(tmp_path / "report", text, {"a": 1})
    assert folded == (tmp_path / "report.md").read_text() and json.loads((tmp_path / "report.json").read_text())
    lines = folded.split("\n")
    assert table.split("\n") == lines[4:7] and table.startswith("| | a column |\n|---|---|\n|")
    assert [len(line) <= measure.COLUMNS for line in lines[:3]] == [True] * 3
    assert lines[8].startswith("- word") and lines[9].startswith("  word") and lines[-5:-2] == ["```", sentence, "```"]
    assert folded.split() == text.split()
    assert measure.publish(None, "short\n", {}) == "short\n"


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_attention_runs_and_writes(tmp_path, capsys):
    out = tmp_path / "folder" / "result"
    attention.main([*TINY, "--tokens", "128", "64", "--variants", *ON_A_CPU, "--out", str(out)])
    text = capsys.readouterr().out
    assert out.with_suffix(".md").read_text() == text.removesuffix("\n")
    assert (tmp_path / "folder" / "result.png").read_bytes().startswith(b"\x89PNG")
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    for name in ON_A_CPU:
        assert rows[name].count("needs a GPU" if name == "colreduce" else " ms, ") == 2, rows[name]
    assert "| out, waad, fai, span, lse |" in rows["fused"]
    sentences = " ".join(text.split())  # folded lines joined
    assert "At 128 tokens band is " in sentences and "the time at 128 tokens that it takes at 64" in sentences

    data = json.loads(out.with_suffix(".json").read_text())
    assert list(data["tokens"]) == ["64", "128"]
    for row in data["tokens"].values():
        assert row["measured"].keys() == row["errors"].keys() == set(ON_A_CPU) - {"colreduce"}
        assert row["skipped"] == {"colreduce": "needs a GPU"}
        assert max(row["errors"].values()) < 1e-5
    assert data["tokens"]["64"]["work"]["band"]["flops"] == 2 * 16 * 4 * 64 * 51


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_passes_of_flex_give_the_statistics(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    _, row = attention.prepare(SMALL, 128, ["flex"], CPU, {})
    assert row.gives["flex"] == ["out", "waad", "fai", "lse"] and row.errors["flex"] < 1e-5


@pytest.mark.parametrize("name", ["full", "band", "groups", "fused"])
def test_the_packages_own_variants_are_timed_without_their_layout(name, monkeypatch):
    run = VARIANTS[name].make(attention_variants.make_problem(SMALL, 32, CPU))
    for place in (api, attention_variants):
        monkeypatch.setattr(place, "make_layout", None)
    run()


@pytest.mark.parametrize("tokens", [64, 1100])  # against fp64, and against `full`
@pytest.mark.parametrize("name", ["band", "groups", "fused"])
def test_a_wrong_result_is_refused(name, tokens, monkeypatch, capsys):
    right = VARIANTS[name]

    def make_wrong(problem):
        run = right.make(problem)

        def wrong() -> Answer:
            answer = run()
            field = "group_fai" if answer.fai is None else "fai"
            return answer._replace(**{field: getattr(answer, field) * 1.001})

        return wrong

    attention.prepare(SMALL, tokens, [name], CPU, {})
    monkeypatch.setitem(VARIANTS, name, right._replace(make=make_wrong))
    off = f"fai of {name} at {tokens} tokens is off by 1.0e-03, allowed are 1.0e-04: it is not timed"
    with pytest.raises(SystemExit, match=off):
        attention.prepare(SMALL, tokens, [name], CPU, {})
    with pytest.raises(SystemExit, match="is off by 1.0e-03"):
        attention.main([*TINY, "--tokens", str(tokens), "--variants", "sdpa", name])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("spoil", [lambda x: x * torch.nan, lambda x: x[..., 1:]], ids=["NaN", "shape"])
def test_nan_and_wrong_shapes_are_refused(spoil, monkeypatch):
    problem = attention_variants.make_problem(SMALL, 32, CPU)
    truth = attention.exact_answer(problem)
    answer = VARIANTS["full"].make(problem)()
    attention.check("full", answer, truth, SMALL)
    with pytest.raises(SystemExit, match="waad of full at 32 tokens"):
        attention.check("full", answer._replace(waad=spoil(answer.waad)), truth, SMALL)


def test_only_what_rounds_to_16_bits_may_be_off_by_that():
    shape = SMALL._replace(dtype=torch.bfloat16)
    _, row = attention.prepare(shape, 96, ["maps", "eager", "sdpa", "full", "band", "fused"], CPU, {})
    assert max(row.errors["full"], row.errors["band"]) < 1e-5 < min(row.errors["maps"], row.errors["eager"])


def test_dense_maps_that_do_not_fit_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(attention_variants, "available_bytes", lambda device: 300 << 20)
    attention.main([*TINY, "--tokens", "64", "4096", "--variants", "maps", "eager", "band", "--rounds", "1"])
    text = capsys.readouterr().out
    for name in ("maps", "eager"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert line.endswith("| needs 0.9 GiB |") and line.count(" ms, ") == 1
    assert "At 64 tokens band is " in text  # the largest size at which both ran


MEASURE_MAPS = """
import torch
from benchmarks import attention_variants, measure
device = torch.device("cpu")
problem = attention_variants.make_problem(attention_variants.Shape({heads}, 1, 16, torch.float32), {tokens}, device)
print(measure.extra_bytes(attention_variants.VARIANTS["maps"].make(problem), device))
"""


def test_dense_maps_take_what_is_computed():
    # In a new process: in one that has run tests, malloc fills holes between what they keep, and keeps them when freed.
    heads, tokens = 2, 3072  # T x T values of 4 bytes are above 32 MiB: below it malloc may keep what is freed
    command = [sys.executable, "-c", MEASURE_MAPS.format(heads=heads, tokens=tokens)]
    extra = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert 0.85 < extra / attention_variants.dense_bytes(heads, tokens) < 1.1


def test_a_competitor_that_fails_is_a_footnote_and_ours_an_error(monkeypatch, capsys):
    def fails(problem):
        raise RuntimeError("no kernel for this\nand more")

    def absent(problem):
        import a_package_that_is_not_there  # noqa: F401

    monkeypatch.setitem(VARIANTS, "eager", Variant(fails))
    monkeypatch.setitem(VARIANTS, "colreduce", Variant(absent))
    attention.main([*TINY, "--tokens", "32", "64", "--variants", "eager", "colreduce", "band"])
    text = capsys.readouterr().out
    assert "| eager | - | (1) | (1) |" in text and "\n(1) eager: no kernel for this\n" in text
    assert "(2) colreduce: a_package_that_is_not_there is not installed" in text
    monkeypatch.setitem(VARIANTS, "band", Variant(fails, ours=True))
    with pytest.raises(RuntimeError, match="no kernel for this"):
        attention.main([*TINY, "--tokens", "32", "--variants", "band"])


@pytest.mark.parametrize("tokens", [1, 63, 150])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_the_triton_baseline_is_attention(dtype, tokens):
    q, k, v = (torch.randn(2, n, tokens, 32, device=DEVICE).to(dtype) for n in (4, 2, 2))
    out, lse = causal_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    heads = torch.ones(4, dtype=torch.bool)
    exact = attention.exact_answer(attention_variants.Problem(q[:1], k[:1], v[:1], lse, heads, heads, layout=None))
    eps = torch.finfo(dtype).eps
    assert (out[:1].cpu() - exact.out).abs().max() <= 8 * eps
    assert (lse[:1].cpu() - exact.lse).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="power of two from 16, got 24"):
        causal_attention(q[..., :24], k[..., :24], v[..., :24])


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(forward.MODELS, "tiny", TINY_LLAMA)
    return ["--device", "cpu", "--model", "tiny", "--tokens", "96", "--rounds", "1"]


def test_forward_runs_and_writes(tiny, tmp_path, capsys):
    forward.main([*tiny, "--out", str(tmp_path / "forward")])
    text = capsys.readouterr().out
    assert (tmp_path / "forward.md").read_text() == text.removesuffix("\n")
    assert "tiny (random weights), fp32, 96 tokens" in text and "| plain |" in text and "1.000x" in text
    data = json.loads((tmp_path / "forward.json").read_text())
    assert data["error"] < 1e-5 and len(data["groups"]["samples"]) == 1


def test_forward_traces_its_variants(tiny, capsys):
    forward.main([*tiny, "--trace"])
    text = capsys.readouterr().out
    for name in ("groups", "spans", "dense"):
        assert f"\n| {name} | " in text and f"{name}, the longest gaps:\n\n- " in text
        beyond = text.partition(f"{name}, beyond plain:\n\n| kernel | time | runs |\n|---|---|---|\n")[2]
        lines = beyond.partition("\n\n")[0].strip().split("\n")
        assert 3 <= len(lines) <= 10 and all(line.startswith("| aten::") for line in lines), lines
    with pytest.raises(SystemExit):
        forward.main([*tiny, "--trace", "--out", "report"])
    assert "--trace prints its report" in capsys.readouterr().err


def test_a_trace_begins_with_the_call():
    """The host's time before its first launch is a gap, the longest one here."""
    x = torch.ones(8)

    def run():
        time.sleep(0.05)
        x.add_(1)

    one = forward_trace.trace(run, CPU)
    assert [kernel.name for kernel in one.kernels] == ["aten::zero_", "aten::add_"]
    assert x[0] == 2 + forward_trace.RUNS
    [(seconds, before, after)] = one.gaps()
    assert 0.05 <= seconds < one.first_to_last and one.host_seconds >= 0.05
    assert (before, after) == tuple(one.kernels)


def test_a_trace_tells_kernels_from_gaps():
    """Kernels may overlap. The report compares the kernels of each name with those of plain."""
    plain = forward_trace.Trace([Kernel("gemm", 0.0, 0.010), Kernel("gemm", 0.010, 0.020)], 0.005)
    kernels = [
        Kernel("gemm", 1.000, 1.010),
        Kernel("row", 1.004, 1.014),  # beside the product
        Kernel("gemm", 1.011, 1.013),
        Kernel("copy | a\nb", 1.020, 1.021),
        Kernel("gemm", 1.022, 1.029),
    ]
    ours = forward_trace.Trace(kernels, 0.007)
    assert [(round(seconds, 6), a.name, b.name[:4]) for seconds, a, b in ours.gaps()] == [
        (0.006, "row", "copy"),
        (0.001, "copy | a\nb", "gemm"),
    ]
    assert ours.seconds == pytest.approx(0.030) and ours.first_to_last == pytest.approx(0.029)
    text = forward_trace.report({"plain": plain, "ours": ours})
    assert "| plain | 2 | 20.00 ms | 20.00 ms | 0.00 ms | 5.00 ms |" in text
    assert "| ours | 5 | 30.00 ms | 29.00 ms | 7.00 ms | 7.00 ms |" in text
    assert "plain, the longest gaps:\n\n- none" in text and "- 6.00 ms between row and copy / a b" in text
    assert text.endswith("| row | 10.00 ms | +1 |\n| copy / a b | 1.00 ms | +1 |\n"), text
    assert "plain, beyond" not in text and "| gemm" not in text


def test_forward_refuses_another_rhythm(tiny, monkeypatch, capsys):
    def wrong(tokens, device):
        sums, distance = attention_variants.dense_sums(tokens, device)
        return lambda weights: sums(weights)._replace(waad=sums(weights).waad * 1.001), distance

    monkeypatch.setattr(forward, "dense_sums", wrong)
    with pytest.raises(SystemExit, match="waad of groups is off by .*e-0[34], allowed are 1.0e-04: nothing is timed"):
        forward.main(tiny)
    assert capsys.readouterr().out == ""


def test_forward_refuses_other_logits(tiny):
    model, _ = forward.load("tiny", torch.float32, CPU)
    ids = torch.randint(64, (1, 40))
    variants = forward.make_variants(model, ids)
    forward.check(variants, ids, torch.float32)
    logits, rhythm, stats = variants["spans"]()
    variants["spans"] = lambda: (logits.nextafter(logits + 1), rhythm, stats)
    with pytest.raises(SystemExit, match="collecting changed the logits of spans: nothing is timed"):
        forward.check(variants, ids, torch.float32)


def test_forward_wants_memory_for_the_dense_maps(tiny, monkeypatch):
    monkeypatch.setattr(forward, "available_bytes", lambda device: 1000)
    with pytest.raises(SystemExit, match="dense maps need 0 GiB: ask for fewer --tokens"):
        forward.main(tiny)


def test_dense_layers_leave_transformers_as_it_was():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

    before = table["sdpa"]
    with pytest.raises(KeyError), forward.dense_layers([0], 8, torch.float32, CPU):
        assert table["sdpa"] is not before
        raise KeyError
    assert table["sdpa"] is before


def test_ceilings(monkeypatch):
    for name, size in {"PRODUCT": 32, "COPY": 64, "EXP_ELEMENTS": 2048, "EXP_STEPS": 5}.items():
        monkeypatch.setattr(ceilings, name, size)
    rates = ceilings.measure(3, torch.device(DEVICE))
    assert rates.keys() == {"flops", "bytes", "exps"} and min(rates.values()) > 0

    x = torch.rand(1024, device=DEVICE)
    out, expected = torch.empty_like(x), x
    ceilings.exp2_kernel[(1,)](x, out, STEPS=5, BLOCK=1024)
    for _ in range(5):
        expected = torch.exp2(-expected)
    torch.testing.assert_close(out, expected)
