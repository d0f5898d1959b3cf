"""`attention_stats` on a GPU: the row pass where a statistic needs every key, then the band."""

import torch
import triton
from torch import Tensor

from rhythm_kernels.attention.layout import Layout, mean_over_rows
from rhythm_kernels.attention.options import Options
from rhythm_kernels.attention.triton_band import fai_pass, waad_pass
from rhythm_kernels.attention.triton_rows import row_pass
from rhythm_kernels.attention.triton_tiles import INTERPRETED, MAX_HEAD_SIZE, Tiles, choose_tiles
from rhythm_kernels.types import AttentionStats

INTERPRETING = triton.knobs.runtime.interpret  # as it was when the kernels were made


def attention_stats(q: Tensor, k: Tensor, lse: Tensor | None, layout: Layout, options: Options) -> AttentionStats:
    """`attention_stats` behind its checks.

    Raises: ValueError for a device, head size or dtype that these kernels do not run on.
    """
    _check(q)
    if q.shape[0] * q.shape[1] * q.shape[2] == 0:
        waad, fai, row_lse, distance = torch.zeros((4, *q.shape[:3]), device=q.device)
    else:
        tiles = _tiles_for(q)
        if options.sinks is not None:
            options = options._replace(sinks=options.sinks.contiguous())
        with torch.cuda.device_of(q):
            distance = None
            row_lse = None if lse is None else lse.contiguous()
            if lse is None or options.need_span:
                row_lse, distance = row_pass(q, k, row_lse, layout, options, tiles.rows)
            waad = waad_pass(q, k, row_lse, layout, options, tiles.waad)
            fai = fai_pass(q, k, row_lse, layout, options, tiles.fai)
            if lse is not None:
                row_lse = torch.where(layout.rows[:, None], lse, 0.0)
    span = mean_over_rows(distance, layout) if options.need_span else None
    return AttentionStats(waad, fai, span, row_lse)


def _check(q: Tensor) -> None:
    if not (q.is_cuda or INTERPRETING):
        raise ValueError(f'backend="triton" needs q on a GPU, got q on {q.device}; backend="torch" runs there')
    if q.shape[-1] > MAX_HEAD_SIZE:
        raise ValueError(f'backend="triton" takes head sizes up to {MAX_HEAD_SIZE}, got q of shape {list(q.shape)}')
    if INTERPRETING and q.dtype == torch.bfloat16:
        raise ValueError('backend="triton" is interpreted here, and Triton\'s interpreter multiplies bf16 wrongly')


def _tiles_for(q: Tensor) -> Tiles:
    if INTERPRETING:
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(q.device)
    return choose_tiles(10 * major + minor, q.shape[-1], 8 * q.element_size())
