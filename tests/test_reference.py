"""The definitions against cases computed by hand."""

import math

import pytest
import torch
from torch import tensor

from rhythm_kernels import reference


def uniform(tokens, heads=1):
    """Returns q and k whose scores are all 0, so that row t gives 1 / (t + 1) to each of its keys."""
    return torch.zeros(1, heads, tokens, 2), torch.zeros(1, heads, tokens, 2)


def exactly(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-12)


def test_uniform_rows():
    stats = reference.attention_stats(*uniform(4), window=1, horizon=(1, 2))
    exactly(stats.span, [[(0 + 1 / 2 + 1 + 3 / 2) / 4]])
    exactly(stats.waad, [[[0, 1 / 2, 2 / 3, 3 / 4]]])
    exactly(stats.fai, [[[(1 / 2 + 1 / 3) / 2, (1 / 3 + 1 / 4) / 2, 1 / 4, 0]]])
    exactly(stats.lse, [[[0, math.log(2), math.log(3), math.log(4)]]])


def test_two_tokens_by_hand():
    q, k = tensor([[[[1.0], [2.0]]]]), tensor([[[[3.0], [1.0]]]])
    attention, lse = reference.attention_map(q, k, torch.zeros(1, 2, dtype=torch.long), scale=0.5)
    near, far = math.exp(1.0), math.exp(3.0)  # 0.5 * 2 * (1, 3)
    exactly(attention[0, 0], [[1, 0], [far / (near + far), near / (near + far)]])
    exactly(lse[0, 0], [1.5, math.log(near + far)])


def test_scale_defaults_to_the_root_of_the_head_size():
    q = torch.ones(1, 1, 2, 4)
    _, lse = reference.attention_map(q, q, torch.zeros(1, 2, dtype=torch.long))
    exactly(lse[0, 0], [2, 2 + math.log(2)])


def test_grouped_query_heads_read_their_key_head():
    q, k = torch.ones(1, 4, 1, 1), tensor([1.0, 5.0]).view(1, 2, 1, 1)
    _, lse = reference.attention_map(q, k, torch.zeros(1, 1, dtype=torch.long))
    exactly(lse[0, :, 0], [1, 1, 5, 5])


def test_softcap_comes_before_the_mask():
    q, k = torch.ones(1, 1, 2, 1), tensor([8.0, 0.0]).view(1, 1, 2, 1)
    attention, _ = reference.attention_map(q, k, torch.zeros(1, 2, dtype=torch.long), softcap=2.0)
    capped = math.exp(2 * math.tanh(4.0))
    exactly(attention[0, 0], [[1, 0], [capped / (capped + 1), 1 / (capped + 1)]])


def test_sink_takes_its_share():
    stats = reference.attention_stats(*uniform(2), sinks=torch.zeros(1), horizon=(1, None))
    exactly(stats.lse, [[[math.log(2), math.log(3)]]])
    exactly(stats.waad, [[[0, 1 / 3]]])
    exactly(stats.fai, [[[1 / 3, 0]]])


def test_sliding_window_sees_the_nearest_keys():
    attention, _ = reference.attention_map(*uniform(3), torch.zeros(1, 3, dtype=torch.long), sliding_window=2)
    exactly(attention[0, 0], [[1, 0, 0], [1 / 2, 1 / 2, 0], [0, 1 / 2, 1 / 2]])


