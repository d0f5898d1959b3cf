"""Measures what rhythm credit would cost on a model, on this machine.

    rhythm bench                                          # SmolLM2-135M, 2,048 tokens
    rhythm bench Qwen/Qwen3-0.6B --tokens 4096

Rhythm credit reads two statistics in the log-prob pass: the windowed average attention distance (WAAD) and the future
attention influence (FAI). The command times that forward, logits included, over one sequence of random tokens:

    forward         the forward alone
    groups known    the forward and the statistics, with the local and global heads of an earlier batch
    with spans      the forward and the statistics, after the heads are ranked by their spans in this batch
    paper's way     the forward, and a second one in eager mode that sums whole attention maps

Nothing is timed unless the logits stay equal bit for bit, and the statistics equal those of the eager maps.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rhythm_kernels.analysis.environment import device_name
from rhythm_kernels.analysis.measure import Measured, available_bytes, interleave, ratio, ratios
from rhythm_kernels.analysis.sources import (
    DTYPES,
    SMOLLM2,
    check_device,
    check_folder,
    check_length,
    folder_named,
    load,
)
from rhythm_kernels.checks import check_int
from rhythm_kernels.console import markdown_table
from rhythm_kernels.files import write_whole
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.listen.collector import Collector
from rhythm_kernels.listen.taps import layers_of, query_heads
from rhythm_kernels.types import AttentionStats

WINDOW, HORIZON = 10, (10, 50)
EXACT = 1e-4  # largest error of a statistic in fp32, relative to its largest value
ROUNDED = 5e-2  # the same in 16 bits, where eager attention rounds its scores


def collected(model: nn.Module, ids: Tensor, groups=None) -> tuple[Tensor, Collector]:
    """Returns (logits, the collector, which has computed its rhythm)."""
    with torch.no_grad(), collect(model, window=WINDOW, horizon=HORIZON, groups=groups) as c:
        logits = model(ids, use_cache=False).logits
    c.rhythm()
    return logits, c


class EagerSums:
    """Sums whole attention maps, as the paper does."""

    def __init__(self, tokens: int, device: torch.device):
        position = torch.arange(tokens, device=device)
        self.distance = position[:, None] - position
        lo, hi = HORIZON
        self.far = (self.distance >= lo) & (self.distance <= hi)
        self.far_rows = self.far.sum(0).clamp(min=1)

    def __call__(self, maps: Tensor) -> AttentionStats:
        """Returns the statistics of maps [B, HQ, T, T], without `lse`."""
        waad = (maps * self.distance.clamp(min=0, max=WINDOW)).sum(-1)
        span = (maps * self.distance).sum(-1).mean(-1)
        return AttentionStats(waad, (maps * self.far).sum(-2) / self.far_rows, span, lse=None)


def eager_forward(model: nn.Module, decoder: nn.Module, layers: list[int], ids: Tensor) -> dict[int, AttentionStats]:
    """Runs the paper's auxiliary forward, eager in every layer; returns the statistics of `layers`, summed at once."""
    sums, stats = EagerSums(ids.shape[1], ids.device), {}

    places: dict[nn.Module, list[int]] = {}  # of the calls of a module that are still to come
    for layer, module in layers_of(decoder).attention.items():
        places.setdefault(module, []).append(layer)

    def sum_maps(module: nn.Module, _, output) -> None:
        layer = places[module].pop(0)
        if layer in layers:
            stats[layer] = sums(output[1])

    implementation = decoder.config._attn_implementation
    hooks = [module.register_forward_hook(sum_maps) for module in places]
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
    """Returns the variants to time, after a check, and the largest error relative to a statistic's largest value.

    Raises:
        ValueError: `collect` changes the logits, or its statistics differ from those of the eager maps.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    plain = forward()
    if plain.isnan().any():
        raise ValueError(f"the logits of this model are NaN in {model.dtype}: nothing is timed")
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
                got, want = (getattr(stats, name).double() for stats in (c.stats[layer], exact))
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
    """Returns the fewest bytes that one layer's eager maps need: scores, softmax in fp32, and its cast."""
    return query_heads(decoder) * tokens**2 * (2 * dtype.itemsize + 4)


def table(measured: dict[str, Measured]) -> str:
    """Returns the measurements as a table in Markdown."""
    rows = []
    for name, variant in measured.items():
        of_rounds = ratios(variant, measured["forward"])
        relative = f"{ratio(variant, measured['forward']):.3f}x ({min(of_rounds):.3f}, {max(of_rounds):.3f})"
        rows.append([name, f"{variant.seconds:.3f} s", relative, f"{variant.extra_bytes / 2**20:,.0f} MiB"])
    return markdown_table(["", "time", "relative to the forward (fastest, slowest round)", "peak extra memory"], rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rhythm bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", default=SMOLLM2, help='a folder, a name on the Hugging Face hub, or "smollm2" (the default)'
    )
    parser.add_argument("--tokens", type=int, default=2048, help="length of the sequence (2048)")
    parser.add_argument("--rounds", type=int, default=5, help="largest number of timed rounds (5)")
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds after which no further round starts, after 3 rounds (600)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:1; auto: cuda where torch finds a GPU")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights; auto: as saved, float32 on a CPU"
    )
    parser.add_argument("--no-eager", action="store_true", help="do not run the paper's way")
    parser.add_argument("--out", type=folder_named, help="a folder, to write bench.md and bench.json into as well")
    args = parser.parse_args(arguments)
    check_int("--tokens", args.tokens, 64)
    check_int("--rounds", args.rounds, 1)
    check_device(args.device)
    return args


def main(arguments: list[str]) -> None:
    """Runs `rhythm bench`."""
    args = parse(arguments)
    if args.out is not None:
        check_folder(args.out)
    model, _ = load(args.model, device=args.device, dtype=DTYPES[args.dtype])
    check_length(model, args.tokens, "--tokens", str(args.tokens))
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, args.tokens), generator=generator).to(model.device)
    decoder = collect(model).decoder
    needed, available = eager_bytes(decoder, args.tokens, model.dtype), available_bytes(model.device)
    eager = not args.no_eager and needed < available
    variants, worst = make_variants(model, ids, eager=eager)
    measured = interleave(variants, args.rounds, f"{args.tokens:,} tokens", model.device, args.limit)
    where, rounds = device_name(model.device), len(measured["forward"].samples)
    text = (
        f"{args.model}, {model.dtype}, {args.tokens:,} tokens, {where}, torch {torch.__version__}; medians of {rounds} "
        f"interleaved rounds; logits equal bit for bit, largest error of the statistics {worst:.1e}\n\n"
        f"{table(measured)}\n"
    )
    if not eager and not args.no_eager:
        sizes = f"the maps of one layer need {needed / 2**30:.1f} GiB, of which {available / 2**30:.1f} are available"
        text += f"\nThe paper's way was not run: {sizes}.\n"
    print(text)
    if args.out is not None:
        write_whole(args.out / "bench.md", text)
        data = {"model": args.model, "tokens": args.tokens, "dtype": str(model.dtype), "device": where, "error": worst}
        data |= {name: variant._asdict() for name, variant in measured.items()}
        write_whole(args.out / "bench.json", json.dumps(data, indent=1) + "\n")
