"""segment_topq and find_peaks: both backends give exactly what rhythm_kernels.reference defines."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from rhythm_kernels import reference
from rhythm_kernels.credit import extension
from rhythm_kernels.credit.selection import find_peaks, segment_topq

BACKENDS = ("extension", "torch")
SHARES = (0.0, 0.2, 0.4, 0.7, 1.0)
INF, NAN = math.inf, math.nan
TIED = (0.0, -0.0, 1.0, -1.0, 2.5)
ODD = (0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-45, -1e-45, 1e-40, -1e-40, 3.4e38, -3.4e38)

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def for_gpus(*shapes: tuple[int, ...]) -> list:
    """Sizes at which the ops take other ways on a GPU."""
    mark = pytest.mark.gpu(not_pretended="its size matters to the ops of a GPU alone")
    return [pytest.param(shape, marks=mark, id=str(shape)) for shape in shapes]


DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, cuda]))


def rows(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def marks(text: str) -> torch.Tensor:
    """ "x.x" -> [[True, False, True]]."""
    return torch.tensor([[c == "x" for c in text]], dtype=torch.bool)


def shown(selected: torch.Tensor) -> str:
    return "".join("x" if s else "." for s in selected[0].tolist())


@st.composite
def batches(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws (values, mask) [B, T]: ties and special values or any float32, masks of any density, any strides."""
    batch, tokens = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 3, 4, 7, 10, 16, 33]))
    element = draw(
        st.sampled_from([st.sampled_from(TIED), st.sampled_from(ODD), st.floats(width=32, allow_subnormal=True)])
    )
    inside = draw(st.sampled_from([st.booleans(), st.just(True), st.just(False), st.integers(0, 7).map(bool)]))
    count = batch * tokens
    values = torch.tensor(draw(st.lists(element, min_size=count, max_size=count)), dtype=torch.float32)
    mask = torch.tensor(draw(st.lists(inside, min_size=count, max_size=count)), dtype=torch.bool)
    values, mask = values.view(batch, tokens), mask.view(batch, tokens)
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        values, mask = values.T.contiguous().T, mask.T.contiguous().T
    elif layout == "strided":
        values = torch.stack([values, values + 1], -1).view(batch, 2 * tokens)[:, ::2]
        mask = torch.stack([~mask, mask], -1).view(batch, 2 * tokens)[:, 1::2]
    return values, mask


