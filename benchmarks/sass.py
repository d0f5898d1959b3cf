"""Reads NVIDIA machine code (SASS): its instructions, their kinds, and the loops around tensor-core work.

It parses the text of nvdisasm, which the Triton wheel carries, for compute capability 7.0 and later.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

INSTRUCTION_BYTES = 16
WARP_LANES = 32
WARPGROUP_WARPS = 4  # they issue one HGMMA together

_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"(\.L_\w+):")
_CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")

# The kind of an instruction by the first part of its opcode. Opcodes in no row are of kind "integer".
_KINDS = {
    "MUFU": "MUFU I2F F2I F2F FRND POPC FLO BREV",  # the unit of transcendental functions and most conversions
    "FFMA": "FFMA FMUL FADD FFMA2 FMUL2 FADD2",
    "compare": "FMNMX FMNMX3 FSETP FSET FSEL FCHK F2FP I2FP",  # comparisons of floats run on the integer unit
    "IMAD": "IMAD IDP HFMA2 HADD2 HMUL2",  # these run on the FP32 unit; the last three also move and convert
    "shuffle": "SHFL REDUX",
    "shared": "LDS STS LDSM STSM ATOMS",
    "global": "LDG STG LDGSTS LD ST ATOM ATOMG RED REDG UBLKCP UTMALDG UTMASTG",
    "local": "LDL STL",
    "control": "BAR BMOV BRA BREAK BRX BSSY BSYNC CALL CCTL DEPBAR ELECT ERRBAR EXIT FENCE JMP LDGDEPBAR MEMBAR"
    " NANOSLEEP NOP RET SYNCS USETMAXREG WARPGROUP WARPSYNC YIELD",
}
_KIND_OF = {opcode: kind for kind, opcodes in _KINDS.items() for opcode in opcodes.split()}
KINDS = ("tensor", *_KINDS, "uniform", "integer")


class Instruction(NamedTuple):
    address: int
    predicate: str
    """"@P0", "@!UP1", or "" where it always runs."""
    opcode: str
    """The name with its modifiers, such as "LDGSTS.E.BYPASS.128"."""
    operands: str
    target: int | None
    """The address that it may branch to, if that is known."""
    line: str
    """The source line, such as "triton_scores.py:75", or "" without line information."""

    @property
    def kind(self) -> str:
        """One of KINDS."""
        name = self.opcode.partition(".")[0]
        if not self.runs:
            return "control"
        if name in _KIND_OF:
            return _KIND_OF[name]
        if name.endswith("MMA"):
            return "tensor"
        return "uniform" if name.startswith("U") or name == "R2UR" else "integer"

    @property
    def runs(self) -> bool:
        """False for padding, which is predicated off."""
        return self.predicate not in ("@!PT", "@!UPT")

    @property
    def lane_bytes(self) -> int:
        """The bytes that a load or store moves for each thread."""
        parts = self.opcode.split(".")
        if parts[0] in ("LDSM", "STSM"):  # 8 x 8 matrices of 16-bit values, a row from each of 8 threads
            return 4 * int(parts[-1]) if parts[-1] in ("2", "4") else 4
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[part] for part in parts[1:] if part in widths), 4)

    @property
    def matrix(self) -> tuple[int, int, int] | None:
        """(M, N, K) of HGMMA (for a warpgroup) and HMMA (for a warp). tcgen05 has its shape in a descriptor."""
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", self.opcode):
            m, n, k = map(int, shape.groups())
            return m, n, k
        if shape := re.match(r"HMMA\.16(8)(8|16)\.", self.opcode):
            return 16, int(shape[1]), int(shape[2])
        return None

    @property
    def flops(self) -> int:
        """The operations of a matrix product, for each warp that issues it."""
        if self.matrix is None:
            return 0
        m, n, k = self.matrix
        return 2 * m * n * k // (WARPGROUP_WARPS if self.opcode.startswith("HGMMA") else 1)

    @property
    def shared_bytes(self) -> int:
        """The bytes that it moves to or from shared memory, for each warp that issues it, without bank conflicts."""
        if not self.runs:
            return 0
        if self.opcode.startswith("HGMMA"):  # B comes from shared memory, and A unless it is in registers
            m, n, k = self.matrix
            a_in_registers = self.operands.split(", ")[1].startswith("R")
            return 2 * k * (n + (0 if a_in_registers else m)) // WARPGROUP_WARPS
        if self.kind == "shared" or self.opcode.startswith("LDGSTS"):
            return WARP_LANES * self.lane_bytes
        return 0

    @property
    def loaded_bytes(self) -> int:
        """The bytes that it reads from global memory, for each warp that issues it."""
        loads = self.opcode.split(".")[0] in ("LDG", "LDGSTS", "LD")
        return WARP_LANES * self.lane_bytes if loads and self.runs else 0


def disassemble(cubin: bytes) -> list[Instruction]:
    """Returns the instructions of a cubin with one function, in order.

    Raises: ValueError for text that does not parse.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-g", "-c", "-ndf", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> list[Instruction]:
    """Returns the instructions in the text that nvdisasm prints.

    Raises: ValueError for text that does not parse.
    """
    rows, labels, line = [], {}, ""
    for row in text.splitlines():
        row = row.strip()
        if source := _LINE.match(row):
            line = f"{Path(source[1]).name}:{source[2]}"
        elif label := _LABEL.match(row):
            labels[label[1]] = len(rows) * INSTRUCTION_BYTES
        elif code := _CODE.match(row):
            if int(code[1], 16) != len(rows) * INSTRUCTION_BYTES:
                raise ValueError(f"an instruction is missing before this one: {row}")
            rows.append((code[2] or "", code[3], code[4], line))
    if not rows:
        raise ValueError(f"no instructions in {text[:200]!r}")
    code = []
    for i, (predicate, opcode, operands, line) in enumerate(rows):
        label = _TARGET.search(operands)
        target = labels[label[1]] if label else None
        code.append(Instruction(i * INSTRUCTION_BYTES, predicate, opcode, operands, target, line))
    return code


