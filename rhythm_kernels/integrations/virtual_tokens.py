"""Statistics of models to which PEFT adds virtual tokens: their decoder sees more tokens than the input ids have.

Prompt tuning and p-tuning put V learned embeddings before each row. Rows are padded on the left, so that the padding
comes to lie between the virtual tokens and the prompt. The statistics know no padding in the middle of a sequence:
q, k and masks are moved to rows that begin with the padding, which changes neither scores nor distances in tokens.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.utils import is_peft_available

from rhythm_kernels.attention.options import Options
from rhythm_kernels.collect import Collector
from rhythm_kernels.masks import is_mask
from rhythm_kernels.taps import NOT_WHOLE
from rhythm_kernels.types import AttentionStats, GroupStats


def virtual_tokens(model: nn.Module) -> int:
    """Returns V, how many virtual tokens PEFT puts before each row of this model; 0 without prompt learning.

    Raises:
        ValueError: the active adapter puts keys and values into the cache, as prefix tuning does.
    """
    if not is_peft_available():
        return 0
    from peft import PeftModel, PeftType

    adapted = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if adapted is None or not adapted.active_peft_config.is_prompt_learning:
        return 0
    config = adapted.active_peft_config
    if config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):
        raise ValueError(
            f"peft_config must not be {config.peft_type.value} where attention is read: it puts "
            f"{config.num_virtual_tokens} keys into the cache of each layer that belong to no token, so that a part of "
            "each attention row has no distance and no token to be credited; use prompt tuning, p-tuning or LoRA"
        )
    return config.num_virtual_tokens


class VirtualTokensCollector(Collector):
    """A `Collector` of one forward with V virtual tokens before each row; R [B, T] is that of the input ids.

    The signals are [B, V + T]. Their last tokens are those of the input ids, but for the padding on the left.
    """

    def __init__(self, model: nn.Module, virtual: int, response_mask: Tensor, **options):
        super().__init__(model, response_mask=nn.functional.pad(response_mask, (virtual, 0)), **options)
        self.virtual = virtual
        self._order: Tensor | None = None
        """[B, V + T] int64: the place in the decoder's rows of each place in the moved ones."""
        self._moved: dict[int, tuple[object, object]] = {}  # by the id of a mask, which is kept, and so its id

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            padding = (mask[:, self.virtual :].cumsum(-1) == 0).sum(-1, keepdim=True)
            place = torch.arange(mask.shape[1], device=mask.device)
            of_row = torch.where(place < padding + self.virtual, place - padding, place)
            self._order = torch.where(place < padding, place + self.virtual, of_row)
            kwargs = kwargs | {"attention_mask": mask.gather(1, self._order)}
        super()._before_forward(decoder, args, kwargs)

    def measure(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, options: Options
    ) -> AttentionStats | GroupStats:
        if self._order is None:
            return super().measure(layer, q, k, lse, options)
        q, k = (x.gather(2, self._order[:, None, :, None].expand_as(x)) for x in (q, k))
        return super().measure(layer, q, k, None, options)  # some kernels return the log-sum-exp without padding

    def _window(self, mask, given: int | None, layer: int) -> int | None:
        if self._order is not None and is_mask(mask):
            if id(mask) not in self._moved:
                self._moved[id(mask)] = mask, self._move(mask)
            mask = self._moved[id(mask)][1]
        return super()._window(mask, given, layer)

    def _move(self, mask):
        order = self._order
        if isinstance(mask, Tensor):
            wide = mask.expand(len(order), -1, -1, -1)
            rows = wide.gather(2, order[:, None, :, None].expand(-1, wide.shape[1], -1, wide.shape[3]))
            return rows.gather(3, order[:, None, None].expand_as(rows))
        return SimpleNamespace(mask_mod=lambda b, h, q, k: mask.mask_mod(b, h, order[b, q], order[b, k]))
