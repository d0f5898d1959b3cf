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
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rhythm_kernels.host import fetch, send
from rhythm_kernels.isolation import isolated
from rhythm_kernels.listen.backend_lse import LseReader
from rhythm_kernels.listen.collect import collect as collect_from_transformers
from rhythm_kernels.listen.collector import digest_of
from rhythm_kernels.listen.shards import places_of
from rhythm_kernels.listen.taps import NOT_WHOLE, Call, Layers
from rhythm_kernels.ranks import HeadShards, Parallel, Ranks, together
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.types import AttentionStats, GroupStats, Rhythm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CAUSAL = ("causal", "padding_causal")
"""Mask types under which each row sees the past of its own sequence, whatever mask is passed."""
CORE_ARGUMENTS = ("query", "key", "value", "attention_mask")
"""The arguments that a core is passed by position; all others are passed by name."""


class collect(collect_from_transformers):  # called like a function, and named like one
    """Opens a context that records the attention statistics of one forward of a megatron-core GPTModel.

    Packing is read from the forward's `packed_seq_params`, or from `position_ids` that restart; padding from an
    `attention_mask` that the layers obey. Megatron mostly has none: then the model attends to padding, and the
    statistics count it as the model does. Leave it out of `response_mask`.

    Ranks that share the model are found in it. They all open a context with the same arguments, and run the forward.
    With tensor and context parallelism `stats` has this rank's heads and `rhythm()` is of all; T is that of the whole
    row, and `own_tokens` are the places of this rank's. With pipeline parallelism `stats` has the sampled layers of
    this stage. `rhythm()` is then of all stages, which must all call it, after their forwards: a stage cannot wait for
    the next one inside its own.

    Args:
        model: a GPTModel, or a wrapper of one (DistributedDataParallel, Float16Module).
        arguments: those of `rhythm_kernels.collect`.

    Raises:
        TypeError, ValueError: as `rhythm_kernels.collect`; also for a model without a GPTModel, with stages of several
            parts (a virtual pipeline), or with an attention that is not causal self-attention. With pipeline
            parallelism `rhythm()` raises what the forward would.
        RuntimeError: a second forward in one context; another rank's error.
    """

    def __init__(self, model: nn.Module, **arguments):
        super().__init__(model, **arguments)
        self._real_lengths: Tensor | None = None  # of the packed sequences, without their padding
        self._outer = []  # modules around a GPTModel build no masks for it

    def rhythm(self) -> Rhythm:
        if self._stages is None:
            return super().rhythm()
        if self._rhythm is None:
            self._rhythm = self._over_stages()
        return self._rhythm

    # ---- what is listened to -----------------------------------------------------------------------------------------

    def _find_decoder(self, model: nn.Module) -> tuple[nn.Module, Layers]:
        gpt = _find_gpt(model)
        count = gpt.config.num_layers
        self._attentions = {layer.layer_number - 1: layer.self_attention for layer in gpt.decoder.layers}
        cores = {layer: getattr(attention, "core_attention", None) for layer, attention in self._attentions.items()}
        group = _group_of(gpt, "pp", "pipeline_model")
        self._stages = None if group is None else Ranks("the pipeline's stages", group)
        self._cores = {layer: core for layer, core in cores.items() if core is not None}
        if self._stages is None:
            return gpt, Layers(count, self._cores)
        parts = gpt.config.virtual_pipeline_model_parallel_size
        if parts is not None:
            raise ValueError(
                f"a stage of a pipeline must be one model, got virtual_pipeline_model_parallel_size {parts}"
            )
        without = sorted(set(cores) - set(self._cores))
        if without:
            self._failure = ValueError(f"a pipeline must have core_attention in all layers, {without} have none")
        # other stages have the others; they are not asked here, since they may be waiting for this one's forward
        return gpt, Layers(count, {layer: self._cores.get(layer) for layer in range(count)})

    def _find_tap(self) -> "_Tap":
        return _Tap([self._cores[layer] for layer in self.layers if layer in self._cores])

    def _find_parallel(self) -> Parallel | None:
        heads, tokens = _group_of(self.decoder, "tp", "tensor_model"), _group_of(self.decoder, "cp", "context")
        return None if heads is None and tokens is None else Parallel(heads, tokens, "zigzag")

    def _query_heads(self) -> int:
        return self.decoder.config.num_attention_heads

    def _read_arguments(self, args: tuple, kwargs: dict) -> dict:
        given = inspect.signature(self.decoder.forward).bind_partial(*args, **kwargs).arguments
        inputs = given.get("input_ids") if self.decoder.pre_process else None  # a later stage may get any
        if inputs is None:
            inputs = self._hidden_states(given.get("decoder_input"))
        positions, packed = given.get("position_ids"), given.get("packed_seq_params")
        if packed is None or packed.qkv_format != "thd":
            arguments = {"attention_mask": self._padding(given.get("attention_mask"), len(inputs))}
            real, cuts = None, None
        else:
            arguments, positions = {}, None  # positions may be those of a batch that is not packed
            real = self._read_bounds(packed)
            cuts = self._cu_seqlens.tolist()
        ranks = self._token_ranks()
        if ranks is not None:
            tokens = inputs.shape[1] * ranks.size
            own = places_of("zigzag", [inputs.shape[1]] * ranks.size, cuts)[ranks.rank]
            if cuts is not None and cuts[-1] != tokens:
                raise ValueError(f"packed_seq_params must bound all {tokens} tokens of the row, got {cuts[-1]}")
            if positions is None or positions.shape != inputs.shape[:2]:
                begins = [begin for begin, end in pairwise(cuts or [0, tokens]) for _ in range(begin, end)]
                positions = own - torch.tensor(begins, device="cpu")[own]
                positions = send(positions, inputs.device).expand(len(inputs), -1)
            if real is not None and (self._response_mask is None or self._response_mask.shape != real.shape):
                real = real[:, own]
        if real is not None:  # rows of padding are not those of any map
            real = send(real, inputs.device)
            given_mask = self._response_mask
            self._response_mask = real if given_mask is None or given_mask.shape != real.shape else given_mask & real
        return arguments | {"input_ids": inputs, "position_ids": positions}

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        try:
            super()._before_forward(decoder, args, kwargs)
        except Exception as error:
            if self._stages is None:
                raise
            self._keep(error)
            self._all_told = True  # the ranks of this stage have raised it together

    def _hidden_states(self, embeddings: Tensor | None) -> Tensor:
        """Returns what has the batch and the tokens of a forward without token ids in its shape, [B, T, 1].

        Args:
            embeddings: [T, B, size], those of the caller; None in a later stage of a pipeline. With sequence
                parallelism they are of a part of the tokens.
        """
        states = self.decoder.decoder.input_tensor if embeddings is None else embeddings
        config = self.decoder.config
        tokens = len(states) * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        return states[0, :, :1, None].expand(-1, -1, tokens).transpose(1, 2)

    def _token_ranks(self) -> Ranks | None:
        """Returns the ranks that hold some tokens of all heads."""
        groups = () if self._shards is None or not self._shards.of_tokens else self._shards.groups
        return next((ranks for ranks in groups if ranks.name == "parallel.tokens"), None)

    def _padding(self, mask: Tensor | None, batch: int) -> Tensor | None:
        """Returns the tokens that a mask marks as such, bool [B, T], if the layers obey it and it marks padding.

        Args:
            mask: [B or 1, 1, 1 or T, T] bool, True where a key is hidden.
        """
        if mask is None or not self._cores:
            return None
        layer, core = next(iter(self._cores.items()))
        if not _obeys_mask(core, _name(self._attentions[layer].attn_mask_type)):
            return None
        hidden = mask[:, 0, 0] if mask.shape[2] == 1 else mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return ~hidden.expand(batch, -1)

    def _read_bounds(self, packed: object) -> Tensor | None:
        """Keeps where packed sequences begin and end, and returns which tokens are no padding, bool [1, T].

        None stands for all of them. Padding is behind each sequence; rows of padding see it, and no others.
        """
        own_ranks = getattr(packed, "local_cp_size", None)
        if own_ranks is not None:
            raise ValueError(f"packed_seq_params must leave the context parallel ranks as they are, got {own_ranks}")
        bounds, padded = packed.cu_seqlens_q, packed.cu_seqlens_q_padded
        bounds, padded = fetch([bounds, bounds if padded is None else padded])
        if self._cu_seqlens is None:
            self._cu_seqlens = padded
        self._real_lengths = bounds.diff()
        if torch.equal(bounds, padded):
            return None
        position = torch.arange(int(padded[-1]), device="cpu")
        sequence = torch.searchsorted(padded[1:], position, right=True)
        return (position < padded[sequence] + bounds.diff()[sequence])[None]

    # ---- a call, and the end of the forward --------------------------------------------------------------------------

    def listen(self, layer: int, args: tuple, kwargs: dict, out: Tensor, reader: LseReader) -> None:
        """Takes a call of a layer's core attention that has returned."""
        try:
            call = _call_of(self._attentions[layer], layer, args, kwargs, out, reader)
        except ValueError as error:
            if self._shards is None and self._stages is None:
                raise
            self._failure, call = self._failure or error, None  # until the ranks tell each other
        try:
            if call is not None or self._shards is not None:
                self.record(layer, call)
        except Exception as error:
            if self._stages is None:
                raise
            self._keep(error)

    def _finish(self) -> None:
        if self._stages is None:
            super()._finish()
            return
        try:
            self._settle()
        except Exception as error:
            self._keep(error)

    def _keep(self, error: Exception) -> None:
        """Keeps an error until `rhythm`: a stage that left its forward would keep the next one waiting."""
        self._failure = self._failure or error

    def _over_stages(self) -> Rhythm:
        """Returns the rhythm of the layers of all stages, which all call it."""
        own = [layer for layer in self.layers if layer in self._cores]
        with together([self._stages]) as facts:
            if self._failure is not None:
                raise self._failure
            missing = [layer for layer in own if layer not in self.stats]
            if self.layout is None or missing:
                raise RuntimeError(f"no statistics of layers {missing}: no forward has finished inside the context")
            facts |= {"layers": self.layers, "sequences": self.layout.bounds, "options": self._options | self._grouping}
            facts |= {"tokens": tuple(self.layout.rows.shape), "response_mask": digest_of(self.layout.rows)}
            facts["groups"] = digest_of(*(self.groups or ()))
        rows = self.layout.rows
        with self.findings.clock, isolated(rows.device):
            self.findings.tell(self._stages, rows.device)
            stats = self.stats
            if not own:  # a layer without heads
                empty = rows.new_zeros(len(rows), 0, rows.shape[1], dtype=torch.float32)
                spans = rows.new_zeros(self.layout.sequences, 0, dtype=torch.float32)
                alone = AttentionStats(empty, empty, spans, empty)
                stats = {0: alone if self.groups is None else GroupStats(empty.sum(1), empty.sum(1))}
            counts = [count for [count] in self._stages.numbers(len(own))]
            heads = _StageHeads(self._stages, counts, self._shards and self._shards.heads, self._query_heads())
            rhythm = rhythm_of(stats, self.layout, groups=self.groups, heads=heads, **self._grouping)
            if self.groups is None:
                return rhythm
            waad, fai = self._stages.sum(torch.stack([rhythm.waad, rhythm.fai]))
            return rhythm._replace(waad=waad, fai=fai)


