"""Every launch of the package, compiled ahead of time without a GPU: the resources that it takes, its machine code.

`make kernels` prints the numbers that are tested here. They need a process in which Triton does not interpret.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import triton

from benchmarks import column_sums, kernels, launches
from benchmarks.sass import Instruction
from rhythm_kernels.statistics.triton_scores import size_parts

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program; sm_86 and sm_89 run sm_80's tiles
TILES_CHOSEN_FOR = "3.7."  # Triton
MOST_SPILLED = 32  # bytes a thread with another Triton, eight registers of 255: 3.6 spills 16 bytes, 3.8 all 32
TENSOR_CORE = {80: ("mma.sync", "HMMA."), 90: ("wgmma", "HGMMA."), 100: ("tcgen05", "UTC")}

# one worker compiles a target, once
EACH_TARGET = {target: pytest.param(target, marks=pytest.mark.xdist_group(f"sm_{target}")) for target in SHARED_LIMIT}
on_h100 = pytest.mark.parametrize("compiled", [EACH_TARGET[90]], indirect=True, scope="module")


@pytest.fixture(scope="module", params=EACH_TARGET.values())
def compiled(request) -> list[dict]:
    """Returns every launch for a target."""
    return compile_for(request.param)


@cache  # a worker may set the fixture up again after tests of another file
def compile_for(target: int) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels", "--json", "--targets", str(target)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=ROOT).stdout
    return json.loads(out)


@pytest.fixture
def products(compiled) -> list[dict]:
    """Returns the launches that multiply matrices."""
    return [launch for launch in compiled if launch["kernel"] in ("forward", "band", "probe_scores", "mass")]


def failing(launches: list[dict], passes) -> list[str]:
    """Returns the launches for which `passes` is false, in words."""
    names = ("target", "dtype", "kernel", "head", "options", "tile", "warps", "stages", "registers", "stack", "shared")
    return ["  ".join(f"{name} {row[name]}" for name in names) for row in launches if not passes(row)]


def test_every_kernel_is_compiled(compiled):
    sources = [path.read_text() for path in (ROOT / "rhythm_kernels").rglob("*.py")]
    names = {name for source in sources for name in re.findall(r"^def (\w+)_kernel\(", source, re.MULTILINE)}
    assert {row["kernel"] for row in compiled} == names


def test_nothing_is_spilled(compiled):
    """The tiles were chosen for one version of Triton; the compiler of another one may spill a few registers."""
    chosen_for_this = triton.__version__.startswith(TILES_CHOSEN_FOR)

    def holds_all(row):
        spills = any(opcode.startswith(("LDL", "STL")) for opcode in row["opcodes"])
        return row["stack"] == 0 and not spills if chosen_for_this else row["stack"] <= MOST_SPILLED

    assert failing(compiled, holds_all) == []


def test_shared_memory_suffices(compiled):
    assert failing(compiled, lambda row: row["shared"] <= SHARED_LIMIT[row["target"]]) == []


def test_threads_that_hold_a_row_sum_it_alike(compiled):
    """Otherwise they write different bits of one value to one place, and the last of them wins."""
    assert failing(compiled, lambda row: row["uneven_sums"] == 0) == []


def test_no_atomics(compiled):
    def in_order(row):
        # tcgen05 keeps account of its tensor memory with atomics on shared memory
        atomics = r"(ATOMG?|REDG?)\b" if row["target"] == 100 else r"(ATOM[GS]?|REDG?)\b"
        return row["ptx_atomics"] == 0 and not any(re.match(atomics, opcode) for opcode in row["opcodes"])

    assert failing(compiled, in_order) == []


def test_matrix_products_run_on_the_tensor_core(products):
    def does(row):
        if row["dtype"] == "fp32":
            return row["tensor_core"] == "none"
        # wgmma and tcgen05 take 64 rows, the probes have 16
        ptx, sass = TENSOR_CORE[80 if row["kernel"] == "probe_scores" else row["target"]]
        return row["tensor_core"] == ptx and any(x.startswith(sass) and "MMA" in x for x in row["opcodes"])

    assert failing(products, does) == []


def test_tiles_are_loaded_16_bytes_at_a_time(products):
    def wide(row):
        widths = {copy_width(opcode) for opcode in row["opcodes"] if opcode.startswith("LDGSTS")}
        is_loaded = 128 in widths or any(opcode.startswith("LDG.E.128") for opcode in row["opcodes"])
        if "loop_behind" in row["options"]:
            widths.discard(32)  # the log-sum-exp of the rows behind, a number each
        size = max(map(int, row["head"].split("/")))
        rest, keys = size_parts(size)[1], int(row["tile"].split("x")[1])
        if 0 < rest * keys < 8 * 32 * row["warps"]:
            widths.discard(64)  # the rest of a head of 72, of which there are only four elements a thread
        return is_loaded and widths <= {128}

    assert failing(products, wide) == []


def copy_width(opcode: str) -> int:
    """Returns how many bits an instruction such as LDGSTS.E.BYPASS.128 copies; 32 if its name has no number."""
    return next((int(part) for part in opcode.split(".") if part.isdecimal()), 32)


@on_h100
def test_no_matrix_product_is_computed_twice(products):
    """Heads above 128 are left out: 8 warps share 64 rows there, to spill nothing, and compute some products twice."""

    def once(row):
        score_cycles = 2 * sum(map(int, row["head"].split("/"))) / kernels.TENSOR_FLOPS
        return all(loop["cycles"]["tensor"] == score_cycles * loop["scores"] for loop in row["loops"])

    rows = [row for row in products if row["dtype"] != "fp32" and set(row["head"].split("/")) <= {"64", "128"}]
    rows = [row for row in rows if row["kernel"] != "probe_scores"]  # it multiplies weights in three parts
    assert len(rows) > 0
    assert failing(rows, once) == []


@on_h100
def test_no_address_arithmetic_limits_whole_tiles(products):
    def hidden(row):
        loops = {loop["name"]: loop for loop in row["loops"]}
        whole, diagonal = (sum(loops[name]["counts"].values()) for name in ("whole tiles", "diagonal"))
        # the products of an entropy alone fill the issue slots
        limits = ("integer",) if "entropy" in row["options"] else ("integer", "issue")
        return whole < diagonal and loops["whole tiles"]["limit"] not in limits

    rows = [row for row in products if row["dtype"] != "fp32" and row["head"] in ("128", "128/128")]
    rows = [row for row in rows if row["kernel"] == "forward"]
    assert len(rows) > 0
    assert failing(rows, hidden) == []


def test_units_of_an_sm():
    """Four warps with one instruction each take the cycles that follow from 16, 128, 64 and 32 documented lanes."""

    def cycles(opcode, operands=""):
        code = [Instruction(0, "", opcode, operands, None, "")]
        return {unit: n for unit, n in kernels.unit_cycles(code, warps=4).items() if n > 0 and unit != "issue"}

    assert kernels.unit_cycles([], warps=4)["issue"] == 0
    assert kernels.unit_cycles([Instruction(0, "", "NOP", "", None, "")] * 3, warps=8)["issue"] == 6
    assert cycles("MUFU.EX2") == {"MUFU": 8}
    assert cycles("FFMA") == {"FP32": 1}
    assert cycles("IMAD") == {"FP32": 2}
    assert cycles("IADD3") == cycles("FMNMX") == {"integer": 2}
    assert cycles("SHFL.BFLY") == {"shared": 4}
    assert cycles("LDS.128") == {"shared": 16}
    assert cycles("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR4], R24") == {"tensor": 32, "shared": 32}
    assert cycles("LDG.E.128") == {"L2": pytest.approx(4 * 512 / kernels.L2_BYTES)}
    flops, exp2s = (rate * kernels.SMS * kernels.CLOCK for rate in (kernels.TENSOR_FLOPS, kernels.MUFU_LANES))
    assert flops == pytest.approx(989e12, rel=1e-3)
    assert exp2s == pytest.approx(3.9e12, rel=1e-2)


@pytest.mark.parametrize(
    "warps, registers, shared, programs",
    [(4, 128, 0, 4), (4, 129, 0, 3), (4, 255, 0, 2), (8, 255, 0, 1), (4, 32, 0, 16), (4, 32, 113 << 10, 2)],
)
def test_programs_on_an_sm(warps, registers, shared, programs):
    assert kernels.programs_on_sm(warps, registers, shared) == programs


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton compiles in this process")
def test_an_interpreting_process_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), launches.absent_gpu(90):
        pass
    assert torch.zeros(1).is_cuda is False


def run_column_sums(*flags: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.column_sums", "--size", "64", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_column_sums_are_read_from_machine_code_beside_another_package():
    out = run_column_sums().stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")][2:]
    ways = [("log-sum-exp known", "columns"), ("not known", "rows"), ("not known", "columns")]
    if column_sums.installed():
        ways += [("flash-colreduce", "rows"), ("flash-colreduce", "columns")]
    assert [(way, loop) for way, loop, *_ in rows] == ways
    assert all(float(score) > 5 and atomics == "0" for _, _, score, *_, atomics, _, _ in rows[:3])
    assert ("flash_colreduce is not installed" in out) == (not column_sums.installed())


FLAG_ATTENTION = """
import triton
import triton.language as tl


