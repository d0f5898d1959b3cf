"""Which small mismatches does the check of an attention call's output find, and how close to its limit are sound calls?

    python -m benchmarks.weakest_mismatch [--out benchmarks/results/weakest-mismatch]

The inputs are random q, k and v of 512 tokens, 8 query heads and 2 key heads of 64, in each dtype, with scores of
several standard deviations. The output is computed by the eager formula and by torch's fused attention, and the map
that the check assumes differs from it a little. The table shows the deviation over the limit of
`rhythm_kernels/statistics/verify.py`, which is above 1 where the check finds it: the smallest of several draws, and the
largest for sound calls.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from benchmarks.measure import environment, heading, make_parser, markdown_table, publish
from rhythm_kernels.statistics.layout import Layout, make_layout
from rhythm_kernels.statistics.options import check_options
from rhythm_kernels.statistics.probes import rounding_of
from rhythm_kernels.statistics.verify import probe_output

TOKENS, QUERY_HEADS, KEY_HEADS, SIZE = 512, 8, 2, 64
SCALE = SIZE**-0.5
WINDOW = 100
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARPNESS = (0.3, 1.0, 4.0, 12.0)  # standard deviations of the scores
LEAKS, SCALES = (1, 0.3, 0.1), (2, 0.5, 0.1)  # percent


def draw(dtype: torch.dtype, sharpness: float = 1.0, seed: int = 0, tokens: int = TOKENS) -> tuple[Tensor, ...]:
    """Draws q [1, QUERY_HEADS, tokens, SIZE], k and v [1, KEY_HEADS, tokens, SIZE]."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, QUERY_HEADS, tokens, SIZE, generator=generator) * sharpness
    k, v = torch.randn(2, 1, KEY_HEADS, tokens, SIZE, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def visible(tokens: int, window: int | None = None, cut: int = 0) -> Tensor:
    """Returns which keys a row attends to, bool [tokens, tokens]: causal, in a window, within one of two sequences.

    The second sequence begins at `cut`.
    """
    position = torch.arange(tokens)
    distance = position[:, None] - position
    in_window = (distance >= 0) & (distance < (window or tokens))
    return in_window & ((position[:, None] < cut) == (position < cut))


def eager(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float = SCALE, softcap: float | None = None) -> Tensor:
    """Attends by transformers' formula, which rounds scores and weights to the dtype of its inputs: [B, T, HQ, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = (scores + torch.where(seen, 0.0, -math.inf).to(scores.dtype)).softmax(-1, dtype=torch.float32)
    return (weights.to(q.dtype) @ v).transpose(1, 2)


def fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float = SCALE) -> Tensor:
    """Attends by torch's fused attention: [B, T, HQ, D]."""
    causal = torch.equal(seen, visible(len(seen)))
    mask = None if causal else seen
    return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True).transpose(1, 2)


CALLS: dict[str, Callable[..., Tensor]] = {"fused": fused, "eager": eager}


def answer(tokens: int = TOKENS) -> Layout:
    """Returns the layout of one sequence whose first quarter is a prompt."""
    return make_layout(1, tokens, torch.device("cpu"), torch.arange(tokens)[None] >= tokens // 4)


def excess(inputs: tuple[Tensor, ...], out: Tensor, layout: Layout, call: str, **options) -> float:
    """Returns the largest deviation of an output from the map that q, k and the options describe, over the limit."""
    q, k, v = inputs
    plain = {"scale": None, "window": 10, "horizon": (10, 50), "sliding_window": None, "softcap": None, "sinks": None}
    assumed = check_options(q, k, need_span=True, **plain | options)
    rounding = rounding_of(q.dtype, fused=call == "fused", softcap="softcap" in options)
    [(_, deviation)] = probe_output(q, k, v, out, None, layout, assumed, rounding)
    return deviation.excess.item()


def leaking(inputs: tuple[Tensor, ...], call: str, cut: int, share: float) -> Tensor:
    """Attends so that rows from `cut` on give this share of their weight to the first token of another sequence."""
    *_, v = inputs
    out = CALLS[call](*inputs, visible(v.shape[2], cut=cut)).float()
    other_value = v[:, :, 0].float().repeat_interleave(QUERY_HEADS // KEY_HEADS, 1)
    out[:, cut:] = (1 - share) * out[:, cut:] + share * other_value[:, None]
    return out.to(v.dtype)


def ratios(inputs: tuple[Tensor, ...], call: str) -> dict[str, float]:
    """Returns the deviation over the limit of sound calls and of small mismatches, by name."""
    attend, cut, tokens = CALLS[call], inputs[0].shape[2] // 8, inputs[0].shape[2]
    packed = make_layout(1, tokens, torch.device("cpu"), cu_seqlens=torch.tensor([0, cut, tokens]))
    plain, window = answer(tokens), {"sliding_window": WINDOW}
    deviations = {
        "sound": excess(inputs, attend(*inputs, visible(tokens)), plain, call),
        "sound, window": excess(inputs, attend(*inputs, visible(tokens, WINDOW)), plain, call, **window),
        "window + 1": excess(inputs, attend(*inputs, visible(tokens, WINDOW + 1)), plain, call, **window),
    }
    for percent in LEAKS:
        deviations[f"leak {percent} %"] = excess(inputs, leaking(inputs, call, cut, percent / 100), packed, call)
    for percent in SCALES:
        out = attend(*inputs, visible(tokens), scale=SCALE * (1 + percent / 100))
        deviations[f"scale {percent} %"] = excess(inputs, out, plain, call)
    return deviations


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--draws", type=int, default=6, help="draws of the inputs in each case")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    args = parser.parse_args(arguments)
    if args.draws < 1:
        parser.error(f"--draws must be at least 1, got {args.draws}")
    cases = [(name, call, sharp) for name in DTYPES for call in CALLS for sharp in SHARPNESS]
    rows = {}
    for name, call, sharp in tqdm(cases, desc="weakest mismatch", unit="case"):
        draws = [ratios(draw(DTYPES[name], sharp, seed), call) for seed in range(args.draws)]
        rows[f"{name}, {call}, {sharp}"] = {
            key: (max if key.startswith("sound") else min)(row[key] for row in draws) for key in draws[0]
        }
    where = environment(torch.device("cpu"))
    names = list(next(iter(rows.values())))
    lines = [[key, *(f"{row[name]:.3g}" for name in names)] for key, row in rows.items()]
    table = markdown_table(["dtype, call, scores' deviation", *names], lines)
    text = f"{heading(where)}\n\nthe deviation over the limit, above 1 where it is found; {args.draws} draws\n\n"
    print(publish(args.out, f"{text}{table}\n", {**where, "draws": args.draws, "rows": rows}))


if __name__ == "__main__":
    main()
