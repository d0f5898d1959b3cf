"""Credit is exact: equal to the reference, bit for bit."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from rhythm_kernels import Rhythm, coupled_sets, reference, shape_advantages, token_credit

NAN = float("nan")


@st.composite
def signals(draw):
    """(waad, fai, mask) with many ties, holes, empty and short sequences."""
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
        "q": st.sampled_from([0.0, 0.2, 0.4, 0.7, 1.0]),
        "largest": st.booleans(),
        "tau_waad": st.sampled_from([None, None, 0.1, 1.0]),
        "tau_delta": st.sampled_from([None, None, 0.0, 0.1, 1.0]),
        "k": st.integers(1, 8),
    }
)


@settings(max_examples=300, deadline=None)
@given(signals(), knobs, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([1.0, 1.5, 2.7]))
def test_coupled_equals_the_reference(given_signals, options, alpha, amp):
    waad, fai, mask = given_signals
    rhythm = Rhythm(waad, fai)
    sets = coupled_sets(rhythm, mask, **options)
    expected = reference.coupled_sets(waad, fai, mask, **options)
    for name, got, want in zip(("t_glob", "dominated", "intros"), sets[1:], expected, strict=True):
        assert torch.equal(got, want), name
    assert torch.equal(sets.t_loc, reference.segment_topq(reference.delta(waad, mask), mask, options["q"]))
    gamma = token_credit("coupled", mask=mask, rhythm=rhythm, alpha=alpha, amp=amp, **options)
    assert torch.equal(gamma, reference.gamma("coupled", mask, waad, fai, alpha=alpha, amp=amp, **options))
    assert gamma[~mask].eq(1).all()


@settings(max_examples=150, deadline=None)
@given(
    signals(), st.sampled_from(["none", "local", "global", "entropy"]), st.sampled_from([0.0, 0.4, 1.0]), st.booleans()
)
def test_other_strategies_equal_the_reference(given_signals, strategy, q, largest):
    waad, fai, mask = given_signals
    inputs = {"rhythm": Rhythm(waad, fai), "entropy": fai, "q": q, "largest": largest}
    expected = reference.gamma(strategy, mask, waad, fai, entropy=fai, q=q, largest=largest)
    assert torch.equal(token_credit(strategy, mask=mask, **inputs), expected)


def test_random_is_seeded_and_selects_the_right_number():
    mask = torch.ones(3, 50, dtype=torch.bool)
    mask[1, 10:] = False
    first, again, other = (token_credit("random", mask=mask, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first == 1.5).sum(-1).tolist() == [20, 4, 20]


def test_signals_outside_the_response_do_not_matter():
    mask = torch.tensor([[False, True, True, True, False]])
    waad = torch.tensor([[NAN, 3.0, 1.0, 2.0, NAN]])
    clean = token_credit("coupled", mask=mask, rhythm=Rhythm(waad.nan_to_num(9), waad.nan_to_num(9)), q=0.6)
    assert torch.equal(token_credit("coupled", mask=mask, rhythm=Rhythm(waad, waad), q=0.6), clean)


def test_half_precision_signals_are_compared_as_they_are():
    waad = torch.rand(2, 30).bfloat16()
    mask = torch.ones(2, 30, dtype=torch.bool)
    wide = Rhythm(waad.float(), waad.float())
    assert torch.equal(
        token_credit("coupled", mask=mask, rhythm=Rhythm(waad, waad)), token_credit("coupled", mask=mask, rhythm=wide)
    )


MASK = torch.ones(2, 4, dtype=torch.bool)
VALUES = torch.rand(2, 4)


@pytest.mark.parametrize(
    "strategy, options, error, text",
    [
        ("both", {}, ValueError, "strategy must be one of none, random, .*, got 'both'"),
        ("none", {"mask": MASK.float()}, TypeError, "mask must be torch.bool, got torch.float32"),
        ("none", {"mask": MASK[0]}, ValueError, r"mask must have shape \[B, T\], got \[4\]"),
        ("local", {}, ValueError, "rhythm.waad is needed by this strategy, got None"),
        ("local", {"rhythm": (VALUES, VALUES)}, TypeError, "rhythm must be a Rhythm, got tuple"),
        ("global", {"rhythm": Rhythm(waad=VALUES)}, ValueError, "rhythm.fai is needed"),
        ("coupled", {"rhythm": Rhythm(waad=VALUES)}, ValueError, "rhythm.fai is needed"),
        ("entropy", {"rhythm": Rhythm(VALUES, VALUES)}, ValueError, "entropy is needed"),
        ("entropy", {"entropy": VALUES[:1]}, ValueError, r"entropy must have shape \[2, 4\], got \[1, 4\]"),
        ("entropy", {"entropy": VALUES.double()}, TypeError, "entropy must be .*, got torch.float64"),
        ("local", {"rhythm": Rhythm(waad=VALUES * NAN)}, ValueError, "finite in R, got NaN or infinity in 2 sequence"),
        ("coupled", {"rhythm": Rhythm(VALUES, VALUES), "k": 0}, ValueError, "k must be at least 1, got 0"),
        ("coupled", {"rhythm": Rhythm(VALUES, VALUES), "tau_waad": NAN}, ValueError, "tau_waad must be finite"),
        ("random", {"q": 1.2}, ValueError, "q must be finite and between 0.0 and 1.0, got 1.2"),
        ("random", {"q": NAN}, ValueError, "q must be finite"),
        ("random", {"amp": -1.0}, ValueError, "amp must be"),
        ("random", {"alpha": 2.0}, ValueError, "alpha must be"),
        ("random", {"seed": 1.5}, TypeError, "seed must be an int, got float"),
    ],
)
def test_bad_input(strategy, options, error, text):
    with pytest.raises(error, match=text):
        token_credit(strategy, **{"mask": MASK, **options})


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
