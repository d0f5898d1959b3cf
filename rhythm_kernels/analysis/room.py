"""A key-value cache with free room, for generation in large batches.

transformers' cache copies all keys and values at each new token. In a batch of hundreds of sequences that takes longer
than the model itself.
"""

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens that fit before keys and values are copied once more


class RoomyLayer(DynamicLayer):
    """The keys and values of a layer that sees all tokens, [B, H, T, D], as views of larger tensors."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._grown("keys", self.keys, key_states)
        self.values = self._grown("values", self.values, value_states)
        return self.keys, self.values

    def _grown(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        held = old.shape[2] if old.numel() else 0
        size, room = held + new.shape[2], self.rooms.get(name)
        # rows that were selected lie in a tensor of their own, without room
        if room is None or old.data_ptr() != room.data_ptr() or len(old) != len(room) or size > room.shape[2]:
            room = self.rooms[name] = new.new_empty(*new.shape[:2], size + ROOM, new.shape[3])
            if held:
                room[:, :, :held] = old
        room[:, :, held:size] = new
        return room[:, :, :size]


def roomy_cache() -> Cache:
    """Returns an empty cache of a model whose layers all see all tokens."""
    return Cache(layer_class_to_replicate=RoomyLayer)