class _StageHeads:
    """Some heads of some layers among all, and the exchanges that make statistics of all: `HeadShards` over stages.

    Args:
        stages: the ranks that hold other layers.
        counts: the number of sampled layers of each.
        heads: this rank's heads of its layers; None for all of them.
        query_heads: the number of heads of a layer.
    """

    def __init__(self, stages: Ranks, counts: list[int], heads: HeadShards | None, query_heads: int):
        self._stages, self._counts, self._heads, self._query_heads = stages, counts, heads, query_heads
        self._is_empty = counts[stages.rank] == 0

    def all_heads(self, x: Tensor) -> Tensor:
        """Returns a value of every head of every layer, [S, L, HQ], from those of this rank's."""
        if self._is_empty:
            x = x.new_zeros(len(x), 0, self._query_heads)
        elif self._heads is not None:
            x = self._heads.all_heads(x)
        return torch.cat(self._stages.gather_uneven(x, self._counts, 1), 1)

    def own_heads(self, x: Tensor) -> Tensor:
        """Returns the values of this rank's heads of its layers among those of every head, [..., L, HQ]."""
        if self._is_empty:
            return x[..., :1, :0]
        x = x.split(self._counts, -2)[self._stages.rank]
        return x if self._heads is None else self._heads.own_heads(x)

    def total(self, x: Tensor) -> Tensor:
        """Returns the sum over all ranks, in a fixed order: the same bits on every rank."""
        if self._heads is not None and not self._is_empty:
            x = self._heads.total(x)
        return self._stages.sum(x)


