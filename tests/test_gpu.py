"""Tests what only a GPU can show, and the same code on a CPU at small sizes.

Every test takes a `Scale`. On a CPU "auto" is the torch backend. On a GPU "auto" is Triton, and the test is marked
`gpu` and gets the sizes that matter there.
"""

from contextlib import nullcontext
from typing import NamedTuple

import models
import pytest
import stats_cases
import torch
from stats_cases import case_on, moved
from torch import Tensor

from benchmarks.measure import extra_bytes
from benchmarks.pretended_cuda import is_pretended
from rhythm_kernels import (
    Rhythm,
    attention,
    attention_stats,
    collect,
    find_peaks,
    group_stats,
    segment_topq,
    token_credit,
)
from rhythm_kernels.statistics.triton_tiles import MAX_TOKEN_STRIDE

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Scale(NamedTuple):
    device: str
    tokens: int
    """The tokens of a case that is compared with fp64."""
    many_tokens: int
    """The tokens of the largest case that is compared with fp64."""
    long: tuple[int, ...]
    """The numbers of tokens for which memory must be linear."""
    long_head_size: int
    slack: int
    """The bytes that a call may take for tiles, beside 64 a row."""
    repeats: int
    under_load: tuple[int, int]
    """The tokens of a repeated call, and the rows of the square matrices multiplied meanwhile; 0 for no matrices."""
    far: int
    """A stride in elements. On a GPU twice the stride is past int32."""
    far_tokens: tuple[int, int]
    """The number of tokens, and the elements from one to the next: the most that the kernels take on a GPU, where the
    last token is past int32."""
    large_batch: tuple[int, int, int, int]
    """The shape [B, HQ, T, D] of q; more than 2^31 elements on a GPU."""
    model_tokens: int = 120


CPU = Scale("cpu", 90, 130, (8192,), 16, 200 << 20, 3, (100, 0), 2**13, (5, 2**13), (5, 4, 40, 16))
GPU = Scale(
    "cuda",
    1031,
    4096,
    (65536, 131072),
    128,
    64 << 20,
    1000,
    (700, 4096),
    2**30,
    (258, MAX_TOKEN_STRIDE),
    (4100, 8, 512, 128),
)
if is_pretended():
    GPU = Scale("cuda", 60, 70, (512,), 16, 1 << 19, 2, (20, 16), 2**13, (5, 2**13), (3, 4, 20, 16), 48)
every_scale = pytest.mark.parametrize(
    "scale", [pytest.param(CPU, id="cpu"), pytest.param(GPU, id="cuda", marks=[pytest.mark.gpu, cuda])]
)


def response(tokens: int, begin: int) -> Tensor:
    return (torch.arange(tokens) >= begin)[None]


def packed(tokens: int) -> Tensor:
    """Returns the bounds of four sequences, one of them empty and one of a single token."""
    third = tokens // 3
    return torch.tensor([0, third, third, third + 1, tokens], dtype=torch.int32)


