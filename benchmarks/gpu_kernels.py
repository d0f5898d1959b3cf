"""Runs each kernel of the package once on small inputs, for the sanitizers. It compares no results.

compute-sanitizer --tool memcheck python -m benchmarks.gpu_kernels
"""

import torch
from torch import Tensor

from rhythm_kernels import (
    Rhythm,
    attention,
    attention_stats,
    coupled_sets,
    find_peaks,
    group_stats,
    segment_topq,
    token_credit,
)
from rhythm_kernels.statistics.layout import make_layout
from rhythm_kernels.statistics.more import MORE
from rhythm_kernels.statistics.options import check_options
from rhythm_kernels.statistics.probes import rounding_of
from rhythm_kernels.statistics.verify import probe_output

TOKENS = 300
QUERY_HEADS, KEY_HEADS = 4, 2


def run_all(device: str) -> None:
    """Runs every kernel and op; on a CPU those that run there."""
    run_selection(device)  # first: it is short, and a time limit cuts off what is last
    run_attention(device)
    if device == "cuda":
        torch.cuda.synchronize()


def run_attention(device: str) -> None:
    bounds = torch.tensor([0, 77, 77, TOKENS], dtype=torch.int32, device=device)
    response_mask, sinks = torch.rand(1, TOKENS, device=device) < 0.7, torch.zeros(QUERY_HEADS, device=device)
    packed = {"cu_seqlens": bounds, "response_mask": response_mask, "softcap": 20.0, "sinks": sinks}
    windowed = {"sliding_window": 40, "horizon": (1, None)}
    padded = {"attention_mask": (torch.arange(TOKENS, device=device) >= 130)[None]}
    # small heads first: reads outside of shared memory have been reported for them
    for dtype, size, options, is_misaligned in (
        (torch.bfloat16, 16, {}, False),
        (torch.bfloat16, 32, packed, False),
        (torch.bfloat16, 48, windowed, False),
        (torch.bfloat16, 72, {}, True),
        (torch.bfloat16, 128, {}, False),
        (torch.bfloat16, 64, padded, False),
        (torch.float16, 80, packed, False),
        (torch.float32, 64, windowed, False),
    ):
        run_attention_once(device, dtype, size, options, is_misaligned)


def run_attention_once(device: str, dtype: torch.dtype, size: int, options: dict, is_misaligned: bool) -> None:
    """Runs the three calls and the check at one head size. Misaligned rows begin at odd places in memory."""
    wide = size + is_misaligned
    q, k, v = (
        torch.randn(1, heads, TOKENS, wide, device=device, dtype=dtype)[..., wide - size :]
        for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    )
    heads = torch.arange(QUERY_HEADS, device=device) % 3 == 0
    stats = attention_stats(q, k, **options)
    attention_stats(q, k, lse=stats.lse, need_span=False, **options)  # which checks the log-sum-exp
    attention_stats(q, k, lse=stats.lse, span_rows=64, **options)
    attention_stats(q, k, span_rows=64, **options)
    group_stats(q, k, heads, ~heads, lse=stats.lse, **options)
    sequences = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else 1
    more = {"more": MORE, "prefix_lengths": torch.full([sequences], 70, device=device)}
    attention_stats(q, k, **more, **options)
    attention_stats(q, k, lse=stats.lse, **more, **options)
    group_stats(q, k, heads, ~heads, lse=stats.lse, **more | {"more": MORE[2:]}, **options)
    out, _ = attention(q, k, v, **options)
    masks = (options.get(name) for name in ("response_mask", "attention_mask", "cu_seqlens"))
    layout = make_layout(1, TOKENS, q.device, *masks)
    map_options = {name: options.get(name) for name in ("scale", "sliding_window", "softcap", "sinks")}
    checked = check_options(q, k, **map_options, window=10, horizon=(10, 50), need_span=False)
    probe_output(q, k, v, out.transpose(1, 2), stats.lse, layout, checked, rounding_of(dtype, fused=True))


def run_selection(device: str) -> None:
    # blocks of few and of many threads, scratch in shared memory and, from 60,000 tokens on, in global memory
    for shape, cuts in (
        ((3, 1000), None),
        ((2, 3000), None),
        ((1, 60_000), None),
        ((1, 1000), [0, 77, 77, 1000]),
        ((1, 62_000), [0, 77, 77, 2000, 62_000]),
    ):
        cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32, device=device)
        response_mask = torch.rand(shape, device=device) < 0.8
        run_selection_once(torch.randn(shape, device=device), response_mask, cu_seqlens)
        run_selection_once(torch.randint(3, shape, device=device).float(), response_mask, cu_seqlens)  # heavy ties
    if device == "cuda":
        # on a CPU all three raise: sequences that leave the row, or overlap, and a signal that is not finite
        values, response_mask = torch.randn(1, 60_000, device=device), torch.rand(1, 60_000, device=device) < 0.8
        for cuts in ([0, 70_000], [0, 40_000, 100, 60_000]):
            run_selection_once(values, response_mask, torch.tensor(cuts, dtype=torch.int32, device=device))
        run_selection_once(torch.where(values > 1, torch.nan, values), response_mask, None)


def run_selection_once(values: Tensor, response_mask: Tensor, cu_seqlens: Tensor | None) -> None:
    """Runs every op of csrc/ops.cpp."""
    options = {"cu_seqlens": cu_seqlens, "backend": "extension"}
    segment_topq(values, response_mask, 0.4, **options)
    find_peaks(values, response_mask, min_quantile=0.5, **options)
    rhythm = Rhythm(waad=values, fai=values.flip(-1))
    for strategy in ("local", "global", "coupled"):
        token_credit(strategy, response_mask, rhythm, max_lookback=40, **options)
    coupled_sets(response_mask, rhythm, max_lookback=40, **options)


if __name__ == "__main__":
    run_all("cuda")
