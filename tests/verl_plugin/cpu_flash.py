"""Lets transformers have FlashAttention on a CPU, by a stand-in, for as long as the process lives.

verl's Ulysses sequence parallelism wraps transformers' call of FlashAttention's kernel, and is all verl's own here.
"""

from contextlib import ExitStack

from flash_stand_in import flash_attention
from transformers import PreTrainedModel

PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True  # it would look for the package and a GPU
_for_good = ExitStack()
_for_good.enter_context(flash_attention())
