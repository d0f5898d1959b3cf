"""Measures the statistics of one layer whose heads or tokens lie on several ranks, beside those of one rank.

    torchrun --nproc-per-node 2 -m benchmarks.parallel [--tokens 4096] [--out benchmarks/results/parallel-cpu]

The input is one sequence of N tokens in the shape of Qwen3-0.6B (16 query heads and 8 key heads of 128; bf16 on a GPU,
fp32 on a CPU), all rows in R, with spans from the default sample and without a known log-sum-exp. Each rank has one
thread. Compared are:

    one      one rank computes all heads, and the others wait
    heads    each rank has its share of the heads: the statistics, the gather of the spans, and the sums over the groups
    tokens   each rank has its share of the tokens: q, k, v and the output are swapped first, then as `heads`
    swap     the swap alone

A time is that of the slowest rank. Nothing is timed before the sums of `heads` and `tokens` are those of `one`: to the
bit for each head, to fp32 rounding for their sums over the ranks.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import (
    Measured,
    environment,
    heading,
    interleave,
    make_parser,
    markdown_table,
    median_and_range,
    publish,
    ratios,
    says_when_interrupted,
)
from rhythm_kernels import AttentionStats, Parallel, Rhythm
from rhythm_kernels.host import fetch
from rhythm_kernels.listen.backend_lse import LseReader
from rhythm_kernels.listen.shards import Shards, head_shares
from rhythm_kernels.listen.taps import Call
from rhythm_kernels.options import SPAN_ROWS
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.statistics.api import run_stats
from rhythm_kernels.statistics.layout import make_layout
from rhythm_kernels.statistics.options import check_options

QUERY_HEADS, KEY_HEADS, SIZE = 16, 8, 128
ALLOWED = 1e-5  # error of the sums, in units of the largest value


class Problem:
    """One layer's attention over a sequence, and this rank's share of it by heads and by tokens."""

    def __init__(self, tokens: int, device: torch.device):
        self.rank, ranks = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = (1, QUERY_HEADS + 2 * KEY_HEADS, tokens, SIZE)
        self.q, self.k, self.v = (
            torch.randn(shape, generator=generator).to(device, dtype).split([QUERY_HEADS, KEY_HEADS, KEY_HEADS], 1)
        )
        self.layout = make_layout(1, tokens, device)
        self.by_heads, self.by_tokens = (
            Shards(Parallel(heads=dist.group.WORLD)),
            Shards(Parallel(tokens=dist.group.WORLD)),
        )
        own = head_shares(QUERY_HEADS, ranks)[self.rank]
        group = QUERY_HEADS // KEY_HEADS
        self.own_q, self.own_k = self.q[:, list(own)], self.k[:, own[0] // group : own[-1] // group + 1].contiguous()
        self.by_heads.count_heads(len(own), QUERY_HEADS)
        positions = torch.arange(tokens, device=device)[None].chunk(ranks, -1)[self.rank]
        self.by_tokens.whole_row(positions.shape[1], {"position_ids": positions}, None)
        self.by_tokens.count_heads(QUERY_HEADS, QUERY_HEADS)
        self.parts = [x[:, :, self.by_tokens.own_tokens].contiguous() for x in (self.q, self.k, self.v)]

    def stats(self, q: Tensor, k: Tensor) -> AttentionStats:
        options = check_options(q, k, None, 10, (10, 50), None, None, None, True, SPAN_ROWS)
        return run_stats(q, k, None, self.layout, options)

    def one(self) -> Rhythm | None:
        return rhythm_of({0: self.stats(self.q, self.k)}, self.layout) if self.rank == 0 else None

    def heads(self) -> Rhythm:
        return rhythm_of({0: self.stats(self.own_q, self.own_k)}, self.layout, heads=self.by_heads.heads)

    def swap(self) -> tuple[Tensor, Tensor]:
        q, k, v = self.parts
        call = Call(None, q, k, v, None, {}, LseReader(), None, None, None)
        # the output has the shape of q here
        turned, _ = self.by_tokens.turned(call, q.transpose(1, 2))
        return turned.query, turned.key

    def tokens(self) -> Rhythm:
        return rhythm_of({0: self.stats(*self.swap())}, self.layout, heads=self.by_tokens.heads)

    def bytes_of(self, run: Callable[[], object]) -> int:
        """Returns the bytes that this rank sends in a call."""
        groups = [*self.by_heads.groups, *self.by_tokens.groups]
        before = sum(ranks.sent for ranks in groups)
        run()
        return sum(ranks.sent for ranks in groups) - before


def check(problem: Problem) -> None:
    """Raises SystemExit if a statistic is not that of one rank."""
    whole = problem.stats(problem.q, problem.k)
    own = list(head_shares(QUERY_HEADS, dist.get_world_size())[problem.rank])
    exact = rhythm_of({0: whole}, problem.layout)
    for name, inputs in (("heads", (problem.own_q, problem.own_k)), ("tokens", problem.swap())):
        got = problem.stats(*inputs)
        for field, value, wanted in zip(got._fields, got[:4], whole[:4]):
            if not torch.equal(value, wanted[:, own]):
                raise SystemExit(f"{field} of a head has other bits with split {name}: it is not timed")
    for name in ("heads", "tokens"):
        rhythm = getattr(problem, name)()
        for field in ("waad", "fai"):
            got, wanted = fetch([getattr(rhythm, field), getattr(exact, field)])
            error = ((got - wanted).abs().max() / wanted.abs().max()).item()
            if not error <= ALLOWED:
                raise SystemExit(
                    f"{field} of split {name} is off by {error:.1e}, allowed are {ALLOWED:.1e}: it is not timed"
                )


def variants(problem: Problem) -> dict[str, Callable[[], object]]:
    """Returns the calls to time; each begins and ends on all ranks together."""

    def together(run: Callable[[], object]) -> None:
        dist.barrier()
        run()
        dist.barrier()

    return {name: lambda name=name: together(getattr(problem, name)) for name in ("one", "heads", "tokens", "swap")}


def report(
    out: Path | None, where: dict[str, str], tokens: int, sent: dict[str, int], measured: dict[str, Measured]
) -> str:
    """Returns the report, after writing it where `--out` asks for it."""
    rows = [
        [
            name,
            f"{timed.seconds * 1e3:.3g} ms",
            "-" if name == "one" else median_and_range(ratios(timed, measured["one"])),
            f"{sent[name]:,}",
        ]
        for name, timed in measured.items()
    ]
    head = ["split", "time", "of one rank's", "bytes that a rank sends"]
    ranks = dist.get_world_size()
    text = f"{heading(where)}\n\n{tokens:,} tokens, {ranks} ranks of one thread, backend {dist.get_backend()}.\n\n"
    data = where | {"tokens": tokens, "ranks": ranks, "sent": sent}
    data |= {"measured": {name: timed._asdict() for name, timed in measured.items()}}
    return publish(out, text + markdown_table(head, rows) + "\n", data)


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    out = args.out if dist.get_rank() == 0 else None
    with says_when_interrupted(out), torch.no_grad():
        problem = Problem(args.tokens, device)
        check(problem)
        sent = {name: problem.bytes_of(getattr(problem, name)) for name in ("one", "heads", "tokens", "swap")}
        measured = interleave(variants(problem), args.rounds, f"{args.tokens} tokens", device)
        if dist.get_rank() == 0:
            print(report(out, environment(device), args.tokens, sent, measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
