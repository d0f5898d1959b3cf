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
    lanes: int = 0
    """The threads that hold a row of scores, which without v each keep sums of their own; 0 keeps one sum of a row."""
    split: int | None = None
    """The most keys that a program of the sampled rows reads, a multiple of block_n; None: all keys."""


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


class Tiles(NamedTuple):
    """The tiles of all passes for one target, head size and dtype."""

    rows: Tile
    """The forward pass without v."""
    sampled: Tile
    """The forward pass over the rows that spans are read from; block_m divides SPAN_BLOCK."""
    forward: Tile
    """The forward pass with v."""
    band: BandTile


# The band loads far more than it computes. A tile of 64 tokens loads little outside the horizon (hi + 64 rows for 64
# keys). A loop of one or two turns fills no more than two stages. Heads of 128 take 129 registers on sm_90; with 128 an
# SM holds a fourth program, and the pass takes 0.94x the time on an H100.
_BAND = BandTile(64, 16, 4, 2)
_BAND_90 = _BAND._replace(max_registers=128)

# A sample of 512 rows has 8 tiles of a head: too few to fill a GPU, and the last of them would read nearly all keys
# while the others are done. On an H100 splits of 2,048 keys take 0.82x the time of whole rows at 8,192 tokens and 0.73x
# at 32,768, splits of 1,024 keys 0.84x and 0.81x. Three stages matter: two took 1.7x. Tiles of 128 keys spill with all
# options, and larger heads with splits. A tile has at most a block of rows.
_SAMPLE = Tile(64, 64, 4, 3, split=2048)
_SAMPLE_LARGE = Tile(64, 32, 4, 2)
_SAMPLE_90, _SAMPLE_LARGE_90 = _SAMPLE._replace(lanes=4), _SAMPLE_LARGE._replace(lanes=4)
_IN_TURNS = _BAND._replace(in_turns=True)
_IN_TURNS_LARGE = BandTile(64, 16, 8, 2, in_turns=True)

# Compute capability (from this one up to the next) -> head sizes to 64; to 128; to 192 with values to 128; to 256.
TARGETS = {
    # mma.sync keeps operands in registers, and sm_86, sm_89 and sm_120 have 99 KB of shared memory. With v, tiles with
    # few keys leave registers for 128 rows of output. Rows of heads above 64 spill 8 bytes with a third stage.
    80: (
        Tiles(rows=Tile(64, 64, 4, 3), sampled=_SAMPLE, forward=Tile(128, 32, 4, 3), band=_BAND),
        Tiles(rows=Tile(64, 64, 4, 2), sampled=_SAMPLE, forward=Tile(128, 32, 8, 3), band=_IN_TURNS),
        Tiles(rows=Tile(64, 32, 4, 2), sampled=_SAMPLE_LARGE, forward=Tile(64, 16, 8, 2), band=_IN_TURNS_LARGE),
        Tiles(rows=Tile(64, 32, 4, 2), sampled=_SAMPLE_LARGE, forward=Tile(64, 16, 8, 2), band=_IN_TURNS_LARGE),
    ),
    # Measured on an H100 with heads of 128 at 8,192 tokens (benchmarks/tiles.py). Rows: an SM holds two programs of two
    # warpgroups, so that the softmax of one hides behind the wgmma of the others; programs of one warpgroup take 1.08x
    # the time. A thread of wgmma has every fourth pair of a row: sums of its own take 0.94x. Elsewhere rows lie
    # otherwise, and four lanes take more instructions than one. With v, scores and output take the registers of two
    # warpgroups, and a program has an SM alone. Each warpgroup has 64 rows, since with fewer both would compute the
    # same. Heads of 64, which were not measured, fit 168 registers, and so three programs.
    90: (
        Tiles(
            rows=Tile(128, 64, 4, 3, max_registers=168, lanes=4),
            sampled=_SAMPLE_90,
            forward=Tile(128, 64, 8, 3),
            band=_BAND,
        ),
        Tiles(rows=Tile(128, 64, 8, 3, lanes=4), sampled=_SAMPLE_90, forward=Tile(128, 64, 8, 3), band=_BAND_90),
        Tiles(rows=Tile(128, 64, 8, 2, lanes=4), sampled=_SAMPLE_LARGE_90, forward=Tile(128, 64, 8, 2), band=_BAND),
        Tiles(rows=Tile(128, 64, 8, 2, lanes=4), sampled=_SAMPLE_LARGE_90, forward=Tile(128, 16, 8, 2), band=_BAND),
    ),
    # tcgen05 returns scores through registers: 4 warps would need all 255.
    100: (
        Tiles(rows=Tile(128, 64, 8, 3), sampled=_SAMPLE, forward=Tile(128, 64, 8, 3), band=_BAND),
        Tiles(rows=Tile(128, 64, 8, 3), sampled=_SAMPLE, forward=Tile(128, 32, 8, 3), band=_BAND),
        Tiles(rows=Tile(128, 64, 8, 2), sampled=_SAMPLE_LARGE, forward=Tile(64, 32, 8, 2), band=_IN_TURNS),
        Tiles(rows=Tile(128, 64, 8, 2), sampled=_SAMPLE_LARGE, forward=Tile(64, 32, 8, 2), band=_IN_TURNS),
    ),
}
TARGETS[120] = TARGETS[80]

# fp32 without TF32 runs on the FMA units, unrolled over the head size. Larger tiles and larger heads would spill, and
# with two stages the sampled rows under a window and a soft cap.
FP32 = Tiles(
    rows=Tile(16, 16, 4, 2),
    sampled=Tile(16, 16, 4, 3, split=2048),
    forward=Tile(32, 16, 8, 2),
    band=BandTile(16, 16, 4, 2),
)

# The interpreter's time depends on the number of operations, not of elements. Short tests should cross many borders.
INTERPRETED = Tiles(
    rows=Tile(32, 16, 1, 1, lanes=4),
    sampled=Tile(32, 16, 1, 1, lanes=4, split=64),
    forward=Tile(16, 32, 1, 1),
    band=BandTile(32, 16, 1, 1),
)


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
