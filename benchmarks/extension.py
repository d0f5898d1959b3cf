"""What do the extension's CUDA kernels take of an SM, and how long would 8,192 tokens keep one busy on an H100?

    python -m benchmarks.extension [--out FILE.md]

Needs nvcc and no GPU: csrc/cuda/*.cu are compiled for sm_90a and their machine code is read (sass.py). Listed are the
loops over a sequence's tokens: the line of csrc/rows/ that each comes from, the instructions of a turn, and those of
them that reach memory. Every kernel holds two copies: scratch in shared memory, or in global memory for sequences that
are longer than it.

`issue` is the time in which an SM's four schedulers issue the first copy's instructions for 8,192 distinct values: a
search reads three of its four digits, no ties are counted, and every branch inside a loop is taken. On top comes
latency: barriers, the walk over the bins by one warp, the launch.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks import sass
from benchmarks.kernels import CLOCK, SCHEDULERS, table
from benchmarks.measure import environment
from benchmarks.sass import WARP_LANES, Instruction

ROOT = Path(__file__).resolve().parent.parent
TOKENS, THREADS = 8192, 1024
DIGITS_READ = 3  # of a search among 8,192 different values
MEMORY = ("LDG", "STG", "LDS", "STS", "ATOMS", "REDG", "RED", "ATOMG")


class Loop(NamedTuple):
    line: str
    """As in "credit.h:128"."""
    scratch: str
    """"shared" or "global"."""
    instructions: int
    memory: Counter
    """Of MEMORY, how often."""
    turns: int
    """Times that all tokens pass through it, for `issue`; 0 for ties, and for a loop in a loop: few tokens run it."""


class Kernel(NamedTuple):
    row: str
    """The struct of csrc/rows/."""
    registers: int
    code_bytes: int
    loops: list[Loop]

    def issue_seconds(self) -> float:
        a_token = sum(loop.turns * loop.instructions for loop in self.loops if loop.scratch == "shared")
        warp_tokens = TOKENS / WARP_LANES
        return a_token * warp_tokens / SCHEDULERS / CLOCK


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
        if found := re.match(r"\.text\.(\w+row_kernelINS_\d+(\w+?)E\w+)", section):
            code = sass.parse(section)
            size = len(code) * sass.INSTRUCTION_BYTES
            kernels.append(Kernel(found[2], int(registers[found[1]]), size, token_loops(code)))
    return kernels


def token_loops(code: list[Instruction]) -> list[Loop]:
    """The loops that each thread runs through its tokens with, in order of address."""
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
    """Of the search for the last tie, which different values do not need."""
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
    heads = ["kernel", "registers", "loops", "bytes of code", f"issue, {TOKENS:,} tokens"]
    text = [
        table(
            heads,
            [
                [k.row, str(k.registers), str(len(k.loops)), f"{k.code_bytes:,}", f"{k.issue_seconds() * 1e6:.1f} us"]
                for k in kernels
            ],
        )
    ]
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
    """The start of a line of csrc/rows/, fit for a cell."""
    file, _, number = line.partition(":")
    source = (ROOT / "csrc" / "rows" / file).read_text().splitlines()[int(number) - 1]
    return f"`{source.strip()[:60]}`".replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write what is printed to this file as well")
    args = parser.parse_args()
    where = environment()
    nvcc = re.search(r"release ([\d.]+)", run("nvcc", "--version"))[1]
    head = f"nvcc {nvcc}, sm_90a, torch {where['torch']}, commit {where['commit']}"
    text = f"{head}\n\n{report(compile_kernels())}"
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
