"""How much of an SM do the extension's CUDA kernels take, and how long do 8,192 tokens keep an H100's SM busy?

    python -m benchmarks.extension [--out FILE.md]

The benchmark needs nvcc and no GPU. It compiles csrc/cuda/*.cu for sm_90a and reads their machine code (sass.py). The
tables list the loops over a sequence's tokens: the line of csrc/rows/ that a loop comes from, the instructions of a
turn, and those among them that access memory. Every kernel holds two copies of its loops, one with scratch in shared
memory and one with scratch in global memory for longer sequences.

`issue` is the time in which an SM's four schedulers issue the first copy's instructions for 8,192 distinct values: a
search reads three of its four digits, no ties are counted, and every branch inside a loop is taken. Latency comes on
top: barriers, the walk over the bins by one warp, the launch.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT, sass
from benchmarks.kernels import CLOCK, SCHEDULERS, table
from benchmarks.measure import environment, make_parser, show
from benchmarks.sass import WARP_LANES, Instruction

TOKENS = 8192
DIGITS_READ = 3  # by a search among 8,192 different values
MEMORY = ("LDG", "STG", "LDS", "STS", "ATOMS", "REDG", "RED", "ATOMG")


class Loop(NamedTuple):
    line: str
    """The source line, such as "credit.h:128"."""
    scratch: str
    """"shared" or "global"."""
    instructions: int
    memory: Counter
    """The number of instructions by their name in MEMORY."""
    turns: int
    """How often all tokens pass through the loop, for `issue`. It is 0 for loops that few tokens run: ties, and loops
    inside a loop."""


class Kernel(NamedTuple):
    row: str
    """The struct of csrc/rows/."""
    registers: int
    code_bytes: int
    loops: list[Loop]

    def issue_seconds(self) -> float:
        instructions = sum(loop.turns * loop.instructions for loop in self.loops if loop.scratch == "shared")
        warp_turns = TOKENS / WARP_LANES
        return instructions * warp_turns / SCHEDULERS / CLOCK


def compile_kernels() -> list[Kernel]:
    return [kernel for file in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for kernel in compile_file(file)]


def compile_file(file: Path) -> list[Kernel]:
    from torch.utils.cpp_extension import include_paths
    from triton import knobs

    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    version = re.search(r'TORCH_TARGET_VERSION = "(\w+)"', (ROOT / "setup.py").read_text())[1]
    flags = ["-std=c++17", "-O3", "-lineinfo", "-arch=sm_90a", f"-DTORCH_TARGET_VERSION={version}", *includes]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        run("nvcc", "-cubin", *flags, file, "-o", cubin)
        usage = run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
        text = run(knobs.nvidia.nvdisasm.path, "-g", "-c", "-ndf", cubin)
    registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", usage))
    kernels = []
    for section in re.split(r"^\s*\.section\s+", text, flags=re.M):
        if name := re.match(r"\.text\.(\w+row_kernelINS_\d+(\w+?)E\w+)", section):
            code = sass.parse(section)
            size = len(code) * sass.INSTRUCTION_BYTES
            kernels.append(Kernel(name[2], int(registers[name[1]]), size, token_loops(code)))
    return kernels


def token_loops(code: list[Instruction]) -> list[Loop]:
    """Returns the loops in which each thread runs through its tokens, in order of address."""
    _, *bodies = sass.find_loops(code, lambda body: any(memory_of(x) for x in body))
    bodies = [body for body in bodies if not any(x.opcode.startswith("BAR") for x in body)]
    inside = [any(is_inside(body, other) for other in bodies) for body in bodies]
    loops = [read_loop(body, is_inner) for body, is_inner in zip(bodies, inside)]
    return [loop for loop in loops if loop is not None]


def memory_of(instruction: Instruction) -> str | None:
    name = instruction.opcode.partition(".")[0]
    return name if name in MEMORY else None


def is_inside(body: list[Instruction], other: list[Instruction]) -> bool:
    return other[0].address < body[0].address and body[-1].address < other[-1].address


def read_loop(body: list[Instruction], is_inner: bool) -> Loop | None:
    lines = Counter(x.line for x in body if x.line.startswith(("topq.h", "peaks.h", "credit.h")))
    if not lines:
        return None
    counts = Counter(filter(None, map(memory_of, body)))
    searches = any("POPC.INC" in x.opcode for x in body)
    if is_inner or (searches and ties_lines() & {x.line for x in body}):
        turns = 0
    else:
        turns = DIGITS_READ if searches else 1
    on_chip = counts["LDS"] + counts["STS"] > 0
    return Loop(lines.most_common(1)[0][0], "shared" if on_chip else "global", len(body), counts, turns)


def ties_lines() -> set[str]:
    """Returns the source lines of the search for the last tie, which distinct values do not need."""
    source = (ROOT / "csrc" / "rows" / "select.h").read_text().splitlines()
    first = next(i for i, line in enumerate(source, 1) if "find_ties_end(Team" in line)
    last = next(i for i, line in enumerate(source, 1) if i > first and line == "}")
    return {f"select.h:{i}" for i in range(first, last)}


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout


def report(kernels: list[Kernel]) -> str:
    head = ["kernel", "registers", "loops", "bytes of code", f"issue, {TOKENS:,} tokens"]
    rows = [
        [k.row, str(k.registers), str(len(k.loops)), f"{k.code_bytes:,}", f"{k.issue_seconds() * 1e6:.1f} us"]
        for k in kernels
    ]
    text = [table(head, rows)]
    for kernel in kernels:
        rows = [
            [
                loop.line,
                loop.scratch,
                str(loop.turns),
                str(loop.instructions),
                ", ".join(f"{n} {name}" for name, n in loop.memory.items()),
                source_of(loop.line),
            ]
            for loop in kernel.loops
        ]
        text += [f"## {kernel.row}", table(["line", "scratch", "turns", "instructions", "memory", "source"], rows)]
    return "\n\n".join(text)


def source_of(line: str) -> str:
    """Returns the beginning of a line of csrc/rows/, shortened for a cell of a table."""
    file, _, number = line.partition(":")
    source = (ROOT / "csrc" / "rows" / file).read_text().splitlines()[int(number) - 1]
    return f"`{source.strip()[:60]}`".replace("|", "\\|")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, help="write what is printed to this file as well")
    args = parser.parse_args()
    where = environment()
    nvcc = re.search(r"release ([\d.]+)", run("nvcc", "--version"))[1]
    head = f"nvcc {nvcc}, sm_90a, torch {where['torch']}, commit {where['commit']}"
    show(f"{head}\n\n{report(compile_kernels())}", args.out)


if __name__ == "__main__":
    main()
