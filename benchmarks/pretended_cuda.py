"""A CUDA device that is not there: what a program would launch on a GPU and wait for, without one.

In the block of `pretended_cuda()` tensors are made and moved to "cuda" as on a machine with a GPU, and lie on the CPU.
Operations on tensors of both devices raise, Triton's kernels take tensors of the pretended device alone and run in
Triton's interpreter (TRITON_INTERPRET=1 when Triton is imported), and `counted()` says what was launched and where the
host waited:

    with pretended_cuda(), counted() as work:
        attention_stats(q.cuda(), k.cuda())
    work.launches  # Counter({"memcpy": 2, "band_kernel": 1, ...})
    work.waits  # [Wait("tests/test_x.py:12 in test_y", "a copy from the host")]

An operation of torch counts as one launch, though some launch several kernels; views and empty memory count as none.
Times and numbers of a GPU cannot be had this way, and CUDA graphs and torch.compile do not work.
"""

import ctypes
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch
from weakref import WeakValueDictionary

import numpy
import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import interpreter

from benchmarks.pretended_attention import GPU_ONLY
from rhythm_kernels.credit import extension
from rhythm_kernels.statistics import triton_backend, triton_tiles
from rhythm_kernels.statistics.triton_tiles import BandTile, Tile, Tiles

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
STAND_IN = torch.device("lazy", 0)
"""The device that torch's C++ sees. Nothing implements it, and autograd asks no driver for its streams."""
PROPERTIES = SimpleNamespace(
    name="pretended H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)
SYNC_MODES = ("default", "warn", "error")


# ---- what is counted -------------------------------------------------------------------------------------------------


class Wait(NamedTuple):
    where: str
    """The innermost line of this project: "file:line in function"."""
    what: str


class Work:
    """The launches of one thread or several, and where they waited for the device."""

    def __init__(self):
        self.launches: Counter[str] = Counter()
        """By the name of the operator or of the Triton kernel; "memcpy" is a copy between host and device."""
        self.waits: list[Wait] = []


_open: list[Work] = []
_sync_mode = "default"
_interprets = True  # whether Triton's kernels compute what they are for


@contextmanager
def counted() -> Iterator[Work]:
    """A context whose launches and waits are in its `Work`; contexts inside each other all count."""
    work = Work()
    _open.append(work)
    try:
        yield work
    finally:
        _open.remove(work)


def _launch(name: str) -> None:
    for work in _open:
        work.launches[name] += 1


def _wait(what: str, reported: bool = True) -> None:
    """Counts a wait of the host. reported: torch.cuda.set_sync_debug_mode reports it."""
    for work in _open:
        work.waits.append(Wait(_where(), what))
    if reported and _sync_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    if reported and _sync_mode == "warn":
        warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=2)


def _where() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the project"


# ---- tensors ---------------------------------------------------------------------------------------------------------


class _Memory:
    """Bytes of the device, as torch.cuda reports them."""

    def __init__(self):
        self.now = self.peak = 0
        self.blocks: WeakValueDictionary[int, _Block] = WeakValueDictionary()

    def block(self, held: Tensor) -> "_Block":
        """That of the storage behind a tensor; it is freed with the last tensor that has it."""
        storage = held.untyped_storage()
        block = self.blocks.get(storage._cdata)
        if block is None:
            block = self.blocks[storage._cdata] = _Block(self)
        block.resize(storage.nbytes())
        return block


class _Block:
    def __init__(self, memory: _Memory):
        self.memory, self.size = memory, 0

    def resize(self, size: int) -> None:
        self.memory.now += size - self.size
        self.memory.peak = max(self.memory.peak, self.memory.now)
        self.size = size

    def __del__(self):
        self.resize(0)


_memory = _Memory()


class Pretended(Tensor):
    """A tensor that says it is on cuda:0; `held` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=STAND_IN,
        )
        made.held = held
        made._block = _memory.block(held)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    @property
    def data(self) -> "Pretended":
        return self.detach()

    @data.setter
    def data(self, other: "Pretended") -> None:
        Tensor.data.__set__(self, other)
        self.held, self._block = other.held, other._block

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError(f"can't convert {CUDA} device type tensor to numpy. Use Tensor.cpu() first")
        return self.detach().cpu().numpy()

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, requires_grad=requires_grad)

    def __getitem__(self, index):
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index, value) -> None:
        # as for a GPU, where torch keeps numbers on the CPU so that they travel with the launch
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype)
        super().__setitem__(_as_tensors(index), value)

    def __deepcopy__(self, memo) -> "Pretended":
        copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol):
        return _revived, (self.cpu(), self.requires_grad)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{self.held!r} on {CUDA}"


def _as_tensors(index):
    """Lists in an index as the tensors that torch makes of them."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(_as_tensors, index)) if isinstance(index, tuple) else index


