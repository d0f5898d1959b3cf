"""The check of verify.py on a GPU: three launches, which read q, k, v, the output and the log-sum-exp where they lie.

Shapes: as in triton_probe_kernels.py.
"""

import torch
import triton
from torch import Tensor

from rhythm_kernels.host import send
from rhythm_kernels.statistics import probes
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.probes import Deviation, Rounding, probed_rows
from rhythm_kernels.statistics.triton_probe_kernels import (
    CHUNK_FIELDS,
    probe_errors_kernel,
    probe_scores_kernel,
    probe_worst_kernel,
)
from rhythm_kernels.statistics.triton_scores import padded_size

CHUNK = 256  # keys of a program of the first kernel: 8,192 tokens with 8 key heads give 256 programs
# Few rows at a time: the tiles of a chunk run side by side and share its keys in L2, and no target spills registers.
# On an H100 4 warps take 0.76x of the time at 8,192 tokens, but spill on sm_100.
BLOCK_M, WARPS, STAGES = 16, 8, 2
BLOCK_N = {16: 32, 32: 16}  # keys, by the bits of q and k


def probe(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    layout: Layout,
    options: Options,
    rounding: Rounding | None,
    heads_checked: Tensor | None = None,
) -> list[tuple[str, Deviation]]:
    """Returns the deviations of `verify.probe_output`; without v, out and rounding only that of the log-sum-exp.

    Args:
        heads_checked: bool [S, HQ], the query heads that are checked; None for all.
        q, k, v, out, lse, layout, options, rounding: as in `verify.probe_output`.
    """
    rounding = rounding or Rounding(0.0, 0.0, 0.0, 0.0, 0.0)  # a log-sum-exp does not depend on it
    rows = probed_rows(layout, probes.END_ROWS if v is None else probes.PROBES)
    chunks, first_chunk = layout.keep(("chunks", CHUNK), lambda: _chunks(layout))
    if len(chunks) == 0:
        return []
    batch, heads, tokens, size = q.shape
    key_heads, per_sequence, device = k.shape[1], rows.shape[1], q.device
    v, out = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (v, out))
    size_v = 1 if v is None else v.shape[-1]
    tiles = triton.cdiv(heads // key_heads * per_sequence, BLOCK_M)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with_out = v is not None
    errors = scratch(2, 4, *rows.shape, heads)
    shared = {
        "q": q,
        "rows": rows,
        "scores": scratch(heads, per_sequence, batch, tokens) if with_out else None,
        "lengths": scratch(key_heads, batch, tokens) if with_out else None,
        "longest": scratch(len(chunks), key_heads, 2),
        "peaks": scratch(len(chunks), heads, per_sequence),
        "totals": scratch(len(chunks), heads, per_sequence),
        "outputs": scratch(len(chunks), heads, per_sequence, size_v) if with_out else None,
        **_strides("q", q, "bht"),
        "places": batch * tokens,
        "tokens": tokens,
        "heads": heads,
        "probes": per_sequence,
        "sliding_window": options.sliding_window or tokens,
        "scale": options.scale,
        "GROUP": heads // key_heads,
        "SIZE": size,
        "BLOCK_D": padded_size(size),
        "SIZE_V": size_v,
        "BLOCK_DV": padded_size(size_v),
        "CHUNK": CHUNK,
        "USE_OUT": with_out,
    }
    with torch.cuda.device_of(q):
        probe_scores_kernel[(len(chunks) * key_heads * tiles,)](
            k=k,
            v=v,
            chunks=chunks,
            **_strides("k", k, "bht"),
            **_strides("v", v, "bht"),
            cap=options.softcap or 0.0,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N[8 * q.element_size()],
            GAIN=2.0**15 if with_out and v.dtype == torch.float16 else 1.0,
            USE_SOFTCAP=options.softcap is not None,
            num_warps=WARPS,
            num_stages=STAGES,
            **shared,
        )
        probe_errors_kernel[(rows.numel() * heads,)](
            out=out,
            lse=lse,
            bounds=layout.table,
            first_chunk=first_chunk,
            wanted=heads_checked,
            sinks=None if options.sinks is None else options.sinks.contiguous(),
            errors=errors,
            **_strides("o", out, "bth"),
            **_strides("l", lse, "bht"),
            **_strides("w", heads_checked, "sh"),
            rows_count=rows.numel() * heads,
            slip=rounding.weights,
            slip_of_reach=rounding.factors + probes.ACCUMULATED,
            slip_of_score=rounding.scores,
            rounding_out=rounding.out,
            smallest=rounding.smallest,
            BLOCK_C=16,
            BLOCK_N=512,
            USE_SINKS=options.sinks is not None,
            USE_WANTED=heads_checked is not None,
            USE_LSE=lse is not None,
            enable_fp_fusion=False,  # see `rounded_product`: it sums products over the threads of a warp
            **shared,
        )
        names = ["output"] * with_out + ["log-sum-exp"] * (lse is not None)
        values, places = scratch(2, 4), scratch(2, 3, dtype=torch.int64)
        first = 0 if with_out else 1
        probe_worst_kernel[(len(names),)](
            errors=errors,
            bounds=layout.table,
            rows=rows,
            values=values,
            places=places,
            heads=heads,
            probes=per_sequence,
            rows_count=rows.numel() * heads,
            first=first,
            BLOCK=1024,
        )
    worst = zip(names, values[first:], places[first:])
    return [(name, Deviation(value[0], place, value[1:])) for name, value, place in worst]


def _chunks(layout: Layout) -> tuple[Tensor, Tensor]:
    """Cuts every sequence into chunks of CHUNK keys.

    Returns:
        int32 [C, 4]: sequence, batch row, the chunk's first key, one past the sequence's last key; and int32 [S]: the
        index of each sequence's first chunk.
    """
    bounds = torch.tensor(layout.bounds, dtype=torch.int64, device="cpu").view(-1, 3)
    batch, begin, end = bounds.unbind(-1)
    count = (end - begin + CHUNK - 1) // CHUNK
    first = count.cumsum(0) - count
    sequence = torch.repeat_interleave(torch.arange(len(count), device="cpu"), count)
    start = begin[sequence] + (torch.arange(len(sequence), device="cpu") - first[sequence]) * CHUNK
    table = torch.stack([sequence, batch[sequence], start, end[sequence]], -1)
    sent = send(torch.cat([table.flatten(), first]).int(), layout.rows.device)
    return sent[: table.numel()].view(-1, CHUNK_FIELDS.value), sent[table.numel() :]


def _strides(letter: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """Returns the strides of a tensor's first axes by the kernels' names for them; 0 where there is no tensor."""
    return {f"stride_{letter}{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate(axes)}
