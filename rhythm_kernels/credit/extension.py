"""Loads the compiled library rhythm_kernels._C and gives its ops fake implementations.

Without the library the package uses torch ops. `available` says which device types the library serves; `require` raises
for the others.
"""

import warnings

import torch
from torch import Tensor

HOW_TO_BUILD = (
    "build it from a checkout with a C++ compiler (for GPUs: a CUDA build of torch and the CUDA toolkit too): "
    "pip install --no-build-isolation ."
)


def _load() -> tuple[frozenset[str], str]:
    """Returns the device types that the library serves, and why it serves no others."""
    try:
        from rhythm_kernels import _C
    except ImportError as error:
        return frozenset(), f"rhythm_kernels._C cannot be loaded ({error})"
    if _C.HAS_CUDA:
        return frozenset({"cpu", "cuda"}), "rhythm_kernels._C was built for cpu and cuda"
    return frozenset({"cpu"}), "rhythm_kernels._C was built for cpu only"


_DEVICE_TYPES, _REASON = _load()
_warned: set[str] = set()

if _DEVICE_TYPES:

    @torch.library.register_fake("rhythm_kernels::segment_topq")
    def _(values, response_mask, cu_seqlens, top_fraction, largest):
        return response_mask.new_empty(response_mask.shape), response_mask.new_empty(
            _sequences(response_mask, cu_seqlens)
        )

    @torch.library.register_fake("rhythm_kernels::find_peaks")
    def _(values, response_mask, cu_seqlens, min_quantile):
        return response_mask.new_empty(response_mask.shape)

    @torch.library.register_fake("rhythm_kernels::topq_credit")
    def _(values, response_mask, cu_seqlens, of_delta, drops, top_fraction, amplification, largest):
        faults = response_mask.new_empty(_sequences(response_mask, cu_seqlens), dtype=torch.uint8)
        return response_mask.new_empty(response_mask.shape, dtype=torch.float32), faults

    @torch.library.register_fake("rhythm_kernels::coupled_credit")
    def _(
        waad,
        fai,
        response_mask,
        cu_seqlens,
        top_fraction,
        preplan_fraction,
        amplification,
        shared_fraction,
        max_lookback,
        largest,
        drops,
        tau_waad,
        tau_delta,
        with_sets,
    ):
        faults = response_mask.new_empty(_sequences(response_mask, cu_seqlens), dtype=torch.uint8)
        shape = response_mask.shape if with_sets else (0,)
        sets, intros = (response_mask.new_empty(shape, dtype=dtype) for dtype in (torch.uint8, torch.int32))
        return response_mask.new_empty(response_mask.shape, dtype=torch.float32), faults, sets, intros


def _sequences(response_mask: Tensor, cu_seqlens: Tensor | None) -> int:
    """Returns the number of sequences."""
    return response_mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def available(device_type: str) -> bool:
    """Returns whether the library has ops for a device type. Warns once if it could have been built for it."""
    if device_type in _DEVICE_TYPES:
        return True
    if device_type in ("cpu", "cuda") and device_type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device_type)
        warnings.warn(
            f"{_REASON}: on {device_type}, the slower torch implementation is used; {HOW_TO_BUILD}", stacklevel=3
        )
    return False


def require(device_type: str) -> None:
    """Raises RuntimeError if the library has no ops for a device type."""
    if device_type not in _DEVICE_TYPES:
        raise RuntimeError(f'backend="extension" has no ops for {device_type}: {_REASON}; {HOW_TO_BUILD}')