def _group_of(gpt: nn.Module, name: str, long_name: str) -> "ProcessGroup | None":
    """Returns the ranks that share a model in one way; None where there is one.

    Args:
        name: the way in `pg_collection`: "tp", "cp" or "pp".
        long_name: the way in `parallel_state` and, with _parallel_size, in the configuration.
    """
    from megatron.core import parallel_state

    if getattr(gpt.config, f"{long_name}_parallel_size") == 1:
        return None
    group = getattr(getattr(gpt, "pg_collection", None), name, None)
    return getattr(parallel_state, f"get_{long_name}_parallel_group")() if group is None else group


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

    def __init__(self, cores: list[nn.Module]):
        self._cores = cores
        self._hooks: list = []
        self._running: tuple[int, LseReader] | None = None

    def add(self, listener: collect) -> None:
        self._listener = listener
        for core in self._cores:
            self._hooks.append(core.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(core.register_forward_hook(self._after, with_kwargs=True, always_call=True))

    def remove(self, listener: collect) -> None:
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
            self._listener.listen(layer, args, kwargs, out, reader)


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
    return getattr(attention.config, "softmax_scale", None) if latent is None else latent


def _window_of(core: nn.Module) -> int | None:
    """Returns the sliding window of a core in tokens, the row's own included; None without one."""
    window = getattr(getattr(core, "scale_mask_softmax", core), "window_size", None)
    return None if window is None or window[0] < 0 else window[0] + 1


def _name(mask_type: object) -> str:
    """Returns the name of a mask type, which Transformer Engine keeps as text."""
    return getattr(mask_type, "name", mask_type)


def _obeys_mask(core: nn.Module, mask_type: str) -> bool:
    """Returns whether a core uses the attention_mask that it is passed."""
    if hasattr(core, "scale_mask_softmax"):  # Megatron's own: its window makes a mask of its own
        return _window_of(core) is None
    return mask_type not in ("causal", "no_mask")


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
