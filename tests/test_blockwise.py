"""The blockwise torch backend against the fp64 reference, and the checks in front of every backend."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stats_cases import (
    assert_attention_close,
    assert_close_to_reference,
    assert_groups_close,
    make_case,
    make_groups,
    make_values,
    tensors,
)
from stats_strategy import stats_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rhythm_kernels import attention, attention_stats, group_stats
from rhythm_kernels.statistics import api, backends, blockwise_band, blockwise_rows
from rhythm_kernels.statistics.layout import make_layout
from rhythm_kernels.statistics.more import MORE
from rhythm_kernels.statistics.spans import mean_over_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOO_LONG = "q must have at most 4194304 tokens in a row, got 4194305"
SMALL_TILES = {  # one row or one item at a time, and tiles that reach over several packed sequences
    blockwise_rows: {"ROW_TILE": 7, "TILE_BYTES": 1, "SHORT": 0},
    blockwise_band: {"BAND_TILE": 5, "SHORT_TILE": 3, "BAND_BYTES": 1, "MASK_BYTES": 0},
}


def run(case):
    return attention_stats(case.q, case.k, **case.kwargs, backend="torch")


def run_groups(case, local_heads, global_heads):
    return group_stats(case.q, case.k, local_heads, global_heads, **case.group_options(), backend="torch")


def run_attention(case, v):
    return attention(case.q, case.k, v, **case.options("lse"), backend="torch")


@settings(max_examples=400, deadline=None)
@given(case=stats_case(max_tokens=160))
def test_fuzz(case):
    assert_close_to_reference(run(case), case)


@settings(max_examples=250, deadline=None)
@given(case=stats_case(max_tokens=160, dtypes=DTYPES), seed=st.integers(0, 99), per_sequence=st.booleans())
def test_fuzz_of_groups(case, seed, per_sequence):
    groups = make_groups(case, seed, per_sequence)
    assert_groups_close(run_groups(case, *groups), case, *groups)


@settings(max_examples=250, deadline=None)
@given(
    case=stats_case(max_tokens=160, dtypes=DTYPES),
    size=st.sampled_from((1, 5, 16, 40)),
    order=st.sampled_from(("heads outside", "heads inside", "slice")),
)
def test_fuzz_of_attention(case, size, order):
    v = make_values(case, size, order=order)
    assert_attention_close(*run_attention(case, v), case, v)


@settings(max_examples=100, deadline=None)
@given(case=stats_case(max_tokens=60), seed=st.integers(0, 99))
def test_fuzz_over_many_small_tiles(case, seed):
    with pytest.MonkeyPatch.context() as patch:
        for module, sizes in SMALL_TILES.items():
            for name, size in sizes.items():
                patch.setattr(module, name, size)
        assert_close_to_reference(run(case), case)
        groups, v = make_groups(case, seed), make_values(case, 6, seed)
        assert_groups_close(run_groups(case, *groups), case, *groups)
        assert_attention_close(*run_attention(case, v), case, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 192, 256])
def test_head_sizes_and_dtypes(dtype, size):
    case = make_case((1, 4, 150, size), 2, dtype=dtype, seed=size, order="heads inside")
    assert_close_to_reference(run(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, value_size", [(64, 64), (192, 128), (16, 80)])
def test_value_sizes_and_dtypes(dtype, size, value_size):
    case = make_case((1, 9, 150, size), 3, dtype=dtype, seed=size, order="heads inside", horizon=(1, None))
    v = make_values(case, value_size, order="heads inside")
    assert_attention_close(*run_attention(case, v), case, v)


@pytest.mark.parametrize("lse_given", [False, True])
def test_several_tiles_of_a_long_sequence(lse_given):
    case = make_case((2, 9, 700, 64), 3, seed=5, lse_given=lse_given, need_span=not lse_given)
    assert_close_to_reference(run(case), case)


def test_attention_over_several_tiles_of_a_batch():
    mask = torch.arange(330) >= torch.tensor([[0], [123]])
    case = make_case((2, 9, 330, 64), 3, attention_mask=mask, response_mask=torch.arange(330).expand(2, -1) >= 200)
    v = make_values(case, 64)
    assert_attention_close(*run_attention(case, v), case, v)


@pytest.mark.parametrize("lse_given", [False, True])
def test_each_row_alone_in_r(lse_given):
    """A row may lie anywhere in a tile, and at the far end of the window and the horizon of another row."""
    case = make_case((96, 1, 96, 8), 1, response_mask=torch.eye(96).bool(), lse_given=lse_given, need_span=False)
    assert_close_to_reference(run(case), case)


@pytest.mark.parametrize("lse_given", [False, True])
@pytest.mark.parametrize("longest", [128, 129])
def test_short_packed_sequences_are_computed_side_by_side(longest, lse_given, monkeypatch):
    """Sequences of at most 128 tokens are a padded batch for each length rounded up; one longer one, and none is."""
    batches = []
    row_pass = blockwise_rows.row_pass
    monkeypatch.setattr(
        blockwise_rows, "row_pass", lambda q, *args, **kw: batches.append(q.shape) or row_pass(q, *args, **kw)
    )
    bounds = torch.tensor([1, 0, 31, 32, 33, 70, longest]).cumsum(0).int()
    tokens = int(bounds[-1])
    options = {
        "response_mask": torch.rand(1, tokens) < 0.7,
        "sinks": torch.randn(4),
        "softcap": 3.0,
        "sliding_window": 60,
    }
    packed = {"cu_seqlens": torch.nn.functional.pad(bounds, (1, 0)), **options}
    case = make_case((1, 4, tokens, 16), 2, lse_given=lse_given, **packed)
    assert_close_to_reference(run(case), case)
    assert [shape[0] for shape in batches] == ([3, 1, 1, 1] if longest == 128 else [])
    assert [shape[2] for shape in batches] == ([32, 64, 96, 128] if longest == 128 else [])


@pytest.mark.parametrize("horizon", [(10, 50), (1, None)])
@pytest.mark.parametrize("lse_given", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_grouped_heads(dtype, lse_given, horizon):
    packed = torch.tensor([0, 40, 40, 111, 300], dtype=torch.int32)
    options = {"cu_seqlens": packed, "horizon": horizon, "sinks": torch.arange(9) - 4.0}
    case = make_case((1, 9, 300, 24), 3, dtype=dtype, order="slice", lse_given=lse_given, **options)
    for per_sequence in (False, True):
        groups = make_groups(case, seed=2, per_sequence=per_sequence)
        assert all(group.any() for group in groups)
        assert_groups_close(run_groups(case, *groups), case, *groups)


def test_one_group_for_all_sequences_is_the_same_group_for_each():
    for lse_given in (False, True):
        case = make_case((3, 4, 90, 8), 2, lse_given=lse_given)
        local = torch.tensor([True, False, False, True])
        by_sequence = run_groups(case, local.expand(3, -1), ~local.expand(3, -1))
        assert all(map(torch.equal, tensors(run_groups(case, local, ~local)), tensors(by_sequence)))


def test_rows_outside_r_have_an_output():
    case = make_case((2, 4, 150, 16), 2, response_mask=torch.rand(2, 150) < 0.1)
    v = make_values(case, 16)
    everywhere, _ = attention(case.q, case.k, v)
    assert torch.equal(run_attention(case, v)[0], everywhere)


def test_a_nan_stays_in_its_sequence():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 90, 8), torch.randn(2, 1, 90, 8)
    bounds = torch.tensor([0, 30, 60, 90], dtype=torch.int32)
    clean = attention_stats(q, k)
    clean_packed = attention_stats(q[:1], k[:1], cu_seqlens=bounds)
    for broken in (float("nan"), float("inf")):
        bad_q, bad_k = q.clone(), k.clone()
        bad_q[0, :, 40], bad_k[0, :, 41] = broken, broken
        stats = attention_stats(bad_q, bad_k)
        for got, expected in zip(tensors(stats), tensors(clean), strict=True):
            assert torch.equal(got[1], expected[1]), "the other row of the batch"
        assert stats.waad[0].isnan().any()
        packed = attention_stats(bad_q[:1], bad_k[:1], cu_seqlens=bounds)
        outside = torch.arange(90) // 30 != 1
        for name in ("waad", "fai", "lse"):
            assert torch.equal(getattr(packed, name)[..., outside], getattr(clean_packed, name)[..., outside]), name
        assert torch.equal(packed.span[[0, 2]], clean_packed.span[[0, 2]]) and packed.span[1].isnan().all()


@pytest.mark.parametrize("kind", ["packed", "batch"])
@pytest.mark.parametrize("what", ["q", "k", "v", "lse"])
def test_a_nan_stays_in_its_sequence_in_groups_and_output(kind, what):
    """Three sequences of 30 tokens; token 7 of the middle one is NaN in one of the inputs."""
    packed = kind == "packed"
    options = {"horizon": (1, 20)} | ({"cu_seqlens": torch.tensor([0, 30, 60, 90])} if packed else {})
    case = make_case((1, 4, 90, 8) if packed else (3, 4, 30, 8), 2, lse_given=what == "lse", **options)
    v, local = make_values(case, 5), torch.tensor([True, False, False, True])

    def results():
        """Returns the results by name, each [sequence, token, ...]."""
        waad, fai, _ = run_groups(case, local, ~local)
        out = run_attention(case, v)[0].transpose(1, 2)
        return {name: x.reshape(3, 30, *x.shape[2:]) for name, x in (("waad", waad), ("fai", fai), ("out", out))}

    clean = results()
    x = {"q": case.q, "k": case.k, "v": v, "lse": case.kwargs.get("lse")}[what]
    (x[0, :, 37] if packed else x[1, :, 7]).fill_(torch.nan)
    spoiled = results()
    for name, x in spoiled.items():
        assert torch.equal(x[[0, 2]], clean[name][[0, 2]]), name
        assert clean[name].isfinite().all()
        reached = {"q": True, "k": True, "v": name == "out", "lse": name != "out"}[what]
        assert x[1].isnan().any() == reached, name
    if what == "v":
        assert torch.equal(spoiled["out"][1, :7], clean["out"][1, :7]), "rows that do not see the NaN"
        assert spoiled["out"][1, 7:].isnan().all()


@pytest.mark.parametrize("lse_given", [False, True])
def test_a_nan_in_a_head_outside_the_groups_changes_no_bit(lse_given):
    case = make_case((2, 6, 70, 8), 3, lse_given=lse_given)
    local_heads, global_heads = torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    local_heads[0, 0], local_heads[1, :2], global_heads[:, 5] = True, True, True
    clean = run_groups(case, local_heads, global_heads)
    case.q[0, 1:5], case.q[1, 2:5], case.k[:, 1] = torch.nan, torch.nan, torch.nan
    if lse_given:
        case.kwargs["lse"][:, 2:5] = torch.nan
    assert all(map(torch.equal, tensors(run_groups(case, local_heads, global_heads)), tensors(clean)))


@pytest.mark.parametrize("lse_given", [False, True])
@pytest.mark.usefixtures("open_to_modes")
def test_what_is_not_asked_for_is_not_computed(lse_given, monkeypatch):
    """Heads outside the groups and tiles before R take no floating-point operations of matrix products."""
    monkeypatch.setattr(api, "probe_lse", lambda *args: None)  # it computes a few rows of every head

    def cost(local_heads=0, global_heads=0, **options):
        case = make_case((1, 8, 256, 16), 2, lse_given=lse_given, **options)
        groups = [torch.arange(8) < count for count in (local_heads, global_heads)]
        with FlopCounterMode(display=False) as counter:
            run_groups(case, *groups)
        return counter.get_total_flops()

    assert cost() == 0
    one, all_heads = cost(local_heads=1, global_heads=1), cost(local_heads=8, global_heads=8)
    assert 0 < 8 * one == all_heads
    assert 2 * cost(4, 4, response_mask=torch.arange(256)[None] >= 192) < cost(4, 4)


def test_same_input_same_bits():
    case = make_case((3, 4, 333, 32), 2, seed=9, sliding_window=50, softcap=5.0)
    first, second = run(case), run(case)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def test_autocast_changes_no_bit():
    """A trainer's forward often runs under autocast, which would round matrix products to 16 bits."""
    case = make_case((2, 4, 90, 16), 2)
    local_heads, global_heads = make_groups(case, 3)
    v = make_values(case, 8)
    expected = run(case), run_groups(case, local_heads, global_heads), run_attention(case, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(case), run_groups(case, local_heads, global_heads), run_attention(case, v)

    def values(results):
        return [*tensors(results[0]), *tensors(results[1]), results[2][0]]

    for x, y in zip(values(actual), values(expected), strict=True):
        assert torch.equal(x, y)


def test_the_mean_over_rows_is_the_same_alone_and_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    lengths, width, heads = (1, 37, 0, 64, 12), 64, 3
    values = [torch.rand(heads, n, generator=generator) * 10 ** (i - 2.0) for i, n in enumerate(lengths)]
    rows = [torch.rand(n, generator=generator) < 0.7 for n in lengths]
    values[1][2, rows[1]] = torch.nan  # in one head of one sequence
    values = [x.masked_fill(~r, 0.0) for x, r in zip(values, rows, strict=True)]

    def mean(x, r, **layout):
        return mean_over_rows(x, make_layout(len(x), x.shape[2], x.device, r, **layout))

    alone = torch.cat([mean(x[None], r[None]) for x, r in zip(values, rows, strict=True)])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = mean(torch.cat(values, 1)[None], torch.cat(rows)[None], cu_seqlens=bounds)
    for left in (False, True):
        pads = [(width - n, 0) if left else (0, width - n) for n in lengths]
        x, r, mask = (
            torch.stack([torch.nn.functional.pad(y, by) for y, by in zip(ys, pads, strict=True)])
            for ys in (values, rows, [torch.ones(n, dtype=torch.bool) for n in lengths])
        )
        padded = mean(x, r, attention_mask=mask)
        assert torch.equal(padded.nan_to_num(-1), alone.nan_to_num(-1))
    assert torch.equal(packed.nan_to_num(-1), alone.nan_to_num(-1))
    broken = torch.zeros(len(lengths), heads, dtype=torch.bool)
    broken[1, 2] = True
    assert torch.equal(alone.isnan(), broken)
    assert alone[2].eq(0).all(), "an empty sequence"


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("call", ["stats", "stats of a known lse", "groups", "groups of a known lse", "attention"])
@pytest.mark.usefixtures("open_to_modes")
def test_memory_is_linear_in_the_tokens(call):
    torch.manual_seed(0)
    largest = {}
    for tokens in (1024, 2048):
        q, k, v = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16)
        lse = attention_stats(q, k).lse if "known" in call else None
        local = torch.arange(4) < 2
        with LargestTensor() as mode:
            if call == "attention":
                attention(q, k, v)
            elif "groups" in call:
                group_stats(q, k, local, ~local, lse=lse)
            else:
                attention_stats(q, k, lse=lse, need_span=lse is None)
        assert mode.numel
        largest[tokens] = mode.numel
    assert largest[2048] <= 2 * largest[1024]
    assert largest[2048] <= 4 * 2048 * blockwise_rows.ROW_TILE  # HQ x T x tile, where a map would be HQ x T x T


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4), (1, 1, 1, 1)])
def test_empty_and_single(shape):
    q = torch.randn(shape)
    stats = attention_stats(q, q)
    assert stats.waad.shape == shape[:3] and stats.span.shape == shape[:2]
    assert stats.waad.eq(0).all() and stats.fai.eq(0).all() and stats.span.eq(0).all()
    out, same = attention(q, q, q)
    assert all(map(torch.equal, tensors(same), tensors(stats)))
    assert torch.equal(out, q), "a single key has the whole weight"
    every = torch.ones(shape[1], dtype=torch.bool)
    for lse in (None, stats.lse):
        for x in tensors(group_stats(q, q, every, every, lse=lse)):
            torch.testing.assert_close(x, torch.zeros(shape[0], shape[2]), atol=1e-4, rtol=0)


