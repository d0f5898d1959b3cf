"""The Triton kernels, run by Triton's interpreter where there is no GPU, against the dense fp64 reference."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from stats_cases import StatsCase, assert_close_to_reference, make_case, reference_stats, stats_case

from rhythm_kernels import attention_stats
from rhythm_kernels.attention import triton_backend
from rhythm_kernels.attention.triton_tiles import choose_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # the interpreter's tl.dot is wrong for bf16
FUZZ_CASES = int(os.environ.get("FUZZ_CASES", 120))


def run(case: StatsCase, **kwargs):
    kwargs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in (case.kwargs | kwargs).items()}
    q, k = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x) for x in case[:2])
    stats = attention_stats(q, k, **kwargs, backend="triton")
    return type(stats)(*(None if x is None else x.cpu() for x in stats))


def response(tokens: int, begin: int) -> torch.Tensor:
    return (torch.arange(tokens) >= begin)[None]


def holes(tokens: int) -> torch.Tensor:
    """Two turns: rows 20..44 and from 70."""
    position = torch.arange(tokens)
    return (((position >= 20) & (position < 45)) | (position >= 70))[None]


def packed(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def padded(tokens: int, *spans: tuple[int, int]) -> torch.Tensor:
    position = torch.arange(tokens)
    return torch.stack([(position >= begin) & (position < end) for begin, end in spans])


@settings(max_examples=FUZZ_CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(stats_case(dtypes=(torch.float32, HALF) if DEVICE == "cpu" else (torch.float32, HALF, torch.bfloat16)))
def test_fuzz(case):
    assert_close_to_reference(run(case), case)


# (q [B, HQ, T, D], H, options)
FEATURES = {
    "plain": ((1, 2, 100, 32), 2, {}),
    "one token": ((1, 2, 1, 16), 1, {}),
    "no token": ((2, 2, 0, 16), 1, {}),
    "whole tiles": ((1, 1, 64, 16), 1, {}),
    "one more than whole tiles": ((1, 1, 65, 16), 1, {}),
    "grouped heads 9:3": ((1, 9, 40, 16), 3, {}),
    "head size 80": ((1, 2, 50, 80), 1, {}),
    "head size 96": ((1, 2, 50, 96), 1, {}),
    "head size 5": ((1, 2, 50, 5), 1, {}),
    "left and right padding": ((3, 2, 60, 16), 1, {"attention_mask": padded(60, (25, 60), (0, 33), (0, 60))}),
    "a row of padding only": ((2, 2, 40, 16), 1, {"attention_mask": padded(40, (0, 0), (0, 40))}),
    "packed, two empty": ((1, 2, 90, 16), 1, {"cu_seqlens": packed(0, 0, 33, 34, 34, 90)}),
    "response": ((1, 2, 90, 16), 1, {"row_mask": response(90, 50)}),
    "holes": ((1, 2, 110, 16), 1, {"row_mask": holes(110)}),
    "no row": ((1, 2, 70, 16), 1, {"row_mask": torch.zeros(1, 70, dtype=torch.bool)}),
    "last row only": ((1, 2, 70, 16), 1, {"row_mask": response(70, 69)}),
    "packed, holes": ((1, 2, 110, 16), 1, {"cu_seqlens": packed(0, 50, 110), "row_mask": holes(110)}),
    "sliding window": ((1, 2, 90, 16), 1, {"sliding_window": 7}),
    "sliding window 1": ((1, 2, 40, 16), 1, {"sliding_window": 1}),
    "softcap": ((1, 2, 70, 16), 1, {"softcap": 2.0}),
    "sinks": ((1, 2, 70, 16), 1, {"sinks": torch.tensor([1.5, -3.0])}),
    "strided sinks": ((1, 2, 40, 16), 1, {"sinks": torch.tensor([1.5, 9.0, -3.0, 9.0])[::2]}),
    "sink of no weight, packed": (
        (1, 2, 40, 16),
        1,
        {"sinks": torch.tensor([-torch.inf, 0.0]), "cu_seqlens": packed(0, 25, 40)},
    ),
    "all options": (
        (1, 4, 100, 40),
        2,
        {"sliding_window": 37, "softcap": 5.0, "sinks": torch.arange(4.0), "row_mask": holes(100), "scale": 0.4},
    ),
    "open horizon": ((1, 2, 100, 16), 1, {"horizon": (1, None), "row_mask": response(100, 40)}),
    "horizon of one": ((1, 2, 60, 16), 1, {"horizon": (0, 0)}),
    "horizon past the end": ((1, 2, 60, 16), 1, {"horizon": (59, 10**12)}),
    "horizon past the window": ((1, 2, 60, 16), 1, {"horizon": (10, 50), "sliding_window": 5}),
    "window 1": ((1, 2, 60, 16), 1, {"window": 1}),
    "window 256": ((1, 1, 300, 16), 1, {"window": 256, "row_mask": response(300, 250)}),
    "large scores": ((1, 2, 60, 16), 1, {"scale": 30.0}),
    "scale 0": ((1, 2, 60, 16), 1, {"scale": 0.0}),
}


@pytest.mark.parametrize("lse_given", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("shape, key_heads, options", FEATURES.values(), ids=FEATURES.keys())
def test_feature(shape, key_heads, options, lse_given):
    case = make_case(shape, key_heads, dtype=HALF, order="heads inside", lse_given=lse_given, **options)
    assert_close_to_reference(run(case), case)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs every test with its own tiles")
@pytest.mark.parametrize("head_size", [64, 160])
@pytest.mark.parametrize("target", [80, 90, 100])
def test_shipped_tiles(target, head_size, monkeypatch):
    monkeypatch.setattr(triton_backend, "_tiles_for", lambda q: choose_tiles(target, head_size, 16))
    options = {"row_mask": holes(200), "sliding_window": 150, "softcap": 8.0, "sinks": torch.ones(2)}
    case = make_case((1, 2, 200, head_size), 1, dtype=HALF, **options)
    assert_close_to_reference(run(case), case)


@pytest.mark.parametrize("need_span", [False, True], ids=["no span", "span"])
@pytest.mark.parametrize("lse_given", [False, True], ids=["no lse", "lse"])
def test_row_pass_runs_only_when_needed(lse_given, need_span, monkeypatch):
    calls = []
    real = triton_backend.row_pass
    monkeypatch.setattr(triton_backend, "row_pass", lambda *args: calls.append(args) or real(*args))
    case = make_case((1, 2, 40, 16), 1, lse_given=lse_given, need_span=need_span)
    assert_close_to_reference(run(case), case)
    assert len(calls) == (need_span or not lse_given)


@pytest.mark.parametrize("lse_given", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["packed", "batch"])
def test_nan_stays_in_its_sequence(kind, bad, lse_given):
    """Sequences of 13, 20 and 27 tokens share tiles; the middle one goes bad. The others keep every bit."""
    position = torch.arange(60)
    middle = ((position >= 13) & (position < 33))[None]
    if kind == "packed":
        options = {"cu_seqlens": packed(0, 13, 33, 60)}
    else:
        options = {"attention_mask": padded(60, (0, 13), (13, 33), (33, 60))}
        middle = torch.cat([middle & False, middle, middle & False])
    case = make_case((len(middle), 2, 60, 16), 1, lse_given=lse_given, **options)
    clean = run(case)
    case.q[:, 0, 17], case.k[:, :, 20] = bad, bad  # in the middle sequence, and in padding
    if lse_given:
        case.kwargs["lse"][middle[:, None].expand(-1, 2, -1)] = torch.nan
    spoiled = run(case)
    for name in ("waad", "fai", "lse"):
        others = ~middle[:, None].expand_as(clean.lse)
        assert torch.equal(getattr(clean, name)[others], getattr(spoiled, name)[others]), name
        assert getattr(clean, name)[~others].isfinite().all()
        assert not getattr(spoiled, name)[~others].isfinite().all(), name
    assert torch.equal(clean.span[[0, 2]], spoiled.span[[0, 2]])
    assert spoiled.span[1].isnan().any()


def test_nan_spoils_what_it_reaches_and_no_more():
    """A NaN in key 30 reaches the rows from 30, and through them the columns that they look back at."""
    case = make_case((1, 1, 70, 16), 1, horizon=(2, 9))
    case.k[:, :, 30] = torch.nan
    stats, exact = run(case), reference_stats(case)
    assert torch.equal(stats.waad.isnan(), exact.waad.isnan())
    assert torch.equal(stats.fai.isnan(), exact.fai.isnan())
    assert torch.equal(stats.lse.isnan(), exact.lse.isnan())


def test_padding_content_changes_nothing():
    mask = padded(70, (30, 70), (0, 31))
    case = make_case((2, 2, 70, 16), 1, attention_mask=mask)  # padding is NaN
    zeros = case._replace(q=case.q.nan_to_num(), k=case.k.nan_to_num())
    for x, y in zip(run(case), run(zeros), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("order", ["heads inside", "slice"])
def test_strides_change_no_bit(order):
    """q, k and lse as models hand them over, and contiguous."""
    case = make_case((2, 4, 50, 20), 2, dtype=HALF, order=order, lse_given=True)
    assert not case.q.is_contiguous() and not case.kwargs["lse"].is_contiguous()
    dense = StatsCase(case.q.contiguous(), case.k.contiguous(), {"lse": case.kwargs["lse"].contiguous()})
    for x, y in zip(run(case), run(dense), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("horizon", [(10, 50), (1, None)])
def test_same_input_same_bits(horizon):
    case = make_case((1, 4, 90, 32), 2, dtype=HALF, horizon=horizon, sinks=torch.ones(4), row_mask=holes(90))
    runs = [run(case) for _ in range(3)]
    for x, y in zip(runs[0] * 2, runs[1] + runs[2], strict=True):
        assert torch.equal(x, y)


def test_a_sequence_in_a_batch_has_the_bits_that_it_has_alone():
    batch = make_case((3, 2, 70, 16), 1, attention_mask=padded(70, (0, 70), (0, 41), (0, 23)))
    together = run(batch)
    for b, length in enumerate((70, 41, 23)):
        alone = run(StatsCase(batch.q[b : b + 1, :, :length], batch.k[b : b + 1, :, :length], {}))
        for name in ("waad", "fai", "lse"):
            assert torch.equal(getattr(together, name)[b, :, :length], getattr(alone, name)[0]), name
        torch.testing.assert_close(together.span[b], alone.span[0], rtol=1e-6, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="the sparse file is read where the kernels are interpreted")
@pytest.mark.parametrize("far", ["batch", "head", "token"])
def test_offsets_past_int32(far, tmp_path):
    """Strides below 2^31 whose multiples pass it, over a sparse file of 4 GB: only the touched pages exist."""
    shape, step = (3, 3, 33, 16), {"batch": 2**30, "head": 2**30, "token": 2**26}[far]
    strides = [2**15, 2**13, 16, 1]
    strides[["batch", "head", "token"].index(far)] = step
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    store = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=HALF)
    distant = store.as_strided(shape, strides)
    case = make_case(shape, 3, dtype=HALF)
    for name in ("q", "k"):
        distant.copy_(getattr(case, name))
        moved = case._replace(**{name: distant})
        assert_close_to_reference(attention_stats(moved.q, moved.k, backend="triton"), case)


def test_head_size_too_large():
    q = torch.zeros(1, 1, 4, 320)
    with pytest.raises(ValueError, match=r"head sizes up to 256, got q of shape \[1, 1, 4, 320\]"):
        attention_stats(q, q, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="bf16 is right on a GPU")
def test_interpreter_refuses_bf16():
    q = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bf16"):
        attention_stats(q, q, backend="triton")


def test_cpu_without_interpreter():
    """An explicit backend never falls back."""
    code = """
import torch
from rhythm_kernels import attention_stats
q = torch.zeros(1, 1, 4, 16)
try:
    attention_stats(q, q, backend="triton")
except ValueError as error:
    assert 'backend="triton"' in str(error) and "got q on cpu" in str(error), error
else:
    raise SystemExit("no error")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
