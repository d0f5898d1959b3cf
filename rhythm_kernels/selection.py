"""Which tokens: the largest share of a sequence (TopQ) and the peaks of a signal.

Both work on values [B, T] and a mask [B, T] row by row, and on each backend give the same bits: the C++/CUDA extension,
or the same rule composed of torch ops. The order is that of the numbers, with -0.0 equal to +0.0; NaN comes last in
both directions and is never selected.
"""

import torch
from torch import Tensor

from rhythm_kernels import _extension
from rhythm_kernels.checks import check_choice, check_float, check_tensor

BACKENDS = ("auto", "extension", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # all of them exact in float32

# The key of NaN, and of a position outside the mask: below the key of every number.
NO_KEY = -(2**31)


def segment_topq(values: Tensor, mask: Tensor, q: float, *, largest: bool = True, backend: str = "auto") -> Tensor:
    """TopQ: the ceil(q n - 1e-9) largest of each row's n masked positions. T_loc and T_glob of the paper's Eq. 13, 15.

    values [B, T]  float32, float16 or bfloat16
    mask   [B, T]  bool, the positions that are counted and may be selected
    q              the share, in [0, 1]: 0 selects none, 1 all but NaN
    largest        False: the smallest ones (the paper's Table 5)
    backend        "extension", "torch", or "auto": the extension where it is built for the device, else torch
    returns [B, T] bool

    Equal values go to the lower position first. NaN counts towards n but is never selected. The definition is in
    DESIGN.md. Wrong arguments raise a TypeError or ValueError that names them; backend="extension" raises a
    RuntimeError where the extension is not built.
    """
    values, mask = _check_rows(values, mask)
    q = check_float("q", q, 0.0, 1.0)
    if not isinstance(largest, bool):
        raise TypeError(f"largest must be a bool, got {type(largest).__name__}: {largest!r}")
    if _use_extension(backend, values.device):
        return torch.ops.rhythm_kernels.segment_topq(values, mask, q, largest)
    return _segment_topq_torch(values, mask, q, largest)


def find_peaks(values: Tensor, mask: Tensor, *, min_quantile: float = 0.0, backend: str = "auto") -> Tensor:
    """Strict local maxima within each run of consecutive masked positions, as scipy.signal.find_peaks has them.

    values [B, T]  float32, float16 or bfloat16
    mask   [B, T]  bool
    min_quantile   p in [0, 1]: a peak's value must reach the ceil(p n - 1e-9)-th smallest of the row's n masked values,
                   NaN being the largest of them; 0 admits every peak
    backend        as in `segment_topq`
    returns [B, T] bool

    A plateau (a stretch of equal values) is a peak when both its neighbours are lower, and is marked at its first
    position only. What touches an end of its run has a single neighbour and is no peak. Comparisons with NaN are false,
    so neither NaN nor a plateau beside one is a peak. Errors are those of `segment_topq`.
    """
    values, mask = _check_rows(values, mask)
    min_quantile = check_float("min_quantile", min_quantile, 0.0, 1.0)
    if _use_extension(backend, values.device):
        return torch.ops.rhythm_kernels.find_peaks(values, mask, min_quantile)
    return _find_peaks_torch(values, mask, min_quantile)


def _check_rows(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Checks both, and returns values [B, T] in float32 without a graph, and mask."""
    check_tensor("values", values, ("B", "T"), DTYPES)
    check_tensor("mask", mask, values.shape, (torch.bool,), values.device)
    return values.detach().float(), mask


def _use_extension(backend: str, device: torch.device) -> bool:
    check_choice("backend", backend, BACKENDS)
    if backend == "extension":
        _extension.require(device.type)
        return True
    return backend == "auto" and _extension.available(device.type)


def _order_keys(values: Tensor, mask: Tensor) -> Tensor:
    """int32 [B, T]: keys that compare as the float32 values do; NO_KEY for NaN and outside the mask."""
    bits = values.view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = torch.where(bits == NO_KEY, 0, keys)  # the bits of -0.0
    return torch.where(mask & ~values.isnan(), keys, NO_KEY)


def _rank_keys(keys: Tensor, largest: bool) -> Tensor:
    """Keys whose largest is taken first."""
    return keys if largest else torch.where(keys == NO_KEY, NO_KEY, ~keys)


def _selection_count(mask: Tensor, share: float) -> Tensor:
    """int64 [B, 1]: ceil(share * n - 1e-9) of each row."""
    n = mask.sum(-1, keepdim=True)
    return (n.double() * share - 1e-9).ceil().long().clamp(min=0)


def _last_taken(ranked: Tensor, count: Tensor) -> Tensor:
    """[B, 1]: each row's count-th largest key, T > 0; the largest where count is 0."""
    return ranked.sort(dim=-1, descending=True).values.gather(-1, (count - 1).clamp(min=0))


def _segment_topq_torch(values: Tensor, mask: Tensor, q: float, largest: bool) -> Tensor:
    if values.shape[1] == 0:
        return torch.zeros_like(mask)
    ranked = _rank_keys(_order_keys(values, mask), largest)
    count = _selection_count(mask, q)
    last = _last_taken(ranked, count)
    above, ties = ranked > last, ranked == last
    first_ties = ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True))
    return (above | first_ties) & (ranked != NO_KEY)


def _find_peaks_torch(values: Tensor, mask: Tensor, min_quantile: float) -> Tensor:
    if values.shape[1] == 0:
        return torch.zeros_like(mask)
    keys = _order_keys(values, mask)
    edge = keys.new_full((keys.shape[0], 1), NO_KEY)
    before, after = torch.cat([edge, keys[:, :-1]], -1), torch.cat([keys[:, 1:], edge], -1)

    rises = (before != NO_KEY) & (before < keys)
    falls = (after != NO_KEY) & (after < keys)
    position = torch.arange(keys.shape[1], device=keys.device).expand_as(keys)
    plateau_end = torch.where(keys != after, position, keys.shape[1] - 1).flip(-1).cummin(-1).values.flip(-1)
    peaks = rises & falls.gather(-1, plateau_end)

    count = _selection_count(mask, min_quantile)
    last = _last_taken(_rank_keys(keys, largest=False), count)
    reaches = (last != NO_KEY) & (keys >= ~last)
    return peaks & (reaches | (count == 0))
