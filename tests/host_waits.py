"""What would make the host wait for a GPU, written down on a CPU."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Writes down what makes the host wait for a GPU: values and sizes read from the device, uploads of its own."""

    def __init__(self, events: list[str]):
        super().__init__()
        self.events, self.reads = events, Reads(events)

    def __enter__(self):
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.reads.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put_") else ()
        by_mask = any(place is not None and place.dtype == torch.bool for place in places)
        counts = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2") or by_mask or counts:
            self.events.append(name)
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """What `Waits` cannot see, since no operator does it on a CPU."""

    def __init__(self, events: list[str]):
        super().__init__()
        self.events = events

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        by_list = name in ("__getitem__", "__setitem__") and isinstance(args[1], list)
        if name in ("tolist", "cpu", "numpy", "tensor", "as_tensor", "new_tensor") or by_list:
            self.events.append(name)
        return func(*args, **(kwargs or {}))
