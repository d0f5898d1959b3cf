"""Head groups that serve several steps: their calibrations, their drift, and the state of a resumed run."""

import io
import math
import statistics

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from rhythm_kernels import GroupDrift, GroupSchedule, group_heads
from rhythm_kernels.group_schedule import overlap, spearman

ONE = torch.ones(1, dtype=torch.long)


def spans_of(seed: int, *shape: int) -> torch.Tensor:
    return 20 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([1.0, 2, 3, 4, 5], [5.0, 6, 7, 8, 7], 8 / math.sqrt(95)),  # ranks of b: 1, 2, 3.5, 5, 3.5
        ([3.0, 1, 2], [30.0, 10, 20], 1.0),
        ([3.0, 1, 2], [1.0, 3, 2], -1.0),
        ([1.0, 2, 3], [1.0, 3, 2], 0.5),
        ([1.0, 1, 2, 2], [1.0, 2, 1, 2], 0.0),
        ([[1.0, 2], [3, 4]], [[1.0, 2], [3, 1000]], 1.0),
    ],
)
def test_spearman_by_hand(a, b, expected):
    assert spearman(torch.tensor(a), torch.tensor(b)) == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40))
def test_spearman_is_pearson_of_mean_ranks(pairs):
    def ranks(values):
        return [sum(v < value for v in values) + (values.count(value) + 1) / 2 for value in values]

    columns = [list(column) for column in zip(*pairs, strict=True)]
    got = spearman(*(torch.tensor(column, dtype=torch.float32) for column in columns))
    if any(len(set(column)) == 1 for column in columns):
        assert math.isnan(got)
    else:
        assert got == pytest.approx(statistics.correlation(*map(ranks, columns)), abs=1e-12)


def test_overlap_is_the_share_that_stays():
    before, now = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), torch.tensor([[0, 1, 0], [1, 0, 1]]).bool()
    assert overlap(before, now) == 2 / 3 and overlap(before, before) == 1 and overlap(before, ~before) == 0
    assert overlap(before & ~before, now & ~now) == 1


def test_groups_are_made_at_every_third_step():
    schedule, drifts, given = GroupSchedule(every=3), [], []
    for step in range(8):
        given.append(schedule.groups)
        if schedule.groups is None:
            schedule.add(spans_of(step, 2, 5), ONE)
        drifts.append(schedule.advance())
    assert [groups is None for groups in given] == [True, False, False] * 2 + [True, False]
    assert [drift is None for drift in drifts] == [True, True, True, False, True, True, False, True]
    for step, made_at in ((1, 0), (2, 0), (4, 3), (5, 3), (7, 6)):
        assert all(map(torch.equal, given[step], group_heads(spans_of(made_at, 2, 5))))
    groups = [group_heads(spans_of(step, 2, 5)) for step in (0, 3)]
    assert drifts[3] == GroupDrift(
        spearman(spans_of(0, 2, 5), spans_of(3, 2, 5)),
        overlap(groups[0].local_heads, groups[1].local_heads),
        overlap(groups[0].global_heads, groups[1].global_heads),
    )


def test_drift_by_hand():
    """Ten heads, three in each group; two heads at the lower boundary change places, and so do the outermost two."""
    before = torch.arange(10.0).view(2, 5)
    now = before.clone()
    now.view(-1)[[2, 3]] = now.view(-1)[[3, 2]]
    now.view(-1)[[8, 9]] = now.view(-1)[[9, 8]]
    schedule = GroupSchedule(every=1)
    schedule.add(before, ONE)
    assert schedule.advance() is None
    schedule.add(now, ONE)
    assert schedule.advance() == GroupDrift(pytest.approx(1 - 6 * 4 / (10 * 99)), 2 / 3, 1.0)


def test_every_step_keeps_no_groups():
    """The paper: each pass makes its own groups, and only the drift is known."""
    schedule = GroupSchedule()
    for step in range(3):
        assert schedule.groups is None
        schedule.add(spans_of(step, 4, 2, 5), torch.tensor([3, 0, 1, 7]))
        assert (schedule.advance() is None) == (step == 0)
    assert schedule.groups is None


