"""The answers of torch.cuda for the pretended device."""

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.pretended_cuda.memory import DEVICE_MEMORY
from benchmarks.pretended_cuda.work import count_launch, count_wait, get_sync_mode, set_sync_mode

PROPERTIES = SimpleNamespace(
    name="pretended H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)


class Stream:
    cuda_stream = 0

    def __init__(self, *_, **__): ...

    def wait_stream(self, other) -> None: ...

    def wait_event(self, event) -> None: ...

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self) -> None:
        count_wait("Stream.synchronize")


class Event:
    def __init__(self, *_, **__):
        self.time = None

    def record(self, stream=None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream=None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        count_wait("Event.synchronize", reported=False)

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.time - self.time)


class GeneratorType(type):
    def __instancecheck__(cls, x) -> bool:
        return isinstance(x, torch._C.Generator)


class Generator(metaclass=GeneratorType):
    """Stands for torch.Generator, and draws on the CPU."""

    def __new__(cls, device="cpu"):
        return torch._C.Generator()


CUDA_FUNCTIONS: dict[str, Any] = {
    "Event": Event,
    "Stream": Stream,
    "_exchange_device": lambda device: 0,
    "_lazy_init": lambda: None,
    "_maybe_exchange_device": lambda device: 0,
    "_sleep": lambda cycles: count_launch("sleep"),
    "current_device": lambda: 0,
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
    "get_sync_debug_mode": get_sync_mode,
    "is_available": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "is_current_stream_capturing": lambda: False,
    "is_initialized": lambda: True,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "max_memory_allocated": lambda device=None: DEVICE_MEMORY.peak,
    "max_memory_reserved": lambda device=None: DEVICE_MEMORY.peak,
    "mem_get_info": lambda device=None: (PROPERTIES.total_memory - DEVICE_MEMORY.now, PROPERTIES.total_memory),
    "memory_allocated": lambda device=None: DEVICE_MEMORY.now,
    "memory_reserved": lambda device=None: DEVICE_MEMORY.now,
    "reset_peak_memory_stats": lambda device=None: DEVICE_MEMORY.reset_peak(),
    "set_device": lambda device: None,
    "set_rng_state": lambda state, device=None: None,
    "set_rng_state_all": lambda states: None,
    "set_sync_debug_mode": set_sync_mode,
    "stream": lambda stream: nullcontext(),
    "synchronize": lambda device=None: count_wait("torch.cuda.synchronize", reported=False),
}
"""The replacements for functions of torch.cuda. Random numbers are the CPU's, so the device keeps no state for them."""
