"""The tile sizes of the Triton kernels: one table by target, with reasons."""

from typing import NamedTuple

MAX_HEAD_SIZE = {16: 256, 32: 128}  # by the bits of the inputs
MAX_TOKEN_STRIDE = 1 << 23  # elements: offsets inside a tile of up to 256 tokens are int32


class Tile(NamedTuple):
    """A tile of the forward pass: block_m rows by block_n keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    max_registers: int | None = None
    """The limit of a thread; None leaves it to the compiler."""


class BandTile(NamedTuple):
    """A tile of the band pass: `block` tokens, which are its rows and its keys."""

    block: int
    least_before: int
    """The keys before the tile are read at least so many at a time."""
    warps: int
    stages: int
    max_registers: int | None = None
    in_turns: bool = False
    """Whether keys before the tile and rows behind it are always loaded in loops.

    Otherwise they are loaded ahead of all work where one turn suffices, which takes more registers than some targets
    have.
    """


class NearBandTile(NamedTuple):
    """A tile of the band pass where window and horizon reach no further than `block` tokens."""

    block: int
    run: int
    """The tiles that a program walks over. A longer run repeats less work at its beginning, a shorter one leaves fewer
    SMs without work at the end."""
    warps: int
    stages: int
    max_registers: int | None = None


class Tiles(NamedTuple):
    """The tiles of all passes for one target, head size and dtype."""

    rows: Tile
    """The forward pass without v."""
    forward: Tile
    """The forward pass with v."""
    band: BandTile
    near_band: NearBandTile | None = None
    """None leaves the near band to the general band pass."""


# The band loads far more than it computes. A tile of 64 tokens loads little outside the horizon (hi + 64 rows for 64
# keys). A loop of one or two turns fills no more than two stages.
_BAND = BandTile(64, 16, 4, 2)
# The compiler would take up to 222 registers. It spills none with 168, and then three programs share an SM of an H100.
_BAND_90 = BandTile(64, 16, 4, 2, max_registers=168)

# Compute capability (from this one up to the next) -> head sizes to 64; to 128; to 192 with values to 128; to 256.
TARGETS = {
    # mma.sync keeps operands in registers, and sm_86, sm_89 and sm_120 have 99 KB of shared memory. With v, tiles with
    # few keys leave registers for 128 rows of output.
    80: (
        Tiles(rows=Tile(64, 64, 4, 3), forward=Tile(128, 32, 4, 3), band=_BAND),
        Tiles(rows=Tile(64, 64, 4, 3), forward=Tile(128, 32, 8, 3), band=_BAND._replace(in_turns=True)),
        Tiles(rows=Tile(64, 32, 4, 2), forward=Tile(64, 16, 8, 2), band=BandTile(64, 16, 8, 2, in_turns=True)),
        Tiles(rows=Tile(64, 32, 4, 2), forward=Tile(64, 16, 8, 2), band=BandTile(64, 16, 8, 2, in_turns=True)),
    ),
    # Rows: an SM holds two programs of one warpgroup, so that the softmax of one hides behind the wgmma of the other.
    # They have 128 rows, since 64 would read keys faster than L2 can give them. With v, scores and output take the
    # registers of two warpgroups. Each has 64 rows, since with fewer both would compute the same. Heads of 64 fit 168
    # registers, and so three programs, where the compiler would take up to 222.
    90: (
        Tiles(Tile(128, 64, 4, 3, max_registers=168), Tile(128, 64, 8, 3), _BAND_90, NearBandTile(64, 8, 8, 2, 128)),
        Tiles(
            rows=Tile(128, 64, 8, 3), forward=Tile(128, 64, 8, 3), band=_BAND_90, near_band=NearBandTile(64, 8, 8, 2)
        ),
        Tiles(rows=Tile(128, 64, 8, 2), forward=Tile(128, 64, 8, 2), band=_BAND),
        Tiles(rows=Tile(128, 64, 8, 2), forward=Tile(128, 16, 8, 2), band=_BAND),
    ),
    # tcgen05 returns scores through registers: 4 warps would need all 255.
    100: (
        Tiles(rows=Tile(128, 64, 8, 3), forward=Tile(128, 64, 8, 3), band=_BAND),
        Tiles(rows=Tile(128, 64, 8, 3), forward=Tile(128, 32, 8, 3), band=_BAND),
        Tiles(rows=Tile(128, 64, 8, 2), forward=Tile(64, 32, 8, 2), band=_BAND._replace(in_turns=True)),
        Tiles(rows=Tile(128, 64, 8, 2), forward=Tile(64, 32, 8, 2), band=_BAND._replace(in_turns=True)),
    ),
}
TARGETS[120] = TARGETS[80]

# fp32 without TF32 runs on the FMA units, unrolled over the head size. Larger tiles and larger heads would spill.
FP32 = Tiles(rows=Tile(16, 16, 4, 2), forward=Tile(32, 16, 8, 2), band=BandTile(16, 16, 4, 2))

# The interpreter's time depends on the number of operations, not of elements. Short tests should cross many borders.
INTERPRETED = Tiles(Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), BandTile(32, 16, 1, 1), NearBandTile(64, 2, 1, 1))


def choose_tiles(capability: int, head_size: int, value_size: int, bits: int) -> Tiles:
    """Returns the tiles for a target.

    Args:
        capability: the compute capability, 90 for 9.0.
        head_size: that of q and k.
        value_size: that of v; 0 without v.
        bits: of the inputs, 16 or 32.
    """
    if bits == 32:
        return FP32
    target = max((target for target in TARGETS if target <= capability), default=80)
    bounds = ((64, 64), (128, 128), (192, 128), (256, 256))
    fits = [head_size <= size and value_size <= value for size, value in bounds]
    return TARGETS[target][fits.index(True)]
