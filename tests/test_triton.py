"""The Triton kernels, run by Triton's interpreter where there is no GPU, against the dense fp64 reference."""

import os
import subprocess
import sys

import pytest
import torch
from stats_cases import (
    StatsCase,
    assert_attention_close,
    assert_close_to_reference,
    make_case,
    named,
    reference_stats,
    tensors,
)
from triton_calls import CALLS, DEVICE, HALF, check, outputs, run, run_attention, run_groups

from rhythm_kernels import attention, attention_stats
from rhythm_kernels.statistics import triton_backend
from rhythm_kernels.statistics.more import MORE
from rhythm_kernels.statistics.triton_tiles import MAX_TOKEN_STRIDE, choose_tiles


def response(tokens: int, begin: int) -> torch.Tensor:
    return (torch.arange(tokens) >= begin)[None]


def holes(tokens: int) -> torch.Tensor:
    """Returns R of two turns: the rows 20 to 44 and those from 70 on."""
    position = torch.arange(tokens)
    return (((position >= 20) & (position < 45)) | (position >= 70))[None]


def packed(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def padded(tokens: int, *spans: tuple[int, int]) -> torch.Tensor:
    position = torch.arange(tokens)
    return torch.stack([(position >= begin) & (position < end) for begin, end in spans])


# (q [B, HQ, T, D], H, options)
FEATURES = {
    "plain": ((1, 2, 100, 32), 2, {}),
    "one token": ((1, 2, 1, 16), 1, {}),
    "no token": ((2, 2, 0, 16), 1, {}),
    "whole tiles": ((1, 1, 64, 16), 1, {}),
    "one more than whole tiles": ((1, 1, 65, 16), 1, {}),
    "grouped heads 9:3": ((1, 9, 40, 16), 3, {}),
    "head size 72": ((1, 2, 50, 72), 1, {}),
    "head size 80": ((1, 2, 50, 80), 1, {}),
    "head size 96": ((1, 2, 50, 96), 1, {}),
    "head size 5": ((1, 2, 50, 5), 1, {}),
    "left and right padding": ((3, 2, 60, 16), 1, {"attention_mask": padded(60, (25, 60), (0, 33), (0, 60))}),
    "a row of padding only": ((2, 2, 40, 16), 1, {"attention_mask": padded(40, (0, 0), (0, 40))}),
    "packed, two empty": ((1, 2, 90, 16), 1, {"cu_seqlens": packed(0, 0, 33, 34, 34, 90)}),
    "response": ((1, 2, 90, 16), 1, {"response_mask": response(90, 50)}),
    "holes": ((1, 2, 110, 16), 1, {"response_mask": holes(110)}),
    "no row": ((1, 2, 70, 16), 1, {"response_mask": torch.zeros(1, 70, dtype=torch.bool)}),
    "last row only": ((1, 2, 70, 16), 1, {"response_mask": response(70, 69)}),
    "packed, holes": ((1, 2, 110, 16), 1, {"cu_seqlens": packed(0, 50, 110), "response_mask": holes(110)}),
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
        {"sliding_window": 37, "softcap": 5.0, "sinks": torch.arange(4.0), "response_mask": holes(100), "scale": 0.4},
    ),
    "open horizon": ((1, 2, 100, 16), 1, {"horizon": (1, None), "response_mask": response(100, 40)}),
    "horizon of one": ((1, 2, 60, 16), 1, {"horizon": (0, 0)}),
    "horizon past the end": ((1, 2, 60, 16), 1, {"horizon": (59, 10**12)}),
    "horizon past the window": ((1, 2, 60, 16), 1, {"horizon": (10, 50), "sliding_window": 5}),
    "window 1": ((1, 2, 60, 16), 1, {"window": 1}),
    "window 256": ((1, 1, 300, 16), 1, {"window": 256, "response_mask": response(300, 250)}),
    "large scores": ((1, 2, 60, 16), 1, {"scale": 30.0}),
    "scale 0": ((1, 2, 60, 16), 1, {"scale": 0.0}),
    "more": ((1, 2, 100, 16), 1, {"more": MORE, "first_keys": 20, "prefix_lengths": torch.tensor([70])}),
    "more, all options": (
        (1, 4, 110, 40),
        2,
        {
            "more": MORE,
            "prefix_lengths": torch.tensor([0, 90, 40], dtype=torch.int32),
            "span_rows": 64,
            "cu_seqlens": packed(0, 20, 40, 110),
            "response_mask": holes(110),
            "scale": -0.4,
            "sliding_window": 37,
            "softcap": 5.0,
            "sinks": torch.tensor([0.0, -torch.inf, 3.0, 9.0]),
        },
    ),
    "more, one of them": ((1, 2, 60, 16), 1, {"more": ["largest_score"], "sinks": torch.tensor([50.0, -3.0])}),
}


