"""What would rhythm credit cost on my model, on this machine?

    rhythm bench [smollm2] [--tokens 2048] [--rounds 5] [--out FOLDER]

One sequence of random tokens, all in R; the forward is that of a log-prob pass, logits included. Rows:

    forward         as it is
    groups known    with `collect`, whose head groups an earlier batch has left
    with spans      with `collect`, head groups from this batch
    paper's way     a second forward in eager mode, whose maps of the sampled layers are summed on the spot

Before anything is timed, logits under `collect` must have the bits of the forward, and its statistics must be those of
the eager maps.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rhythm_kernels.analysis.measure import Measured, available_bytes, interleave, ratio, ratios
from rhythm_kernels.analysis.sources import SMOLLM2, check_device, check_folder, check_length, load
from rhythm_kernels.checks import check_int
from rhythm_kernels.listen.collect import Collector, collect
from rhythm_kernels.listen.taps import attention_modules
from rhythm_kernels.types import AttentionStats

WINDOW, HORIZON = 10, (10, 50)
EXACT = 1e-4  # of the largest value, in fp32; in 16 bits eager rounds its scores
ROUNDED = 5e-2


def collected(model: nn.Module, ids: Tensor, groups=None) -> tuple[Tensor, Collector]:
    """(logits, the collector with its rhythm made)."""
    with torch.no_grad(), collect(model, window=WINDOW, horizon=HORIZON, groups=groups) as c:
        logits = model(ids, use_cache=False).logits
    c.rhythm()
    return logits, c


class EagerSums:
    """Sums over whole maps [B, HQ, T, T], as the paper takes them."""

    def __init__(self, tokens: int, device: torch.device):
        position = torch.arange(tokens, device=device)
        self.distance = position[:, None] - position
        lo, hi = HORIZON
        self.far = (self.distance >= lo) & (self.distance <= hi)
        self.looking = self.far.sum(0).clamp(min=1)

    def __call__(self, maps: Tensor) -> AttentionStats:
        """`lse` is not known here."""
        waad = (maps * self.distance.clamp(min=0, max=WINDOW)).sum(-1)
        span = (maps * self.distance).sum(-1).mean(-1)
        return AttentionStats(waad, (maps * self.far).sum(-2) / self.looking, span, lse=None)


def eager_forward(model: nn.Module, decoder: nn.Module, layers: list[int], ids: Tensor) -> dict[int, AttentionStats]:
    """The paper's auxiliary forward: eager in every layer, maps of `layers` summed as soon as they are there."""
    sums, stats = EagerSums(ids.shape[1], ids.device), {}

    def take(module: nn.Module, _, output) -> None:
        if module.layer_idx in layers:
            stats.setdefault(module.layer_idx, sums(output[1]))

    implementation = decoder.config._attn_implementation
    hooks = [module.register_forward_hook(take) for module in attention_modules(decoder)]
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()
    return stats


def make_variants(model: nn.Module, ids: Tensor, *, eager: bool) -> tuple[dict[str, Callable[[], object]], float]:
    """The rows to time, checked against each other, and the largest error in units of each statistic's largest value.

    Raises:
        ValueError: logits that `collect` changes, statistics that are not those of the eager maps.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    plain = forward()
    logits, c = collected(model, ids)
    if not torch.equal(plain, logits):
        raise ValueError("collecting changed the logits of this model: nothing is timed")
    groups = c.rhythm().groups
    variants = {
        "forward": forward,
        "groups known": lambda: collected(model, ids, groups),
        "with spans": lambda: collected(model, ids),
    }
    worst = 0.0
    if eager:
        for layer, exact in eager_forward(model, c.decoder, c.layers, ids).items():
            for name in ("waad", "fai", "span"):
                got, want = (getattr(each, name).double() for each in (c.stats[layer], exact))
                worst = max(worst, ((got - want).abs().max() / want.abs().max()).item())
        allowed = EXACT if model.dtype == torch.float32 else ROUNDED
        if not worst <= allowed:
            raise ValueError(
                f"statistics are off by {worst:.1e} of the largest, allowed are {allowed:.1e}: nothing timed"
            )

        def papers_way() -> None:
            forward()
            eager_forward(model, c.decoder, c.layers, ids)

        variants["paper's way"] = papers_way
    return variants, worst


def eager_bytes(decoder: nn.Module, tokens: int, dtype: torch.dtype) -> int:
    """What the eager maps of one layer need at least: scores, softmax in fp32, and its cast."""
    return decoder.config.num_attention_heads * tokens**2 * (2 * dtype.itemsize + 4)


def table(found: dict[str, Measured]) -> str:
    lines = ["| | time | of the forward (least, most) | peak extra memory |", "|---|---|---|---|"]
    for name, mine in found.items():
        each = ratios(mine, found["forward"])
        share = f"{ratio(mine, found['forward']):.3f}x ({min(each):.3f}, {max(each):.3f})"
        lines.append(f"| {name} | {mine.seconds:.3f} s | {share} | {mine.extra_bytes / 2**20:,.0f} MiB |")
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rhythm bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=SMOLLM2, help="a folder or a name on the hub; smollm2 if left out")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5, help="at most so many timed rounds")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which rounds stop")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the weights', on a CPU float32"
    )
    parser.add_argument("--no-eager", action="store_true", help="leave the paper's way out")
    parser.add_argument("--out", type=Path, help="write bench.md and bench.json into this folder as well")
    args = parser.parse_args(arguments)
    check_int("--tokens", args.tokens, 64)
    check_int("--rounds", args.rounds, 1)
    check_device(args.device)
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    if args.out is not None:
        check_folder(args.out)
    model, _ = load(args.model, device=args.device, dtype=args.dtype and getattr(torch, args.dtype))
    check_length(model, args.tokens, "--tokens", str(args.tokens))
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, args.tokens), generator=generator).to(model.device)
    decoder = collect(model).decoder
    needed, there = eager_bytes(decoder, args.tokens, model.dtype), available_bytes(model.device)
    eager = not args.no_eager and needed < there
    variants, worst = make_variants(model, ids, eager=eager)
    found = interleave(variants, args.rounds, f"{args.tokens:,} tokens", model.device, args.limit)
    on_gpu = model.device.type == "cuda"
    where = torch.cuda.get_device_name(model.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    rounds = len(found["forward"].samples)
    text = (
        f"{args.model}, {model.dtype}, {args.tokens:,} tokens, {where}, torch {torch.__version__}; medians of {rounds} "
    )
    text += (
        f"interleaved rounds; logits equal bit for bit, largest error of the statistics {worst:.1e}\n\n{table(found)}\n"
    )
    if not eager and not args.no_eager:
        sizes = f"a layer's maps need {needed / 2**30:.1f} GiB, {there / 2**30:.1f} are there"
        text += f"\nThe paper's way was not run: {sizes}.\n"
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "bench.md").write_text(text, encoding="utf-8")
        data = {"model": args.model, "tokens": args.tokens, "dtype": str(model.dtype), "device": where, "error": worst}
        data |= {name: each._asdict() for name, each in found.items()}
        (args.out / "bench.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