def test_padding_on_either_side_and_packing_are_the_same_sequence():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 1, 5, 4)
    alone = reference.attention_stats(q, k, horizon=(1, 3))
    for left, right in ((0, 3), (3, 0)):
        wide = [torch.nn.functional.pad(x, (0, 0, left, right), value=7.0) for x in (q, k)]
        mask = torch.nn.functional.pad(torch.ones(1, 5, dtype=torch.long), (left, right))
        padded = reference.attention_stats(*wide, horizon=(1, 3), attention_mask=mask)
        exactly(padded.span, alone.span)
        for got, expected in zip(
            (padded.waad, padded.fai, padded.lse), (alone.waad, alone.fai, alone.lse), strict=True
        ):
            exactly(got[:, :, left : left + 5], expected)
            assert got[:, :, :left].eq(0).all() and got[:, :, left + 5 :].eq(0).all()
    twice = [torch.cat([x, x], 2) for x in (q, k)]
    packed = reference.attention_stats(*twice, horizon=(1, 3), cu_seqlens=tensor([0, 5, 5, 10]))
    exactly(packed.span, torch.cat([alone.span, torch.zeros(1, 2), alone.span]))
    exactly(packed.fai, torch.cat([alone.fai, alone.fai], 2))


def test_attention_out_by_hand():
    weights = tensor([[[[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]]])  # the last token is padding
    v = tensor([[[[4.0, 0.0], [8.0, 1.0], [math.nan, math.inf]]]])
    exactly(reference.attention_out(weights, v)[0, 0], [[4, 0], [7, 0.75], [0, 0]])
    v[0, 0, 1, 0] = math.inf
    out = reference.attention_out(weights, v)[0, 0]
    assert out[1, 0].isnan() and out.isnan().sum() == 1, "only what the broken value has a weight in"
    heads = torch.arange(4.0).view(1, 4, 1, 1)
    exactly(reference.attention_out(heads, tensor([1.0, 5.0]).view(1, 2, 1, 1)).flatten(), [0, 1, 10, 15])


def test_group_sums_by_hand():
    waad, fai = tensor([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]]), tensor([[[4.0, 5.0, 6.0], [math.nan] * 3]])
    one = tensor([True, False])
    sums = reference.group_sums(waad, fai, ~one | one, one, tensor([[0, 0, 1]]))
    exactly(sums.waad, [[11, 22, 33]])
    exactly(sums.fai, [[4, 5, 6]])
    local_heads, global_heads = tensor([[True, False], [False, True]]), tensor([[False, False], [True, False]])
    sums = reference.group_sums(waad, fai, local_heads, global_heads, tensor([[0, 0, 1]]))
    exactly(sums.waad, [[1, 2, 30]])
    exactly(sums.fai, [[0, 0, 6]])


def test_only_response_rows_count():
    rows = tensor([[False, True, False, True]])
    stats = reference.attention_stats(*uniform(4), window=1, horizon=(1, None), response_mask=rows)
    exactly(stats.waad, [[[0, 1 / 2, 0, 3 / 4]]])
    exactly(stats.span, [[(1 / 2 + 3 / 2) / 2]])
    exactly(stats.fai, [[[(1 / 2 + 1 / 4) / 2, 1 / 4, 1 / 4, 0]]])
    empty = reference.attention_stats(*uniform(4), response_mask=torch.zeros(1, 4, dtype=torch.bool))
    assert all(x.eq(0).all() for x in empty[:4])


EVERY_NAME = ("row_entropy", "largest_score", "first_mass", "prefix_mass", "self_mass", "column_sum")


def test_more_statistics_of_uniform_rows_by_hand():
    """Row t of 4 gives 1 / (t + 1) to each of its keys; rows 1 and 3 are in R."""
    rows, prefix = tensor([[False, True, False, True]]), tensor([3])
    options = {"response_mask": rows, "horizon": (1, None), "prefix_lengths": prefix, "first_keys": 1}
    more = reference.attention_stats(*uniform(4), more=EVERY_NAME, **options).more
    exactly(more["row_entropy"], [[[0, math.log(2), 0, math.log(4)]]])
    exactly(more["largest_score"], [[[0, 0, 0, 0]]])
    exactly(more["first_mass"], [[[0, 1 / 2, 0, 1 / 4]]])
    exactly(more["prefix_mass"], [[[0, 1, 0, 3 / 4]]])
    exactly(more["self_mass"], [[[0, 1 / 2, 0, 1 / 4]]])
    exactly(more["column_sum"], [[[1 / 2 + 1 / 4, 1 / 4, 1 / 4, 0]]])
    assert list(more) == list(EVERY_NAME)