def get_fwd_config(B, H, M, N, D, causal):
    return 32, 32, 1, 4


@triton.jit
def _total_attention_kernel(
    Q, K, L, S, scale, qz, qh, qm, qk, kz, kh, kn, kk, Z, H, M, N, P, G,
    BLOCK_M: tl.constexpr, BLOCK_DMODEL: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DIVISIBLE_M: tl.constexpr, DIVISIBLE_N: tl.constexpr,
):
    head, own, d = tl.program_id(1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_DMODEL)
    k = tl.load(K + head // G * kh + own[:, None] * kn + d[None, :] * kk, mask=own[:, None] < N, other=0.0)
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK_N, M, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = tl.load(Q + head * qh + rows[:, None] * qm + d[None, :] * qk, mask=rows[:, None] < M, other=0.0)
        lse = tl.load(L + head * M + rows, mask=rows < M, other=0.0)
        weights = tl.exp(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
        sums += tl.sum(tl.where((rows[:, None] >= own[None, :]) & (rows[:, None] < M), weights, 0.0), 0)
    tl.store(S + head * N + own, sums FACTOR, mask=own < N)
"""


def beside_flag_attention(folder: Path, factor: str = "") -> subprocess.CompletedProcess:
    """Runs the benchmark with a stand-in for FlagAttention's checkout, whose sums are wrong by a factor."""
    path = folder / "src" / "flag_attn" / "total.py"
    path.parent.mkdir(parents=True)
    path.write_text(FLAG_ATTENTION.replace("FACTOR", factor))
    return run_column_sums("--flag-attention", str(folder))


@pytest.mark.slow
def test_column_sums_are_read_beside_a_checkout_of_flag_attention(tmp_path):
    out = beside_flag_attention(tmp_path).stdout
    assert re.search(r"^\| *FlagAttention \| columns \| +\d", out, re.MULTILINE) and "FlagAttention 1" in out


@pytest.mark.slow
def test_wrong_sums_of_flag_attention_are_not_reported(tmp_path):
    run = beside_flag_attention(tmp_path, "* 1.01")
    assert run.returncode == 1 and "FlagAttention is off by" in run.stderr and "columns" not in run.stdout


def test_a_folder_without_flag_attention_is_named(tmp_path):
    with pytest.raises(SystemExit, match=rf"^--flag-attention must be a checkout .*, '{tmp_path}' has no"):
        column_sums.main(["--flag-attention", str(tmp_path)])


def test_wrong_column_sums_are_not_reported(monkeypatch):
    real = column_sums.attention_stats

    def spoiled(*args, **options):
        stats = real(*args, **options)
        return stats._replace(more={name: x * 1.01 for name, x in stats.more.items()})

    monkeypatch.setattr(column_sums, "attention_stats", spoiled)
    with pytest.raises(SystemExit, match="log-sum-exp known is off by 1.0e-02, allowed are 1.0e-04"):
        column_sums.check()