def _revived(values: Tensor, requires_grad: bool) -> Tensor:
    return values.to(CUDA).requires_grad_(requires_grad)


# ---- operations ------------------------------------------------------------------------------------------------------

WAITING = {
    "aten::_linalg_check_errors",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
"""Operators whose launcher reads a result of the device, such as the size of its output."""
WEIGHTLESS = {
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::record_stream",
    "aten::resize_",
    "aten::set_",
}
"""Operators that launch nothing, beside views."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
NO_SCALARS = {"aten::cat", "aten::stack"}
"""Operators that take no 0-dimensional tensor of the CPU beside tensors of the device."""
COPIES = {"aten::_to_copy", "aten::copy_"}
COPY = "memcpy"


def _dispatch(func, args: tuple, kwargs: dict[str, Any]):
    """Runs an operator on the CPU, with the errors, the waits and the launches that it would have on a GPU."""
    name = func._schema.name
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        out = func.decompose(*args, **kwargs)  # in inference mode they arrive whole
        if out is not NotImplemented:
            return out
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, Pretended)]
    bound = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    there = _result_is_there(bound, tensors)
    if name in COPIES:
        work = _copy(name, bound, there)
    elif name == "aten::_local_scalar_dense":
        _wait("reading a number")
        work = COPY
    else:
        _check_devices(name, bound, ours, tensors)
        _check_waits(func, name, bound)
        work = name

    if name in GPU_ONLY:
        out = GPU_ONLY[name](tree_map(_held, bound))
    else:
        options = kwargs | {"pin_memory": False} if "pin_memory" in kwargs else kwargs
        out = func(*tree_map(_held, args), **tree_map(_held, options))
    given = {id(x.held): x for x in ours}

    def wrapped(x):
        if not isinstance(x, Tensor) or not there:
            return x
        return given[id(x)] if id(x) in given else Pretended(x)

    out = tree_map(wrapped, out)
    for x in ours:
        if x.shape != x.held.shape or x.stride() != x.held.stride():
            x.data = Pretended(x.held)
    if name not in WEIGHTLESS and not _is_view(func) and any(_has_work(x) for x in tree_leaves((out, tensors))):
        _launch(work)
    return out


def _held(x):
    if isinstance(x, Pretended):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _has_work(x) -> bool:
    return not isinstance(x, Tensor) or x.numel() > 0


def _is_view(func) -> bool:
    alias = [result.alias_info for result in func._schema.returns]
    return any(info is not None and not info.is_write for info in alias)


def _result_is_there(bound: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Whether an operator's outputs are on the pretended device: that asked for, or that of its inputs."""
    device = bound.get("device")
    if device is not None:
        return torch.device(device).type != "cpu"
    return any(isinstance(x, Pretended) for x in tensors)


def _copy(name: str, bound: dict[str, Any], there: bool) -> str:
    """Says what kind of work a copy is, and waits where it does."""
    if name == "aten::copy_":
        source, there = bound["src"], isinstance(bound["self"], Pretended)
        pinned = not there and _is_pinned(bound["self"])
    else:
        source, pinned = bound["self"], True  # torch's own target of a copy that does not block
    if isinstance(source, Pretended) == there:
        return name
    way = "from the host" if there else "to the host"
    if not bound.get("non_blocking"):
        _wait(f"a copy {way}")
    elif not there and not pinned:
        _wait("a copy to pageable memory of the host", reported=False)
    return COPY


def _check_devices(name: str, bound: dict[str, Any], ours: list[Tensor], tensors: list[Tensor]) -> None:
    strangers = [x for x in tensors if not isinstance(x, Pretended) and (x.ndim > 0 or name in NO_SCALARS)]
    if name in INDEXING and isinstance(bound["self"], Pretended):
        indices = [x for x in bound["indices"] if x is not None]
        if any(x is y for x in indices for y in strangers):
            _wait(f"{name} by an index on the CPU")
        strangers = [x for x in strangers if not any(x is y for y in indices)]
    if ours and strangers:
        shapes = ", ".join(str(list(x.shape)) for x in strangers)
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name} with tensors of shape {shapes} on the CPU)"
        )


