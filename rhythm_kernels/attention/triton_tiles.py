"""Tile sizes of the Triton kernels: one table, by target, and why."""

from typing import NamedTuple

MAX_HEAD_SIZE = 256


class Tile(NamedTuple):
    """One launch: a tile of block_m rows by block_n keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    rows: Tile
    waad: Tile
    fai: Tile


# The band's kernels load far more than they compute: small tiles leave little outside the window (W + 63 keys for 64
# rows) and the horizon (hi - lo + 64 rows for 64 keys), and their few registers let 3 to 7 programs of 4 warps share an
# SM. Two stages are all that a loop of two or three turns fills.
_BAND_SMALL = {"waad": Tile(64, 32, 4, 2), "fai": Tile(64, 32, 4, 2)}
_BAND = {"waad": Tile(64, 32, 4, 2), "fai": Tile(64, 64, 4, 2)}

# Compute capability (from this one up to the next) -> (head sizes to 128, to 256).
TARGETS = {
    # mma.sync keeps operands in registers, and sm_86, sm_89 and sm_120 have 99 KB of shared memory: 64 rows.
    80: (
        Tiles(rows=Tile(64, 64, 4, 3), **_BAND_SMALL),
        Tiles(rows=Tile(64, 32, 4, 2), **_BAND_SMALL),
    ),
    # Two programs of one warpgroup an SM, so that the softmax of one hides behind the wgmma of the other; 128 rows,
    # since with 64 the keys would come from L2 faster than L2 can give. Head size 256 leaves shared memory for one.
    90: (
        Tiles(rows=Tile(128, 64, 4, 3), **_BAND),
        Tiles(rows=Tile(128, 64, 8, 2), **_BAND),
    ),
    # tcgen05 brings scores back through registers: 4 warps would need all 255.
    100: (
        Tiles(rows=Tile(128, 64, 8, 3), **_BAND),
        Tiles(rows=Tile(128, 64, 8, 2), **_BAND),
    ),
}
TARGETS[120] = TARGETS[80]

# fp32 without TF32 runs on the FMA units, unrolled over the head size: larger tiles spill.
FP32 = Tiles(*[Tile(16, 16, 4, 2)] * 3)

# The interpreter's time goes by operations, not by elements; short tests should cross many borders.
INTERPRETED = Tiles(rows=Tile(32, 16, 1, 1), waad=Tile(16, 32, 1, 1), fai=Tile(16, 32, 1, 1))


def choose_tiles(capability: int, head_size: int, bits: int) -> Tiles:
    """The tiles for a compute capability (90 for 9.0) and inputs of 16 or 32 bits."""
    if bits == 32:
        return FP32
    target = max((target for target in TARGETS if target <= capability), default=80)
    return TARGETS[target][head_size > 128]
