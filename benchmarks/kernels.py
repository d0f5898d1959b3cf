"""How much of an SM do the compiled Triton kernels take, and how near the floor can they come on an H100?

    python -m benchmarks.kernels [--targets 80 90 100] [--sizes 128] [--lines] [--json] [--out FILE.md]
    python -m benchmarks.kernels --targets 90 --sizes 128 --try rows=128,128,8,2    # another tile than the table's

The benchmark needs no GPU. It compiles every launch that ships ahead of time (launches.py) and reads its machine code
(sass.py).

The floor of a tile of scores is the longer of two times: the tensor core's for heads of their own size (fp32: the FP32
lanes'), and the MUFU's for one exp2 a score. A turn of a loop takes at least the cycles of its busiest unit. `best` is
the floor divided by those cycles: the programs of an SM then hide each other's waits. `alone` is the floor divided by
the sum of the cycles of the tensor core and of the next busiest unit: one program whose matrix products hide nothing.
Both leave out latencies and bank conflicts. Predicated instructions count as if they ran, also the loads ahead of a
loop that may be short.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton

from benchmarks import sass
from benchmarks.launches import TARGETS, Launch, compile_launches
from benchmarks.measure import environment, fold, make_parser, progress, show
from benchmarks.sass import WARP_LANES, Instruction
from rhythm_kernels.statistics import triton_backend
from rhythm_kernels.statistics.triton_tiles import BandTile, Tile, Tiles, choose_tiles

# The rates of one SM of an H100 SXM are those of a cycle. 132 SMs at 1.83 GHz make the data sheet's 989e12 FLOP/s
# (bf16, dense).
SMS, CLOCK = 132, 1.83e9
TENSOR_FLOPS = 4096
# CUDA C++ Programming Guide, throughput of native arithmetic instructions, compute capability 9.0
MUFU_LANES = 16  # exp2, log2, reciprocal, most conversions
FP32_LANES = 128  # multiply-adds of integers run on one half of them
INTEGER_LANES = 64  # add, shift, logic; compare, select, minimum, maximum also of floats
SHUFFLE_LANES = 32  # through the same unit as shared memory (Nsight Compute, pipelines: LSU)
SHARED_BYTES = 128  # 32 banks of 4 bytes
SCHEDULERS = 4  # each issues one instruction of a warp
# This rate is measured, not published: XLA's cost model has 6.65e12 bytes/s from L2. 5.5e12 is reported too.
L2_BYTES = 6.65e12 / SMS / CLOCK

# The room of an SM of compute capability 9.0 (CUDA C++ Programming Guide, technical specifications)
REGISTERS, SHARED_MEMORY, WARPS = 64 << 10, 228 << 10, 64
REGISTER_UNIT, RESERVED_SHARED = 256, 1 << 10  # registers are given to a warp in units; bytes reserved in each program

# kernels without a loop that multiplies matrices
LOOPLESS = ("sum_heads_kernel", "span_kernel", "sampled_span_kernel", "probe_errors_kernel", "probe_worst_kernel")


def describe(launch: Launch) -> dict[str, Any]:
    """Returns all that the tables and the tests show of a launch."""
    metadata, constants = launch.compiled.metadata, launch.constants
    code, ptx = sass.disassemble(launch.compiled.asm["cubin"]), launch.compiled.asm["ptx"]
    usage = resource_usage(launch.compiled.asm["cubin"])
    return {
        "target": launch.target,
        "dtype": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(launch.dtype, "-"),
        "kernel": launch.kernel.removesuffix("_kernel"),
        "head": "/".join(str(size) for size in head_sizes(launch)),
        "options": " ".join(name.removeprefix("USE_").lower() for name, value in constants.items() if value is True),
        "tile": "x".join(str(n) for name, n in constants.items() if name.startswith("BLOCK") and "_D" not in name),
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        **usage,
        "shared": metadata.shared,
        "programs": programs_on_sm(metadata.num_warps, usage["registers"], metadata.shared),
        "tensor_core": next((op for op in ("wgmma", "tcgen05", "mma.sync") if f"{op}." in ptx), "none"),
        "ptx_atomics": len(re.findall(r"^\s*(?:@!?%p\d+\s+)?(?:atom|red)\.", ptx, re.MULTILINE)),
        "uneven_sums": len(sass.uneven_sums(code)),
        "opcodes": Counter(instruction.opcode for instruction in code if instruction.runs),
        "loops": [describe_loop(launch, *part) for part in parts(launch, code)],
    }


def parts(launch: Launch, code: list[Instruction]) -> list[tuple[str, int | None, list[Instruction]]]:
    """Returns (name, scores of one turn or None, instructions) of each loop that multiplies matrices.

    The loops are in order of address. The instructions outside of them follow if they multiply too.

    Raises: ValueError for a kernel or a number of loops that `named_loops` does not know.
    """
    outside, *loops = sass.find_loops(code, lambda code: multiplies(launch, code))
    names, rest = named_loops(launch)
    if len(loops) != len(names):
        raise ValueError(f"{launch.kernel} must have the loops {names}, found {len(loops)} in {launch.constants}")
    named_code = [(*name, loop) for name, loop in zip(names, loops)]
    if multiplies(launch, outside) or not loops:
        named_code.append((*rest, outside))
    return named_code


def named_loops(launch: Launch) -> tuple[list[tuple[str, int]], tuple[str, int | None]]:
    """Returns (name, scores of one turn) of a kernel's loops that multiply matrices, and of the code outside them."""
    constants = launch.constants
    if launch.kernel == "forward_kernel":
        names = ["window's edge"] * constants["USE_WINDOW"] + ["whole tiles", "diagonal"]
        return [(name, constants["BLOCK_M"] * constants["BLOCK_N"]) for name in names], ("outside", None)
    if launch.kernel == "band_kernel":
        block = constants["BLOCK"]
        tiles = {"keys before": block * constants["BLOCK_BEFORE"], "rows behind": block * block}
        loops = [*["keys before"] * constants["LOOP_BEFORE"], *["rows behind"] * constants["LOOP_BEHIND"]]
        once = {"own tile": block * block} | {name: tiles[name] for name in tiles if name not in loops}
        return [(name, tiles[name]) for name in loops], (", ".join(once), sum(once.values()))
    if launch.kernel in ("probe_scores_kernel", "mass_kernel"):
        return [("keys", constants["BLOCK_M"] * constants["BLOCK_N"])], ("outside", None)
    if launch.kernel in LOOPLESS:
        return [], ("all", None)
    raise ValueError(f"named_loops does not know {launch.kernel}")


