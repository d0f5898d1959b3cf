"""Reads the maps that a model's attention function really uses, from its outputs for values that are unit vectors.

The output of attention is linear in its values. For values that are columns of the identity it is the map itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rhythm_kernels.listen.taps import Call, decoder_of, layers_of, tap_of


class OwnMaps:
    """Listens to the attention of a model; `maps` has [B, HQ, T, T] of each layer after its forward."""

    asks_for_lse = False

    def __init__(self, model):
        self.maps: dict[int, torch.Tensor] = {}
        self.calls: dict[int, Call] = {}
        self._decoder = decoder_of(model)
        self._places: dict[int, list[int]] = {}
        for layer, module in layers_of(self._decoder).attention.items():
            self._places.setdefault(id(module), []).append(layer)

    def layer_of(self, module) -> int | None:
        places = [layer for layer in self._places.get(id(module), []) if layer not in self.maps]
        return places[0] if places else None

    def record(self, layer: int, call: Call) -> None:
        self.maps[layer], self.calls[layer] = map_of(call), call


@contextmanager
def own_maps(model) -> Iterator[OwnMaps]:
    """Records the maps and the calls of each layer of the forward inside this block."""
    listener = OwnMaps(model)
    tap = tap_of(listener._decoder)
    tap.add(listener)
    try:
        yield listener
    finally:
        tap.remove(listener)


@torch.no_grad()
def map_of(call: Call) -> torch.Tensor:
    """Returns the map of one call, [B, HQ, T, T]."""
    tokens, size = call.value.shape[2:]
    kwargs = call.kwargs | {"dropout": 0.0}
    parts = []
    for begin in range(0, tokens, size):
        unit = torch.zeros_like(call.value)
        for column in range(min(size, tokens - begin)):
            unit[:, :, begin + column, column] = 1
        out = call.attend.func(call.module, call.query, call.key, unit, call.mask, **kwargs)[0]
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, -1)[..., :tokens]
