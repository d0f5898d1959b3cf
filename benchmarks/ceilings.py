"""How fast are bf16 matrix products, device copies and exp2 on this GPU at most?

    python -m benchmarks.ceilings [--out OUT]

The floors of the other benchmarks are computed from these measured rates, not from a datasheet. The files are written
after each round. An interrupt (SIGINT) ends the run with exit code 130.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl

from benchmarks.measure import (
    Measured,
    environment,
    interleave,
    make_parser,
    markdown_table,
    publish,
    says_when_interrupted,
)

PRODUCT = 8192  # rows, columns and depth of the matrix product
COPY = 2**30  # elements of bf16
EXP_ELEMENTS, EXP_STEPS = 2**24, 256


@triton.jit
def exp2_kernel(x, out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the last of STEPS exponentials of each element. Each feeds the next, so that none can be left out."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    for _ in range(STEPS):
        value = tl.exp2(-value)  # stays in (0, 1)
    tl.store(out + at, value)


Rates = dict[str, float]  # "flops", "bytes" and "exps" a second


def measure(rounds: int, device: torch.device, after_round: Callable[[Rates], object] = lambda rates: None) -> Rates:
    """Returns the best rates; `after_round` gets the best so far. A copy counts the bytes that it reads and writes."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(COPY, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    x = torch.rand(EXP_ELEMENTS, device=device)
    out = torch.empty_like(x)
    block = 1024
    variants = {
        "flops": lambda: torch.mm(a, b),
        "bytes": lambda: target.copy_(source),
        "exps": lambda: exp2_kernel[(EXP_ELEMENTS // block,)](x, out, STEPS=EXP_STEPS, BLOCK=block, num_warps=4),
    }
    done = {"flops": 2 * PRODUCT**3, "bytes": 2 * COPY * source.itemsize, "exps": EXP_ELEMENTS * EXP_STEPS}

    def best(measured: dict[str, Measured]) -> Rates:
        return {name: done[name] / min(m.samples) for name, m in measured.items()}

    measured = interleave(variants, rounds, "ceilings", device, after_round=lambda so_far: after_round(best(so_far)))
    return best(measured)


def report(out: Path | None, where: dict[str, str], rates: Rates) -> str:
    """Returns the report, after writing it where `--out` asks for it."""
    rows = [
        ["bf16 product", f"{rates['flops'] / 1e12:.0f} TFLOP/s"],
        ["device copy", f"{rates['bytes'] / 1e12:.2f} TB/s"],
        ["exp2", f"{rates['exps'] / 1e12:.2f} T/s"],
    ]
    return publish(out, markdown_table(rows[0], rows[1:]) + "\n", {**where, **rates})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well, after each round")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("the ceilings are those of a GPU, and there is none here")
    device = torch.device("cuda")
    with says_when_interrupted(args.out):
        report_so_far = partial(report, args.out, environment(device))
        text = report_so_far(measure(args.rounds, device, after_round=report_so_far))
    print(text)


if __name__ == "__main__":
    main()
