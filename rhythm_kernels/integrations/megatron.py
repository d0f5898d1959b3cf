"""Records the attention statistics of a forward of megatron-core's GPTModel.

    from rhythm_kernels.integrations import megatron

    with megatron.collect(model, response_mask=mask) as c:
        model(input_ids, position_ids, attention_mask)
    rhythm = c.rhythm()  # waad [B, T], fai [B, T]

Every layer's self-attention calls a module, `core_attention`, with the queries and keys of this rank's heads. It is
Megatron's own DotProductAttention or Transformer Engine's. Hooks on it pass its calls to the listener that also serves
transformers models.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rhythm_kernels.host import fetch
from rhythm_kernels.listen.backend_lse import LseReader
from rhythm_kernels.listen.collect import collect as collect_from_transformers
from rhythm_kernels.listen.taps import NOT_WHOLE, Call, Layers, Listener

CAUSAL = ("causal", "padding_causal")
"""Mask types under which each row sees the past of its own sequence, whatever mask is passed."""
CORE_ARGUMENTS = ("query", "key", "value", "attention_mask")
"""What a core is passed by position; all else is passed by name."""


class collect(collect_from_transformers):  # called like a function, and named like one
    """Opens a context that records the attention statistics of one forward of a megatron-core GPTModel.

    Packing is read from the forward's `packed_seq_params`, or from `position_ids` that restart; padding from an
    `attention_mask` that the layers obey. Megatron mostly has none: then the model attends to padding, and the
    statistics count it as the model does. Leave it out of `response_mask`.

    Args:
        model: a GPTModel, or a wrapper of one (DistributedDataParallel, Float16Module).
        arguments: those of `rhythm_kernels.collect`.

    Raises:
        TypeError, ValueError: as `rhythm_kernels.collect`; also for a model without a GPTModel, with a pipeline of
            several stages, with a key-value cache, or with an attention that is not causal self-attention.
        RuntimeError: a second forward in one context.
    """

    def __init__(self, model: nn.Module, **arguments):
        super().__init__(model, **arguments)
        self._outer = []  # modules around a GPTModel build no masks for it

    def _find_decoder(self, model: nn.Module) -> tuple[nn.Module, Layers]:
        gpt = _find_gpt(model)
        self._attentions = {layer.layer_number - 1: layer.self_attention for layer in gpt.decoder.layers}
        cores = {layer: getattr(attention, "core_attention", None) for layer, attention in self._attentions.items()}
        return gpt, Layers(gpt.config.num_layers, {layer: core for layer, core in cores.items() if core is not None})

    def _find_tap(self) -> "_Tap":
        return _Tap([self._attentions[layer] for layer in self.layers])

    def _query_heads(self) -> int:
        return self.decoder.config.num_attention_heads

    def _read_arguments(self, args: tuple, kwargs: dict) -> dict:
        given = inspect.signature(self.decoder.forward).bind_partial(*args, **kwargs).arguments
        for name in ("inference_context", "inference_params"):
            if given.get(name) is not None:
                raise ValueError(f"{name} must be None, got {type(given[name]).__name__}: a cache cannot be collected")
        inputs = given.get("input_ids")
        if inputs is None:
            inputs = given.get("decoder_input").transpose(0, 1)
        arguments = {"input_ids": inputs, "position_ids": given.get("position_ids")}
        packed = given.get("packed_seq_params")
        if packed is not None:
            bounds, padded = packed.cu_seqlens_q, packed.cu_seqlens_q_padded
            bounds, padded = fetch([bounds, bounds if padded is None else padded])
            if self._cu_seqlens is None:
                self._cu_seqlens = padded
            if not torch.equal(bounds, padded):
                self._leave_out_padding(bounds, padded, inputs)
        else:
            arguments["attention_mask"] = self._padding(given.get("attention_mask"), len(inputs))
        return arguments

    def _padding(self, mask: Tensor | None, batch: int) -> Tensor | None:
        """Returns the tokens that a mask marks as such, bool [B, T], if the layers obey it and it marks padding.

        Args:
            mask: [B or 1, 1, 1 or T, T] bool, True where a key is hidden.
        """
        attention = self._attentions[self.layers[0]]
        if mask is None or not _obeys_mask(attention.core_attention, _name(attention.attn_mask_type)):
            return None
        hidden = mask[:, 0, 0] if mask.shape[2] == 1 else mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return ~hidden.expand(batch, -1)

    def _leave_out_padding(self, bounds: Tensor, padded: Tensor, inputs: Tensor) -> None:
        """Takes the padding behind each packed sequence out of R: its rows are not those of any map."""
        position = torch.arange(inputs.shape[1])
        sequence = torch.searchsorted(padded[1:], position, right=True)
        real = (position < padded[sequence] + bounds.diff()[sequence]).to(inputs.device)[None]
        self._response_mask = real if self._response_mask is None else self._response_mask & real


def _find_gpt(model: object) -> nn.Module:
    """Returns the GPTModel inside a model."""
    from megatron.core.models.gpt import GPTModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a megatron-core GPTModel or a wrapper of one, got {type(model).__name__}")
    gpt = next((module for module in model.modules() if isinstance(module, GPTModel)), None)
    if gpt is None:
        raise ValueError(f"model must be a megatron-core GPTModel or a wrapper of one, got {type(model).__name__}")
    return gpt


class _Tap:
    """Hooks on the core attention of some layers, for one listener."""

    name = "core_attention"

    def __init__(self, attentions: list[nn.Module]):
        self._attentions = {id(attention.core_attention): attention for attention in attentions}
        self._hooks: list = []
        self._running: tuple[int, LseReader] | None = None

    def add(self, listener: Listener) -> None:
        self._listener = listener
        for attention in self._attentions.values():
            core = attention.core_attention
            self._hooks.append(core.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(core.register_forward_hook(self._after, with_kwargs=True, always_call=True))

    def remove(self, listener: Listener) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def sharding(self) -> None:
        """Returns None: Megatron says itself what it shards."""

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _before(self, core: nn.Module, args: tuple, kwargs: dict) -> None:
        self._running = None
        layer = self._listener.layer_of(core)
        if layer is not None:
            query = _arguments_of(args, kwargs)["query"]
            reader = LseReader(query.device.type, self.name, asks=self._listener.asks_for_lse)
            self._running = layer, reader.__enter__()

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _after(self, core: nn.Module, args: tuple, kwargs: dict, out: Tensor | None) -> None:
        if self._running is None:
            return
        (layer, reader), self._running = self._running, None
        reader.__exit__(None, None, None)
        if out is not None:  # None if the module has failed
            self._listener.record(layer, _call_of(self._attentions[id(core)], layer, args, kwargs, out, reader))


def _call_of(attention: nn.Module, layer: int, args: tuple, kwargs: dict, out: Tensor, reader: LseReader) -> Call:
    """Returns a call of an attention's core as one of transformers' attention functions.

    Raises:
        ValueError: the call is not causal self-attention, or has a bias.
    """
    core = attention.core_attention
    given = _arguments_of(args, kwargs)
    if given.get("attention_bias") is not None:
        raise ValueError(f"attention_bias must be None, got one in layer {layer}: the statistics do not know of it")
    query, key, value = (_heads_first(given[name]) for name in ("query", "key", "value"))
    offset = getattr(core, "softmax_offset", None)
    dropout = getattr(core, "attention_dropout", 0.0)
    return Call(
        attention,
        query,
        key,
        value,
        _mask_of(attention, layer, given, query.shape[2]),
        {
            "scaling": _scale_of(attention),
            "sliding_window": _window_of(core),
            "s_aux": None if offset is None else offset.detach().flatten(),
            "dropout": getattr(dropout, "p", dropout) if core.training else 0.0,
        },
        reader,
        _tokens_first(out, query),
        None,
        _without_dropout(core, args, kwargs, query),
    )


def _arguments_of(args: tuple, kwargs: dict) -> dict:
    return dict(zip(CORE_ARGUMENTS, args)) | kwargs


def _heads_first(x: Tensor) -> Tensor:
    """Returns [B, H, T, D] of queries, keys or values [T, B, H, D], or [T, H, D] of packed ones."""
    return x.permute(1, 2, 0, 3) if x.ndim == 4 else x.transpose(0, 1)[None]


def _tokens_first(out: Tensor, query: Tensor) -> Tensor:
    """Returns [B, T, HQ, Dv] of an output [T, B, HQ Dv], or [T, HQ Dv] of packed tokens."""
    batch, heads, tokens, _ = query.shape
    return out.reshape(tokens, batch, heads, -1).transpose(0, 1)


def _without_dropout(core: nn.Module, args: tuple, kwargs: dict, query: Tensor) -> Callable:
    """Returns a function that calls a core again on the same inputs, without dropout."""

    def attend(**_) -> tuple[Tensor]:
        training = core.training
        core.eval()
        try:
            return (_tokens_first(core.forward(*args, **kwargs), query),)
        finally:
            core.train(training)

    return attend


def _scale_of(attention: nn.Module) -> float | None:
    """Returns the factor of the scores; None for D ** -0.5."""
    own_softmax = getattr(attention.core_attention, "scale_mask_softmax", None)
    if own_softmax is not None:  # Megatron's own core may divide by the layer's number, and its softmax multiplies
        return attention.core_attention.softmax_scale * (own_softmax.scale or 1)
    latent = getattr(attention, "softmax_scale", None)  # multi-latent attention's
    return attention.config.softmax_scale if latent is None else latent


def _window_of(core: nn.Module) -> int | None:
    """Returns the sliding window of a core in tokens, the row's own included; None without one."""
    window = getattr(getattr(core, "scale_mask_softmax", core), "window_size", None)
    return None if window is None or window[0] < 0 else window[0] + 1


