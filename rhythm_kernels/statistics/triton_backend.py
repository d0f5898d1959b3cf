"""The three calls of api.py in Triton: a forward pass where a statistic needs every key, then a band pass.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v; S sequences.
"""

import torch
import triton
from torch import Tensor

from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.more import NEED_EVERY_KEY, column_sums, in_order
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.statistics.triton_band import band_pass, sum_heads
from rhythm_kernels.statistics.triton_forward import forward_pass
from rhythm_kernels.statistics.triton_masses import masses
from rhythm_kernels.statistics.triton_scores import aligned
from rhythm_kernels.statistics.triton_tiles import INTERPRETED, MAX_HEAD_SIZE, MAX_TOKEN_STRIDE, Tiles, choose_tiles
from rhythm_kernels.types import AttentionStats, GroupStats

INTERPRETING = triton.knobs.runtime.interpret  # Triton decides it once, when the kernels are defined


def attention_stats(q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options) -> AttentionStats:
    """Computes `api.attention_stats` on checked arguments.

    Raises:
        ValueError: a device, head size, stride or dtype that these kernels do not take. The other calls raise it too.
    """
    tiles, span = _choose_tiles(q=q, k=k), None
    with torch.cuda.device_of(q):
        q, k = aligned(q), aligned(k)
        if lse is not None:
            lse = lse.contiguous()
        row_lse, row_values = lse, _row_values(q, options)
        if lse is not None and options.need_span and options.span_rows is not None and not row_values:
            _, span, _ = forward_pass(q, k, None, lse, layout, options, tiles.sampled, sample_only=True)
        elif lse is None or options.need_span or row_values:
            row_lse, span, _ = forward_pass(q, k, None, lse, layout, options, tiles.rows, row_values=row_values)
        more = row_values | masses(q, k, row_lse, None, layout, options, tiles.sampled)
        if lse is None:
            waad, fai = band_pass(q, k, row_lse, None, layout, options, tiles.band)
        else:
            waad, fai, row_lse = band_pass(q, k, lse, None, layout, options, tiles.band, copy_lse=True)
        more = in_order(options, more | column_sums(fai, layout, options))
        return AttentionStats(waad, fai, span, row_lse, more)


def _row_values(q: Tensor, options: Options) -> dict[str, Tensor]:
    """Returns memory for what is asked for and needs every key, fp32 [B, HQ, T] by name."""
    names = [name for name in NEED_EVERY_KEY if name in options.more]
    return {name: torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for name in names}


def group_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    local_heads: Tensor,
    global_heads: Tensor,
    layout: Layout,
    options: Options,
) -> GroupStats:
    """Computes `api.group_stats` on checked arguments; local_heads and global_heads are bool [S, HQ]."""
    tiles = _choose_tiles(q=q, k=k)
    with torch.cuda.device_of(q):
        q, k = aligned(q), aligned(k)
        if lse is None:
            lse, *_ = forward_pass(q, k, None, None, layout, options, tiles.rows)
        lse, groups = lse.contiguous(), (local_heads, global_heads)
        waad, fai = band_pass(q, k, lse, groups, layout, options, tiles.band)
        more = {
            name: sum_heads(mass, mass, (local_heads, local_heads), layout, options, tiles.band)[0]
            for name, mass in masses(q, k, lse, local_heads, layout, options, tiles.sampled).items()
        }
        return GroupStats(waad, fai, in_order(options, more | column_sums(fai, layout, options)))


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, options: Options) -> tuple[Tensor, AttentionStats]:
    """Computes `api.attention` on checked arguments."""
    tiles = _choose_tiles(q=q, k=k, v=v)
    with torch.cuda.device_of(q):
        q, k = aligned(q), aligned(k)
        lse, span, out = forward_pass(q, k, v, None, layout, options, tiles.forward)
        row_values = _row_values(q, options)
        if row_values:  # a pass of its own: with v there are no registers for more
            without_span = options._replace(need_span=False)
            forward_pass(q, k, None, lse, layout, without_span, tiles.rows, row_values=row_values)
        waad, fai = band_pass(q, k, lse, None, layout, options, tiles.band)
        more = row_values | masses(q, k, lse, None, layout, options, tiles.sampled)
        more = in_order(options, more | column_sums(fai, layout, options))
        return out, AttentionStats(waad, fai, span, lse, more)


def unsupported(**inputs: Tensor) -> str | None:
    """Returns why these kernels cannot take q, k and v: what they take, and what arrived; None if they can."""
    q = inputs["q"]
    if not (q.is_cuda or INTERPRETING):
        return f"needs q on a GPU, got q on {q.device}"
    if INTERPRETING and q.dtype == torch.bfloat16:
        return "is interpreted here, and Triton's interpreter multiplies bf16 wrongly, got q of torch.bfloat16"
    largest = MAX_HEAD_SIZE[8 * q.element_size()]
    for name, x in inputs.items():
        if x.shape[-1] > largest:
            return f"takes head sizes up to {largest} in {x.dtype}, got {name} of shape {list(x.shape)}"
        if x.stride(2) > MAX_TOKEN_STRIDE:
            return f"takes token strides up to {MAX_TOKEN_STRIDE} elements, got {name} of strides {x.stride()}"
    return None


def _choose_tiles(**inputs: Tensor) -> Tiles:
    reason = unsupported(**inputs)
    if reason is not None:
        raise ValueError(f'backend="triton" {reason}; backend="torch" runs there')
    q, v = inputs["q"], inputs.get("v")
    return _tiles_for(q.device, q.shape[-1], 0 if v is None else v.shape[-1], 8 * q.element_size())


def _tiles_for(device: torch.device, head_size: int, value_size: int, bits: int) -> Tiles:
    if INTERPRETING:
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return choose_tiles(10 * major + minor, head_size, value_size, bits)