def test_more_statistics_of_two_tokens_by_hand():
    q, k = tensor([[[[1.0], [2.0]]]]), tensor([[[[3.0], [1.0]]]])
    far, near = math.exp(3.0), math.exp(1.0)  # 0.5 * 2 * (3, 1)
    share = far / (far + near)
    more = reference.attention_stats(q, k, scale=0.5, horizon=(0, None), more=EVERY_NAME[:3:2] + EVERY_NAME[4:]).more
    exactly(more["row_entropy"], [[[0, -share * math.log(share) - (1 - share) * math.log(1 - share)]]])
    exactly(more["self_mass"], [[[1, 1 - share]]])
    exactly(more["column_sum"], [[[1 + share, 1 - share]]])
    # the soft cap comes before the maximum
    capped = reference.attention_stats(q, k, scale=0.5, softcap=2.0, more=["largest_score"]).more["largest_score"]
    exactly(capped, [[[2 * math.tanh(0.75), 2 * math.tanh(1.5)]]])
    exactly(reference.attention_stats(q, k, scale=-0.5, more=["largest_score"]).more["largest_score"], [[[-1.5, -1]]])


def test_a_sink_is_no_key_of_the_more_statistics():
    more = reference.attention_stats(*uniform(2), sinks=torch.zeros(1), first_keys=9, more=EVERY_NAME[:3]).more
    exactly(more["row_entropy"], [[[math.log(2) / 2, 2 / 3 * math.log(3)]]])
    exactly(more["first_mass"], [[[1 / 2, 2 / 3]]])
    sunk = reference.attention_stats(*uniform(2), sinks=torch.full([1], 50.0), more=["largest_score"])
    exactly(sunk.more["largest_score"], [[[0, 0]]])


def test_first_keys_are_those_of_the_rows_own_sequence():
    """Padding does not count, a window hides a prefix, and a prefix may be empty or longer than its sequence."""
    mask = tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    q, k = (x.expand(2, -1, -1, -1) for x in uniform(5))
    options = {"first_keys": 1, "more": ["first_mass", "prefix_mass"], "prefix_lengths": tensor([9, 0])}
    more = reference.attention_stats(q, k, attention_mask=mask, **options).more
    exactly(more["first_mass"], [[[0, 0, 1, 1 / 2, 1 / 3]], [[1, 1 / 2, 1 / 3, 1 / 4, 0]]])
    exactly(more["prefix_mass"], [[[0, 0, 1, 1, 1]], [[0] * 5]])
    packed = {"cu_seqlens": tensor([0, 2, 2, 5]), "sliding_window": 2, "prefix_lengths": tensor([1, 4, 2])}
    more = reference.attention_stats(*uniform(5), **options | packed).more
    exactly(more["first_mass"], [[[1, 1 / 2, 1, 1 / 2, 0]]])
    exactly(more["prefix_mass"], [[[1, 1 / 2, 1, 1, 1 / 2]]])


def test_masses_are_summed_as_waad_and_column_sums_as_fai():
    values, groups = tensor([[[1.0, 2.0], [10.0, 20.0]]]), (tensor([True, False]), tensor([True, True]))
    named = {"self_mass": values, "column_sum": values}
    more = reference.group_sums(values, values, *groups, tensor([[0, 0]]), named).more
    exactly(more["self_mass"], [[1, 2]])
    exactly(more["column_sum"], [[11, 22]])