def padded(tokens: int) -> Tensor:
    """Returns the mask of three rows: padded on the left, on the right, and not at all."""
    position = torch.arange(tokens)
    return torch.stack([position >= tokens // 4, position < tokens // 3, position >= 0])


# (B, HQ, H, D, Dv, the options for a number of tokens) by name
CASES = {
    "plain": (1, 4, 2, 128, 128, lambda n: {}),
    "head size 64, 9:3": (1, 9, 3, 64, 64, lambda n: {}),
    "head size 80": (1, 4, 4, 80, 80, lambda n: {}),
    "head size 256": (1, 2, 1, 256, 256, lambda n: {}),
    "head sizes 192 and 128": (1, 4, 4, 192, 128, lambda n: {}),
    "padded": (3, 2, 1, 128, 128, lambda n: {"attention_mask": padded(n)}),
    "packed": (1, 4, 2, 128, 128, lambda n: {"cu_seqlens": packed(n), "response_mask": response(n, n // 5)}),
    "sliding window": (1, 4, 2, 128, 128, lambda n: {"sliding_window": n // 8}),
    "softcap": (1, 4, 2, 128, 128, lambda n: {"softcap": 5.0}),
    "sinks": (1, 4, 2, 128, 128, lambda n: {"sinks": torch.tensor([1.5, -3.0, 0.0, 6.0])}),
    "open horizon": (1, 4, 2, 128, 128, lambda n: {"horizon": (1, None), "response_mask": response(n, n // 2)}),
}
DTYPES = [(torch.bfloat16, name) for name in CASES]
DTYPES += [(dtype, name) for dtype in (torch.float16, torch.float32) for name in ("plain", "packed", "softcap")]
if is_pretended():  # Triton's interpreter takes seconds for each case
    DTYPES = [(torch.bfloat16, n) for n in ("head sizes 192 and 128", "padded", "packed", "sinks", "open horizon")]


def check_all_calls(known, value_size: int, device: str) -> None:
    """Compares the three public calls with fp64. `known` is a case with the log-sum-exp, which is also left out."""
    unknown = known._replace(kwargs=known.options("lse"))
    band = known._replace(kwargs=known.kwargs | {"need_span": False})
    sampled = [case._replace(kwargs=case.kwargs | {"span_rows": 128}) for case in (known, unknown)]
    for case in (unknown, band, *sampled):
        q, k, options = case_on(device, case)
        stats_cases.assert_close_to_reference(attention_stats(q, k, **options), case)

    groups = stats_cases.make_groups(unknown)
    for case in (unknown, known):
        q, k, options = case_on(device, case)
        sums = group_stats(q, k, *(moved(group, device) for group in groups), **options)
        stats_cases.assert_groups_close(sums, case, *groups)

    v = stats_cases.make_values(unknown, value_size)
    q, k, options = case_on(device, unknown)
    out, stats = attention(q, k, moved(v, device), **options)
    stats_cases.assert_attention_close(out, stats, unknown, v)


@every_scale
@pytest.mark.parametrize("dtype, name", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
def test_against_fp64(dtype, name, scale):
    batch, query_heads, key_heads, size, value_size, options = CASES[name]
    known = stats_cases.make_case(
        (batch, query_heads, scale.tokens, size),
        key_heads,
        dtype=dtype,
        order="heads inside",
        lse_given=True,
        device=scale.device,
        **options(scale.tokens),
    )
    check_all_calls(known, value_size, scale.device)


@every_scale
def test_many_tokens_against_fp64(scale):
    shape = (1, 1, scale.many_tokens, 128)
    known = stats_cases.make_case(shape, 1, dtype=torch.bfloat16, sharpness=2.0, lse_given=True, device=scale.device)
    check_all_calls(known, 128, scale.device)


@every_scale
def test_wrong_results_are_found(scale):
    """The comparison with fp64 runs on the device of the results, and finds what is off there."""
    case = stats_cases.make_case((1, 4, 40, 16), 2, dtype=torch.bfloat16)
    q, k, options = case_on(scale.device, case)
    v, groups = stats_cases.make_values(case, 16), stats_cases.make_groups(case, seed=1)
    stats = attention_stats(q, k, **options)
    sums = group_stats(q, k, *(moved(group, scale.device) for group in groups), **options)
    assert groups[0].any() and groups[1].any()
    for field in ("waad", "fai", "span", "lse"):
        with pytest.raises(AssertionError, match=f"'{field}'"):
            stats_cases.assert_close_to_reference(stats._replace(**{field: getattr(stats, field) * 1.001}), case)
    for field in ("waad", "fai"):
        with pytest.raises(AssertionError, match=f"{field}: above heads x"):
            wrong = sums._replace(**{field: getattr(sums, field) * 1.001})
            stats_cases.assert_groups_close(wrong, case, *groups)
    out, stats = attention(q, k, moved(v, scale.device), **options)
    with pytest.raises(AssertionError, match="out is off by"):
        stats_cases.assert_attention_close(out * 1.1, stats, case, v)


def random_inputs(heads: tuple[int, int], tokens: int, size: int, device: str, dtype=torch.bfloat16):
    """Draws q [1, HQ, T, D], k and v [1, H, T, D]."""
    generator = torch.Generator(device).manual_seed(tokens)
    shapes = [(1, n, tokens, size) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


def every_result(q, k, v, lse, groups, **options) -> list[Tensor]:
    """Returns all results of the three calls."""
    out, stats = attention(q, k, v, **options)
    more = ("row_entropy", "largest_score", "first_mass", "self_mass", "column_sum")
    band = attention_stats(q, k, lse=lse, need_span=False, more=more, **options)
    sampled = attention_stats(q, k, lse=lse, span_rows=64, **options)
    sums = group_stats(q, k, *groups, lse=lse, **options)
    return [out, *stats_cases.tensors(stats), *stats_cases.tensors(band), sampled.span, *stats_cases.tensors(sums)]


def bits_of(results: list[Tensor]) -> Tensor:
    """Returns the bits of all results, one after the other, as one int16 tensor."""
    return torch.cat([x.flatten().view(torch.int16) for x in results])


@every_scale
@pytest.mark.parametrize("horizon", [(10, 50), (1, None)], ids=["finite", "open"])
def test_same_bits_under_load(horizon, scale):
    """Results keep their bits in every run, while products on another stream occupy SMs and disturb the kernels."""
    tokens, side = scale.under_load
    q, k, v = random_inputs((4, 2), tokens, 64, scale.device)
    groups = torch.tensor([True, False, True, False], device=scale.device)
    groups = groups, ~groups
    lse = attention_stats(q, k).lse
    busy = torch.cuda.Stream() if side else None
    if busy is not None:
        matrix = torch.randn(side, side, device=scale.device, dtype=torch.bfloat16)
        product = torch.empty_like(matrix)
        busy.wait_stream(torch.cuda.current_stream())
    first = every_result(q, k, v, lse, groups, horizon=horizon)
    changes = torch.zeros_like(bits_of(first), dtype=torch.int32)  # how often each 16 bits have changed
    for _ in range(scale.repeats):
        if busy is not None:
            with torch.cuda.stream(busy):
                for _ in range(4):
                    torch.mm(matrix, matrix, out=product)
        changes += bits_of(every_result(q, k, v, lse, groups, horizon=horizon)) != bits_of(first)
    # the device is waited for once: many runs are under way together, and the host is not the slowest part
    worst = [int(part.max()) for part in changes.split([bits_of([x]).numel() for x in first])]
    assert not any(worst), f"results changed in so many of {scale.repeats} runs: {worst}"


@every_scale
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_sequence(bad, scale):
    """Three packed sequences share tiles; the middle one goes bad. The others keep every bit, in every result."""
    a, b = scale.tokens // 3, 2 * scale.tokens // 3
    q, k, v = random_inputs((4, 2), scale.tokens, 64, scale.device)
    bounds = torch.tensor([0, a, b, scale.tokens], dtype=torch.int32, device=scale.device)
    groups = torch.tensor([True, False, True, False], device=scale.device)
    groups = groups, ~groups
    lse = attention_stats(q, k, cu_seqlens=bounds).lse
    clean = every_result(q, k, v, lse, groups, cu_seqlens=bounds)
    q[:, :, a + 5], k[:, :, a + 9], v[:, :, b - 1], lse[:, :, a + 7] = bad, bad, bad, bad
    spoiled = every_result(q, k, v, lse, groups, cu_seqlens=bounds)
    for x, y in zip(clean, spoiled, strict=True):
        if x.shape[:2] == (3, 4):  # spans [S, HQ]
            assert torch.equal(x[[0, 2]], y[[0, 2]]) and not y[1].isfinite().all()
            continue
        # tokens are the dimension that has their number: [B, T], [B, HQ, T] or [B, HQ, T, D]
        x, y = (z.movedim(list(z.shape).index(scale.tokens), 0) for z in (x, y))
        assert torch.equal(x[:a], y[:a]) and torch.equal(x[b:], y[b:])
        assert not y[a:b].isfinite().all()


@every_scale
@pytest.mark.parametrize("which", ["full", "band", "groups", "fused"])
def test_memory_is_linear(which, scale):
    """Beside its results a call takes some tiles and a few values a row, at any length."""
    for tokens in scale.long:
        q, k, v = random_inputs((2, 1), tokens, scale.long_head_size, scale.device)
        lse = attention_stats(q, k).lse
        local = torch.tensor([True, False], device=scale.device)
        run = {
            "full": lambda q=q, k=k: attention_stats(q, k),
            "band": lambda q=q, k=k, lse=lse: attention_stats(q, k, lse=lse, need_span=False),
            "groups": lambda q=q, k=k, lse=lse, local=local: group_stats(q, k, local, ~local, lse=lse),
            "fused": lambda q=q, k=k, v=v: attention(q, k, v),
        }[which]
        run()  # makes kernels and thread pools, which stay
        allowed = scale.slack + 64 * lse.numel() + q.numel() * q.element_size()
        maps = 4 * lse.numel() * tokens
        assert 2 * allowed < maps, "the test would not notice a map"
        assert extra_bytes(run, torch.device(scale.device)) <= allowed


@every_scale
def test_the_last_rows_of_a_long_sequence(scale):
    """Checks the last rows of the longest sequence: lse, WAAD, span and output, and the FAI that they give."""
    tokens, rows = scale.long[-1], 64
    q, k, v = random_inputs((2, 1), tokens, 64, scale.device, torch.float32)
    position = torch.arange(tokens, device=scale.device)
    distance = position[-rows:, None] - position
    scores = (q[:, :, -rows:].double() @ k.double().mT / 8).masked_fill_(distance < 0, -torch.inf)
    weights = scores.softmax(-1)
    out, stats = attention(q, k, v, response_mask=(position >= tokens - rows)[None])
    in_horizon = (distance >= 10) & (distance <= 50)
    fai = (weights * in_horizon).sum(-2) / in_horizon.sum(-2).clamp(min=1)
    unit = 2.0**-18  # the error of a weight: fp32 scores, and fp32 sums over all keys
    for got, want, largest in (
        (stats.lse[..., -rows:], scores.logsumexp(-1), 2),
        (stats.waad[..., -rows:], (weights * distance.clamp(max=10)).sum(-1), 10),
        (stats.fai, fai, 1),
        (stats.span, (weights * distance).sum(-1).mean(-1), tokens),
        (out[:, :, -rows:], weights @ v.double(), v.abs().max()),
    ):
        assert (got.double() - want).abs().max() <= unit * largest


@every_scale
@pytest.mark.parametrize("where", ["batch", "head", "token"])
def test_strides_past_int32(where, scale):
    """q, k and v of one allocation, far apart in one dimension, have the bits that they have side by side."""
    axis = ["batch", "head", "token"].index(where)
    tokens, step = scale.far_tokens if where == "token" else (3, scale.far)
    shape, strides = (3, 3, tokens, 16), [512, 128, 32, 1]
    strides[axis] = step
    apart = 2048  # q, k and v lie between each other's far parts
    store = torch.empty((shape[axis] - 1) * step + 3 * apart, device=scale.device, dtype=torch.bfloat16)
    case = stats_cases.make_case(shape, 3, dtype=torch.bfloat16)
    v = stats_cases.make_values(case, 16)
    distant = [store[apart * i :].as_strided(shape, strides).copy_(x) for i, x in enumerate((case.q, case.k, v))]
    near = [x.to(scale.device) for x in (case.q, case.k, v)]
    groups = torch.tensor([True, False, True], device=scale.device)
    results = []
    for q, k, v in (distant, near):
        results.append(every_result(q, k, v, attention_stats(q, k).lse, (groups, ~groups)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@every_scale
def test_token_strides_past_those_of_the_kernels(scale):
    """On a GPU "auto" is the torch backend for such strides, with bits of its own."""
    case = stats_cases.make_case((1, 2, 2, 16), 2, dtype=torch.bfloat16)
    step = MAX_TOKEN_STRIDE + 1
    store = torch.empty(step + 32, device=scale.device, dtype=torch.bfloat16)
    far = store.as_strided(case.q.shape, (32, 16, step, 1)).copy_(case.q)
    stats_cases.assert_close_to_reference(attention_stats(far, case.k.to(scale.device)), case)


@every_scale
def test_more_elements_than_int32_counts(scale):
    """The last sequence of a batch, past 2^31 elements of q and out on a GPU, has the bits that it has alone."""
    batch, heads, tokens, size = scale.large_batch
    q = torch.randn(scale.large_batch, device=scale.device, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, 1, tokens, size, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    groups = torch.arange(heads, device=scale.device) % 2 == 0

    def run(part: slice) -> list[Tensor]:
        few = [x[part] for x in (q, k, v)]
        lse = attention_stats(*few[:2]).lse
        return [x[-1] for x in every_result(*few, lse, (groups, ~groups))]

    for together, alone in zip(run(slice(None)), run(slice(batch - 1, batch)), strict=True):
        assert torch.equal(together, alone)


@every_scale
def test_selection_and_credit(scale):
    """Compares the extension on this device with the same rules of torch ops on the host: ties, NaN, packing."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 5000, generator=generator).mul(8).round().div(8)
    response_mask = torch.rand(4, 5000, generator=generator) < 0.8
    cuts = torch.tensor([0, 1, 5000, 5000, 20_000], dtype=torch.int32)
    with_nan = values.clone()
    with_nan[1, ::7] = torch.nan
    for packed in (False, True):
        rows = [x.reshape(1, -1) if packed else x for x in (values, with_nan, response_mask)]
        own = {"cu_seqlens": cuts if packed else None, "backend": "torch"}
        there = {"cu_seqlens": moved(own["cu_seqlens"], scale.device), "backend": "extension"}
        finite, broken, inside = rows
        on_device = [x.to(scale.device) for x in rows]
        for fraction in (0.2, 0.4, 1.0):
            got = segment_topq(*on_device[1:], fraction, return_nan=True, **there)
            for x, y in zip(got, segment_topq(broken, inside, fraction, return_nan=True, **own), strict=True):
                assert torch.equal(x.cpu(), y)
            rhythm = Rhythm(on_device[0], on_device[0])
            got = token_credit("coupled", on_device[2], rhythm, top_fraction=fraction, **there)
            want = token_credit("coupled", inside, Rhythm(finite, finite), top_fraction=fraction, **own)
            assert torch.equal(got.cpu(), want)
        got = find_peaks(*on_device[1:], min_quantile=0.5, **there)
        assert torch.equal(got.cpu(), find_peaks(broken, inside, min_quantile=0.5, **own))


@every_scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_collect(dtype, scale):
    """A model's forward keeps its bits, and known head groups do not change the rhythm, in fp32 that of eager maps."""
    model = models.llama().to(scale.device, dtype)
    tokens = scale.model_tokens
    ids = torch.randint(61, (2, tokens), generator=torch.Generator().manual_seed(0)).to(scale.device)
    response_mask = (torch.arange(tokens, device=scale.device) >= tokens // 3).expand(2, -1)
    with torch.no_grad():
        plain = model(ids).logits
        with collect(model, response_mask=response_mask) as c:
            logits = model(ids).logits
    rhythm = c.rhythm()
    with torch.no_grad(), collect(model, response_mask=response_mask, groups=rhythm.groups) as known:
        again = model(ids).logits
    assert torch.equal(plain, logits) and torch.equal(plain, again)
    with_groups = known.rhythm()
    torch.testing.assert_close(with_groups.waad, rhythm.waad, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(with_groups.fai, rhythm.fai, rtol=2e-5, atol=2e-5)
    if dtype == torch.float32:
        maps = [attended.cpu() for attended in models.eager_maps(model, input_ids=ids)]
        segments = torch.arange(2)[:, None].expand(2, tokens)
        waad, fai, _ = models.dense_rhythm(maps, c.layers, response_mask.cpu(), segments, 2)
        torch.testing.assert_close(rhythm.waad.double().cpu(), waad, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(rhythm.fai.double().cpu(), fai, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@cuda
def test_a_cuda_graph_is_refused(monkeypatch):
    """Its replay would read what the host's memory holds by then."""
    q, k = (torch.randn(1, heads, 40, 16, device="cuda") for heads in (4, 2))
    graph = nullcontext()
    if is_pretended():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"), graph:
        attention_stats(q, k)
