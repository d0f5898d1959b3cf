"""Spans from a sample of rows: which rows are read, and the same definition in every path of the torch backend."""

import itertools
import math

import pytest
import torch
from stats_cases import (
    assert_attention_close,
    assert_close_to_reference,
    make_case,
    make_values,
    reference_stats,
    rows_of,
    segments_of,
)

from rhythm_kernels import attention, attention_stats, reference
from rhythm_kernels.statistics import blockwise_sample
from rhythm_kernels.statistics.layout import make_layout
from rhythm_kernels.statistics.spans import mean_over_rows, sampled_rows, span_sample

LENGTHS = (1, 700, 0, 64, 333, 65)
HEADS = 5


def some_rows(*shape, seed=0):
    """Returns a response mask with holes, long gaps and blocks with one row."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(*shape[:-1], math.ceil(shape[-1] / 50), 1, generator=generator) < 0.7
    rows = torch.rand(*blocks.shape[:-1], 50, generator=generator) < torch.rand(*blocks.shape, generator=generator) ** 3
    return (rows & blocks).flatten(-2)[..., : shape[-1]]


def padded(x, by):
    """Returns x [T], [HQ, T] or [HQ, T, D] with so many tokens more on the left and on the right."""
    return torch.nn.functional.pad(x, (0, 0, *by) if x.dim() == 3 else by)


def batches(values, rows):
    """Yields (values [B, HQ, T, ...], rows [B, T], masks) of the sequences packed, and padded on either side."""
    bounds, width = torch.tensor([0, *LENGTHS]).cumsum(0), max(LENGTHS)
    yield torch.cat(values, 1)[None], torch.cat(rows)[None], {"cu_seqlens": bounds}
    for left in (False, True):
        pads = [(width - n, 0) if left else (0, width - n) for n in LENGTHS]
        x, r, mask = (
            torch.stack([padded(y, by) for y, by in zip(ys, pads, strict=True)])
            for ys in (values, rows, [torch.ones(n, dtype=torch.bool) for n in LENGTHS])
        )
        yield x, r, {"attention_mask": mask}


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 16, 61])
def test_the_blocks_are_distinct_and_spread(most):
    """The i-th block lies in the i-th of K equal parts, and none is read twice.

    Two neighbours differ by A / K > 1 before they are rounded down, so they differ after it too.
    """
    for active in range(most + 1, 8 * most + 200):
        places = [(2 * i + 1) * active // (2 * most) for i in range(most)]
        assert all(before < after for before, after in itertools.pairwise(places))
        assert all(i * active // most <= place < (i + 1) * active / most for i, place in enumerate(places))
        assert abs(sum(places) / most - (active - 1) / 2) <= 0.5  # the mean position is that of all blocks


@pytest.mark.parametrize("span_rows", [64, 128, 192, 320, 1024, None])
def test_the_sample_is_that_of_the_reference_alone_and_in_any_batch(span_rows):
    rows = [some_rows(n, seed=i) for i, n in enumerate(LENGTHS)]
    for _, r, masks in batches([torch.zeros(HEADS, n) for n in LENGTHS], rows):
        layout = make_layout(len(r), r.shape[1], r.device, r, **masks)
        segments = reference.segment_ids(len(r), r.shape[1], **masks)
        sample = reference.span_sample(layout.rows, segments, len(LENGTHS), span_rows)
        if span_rows is not None:
            assert torch.equal(sampled_rows(layout, span_rows), sample)
            counts = [(sample & (segments == s)).sum() for s in range(len(LENGTHS))]
            assert torch.equal(span_sample(layout, span_rows).row_counts, torch.stack(counts))
        for sequence, own_rows in enumerate(rows):
            alone = torch.zeros(1, len(own_rows), dtype=torch.long)
            own_sample = reference.span_sample(own_rows[None], alone, 1, span_rows)
            assert torch.equal(sample[segments == sequence], own_sample[0])


@pytest.mark.parametrize(
    "span_rows, read", [(64, [5]), (128, [3, 7]), (192, [1, 5, 8]), (576, [0, 1, 3, 4, 5, 6, 7, 8, 9])]
)
def test_the_sample_by_hand(span_rows, read):
    """10 blocks, the third without a row, leave 9 active ones: with K = 2 the numbers 9 // 4 = 2 and 27 // 4 = 6.

    They are the blocks 3 and 7, since both lie behind the hole.
    """
    rows = torch.ones(1, 640, dtype=torch.bool)
    rows[:, 128:192] = False
    sample = sampled_rows(make_layout(1, 640, rows.device, rows), span_rows).view(10, 64)
    assert torch.equal(sample.all(-1), sample.any(-1))
    assert sample.any(-1).nonzero().flatten().tolist() == read


@pytest.mark.parametrize("span_rows", [64, 192, 448])
def test_the_mean_over_a_sample_is_the_same_alone_and_in_any_batch(span_rows):
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(HEADS, n, generator=generator) * 10 ** (i - 2.0) for i, n in enumerate(LENGTHS)]
    rows = [some_rows(n, seed=i) for i, n in enumerate(LENGTHS)]
    values[1][2, rows[1].nonzero()[0]] = torch.nan
    values = [x.masked_fill(~r, 0.0) for x, r in zip(values, rows, strict=True)]

    def mean(x, r, **masks):
        return mean_over_rows(x, make_layout(len(x), x.shape[2], x.device, r, **masks), span_rows)

    alone = torch.cat([mean(x[None], r[None]) for x, r in zip(values, rows, strict=True)])
    assert alone.isnan().sum() <= 1 and (alone > 0).sum() > HEADS
    for x, r, masks in batches(values, rows):
        assert torch.equal(mean(x, r, **masks).nan_to_num(-1), alone.nan_to_num(-1))


CASES = {
    "plain": ((2, 4, 500, 16), 2, {}),
    "few rows": ((2, 3, 700, 16), 3, {"response_mask": some_rows(2, 700)}),
    "packed": ((1, 6, 640, 8), 2, {"cu_seqlens": torch.tensor([0, 30, 30, 500, 640])}),
    "padded left": ((2, 2, 400, 20), 1, {"attention_mask": torch.arange(400) >= torch.tensor([[0], [130]])}),
    "no rows": ((1, 2, 300, 8), 1, {"response_mask": torch.zeros(1, 300, dtype=torch.bool)}),
    "window": ((1, 4, 500, 16), 4, {"sliding_window": 100, "response_mask": some_rows(1, 500)}),
    "cap and sinks": ((1, 4, 500, 16), 2, {"softcap": 5.0, "sinks": torch.tensor([0.0, 3.0, -2.0, 1.0])}),
    "open horizon": ((1, 2, 400, 16), 2, {"horizon": (1, None)}),
    "one token": ((1, 2, 1, 16), 2, {}),
    "no token": ((1, 2, 0, 16), 2, {}),
}


@pytest.mark.parametrize("span_rows", [64, 256, 512])
@pytest.mark.parametrize("shape, key_heads, options", CASES.values(), ids=CASES.keys())
def test_every_path_reads_the_sample_of_the_reference(shape, key_heads, options, span_rows):
    for lse_given in (False, True):
        case = make_case(shape, key_heads, lse_given=lse_given, sharpness=2.0, span_rows=span_rows, **options)
        assert_close_to_reference(attention_stats(case.q, case.k, **case.kwargs, backend="torch"), case)
    v = make_values(case, 5)
    out, stats = attention(case.q, case.k, v, **case.options("lse"), backend="torch")
    assert_attention_close(out, stats, case, v)


def test_a_sample_is_read_in_parts_where_the_memory_is_small(monkeypatch):
    case = make_case((1, 6, 640, 8), 2, lse_given=True, span_rows=128, cu_seqlens=torch.tensor([0, 30, 500, 640]))
    for kilobytes in (8, 50, 400):
        monkeypatch.setattr(blockwise_sample, "SCORES", kilobytes << 8)
        assert_close_to_reference(attention_stats(case.q, case.k, **case.kwargs, backend="torch"), case)


def test_scores_may_be_far_from_0_and_change_nothing_of_a_sequence_beside_them():
    """The exponentials of such scores alone are 0 or infinite in fp32."""
    offsets = torch.tensor([[0.0, 0.0, 0.0], [300.0, 0.0, -300.0]])  # of all scores, in each sequence and head
    case = make_case((2, 3, 400, 16), 1, span_rows=128)
    case.q[..., 0], case.k[..., 0] = offsets[..., None] * 4, 1.0  # the scale is 1 / 4
    lse = reference_stats(case).lse.float()
    case.kwargs["lse"] = lse
    stats = attention_stats(case.q, case.k, **case.kwargs, backend="torch")
    assert_close_to_reference(stats, case)
    alone = attention_stats(case.q[:1], case.k[:1], lse=lse[:1], span_rows=128, backend="torch")
    assert torch.equal(stats.span[0], alone.span[0])


@pytest.mark.parametrize("size", [24, 64])
def test_a_long_sequence_has_the_same_span_alone_and_in_any_batch(size):
    """Its blocks of rows are read one by one, so that no product has another shape."""
    rows = [some_rows(n, seed=i) for i, n in enumerate(LENGTHS)]
    generator = torch.Generator().manual_seed(0)
    queries, keys = ([torch.randn(heads, n, size, generator=generator) for n in LENGTHS] for heads in (6, 2))

    def span(q, k, lse, r, **masks):
        return attention_stats(q, k, lse=lse, response_mask=r, span_rows=64, backend="torch", **masks).span

    lse = [attention_stats(q[None], k[None], backend="torch").lse[0] for q, k in zip(queries, keys, strict=True)]
    alone = torch.cat([span(*(x[None] for x in inputs)) for inputs in zip(queries, keys, lse, rows, strict=True)])
    inputs = [[x for x, _, _ in batches(values, rows)] for values in (queries, keys, [x[..., None] for x in lse])]
    for i, (_, r, masks) in enumerate(batches(queries, rows)):
        got = span(inputs[0][i], inputs[1][i], inputs[2][i][..., 0], r, **masks)
        for sequence, n in enumerate(LENGTHS):
            if n > 64:
                assert torch.equal(got[sequence], alone[sequence]), n
    assert (alone[[1, 4]] > 0).all()


@pytest.mark.parametrize("lse_given", [False, True])
def test_rows_beside_the_sample_change_no_span(lse_given):
    """With a known log-sum-exp they are not even read; all heads share keys, so only queries are broken."""
    case = make_case((2, 3, 600, 8), 3, lse_given=lse_given, span_rows=128, response_mask=some_rows(2, 600))
    sample = reference.span_sample(rows_of(case), segments_of(case), 2, 128)
    broken = case._replace(q=case.q.masked_fill(~sample[:, None, :, None], math.nan))
    assert 0 < sample.sum() < rows_of(case).sum()
    lse = broken.kwargs.pop("lse", None)
    layout_options = {name: x for name, x in broken.kwargs.items() if name != "span_rows"}
    whole = attention_stats(case.q, case.k, lse=lse, span_rows=128, **layout_options)
    if lse is None:
        spans = attention_stats(broken.q, case.k, span_rows=128, **layout_options).span
    else:  # without the check of the log-sum-exp, which reads two rows of each sequence
        spans = spans_of(broken.q, case.k, lse, span_rows=128, **layout_options)
    torch.testing.assert_close(spans, whole.span)
    case.q[1, 2, sample[1].nonzero()[3]] = math.nan
    spans = spans_of(case.q, case.k, lse, span_rows=128, **layout_options)
    assert spans[1, 2].isnan() and spans.isnan().sum() == 1


def spans_of(q, k, lse, *, span_rows, response_mask):
    """Returns the spans of `run_stats`."""
    from rhythm_kernels.statistics.api import run_stats
    from rhythm_kernels.statistics.options import check_options

    options = check_options(q, k, None, 10, (10, 50), None, None, None, True, span_rows)
    return run_stats(q, k, lse, make_layout(*q.shape[::2], q.device, response_mask), options, "torch").span


@pytest.mark.parametrize(
    "span_rows, error, text",
    [
        (0, ValueError, "span_rows must be at least 64, got 0"),
        (100, ValueError, "span_rows must be a multiple of 64, or None for all rows, got 100"),
        (512.0, TypeError, r"span_rows must be an int, got float: 512\.0"),
        (True, TypeError, "span_rows must be an int, got bool: True"),
    ],
)
def test_a_wrong_number_of_rows_is_refused(span_rows, error, text):
    q = torch.zeros(1, 2, 8, 4)
    with pytest.raises(error, match=text):
        attention_stats(q, q, span_rows=span_rows)
    with pytest.raises(error, match=text):
        attention(q, q, q, span_rows=span_rows)
