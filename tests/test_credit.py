"""Credit is exact: equal to the reference, bit for bit. `test_credit_ops.py` tests its ops in graphs and on a GPU."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_selection import pack, unpacked

from rhythm_kernels import (
    Rhythm,
    coupled_sets,
    reference,
    shape_advantages,
    token_credit,
)
from rhythm_kernels.credit import composed
from rhythm_kernels.options import DELTAS

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


@pytest.mark.parametrize("credit", [partial(token_credit, "coupled"), coupled_sets])
def test_the_rhythm_of_packed_sequences_needs_their_bounds(credit):
    waad, mask = torch.rand(1, 20), torch.ones(1, 20, dtype=torch.bool)
    rhythm = Rhythm(waad, waad, torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match="bounds of packed sequences, got None for a rhythm.spans of 2 sequences"):
        credit(mask, rhythm)
    credit(mask, rhythm, cu_seqlens=torch.tensor([0, 9, 20]))
    credit(mask, rhythm._replace(spans=torch.rand(3, 4)))  # of the whole batch
