"""Keeps account of the pretended device's memory, and of the host's pinned memory."""

from weakref import WeakValueDictionary

from torch import Tensor


class DeviceMemory:
    """The bytes that torch.cuda reports."""

    def __init__(self):
        self.now = self.peak = 0
        self._blocks: WeakValueDictionary[int, Block] = WeakValueDictionary()

    def block_of(self, values: Tensor) -> "Block":
        """Returns the block of a tensor's storage. It is freed with the last tensor that refers to it."""
        storage = values.untyped_storage()
        block = self._blocks.get(storage._cdata)
        if block is None:
            block = self._blocks[storage._cdata] = Block(self)
        block.resize(storage.nbytes())
        return block

    def reset_peak(self) -> None:
        self.peak = self.now


class Block:
    """One allocation."""

    def __init__(self, memory: DeviceMemory):
        self.memory, self.size = memory, 0

    def resize(self, size: int) -> None:
        self.memory.now += size - self.size
        self.memory.peak = max(self.memory.peak, self.memory.now)
        self.size = size

    def __del__(self):
        self.resize(0)


DEVICE_MEMORY = DeviceMemory()
PINNED: dict[int, Tensor] = {}
"""Pinned tensors by their storage, which stays alive as long as it is listed."""


def pin(tensor: Tensor, device=None) -> Tensor:
    copy = tensor.clone()
    PINNED[copy.untyped_storage()._cdata] = copy
    return copy


def is_pinned(tensor: Tensor, device=None) -> bool:
    return tensor.is_cpu and tensor.untyped_storage()._cdata in PINNED
