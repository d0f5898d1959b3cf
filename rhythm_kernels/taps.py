"""Where a transformers model's attention can be listened to: its decoder, its softmax layers, and the wrapped entry.

Every attention layer of transformers looks up its function in a table, ALL_ATTENTION_FUNCTIONS, at each call. A `Tap`
takes the place of the entry that a model uses, calls what was there, and hands q, k and the attention kernel's own
log-sum-exp to those who listen. Name, masks and dispatch stay as they are.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

from rhythm_kernels.backend_lse import LseReader

TABLE = "ALL_ATTENTION_FUNCTIONS"
NOT_WHOLE = "rhythm_kernels reads attention here: compile the model without fullgraph=True"
SHARDING = ("deepspeed", "ring_flash_attn", "torch.distributed")
"""Packages that put an attention function of their own in place to compute a sequence on several ranks."""


class Listener(Protocol):
    """Who wants to know of a model's attention calls."""

    def wants(self, module: nn.Module) -> bool:
        """Whether this call is to be recorded."""

    def record(
        self, module: nn.Module, q: Tensor, k: Tensor, mask, kwargs: dict, reader: LseReader, returned: Tensor | None
    ) -> None:
        """What the attention function was given, has read and has returned."""


class Tap:
    """One wrapped entry of an attention table, shared by all listeners that need it and gone with the last.

    The object itself is kept, so that what torch.compile made of a model with it serves the next context too.
    """

    def __init__(self, table, name: str):
        self.table, self.name = table, name
        self.listeners: list[Listener] = []

    def add(self, listener: Listener) -> None:
        if not self.listeners:
            self._had_own = self.name in self.table._local_mapping
            self._wrapped = self.table.get(self.name)
            self.table[self.name] = self
        self.listeners.append(listener)

    def remove(self, listener: Listener) -> None:
        self.listeners.remove(listener)
        if not self.listeners:
            del self.table[self.name]
            if self._had_own:
                self.table[self.name] = self._wrapped

    def sharding(self) -> str | None:
        """The module of an attention function that computes only shards of sequences here; None if there is none."""
        for function in (self._wrapped, nn.functional.scaled_dot_product_attention):
            module = getattr(function, "__module__", None) or ""
            if any(module == package or module.startswith(f"{package}.") for package in SHARDING):
                return module
        return None

    @torch.compiler.disable(reason=NOT_WHOLE)
    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        # "eager" has no entry in the table: it is a function beside the model
        attend: Callable = self._wrapped or _modeling_file(module, "eager_attention_forward").eager_attention_forward
        listeners = [listener for listener in self.listeners if listener.wants(module)]
        if not listeners:
            return attend(module, query, key, value, attention_mask, **kwargs)
        with LseReader() as reader:
            out = attend(module, query, key, value, attention_mask, **kwargs)
        returned = out[1] if self.name == "flex_attention" else None
        for listener in listeners:
            listener.record(module, query, key, attention_mask, kwargs, reader, returned)
        return out


_taps: dict[tuple[int, str], Tap] = {}


def tap_of(decoder: nn.Module) -> Tap:
    """The tap of the entry that this decoder's attention implementation has in its table."""
    table = getattr(_modeling_file(decoder, TABLE), TABLE)
    name = getattr(decoder.config, "_attn_implementation", None) or "eager"
    return _taps.setdefault((id(table), name), Tap(table, name))


def decoder_of(model: nn.Module) -> nn.Module:
    """The module whose forward gets attention_mask and position_ids and calls the layers, whatever wraps it.

    Raises:
        TypeError: not a module.
        ValueError: no transformers model with layers on the attention interface.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    for module in model.modules():
        if hasattr(type(module), "get_decoder"):  # not DDP, FSDP, PEFT, torch.compile: what they wrap
            # what it says may be wrapped in turn, or still have an output layer: the innermost one calls the layers
            nested = [inner for inner in module.get_decoder().modules() if _is_decoder(inner)]
            if nested:
                return next(inner for inner in reversed(nested) if softmax_layers(inner) == softmax_layers(nested[0]))
    raise ValueError(
        f"model must be a transformers decoder whose layers go through the attention interface ({TABLE}), "
        f"got {type(model).__name__}"
    )


def attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules that call an attention function: one a layer, none in a hybrid's other layers."""
    return [module for module in decoder.modules() if _attends(type(module))]


def softmax_layers(decoder: nn.Module) -> list[int]:
    """Indices of the layers with softmax attention, ascending."""
    found = {getattr(module, "layer_idx", None) for module in attention_modules(decoder)}
    return sorted(index for index in found if isinstance(index, int))


def _is_decoder(module: nn.Module) -> bool:
    return _takes_tokens(type(module)) and hasattr(module, "config") and bool(softmax_layers(module))


@cache
def _takes_tokens(cls: type) -> bool:
    return bool({"input_ids", "inputs_embeds"} & set(inspect.signature(cls.forward).parameters))


@cache
def _attends(cls: type) -> bool:
    """Whether this class's forward looks its attention function up in the table."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and TABLE in code.co_names


def _modeling_file(module: nn.Module, attribute: str) -> ModuleType:
    """The file of the model's class, or of a class it derives from, that has this attribute."""
    for base in type(module).__mro__:
        file = sys.modules.get(base.__module__)
        if hasattr(file, attribute):
            return file
    raise ValueError(
        f"{type(module).__name__} does not use transformers' attention interface: no {attribute} beside it"
    )
