"""A pretended CUDA device: shows without a GPU what a program launches on one, and where the host waits for it.

In the block of `pretended_cuda()` tensors are made on "cuda" and moved there as on a machine with a GPU. Their values
lie on the CPU. An operation on tensors of both devices raises. Triton's kernels take tensors of the pretended device
alone and run in Triton's interpreter, so TRITON_INTERPRET=1 must be set when Triton is imported. `counted()` counts
the launches and lists where the host waited:

    with pretended_cuda(), counted() as work:
        attention_stats(q.cuda(), k.cuda())
    work.launches  # Counter({"memcpy": 2, "band_kernel": 1, ...})
    work.waits  # [Wait("tests/test_x.py:12 in test_y", "a copy from the host")]

An operation of torch counts as one launch, though some launch several kernels. Views and empty memory count as none.
The device has no times and no numbers of a GPU's own kernels. CUDA graphs and torch.compile do not work on it.
"""

from benchmarks.pretended_cuda.device import is_pretended, pretended_cuda
from benchmarks.pretended_cuda.work import Wait, Work, counted

__all__ = ["Wait", "Work", "counted", "is_pretended", "pretended_cuda"]
