"""Finds a transformers model's decoder and its softmax layers, and listens to their attention.

Every attention layer of transformers looks up its function in a table, ALL_ATTENTION_FUNCTIONS, at each call. A `Tap`
replaces the entry that a model uses and calls the original function. It passes q, k and the attention kernel's
log-sum-exp to its listeners. Name, masks and dispatch stay as they are.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rhythm_kernels.listen.backend_lse import LseReader

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TABLE = "ALL_ATTENTION_FUNCTIONS"
NOT_WHOLE = "rhythm_kernels reads attention here: compile the model without fullgraph=True"
SHARDING = ("deepspeed", "ring_flash_attn", "torch.distributed")
"""Packages that replace the attention function by one that computes a sequence on several ranks."""

ELSEWHERE = "PipelineIdentityLayer"
"""The class that transformers' pipeline parallelism puts in place of a layer of another rank."""


class Call(NamedTuple):
    """One call of a model's attention function, after it has returned."""

    module: nn.Module
    query: Tensor
    """[B, HQ, T, D]"""
    key: Tensor
    """[B, H, T, D]"""
    value: Tensor
    """[B, H, T, Dv]"""
    mask: object
    kwargs: dict
    reader: LseReader
    out: Tensor
    """[B, T, HQ, Dv]"""
    beside: Tensor | None
    """The log-sum-exp that FlexAttention returned beside its output, [B, HQ, T], or None."""
    attend: Callable
    """The function itself: attend(**kwargs) calls it again on the same inputs."""


class Listener(Protocol):
    """Listens to a model's attention calls."""

    asks_for_lse: bool
    """Whether to request a log-sum-exp also of operators whose output may then change in its last bits."""

    def layer_of(self, module: nn.Module) -> int | None:
        """Returns the layer under which a call is recorded, None if it is not. Called once, before each call runs."""

    def record(self, layer: int, call: Call) -> None:
        """Takes a call that has returned."""


class Tap:
    """One wrapped entry of an attention table, shared by its listeners; the last to leave restores the entry.

    The object itself is kept, so that a model compiled with it needs no recompilation in the next context.
    """

    def __init__(self, table, name: str):
        self.table, self.name = table, name
        self.listeners: list[Listener] = []

    def add(self, listener: Listener) -> None:
        with _lock:  # contexts of other threads come and go
            # the entry may still be this tap, where another tool put it back
            if not self.listeners and self.table.get(self.name) is not self:
                self._had_own = self.name in self.table._local_mapping
                self._wrapped = self.table.get(self.name)
                self.table[self.name] = self
            self.listeners = [*self.listeners, listener]

    def remove(self, listener: Listener) -> None:
        with _lock:
            self.listeners = [other for other in self.listeners if other is not listener]
            # an entry that another tool has put there meanwhile stays
            if not self.listeners and self.table._local_mapping.get(self.name) is self:
                del self.table[self.name]
                if self._had_own:
                    self.table[self.name] = self._wrapped

    def sharding(self) -> str | None:
        """Returns the module of an attention function that computes shards of sequences here; None if there is none."""
        for function in (self._wrapped, nn.functional.scaled_dot_product_attention):
            module = getattr(function, "__module__", None) or ""
            if any(module == package or module.startswith(f"{package}.") for package in SHARDING):
                return module
        return None

    @torch.compiler.disable(reason=NOT_WHOLE)
    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        attend: Callable = self._wrapped or _eager_function(type(module))  # "eager" has no entry in the table
        attend = partial(attend, module, query, key, value, attention_mask)
        listeners = [(listener, listener.layer_of(module)) for listener in self.listeners]
        listeners = [(listener, layer) for listener, layer in listeners if layer is not None]
        if not listeners:
            return attend(**kwargs)
        asks = any(listener.asks_for_lse for listener, _ in listeners)
        with LseReader(query.device.type, self.name, asks=asks) as reader:
            returned = attend(**kwargs)
        beside = returned[1] if self.name == "flex_attention" else None
        call = Call(module, query, key, value, attention_mask, kwargs, reader, returned[0], beside, attend)
        for listener, layer in listeners:
            listener.record(layer, call)
        return returned


_taps: dict[tuple[int, str], Tap] = {}
_lock = threading.Lock()


def tap_of(decoder: nn.Module) -> Tap:
    """Returns the tap of the table entry of this decoder's attention implementation."""
    table = getattr(_modeling_file(decoder, TABLE), TABLE)
    name = getattr(decoder.config, "_attn_implementation", None) or "eager"
    return _taps.setdefault((id(table), name), Tap(table, name))


class Layers(NamedTuple):
    """The layers of a decoder, counted in the order in which they run."""

    count: int
    attention: dict[int, nn.Module]
    """The causal self-attention of each layer that has one, by the layer's place, ascending."""


