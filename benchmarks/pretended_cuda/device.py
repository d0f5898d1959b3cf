"""Puts the pretended device in the place of a GPU, and takes it away again."""

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from benchmarks.pretended_cuda.attention import choose_attention
from benchmarks.pretended_cuda.cuda import CUDA_FUNCTIONS, Generator
from benchmarks.pretended_cuda.kernels import triton_kernels
from benchmarks.pretended_cuda.memory import PINNED, is_pinned, pin
from benchmarks.pretended_cuda.tensors import CUDA, Pretended
from benchmarks.pretended_cuda.work import SYNC_MODES, set_sync_mode
from rhythm_kernels.credit import extension


def is_pretended() -> bool:
    """Says whether the process is inside of `pretended_cuda()`."""
    return torch.cuda.is_available is CUDA_FUNCTIONS["is_available"]


@contextmanager
def pretended_cuda(interprets: bool = True) -> Iterator[torch.device]:
    """Opens a block in which cuda:0 is there and torch.cuda answers for it. Its end restores the process.

    The ops of csrc/ run on the CPU there, one launch each, where the extension is built.

    Args:
        interprets: False leaves out what Triton's kernels compute, which takes long. They are counted, and what they
            would write is 0.

    Raises: RuntimeError where torch sees a GPU, or where Triton compiles kernels.
    """
    if torch.cuda.is_available():
        raise RuntimeError("there is a CUDA device: it need not be pretended")
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton compiles kernels in this process: set TRITON_INTERPRET=1 before it is imported")
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(_device_guard())
        enter(_factories(filled=not interprets))
        enter(patch.multiple(torch.cuda, **CUDA_FUNCTIONS))
        for name in ("tensor", "as_tensor", "asarray"):
            enter(patch.object(torch, name, _copied_to_device(getattr(torch, name))))
        enter(patch.object(torch, "Generator", Generator))
        enter(patch.object(Tensor, "pin_memory", pin))
        enter(patch.object(Tensor, "is_pinned", is_pinned))
        functional = torch.nn.functional
        attention = choose_attention(functional.scaled_dot_product_attention)
        enter(patch.object(functional, "scaled_dot_product_attention", attention))
        for module in (sys.modules["torch.optim.optimizer"], torch.utils._foreach_utils):
            types = [*module._foreach_supported_types, Pretended]
            enter(patch.object(module, "_foreach_supported_types", types))
        enter(triton_kernels(interprets))
        if extension._DEVICE_TYPES:
            enter(patch.object(extension, "_DEVICE_TYPES", extension._DEVICE_TYPES | {"cuda"}))
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters of another class stay the same objects
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.callback(set_sync_mode, SYNC_MODES[0])
        stack.callback(PINNED.clear)
        yield CUDA


@contextmanager
def _device_guard() -> Iterator[None]:
    """Lets torch's C++ select the device without a driver.

    torch has such a guard for machines without a GPU. It takes the place of a guard that has no device. A build for
    CPUs lacks that one: there it gets one whose functions all return 0.
    """
    library = ctypes.CDLL(str(Path(torch.__path__[0], "lib", "libc10.so")))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, cuda = guards[1], 1
    zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    functions = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    absent = ctypes.c_void_p(ctypes.addressof(functions))
    if not before:
        guards[cuda] = ctypes.addressof(absent)
    torch._C._ensureCUDADeviceGuardSet()
    try:
        yield
    finally:
        guards[cuda] = before


@contextmanager
def _factories(filled: bool) -> Iterator[None]:
    """Registers what makes tensors on the device, also where no dispatch mode is open. filled: with 0."""

    def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Pretended:
        values = torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format)
        return Pretended(values.zero_() if filled else values)

    def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None) -> Pretended:
        values = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        return Pretended(values.zero_() if filled else values)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a build for CUDA has its own
        for key in ("CUDA", "Lazy"):
            library.impl("empty.memory_format", empty, key)
            library.impl("empty_strided", empty_strided, key)
    try:
        yield
    finally:
        library._destroy()


def _copied_to_device(make: Callable) -> Callable:
    """Wraps torch.tensor or its like, which make a tensor on the CPU and then copy it."""

    def make_there(*args, device=None, **kwargs) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return make(*args, **kwargs) if device is None else make(*args, device=device, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        copy = make(*args, **kwargs).to(device)
        return copy.requires_grad_(True) if requires_grad else copy

    return make_there
