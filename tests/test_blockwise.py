"""The blockwise torch backend against the fp64 reference, and the checks in front of every backend."""

import pytest
import torch
from hypothesis import given, settings
from stats_cases import assert_close_to_reference, make_case, stats_case
from torch.utils._python_dispatch import TorchDispatchMode

from rhythm_kernels import attention_stats
from rhythm_kernels.attention import blockwise


def run(case):
    return attention_stats(case.q, case.k, **case.kwargs, backend="torch")


@settings(max_examples=400, deadline=None)
@given(case=stats_case(max_tokens=160))
def test_fuzz(case):
    assert_close_to_reference(run(case), case)


@settings(max_examples=100, deadline=None)
@given(case=stats_case(max_tokens=60))
def test_fuzz_over_many_small_tiles(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "ROW_TILE", 7)
        patch.setattr(blockwise, "TILE_BYTES", 1)  # one row of one sequence at a time
        patch.setattr(blockwise, "BAND_TILE", 5)
        patch.setattr(blockwise, "BAND_BYTES", 1)
        assert_close_to_reference(run(case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 192, 256])
def test_head_sizes_and_dtypes(dtype, size):
    case = make_case((1, 4, 150, size), 2, dtype=dtype, seed=size, order="heads inside")
    assert_close_to_reference(run(case), case)


@pytest.mark.parametrize("lse_given", [False, True])
def test_several_tiles_of_a_long_sequence(lse_given):
    case = make_case((2, 9, 700, 64), 3, seed=5, lse_given=lse_given, need_span=not lse_given)
    assert_close_to_reference(run(case), case)


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
        for got, expected in zip(stats, clean, strict=True):
            assert torch.equal(got[1], expected[1]), "the other row of the batch"
        assert stats.waad[0].isnan().any()
        packed = attention_stats(bad_q[:1], bad_k[:1], cu_seqlens=bounds)
        outside = torch.arange(90) // 30 != 1
        for name in ("waad", "fai", "lse"):
            assert torch.equal(getattr(packed, name)[..., outside], getattr(clean_packed, name)[..., outside]), name
        assert torch.equal(packed.span[[0, 2]], clean_packed.span[[0, 2]]) and packed.span[1].isnan().all()


def test_same_input_same_bits():
    case = make_case((3, 4, 333, 32), 2, seed=9, sliding_window=50, softcap=5.0)
    first, second = run(case), run(case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("band_only", [False, True])
def test_memory_is_linear_in_the_tokens(band_only):
    torch.manual_seed(0)
    largest = {}
    for tokens in (1024, 2048):
        q, k = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, tokens, 16)
        lse = attention_stats(q, k).lse if band_only else None
        with LargestTensor() as mode:
            attention_stats(q, k, lse=lse, need_span=not band_only)
        largest[tokens] = mode.numel
    assert largest[2048] <= 2 * largest[1024]
    assert largest[2048] <= 4 * 2048 * blockwise.ROW_TILE  # HQ x T x tile, where a map would be HQ x T x T


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4), (1, 1, 1, 1)])
def test_empty_and_single(shape):
    q = torch.randn(shape)
    stats = attention_stats(q, q)
    assert stats.waad.shape == shape[:3] and stats.span.shape == shape[:2]
    assert stats.waad.eq(0).all() and stats.fai.eq(0).all() and stats.span.eq(0).all()


def test_nothing_is_differentiated():
    q, k = torch.randn(1, 2, 9, 4, requires_grad=True), torch.randn(1, 1, 9, 4, requires_grad=True)
    assert not any(x.requires_grad for x in attention_stats(q, k))


Q, K = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16)
ONES = torch.ones(2, 8, dtype=torch.bool)


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
        (Q, K, {"row_mask": ONES.long()}, TypeError, "row_mask must be torch.bool, got torch.int64"),
        (Q, K, {"row_mask": ONES[:1]}, ValueError, r"row_mask must have shape \[2, 8\], got \[1, 8\]"),
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
