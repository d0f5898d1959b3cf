"""Credit as ops of torch: in compiled graphs, in other default dtypes, on a GPU, with and without the extension."""

import pytest
import torch
from test_selection import DEVICES, cuda, for_gpus
from torch._subclasses.fake_tensor import FakeTensorMode

from rhythm_kernels import (
    Rhythm,
    coupled_sets,
    find_peaks,
    reference,
    segment_topq,
    token_credit,
)
from rhythm_kernels.credit import composed, extension
from rhythm_kernels.options import DELTAS, STRATEGIES

NAN = float("nan")
BACKENDS = ("extension", "torch")


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
