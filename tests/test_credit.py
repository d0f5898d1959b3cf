"""Credit is exact: equal to the reference, bit for bit."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_selection import DEVICES, cuda, for_gpus, pack, unpacked
from torch._subclasses.fake_tensor import FakeTensorMode

from rhythm_kernels import (
    Rhythm,
    coupled_sets,
    find_peaks,
    reference,
    segment_topq,
    shape_advantages,
    token_credit,
)
from rhythm_kernels.credit import composed, extension
from rhythm_kernels.options import DELTAS, STRATEGIES

NAN = float("nan")


@st.composite
def signals(draw):
    """Returns (waad, fai, mask) with many ties, holes, empty and short sequences."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(0, 24))
    levels = draw(st.sampled_from([[1.0], [0.0, 1.0, 2.0], [0.1, 0.2, 0.30000001, 0.4, 1e-40], list(range(50))]))
    value = st.sampled_from([float(x) for x in levels])
    rows = st.lists(st.lists(value, min_size=tokens, max_size=tokens), min_size=batch, max_size=batch)
    waad, fai = (torch.tensor(draw(rows)).view(batch, tokens) for _ in range(2))
    share = draw(st.sampled_from([0, 50, 85, 100]))
    coin = st.integers(0, 99).map(lambda x: x < share)
    mask = torch.tensor(
        draw(st.lists(st.lists(coin, min_size=tokens, max_size=tokens), min_size=batch, max_size=batch))
    )
    return waad, fai, mask.bool().view(batch, tokens)


knobs = st.fixed_dictionaries(
    {
        "top_fraction": st.sampled_from([0.0, 0.2, 0.4, 0.7, 1.0]),
        "largest": st.booleans(),
        "preplan_fraction": st.sampled_from([None, None, 0.0, 0.3, 1.0]),
        "delta": st.sampled_from(DELTAS),
        "tau_waad": st.sampled_from([None, None, 0.1, 1.0]),
        "tau_delta": st.sampled_from([None, None, -1.0, 0.0, 0.1, 1.0]),
        "max_lookback": st.integers(1, 8),
    }
)


BACKENDS = ("extension", "torch")


@settings(max_examples=1000, deadline=None)
@given(signals(), knobs, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([0.0, 1.0, 1.5, 2.7]))
def test_coupled_equals_the_reference(given_signals, options, shared_fraction, amplification):
    waad, fai, mask = given_signals
    rhythm = Rhythm(waad, fai)
    expected = reference.coupled_sets(waad, fai, mask, **options)
    kind = options["delta"]
    of_preplan = options["top_fraction"] if options["preplan_fraction"] is None else options["preplan_fraction"]
    preplan = reference.preplan(waad, mask, of_preplan, delta=kind)
    factors = reference.gamma(
        "coupled", mask, waad, fai, shared_fraction=shared_fraction, amplification=amplification, **options
    )
    for backend in BACKENDS:
        sets = coupled_sets(mask, rhythm, backend=backend, **options)
        for name, got, want in zip(("anchors", "dominated", "intros"), sets[1:4], expected, strict=True):
            assert torch.equal(got, want), (backend, name)
        assert torch.equal(sets.preplan, preplan)
        check_intros(sets, reference.delta(waad, mask, kind), mask, options["max_lookback"])
        assert kind == "absolute" or not ((sets.preplan | sets.intros) & (reference.delta(waad, mask, kind) == 0)).any()
        gamma = token_credit(
            "coupled",
            mask,
            rhythm,
            shared_fraction=shared_fraction,
            amplification=amplification,
            backend=backend,
            **options,
        )
        assert torch.equal(gamma, factors), backend
        assert gamma[~mask].eq(1).all()


