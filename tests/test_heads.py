"""Sampled layers and head groups against the reference."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from rhythm_kernels import group_heads, reference, sampled_layers


@pytest.mark.parametrize("num_layers", range(1, 101))
def test_sampled_layers_equal_the_reference(num_layers):
    for count in range(1, 9):
        assert sampled_layers(num_layers, count) == reference.sampled_layers(num_layers, count)


def test_layers_can_be_named():
    assert sampled_layers(8, [5, -1, 0]) == [0, 5, 7]
    assert sampled_layers(3, "all") == [0, 1, 2]


@pytest.mark.parametrize(
    "layers, error, text",
    [
        (0, ValueError, "layers must be at least 1, got 0"),
        ("some", TypeError, "layers must be .*, got 'some'"),
        ([], TypeError, "got \\[\\]"),
        ([8], ValueError, "layers must be between -8 and 7, got 8"),
        ([1.0], TypeError, "layers must be an int, got float: 1.0"),
        ([1, -7], ValueError, "must not repeat"),
    ],
)
def test_bad_layers(layers, error, text):
    with pytest.raises(error, match=text):
        sampled_layers(8, layers)


@given(
    st.integers(1, 6).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(2, 9))),
    st.sampled_from([(0.3, 0.3), (0.5, 0.5), (0.0, 0.2), (0.1, 0.7)]),
    st.randoms(use_true_random=False),
)
def test_groups_equal_the_reference(shape, fractions, random):
    spans = torch.tensor([random.choice([0.0, 1.0, 1.5, 2.0, 7.0]) for _ in range(shape[0] * shape[1])]).view(shape)
    if sum(math.ceil(fraction * spans.numel() - 1e-9) for fraction in fractions) > spans.numel():
        with pytest.raises(ValueError, match="disjoint"):  # rounding up leaves too few heads
            group_heads(spans, local_fraction=fractions[0], global_fraction=fractions[1])
        return
    groups = group_heads(spans, local_fraction=fractions[0], global_fraction=fractions[1])
    expected = reference.group_heads(spans, *fractions)
    assert torch.equal(groups.local_heads, expected.local_heads) and torch.equal(
        groups.global_heads, expected.global_heads
    )
    assert not (groups.local_heads & groups.global_heads).any()
    stacked = group_heads(
        torch.stack([spans, spans.flip(-1)]), local_fraction=fractions[0], global_fraction=fractions[1]
    )
    assert torch.equal(stacked.local_heads[0], groups.local_heads) and torch.equal(
        stacked.global_heads[0], groups.global_heads
    )


@pytest.mark.parametrize(
    "spans, options, error, text",
    [
        ([1.0], {}, TypeError, "spans must be a tensor, got list"),
        (torch.ones(4), {}, ValueError, r"spans must have shape \[B, L, HQ\], got \[4\]"),
        (torch.ones(2, 2, dtype=torch.long), {}, TypeError, "spans must be torch.float32"),
        (torch.tensor([[1.0, float("nan")]]), {}, ValueError, "spans must not hold NaN, got 1 of 2"),
        (torch.ones(1, 1), {}, ValueError, "disjoint"),
        (
            torch.ones(2, 2),
            {"local_fraction": 1.5},
            ValueError,
            "local_fraction must be finite and between 0.0 and 1.0, got 1.5",
        ),
        (torch.ones(2, 2), {"global_fraction": "half"}, TypeError, "global_fraction must be a float, got str"),
    ],
)
def test_bad_spans(spans, options, error, text):
    with pytest.raises(error, match=text):
        group_heads(spans, **options)
