"""Collects from models to which PEFT adds virtual tokens: their decoder sees more tokens than the input ids have.

Prompt tuning and p-tuning put V learned embeddings before each row. Rows are padded on the left, so the padding lies
between the virtual tokens and the prompt. The statistics allow no padding inside a sequence, so q, k and masks are
moved to rows that begin with the padding. This changes neither scores nor distances in tokens.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.utils import is_peft_available

from rhythm_kernels.isolation import isolated
from rhythm_kernels.listen.backend_lse import row_pass
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.listen.masks import is_mask
from rhythm_kernels.listen.taps import Call

CACHED = ("PREFIX_TUNING", "CARTRIDGE")
"""PEFT types that put keys and values into the cache of each layer."""


def virtual_tokens(model: nn.Module) -> int:
    """Returns V, how many virtual tokens PEFT puts before each row of this model; 0 without prompt learning.

    Raises:
        ValueError: the active adapter puts keys and values into the cache, as prefix tuning does.
    """
    if not is_peft_available():
        return 0
    from peft import PeftModel

    adapted = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if adapted is None or not adapted.active_peft_config.is_prompt_learning:
        return 0
    config = adapted.active_peft_config
    if config.peft_type in CACHED:
        raise ValueError(
            f"peft_config must not be {config.peft_type.value} where attention is read: it puts "
            f"{config.num_virtual_tokens} keys into the cache of each layer that belong to no token, so that a part of "
            "each attention row has no distance and no token to be credited; use prompt tuning, p-tuning or LoRA"
        )
    return config.num_virtual_tokens


class VirtualTokensCollector(collect):
    """Collects a forward with V virtual tokens before each row; response_mask [B, T] covers the input ids.

    The signals are [B, V + T]. Their last T are those of the input ids, except in the padding on the left.
    """

    def __init__(self, model: nn.Module, virtual: int, response_mask: Tensor, **options):
        super().__init__(model, response_mask=nn.functional.pad(response_mask, (virtual, 0)), **options)
        self.virtual = virtual
        self._order: Tensor | None = None
        """[B, V + T] int64: for each position of the moved rows, its position in the decoder's rows."""
        # by the id of a mask; the mask is kept too, so that no other gets its id
        self._moved: dict[int, tuple[object, object]] = {}

    def _prepare(self, arguments: dict, inputs: Tensor) -> None:
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            padding = (mask[:, self.virtual :].cumsum(-1) == 0).sum(-1, keepdim=True)
            place = torch.arange(mask.shape[1], device=mask.device)
            of_row = torch.where(place < padding + self.virtual, place - padding, place)
            self._order = torch.where(place < padding, place + self.virtual, of_row)
            arguments = arguments | {"attention_mask": mask.gather(1, self._order)}
        super()._prepare(arguments, inputs)

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._order = None
        self._moved.clear()  # masks of T x T

    def record(self, layer: int, call: Call) -> None:
        if self._order is not None:
            with isolated(call.query.device):
                call = call._replace(
                    **{name: self._move(getattr(call, name), 2) for name in ("query", "key", "value")},
                    mask=self._moved_mask(call.mask),
                    out=self._move(call.out, 1),
                    # some kernels return the log-sum-exp of rows without their padding
                    reader=SimpleNamespace(dtypes=call.reader.dtypes, lse=lambda *_: (None, row_pass("moved tokens"))),
                    attend=lambda **options: (self._move(call.attend(**options)[0], 1),),
                )
        super().record(layer, call)

    def _move(self, x: Tensor, dim: int) -> Tensor:
        """Returns x with its tokens, along `dim`, at their new positions."""
        shape = [1] * x.ndim
        shape[0], shape[dim] = self._order.shape
        return x.gather(dim, self._order.view(shape).expand_as(x))

    def _moved_mask(self, mask):
        if not is_mask(mask):
            return mask
        if id(mask) not in self._moved:  # all layers of a kind share one mask in a forward
            order = self._order
            if isinstance(mask, Tensor):
                wide = mask.expand(len(order), -1, -1, -1)
                moved = self._move(self._move(wide, 2), 3)
            else:
                moved = SimpleNamespace(mask_mod=lambda b, h, q, k: mask.mask_mod(b, h, order[b, q], order[b, k]))
            self._moved[id(mask)] = mask, moved
        return self._moved[id(mask)][1]