def test_spans_are_pooled_over_tokens():
    """Seven sequences in three passes, by sequence or by pass, give the mean over all tokens."""
    spans, tokens = spans_of(0, 7, 3, 4), torch.tensor([5, 1, 0, 9, 40, 2, 3])
    pooled = (spans.double() * tokens[:, None, None]).sum(0) / 60
    states = []
    for per_pass in (False, True):
        schedule = GroupSchedule(every=2, local_fraction=0.25, global_fraction=0.5)
        for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
            given, weights = spans[part], tokens[part]
            if per_pass:
                given = ((given.double() * weights[:, None, None]).sum(0) / weights.sum()).float()
            schedule.add(given, weights.int() if per_pass else weights)
        schedule.advance()
        expected = group_heads(pooled, local_fraction=0.25, global_fraction=0.5)
        assert all(map(torch.equal, schedule.groups, expected)) and expected.local_heads.sum() == 3
        states.append(schedule.state_dict()["spans"])
        torch.testing.assert_close(states[-1].double(), pooled, rtol=2**-22, atol=0)
    assert torch.equal(states[0], pooled.float())


@pytest.mark.parametrize("stop", range(7))
def test_a_restored_schedule_goes_on_as_if_nothing_had_happened(stop):
    def steps(schedule, begin, end):
        seen = []
        for step in range(begin, end):
            groups = schedule.groups
            if groups is None:
                schedule.add(spans_of(step, 4, 2, 5), torch.tensor([3, 0, 1, 7]))
            seen.append((groups and [group.tolist() for group in groups], schedule.advance()))
        return seen

    whole = steps(GroupSchedule(every=3), 0, 8)
    stopped, restored, file = GroupSchedule(every=3), GroupSchedule(every=3), io.BytesIO()
    seen = steps(stopped, 0, stop)
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert seen + steps(restored, stop, 8) == whole


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda s: GroupSchedule(every=0), ValueError, "every must be at least 1, got 0"),
        (lambda s: GroupSchedule(every=2.0), TypeError, "every must be an int, got float: 2.0"),
        (
            lambda s: GroupSchedule(local_fraction=2),
            ValueError,
            "local_fraction must be finite and between 0.0 and 1.0, got 2",
        ),
        (lambda s: s.add([1.0], ONE), TypeError, "spans must be a tensor, got list"),
        (lambda s: s.add(torch.ones(4), ONE), ValueError, r"spans must have shape \[B, L, HQ\], got \[4\]"),
        (lambda s: s.add(torch.ones(2, 4).long(), ONE), TypeError, "spans must be torch.float32"),
        (lambda s: s.add(torch.ones(3, 2, 4), ONE), ValueError, r"tokens must have shape \[3\], got \[1\]"),
        (lambda s: s.add(torch.ones(2, 4), 7), TypeError, "tokens must be a tensor, got int: 7"),
        (lambda s: s.add(torch.ones(1, 2, 4), ONE.float()), TypeError, "tokens must be torch.int64"),
        (lambda s: (s.add(torch.ones(2, 4), ONE), s.add(torch.ones(2, 3), ONE)), ValueError, r"\[2, 4\], got \[2, 3\]"),
        (lambda s: s.advance(), RuntimeError, "without a token of R"),
        (lambda s: (s.add(torch.ones(1, 2, 4), 0 * ONE), s.advance()), RuntimeError, "without a token of R"),
        (lambda s: (s.add(None, ONE), s.advance()), RuntimeError, "without a token of R"),
        (lambda s: (s.add(torch.full((2, 4), math.nan), ONE), s.advance()), ValueError, "NaN, got 8 of 8"),
        (lambda s: (s.add(torch.ones(2, 4), ONE), s.state_dict()), RuntimeError, "middle of a calibration"),
        (lambda s: s.load_state_dict({"age": 1}), ValueError, r"state must have age and spans, got \['age'\]"),
        (lambda s: s.load_state_dict({"age": -1, "spans": None}), ValueError, "age must be at least 0, got -1"),
        (lambda s: s.load_state_dict({"age": 1, "spans": torch.ones(3)}), ValueError, r"\[L, HQ\], got \[3\]"),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make(GroupSchedule(every=2))


def test_spans_between_two_calibrations_are_refused():
    schedule = GroupSchedule(every=3)
    schedule.add(spans_of(0, 2, 5), ONE)
    schedule.advance()
    schedule.add(None, ONE)
    with pytest.raises(RuntimeError, match="at step 2 of 3, between two calibrations: give the pass groups="):
        schedule.add(spans_of(0, 2, 5), ONE)
    for _ in range(2):
        schedule.advance()
    with pytest.raises(ValueError, match=r"spans must have shape \[B, 2, 5\], got \[1, 2, 4\]"):
        schedule.add(spans_of(0, 1, 2, 4), ONE)