def state_beside_attention(decoder: nn.Module, layers: Layers) -> str | None:
    """Returns what else than attention carries a state along a row, in words; None where attention is all there is.

    Recurrent and convolution layers get no mask. Only some of their kernels can be told where sequences begin, and
    whether they were told does not show in a layer's arguments.
    """
    others = layers.count - len(layers.attention)
    if others:
        return f"{others} of its {layers.count} layers have a state in place of an attention map"
    return "its layers have a state beside their attention" if getattr(decoder, "_is_stateful", False) else None


def find_decoder(model: nn.Module) -> tuple[nn.Module, Layers]:
    """Returns the decoder of a model, whatever wraps it, and its layers. All modules of the decoder are visited once.

    The decoder is the module whose forward gets attention_mask and position_ids and calls the layers.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it is not a transformers model whose layers use the attention interface, or it holds several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    found = {id(decoder): (decoder, layers) for decoder, layers in _decoders_of_models(model)}
    if not found:
        raise ValueError(
            f"model must be a transformers decoder whose layers go through the attention interface ({TABLE}), "
            f"got {type(model).__name__}"
        )
    if len(found) > 1:
        names = " and ".join(type(decoder).__name__ for decoder, _ in found.values())
        raise ValueError(f"model must hold one decoder, got {names}: give the model whose forward is to be read")
    return next(iter(found.values()))


def _decoders_of_models(module: nn.Module) -> Iterator[tuple[nn.Module, Layers]]:
    """Yields the decoder and the layers of each model inside a module, but not of the models inside such a model."""
    if hasattr(type(module), "get_decoder"):  # DDP, FSDP, PEFT and torch.compile have none, the wrapped model has
        # the decoder may be wrapped in turn, or still have an output layer: the innermost one calls the layers
        nested = _Tree(module.get_decoder()).decoders()
        if nested:
            softmax = list(nested[0][1].attention)
            yield next(found for found in reversed(nested) if list(found[1].attention) == softmax)
            return
    for child in module.children():
        yield from _decoders_of_models(child)


def decoder_of(model: nn.Module) -> nn.Module:
    """Returns the decoder that `find_decoder` finds."""
    return find_decoder(model)[0]


def ancestors_of(decoder: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Returns the modules of `model` that hold its decoder, the outermost first."""
    return _holders(decoder, model, set()) or []


def _holders(inner: nn.Module, module: nn.Module, seen: set[int]) -> list[nn.Module] | None:
    """Returns the modules from `module` down to the one that holds `inner`; None if it does not hold it."""
    if module is inner:
        return []
    seen.add(id(module))
    for child in module._modules.values():
        if child is not None and id(child) not in seen:
            below = _holders(inner, child, seen)
            if below is not None:
                return [module, *below]
    return None


class _Tree:
    """The modules below a root, the root first, each at every place that it has.

    A walk over the modules of a model takes the host a good part of a millisecond, in which a GPU may have nothing to
    do. So there is one walk for all questions, and a subtree is a range of it. Nothing is kept for the next call:
    layers may be removed, replaced or wrapped before it.
    """

    def __init__(self, root: nn.Module):
        self.modules: list[nn.Module] = []
        self.keys: list[str] = []
        """The name of each module in its parent; "" for the root."""
        self.parents: list[int] = []
        """The index of each module's parent; -1 for the root."""
        self.ends: list[int] = []
        """One past the index of the last module below each."""
        self._visit(root, "", -1)
        self._classes = list(map(type, self.modules))
        attending = {cls for cls in set(self._classes) if _attends(cls)}
        self._attending = [index for index, cls in enumerate(self._classes) if cls in attending]

    def _visit(self, module: nn.Module, key: str, parent: int) -> None:
        index = len(self.modules)
        self.modules.append(module)
        self.keys.append(key)
        self.parents.append(parent)
        self.ends.append(index + 1)
        if module._modules:
            for name, child in module._modules.items():
                if child is not None:
                    self._visit(child, name, index)
            self.ends[index] = len(self.modules)

    def decoders(self) -> list[tuple[nn.Module, Layers]]:
        """Returns the modules that take tokens and have softmax layers, each once, and their layers."""
        takers = {cls for cls in set(self._classes) if {"input_ids", "inputs_embeds"} & _parameters(cls)}
        first_places: dict[int, int] = {}
        for index, cls in enumerate(self._classes):
            if cls in takers and hasattr(self.modules[index], "config"):
                first_places.setdefault(id(self.modules[index]), index)
        found = [(self.modules[index], self.layers(index)) for index in first_places.values()]
        return [(module, layers) for module, layers in found if layers.attention]

    def layers(self, root: int) -> Layers:
        """Returns the layers of the decoder at an index, as `layers_of` describes them.

        Raises:
            ValueError: another rank has some of them.
        """
        elsewhere = sum(cls.__name__ == ELSEWHERE for cls in self._classes[root : self.ends[root]])
        if elsewhere:
            raise ValueError(
                f"model must have all its layers on one rank, got {elsewhere} that pipeline parallelism put on others"
            )
        inside = [index for index in self._attending if root <= index < self.ends[root]]
        own = [i for i in inside if not _looks_elsewhere("" if i == root else self.keys[i], self._classes[i])]
        # cross-attention is marked as not causal; where no layer is marked as causal, masks may make all of them so
        causal = [index for index in own if getattr(self.modules[index], "is_causal", True)]
        at_place: dict[int, list[nn.Module]] = {}
        count, begins = 0, {}  # by the index of each list of layers, the place of its first
        for index in causal or own:
            in_list = self._place_in_list(index, root)
            if in_list is None:
                continue
            stack, place = in_list
            if stack not in begins:
                begins[stack] = count
                count += len(self.modules[stack])
            at_place.setdefault(begins[stack] + place, []).append(self.modules[index])
        if any(len(modules) > 1 for modules in at_place.values()):  # several attentions a layer: each counts as a layer
            modules_in_order = [module for _, modules in sorted(at_place.items()) for module in modules]
            at_place, count = {place: [x] for place, x in enumerate(modules_in_order)}, len(modules_in_order)
        config = self.modules[root].config
        configured = getattr(config, "num_hidden_layers", None)
        # layers beyond this number do not run; in the decoder of an encoder-decoder it is the encoder's
        if isinstance(configured, int) and not is_of_encoder_decoder(config):
            count = min(count, configured)
        return Layers(count, {place: module for place, [module] in sorted(at_place.items()) if place < count})

    def _place_in_list(self, index: int, root: int) -> tuple[int, int] | None:
        """Returns the outermost list below the root that holds a module, by its index, and the place there."""
        in_list = None
        while index != root:
            if self.keys[index].isdecimal():
                in_list = self.parents[index], int(self.keys[index])
            index = self.parents[index]
        return in_list