def pack(*rows: torch.Tensor, lengths: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns the first tokens of each row one after another, [1, sum of lengths] of each tensor, and cu_seqlens."""
    inside = torch.arange(rows[0].shape[1]) < lengths[:, None]
    return [x[inside][None] for x in rows], torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def unpacked(x: torch.Tensor, cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """[1, T] -> each sequence's [1, its length]."""
    return [x[:, a:b] for a, b in itertools.pairwise(cu_seqlens.tolist())]


def of_each(function, *tensors: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Runs a function of rows on each packed sequence alone, and packs its results."""
    parts = zip(*(unpacked(x, cu_seqlens) for x in tensors), strict=True)
    return torch.cat([torch.zeros(1, 0, dtype=torch.bool), *(function(*part) for part in parts)], -1)


@st.composite
def packed_batches(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws (values [1, T], mask [1, T], cu_seqlens): also empty sequences, and none at all."""
    values, mask = draw(batches())
    lengths = draw(st.lists(st.integers(0, values.shape[1]), min_size=len(values), max_size=len(values)))
    (values, mask), cu_seqlens = pack(values, mask, lengths=torch.tensor(lengths, dtype=torch.int64))
    return values, mask, cu_seqlens


# ---- hand-computed cases ---------------------------------------------------------------------------------------------


def test_the_extension_is_built():
    """The tests below that name the extension need it."""
    assert extension.available("cpu"), extension.HOW_TO_BUILD


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("values", "mask", "q", "largest", "expected"),
    [
        ((3, 1, 2, 5, 4), "xxxxx", 0.4, True, "...xx"),
        ((3, 1, 2, 5, 4), "xxxxx", 0.4, False, ".xx.."),
        ((3, 1, 2, 5, 4), "xxx..", 0.4, True, "x.x.."),
        ((7, 7, 7, 7, 7), "xxxxx", 0.4, True, "xx..."),
        ((7, 7, 7, 7, 7), ".x.xx", 0.4, False, ".x.x."),
        ((2, 9, 2, 9, 2), "xxxxx", 0.6, True, "xx.x."),
        ((0.0, -0.0, 0.0, -0.0), "xxxx", 0.5, True, "xx.."),
        ((0.0, -0.0, 0.0, -0.0), "xxxx", 0.5, False, "xx.."),
        ((NAN, 1, NAN, 2), "xxxx", 0.25, True, "...x"),
        ((NAN, 1, NAN, 2), "xxxx", 0.25, False, ".x.."),
        ((NAN, 1, NAN, 2), "xxxx", 1.0, True, ".x.x"),
        ((NAN, 1, NAN, 2), "xxxx", 1.0, False, ".x.x"),
        ((INF, -INF, 0, NAN), "xxxx", 0.5, True, "x.x."),
        ((INF, -INF, 0, NAN), "xxxx", 0.5, False, ".xx."),
        ((1e-45, -1e-45, 0), "xxx", 1 / 3, True, "x.."),
        ((1e-45, -1e-45, 0), "xxx", 1 / 3, False, ".x."),
        ((1, 2, 3), "xxx", 0.0, True, "..."),
        ((1, 2, 3), "...", 1.0, True, "..."),
        ((5,), "x", 0.01, True, "x"),
    ],
)
def test_topq_by_hand(values, mask, q, largest, expected, backend):
    assert shown(segment_topq(rows(*values), marks(mask), q, largest=largest, backend=backend)) == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("q", "n", "count"), [(0.7, 10, 7), (0.1, 30, 3), (0.4, 7, 3), (1e-12, 10, 0), (0.3, 10, 3)])
def test_count_is_the_ceiling_with_slack(q, n, count, backend):
    values, mask = torch.arange(n).float()[None], torch.ones(1, n, dtype=torch.bool)
    assert segment_topq(values, mask, q, backend=backend).sum() == count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("values", "mask", "p", "expected"),
    [
        ((0, 1, 0, 2, 0), "xxxxx", 0.0, ".x.x."),
        ((0, 1, 0, 2, 0), "xxxxx", 0.8, ".x.x."),
        ((0, 1, 0, 2, 0), "xxxxx", 1.0, "...x."),
        ((0, 1, 1, 1, 0), "xxxxx", 0.0, ".x..."),
        ((0, 1, 1, 2, 0), "xxxxx", 0.0, "...x."),
        ((1, 1, 0, 1, 1), "xxxxx", 0.0, "....."),
        ((2, 1, 0, 1, 2), "xxxxx", 0.0, "....."),
        ((0, 1, 0, 2, 0), "xxx.x", 0.0, ".x..."),
        ((0, 1, 0, 2, 0), "xx.xx", 0.0, "....."),
        ((0, 1, 1, 1, 0), "xx.xx", 0.0, "....."),
        ((-0.0, 0.0, -1, 1, -1), "xxxxx", 0.0, "...x."),
        ((-1, -0.0, 0.0, -1, -1), "xxxxx", 0.0, ".x..."),
        ((0, 1, NAN, 1, 0), "xxxxx", 0.0, "....."),
        ((0, NAN, 0, 1, 0), "xxxxx", 0.0, "...x."),
        ((0, NAN, 0, 1, 0), "xxxxx", 1.0, "....."),
        ((-INF, INF, -INF, 0, -INF), "xxxxx", 0.0, ".x.x."),
        ((0, 1e-45, 0, -1e-45, 0), "xxxxx", 0.0, ".x..."),
        ((0, 1), "xx", 0.0, ".."),
        ((1,), "x", 0.0, "."),
    ],
)
def test_peaks_by_hand(values, mask, p, expected, backend):
    assert shown(find_peaks(rows(*values), marks(mask), min_quantile=p, backend=backend)) == expected


# ---- against the reference -------------------------------------------------------------------------------------------