def describe_loop(launch: Launch, name: str, scores: int | None, code: list[Instruction]) -> dict[str, Any]:
    """Counts what a warp issues in one turn, by kind and by line of the source; on the H100 also each unit's cycles."""
    loop = {
        "name": name,
        "scores": scores,
        "counts": Counter(instruction.kind for instruction in code),
        "lines": Counter(instruction.line for instruction in code),
    }
    if launch.target == 90 and scores:
        cycles = unit_cycles(code, launch.compiled.metadata.num_warps)
        floor = floor_cycles(launch, scores)
        loop |= {
            "cycles": cycles,
            "floor": floor,
            "limit": max(cycles, key=cycles.__getitem__),
            "best": floor / max(cycles.values()),
            "alone": floor / (cycles["tensor"] + max(n for unit, n in cycles.items() if unit != "tensor")),
        }
    return loop


def unit_cycles(code: list[Instruction], warps: int) -> dict[str, float]:
    """Returns the cycles for which each unit of an H100's SM is busy when every warp of a program issues this code."""
    count = Counter(instruction.kind for instruction in code)
    lanes = WARP_LANES * warps
    flops, shared, loaded = (sum(getattr(x, name) for x in code) for name in ("flops", "shared_bytes", "loaded_bytes"))
    return {
        "tensor": flops * warps / TENSOR_FLOPS,
        "MUFU": count["MUFU"] * lanes / MUFU_LANES,
        "FP32": max(count["FFMA"] + count["IMAD"], 2 * count["IMAD"]) * lanes / FP32_LANES,
        "integer": (count["integer"] + count["compare"]) * lanes / INTEGER_LANES,
        "shared": shared * warps / SHARED_BYTES + count["shuffle"] * lanes / SHUFFLE_LANES,
        "L2": loaded * warps / L2_BYTES,
        "issue": len(code) * warps / SCHEDULERS,
    }


def floor_cycles(launch: Launch, scores: int) -> float:
    """Returns the fewest cycles of an SM for a number of scores."""
    rate = 2 * FP32_LANES if launch.dtype == "float32" else TENSOR_FLOPS
    return max(2 * scores * sum(head_sizes(launch)) / rate, scores / MUFU_LANES)


def multiplies(launch: Launch, code: list[Instruction]) -> bool:
    """Says whether this code holds matrix products. In fp32 these are FFMAs, a head's length for each score."""
    if launch.dtype == "float32":
        return sum(x.kind == "FFMA" for x in code) >= sum(head_sizes(launch))
    return any(x.kind == "tensor" for x in code)


def head_sizes(launch: Launch) -> list[int]:
    """Returns the multiply-adds of a score: one for each number of a key and, with an output, of a value."""
    names = ["SIZE", "SIZE_V"] if launch.constants.get("USE_OUT") else ["SIZE"]
    return [launch.constants[name] for name in names if name in launch.constants]


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Returns the registers and the bytes of stack (spills) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"registers": int(re.search(r"REG:(\d+)", out)[1]), "stack": int(re.search(r"STACK:(\d+)", out)[1])}


