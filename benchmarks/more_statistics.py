"""Measures what each statistic of `more` costs beside a call without it, and beside whole maps.

    python -m benchmarks.more_statistics [--tokens 4096] [--rounds 7] [--out benchmarks/results/more-statistics-cpu]

The input is one sequence of N tokens in the shape of SmolLM2-135M on a CPU (9 query heads and 3 key heads of 64, fp32)
and of Qwen3-4B on a GPU (32 and 8 heads of 128, bf16). All rows are in R, and the prefix is half of the sequence. Each
statistic is asked for alone, with a known log-sum-exp and without one. `maps` is the dense formula: scores, softmax and
the sum, [HQ, N, N] each; where a map does not fit into memory it is left out.

Each statistic is first held against the fp64 reference at 1,024 tokens at most. If one is wrong, the benchmark ends.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import (
    Measured,
    available_bytes,
    environment,
    heading,
    interleave,
    make_parser,
    markdown_table,
    publish,
    ratio,
    says_when_interrupted,
)
from rhythm_kernels import attention_stats, reference
from rhythm_kernels.statistics.more import MORE

ALLOWED = 1e-4  # error, in units of the largest value
CHECKED_IN_FP64 = 1024  # the most tokens that are checked against fp64


class Problem(NamedTuple):
    q: Tensor
    """[1, HQ, N, D]"""
    k: Tensor
    """[1, H, N, D]"""
    lse: Tensor
    """[1, HQ, N]"""

    def run(self, names: tuple[str, ...], lse_known: bool) -> dict[str, Tensor]:
        """Returns the statistics by name. Without a log-sum-exp spans come with the row pass."""
        lengths = torch.tensor([self.q.shape[2] // 2]) if "prefix_mass" in names else None
        options = {"horizon": (0, None) if "column_sum" in names else (10, 50), "prefix_lengths": lengths}
        lse = self.lse if lse_known else None
        return attention_stats(self.q, self.k, lse=lse, need_span=not lse_known, more=names, **options).more

    def from_map(self, name: str) -> Tensor:
        """Returns a statistic by the dense formula."""
        heads, tokens = self.q.shape[1], self.q.shape[2]
        k = self.k.repeat_interleave(heads // self.k.shape[1], 1)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=k.device).triu(1)
        scores = (self.q @ k.mT).float().mul_(self.q.shape[3] ** -0.5).masked_fill_(hidden, -math.inf)
        if name == "largest_score":
            return scores.amax(-1)
        weights = scores.softmax(-1)
        return {
            "row_entropy": lambda: torch.special.entr(weights).sum(-1),
            "first_mass": lambda: weights[..., :4].sum(-1),
            "prefix_mass": lambda: weights[..., : tokens // 2].sum(-1),
            "self_mass": lambda: weights.diagonal(dim1=-2, dim2=-1),
            "column_sum": lambda: weights.sum(-2),
        }[name]()


def make_problem(tokens: int, device: torch.device) -> Problem:
    query_heads, key_heads, size, dtype = (32, 8, 128, torch.bfloat16)
    if device.type == "cpu":
        query_heads, key_heads, size, dtype = (9, 3, 64, torch.float32)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, tokens, size, generator=generator) for heads in (query_heads, key_heads))
    q, k = q.to(device, dtype), k.to(device, dtype)
    return Problem(q, k, attention_stats(q, k, need_span=False).lse)


def check(problem: Problem) -> None:
    """Raises SystemExit if a statistic is wrong."""
    lengths = torch.tensor([problem.q.shape[2] // 2])
    options = {"horizon": (0, None), "more": MORE, "prefix_lengths": lengths}
    exact = reference.attention_stats(problem.q.cpu(), problem.k.cpu(), **options).more
    for lse_known in (False, True):
        for name in MORE:
            got = problem.run((name,), lse_known)[name].cpu().double()
            error = ((got - exact[name]).abs().max() / exact[name].abs().max()).item()
            if not error <= ALLOWED:
                raise SystemExit(f"{name} is off by {error:.1e}, allowed are {ALLOWED:.1e}: it is not timed")


def variants(problem: Problem, device: torch.device) -> dict[str, Callable[[], object]]:
    """Returns the calls to time by name: (statistic or "nothing", how), joined by a comma."""
    calls: dict[str, Callable[[], object]] = {}
    for how, lse_known in (("lse", True), ("no lse", False)):
        for name in ("nothing", *MORE):
            names = () if name == "nothing" else (name,)
            calls[f"{name}, {how}"] = lambda names=names, lse_known=lse_known: problem.run(names, lse_known)
    map_bytes = 4 * problem.q.shape[1] * problem.q.shape[2] ** 2
    if 4 * map_bytes < available_bytes(device):
        calls |= {f"{name}, maps": lambda name=name: problem.from_map(name) for name in MORE}
    return calls


def report(out: Path | None, where: dict[str, str], tokens: int, measured: dict[str, Measured]) -> str:
    """Returns the report, after writing it where `--out` asks for it."""

    def cell(name: str, how: str) -> str:
        timed = measured.get(f"{name}, {how}")
        if timed is None:
            return "-"
        text = f"{timed.seconds * 1e3:.3g} ms"
        return (
            text if how == "maps" or name == "nothing" else f"{text}, {ratio(timed, measured[f'nothing, {how}']):.2f}x"
        )

    rows = [
        [name.replace("_", " "), *(cell(name, how) for how in ("lse", "no lse", "maps"))] for name in ("nothing", *MORE)
    ]
    head = ["asked for", "log-sum-exp known", "not known, with spans", "whole maps"]
    text = f"{heading(where)}\n\n{tokens:,} tokens. The factor is that of the call without the statistic.\n\n"
    data = where | {"tokens": tokens, "measured": {name: m._asdict() for name, m in measured.items()}}
    return publish(out, text + markdown_table(head, rows) + "\n", data)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = torch.device(args.device)
    check(make_problem(min(args.tokens, CHECKED_IN_FP64), device))
    calls = variants(make_problem(args.tokens, device), device)
    with says_when_interrupted(args.out), torch.no_grad():
        measured = interleave(calls, args.rounds, f"{args.tokens} tokens", device)
        print(report(args.out, environment(device), args.tokens, measured))


if __name__ == "__main__":
    main()