@given(batch=batches(), q=st.sampled_from(SHARES) | st.floats(0, 1), largest=st.booleans())
@settings(max_examples=800, deadline=None)
def test_topq_equals_the_reference(batch, q, largest):
    expected = reference.segment_topq(*batch, q, largest)
    for backend in BACKENDS:
        assert torch.equal(segment_topq(*batch, q, largest=largest, backend=backend), expected), backend


@given(batch=batches(), p=st.sampled_from(SHARES) | st.floats(0, 1))
@settings(max_examples=800, deadline=None)
def test_peaks_equal_the_reference(batch, p):
    expected = reference.find_peaks(*batch, p)
    for backend in BACKENDS:
        assert torch.equal(find_peaks(*batch, min_quantile=p, backend=backend), expected), backend


@given(batch=packed_batches(), q=st.sampled_from(SHARES) | st.floats(0, 1), largest=st.booleans())
@settings(max_examples=800, deadline=None)
def test_packed_sequences_equal_the_reference(batch, q, largest):
    values, mask, cu_seqlens = batch
    top = of_each(lambda v, m: reference.segment_topq(v, m, q, largest), values, mask, cu_seqlens=cu_seqlens)
    peaks = of_each(lambda v, m: reference.find_peaks(v, m, q), values, mask, cu_seqlens=cu_seqlens)
    nan = [bool((v.isnan() & m).any()) for v, m in zip(unpacked(values, cu_seqlens), unpacked(mask, cu_seqlens))]
    for backend in BACKENDS:
        packed = {"cu_seqlens": cu_seqlens, "backend": backend}
        got, has_nan = segment_topq(values, mask, q, largest=largest, return_nan=True, **packed)
        assert torch.equal(got, top) and has_nan.tolist() == nan, backend
        assert torch.equal(find_peaks(values, mask, min_quantile=q, **packed), peaks), backend


@given(batch=batches())
@settings(max_examples=100, deadline=None)
def test_sequences_with_nan_are_reported(batch):
    values, mask = batch
    for backend in BACKENDS:
        _, has_nan = segment_topq(values, mask, 0.4, return_nan=True, backend=backend)
        assert torch.equal(has_nan, (values.isnan() & mask).any(-1)), backend


