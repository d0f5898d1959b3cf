"""Selects tokens: the largest fraction of a sequence (TopQ), and the peaks of a signal.

Both work on values [B, T] and a response_mask [B, T] row by row, or on one row of packed sequences. Both backends, the
C++/CUDA extension and the same rule composed of torch ops, give the same bits. Values are ordered as numbers, denormals
and infinities included, and -0.0 equals +0.0. NaN comes last in both directions and is never selected.
"""

import torch
from torch import Tensor

from rhythm_kernels.checks import check_bool, check_choice, check_cuts, check_float
from rhythm_kernels.credit import composed, extension
from rhythm_kernels.tensor_checks import can_look, check_cu_seqlens, check_tensor

BACKENDS = ("auto", "extension", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float32 holds all their values exactly


def segment_topq(
    values: Tensor,
    response_mask: Tensor,
    top_fraction: float,
    *,
    largest: bool = True,
    cu_seqlens: Tensor | None = None,
    return_nan: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selects the ceil(top_fraction n - 1e-9) largest of each sequence's n masked positions (TopQ, Eq. 13, 15).

    Ties go to the lower position. NaN counts towards n but is never selected.

    Args:
        values: [B, T] fp32, fp16 or bf16.
        response_mask: [B, T] bool, the positions that are counted and may be selected.
        top_fraction: q of the paper, 0 to 1: 0 selects none, 1 all but NaN.
        largest: False selects the smallest (the paper's Table 5).
        cu_seqlens: [S + 1] int32 or int64, bounds of packed sequences, which rise from 0 to T; then B = 1.
        return_nan: also return which sequences have a NaN under the response_mask.
        backend: "extension", "torch", or "auto": the extension where it is built for the device, else torch.

    Returns:
        [B, T] bool; with `return_nan` also bool [S] (S = B if sequences are not packed).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: backend="extension" where it is not built for the device.

    With the extension the host does not wait for a GPU, and so cannot raise there for what cu_seqlens holds. If its
    values do not rise from 0 to T, nothing is selected and every sequence is reported to have a NaN.
    """
    values, response_mask, cu_seqlens = _check_rows(values, response_mask, cu_seqlens)
    top_fraction = check_float("top_fraction", top_fraction, 0.0, 1.0)
    check_bool("largest", largest)
    check_bool("return_nan", return_nan)
    selected, has_nan = ops(backend, response_mask.device).segment_topq(
        values, response_mask, cu_seqlens, top_fraction, largest
    )
    return (selected, has_nan) if return_nan else selected


def find_peaks(
    values: Tensor,
    response_mask: Tensor,
    *,
    min_quantile: float = 0.0,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Finds the strict local maxima in each run of consecutive masked positions, as scipy.signal.find_peaks does.

    A plateau (a stretch of equal values) is a peak if both its neighbours are lower, and is marked at its first
    position only. A plateau at an end of its run has a single neighbour and is no peak. Comparisons with NaN are false,
    so neither NaN nor a plateau beside one is a peak.

    Args:
        values: [B, T] fp32, fp16 or bf16.
        response_mask: [B, T] bool.
        min_quantile: p in [0, 1]: a peak's value must be at least the ceil(p n - 1e-9)-th smallest of the sequence's n
            masked values, where NaN counts as the largest; 0 admits every peak.
        cu_seqlens, backend: as in `segment_topq`.

    Returns:
        [B, T] bool.

    Raises:
        TypeError, ValueError, RuntimeError: as `segment_topq`.
    """
    values, response_mask, cu_seqlens = _check_rows(values, response_mask, cu_seqlens)
    min_quantile = check_float("min_quantile", min_quantile, 0.0, 1.0)
    return ops(backend, response_mask.device).find_peaks(values, response_mask, cu_seqlens, min_quantile)


def ops(backend: str, device: torch.device):
    """Returns the namespace with the ops of csrc/ops.cpp: the extension's, or `composed`."""
    check_choice("backend", backend, BACKENDS)
    if backend == "extension":
        extension.require(device.type)
        return torch.ops.rhythm_kernels
    return torch.ops.rhythm_kernels if backend == "auto" and extension.available(device.type) else composed


def check_packing(cu_seqlens: Tensor | None, response_mask: Tensor) -> Tensor | None:
    """Returns cu_seqlens in int32. Checks its values if the host need not wait for them."""
    if cu_seqlens is None:
        return None
    check_cu_seqlens(cu_seqlens, len(response_mask), response_mask.device)
    if can_look(cu_seqlens):
        check_cuts(cu_seqlens.tolist(), response_mask.shape[1])
    # values that int32 does not hold stay wrong
    return cu_seqlens if cu_seqlens.dtype == torch.int32 else cu_seqlens.clamp(-1, 2**31 - 1).int()


def _check_rows(
    values: Tensor, response_mask: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks the arguments; returns values in float32 without a graph, response_mask, and cu_seqlens in int32."""
    check_tensor("values", values, ("B", "T"), DTYPES)
    check_tensor("response_mask", response_mask, values.shape, (torch.bool,), values.device)
    return values.detach().float(), response_mask, check_packing(cu_seqlens, response_mask)
