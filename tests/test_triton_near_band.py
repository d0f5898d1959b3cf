"""The band pass for short windows and horizons, over several tiles and runs, against fp64 and the general band pass."""

import pytest
import torch
from stats_cases import make_case
from triton_calls import DEVICE, HALF, check, outputs

from benchmarks.launches import TARGETS
from rhythm_kernels.statistics import triton_backend, triton_band
from rhythm_kernels.statistics.triton_tiles import INTERPRETED, NearBandTile, choose_tiles

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs every test with its own tiles")
SMALL = NearBandTile(block=16, run=2, warps=1, stages=1)


def mask(tokens: int, *spans: tuple[int, int]) -> torch.Tensor:
    position = torch.arange(tokens)
    return torch.stack([(position >= begin) & (position < end) for begin, end in spans]).any(0)[None]


def batch(tokens: int, *spans: tuple[int, int]) -> torch.Tensor:
    return torch.cat([mask(tokens, span) for span in spans])


# (q [B, HQ, T, D], H, options); a run has 32 tokens
CASES = {
    "several runs": ((1, 2, 110, 16), 1, {}),
    "whole runs": ((1, 2, 64, 16), 1, {}),
    "one token behind a run": ((1, 2, 65, 16), 1, {}),
    "packed": ((1, 2, 150, 16), 1, {"cu_seqlens": torch.tensor([0, 0, 31, 32, 80, 150], dtype=torch.int32)}),
    "padded": ((3, 2, 90, 16), 1, {"attention_mask": batch(90, (40, 90), (0, 33), (0, 90))}),
    "rows behind a run alone": ((1, 2, 90, 16), 1, {"response_mask": mask(90, (34, 36), (70, 71))}),
    "a run that nothing looks at": ((1, 2, 110, 16), 1, {"response_mask": mask(110, (100, 110))}),
    "the longest reach": ((1, 2, 110, 16), 1, {"window": 17, "horizon": (0, 16)}),
    "the shortest reach": ((1, 2, 70, 16), 1, {"window": 1, "horizon": (16, 16)}),
    "sliding window": ((1, 2, 110, 16), 1, {"sliding_window": 6, "horizon": (2, 50)}),
    "all options": (
        (1, 4, 110, 40),
        2,
        {"sliding_window": 12, "softcap": 5.0, "sinks": torch.arange(4.0), "response_mask": mask(110, (20, 90))},
    ),
}
REACH = {"window": 10, "horizon": (4, 14)}


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Uses tiles of 16 tokens, and returns the names of the kernels that the band pass launches from then on."""
    monkeypatch.setattr(triton_backend, "INTERPRETED", INTERPRETED._replace(near_band=SMALL))
    names = []

    class Counted:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(triton_band, name)

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name in ("band_kernel", "near_band_kernel"):
        monkeypatch.setattr(triton_band, name, Counted(name))
    return names


@pytest.mark.parametrize("call", ["statistics", "groups"])
@pytest.mark.parametrize("shape, key_heads, options", CASES.values(), ids=CASES.keys())
def test_against_fp64(shape, key_heads, options, call, launched):
    case = make_case(shape, key_heads, dtype=HALF, lse_given=True, **{**REACH, **options})
    check(call, case)
    assert set(launched) == {"near_band_kernel"}


@pytest.mark.parametrize("reach", [{"window": 18}, {"horizon": (4, 17)}, {"horizon": (1, None)}], ids=str)
def test_a_longer_reach_takes_the_general_pass(reach, launched):
    check("statistics", make_case((1, 2, 70, 16), 1, dtype=HALF, lse_given=True, **{**REACH, **reach}))
    assert set(launched) == {"band_kernel"}


def test_a_sequence_in_a_batch_has_the_bits_that_it_has_alone(launched):
    alone = make_case((1, 2, 70, 16), 1, dtype=HALF, lse_given=True, **REACH)
    cuts = torch.tensor([0, 37, 107, 150], dtype=torch.int32)
    wide = make_case((1, 2, 150, 16), 1, dtype=HALF, lse_given=True, cu_seqlens=cuts, **REACH)
    for x, y in zip((wide.q, wide.k, wide.kwargs["lse"]), (alone.q, alone.k, alone.kwargs["lse"]), strict=True):
        x[:, :, 37:107] = y
    together = outputs("statistics", wide)
    for name, x in outputs("statistics", alone).items():
        assert torch.equal(x, together[name].narrow(-1, 37, 70)), name


def test_padding_and_prompts_are_zero(launched):
    """Outside of R WAAD and the log-sum-exp are 0, and in padding FAI too, whatever the memory held."""
    options = {"attention_mask": batch(90, (0, 20), (0, 90)), "response_mask": batch(90, (0, 20), (80, 90))}
    case = make_case((2, 2, 90, 16), 1, dtype=HALF, lse_given=True, **REACH, **options)
    case.kwargs["lse"][~options["response_mask"][:, None].expand(-1, 2, -1)] = torch.nan
    out = outputs("statistics", case)
    outside = ~options["response_mask"][:, None].expand(-1, 2, -1)
    assert not out["waad"][outside].any() and not out["lse"][outside].any()
    assert not out["fai"][0, :, 20:].any() and not out["fai"][1, :, :66].any()


@pytest.mark.parametrize("target", TARGETS)
def test_credit_has_near_tiles_where_the_table_names_them(target):
    """The window and horizon of credit fit the tiles of an H100."""
    near = [choose_tiles(target, size, size, 16).near_band for size in (64, 128)]
    assert all(tile is not None and tile.block >= 50 for tile in near) == (target == 90)