@pytest.mark.parametrize("kind", ["normal", "tied", "equal"])
@pytest.mark.parametrize("tokens", [8191, 131072])
def test_very_long_rows_equal_the_reference(tokens, kind):
    values = torch.randn(1, tokens, generator=torch.Generator().manual_seed(tokens))
    values = {"normal": values, "tied": values.mul(4).round(), "equal": torch.zeros(1, tokens)}[kind]
    mask = torch.rand(1, tokens, generator=torch.Generator().manual_seed(1)) < 0.95
    top, peaks = reference.segment_topq(values, mask, 0.4), reference.find_peaks(values, mask, 0.4)
    for backend in BACKENDS:
        assert torch.equal(segment_topq(values, mask, 0.4, backend=backend), top)
        assert torch.equal(find_peaks(values, mask, min_quantile=0.4, backend=backend), peaks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_plateau_as_long_as_the_row(backend):
    values = torch.ones(3, 100_000)
    values[:, 0] = 0
    values[0, -1], values[1, -1] = 0, 2
    mask = torch.ones(3, 100_000, dtype=torch.bool)
    peaks = find_peaks(values, mask, backend=backend)
    assert peaks.nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("levels", [1, 3, 1000], ids=lambda n: f"{n}levels")
@pytest.mark.parametrize("tokens", [255, 1024, 1025])
def test_long_rows_equal_the_reference(tokens, levels):
    generator = torch.Generator().manual_seed(tokens + levels)
    values = torch.randint(levels, (2, tokens), generator=generator) / 7 - 20
    mask = torch.rand(2, tokens, generator=generator) < 0.9
    for q in SHARES:
        expected_topq = reference.segment_topq(values, mask, q, largest=False)
        expected_peaks = reference.find_peaks(values, mask, q)
        for backend in BACKENDS:
            assert torch.equal(segment_topq(values, mask, q, largest=False, backend=backend), expected_topq)
            assert torch.equal(find_peaks(values, mask, min_quantile=q, backend=backend), expected_peaks)


@pytest.mark.parametrize("shape", [(64, 777), (3, 8191), (1, 131072), (1, 2**20)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "tied", "sorted", "equal"])
def test_backends_agree_at_size(shape, kind):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = {
        "normal": values,
        "tied": values.mul(4).round(),
        "sorted": values.sort(-1).values,
        "equal": torch.full(shape, 0.25),
    }[kind]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.95
    for q in SHARES:
        for largest in (True, False):
            one, other = (segment_topq(values, mask, q, largest=largest, backend=b) for b in BACKENDS)
            assert torch.equal(one, other)
            assert torch.equal(one.sum(-1), torch.tensor([math.ceil(q * n - 1e-9) for n in mask.sum(-1).tolist()]))
        one, other = (find_peaks(values, mask, min_quantile=q, backend=b) for b in BACKENDS)
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_widened_exactly(dtype, backend):
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.randn(4, 300, generator=generator).to(dtype), torch.ones(4, 300, dtype=torch.bool)
    assert torch.equal(segment_topq(values, mask, 0.4, backend=backend), reference.segment_topq(values, mask, 0.4))
    assert torch.equal(find_peaks(values, mask, backend=backend), reference.find_peaks(values, mask))


# ---- as ops of torch -------------------------------------------------------------------------------------------------


def example(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.randn(3, 50, generator=generator), torch.rand(3, 50, generator=generator) < 0.8
    return values.to(device), mask.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_opcheck(device):
    values, mask = example(device)
    for sample in (values, values.T.contiguous().T, values[:0], values[:, :0]):
        sample_mask = mask[: sample.shape[0], : sample.shape[1]]
        torch.library.opcheck(torch.ops.rhythm_kernels.segment_topq, (sample, sample_mask, None, 0.4, True))
        torch.library.opcheck(torch.ops.rhythm_kernels.find_peaks, (sample, sample_mask, None, 0.5))
    cuts = torch.tensor([0, 20, 20, 50], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.rhythm_kernels.segment_topq, (values[:1], mask[:1], cuts, 0.4, True))
    torch.library.opcheck(torch.ops.rhythm_kernels.find_peaks, (values[:1], mask[:1], cuts, 0.5))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiles_into_one_graph(backend, compiler):
    def both(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        top = segment_topq(values.tanh(), mask, 0.4, backend=backend)
        return top ^ find_peaks(values, mask, min_quantile=0.2, backend=backend)

    values, mask = example("cpu")
    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    assert torch.equal(compiled(values, mask), both(values, mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows(backend):
    values, mask = example("cpu")
    values.requires_grad_()
    assert not segment_topq(values, mask, 0.4, backend=backend).requires_grad
    assert not find_peaks(values, mask, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_is_written(backend):
    """In deterministic mode torch fills new memory with True, also what the extension allocates."""
    values, mask = torch.zeros(3, 1000), torch.zeros(3, 1000, dtype=torch.bool)
    torch.use_deterministic_algorithms(True)
    try:
        for q in (0.0, 0.4, 1.0):
            assert not segment_topq(values, mask, q, backend=backend).any()
            assert not find_peaks(values, ~mask, min_quantile=q, backend=backend).any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_stay_as_they_are():
    values, mask = example("cpu")
    before = values.clone(), mask.clone()
    for backend in BACKENDS:
        segment_topq(values, mask, 0.4, largest=False, backend=backend)
        find_peaks(values, mask, min_quantile=0.4, backend=backend)
    assert torch.equal(values, before[0])
    assert torch.equal(mask, before[1])


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), *for_gpus((4, 1024), (3, 1025), (2, 8191), (1, 131072))], ids=str)
def test_cuda_equals_cpu_without_synchronizing(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    odd = torch.tensor(ODD)[torch.randint(len(ODD), shape, generator=generator)]
    mask = torch.rand(shape, generator=generator) < 0.9
    for rows_ in (values, values.mul(2).round(), odd, torch.full(shape, 0.5)):
        on_device = rows_.cuda(), mask.cuda()
        for q in SHARES:
            torch.cuda.set_sync_debug_mode("error")
            try:
                top = segment_topq(*on_device, q, backend="extension")
                bottom = segment_topq(*on_device, q, largest=False, backend="extension")
                peaks = find_peaks(*on_device, min_quantile=q, backend="extension")
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(top.cpu(), segment_topq(rows_, mask, q))
            assert torch.equal(bottom.cpu(), segment_topq(rows_, mask, q, largest=False))
            assert torch.equal(peaks.cpu(), find_peaks(rows_, mask, min_quantile=q))


# ---- bad input -------------------------------------------------------------------------------------------------------

VALUES, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
CUTS = torch.tensor([0, 1, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("values", "mask", "error", "message"),
    [
        (VALUES.double(), MASK, TypeError, "values must be .*got torch.float64"),
        (VALUES.long(), MASK, TypeError, "values must be .*got torch.int64"),
        (VALUES.tolist(), MASK, TypeError, "values must be a tensor, got list"),
        (VALUES[0], MASK, ValueError, r"values must have shape \[B, T\], got \[3\]"),
        (VALUES, MASK.int(), TypeError, "response_mask must be torch.bool, got torch.int32"),
        (VALUES, None, TypeError, "response_mask must be a tensor, got NoneType"),
        (VALUES, MASK[:1], ValueError, r"response_mask must have shape \[2, 3\], got \[1, 3\]"),
        (VALUES, MASK.T, ValueError, r"response_mask must have shape \[2, 3\], got \[3, 2\]"),
        (VALUES, MASK.to("meta"), ValueError, "response_mask must be on cpu, got meta"),
    ],
)
def test_bad_tensors_are_named(values, mask, error, message, backend):
    with pytest.raises(error, match=message):
        segment_topq(values, mask, 0.4, backend=backend)
    with pytest.raises(error, match=message):
        find_peaks(values, mask, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("share", "error", "shown_value"),
    [(NAN, ValueError, "nan"), (-0.1, ValueError, "-0.1"), (1.5, ValueError, "1.5"), ("0.4", TypeError, "'0.4'")],
)
def test_bad_shares_are_named(share, error, shown_value, backend):
    with pytest.raises(error, match=f"^top_fraction must be .*got .*{shown_value}"):
        segment_topq(VALUES, MASK, share, backend=backend)
    with pytest.raises(error, match=f"^min_quantile must be .*got .*{shown_value}"):
        find_peaks(VALUES, MASK, min_quantile=share, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("cu_seqlens", "batch", "error", "message"),
    [
        ([0, 3], 1, TypeError, "cu_seqlens must be a tensor, got list"),
        (CUTS.float(), 1, TypeError, "cu_seqlens must be .*, got torch.float32"),
        (CUTS[None], 1, ValueError, r"cu_seqlens must have shape \[S \+ 1\], got \[1, 4\]"),
        (CUTS.to("meta"), 1, ValueError, "cu_seqlens must be on cpu, got meta"),
        (CUTS, 2, ValueError, "cu_seqlens needs a batch of one row, got B = 2"),
        (CUTS[1:], 1, ValueError, r"cu_seqlens must rise from 0 to T = 3, got \[1, 2, 3\]"),
        (CUTS[:0], 1, ValueError, r"cu_seqlens must rise from 0 to T = 3, got \[\]"),
        (CUTS.flip(0), 1, ValueError, r"cu_seqlens must rise from 0 to T = 3, got \[3, 2, 1, 0\]"),
    ],
)
def test_bad_cu_seqlens_are_named(cu_seqlens, batch, error, message, backend):
    with pytest.raises(error, match=message):
        segment_topq(VALUES[:batch], MASK[:batch], 0.4, cu_seqlens=cu_seqlens, backend=backend)
    with pytest.raises(error, match=message):
        find_peaks(VALUES[:batch], MASK[:batch], cu_seqlens=cu_seqlens, backend=backend)


def test_bad_options_are_named():
    with pytest.raises(TypeError, match="return_nan must be a bool, got str: 'yes'"):
        segment_topq(VALUES, MASK, 0.4, return_nan="yes")
    with pytest.raises(TypeError, match="largest must be a bool, got int: 1"):
        segment_topq(VALUES, MASK, 0.4, largest=1)
    with pytest.raises(ValueError, match="backend must be one of auto, extension, torch, got 'cuda'"):
        segment_topq(VALUES, MASK, 0.4, backend="cuda")
    with pytest.raises(ValueError, match="backend must be one of auto, extension, torch, got 'cuda'"):
        find_peaks(VALUES, MASK, backend="cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VALUES.double(), MASK, None), "values must be Float, got Double"),
        ((VALUES, MASK.byte(), None), "response_mask must be Bool, got Byte"),
        ((VALUES, MASK[0], None), r"response_mask must have shape \[B, T\], got \[3\]"),
        ((VALUES[0], MASK, None), r"values must have the shape of response_mask, \[2, 3\], got \[3\]"),
        ((VALUES, MASK[:, :2], None), r"values must have the shape of response_mask, \[2, 2\], got \[2, 3\]"),
        ((VALUES, MASK, CUTS), "cu_seqlens needs a batch of one row, got B = 2"),
        ((VALUES[:1], MASK[:1], CUTS.long()), "cu_seqlens must be Int, got Long"),
        ((VALUES[:1], MASK[:1], CUTS[:0]), r"cu_seqlens must have shape \[S \+ 1\], got \[0\]"),
        ((VALUES[:1], MASK[:1], CUTS[:-1]), "cu_seqlens must rise from 0 to T = 3"),
        ((VALUES[:1], MASK[:1], CUTS[1:]), "cu_seqlens must rise from 0 to T = 3"),
        ((VALUES[:1], MASK[:1], CUTS[[0, 2, 1, 3]]), "cu_seqlens must rise from 0 to T = 3"),
    ],
)
def test_the_ops_check_for_themselves(arguments, message):
    with pytest.raises(ValueError, match="segment_topq: " + message):
        torch.ops.rhythm_kernels.segment_topq(*arguments, 0.4, True)
    with pytest.raises(ValueError, match="find_peaks: " + message):
        torch.ops.rhythm_kernels.find_peaks(*arguments, 0.4)


@pytest.mark.parametrize("share", [NAN, -0.1, 1.1])
def test_the_ops_check_shares_for_themselves(share):
    with pytest.raises(ValueError, match=rf"segment_topq: top_fraction must be in \[0, 1\], got {share}"):
        torch.ops.rhythm_kernels.segment_topq(VALUES, MASK, None, share, True)
    with pytest.raises(ValueError, match=rf"find_peaks: min_quantile must be in \[0, 1\], got {share}"):
        torch.ops.rhythm_kernels.find_peaks(VALUES, MASK, None, share)


# ---- without the extension -------------------------------------------------------------------------------------------


def test_without_the_extension(monkeypatch):
    """auto warns once and goes on with torch; an explicit request fails and says what to do."""
    monkeypatch.setattr(extension, "_DEVICE_TYPES", frozenset())
    monkeypatch.setattr(extension, "_REASON", "rhythm_kernels._C cannot be loaded (not here)")
    monkeypatch.setattr(extension, "_warned", set())
    values, mask = example("cpu")
    with pytest.warns(UserWarning, match=r"not here.*on cpu, the slower torch implementation") as caught:
        selected = [segment_topq(values, mask, 0.4), segment_topq(values, mask, 0.4)]
        find_peaks(values, mask)
    assert len(caught) == 1
    assert all(torch.equal(s, reference.segment_topq(values, mask, 0.4)) for s in selected)
    says_how = r'backend="extension".*cpu.*pip install --no-build-isolation'
    with pytest.raises(RuntimeError, match=says_how):
        segment_topq(values, mask, 0.4, backend="extension")
    with pytest.raises(RuntimeError, match=says_how):
        find_peaks(values, mask, backend="extension")


def test_a_device_that_the_extension_does_not_serve():
    values, mask = VALUES.to("meta"), MASK.to("meta")
    assert segment_topq(values, mask, 0.4).shape == (2, 3)
    assert find_peaks(values, mask).dtype == torch.bool
    with pytest.raises(RuntimeError, match="has no ops for meta"):
        segment_topq(values, mask, 0.4, backend="extension")
