"""Makes a CPU a platform of verl, which knows only accelerators; VERL_USE_EXTERNAL_MODULES loads it in each process.

VERL_ENGINE_DEVICE=cuda lets it have the engines that are registered for a GPU.
"""

import contextlib
import types

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import set_platform

NOTHING = ("empty_cache", "reset_peak_memory_stats", "ipc_collect", "set_device")


def device_module() -> types.ModuleType:
    """Returns torch.cpu with the attributes that verl needs of a device's module."""
    module = types.ModuleType("cpu_device")
    module.__dict__.update(torch.cpu.__dict__)
    module.__dict__.update({name: lambda *_: None for name in NOTHING})
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *_: 0)
    module.mem_get_info = lambda *_: (1 << 30, 1 << 30)
    module.get_device_name = lambda *_: "CPU"
    return module


class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = device_module()

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return contextlib.nullcontext()

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


set_platform(PlatformCPU())


def allow_fsdp1() -> None:
    """Lets FSDP1 broadcast weights of a CPU, which it refuses and gloo can."""
    from torch.distributed.fsdp import _init_utils

    _init_utils._check_module_states_for_sync_module_states = lambda states: None


def allow_gloo() -> None:
    """Lets verl name one backend for the CPU and one for the device: torch takes them for two of the CPU."""
    init_process_group = torch.distributed.init_process_group

    def init(backend=None, *args, **kwargs):
        return init_process_group("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    torch.distributed.init_process_group = init


def allow_offload() -> None:
    """Keeps the reference's weights in plain memory, since pinned memory needs an accelerator."""
    torch.Tensor.pin_memory = lambda tensor, *_: tensor


allow_fsdp1()
allow_gloo()
allow_offload()