def programs_on_sm(warps: int, registers: int, shared: int) -> int:
    """Returns the number of programs that an H100's SM holds at a time."""
    warp_registers = -(-registers * WARP_LANES // REGISTER_UNIT) * REGISTER_UNIT
    return min(REGISTERS // (warp_registers * warps), SHARED_MEMORY // (shared + RESERVED_SHARED), WARPS // warps)


def report(rows: list[dict[str, Any]]) -> str:
    """Returns Markdown tables: the launches, the instructions of their loops, and the loops' cycles on an H100."""
    names = ["target", "dtype", "kernel", "head", "options", "tile", "warps", "stages", "registers", "stack", "shared"]
    launches, counts, cycles = [], [], []
    for i, row in enumerate(rows, 1):
        launches.append(
            [str(i), *(str(row[name]) for name in names), str(row["programs"]) if row["target"] == 90 else "-"]
        )
        for loop in row["loops"]:
            label, scores = [str(i), row["kernel"], loop["name"]], loop["scores"]
            total = sum(loop["counts"].values())
            a_score = f"{total * WARP_LANES * row['warps'] / scores:.1f}" if scores else "-"
            kinds = [str(loop["counts"][kind]) for kind in sass.KINDS]
            counts.append([*label, str(scores) if scores else "-", *kinds, str(total), a_score])
            if "cycles" in loop:
                numbers = [f"{n:.0f}" for n in (*loop["cycles"].values(), loop["floor"])]
                cycles.append([*label, *numbers, loop["limit"], f"{loop['best']:.0%}", f"{loop['alone']:.0%}"])
    units = list(unit_cycles([], 4))
    text = [
        table(["#", *names, "programs"], launches),
        "The instructions that a warp issues in one turn of a loop. `a score`: those of all threads over the scores.",
        table(["#", "kernel", "loop", "scores", *sass.KINDS, "all", "a score"], counts),
    ]
    if cycles:
        text.append("The cycles of one turn on an SM of an H100, with every unit at its rate.")
        text.append(table(["#", "kernel", "loop", *units, "floor", "limit", "best", "alone"], cycles))
    return "\n\n".join(text)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table whose columns line up as text."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "\n".join("| " + " | ".join(x.rjust(width) for x, width in zip(line, widths)) + " |" for line in lines)


def lines_report(rows: list[dict[str, Any]], most: int = 12) -> str:
    """Returns the lines of the source from which most of a loop's instructions come."""
    return "\n".join(
        f"{i} {row['kernel']}, {loop['name']}: "
        + ", ".join(f"{line} {n}" for line, n in loop["lines"].most_common(most))
        for i, row in enumerate(rows, 1)
        for loop in row["loops"]
    )


def parse_tile(text: str) -> tuple[str, Tile | BandTile]:
    """Returns ("rows", Tile(128, 64, 4, 3)) for "rows=128,64,4,3"."""
    launch, _, numbers = text.partition("=")
    kinds = {"rows": Tile, "sampled": Tile, "forward": Tile, "band": BandTile}
    try:
        return launch, kinds[launch](*map(int, numbers.split(",")))
    except (KeyError, TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"must be as in rows=128,64,4,3, got {text!r}") from None


@contextmanager
def other_tiles(tiles: dict[str, Tile | BandTile]) -> Iterator[None]:
    """Replaces the table's tiles for 16-bit inputs in its block."""

    def choose(capability: int, head_size: int, value_size: int, bits: int) -> Tiles:
        chosen = choose_tiles(capability, head_size, value_size, bits)
        return chosen._replace(**tiles) if bits == 16 else chosen

    with patch.object(triton_backend, "choose_tiles", choose):
        yield


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--sizes", type=int, nargs="+", help="only launches for these head sizes")
    parser.add_argument("--lines", action="store_true", help="also list the source lines of each loop's instructions")
    parser.add_argument(
        "--try", dest="tiles", type=parse_tile, nargs="+", default=(), metavar="LAUNCH=A,B,WARPS,STAGES",
        help="for 16-bit inputs: rows, sampled or forward=M,N,.. or band=TOKENS,LEAST_BEFORE,..[,MAX_REGISTERS]",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything that is known of each launch, as JSON")
    parser.add_argument("--out", type=Path, help="write what is printed to this file as well")
    args = parser.parse_args()
    with other_tiles(dict(args.tiles)):
        launches = compile_launches(args.targets, args.sizes)
        rows = [describe(launch) for launch in progress(launches, "launches compiled")]
    if args.json:
        text = json.dumps(rows)
    else:
        where = environment()
        head = ", ".join(f"{name} {where[name]}" for name in ("triton", "torch", "commit"))
        text = "\n\n".join([fold(f"{head}\n\n{report(rows)}"), *([lines_report(rows)] if args.lines else [])])
    show(text, args.out)


if __name__ == "__main__":
    main()