def check_intros(sets, delta, mask, k):
    """Each dominated anchor names the largest Delta of the k tokens before it, the latest of equal ones."""
    assert torch.equal(sets.intro_of >= 0, sets.dominated)
    for b, t in sets.dominated.nonzero().tolist():
        before = [u for u in range(max(t - k, 0), t) if mask[b, u]]
        assert sets.intro_of[b, t] == max(before, key=lambda u: (delta[b, u].item(), u))


@settings(max_examples=300, deadline=None)
@given(signals(), knobs, st.sampled_from(["none", "local", "global", "entropy"]), st.sampled_from([0.0, 1.0, 1.5, 2.7]))
def test_other_strategies_equal_the_reference(given_signals, options, strategy, amplification):
    waad, fai, mask = given_signals
    inputs = {"entropy": fai, "amplification": amplification, **options}
    expected = reference.gamma(strategy, mask, waad, fai, **inputs)
    for backend in BACKENDS:
        gamma = token_credit(strategy, mask, Rhythm(waad, fai), backend=backend, **inputs)
        assert torch.equal(gamma, expected), backend


@settings(max_examples=500, deadline=None)
@given(signals(), knobs, st.sampled_from(["local", "global", "entropy", "coupled"]), st.data())
def test_packed_sequences_have_the_credit_that_they_have_alone(given_signals, options, strategy, data):
    lengths = data.draw(st.lists(st.integers(0, given_signals[2].shape[1]), min_size=3, max_size=3))
    lengths = torch.tensor(lengths[: len(given_signals[2])])
    (waad, fai, mask), cu_seqlens = pack(*given_signals, lengths=lengths)
    alone = [
        reference.gamma(strategy, m, w, f, entropy=f, **options)
        for w, f, m in zip(*(unpacked(x, cu_seqlens) for x in (waad, fai, mask)), strict=True)
    ]
    for backend in BACKENDS:
        inputs = {"response_mask": mask, "rhythm": Rhythm(waad, fai), "entropy": fai, "backend": backend, **options}
        gamma = token_credit(strategy, cu_seqlens=cu_seqlens, **inputs)
        assert torch.equal(gamma, torch.cat(alone, -1)), backend
    sets = coupled_sets(mask, Rhythm(waad, fai), cu_seqlens=cu_seqlens, **options)
    ends = zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])
    for begin, end in ends:  # positions are those of the packed row
        named = sets.intro_of[0, begin:end]
        assert named[named >= 0].ge(begin).all() and named.lt(end).all()


ODD = (0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), -float("inf"), NAN, 1e-45, -1e-45, 1e-40, 3.4e38, -3.4e38)
TAUS = (None, 0.0, -0.0, 0.1, 1e-46, -1e-46, 1e300, -1e300, 3.5e38, -3.5e38, 3.4028235e38)


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_the_ops_agree_on_any_bits(data):
    """Both give the same outputs for non-finite signals, denormals, overflowing differences, extreme taus."""
    batch, tokens = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 12))
    element = data.draw(st.sampled_from([st.sampled_from(ODD), st.floats(width=32, allow_nan=False)]))
    count = batch * tokens
    waad, fai = (
        torch.tensor(data.draw(st.lists(element, min_size=count, max_size=count)), dtype=torch.float32).view(
            batch, tokens
        )
        for _ in range(2)
    )
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    mask, cuts = mask.view(batch, tokens), None
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        (waad, fai, mask), cuts = pack(waad, fai, mask, lengths=torch.tensor(lengths, dtype=torch.int64))
    q, of_preplan = (data.draw(st.sampled_from([0.0, 0.4, 1.0])) for _ in range(2))
    largest, drops = data.draw(st.booleans()), data.draw(st.booleans())
    taus = data.draw(st.sampled_from(TAUS)), data.draw(st.sampled_from(TAUS))
    k = data.draw(st.sampled_from([1, 2, 8, 2**40]))
    amplification = data.draw(st.sampled_from([0.0, 1.5, 1e37]))
    for with_sets in (True, False):
        arguments = (waad, fai, mask, cuts, q, of_preplan, amplification, 0.3, k, largest, drops, *taus, with_sets)
        check_same(torch.ops.rhythm_kernels.coupled_credit(*arguments), composed.coupled_credit(*arguments))
    for of_delta in (True, False):
        arguments = (waad, mask, cuts, of_delta, drops, q, amplification, largest)
        check_same(torch.ops.rhythm_kernels.topq_credit(*arguments), composed.topq_credit(*arguments))


