"""Chooses between the Triton kernels and torch ops."""

from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

BACKENDS = ("auto", "triton", "torch")


def kernels_for(backend: str, **inputs: Tensor) -> ModuleType | None:
    """Returns the module `triton_backend` where it computes with these q, k and v; None for torch ops.

    "auto" takes torch ops for tensors that are not on a GPU or that the kernels do not take, and where Triton is
    missing, as it is outside of Linux.

    Raises:
        ImportError: "triton" is asked for and missing.
    """
    if backend == "torch" or (backend == "auto" and not inputs["q"].is_cuda):
        return None
    if find_spec("triton") is None:
        if backend == "auto":
            return None
        raise ImportError('backend "triton" needs Triton, which is not installed: take "torch" or "auto"')
    # imported here, since Triton decides at its import whether it interprets or compiles
    from rhythm_kernels.statistics import triton_backend

    return None if backend == "auto" and triton_backend.unsupported(**inputs) else triton_backend
