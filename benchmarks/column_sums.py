"""How much work do column sums of causal attention take here, in the package flash-colreduce and in FlagAttention?

    python -m benchmarks.column_sums [--size 128] [--flag-attention FOLDER] [--out benchmarks/results/column-sums.md]

The benchmark needs no GPU. It compiles the launches of each for an H100 (launches.py) and reads the machine code of
their loops over tiles of scores, as `benchmarks.kernels` does. Before that it runs all in Triton's interpreter on the
same inputs and holds them against the fp64 reference. flash-colreduce is compared where it is installed, FlagAttention
where a checkout of its repository is named.

Here a column sum comes from a pass over columns that is given the log-sum-exp of the rows. A model's attention kernel
has it; where it does not, a pass over rows comes before. flash-colreduce makes both passes in each call. The
`total_attention` of FlagAttention is given the log-sum-exp.
"""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import kernels, sass
from benchmarks.launches import KEY_HEADS, QUERY_HEADS, TOKENS, Case, Launch, absent_gpu
from benchmarks.measure import environment, make_parser, show
from rhythm_kernels import attention_stats, reference

ALLOWED = 1e-4  # error of a sum in the interpreter, in units of the largest
PACKAGE = "flash_colreduce"
LOOPS = {  # over whole tiles; FlagAttention's is over those of the diagonal too, and masks all
    "forward_kernel": ["rows"],
    "band_kernel": ["columns"],
    "_flash_colreduce_kernel": ["rows", "columns"],
    "_total_attention_kernel": ["columns"],
}


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", type=int, default=128, help="head size")
    parser.add_argument("--flag-attention", type=Path, help="a checkout of FlagAttention's repository")
    parser.add_argument("--out", type=Path, help="write what is printed to this file as well")
    args = parser.parse_args(arguments)
    # Triton decides at its import whether it interprets
    folder = args.flag_attention and args.flag_attention.resolve()
    if folder is not None:
        flag_attention(folder)  # a wrong folder ends the run here
    code = f"from benchmarks.column_sums import check; check({folder and str(folder)!r})"
    checked = subprocess.run([sys.executable, "-c", code],
                             env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)  # fmt: skip
    if checked.returncode:
        raise SystemExit(f"a result is wrong, so that nothing is reported:\n{checked.stderr}")
    where = environment()
    head = ", ".join(f"{name} {where[name]}" for name in ("triton", "torch", "commit"))
    errors = textwrap.fill(f"Largest errors in the interpreter: {checked.stdout.strip()}.", 120)
    show(f"{head}\n\n{report(args.size, folder)}\n\n{errors}", args.out)


def installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def flash() -> ModuleType:
    from flash_colreduce import flash

    return flash


def flag_attention(folder: Path | str) -> ModuleType:
    """Returns the module of FlagAttention that has its column sums, from a checkout."""
    path = Path(folder) / "src" / "flag_attn" / "total.py"
    if not path.is_file():
        raise SystemExit(f"--flag-attention must be a checkout of FlagAttention, {str(folder)!r} has no {path.name}")
    spec = importlib.util.spec_from_file_location("flag_attn_total", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flag_sums(module: ModuleType, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """Returns FlagAttention's column sums, [B, HQ, N]: its launch without the choice of a CUDA device."""
    (batch, heads, tokens, size), (_, key_heads, _, _) = q.shape, k.shape
    rows, columns, stages, warps = module.get_fwd_config(batch, heads, tokens, tokens, size, True)
    sums = torch.empty(batch, heads, tokens)
    is_whole = {"DIVISIBLE_M": tokens % rows == 0, "DIVISIBLE_N": tokens % columns == 0}
    module._total_attention_kernel[(-(-tokens // columns), heads, batch)](
        q, k, lse, sums, size**-0.5, *q.stride(), *k.stride(), batch, heads, tokens, tokens, 0, heads // key_heads,
        BLOCK_M=rows, BLOCK_DMODEL=size, BLOCK_N=columns, CAUSAL=True, num_stages=stages, num_warps=warps, **is_whole,
    )  # fmt: skip
    return sums


def check(folder: str | None = None) -> None:
    """Prints the largest error of each way on the same inputs; raises SystemExit for one that is too large.

    Args:
        folder: a checkout of FlagAttention, if it is compared.
    """
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 100, 16, generator=generator) for heads in (2, 1))
    segments = torch.zeros(1, 100, dtype=torch.int64)
    weights, lse = reference.attention_map(q, k, segments)
    options = {"need_span": False, "horizon": (0, None), "more": ["column_sum"], "backend": "triton"}
    sums = {
        "log-sum-exp known": attention_stats(q, k, lse=lse.float(), **options).more["column_sum"],
        "not known": attention_stats(q, k, **options).more["column_sum"],
    }
    if installed():
        with patch.object(Tensor, "is_cuda", True):  # the package refuses tensors of a CPU
            sums["flash-colreduce"] = flash().flash_colreduce(q, k.repeat_interleave(2, 1), "sum", is_causal=True)
    if folder is not None:
        sums["FlagAttention"] = flag_sums(flag_attention(folder), q, k, lse.float())
    exact, errors = weights.sum(-2), {}
    for name, x in sums.items():
        errors[name] = ((x - exact).abs().max() / exact.max()).item()
        if not errors[name] <= ALLOWED:
            raise SystemExit(f"{name} is off by {errors[name]:.1e}, allowed are {ALLOWED:.1e}")
    print(", ".join(f"{name} {error:.1e}" for name, error in errors.items()))


def report(size: int, folder: Path | None = None) -> str:
    """Returns the loops of each way over whole tiles, as a Markdown table; folder: a checkout of FlagAttention."""
    columns = {"need_span": False, "horizon": (0, None), "more": ["column_sum"]}
    with absent_gpu(90) as given:
        Case("attention_stats", size, columns, lse=True).run()
    with absent_gpu(90) as own:
        Case("attention_stats", size, columns).run()
    ways = {"log-sum-exp known": given, "not known": own}
    if installed():
        ways["flash-colreduce"] = [their_launch(size)]
    if folder is not None:
        ways["FlagAttention"] = [launch_of_flag_attention(size, folder)]
    rows = [
        row for way, launches in ways.items() for launch in launches if launch.kernel in LOOPS
        for row in describe(way, launch, size)
    ]  # fmt: skip
    head = ["way", "loop", "instructions a score", *kernels.unit_cycles([], 4), "atomics", "registers", "programs"]
    text = kernels.table(head, rows)
    text += f"\n\nCycles of each unit of an H100's SM for 1,000 scores, bf16, heads of {size}, whole tiles."
    return text if installed() else f"{text} {PACKAGE} is not installed, so it is not compared."


def their_launch(size: int) -> Launch:
    q, sums = torch.zeros(1, QUERY_HEADS, TOKENS, size, dtype=torch.bfloat16), torch.zeros(QUERY_HEADS, TOKENS)
    kernel = flash()._flash_colreduce_kernel
    (config,) = kernel.configs
    strides, lengths = (*q.stride(), *q.stride(), sums.stride(0)), (QUERY_HEADS, TOKENS, TOKENS, size)
    with absent_gpu(90) as launches:
        kernel.fn[(1, 1)](q, q, sums, 1.0, *strides, *lengths, "sum", True, **config.all_kwargs())
    return launches[0]


def launch_of_flag_attention(size: int, folder: Path) -> Launch:
    q, k = (torch.zeros(1, heads, TOKENS, size, dtype=torch.bfloat16) for heads in (QUERY_HEADS, KEY_HEADS))
    with absent_gpu(90) as launches:
        flag_sums(flag_attention(folder), q, k, torch.zeros(1, QUERY_HEADS, TOKENS))
    return launches[0]


def describe(way: str, launch: Launch, size: int) -> list[list[str]]:
    """Returns a row for each loop over whole tiles; the loop over the diagonal that may follow each is left out."""
    cubin, metadata = launch.compiled.asm["cubin"], launch.compiled.metadata
    _, *loops = sass.find_loops(sass.disassemble(cubin), lambda code: kernels.multiplies(launch, code))
    registers = kernels.resource_usage(cubin)["registers"]
    programs = kernels.programs_on_sm(metadata.num_warps, registers, metadata.shared)
    rows = []
    for name, code in zip(LOOPS[launch.kernel], loops[::2], strict=True):
        scores = sum(x.flops for x in code) * metadata.num_warps / (2 * size)
        cycles = kernels.unit_cycles(code, metadata.num_warps)
        rows.append([way, name, f"{len(code) * sass.WARP_LANES * metadata.num_warps / scores:.1f}"])
        rows[-1] += [f"{1000 * n / scores:.0f}" for n in cycles.values()]
        rows[-1] += [str(sum(x.opcode.startswith(("RED.", "ATOM")) for x in code)), str(registers), str(programs)]
    return rows


if __name__ == "__main__":
    main()