@pytest.mark.parametrize("call", ["statistics", "statistics, lse given", "groups, lse given", "attention"])
@pytest.mark.parametrize("shape, key_heads, options", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.slow
def test_feature(shape, key_heads, options, call):
    call, *given = call.split(", ")
    case = make_case(shape, key_heads, dtype=HALF, order="heads inside", lse_given=bool(given), **options)
    check(call, case)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs every test with its own tiles")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("head_size", [64, 96, 160])
@pytest.mark.parametrize("target", [80, 90, 100])
def test_shipped_tiles(target, head_size, call, monkeypatch):
    monkeypatch.setattr(triton_backend, "_tiles_for", lambda *_: choose_tiles(target, head_size, 32, 16))
    options = {"response_mask": holes(200), "sliding_window": 150, "softcap": 8.0, "sinks": torch.ones(2), "window": 40}
    options |= {"more": MORE, "prefix_lengths": torch.tensor([100])}
    check(call, make_case((1, 2, 200, head_size), 1, dtype=HALF, **options))


@pytest.mark.parametrize("need_span", [False, True], ids=["no span", "span"])
@pytest.mark.parametrize("lse_given", [False, True], ids=["no lse", "lse"])
def test_forward_pass_runs_only_when_needed(lse_given, need_span, monkeypatch):
    calls = []
    real = triton_backend.forward_pass
    monkeypatch.setattr(triton_backend, "forward_pass", lambda *args, **more: calls.append(args) or real(*args, **more))
    case = make_case((1, 2, 40, 16), 1, lse_given=lse_given, need_span=need_span)
    assert_close_to_reference(run(case), case)
    assert len(calls) == (need_span or not lse_given)


@pytest.mark.parametrize("call", ["statistics", "statistics, lse given", "groups, lse given", "attention"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["packed", "batch"])
@pytest.mark.slow
def test_nan_stays_in_its_sequence(kind, bad, call):
    """Sequences of 13, 20 and 27 tokens share tiles. The middle one gets a NaN; the others keep every bit."""
    call, *given = call.split(", ")
    position = torch.arange(60)
    middle = ((position >= 13) & (position < 33))[None]
    if kind == "packed":
        options = {"cu_seqlens": packed(0, 13, 33, 60)}
    else:
        options = {"attention_mask": padded(60, (0, 13), (13, 33), (33, 60))}
        middle = torch.cat([middle & False, middle, middle & False])
    options |= {"more": MORE, "prefix_lengths": torch.tensor([10, 10, 10])}
    case = make_case((len(middle), 2, 60, 16), 1, lse_given=bool(given), **options)
    clean = outputs(call, case)
    case.q[:, 0, 17], case.k[:, :, 20] = bad, bad  # in the middle sequence, and in padding
    if given:
        case.kwargs["lse"][middle[:, None].expand(-1, 2, -1)] = torch.nan
    spoiled = outputs(call, case)
    for name, x in clean.items():
        inside = middle.view(len(middle), *[1] * (x.ndim - 2), 60).expand_as(x)
        assert torch.equal(x[~inside], spoiled[name][~inside]), name
        assert x[inside].isfinite().all()
        assert not spoiled[name][inside].isfinite().all(), name


def test_nan_span_stays_in_its_sequence():
    case = make_case((1, 2, 60, 16), 1, cu_seqlens=packed(0, 13, 33, 60))
    clean = run(case).span
    case.q[:, 0, 17] = torch.nan
    spoiled = run(case).span
    assert torch.equal(clean[[0, 2]], spoiled[[0, 2]])
    assert spoiled[1].isnan().tolist() == [True, False]


def test_nan_outside_the_groups_changes_no_bit():
    case = make_case((1, 4, 60, 16), 2, lse_given=True)
    local_heads, global_heads = torch.tensor([True, False, False, False]), torch.tensor([False, False, True, False])
    clean = run_groups(case, local_heads, global_heads)
    case.q[:, [1, 3]] = torch.nan
    for x, y in zip(tensors(clean), tensors(run_groups(case, local_heads, global_heads)), strict=True):
        assert torch.equal(x, y)


def test_nan_spoils_what_it_reaches_and_no_more():
    """A NaN in key 30 reaches the rows from 30, and through them the columns that they look back at."""
    case = make_case((1, 1, 70, 16), 1, horizon=(2, 9))
    case.k[:, :, 30] = torch.nan
    stats, exact = run(case), reference_stats(case)
    assert torch.equal(stats.waad.isnan(), exact.waad.isnan())
    assert torch.equal(stats.fai.isnan(), exact.fai.isnan())
    assert torch.equal(stats.lse.isnan(), exact.lse.isnan())


@pytest.mark.parametrize("call", CALLS)
def test_padding_content_changes_nothing(call):
    mask = padded(70, (30, 70), (0, 31))
    case = make_case((2, 2, 70, 16), 1, attention_mask=mask)  # padding is NaN
    zeros = case._replace(q=case.q.nan_to_num(), k=case.k.nan_to_num())
    expected = outputs(call, case)
    for name, x in outputs(call, zeros).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("order", ["heads inside", "slice"])
@pytest.mark.slow
def test_strides_change_no_bit(order):
    """The strides of q, k and lse that models have give the bits of contiguous tensors."""
    case = make_case((2, 4, 50, 20), 2, dtype=HALF, order=order, lse_given=True)
    assert not case.q.is_contiguous() and not case.kwargs["lse"].is_contiguous()
    dense = StatsCase(case.q.contiguous(), case.k.contiguous(), {"lse": case.kwargs["lse"].contiguous()})
    for x, y in zip(tensors(run(case)), tensors(run(dense)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("horizon", [(10, 50), (1, None)])
@pytest.mark.slow
def test_same_input_same_bits(horizon, call):
    case = make_case((1, 4, 90, 32), 2, dtype=HALF, horizon=horizon, sinks=torch.ones(4), response_mask=holes(90))
    first, *others = [outputs(call, case) for _ in range(3)]
    for other in others:
        for name, x in first.items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("horizon", [(10, 50), (1, None)])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.slow
def test_a_sequence_in_a_batch_has_the_bits_that_it_has_alone(kind, call, horizon):
    lengths = (70, 41, 23, 1)
    options = {"horizon": horizon, "sliding_window": 33, "sinks": torch.ones(2)}
    alone = [make_case((1, 2, n, 16), 1, dtype=HALF, seed=n, **options) for n in lengths]
    begins = [{"right": 0, "left": 70 - n, "packed": sum(lengths[:i])}[kind] for i, n in enumerate(lengths)]
    if kind == "packed":
        q, k = (torch.cat([getattr(case, name) for case in alone], 2) for name in "qk")
        together = StatsCase(q, k, {"cu_seqlens": packed(0, *torch.tensor(lengths).cumsum(0))})
    else:
        spans = [(begin, begin + n) for begin, n in zip(begins, lengths, strict=True)]
        together = make_case((4, 2, 70, 16), 1, dtype=HALF, attention_mask=padded(70, *spans))
        for b, (case, (begin, end)) in enumerate(zip(alone, spans, strict=True)):
            together.q[b, :, begin:end], together.k[b, :, begin:end] = case.q[0], case.k[0]
    together.kwargs.update(options)

    batched = outputs_of_values(call, together, together.k)
    for b, (case, begin, n) in enumerate(zip(alone, begins, lengths, strict=True)):
        row = 0 if kind == "packed" else b
        for name, x in outputs_of_values(call, case, case.k).items():
            if name == "span":
                assert torch.equal(batched[name][b], x[0])
            else:
                assert torch.equal(batched[name][row, ..., begin : begin + n], x[0]), name


def outputs_of_values(call: str, case: StatsCase, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns `outputs` with the span, for a given v."""
    if call == "groups":
        return outputs(call, case)
    if call == "statistics":
        return named(run(case))
    out, stats = run_attention(case, v)
    return {"out": out.movedim(2, -1), **named(stats)}


@pytest.mark.skipif(DEVICE == "cuda", reason="the sparse file is read where the kernels are interpreted")
@pytest.mark.parametrize("far", ["batch", "head", "token"])
@pytest.mark.slow
def test_offsets_past_int32(far, tmp_path):
    """Multiples of a stride pass 2^31. The tensor lies in a sparse file of 4 GB, of which only touched pages exist."""
    shape, step = {
        "batch": ((3, 1, 33, 16), 2**30),
        "head": ((1, 3, 33, 16), 2**30),
        "token": ((1, 1, 258, 16), MAX_TOKEN_STRIDE),
    }[far]
    strides = [2**15, 2**13, 16, 1]
    strides[["batch", "head", "token"].index(far)] = step
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    store = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=HALF)
    distant = store.as_strided(shape, strides)
    case = make_case(shape, shape[1], dtype=HALF)
    for name in ("q", "k"):
        distant.copy_(getattr(case, name))
        moved = case._replace(**{name: distant})
        assert_close_to_reference(attention_stats(moved.q, moved.k, backend="triton"), case)
    distant.copy_(case.k)  # as v
    out, stats = attention(case.q, case.k, distant, backend="triton")
    assert_attention_close(out, stats, case, case.k)


@pytest.mark.parametrize(
    "q_size, v_size, dtype, text",
    [
        (320, 16, HALF, r"head sizes up to 256 in torch.float16, got q of shape \[1, 1, 4, 320\]"),
        (16, 257, HALF, r"head sizes up to 256 in torch.float16, got v of shape \[1, 1, 4, 257\]"),
        (160, 16, torch.float32, r"head sizes up to 128 in torch.float32, got q of shape \[1, 1, 4, 160\]"),
    ],
)
def test_head_size_too_large(q_size, v_size, dtype, text):
    q, v = (torch.zeros(1, 1, 4, size, dtype=dtype, device=DEVICE) for size in (q_size, v_size))
    with pytest.raises(ValueError, match=text):
        attention(q, q, v, backend="triton")


def test_token_stride_too_large():
    q = torch.zeros(1, dtype=HALF, device=DEVICE).as_strided((1, 1, 1, 1), (1, 1, MAX_TOKEN_STRIDE + 1, 1))
    with pytest.raises(
        ValueError, match=r"token strides up to 8388608 elements, got q of strides \(1, 1, 8388609, 1\)"
    ):
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
