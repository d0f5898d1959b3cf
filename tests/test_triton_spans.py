"""Spans from a sample of rows on the Triton backend, against the reference and alone against packed."""

import pytest
import torch
from stats_cases import assert_attention_close, assert_close_to_reference, make_case, make_values
from triton_calls import DEVICE, HALF, on_device, run, run_attention

from rhythm_kernels import attention_stats
from rhythm_kernels.statistics import triton_backend
from rhythm_kernels.statistics.triton_tiles import FP32, INTERPRETED, TARGETS, Tile

pytestmark = pytest.mark.slow
TOKENS = 200
CUTS = torch.tensor([0, 0, 31, 40, TOKENS])
RESPONSE = (torch.arange(TOKENS) % 3 > 0)[None]
CASES = {
    "plain": (1, {}),
    "packed": (1, {"cu_seqlens": CUTS, "response_mask": RESPONSE, "sliding_window": 90}),
    "padded": (2, {"attention_mask": torch.arange(TOKENS) >= torch.tensor([[15], [120]]), "softcap": 5.0}),
    "no rows": (1, {"response_mask": torch.zeros(1, TOKENS, dtype=torch.bool), "sinks": torch.tensor([0.0, 2.0])}),
}
LARGE = {"rows": Tile(128, 32, 1, 1), "sampled": Tile(64, 32, 1, 1), "forward": Tile(128, 32, 1, 1)}


@pytest.fixture(params=[{}, LARGE], ids=["small tiles", "tiles of two blocks"])
def tiles(request, monkeypatch):
    """Interprets the kernels with tiles that are parts of a block, or two blocks as on an H100."""
    if DEVICE == "cuda" and request.param:
        pytest.skip("a GPU has tiles of its own")
    monkeypatch.setattr(triton_backend, "INTERPRETED", INTERPRETED._replace(**request.param))


@pytest.mark.parametrize("batch, options", CASES.values(), ids=CASES.keys())
def test_every_path_reads_the_sample_of_the_reference(tiles, batch, options):
    for lse_given in (False, True):
        case = make_case((batch, 2, TOKENS, 16), 1, dtype=HALF, lse_given=lse_given, span_rows=64, **options)
        assert_close_to_reference(run(case), case)
    v = make_values(case, 16)
    assert_attention_close(*run_attention(case, v), case, v)


@pytest.mark.parametrize("lse_given", [False, True])
def test_a_sequence_has_the_same_spans_alone_and_packed(tiles, lse_given):
    case = make_case((1, 3, TOKENS, 16), 1, lse_given=lse_given, span_rows=64, cu_seqlens=CUTS, response_mask=RESPONSE)
    together = run(case).span
    assert (together[0] == 0).all() and (together[1:] > 0).all()
    for sequence in (2, 3):  # all rows of the first are sampled, which the host knows if it is alone
        begin, end = CUTS[sequence : sequence + 2].tolist()
        q, k = (on_device(x[:, :, begin:end]) for x in (case.q, case.k))
        options = {"response_mask": on_device(RESPONSE[:, begin:end].contiguous())}
        if lse_given:
            options["lse"] = on_device(case.kwargs["lse"][:, :, begin:end])
        alone = attention_stats(q, k, span_rows=64, **options, backend="triton").span.cpu()
        assert torch.equal(together[sequence], alone[0])


@pytest.mark.parametrize("lse_given", [False, True])
def test_a_broken_row_counts_only_in_the_sample(tiles, lse_given):
    case = make_case((1, 2, TOKENS, 16), 2, lse_given=lse_given, span_rows=64)
    exact = run(case).span
    row = torch.tensor([64 + 3])  # of the second of four blocks, of which the third is read
    broken = run(case._replace(q=case.q.index_fill(2, row, torch.nan)))
    if lse_given and DEVICE == "cpu":
        assert torch.equal(broken.span, exact)
    torch.testing.assert_close(broken.span, exact)
    case.q[0, 0, 128 + 3] = torch.nan
    read = run(case)
    assert read.span[0, 0].isnan() and torch.equal(read.span[0, 1], exact[0, 1])


def test_tiles_fit_blocks():
    """A sampled tile is a part of a block; totals are kept for a block or for parts of it."""
    for chosen in [FP32, INTERPRETED, *(tiles for target in TARGETS.values() for tiles in target)]:
        assert 64 % chosen.sampled.block_m == 0
        assert all(64 % tile.block_m == 0 or tile.block_m % 64 == 0 for tile in (chosen.rows, chosen.forward))
