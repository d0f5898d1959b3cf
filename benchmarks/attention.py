"""What do the statistics of one layer cost, in time and memory, beside the ways to get them that exist?

    python -m benchmarks.attention [--tokens 512 1024 2048 4096] [--rounds 5] [--out benchmarks/results/attention-cpu]

One sequence in the shape of SmolLM2-135M (9 query heads, 3 key heads of 64, fp32), every token in R. Variants:

    maps    the paper's way: the dense eager formula, [HQ, N, N] scores and softmax, then WAAD, FAI and span of the maps
    sdpa    torch's attention forward, without statistics, for scale
    full    attention_stats without a log-sum-exp: lse, span, WAAD and FAI from every key
    band    attention_stats with the log-sum-exp given and no span: WAAD and FAI from a band (known head groups)

The statistics of each variant are held against fp64 (above 1,024 tokens: against `maps`) before anything is timed.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Measured, environment, interleave
from rhythm_kernels import attention_stats, reference

QUERY_HEADS, KEY_HEADS, HEAD_SIZE = 9, 3, 64
WINDOW, HORIZON = 10, (10, 50)
TOLERANCE = 1e-4  # of WAAD and span in units of their largest value, of FAI absolute


def maps(q: Tensor, k: Tensor, distance: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(waad, fai, span) by the eager formula of transformers, then dense sums. What stays is a row, as with ours."""
    scores = q @ k.repeat_interleave(QUERY_HEADS // KEY_HEADS, 1).mT * HEAD_SIZE**-0.5
    attention = torch.softmax(scores.masked_fill(distance < 0, -torch.inf), -1, dtype=torch.float32)
    waad = (attention * distance.clamp(max=WINDOW)).sum(-1)
    fai = (attention * counted).sum(-2) / counted.sum(-2).clamp(min=1)
    return waad, fai, (attention * distance).sum(-1).mean(-1)


def check(q: Tensor, k: Tensor, answers: dict[str, tuple[Tensor, Tensor, Tensor | None]]) -> float:
    """The largest error of any variant; raises if it is above the tolerance."""
    if q.shape[2] <= 1024:
        exact = reference.attention_stats(q.cpu(), k.cpu(), window=WINDOW, horizon=HORIZON)
        truth = (exact.waad, exact.fai, exact.span)
    else:
        truth = answers["maps"]
    worst = 0.0
    for name, answer in answers.items():
        for kind, got, want in zip(("waad", "fai", "span"), answer, truth, strict=True):
            if got is not None:
                scale = 1.0 if kind == "fai" else max(want.abs().max().item(), 1.0)
                error = (got.cpu().double() - want.cpu().double()).abs().max().item() / scale
                worst = max(worst, error)
                if not error <= TOLERANCE:
                    raise SystemExit(f"{kind} of {name} at {q.shape[2]} tokens is off by {error:.2e}: nothing is timed")
    return worst


def measure(tokens: int, rounds: int, device: torch.device) -> tuple[dict[str, Measured], float]:
    torch.manual_seed(tokens)
    q = torch.randn(1, QUERY_HEADS, tokens, HEAD_SIZE, device=device)
    k, v = (torch.randn(1, KEY_HEADS, tokens, HEAD_SIZE, device=device) for _ in range(2))
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position
    counted = (distance >= HORIZON[0]) & (distance <= HORIZON[1])
    options = {"window": WINDOW, "horizon": HORIZON}
    lse = attention_stats(q, k, **options).lse
    variants = {
        "maps": lambda: maps(q, k, distance, counted),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "full": lambda: attention_stats(q, k, **options)[:3],
        "band": lambda: attention_stats(q, k, lse=lse, need_span=False, **options)[:3],
    }
    worst = check(q, k, {name: run() for name, run in variants.items() if name != "sdpa"})
    return interleave(variants, rounds, f"{tokens} tokens"), worst


def table(results: dict[int, dict[str, Measured]]) -> str:
    names = list(next(iter(results.values())))
    lines = ["| tokens | " + " | ".join(names) + " | maps / full | maps / band |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for tokens, row in results.items():
        cells = [f"{row[name].seconds * 1e3:.1f} ms, {row[name].extra_bytes / 2**20:.0f} MiB" for name in names]
        ratios = [f"{row['maps'].seconds / row[name].seconds:.1f}x" for name in ("full", "band")]
        lines.append("| " + " | ".join([str(tokens), *cells, *ratios]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md as well")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results, worst = {}, 0.0
    for tokens in args.tokens:
        results[tokens], error = measure(tokens, args.rounds, device)
        worst = max(worst, error)
    head = ", ".join(f"{name} {value}" for name, value in environment().items())
    text = f"{head}\n{args.rounds} rounds, medians; largest error {worst:.1e}\n\n{table(results)}\n"
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rows = {tokens: {name: m._asdict() for name, m in row.items()} for tokens, row in results.items()}
        args.out.with_suffix(".md").write_text(text)
        args.out.with_suffix(".json").write_text(json.dumps({**environment(), "error": worst, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