@pytest.mark.parametrize(
    "num_layers, count, expected",
    [
        (36, 5, [12, 15, 18, 21, 24]),
        (30, 5, [10, 13, 15, 18, 20]),  # 12.5 and 17.5 round up
        (28, 5, [9, 11, 14, 16, 18]),
        (4, 5, [1, 2]),
        (2, 5, [0, 1]),
        (1, 5, [0]),
        (3, 5, [1, 2]),
        (12, 1, [6]),
        (12, 2, [4, 8]),
    ],
)
def test_sampled_layers(num_layers, count, expected):
    assert reference.sampled_layers(num_layers, count) == expected


def test_group_heads_breaks_ties_to_the_lower_head():
    spans = tensor([[3.0, 1.0, 1.0], [3.0, 2.0, 0.5]])
    groups = reference.group_heads(spans)  # ceil(0.3 x 6) = 2 of each
    assert groups.local_heads.tolist() == [[False, True, False], [False, False, True]]
    assert groups.global_heads.tolist() == [[True, False, False], [True, False, False]]
    equal = reference.group_heads(torch.ones(2, 2), 0.5, 0.5)
    assert equal.local_heads.tolist() == [[True, True], [False, False]]
    assert equal.global_heads.tolist() == [[False, False], [True, True]]


def test_topq_counts_and_ties():
    values = tensor([[1.0, 3.0, 3.0, 3.0, 2.0, 9.0, math.nan]])
    mask = tensor([[True, True, True, True, True, False, True]])
    pick = lambda q, largest=True: reference.segment_topq(values, mask, q, largest)[0].nonzero().flatten().tolist()  # noqa: E731
    assert pick(0.0) == []
    assert pick(0.2) == [1, 2]  # ceil(0.2 x 6)
    assert pick(1.0) == [0, 1, 2, 3, 4]  # never the NaN
    assert pick(0.3, largest=False) == [0, 4]
    ten = torch.arange(10.0)[None]
    assert (
        reference.segment_topq(ten, torch.ones(1, 10, dtype=torch.bool), 0.7).sum() == 7
    )  # 0.7 x 10 is above 7 in fp64


def test_peaks():
    values = tensor([[5.0, 1.0, 2.0, 2.0, 1.0, 3.0, 3.0, 0.0, 4.0, 1.0, 7.0]])
    mask = torch.ones(1, 11, dtype=torch.bool)
    peaks = lambda m, p=0.0: reference.find_peaks(values, m, p)[0].nonzero().flatten().tolist()  # noqa: E731
    assert peaks(mask) == [2, 5, 8]  # the ends are no peaks, a plateau counts once
    assert peaks(mask, 0.75) == [8]  # the 9th smallest of 11 is 4
    hole = mask.clone()
    hole[0, 7] = False
    assert peaks(hole) == [2]  # 5..6 touches the hole, 8 is the end of its run


def test_delta_ends_with_the_response():
    waad = tensor([[1.0, 4.0, 2.0, 2.5, 9.0]])
    mask = tensor([[True, True, True, False, True]])
    exactly(reference.delta(waad, mask), [[3, 2, 0, 0, 0]])
    exactly(reference.delta(waad, mask, "drop"), [[0, 2, 0, 0, 0]])
    assert reference.rises(waad, mask).tolist() == [[True, False, False, False, False]]


def test_coupled_credit_by_hand():
    #                 0    1    2    3    4    5    6    7    8    9
    waad = tensor([[5.0, 9.0, 1.0, 1.0, 1.0, 6.0, 6.0, 2.0, 2.0, 2.0]])
    fai = tensor([[0.9, 0.1, 0.8, 0.1, 0.1, 0.2, 0.1, 0.7, 0.1, 0.6]])
    mask = torch.ones(1, 10, dtype=torch.bool)
    # Delta: 4 8 0 0 5 0 4 0 0 0; T_loc = {1, 4, 0, 6}, so tau_Delta = 4; lower median of WAAD = 2
    anchors, dominated, intros = reference.coupled_sets(waad, fai, mask, top_fraction=0.4, max_lookback=2)
    assert anchors[0].nonzero().flatten().tolist() == [0, 2, 7, 9]
    # 0: no token before; 2: low, 1 or 0 before, 1 larger; 7: low, 6 before; 9: low, but 8 and 7 change nothing
    assert dominated[0].nonzero().flatten().tolist() == [2, 7]
    assert intros[0].nonzero().flatten().tolist() == [1, 6]
    gamma = reference.gamma("coupled", mask, waad, fai, max_lookback=2, shared_fraction=0.25, amplification=1.5)
    exactly(gamma, [[1.5, 1.125, 1.375, 1, 1, 1, 1.125, 1.375, 1, 1.5]])


