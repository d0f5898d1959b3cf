"""Tests the benchmarks of selection and credit: they refuse wrong results, and find the loops of the CUDA kernels."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from benchmarks import extension, measure, selection

CPU = torch.device("cpu")


# ---- selection -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_shapes(monkeypatch):
    shapes = {"padded": selection.Shape([90, 40]), "packed": selection.Shape([90, 40], packed=True)}
    monkeypatch.setattr(selection, "SHAPES", shapes)
    monkeypatch.setattr(selection, "HEADLINE", ("padded", "coupled"))
    return ["--device", "cpu", "--shapes", *shapes, "--rounds", "1"]


def test_selection_runs_and_writes(tiny_shapes, tmp_path, capsys):
    selection.main([*tiny_shapes, "--out", str(tmp_path / "selection")])
    text = capsys.readouterr().out
    assert (tmp_path / "selection.md").read_text() == text.removesuffix("\n")
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| p")]
    calls = ["coupled", "local", "topq", "peaks"]
    assert [(shape.strip("| "), call) for shape, call, *_ in lines] == [
        (shape, call) for shape in ("padded", "packed") for call in calls
    ]
    assert "\ncoupled of padded: " in text and "as fast as torch. Goal: at least 5x." in text

    data = json.loads((tmp_path / "selection.json").read_text())
    for shape, tokens in (("padded", 2 * 90), ("packed", 90 + 40)):
        row = data["shapes"][shape]
        assert row["measured"].keys() == {f"{call}, {backend}" for call in calls for backend in selection.BACKENDS}
        assert row["work"]["coupled, extension"]["bytes"] == tokens * (4 + 4 + 1 + 4)
        assert len(row["measured"]["topq, torch"]["samples"]) == 1 and row["traces"] == {}


def test_packed_sequences_have_the_signals_of_padded_ones():
    lengths = [90, 8, 40]
    padded, packed = (selection.make_batch(selection.Shape(lengths, packed)) for packed in (False, True))
    assert (
        padded.response_mask.sum(-1).tolist() == [n - n // 8 for n in lengths] and not padded.response_mask[:, :1].any()
    )
    assert packed.cu_seqlens.tolist() == [0, 90, 98, 138]
    for name in ("waad", "fai", "response_mask"):
        rows = [row[:n] for row, n in zip(getattr(padded, name), lengths)]
        assert torch.equal(getattr(packed, name)[0], torch.cat(rows))
    assert padded.waad.max() <= 10 and padded.fai.min() == 0


def flip_one(selected):
    """Returns the result with another value for one token in R."""
    other = selected.clone()
    other[0, 60] = ~other[0, 60] if other.dtype == torch.bool else other[0, 60].nextafter(other.new_tensor(9.0))
    return other


@pytest.mark.parametrize("wrong", [("extension",), ("torch",), ("extension", "torch")], ids="-".join)
@pytest.mark.parametrize("call", selection.CALLS)
def test_selection_refuses_another_result(call, wrong, tiny_shapes, monkeypatch, tmp_path, capsys):
    right = selection.CALLS[call]

    def spoiled(batch, backend):
        result = right.run(batch, backend)
        return flip_one(result) if backend in wrong else result

    monkeypatch.setitem(selection.CALLS, call, right._replace(run=spoiled))
    arguments = [*tiny_shapes, "--out", str(tmp_path / "selection")]
    refused = r"1 tokens differ, first \[0, 60\]: .*: nothing is timed"
    with pytest.raises(SystemExit, match=f"^{call}, {wrong[0]}, and the reference, padded: {refused}"):
        selection.main(arguments)
    if len(wrong) == 1:
        monkeypatch.setattr(selection, "check_by_reference", lambda calls, device: None)
        with pytest.raises(SystemExit, match=f"^{call} of padded, extension and torch: {refused}"):
            selection.main(arguments)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_selection_refuses_another_dtype_shape_or_nan():
    gamma = torch.ones(1, 3)
    selection.check("gamma", gamma.clone(), gamma)
    for other in (gamma.double(), gamma[:, 1:], gamma.where(gamma < 1, torch.nan)):
        with pytest.raises(SystemExit, match="^gamma: "):
            selection.check("gamma", other, gamma)


def test_the_trace_of_a_call_counts_launches_and_copies(monkeypatch):
    def event(key, count, on_gpu=True, annotation=False):
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        return SimpleNamespace(key=key, count=count, device_type=kind, is_user_annotation=annotation)

    events = [
        event("void row_kernel<TopQ>(TopQ, Sequences, int, unsigned int*)", 2),
        event("Memset (Device)", 1),
        event("Memcpy HtoD (Pageable -> Device)", 3),
        event("cudaLaunchKernel", 2, on_gpu=False),
        event("a region", 1, annotation=True),
    ]

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return SimpleNamespace(key_averages=lambda: events)

        def __exit__(self, *error):
            return None

    modes = []
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        if modes[-1:] == ["error"]:
            raise RuntimeError(message)

    message = "called a synchronizing CUDA operation"
    assert selection.trace(run, CPU) == selection.Trace(launches=3, copies=3, host_waits=True)
    assert selection.trace(lambda: None, CPU).host_waits is False
    message = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        selection.host_waits(run)
    assert modes == ["error", 0] * 3


def test_the_table_of_a_gpu():
    def measured(seconds, kernel_seconds):
        return measure.Measured(seconds, (seconds, seconds), 1 << 20, kernel_seconds)

    keys = [selection.variant("coupled", backend) for backend in selection.BACKENDS]
    row = selection.Row(
        measured=dict(zip(keys, (measured(20e-6, 16e-6), measured(1e-3, 0.5e-3)))),
        traces=dict(zip(keys, (selection.Trace(1, 0, False), selection.Trace(80, 2, True)))),
        work={keys[0]: {"bytes": 32_000_000}},
    )
    assert selection.table({"32x8K": row}, ["coupled"]).splitlines()[2] == (
        "| 32x8K | coupled | 20.0 us (16.0 us) | 1.00 ms (500.0 us) | 50.0x (50.0, 50.0) | 1.0 / 1.0 MiB "
        "| 1 (0) / 80 (2) | no / yes | 2,000 |"
    )
    said = selection.summary({"32x8K": row}, torch.device("cuda"))
    assert "20.0 us, 50.0x as fast as torch, launches 1, copies 0, the host does not wait. Goal: at most 2" in said


# ---- the extension's machine code ------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
@pytest.mark.slow
def test_the_loops_of_the_extension_are_found():
    """Every phase of a row has a loop for each place of its scratch. Searches are known by their atomics."""
    kernels = {kernel.row: kernel for kernel in extension.compile_kernels()}
    assert set(kernels) == {"TopQ", "Peaks", "TopQCredit", "CoupledCredit"}
    for row, searches in {"TopQ": 1, "Peaks": 1, "TopQCredit": 1, "CoupledCredit": 3}.items():
        for scratch in ("shared", "global"):
            loops = [loop for loop in kernels[row].loops if loop.scratch == scratch]
            assert sum(loop.turns == extension.DIGITS_READ for loop in loops) == searches, (row, scratch)
            assert all(loop.memory["ATOMS"] == 1 for loop in loops if loop.turns == extension.DIGITS_READ)
            assert sum(loop.turns == 1 for loop in loops) >= 3
        assert kernels[row].issue_seconds() > 0
    text = extension.report(list(kernels.values()))
    assert "## CoupledCredit" in text and "select(team, tokens" in text