def check_same(outputs, expected):
    for i, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        assert got.dtype == want.dtype and got.shape == want.shape, i
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", [8191, 131072])
@pytest.mark.slow
def test_long_sequences_equal_the_reference(tokens):
    generator = torch.Generator().manual_seed(tokens)
    waad, fai = torch.rand(2, tokens, generator=generator) * 10, torch.rand(2, tokens, generator=generator) ** 4
    waad[1], fai[1] = waad[1].round(), (fai[1] * 8).round()  # ties
    mask = torch.rand(2, tokens, generator=generator) < 0.9
    anchors, dominated, intros = expected = reference.coupled_sets(waad, fai, mask)
    assert dominated.any(-1).all()
    share = (anchors & ~dominated).double() + 0.5 * dominated.double() + 0.5 * intros.double()
    for backend in BACKENDS:
        sets = coupled_sets(mask, Rhythm(waad, fai), backend=backend)
        for got, want in zip(sets[1:4], expected, strict=True):
            assert torch.equal(got, want), backend
        gamma = token_credit("coupled", mask, Rhythm(waad, fai), backend=backend)
        assert torch.equal(gamma, (1 + 0.5 * share).float()), backend


# ---- as ops of torch -------------------------------------------------------------------------------------------------


def example(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns waad, fai, mask [3, 50] and the cu_seqlens of a row."""
    generator = torch.Generator().manual_seed(0)
    waad, fai = torch.rand(3, 50, generator=generator) * 10, torch.rand(3, 50, generator=generator)
    mask = torch.rand(3, 50, generator=generator) < 0.8
    cuts = torch.tensor([0, 20, 20, 50], dtype=torch.int32)
    return waad.to(device), fai.to(device), mask.to(device), cuts.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_opcheck(device):
    waad, fai, mask, cuts = example(device)
    options = (0.4, 0.3, 1.5, 0.5, 3, True)
    for few, cu_seqlens in ((slice(None), None), (slice(0, 0), None), (slice(0, 1), cuts)):
        rows = waad[few], fai[few], mask[few], cu_seqlens
        for drops, *taus in ((False, None, None), (True, 2.0, 0.5)):
            for with_sets in (False, True):
                arguments = (*rows, *options, drops, *taus, with_sets)
                torch.library.opcheck(torch.ops.rhythm_kernels.coupled_credit, arguments)
        for of_delta in (False, True):
            arguments = (waad[few], mask[few], cu_seqlens, of_delta, of_delta, 0.4, 1.5, True)
            torch.library.opcheck(torch.ops.rhythm_kernels.topq_credit, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend, delta", [("auto", "drop"), *zip(BACKENDS, DELTAS, strict=True)])
def test_compiles_into_one_graph(backend, delta, compiler):
    """Nothing is raised for a signal that is not finite: its sequence has NaN, and the others do not change."""
    waad, fai, mask, cuts = example()
    waad[1, mask[1].nonzero()[0]] = NAN

    def credit(waad, fai, mask, cuts):
        rhythm, row = Rhythm(waad, fai), Rhythm(fai[:1], fai[:1])
        gammas = [
            token_credit(strategy, mask, rhythm, entropy=fai, delta=delta, backend=backend)
            for strategy in ("none", "entropy", "local", "global", "coupled")
        ]
        if backend != "torch":  # reads cu_seqlens on the host
            gammas += [token_credit("coupled", mask[:1], row, cu_seqlens=cuts, backend=backend)]
        return gammas

    none, entropy, of_local, of_global, coupled, *packed = torch.compile(credit, fullgraph=True, backend=compiler)(
        waad, fai, mask, cuts
    )
    sound = mask & torch.tensor([True, False, True])[:, None]
    for gamma in (of_local, coupled):
        assert torch.equal(gamma.isnan(), mask & ~sound)
        assert gamma[1, ~mask[1]].eq(1).all()
    finite = Rhythm(waad.nan_to_num(), fai)
    for strategy, gamma in (("local", of_local), ("coupled", coupled)):
        want = token_credit(strategy, mask, finite, delta=delta)
        assert torch.equal(gamma[[0, 2]], want[[0, 2]])
    assert torch.equal(none, torch.ones_like(waad)) and torch.equal(entropy, of_global)
    for gamma in packed:
        want = token_credit("coupled", mask[:1], Rhythm(fai[:1], fai[:1]), cu_seqlens=cuts)
        assert torch.equal(gamma, want)


@pytest.mark.parametrize("dynamic", [None, True], ids=["as needed", "dynamic"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_options_and_shapes_may_change_in_a_compiled_graph(backend, dynamic):
    def credit(waad, fai, mask, **options):
        return token_credit("coupled", mask, Rhythm(waad, fai), backend=backend, **options)

    def local(waad, mask, q):
        gamma = token_credit("local", mask, Rhythm(waad), top_fraction=q, backend=backend)
        return gamma, segment_topq(waad, mask, q, backend=backend), find_peaks(waad, mask, backend=backend)

    torch._dynamo.reset()
    compiled = [torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager") for f in (credit, local)]
    waad, fai, mask, _ = example()
    for q, amplification, shared_fraction, k, delta, of_preplan, tau, tokens in (
        (0.4, 1.5, 0.5, 3, "absolute", None, 2.0, 50),
        (0.6, 1.7, 0.2, 2, "drop", 0.3, 3.0, 40),
        (0.2, 2, 0, 1, "drop", 1, 1, 30),
    ):
        few = waad[:, :tokens], fai[:, :tokens], mask[:, :tokens]
        options = {
            "top_fraction": q,
            "amplification": amplification,
            "shared_fraction": shared_fraction,
            "max_lookback": k,
            "delta": delta,
            "preplan_fraction": of_preplan,
            "tau_waad": tau,
        }
        assert torch.equal(compiled[0](*few, **options), credit(*few, **options))
        for got, want in zip(compiled[1](few[0], few[2], q), local(few[0], few[2], q), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_dtype_does_not_matter(backend, dtype):
    waad, fai, mask, _ = example()

    def gammas():
        inputs = {
            "response_mask": mask,
            "rhythm": Rhythm(waad, fai),
            "entropy": fai,
            "amplification": 1.3,
            "backend": backend,
        }
        return [token_credit(strategy, **inputs) for strategy in STRATEGIES]

    expected = gammas()
    torch.set_default_dtype(dtype)
    try:
        got = gammas()
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


def test_fake_tensors_are_not_looked_into():
    waad, fai, mask, cuts = example()
    with FakeTensorMode() as mode:
        waad, fai, mask, cuts = (mode.from_tensor(x) for x in (waad, fai, mask, cuts))
        assert token_credit("coupled", mask, Rhythm(waad, fai)).shape == (3, 50)
        assert coupled_sets(mask[:1], Rhythm(waad[:1], fai[:1]), cu_seqlens=cuts).intros.shape == (1, 50)


def test_cu_seqlens_that_int32_does_not_hold_stay_wrong():
    """In a compiled graph the host does not read the values, so the op checks them."""
    waad, fai, mask, _ = example()

    def credit(waad, fai, mask, cuts):
        return token_credit("coupled", mask, Rhythm(waad, fai), cu_seqlens=cuts, backend="extension")

    compiled = torch.compile(credit, fullgraph=True, backend="aot_eager")
    row = waad[:1], fai[:1], mask[:1]
    assert torch.equal(compiled(*row, torch.tensor([0, 20, 50])), credit(*row, torch.tensor([0, 20, 50])))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 50"):
        compiled(*row, torch.tensor([0, 20, 2**32 + 50]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_is_written(backend):
    """In deterministic mode torch fills new memory, also what the extension allocates, with NaN or the largest int."""
    waad, fai, mask, cuts = example()
    torch.use_deterministic_algorithms(True)
    try:
        for tensors in ((waad, fai, mask, None), (waad[:1], fai[:1], mask[:1], cuts)):
            of = torch.ops.rhythm_kernels if backend == "extension" else composed
            gamma, faults, sets, back = of.coupled_credit(*tensors, 0.4, 0.3, 1.5, 0.5, 3, True, True, None, None, True)
            assert gamma.isfinite().all() and (faults == 0).all() and (sets < 16).all() and (back <= 3).all()
            gamma, faults = of.topq_credit(tensors[0], *tensors[2:], True, True, 0.4, 1.5, True)
            assert gamma.isfinite().all() and (faults == 0).all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "_DEVICE_TYPES", frozenset())
    monkeypatch.setattr(extension, "_warned", set())
    waad, fai, mask, _ = example()
    with pytest.warns(UserWarning, match="on cpu, the slower torch implementation") as caught:
        for _ in range(2):
            gamma = token_credit("coupled", mask, Rhythm(waad, fai))
    assert len(caught) == 1
    assert torch.equal(gamma, reference.gamma("coupled", mask, waad, fai))
    with pytest.raises(RuntimeError, match='backend="extension" has no ops for cpu'):
        token_credit("coupled", mask, Rhythm(waad, fai), backend="extension")


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def every_credit(waad, fai, mask, cu_seqlens=None, **options) -> list[torch.Tensor]:
    """Returns gamma of every strategy."""
    inputs = {"response_mask": mask, "rhythm": Rhythm(waad, fai), "entropy": fai, "cu_seqlens": cu_seqlens, **options}
    return [token_credit(strategy, **inputs) for strategy in ("none", "entropy", "local", "global", "coupled")]


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 31), (3, 1025), *for_gpus((32, 8192), (2, 8191), (1, 60_000), (1, 2**20))], ids=str
)
@pytest.mark.parametrize("levels", [None, 5], ids=["distinct", "tied"])
def test_cuda_equals_cpu_without_synchronizing(shape, levels):
    generator = torch.Generator().manual_seed(0)
    waad, fai = (torch.rand(shape, generator=generator) for _ in range(2))
    if levels is not None:
        waad, fai = ((x * levels).round() for x in (waad, fai))
    mask = torch.rand(shape, generator=generator) < 0.9
    tokens = mask.numel()
    cuts = torch.tensor([0, tokens // 3, tokens // 3, tokens], dtype=torch.int32)
    packed = [x.reshape(1, -1) for x in (waad, fai, mask)]
    for tensors in ((waad, fai, mask, None), (*packed, cuts)):
        on_device = [x if x is None else x.cuda() for x in tensors]
        for options in (
            {},
            {"delta": "drop", "preplan_fraction": 0.6},
            {"largest": False, "top_fraction": 0.7, "max_lookback": 8, "tau_waad": 0.4, "tau_delta": 0.2},
        ):
            torch.cuda.set_sync_debug_mode("error")
            try:
                gammas = every_credit(*on_device, **options)
                token_credit("random", response_mask=on_device[2], seed=3)
                sets = coupled_sets(on_device[2], Rhythm(*on_device[:2]), cu_seqlens=on_device[3])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for got, want in zip(gammas, every_credit(*tensors, **options), strict=True):
                assert torch.equal(got.cpu(), want)
            for got, want in zip(sets, coupled_sets(tensors[2], Rhythm(*tensors[:2]), cu_seqlens=tensors[3])):
                assert torch.equal(got.cpu(), want)


@pytest.mark.gpu(not_pretended="it records a CUDA graph")
@cuda
@pytest.mark.parametrize("tokens", [50, 60_000], ids=["shared memory", "workspace"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_cuda_graph_repeats_it(packed, tokens):
    waad, fai = torch.zeros(1, tokens, device="cuda"), torch.zeros(1, tokens, device="cuda")
    mask = torch.rand(1, tokens, device="cuda") < 0.9
    cuts = torch.tensor([0, tokens // 9, tokens], dtype=torch.int32, device="cuda") if packed else None

    def credit(waad, fai, mask, cuts):
        return token_credit("coupled", mask, Rhythm(waad, fai), cu_seqlens=cuts)

    credit(waad, fai, mask, cuts)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gamma = credit(waad, fai, mask, cuts)
    for seed in range(3):
        torch.manual_seed(seed)
        waad.copy_(torch.rand(waad.shape) * 10), fai.copy_(torch.rand(fai.shape))
        graph.replay()
        on_cpu = [x if x is None else x.cpu() for x in (waad, fai, mask, cuts)]
        assert torch.equal(gamma.cpu(), credit(*on_cpu))


@pytest.mark.gpu(not_pretended="there the ops run on the CPU, and raise")
@cuda
def test_what_a_gpu_cannot_raise_comes_out_as_nan():
    waad, fai, mask, cuts = example("cuda")
    fai[1, 7], mask[1, 7] = float("inf"), True
    gamma = token_credit("coupled", mask, Rhythm(waad, fai))
    assert torch.equal(gamma.isnan(), mask & (torch.arange(3, device="cuda") == 1)[:, None])
    row = Rhythm(waad[:1], waad[:1])
    for bad in ([3, 50], [0, 40], [0, 60], [0, -1, 50], [0, 30, 20, 50], [0]):
        cuts = torch.tensor(bad, dtype=torch.int32, device="cuda")
        gamma = token_credit("coupled", mask[:1], row, cu_seqlens=cuts, backend="extension")
        assert gamma.isnan().all(), bad
        selected, has_nan = segment_topq(row.waad, mask[:1], 1.0, cu_seqlens=cuts, return_nan=True)
        assert not selected.any() and has_nan.all()
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 50"):
            token_credit("coupled", mask[:1], row, cu_seqlens=cuts, backend="torch")


# ---- on a CPU --------------------------------------------------------------------------------------------------------


def test_random_is_seeded_and_selects_the_right_number():
    mask = torch.ones(3, 50, dtype=torch.bool)
    mask[1, 10:] = False
    first, again, other = (token_credit("random", response_mask=mask, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first == 1.5).sum(-1).tolist() == [20, 4, 20]


def test_signals_outside_the_response_do_not_matter():
    mask = torch.tensor([[False, True, True, True, False]])
    waad = torch.tensor([[NAN, 3.0, 1.0, 2.0, NAN]])
    clean = token_credit("coupled", mask, Rhythm(waad.nan_to_num(9), waad.nan_to_num(9)), top_fraction=0.6)
    assert torch.equal(token_credit("coupled", mask, Rhythm(waad, waad), top_fraction=0.6), clean)


def test_half_precision_signals_are_compared_as_they_are():
    waad = torch.rand(2, 30).bfloat16()
    mask = torch.ones(2, 30, dtype=torch.bool)
    wide = Rhythm(waad.float(), waad.float())
    assert torch.equal(token_credit("coupled", mask, Rhythm(waad, waad)), token_credit("coupled", mask, wide))


MASK = torch.ones(2, 4, dtype=torch.bool)
VALUES = torch.rand(2, 4)


@pytest.mark.parametrize(
    "strategy, options, error, text",
    [
        ("both", {}, ValueError, "strategy must be one of none, random, .*, got 'both'"),
        ("none", {"response_mask": MASK.float()}, TypeError, "response_mask must be torch.bool, got torch.float32"),
        ("none", {"response_mask": MASK[0]}, ValueError, r"response_mask must have shape \[B, T\], got \[4\]"),
        ("local", {}, ValueError, "rhythm.waad is needed by this strategy, got None"),
        ("local", {"rhythm": (VALUES, VALUES)}, TypeError, "rhythm must be a Rhythm, got tuple"),
        ("global", {"rhythm": Rhythm(waad=VALUES)}, ValueError, "rhythm.fai is needed"),
        ("coupled", {"rhythm": Rhythm(waad=VALUES)}, ValueError, "rhythm.fai is needed"),
        ("entropy", {"rhythm": Rhythm(VALUES, VALUES)}, ValueError, "entropy is needed"),
        ("entropy", {"entropy": VALUES[:1]}, ValueError, r"entropy must have shape \[2, 4\], got \[1, 4\]"),
        ("entropy", {"entropy": VALUES.double()}, TypeError, "entropy must be .*, got torch.float64"),
        ("local", {"rhythm": Rhythm(waad=VALUES * NAN)}, ValueError, "finite in R, got NaN or infinity in 2 sequence"),
        (
            "coupled",
            {"rhythm": Rhythm(VALUES, VALUES), "max_lookback": 0},
            ValueError,
            "max_lookback must be .*, got 0",
        ),
        ("coupled", {"rhythm": Rhythm(VALUES, VALUES), "tau_waad": NAN}, ValueError, "tau_waad must be finite"),
        ("random", {"top_fraction": 1.2}, ValueError, "top_fraction must be finite and between 0.0 and 1.0, got 1.2"),
        ("random", {"top_fraction": NAN}, ValueError, "top_fraction must be finite"),
        ("random", {"preplan_fraction": 1.2}, ValueError, "preplan_fraction must be finite and between .*, got 1.2"),
        ("random", {"delta": "rise"}, ValueError, "delta must be one of absolute, drop, got 'rise'"),
        ("random", {"amplification": -1.0}, ValueError, "amplification must be"),
        ("random", {"shared_fraction": 2.0}, ValueError, "shared_fraction must be"),
        ("random", {"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ("random", {"seed": 2**64}, ValueError, "seed must be between 0 and"),
        ("coupled", {"rhythm": Rhythm(VALUES, VALUES), "max_lookback": 2**63}, ValueError, "max_lookback must be"),
        ("coupled", {"rhythm": Rhythm(VALUES, VALUES), "tau_waad": 10**400}, ValueError, "tau_waad must be finite"),
    ],
)
def test_bad_input(strategy, options, error, text):
    with pytest.raises(error, match=text):
        token_credit(strategy, **{"response_mask": MASK, **options})


def test_shape_advantages():
    gamma = torch.tensor([[1.0, 1.5], [1.0, 1.5]], requires_grad=True)
    per_sequence = shape_advantages(torch.tensor([2.0, -2.0]), gamma)
    assert per_sequence.tolist() == [[2.0, 3.0], [-2.0, -2.0]] and not per_sequence.requires_grad
    advantages = torch.randn(2, 2)
    assert torch.equal(shape_advantages(advantages, gamma), reference.shape_advantages(advantages, gamma))
    with pytest.raises(ValueError, match=r"advantages must have shape \[2\], got \[3\]"):
        shape_advantages(torch.ones(3), gamma)
    with pytest.raises(ValueError, match=r"advantages must have shape \[2, 2\], got \[2, 3\]"):
        shape_advantages(torch.ones(2, 3), gamma)
    with pytest.raises(TypeError, match=r"advantages must be a tensor, got list"):
        shape_advantages([1.0, 2.0], gamma)
    with pytest.raises(TypeError, match=r"gamma must be .*, got torch.int64"):
        shape_advantages(torch.ones(2), gamma.long())