def _check_waits(func, name: str, bound: dict[str, Any]) -> None:
    if name in WAITING or (func.name() == "aten::repeat_interleave.Tensor" and bound.get("output_size") is None):
        _wait(name)
    if name in INDEXING:
        masks = [x for x in bound["indices"] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        values = bound.get("values")
        # torch fills the places of one mask with a number of the CPU without counting them
        filled = len(bound["indices"]) == 1 and values is not None and values.numel() == 1 and values.is_cpu
        if masks and not filled:
            _wait(f"{name} by a mask")


def _sdpa(real: Callable) -> Callable:
    """torch's scaled_dot_product_attention with the operator that an H100 takes."""

    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        if not isinstance(query, Pretended):
            return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        aten, enabled, size = torch.ops.aten, torch.backends.cuda, max(query.shape[-1], value.shape[-1])
        shared, half = key.shape[1] != query.shape[1], query.dtype in (torch.float16, torch.bfloat16)
        if size % 8 == 0 and half and size <= 256 and enabled.cudnn_sdp_enabled():
            fused = aten._scaled_dot_product_cudnn_attention
        elif size % 8 == 0 and half and size <= 256 and attn_mask is None and enabled.flash_sdp_enabled():
            out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
            return out[0]
        elif size % 4 == 0 and not shared and enabled.mem_efficient_sdp_enabled():
            fused = aten._scaled_dot_product_efficient_attention
        else:
            options = {"scale": scale, "enable_gqa": enable_gqa}
            return aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, **options
            )[0]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        with_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return fused(query, key, value, attn_mask, with_lse, dropout_p, is_causal, scale=scale)[0]

    return scaled_dot_product_attention


# ---- torch.cuda ------------------------------------------------------------------------------------------------------


class _Stream:
    cuda_stream = 0

    def __init__(self, *_, **__): ...

    def wait_stream(self, other) -> None: ...

    def wait_event(self, event) -> None: ...

    def record_event(self, event=None):
        return event or _Event()

    def synchronize(self) -> None:
        _wait("Stream.synchronize")


class _Event:
    def __init__(self, *_, **__):
        self.time = None

    def record(self, stream=None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream=None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("Event.synchronize", reported=False)

    def elapsed_time(self, other: "_Event") -> float:
        return 1e3 * (other.time - self.time)


class _GeneratorType(type):
    def __instancecheck__(cls, x) -> bool:
        return isinstance(x, torch._C.Generator)


class _Generator(metaclass=_GeneratorType):
    """torch.Generator, which draws on the CPU."""

    def __new__(cls, device="cpu"):
        return torch._C.Generator()


def _set_sync_mode(mode: int | str) -> None:
    global _sync_mode
    _sync_mode = SYNC_MODES[mode] if isinstance(mode, int) else mode


def _reset_peak(device=None) -> None:
    _memory.peak = _memory.now


CUDA_FUNCTIONS: dict[str, Any] = {
    "Event": _Event,
    "Stream": _Stream,
    "_exchange_device": lambda device: 0,
    "_lazy_init": lambda: None,
    "_maybe_exchange_device": lambda device: 0,
    "_sleep": lambda cycles: _launch("sleep"),
    "current_device": lambda: 0,
    "current_stream": lambda device=None: _Stream(),
    "default_stream": lambda device=None: _Stream(),
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
    "get_sync_debug_mode": lambda: SYNC_MODES.index(_sync_mode),
    "is_available": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "is_current_stream_capturing": lambda: False,
    "is_initialized": lambda: True,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "max_memory_allocated": lambda device=None: _memory.peak,
    "max_memory_reserved": lambda device=None: _memory.peak,
    "mem_get_info": lambda device=None: (PROPERTIES.total_memory - _memory.now, PROPERTIES.total_memory),
    "memory_allocated": lambda device=None: _memory.now,
    "memory_reserved": lambda device=None: _memory.now,
    "reset_peak_memory_stats": _reset_peak,
    "set_device": lambda device: None,
    "set_rng_state": lambda state, device=None: None,
    "set_rng_state_all": lambda states: None,
    "set_sync_debug_mode": _set_sync_mode,
    "stream": lambda stream: nullcontext(),
    "synchronize": lambda device=None: _wait("torch.cuda.synchronize", reported=False),
}
"""Answers of torch.cuda. Random numbers are the CPU's, so the device has no state of its own."""


# ---- Triton ----------------------------------------------------------------------------------------------------------


# A GPU has small tiles for fp32; the interpreter's time goes by operations, not by elements.
FP32 = Tiles(rows=Tile(64, 64, 1, 1), forward=Tile(64, 64, 1, 1), band=BandTile(64, 64, 1, 1))


def _launcher(real: Callable) -> Callable:
    """Triton's interpreter, which takes tensors of the pretended device alone."""

    def call(executor, *args, **kwargs) -> None:
        name = executor.fn.__name__
        for place, x in {**dict(enumerate(args)), **kwargs}.items():
            if isinstance(x, Tensor) and not isinstance(x, Pretended):
                raise ValueError(f"Pointer argument {place} of {name} cannot be accessed from Triton (cpu tensor?)")
        grid = executor.grid(dict(zip(executor.arg_names, args)) | kwargs) if callable(executor.grid) else executor.grid
        limits = (2**31, 2**16, 2**16)
        if not all(type(n) is int and 0 <= n < limit for n, limit in zip(grid, limits, strict=False)):
            raise ValueError(f"{name} cannot be launched on a grid of {grid}")
        if math.prod(grid):
            _launch(name)
        if _interprets:
            real(executor, *map(_held_apart, args), **{key: _held_apart(x) for key, x in kwargs.items()})

    return call


def _held_apart(x):
    return x.held.detach() if isinstance(x, Pretended) else x


def _dot(real: Callable) -> Callable:
    """The interpreter's product, with the values of bf16 factors instead of their bits."""

    def create_dot(builder, a, b, *rest):
        return real(builder, _widened(a), _widened(b), *rest)

    return create_dot


def _widened(x):
    if x.dtype.scalar != triton.language.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), triton.language.float32)