def layers_of(decoder: nn.Module) -> Layers:
    """Returns a decoder's layers by their place in the order of execution, whatever `layer_idx` says.

    Layers may have been removed, and one layer may have several places.
    """
    return _Tree(decoder).layers(0)


def is_of_encoder_decoder(config) -> bool:
    """Returns whether sizes without a prefix in a decoder's configuration are the encoder's."""
    return getattr(config, "is_encoder_decoder", False) or hasattr(config, "decoder_layers")


def query_heads(decoder: nn.Module) -> int:
    """Returns the number of query heads of a decoder's layers."""
    config = decoder.config
    if is_of_encoder_decoder(config) and hasattr(config, "decoder_attention_heads"):
        return config.decoder_attention_heads
    return config.num_attention_heads


def softmax_layers(decoder: nn.Module) -> list[int]:
    """Returns the places of the layers with causal softmax attention, ascending."""
    return list(layers_of(decoder).attention)


def is_tensor_parallel(module: nn.Module) -> bool:
    """Returns whether a running module has distributed tensors as weights; FSDP has gathered its shards by then."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) for weight in module.parameters())


def mesh_of_heads(layers: Layers) -> "DeviceMesh | None":
    """Returns the dimension "tp" of the mesh over which attention weights are split; None where there is none."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.tensor import DTensor

    for weight in next(iter(layers.attention.values())).parameters() if layers.attention else ():
        names = (weight.device_mesh.mesh_dim_names or ()) if isinstance(weight, DTensor) else ()
        if "tp" in names and weight.placements[names.index("tp")].is_shard():
            return weight.device_mesh["tp"]
    return None


def _looks_elsewhere(key: str, cls: type) -> bool:
    """Returns whether a module of this name in its parent is cross-attention, to an image or to an encoder."""
    return "cross" in key or key == "encoder_attn" or "cross_attention_states" in _parameters(cls)


@cache
def _parameters(cls: type) -> frozenset[str]:
    """Returns the names of the arguments of this class's forward."""
    return frozenset(inspect.signature(cls.forward).parameters)


def _attends(cls: type) -> bool:
    return _attending_forward(cls) is not None


@cache
def _attending_forward(cls: type) -> Callable | None:
    """Returns the forward that looks up the function in the table: this class's, or a base's that it calls."""
    for base in cls.__mro__:
        forward = inspect.unwrap(vars(base).get("forward") or _nothing)
        code = getattr(forward, "__code__", None)
        if code is None or "forward" not in vars(base):
            continue
        if TABLE in code.co_names:
            return forward
        if not {"super", "forward"} & set(code.co_names):
            return None
    return None


def _nothing() -> None:
    pass


@cache
def _eager_function(cls: type) -> Callable:
    """Returns the eager function that this class's forward names, for a table without an entry."""
    forward = _attending_forward(cls)
    names = [] if forward is None else [name for name in forward.__code__.co_names if "eager" in name]
    functions = [forward.__globals__[name] for name in names if callable(forward.__globals__.get(name))]
    if len(functions) != 1:
        raise ValueError(f"{cls.__name__} must name one eager attention function, got {names}")
    return functions[0]


def _modeling_file(module: nn.Module, attribute: str) -> ModuleType:
    """Returns the file of the model's class, or of a class that it derives from, that has this attribute."""
    for base in type(module).__mro__:
        file = sys.modules.get(base.__module__)
        if hasattr(file, attribute):
            return file
    raise ValueError(
        f"{type(module).__name__} does not use transformers' attention interface: no {attribute} beside it"
    )
