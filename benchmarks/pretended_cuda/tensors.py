"""The tensors of the pretended device, and what happens when torch runs an operator on them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.pretended_cuda.attention import GPU_ONLY
from benchmarks.pretended_cuda.memory import DEVICE_MEMORY, is_pinned
from benchmarks.pretended_cuda.work import count_launch, count_wait

CUDA = torch.device("cuda", 0)
STAND_IN = torch.device("lazy", 0)
"""The device that torch's C++ sees. Nothing implements it, and autograd asks no driver for its streams."""


class Pretended(Tensor):
    """A tensor that says it is on cuda:0; `held` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=STAND_IN,
        )
        tensor.held = held
        tensor._block = DEVICE_MEMORY.block_of(held)
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run_operator(func, args, kwargs or {})

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
        return super().__getitem__(_lists_as_tensors(index))

    def __setitem__(self, index, value) -> None:
        # for a GPU too, torch keeps numbers on the CPU so that they travel with the launch
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype)
        super().__setitem__(_lists_as_tensors(index), value)

    def __deepcopy__(self, memo) -> "Pretended":
        copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol):
        return _unpickled, (self.cpu(), self.requires_grad)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{self.held!r} on {CUDA}"


def _lists_as_tensors(index):
    """Turns the lists in an index into tensors, as torch does."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(_lists_as_tensors, index)) if isinstance(index, tuple) else index


def _unpickled(values: Tensor, requires_grad: bool) -> Tensor:
    return values.to(CUDA).requires_grad_(requires_grad)


# ---- operators -------------------------------------------------------------------------------------------------------

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
WITHOUT_LAUNCH = {
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
WITHOUT_CPU_SCALARS = {"aten::cat", "aten::stack"}
"""Operators that take no 0-dimensional tensor of the CPU beside tensors of the device."""
COPIES = {"aten::_to_copy", "aten::copy_"}
COPY = "memcpy"


def run_operator(func, args: tuple, kwargs: dict[str, Any]):
    """Runs an operator on the CPU, with the errors, the waits and the launches that it would have on a GPU."""
    name = func._schema.name
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        out = func.decompose(*args, **kwargs)  # in inference mode they arrive whole
        if out is not NotImplemented:
            return out
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    pretended = [x for x in tensors if isinstance(x, Pretended)]
    bound = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    on_device = _result_is_on_device(bound, tensors)
    if name in COPIES:
        launch_name = _check_copy(name, bound, on_device)
    elif name == "aten::_local_scalar_dense":
        count_wait("reading a number")
        launch_name = COPY
    else:
        _check_devices(name, bound, pretended, tensors)
        _check_waits(func, name, bound)
        launch_name = name

    if name in GPU_ONLY:
        out = GPU_ONLY[name](tree_map(_on_cpu, bound))
    else:
        options = kwargs | {"pin_memory": False} if "pin_memory" in kwargs else kwargs
        out = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, options))
    arguments = {id(x.held): x for x in pretended}

    def wrap(x):
        if not isinstance(x, Tensor) or not on_device:
            return x
        return arguments[id(x)] if id(x) in arguments else Pretended(x)

    out = tree_map(wrap, out)
    for x in pretended:
        if x.shape != x.held.shape or x.stride() != x.held.stride():
            x.data = Pretended(x.held)
    launches = name not in WITHOUT_LAUNCH and not _is_view(func)
    if launches and any(_has_elements(x) for x in tree_leaves((out, tensors))):
        count_launch(launch_name)
    return out


def _on_cpu(x):
    if isinstance(x, Pretended):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _has_elements(x) -> bool:
    return not isinstance(x, Tensor) or x.numel() > 0


def _is_view(func) -> bool:
    alias = [result.alias_info for result in func._schema.returns]
    return any(info is not None and not info.is_write for info in alias)


def _result_is_on_device(bound: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Says whether an operator's outputs are on the pretended device: the one asked for, or that of its inputs."""
    device = bound.get("device")
    if device is not None:
        return torch.device(device).type != "cpu"
    return any(isinstance(x, Pretended) for x in tensors)


def _check_copy(name: str, bound: dict[str, Any], to_device: bool) -> str:
    """Counts the wait of a copy, if it has one, and returns the name of its launch."""
    if name == "aten::copy_":
        source, to_device = bound["src"], isinstance(bound["self"], Pretended)
        pinned = not to_device and is_pinned(bound["self"])
    else:
        source, pinned = bound["self"], True  # torch pins its own target of a copy that does not block
    if isinstance(source, Pretended) == to_device:
        return name
    direction = "from the host" if to_device else "to the host"
    if not bound.get("non_blocking"):
        count_wait(f"a copy {direction}")
    elif not to_device and not pinned:
        count_wait("a copy to pageable memory of the host", reported=False)
    return COPY


def _check_devices(name: str, bound: dict[str, Any], pretended: list[Tensor], tensors: list[Tensor]) -> None:
    on_cpu = [x for x in tensors if not isinstance(x, Pretended) and (x.ndim > 0 or name in WITHOUT_CPU_SCALARS)]
    if name in INDEXING and isinstance(bound["self"], Pretended):
        indices = [x for x in bound["indices"] if x is not None]
        if any(x is y for x in indices for y in on_cpu):
            count_wait(f"{name} by an index on the CPU")
        on_cpu = [x for x in on_cpu if not any(x is y for y in indices)]
    if pretended and on_cpu:
        shapes = ", ".join(str(list(x.shape)) for x in on_cpu)
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name} with tensors of shape {shapes} on the CPU)"
        )


def _check_waits(func, name: str, bound: dict[str, Any]) -> None:
    if name in WAITING or (func.name() == "aten::repeat_interleave.Tensor" and bound.get("output_size") is None):
        count_wait(name)
    if name in INDEXING:
        masks = [x for x in bound["indices"] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        values = bound.get("values")
        # torch fills the places of one mask with a number of the CPU without counting them
        is_fill = len(bound["indices"]) == 1 and values is not None and values.numel() == 1 and values.is_cpu
        if masks and not is_fill:
            count_wait(f"{name} by a mask")