# ---- the device ------------------------------------------------------------------------------------------------------


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Pretended:
    made = torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format)
    return Pretended(made if _interprets else made.zero_())


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None) -> Pretended:
    made = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
    return Pretended(made if _interprets else made.zero_())


def _on_asked(make: Callable) -> Callable:
    """torch.tensor and its like: they make a tensor on the CPU, and then copy it."""

    def made(*args, device=None, **kwargs) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return make(*args, **kwargs) if device is None else make(*args, device=device, **kwargs)
        needs = kwargs.pop("requires_grad", False)
        here = make(*args, **kwargs)
        return here.to(device).requires_grad_(needs) if needs else here.to(device)

    return made


_pinned: dict[int, Tensor] = {}  # by their storage, which thus stays


def _pin(x: Tensor, device=None) -> Tensor:
    copy = x.clone()
    _pinned[copy.untyped_storage()._cdata] = copy
    return copy


def _is_pinned(x: Tensor, device=None) -> bool:
    return x.is_cpu and x.untyped_storage()._cdata in _pinned


@contextmanager
def _device_guard() -> Iterator[None]:
    """Has torch's C++ select the device without a driver.

    torch has such a guard for machines without a GPU. It takes the place of a guard that has no device, which a build
    for CPUs lacks: there it gets one whose functions all return 0.
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
def _factories() -> Iterator[None]:
    """Registers what makes tensors on the device, also where no dispatch mode is open."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a build for CUDA has its own
        for key in ("CUDA", "Lazy"):
            library.impl("empty.memory_format", _empty, key)
            library.impl("empty_strided", _empty_strided, key)
    try:
        yield
    finally:
        library._destroy()


def is_pretended() -> bool:
    """Whether the process is inside of `pretended_cuda()`."""
    return torch.cuda.is_available is CUDA_FUNCTIONS["is_available"]


@contextmanager
def pretended_cuda(interprets: bool = True) -> Iterator[torch.device]:
    """A context in which cuda:0 is there, and torch.cuda answers for it; what it changes in the process it puts back.

    The ops of csrc/ run on the CPU there, one launch each, where the extension is built.

    Args:
        interprets: False leaves out what Triton's kernels compute, which takes long: they are counted, and what they
            would write is 0.

    Raises: RuntimeError where torch sees a GPU, or where Triton compiles kernels.
    """
    if torch.cuda.is_available():
        raise RuntimeError("there is a CUDA device: it need not be pretended")
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton compiles kernels in this process: set TRITON_INTERPRET=1 before it is imported")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    served = extension._DEVICE_TYPES
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(_device_guard())
        enter(_factories())
        enter(patch.multiple(torch.cuda, **CUDA_FUNCTIONS))
        for name in ("tensor", "as_tensor", "asarray"):
            enter(patch.object(torch, name, _on_asked(getattr(torch, name))))
        enter(patch.object(torch, "Generator", _Generator))
        enter(patch.object(Tensor, "pin_memory", _pin))
        enter(patch.object(Tensor, "is_pinned", _is_pinned))
        functional = torch.nn.functional
        enter(patch.object(functional, "scaled_dot_product_attention", _sdpa(functional.scaled_dot_product_attention)))
        for module in (sys.modules["torch.optim.optimizer"], torch.utils._foreach_utils):
            types = [*module._foreach_supported_types, Pretended]
            enter(patch.object(module, "_foreach_supported_types", types))
        enter(patch.object(builder, "create_dot", _dot(builder.create_dot)))
        enter(patch.object(executor, "__call__", _launcher(executor.__call__)))
        enter(patch.dict(globals(), _interprets=interprets))
        enter(patch.object(triton_backend, "INTERPRETING", False))
        enter(patch.object(triton_tiles, "FP32", FP32))
        if served:
            enter(patch.object(extension, "_DEVICE_TYPES", served | {"cuda"}))
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters of another class stay the same objects
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.callback(_set_sync_mode, "default")
        stack.callback(_pinned.clear)
        yield CUDA