def test_only_drops_are_preplan_tokens_and_intros():
    #                 0    1    2    3    4    5    6    7    8    9
    waad = tensor([[5.0, 9.0, 1.0, 1.0, 1.0, 6.0, 6.0, 2.0, 2.0, 2.0]])  # drops: 8 at 1, 4 at 6; rises: 0, 4
    fai = tensor([[0.9, 0.1, 0.8, 0.1, 0.1, 0.2, 0.1, 0.7, 0.1, 0.6]])
    mask = torch.ones(1, 10, dtype=torch.bool)
    places = lambda tokens: tokens[0].nonzero().flatten().tolist()  # noqa: E731
    assert places(reference.preplan(waad, mask, 0.4, delta="drop")) == [1, 6]  # for the four that 0.4 allows
    assert places(reference.preplan(waad, mask, 0.1, delta="drop")) == [1]
    assert places(reference.preplan(waad, mask, 0.4, False, "drop")) == [0, 2, 3, 4]  # the others, with Delta 0
    assert places(reference.rises(waad, mask) & reference.preplan(waad, mask, 0.4)) == [0, 4]

    def sets(**options) -> list[list[int]]:
        return [places(found) for found in reference.coupled_sets(waad, fai, mask, max_lookback=2, **options)]

    assert sets(delta="drop") == [[0, 2, 7, 9], [2, 7], [1, 6]]
    assert sets(preplan_fraction=0.1) == [[0, 2, 7, 9], [2], [1]]  # tau_Delta is 8
    assert sets(tau_delta=0.0) == [[0, 2, 7, 9], [2, 7, 9], [1, 6, 8]]
    assert sets(tau_delta=0.0, delta="drop") == [[0, 2, 7, 9], [2, 7], [1, 6]]
    assert sets(preplan_fraction=0.0) == sets(preplan_fraction=0.0, delta="drop") == [[0, 2, 7, 9], [], []]
    gamma = reference.gamma("local", mask, waad, fai, preplan_fraction=0.1, delta="drop")
    exactly(gamma, [[1, 1.5, 1, 1, 1, 1, 1, 1, 1, 1]])


def test_intro_is_the_latest_on_a_tie_and_counts_once():
    waad = tensor([[0.0, 4.0, 8.0, 8.0, 8.0]])  # Delta 4 4 0 0 0
    fai = tensor([[0.0, 0.0, 5.0, 5.0, 0.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    _, dominated, intros = reference.coupled_sets(waad, fai, mask, top_fraction=0.4, max_lookback=3, tau_waad=8.0)
    assert dominated[0].tolist() == [False, False, True, True, False]
    assert intros[0].tolist() == [False, True, False, False, False]
    gamma = reference.gamma("coupled", mask, waad, fai, max_lookback=3, tau_waad=8.0, shared_fraction=0.5)
    exactly(gamma, [[1, 1.25, 1.25, 1.25, 1]])


def test_shaping_amplifies_only_what_is_not_negative():
    gamma = tensor([[1.0, 1.5], [1.0, 1.5]])
    exactly(reference.shape_advantages(tensor([2.0, -2.0]), gamma), [[2, 3], [-2, -2]])
    exactly(reference.shape_advantages(tensor([[0.0, 2.0], [2.0, -2.0]]), gamma), [[0, 3], [2, -2]])