def test_nothing_is_differentiated():
    q, k = torch.randn(1, 2, 9, 4, requires_grad=True), torch.randn(1, 1, 9, 4, requires_grad=True)
    assert not any(x.requires_grad for x in tensors(attention_stats(q, k, more=MORE[:3])))
    every = torch.ones(2, dtype=torch.bool)
    assert not any(x.requires_grad for x in tensors(group_stats(q, k, every, every)))
    for inputs in ((q, k, k), (q.detach(), k.detach(), k)):
        with pytest.raises(ValueError, match="attention has no backward"):
            attention(*inputs)
        with torch.no_grad():
            out, stats = attention(*inputs)
        assert not any(x.requires_grad for x in (out, *tensors(stats)))


Q, K = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16)
ONES = torch.ones(2, 8, dtype=torch.bool)
HEADS = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    "q, k, options, error, text",
    [
        ("q", K, {}, TypeError, "q must be a tensor, got str: 'q'"),
        (Q.double(), K.double(), {}, TypeError, "q must be torch.bfloat16 or .*, got torch.float64"),
        (Q[0], K, {}, ValueError, r"q must have shape \[B, HQ, T, D\], got \[4, 8, 16\]"),
        (Q, K.half(), {}, TypeError, "k must be torch.float32, got torch.float16"),
        (Q, K[:1], {}, ValueError, r"k must have shape \[2, H, 8, 16\], got \[1, 2, 8, 16\]"),
        (Q, K[:, :, :7], {}, ValueError, r"k must have shape \[2, H, 8, 16\], got \[2, 2, 7, 16\]"),
        (Q[:, :3], K, {}, ValueError, "multiple of the key heads of k, got 3, 2"),
        (Q, K[:, :0], {}, ValueError, "got 4, 0"),
        (Q[..., :0], K[..., :0], {}, ValueError, "head size of at least 1"),
        (Q[..., ::2], K[..., ::2], {}, ValueError, "q must be contiguous in its last dimension, got strides"),
        (Q, K.to("meta"), {}, ValueError, "k must be on cpu, got meta"),
        (Q[:, :, :1].expand(2, 4, 2**22 + 1, 16), K[:, :, :1].expand(2, 2, 2**22 + 1, 16), {}, ValueError, TOO_LONG),
        (Q, K, {"scale": "1"}, TypeError, "scale must be a float, got str"),
        (Q, K, {"scale": float("inf")}, ValueError, "scale must be finite"),
        (Q, K, {"lse": torch.zeros(2, 4, 7)}, ValueError, r"lse must have shape \[2, 4, 8\], got \[2, 4, 7\]"),
        (Q, K, {"lse": torch.zeros(2, 4, 8).half()}, TypeError, "lse must be torch.float32"),
        (Q, K, {"window": 0}, ValueError, "window must be between 1 and 256, got 0"),
        (Q, K, {"window": 257}, ValueError, "window must be between 1 and 256, got 257"),
        (Q, K, {"window": True}, TypeError, "window must be an int, got bool"),
        (Q, K, {"horizon": 50}, TypeError, r"horizon must be \(lo, hi\)"),
        (Q, K, {"horizon": (50, 10)}, ValueError, r"horizon\[1\] must be at least 50, got 10"),
        (Q, K, {"horizon": (-1, 10)}, ValueError, r"horizon\[0\] must be at least 0, got -1"),
        (Q, K, {"response_mask": ONES.long()}, TypeError, "response_mask must be torch.bool, got torch.int64"),
        (Q, K, {"response_mask": ONES[:1]}, ValueError, r"response_mask must have shape \[2, 8\], got \[1, 8\]"),
        (Q, K, {"attention_mask": ONES.float()}, TypeError, "attention_mask must be torch.bool or"),
        (Q, K, {"attention_mask": 2 * ONES.long()}, ValueError, "attention_mask must hold only 0 and 1"),
        (Q, K, {"attention_mask": ONES & (torch.arange(8) != 3)}, ValueError, "row 0 has a hole"),
        (Q, K, {"cu_seqlens": torch.tensor([0, 8])}, ValueError, "batch of one row, got B = 2"),
        (Q[:1], K[:1], {"cu_seqlens": torch.tensor([0.0, 8.0])}, TypeError, "cu_seqlens must be torch.int32"),
        (Q[:1], K[:1], {"cu_seqlens": torch.tensor([0, 5, 3, 8])}, ValueError, r"rise from 0 to T = 8, got \[0, 5, 3"),
        (Q[:1], K[:1], {"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"rise from 0 to T = 8, got \[0, 5\]"),
        (Q[:1], K[:1], {"cu_seqlens": torch.zeros(0).int()}, ValueError, r"rise from 0 to T = 8, got \[\]"),
        (
            Q[:1],
            K[:1],
            {"cu_seqlens": torch.tensor([0, 8]), "attention_mask": ONES[:1]},
            ValueError,
            "exclude each other",
        ),
        (Q, K, {"sliding_window": 0}, ValueError, "sliding_window must be at least 1, got 0"),
        (Q, K, {"softcap": 0.0}, ValueError, "softcap must be above 0"),
        (Q, K, {"softcap": -1.0}, ValueError, "softcap must be"),
        (Q, K, {"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \[4\], got \[2\]"),
        (Q, K, {"need_span": 1}, TypeError, "need_span must be a bool, got int: 1"),
        (Q, K, {"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_bad_input(q, k, options, error, text):
    with pytest.raises(error, match=text):
        attention_stats(q, k, **options)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"v": "v"}, TypeError, "v must be a tensor, got str: 'v'"),
        ({"v": K.half()}, TypeError, "v must be torch.float32, got torch.float16"),
        ({"v": Q}, ValueError, r"v must have shape \[2, 2, 8, Dv\], got \[2, 4, 8, 16\]"),
        ({"v": K[:, :, :7]}, ValueError, r"v must have shape \[2, 2, 8, Dv\], got \[2, 2, 7, 16\]"),
        ({"v": K[0]}, ValueError, r"v must have shape \[2, 2, 8, Dv\], got \[2, 8, 16\]"),
        ({"v": K[..., :0]}, ValueError, r"v must have a head size of at least 1, got shape \[2, 2, 8, 0\]"),
        ({"v": K[..., ::2]}, ValueError, "v must be contiguous in its last dimension, got strides"),
        ({"v": K.to("meta")}, ValueError, "v must be on cpu, got meta"),
        ({"window": 0}, ValueError, "window must be between 1 and 256, got 0"),
        ({"response_mask": ONES.long()}, TypeError, "response_mask must be torch.bool, got torch.int64"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_bad_input_of_attention(options, error, text):
    with pytest.raises(error, match=text):
        attention(Q, K, **{"v": K} | options)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"local_heads": [0, 1]}, TypeError, "local_heads must be a tensor, got list"),
        ({"local_heads": HEADS.long()}, TypeError, "local_heads must be torch.bool, got torch.int64"),
        ({"local_heads": HEADS[:3]}, ValueError, r"local_heads must have shape \[4\], got \[3\]"),
        ({"global_heads": HEADS.expand(3, 4)}, ValueError, r"global_heads must have shape \[2, 4\], got \[3, 4\]"),
        ({"global_heads": HEADS.expand(1, 2, 4)}, ValueError, r"global_heads must have shape \[4\], got \[1, 2, 4\]"),
        ({"global_heads": HEADS.to("meta")}, ValueError, "global_heads must be on cpu, got meta"),
        ({"lse": torch.zeros(2, 4, 7)}, ValueError, r"lse must have shape \[2, 4, 8\], got \[2, 4, 7\]"),
        ({"horizon": (50, 10)}, ValueError, r"horizon\[1\] must be at least 50, got 10"),
        ({"backend": 1}, ValueError, "backend must be one of auto, triton, torch, got 1"),
    ],
)
def test_bad_input_of_groups(options, error, text):
    with pytest.raises(error, match=text):
        group_stats(Q, K, **{"local_heads": HEADS, "global_heads": HEADS} | options)


def test_packed_groups_are_one_for_each_sequence():
    bounds = torch.tensor([0, 3, 8])
    with pytest.raises(ValueError, match=r"local_heads must have shape \[2, 4\], got \[1, 4\]"):
        group_stats(Q[:1], K[:1], HEADS[None], HEADS, cu_seqlens=bounds)
    assert group_stats(Q[:1], K[:1], HEADS.expand(2, 4), HEADS, cu_seqlens=bounds).waad.shape == (1, 8)


def test_without_triton_auto_is_torch(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.kernels_for("auto", q=on_gpu) is None and backends.kernels_for("torch", q=on_gpu) is None
    for q in (on_gpu, SimpleNamespace(is_cuda=False)):
        with pytest.raises(ImportError, match='backend "triton" needs Triton, which is not installed'):
            backends.kernels_for("triton", q=q)