def find_loops(code: list[Instruction], works: Callable[[list[Instruction]], bool]) -> list[list[Instruction]]:
    """Returns the code outside of all loops for which `works` is true, and then these loops, in order of address.

    The instructions of an inner loop do not count for the outer one.
    """
    before = _predecessors(code)
    bodies: dict[int, set[int]] = {}
    for tail, instruction in enumerate(code):
        if instruction.opcode.startswith("BRA") and instruction.target <= instruction.address:
            head = instruction.target // INSTRUCTION_BYTES
            bodies[head] = bodies.get(head, set()) | _natural_loop(head, tail, before)
    outside, loops = set(range(len(code))), {}
    for head, body in sorted(bodies.items(), key=lambda item: len(item[1])):
        own = [code[i] for i in sorted(body & outside)]
        if works(own):
            loops[head] = own
            outside -= body
    return [[code[i] for i in sorted(outside)], *(loops[head] for head in sorted(loops))]


def uneven_sums(code: list[Instruction]) -> list[Instruction]:
    """Returns the FMAs that add a product to what a butterfly shuffle brought from another thread.

    In such a sum each thread rounds the other thread's product and not its own, so the threads of a row get different
    bits. Those of a plain addition are equal, since x + y is y + x.
    """
    brought, found = set(), []
    for instruction in code:
        operands, name = instruction.operands.split(","), instruction.opcode.partition(".")[0]
        if not instruction.runs:
            continue
        if name == "FFMA" and len(operands) == 4 and operands[3].strip(" -").partition(".")[0] in brought:
            found.append(instruction)
        # what was brought is read once; a pair of registers has the name of the first one
        used = {int(number) for number in re.findall(r"\bR(\d+)", instruction.operands)}
        if name.endswith("2") or ".64" in instruction.opcode:
            used |= {number + 1 for number in used}
        brought -= {f"R{number}" for number in used}
        if instruction.opcode.startswith("SHFL.BFLY"):
            brought.add(operands[1].strip())
    return found


def _predecessors(code: list[Instruction]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in code]
    for i, instruction in enumerate(code):
        name = instruction.opcode.partition(".")[0]
        if name == "BRA":
            before[instruction.target // INSTRUCTION_BYTES].append(i)
        # BRA may carry its condition as an operand
        always = instruction.predicate in ("", "@PT") and "," not in instruction.operands
        if not (name in ("BRA", "EXIT", "RET") and always) and i + 1 < len(code):
            before[i + 1].append(i)
    return before


def _natural_loop(head: int, tail: int, before: list[list[int]]) -> set[int]:
    """Returns what reaches `tail` without passing `head`. If that includes the entry, there is no loop: empty."""
    body, pending = {head}, [tail]
    while pending:
        i = pending.pop()
        if i not in body:
            if i == 0:
                return set()
            body.add(i)
            pending += before[i]
    return body
