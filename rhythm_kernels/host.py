"""Moves small tensors between the host and a device without needless waits of the host."""

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a host tensor on a device, copied from pinned memory so that the host does not wait for the device.

    Raises:
        RuntimeError: a CUDA graph is being captured. It would copy from this memory again in each replay, when the
            memory may hold something else.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention statistics cannot be captured in a CUDA graph, since they read the host's memory")
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors on the host; waits once for each GPU that holds any of them."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies
