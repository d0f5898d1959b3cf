"""Tile sizes of the Triton kernels: one table, by target, and why."""

from typing import NamedTuple

MAX_HEAD_SIZE = {16: 256, 32: 128}  # by the bits of the inputs
MAX_TOKEN_STRIDE = 1 << 23  # elements: inside a tile of up to 256 tokens, offsets are int32


class Tile(NamedTuple):
    """A tile of block_m rows by block_n keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    max_registers: int | None = None
    """A thread's; None leaves them to the compiler."""


class BandTile(NamedTuple):
    """A tile of so many tokens, as rows and as keys; keys before it come `least_before` at a time, or more."""

    block: int
    least_before: int
    warps: int
    stages: int
    max_registers: int | None = None
    in_turns: bool = False
    """Whether keys before and rows behind are loaded in loops also where one turn suffices, and not ahead of all work:
    for targets on which that many registers spill."""


class Tiles(NamedTuple):
    rows: Tile
    forward: Tile
    band: BandTile


# The band loads far more than it computes: 64 tokens leave little outside the horizon (hi + 64 rows for 64 keys). Two
# stages are all that a loop of one or two turns fills.
_BAND = BandTile(64, 16, 4, 2)
# The compiler takes up to 222 registers where it spills none with 168, and then three programs share an SM of an H100.
_BAND_90 = BandTile(64, 16, 4, 2, max_registers=168)

# Compute capability (from this one up to the next) -> head sizes to 64; to 128; to 192 with values to 128; to 256.
TARGETS = {
    # mma.sync keeps operands in registers, and sm_86, sm_89 and sm_120 have 99 KB of shared memory. With v, few keys at
    # a time leave registers for 128 rows of output.
    80: (
        Tiles(rows=Tile(64, 64, 4, 3), forward=Tile(128, 32, 4, 3), band=_BAND),
        Tiles(rows=Tile(64, 64, 4, 3), forward=Tile(128, 32, 8, 3), band=_BAND._replace(in_turns=True)),
        Tiles(rows=Tile(64, 32, 4, 2), forward=Tile(64, 16, 8, 2), band=BandTile(64, 16, 8, 2, in_turns=True)),
        Tiles(rows=Tile(64, 32, 4, 2), forward=Tile(64, 16, 8, 2), band=BandTile(64, 16, 8, 2, in_turns=True)),
    ),
    # Rows: two programs of one warpgroup an SM, so that the softmax of one hides behind the wgmma of the other; 128,
    # since with 64 the keys would come from L2 faster than L2 can give. With v, scores and output take the registers of
    # two warpgroups; each has 64 rows, since with fewer both would compute the same. Heads of 64 fit 168 registers, and
    # so three programs, where the compiler would take up to 222.
    90: (
        Tiles(rows=Tile(128, 64, 4, 3, max_registers=168), forward=Tile(128, 64, 8, 3), band=_BAND_90),
        Tiles(rows=Tile(128, 64, 4, 3), forward=Tile(128, 64, 8, 3), band=_BAND_90),
        Tiles(rows=Tile(128, 64, 8, 2), forward=Tile(128, 64, 8, 2), band=_BAND),
        Tiles(rows=Tile(128, 64, 8, 2), forward=Tile(128, 16, 8, 2), band=_BAND),
    ),
    # tcgen05 brings scores back through registers: 4 warps would need all 255.
    100: (
        Tiles(rows=Tile(128, 64, 8, 3), forward=Tile(128, 64, 8, 3), band=_BAND),
        Tiles(rows=Tile(128, 64, 8, 3), forward=Tile(128, 32, 8, 3), band=_BAND),
        Tiles(rows=Tile(128, 64, 8, 2), forward=Tile(64, 32, 8, 2), band=_BAND._replace(in_turns=True)),
        Tiles(rows=Tile(128, 64, 8, 2), forward=Tile(64, 32, 8, 2), band=_BAND._replace(in_turns=True)),
    ),
}
TARGETS[120] = TARGETS[80]

# fp32 without TF32 runs on the FMA units, unrolled over the head size: larger tiles and larger heads spill.
FP32 = Tiles(rows=Tile(16, 16, 4, 2), forward=Tile(32, 16, 8, 2), band=BandTile(16, 16, 4, 2))

# The interpreter's time goes by operations, not by elements; short tests should cross many borders.
INTERPRETED = Tiles(rows=Tile(32, 16, 1, 1), forward=Tile(16, 32, 1, 1), band=BandTile(32, 16, 1, 1))


def choose_tiles(capability: int, head_size: int, value_size: int, bits: int) -> Tiles:
    """The tiles for a compute capability (90: 9.0), sizes of q's and v's heads (0: no v), inputs of 16 or 32 bits."""
    if bits == 32:
        return FP32
    target = max((target for target in TARGETS if target <= capability), default=80)
    bounds = ((64, 64), (128, 128), (192, 128), (256, 256))
    fits = [head_size <= size and value_size <= value for size, value in bounds]
    return TARGETS[target][fits.index(True)]
