"""Checks tensors and their devices: each error names the argument and shows its value."""

from collections.abc import Sequence

import torch

WITHOUT_FLOAT64 = ("mps",)


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = (),
    device: torch.device | None = None,
) -> torch.Tensor:
    """Returns `value` if it is a tensor of this shape, dtype and device.

    Args:
        shape: a number for each known size, a name for each free one.
        dtypes: the allowed dtypes; any if empty.
        device: the required device; any if None.

    Raises:
        TypeError: `value` is not a tensor, or has another dtype.
        ValueError: it has another shape or device, or its device has no float64.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}: {value!r}"[:300])
    check_device(name, value.device)
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")
    fits = len(shape) == value.ndim and all(isinstance(n, str) or n == m for n, m in zip(shape, value.shape))
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    return value


def check_device(name: str, device: torch.device) -> None:
    """Raises ValueError for a device without float64."""
    if device.type in WITHOUT_FLOAT64:
        raise ValueError(
            f"{name} must be on a device that has float64, which spans and thresholds are computed in, got {device}: "
            "use the CPU or a CUDA device"
        )


def at_hand(value: object, device: torch.device) -> torch.device:
    """Returns the CPU if the argument is a CPU tensor, else the device of the other arguments."""
    return torch.device("cpu") if getattr(value, "is_cpu", False) else device


def can_look(tensor: torch.Tensor) -> bool:
    """Returns whether the host can read a tensor's values without waiting: it is on the CPU, outside a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is torch.Tensor


def check_binary(name: str, mask: torch.Tensor) -> None:
    """Raises ValueError for a mask with a value that is neither 0 nor 1; waits for a GPU."""
    strange = mask[(mask != 0) & (mask != 1)]
    if len(strange):
        raise ValueError(f"{name} must hold only 0 and 1, got {strange[0].item()}")


def check_cu_seqlens(cu_seqlens: object, batch: int, device: torch.device) -> torch.Tensor:
    """Checks type, shape and device. To check the values, the host would have to wait for a GPU."""
    check_tensor("cu_seqlens", cu_seqlens, ["S + 1"], [torch.int32, torch.int64], device)
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of one row, got B = {batch}")
    return cu_seqlens