def _name(mask_type: object) -> str:
    """Returns the name of a mask type, which Transformer Engine keeps as text."""
    return getattr(mask_type, "name", mask_type)


def _obeys_mask(core: nn.Module, mask_type: str) -> bool:
    """Returns whether a core uses the attention_mask that it is passed."""
    own_softmax = getattr(core, "scale_mask_softmax", None)
    return mask_type not in ("causal", "no_mask") if own_softmax is None else own_softmax.window_size is None


def _mask_of(attention: nn.Module, layer: int, given: dict, tokens: int) -> Tensor | None:
    """Returns the mask that a core obeys, True where a key is seen, [B or 1, 1, T, T]; None if it is causal without.

    Raises:
        ValueError: the mask type does not make each row see its past, and there is no mask that the core obeys.
    """
    core = attention.core_attention
    mask_type = _name(given.get("attn_mask_type") or attention.attn_mask_type)
    mask = given["attention_mask"]
    is_own = hasattr(core, "scale_mask_softmax")
    if mask is not None and _obeys_mask(core, mask_type) and (is_own or mask_type == "arbitrary"):
        return (~mask).expand(-1, -1, tokens, -1)
    if mask_type not in CAUSAL and _window_of(core) is None:
        raise ValueError(
            f"collect needs causal self-attention, got attn_mask_type {mask_type} without a mask in layer {layer}"
        )
    return None
