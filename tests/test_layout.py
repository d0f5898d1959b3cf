"""The tables that a layout gives, with and without a look at R: `make_layout`, `Layout` and `probed_rows`."""

import pytest
import torch

from benchmarks.pretended_cuda import counted, pretended_cuda
from rhythm_kernels.statistics.layout import Layout, make_layout
from rhythm_kernels.statistics.probes import probed_rows

CPU = torch.device("cpu")
TOKENS = 23
KINDS = {
    "one": (1, {}),
    "batch": (3, {}),
    "packed": (1, {"cu_seqlens": torch.tensor([0, 0, 1, 9, 9, 22, TOKENS])}),
    "padded": (4, {"attention_mask": torch.arange(TOKENS) >= torch.tensor([[0], [5], [TOKENS], [22]])}),
    "padded on the right": (2, {"attention_mask": torch.arange(TOKENS) < torch.tensor([[7], [TOKENS]])}),
}
HORIZONS = [(10, 50), (1, None), (0, 0), (0, 3), (4, 4), (2, 10**12), (10**12, None), (10**12, 10**12 + 5)]


def tables(layout: Layout) -> dict[object, torch.Tensor]:
    """Returns all that follows from R."""
    back = {horizon: layout.rows_looking_back(horizon) for horizon in HORIZONS}
    probed = {f"{most} probes": probed_rows(layout, most) for most in (12, 2, 1)}
    rest = {"counts": layout.row_counts(), "next": layout.next_row(), "end": layout.row_end(), "rows": layout.rows}
    return back | probed | rest


@pytest.mark.parametrize("batch, kind", KINDS.values(), ids=KINDS)
def test_sequences_are_told_apart(batch, kind):
    layout = make_layout(batch, TOKENS, CPU, **kind)
    for row in range(batch):
        own = [(first, end, index) for index, (b, first, end) in enumerate(layout.bounds) if b == row]
        for token in range(TOKENS):
            place = [(first, end - 1, index) for first, end, index in own if first <= token < end]
            first, last, index = place[0] if place else (token + 1, token - 1, row)
            got = (int(x[row, token]) for x in (layout.first, layout.last, layout.segments, layout.rows))
            assert tuple(got) == (first, last, index, bool(place)), (row, token)
    assert layout.table.tolist() == [list(bounds) for bounds in layout.bounds]
    assert (layout.first.dtype, layout.last.dtype, layout.segments.dtype) == (torch.int32, torch.int32, torch.int64)
    assert all(x.is_contiguous() for x in (layout.first, layout.last, layout.segments, layout.rows))


@pytest.mark.parametrize("batch, kind", KINDS.values(), ids=KINDS)
def test_what_follows_from_bounds_is_what_follows_from_rows(batch, kind):
    """Without a mask of R the tables are made from the bounds, with one of ones from its values."""
    known = make_layout(batch, TOKENS, CPU, **kind)
    looked_at = make_layout(batch, TOKENS, CPU, torch.ones(batch, TOKENS, dtype=torch.bool), **kind)
    assert known.whole and not looked_at.whole
    pairs = [(known, looked_at)]
    if "cu_seqlens" not in kind and batch > 1:
        pairs.append((known.slice(slice(1, batch)), looked_at.slice(slice(1, batch))))
    for mine, other in pairs:
        others = tables(other)
        for name, x in tables(mine).items():
            assert x.dtype == others[name].dtype and torch.equal(x, others[name]), name


@pytest.mark.parametrize("batch, kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("is_whole", [True, False], ids=["every token", "some rows"])
def test_tables_are_those_of_their_definitions(batch, kind, is_whole):
    mask = None if is_whole else torch.rand(batch, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.5
    layout = make_layout(batch, TOKENS, CPU, mask, **kind)
    assert is_whole or torch.equal(layout.rows, mask & (layout.first <= layout.last))
    for row in range(batch):
        rows = layout.rows[row].nonzero().flatten().tolist()
        assert layout.next_row()[row].tolist() == [
            min((t for t in rows if t >= s), default=TOKENS) for s in range(TOKENS + 1)
        ]
        assert layout.row_end()[row].tolist() == [
            max((t + 1 for t in rows if t < s), default=0) for s in range(TOKENS + 1)
        ]
        for lo, hi in HORIZONS:
            back = layout.rows_looking_back((lo, hi))[row].tolist()
            for s in range(TOKENS):
                last = int(layout.last[row, s])
                count = sum(s + lo <= t <= last and (hi is None or t <= s + hi) for t in rows)
                assert back[s] == max(count, 1), (row, s, lo, hi)
    for (row, begin, end), count, probed in zip(layout.bounds, layout.row_counts(), probed_rows(layout), strict=True):
        rows = (layout.rows[row, begin:end].nonzero().flatten() + begin).tolist()
        assert count == len(rows)
        if rows:
            assert probed[0] == rows[0] and probed[-1] == rows[-1] and set(probed.tolist()) <= set(rows)
        else:
            assert (probed == -1).all()


def test_a_given_mask_is_not_the_rows_themselves():
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    layout = make_layout(1, TOKENS, CPU, mask)
    mask[:] = False
    assert layout.rows.all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is pretended")
@pytest.mark.parametrize("name, most", [("one", 12), ("packed", 14), ("padded", 38)])
def test_tables_take_few_launches(name, most):
    """On a GPU a layout takes some launches, and not one for each step of the definitions."""
    batch, kind = KINDS[name]
    with pretended_cuda() as device, counted() as work:
        layout = make_layout(batch, TOKENS, device, **kind)
        layout.rows_looking_back((10, 50))
        layout.next_row(), layout.row_end(), layout.row_counts(), probed_rows(layout)
    assert work.launches.total() <= most, work.launches
    assert not work.waits, work.waits
