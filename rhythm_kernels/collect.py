"""Records attention statistics inside a transformers model's own forward.

While a `collect` context is open, a tap listens to the attention of its model (`taps.py`): it hands q, k and the
attention kernel's own log-sum-exp of the sampled layers to the statistics. Nothing about the model changes.
"""

import inspect
import time
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rhythm_kernels.attention.api import BACKENDS, run_group_stats, run_stats
from rhythm_kernels.attention.layout import Layout, make_layout
from rhythm_kernels.attention.options import MAX_WINDOW, Options, check_options
from rhythm_kernels.backend_lse import LseReader
from rhythm_kernels.checks import check_choice, check_float, check_horizon, check_int, check_tensor
from rhythm_kernels.heads import sampled_layers
from rhythm_kernels.masks import is_mask, window_of
from rhythm_kernels.signals import GROUPS_PER, check_groups, rhythm_of
from rhythm_kernels.taps import NOT_WHOLE, decoder_of, softmax_layers, tap_of
from rhythm_kernels.types import AttentionStats, GroupStats, HeadGroups, Rhythm

MASKED = ("eager", "sdpa")
"""Implementations that know of a sliding window, and of packed sequences, by their mask alone."""
OTHER_SCORES = ("position_bias", "indices", "block_indices")
"""What changes an attention function's map and is not known here: biases, sparse choices of keys."""


def collect(
    model: nn.Module,
    *,
    layers: int | Sequence[int] = 5,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    response_mask: Tensor | None = None,
    groups: HeadGroups | None = None,
    groups_per: str = "sequence",
    local: float = 0.3,
    global_: float = 0.3,
    backend: str = "auto",
) -> "Collector":
    """A context that records the attention statistics of one forward of `model`.

        with collect(model, response_mask=mask) as c:
            logits = model(input_ids, attention_mask=attention_mask).logits
        rhythm = c.rhythm()  # waad [B, T], fai [B, T]

    Padding is taken from the forward's `attention_mask` [B, T], packing (B = 1) from `position_ids` that restart
    (with `use_cache=False`, else transformers does not separate the sequences) or, with attention that reads it, from
    `cu_seq_lens_q`.

    Args:
        model: a transformers decoder-only model, or a wrapper of one (PEFT, DDP, FSDP, torch.compile without
            fullgraph=True), whatever its attention implementation. With "sdpa" the statistics leave out soft-capping
            and sinks, as transformers does.
        layers: how many of the middle third, or a list of layer indices; see `sampled_layers`. Of a hybrid only its
            softmax layers are counted, which a warning says.
        window, horizon: W of WAAD and (lo, hi) of FAI, tokens.
        response_mask: [B, T] bool, R; every valid token if None.
        groups: head groups of an earlier batch, [L, HQ] or, for each sequence of this one, [B, L, HQ], on any device.
            Then spans are not computed and heads outside the groups are skipped.
        groups_per: "sequence": head groups from each sequence's own spans (the paper's reading); "batch": from the
            spans over the whole batch.
        local, global_: fractions of local and global heads.
        backend: of `attention_stats`.

    Raises:
        TypeError, ValueError: wrong arguments, or a forward that cannot be collected from: with a key-value cache, a
            4-D mask, groups for another number of sequences, attention that is bidirectional or neither full nor in a
            sliding window (chunks, sparse indexers), biased scores, shards of sequences or of heads, no attention
            interface.
        RuntimeError: a second forward in one context.
    """
    return Collector(model, layers, window, horizon, response_mask, groups, groups_per, local, global_, backend)


class Collector:
    """What `collect` returns; `stats`, `lse_sources`, `layout` and `rhythm()` are filled by the forward."""

    def __init__(self, model, layers, window, horizon, response_mask, groups, groups_per, local, global_, backend):
        self.stats: dict[int, AttentionStats] | dict[int, GroupStats] = {}
        """The statistics of each sampled layer: of each head, or summed over the groups where `groups` is given."""
        self.lse_sources: dict[int, str] = {}
        """Where each sampled layer's log-sum-exp comes from: the name of the model's attention operator, such as
        "aten::_scaled_dot_product_flash_attention", "flex_attention", or "row pass" if the statistics computed it."""
        self.layout: Layout | None = None
        self.decoder = decoder_of(model)
        self.layers = _chosen_layers(self.decoder, layers)
        self._modules = {id(module) for module in self.decoder.modules()}
        self._response_mask = response_mask
        if response_mask is not None:
            check_tensor("response_mask", response_mask, ["B", "T"], [torch.bool])
        self._options = {"window": check_int("window", window, 1, MAX_WINDOW), "horizon": check_horizon(horizon)}
        self._check_grouping(groups, groups_per, local, global_)
        self._grouping = {"groups": groups, "groups_per": groups_per, "local": local, "global_": global_}
        self._backend = check_choice("backend", backend, BACKENDS)
        self._windows: dict[int, tuple[object, int | None]] = {}  # by the id of a mask, which is kept, and so its id
        self._clock = _Clock()
        self._hook = None

    def _check_grouping(self, groups, groups_per, local, global_) -> None:
        check_choice("groups_per", groups_per, GROUPS_PER)
        check_float("local", local, 0.0, 1.0)
        check_float("global_", global_, 0.0, 1.0)
        if groups is not None:
            sequences = groups[0].shape[0] if isinstance(groups, HeadGroups) else 0
            check_groups(groups, len(self.layers), self.decoder.config.num_attention_heads, sequences)

    def __enter__(self) -> "Collector":
        if self._hook is not None:
            raise RuntimeError("this collect context is open already")
        self._tap = tap_of(self.decoder)
        self._tap.add(self)
        self._hook = self.decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self._tap.remove(self)
        self._hook.remove()
        self._hook = None
        self._windows.clear()

    @property
    def seconds(self) -> float:
        """Time spent in the statistics of this forward; on a GPU this waits for them."""
        return self._clock.seconds()

    def rhythm(self) -> Rhythm:
        """The group means: Rhythm(waad [B, T], fai [B, T], spans, groups). Needs a finished forward."""
        missing = [layer for layer in self.layers if layer not in self.stats]
        if missing:
            why = "no forward ran inside the context" if not self.stats else "they do not use softmax attention"
            raise RuntimeError(f"no statistics of layers {missing}: {why}")
        with self._clock, torch.no_grad():
            return rhythm_of(self.stats, self.layout, **self._grouping)

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.layout is not None:
            raise RuntimeError("collect records one forward: open a new context for the next one")
        bound = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        bound = {**bound.pop("kwargs", {}), **bound}
        inputs = bound.get("input_ids") if bound.get("input_ids") is not None else bound.get("inputs_embeds")
        self._clock.on_gpu = inputs.is_cuda
        batch, tokens = inputs.shape[:2]
        mask, position_ids = bound.get("attention_mask"), bound.get("position_ids")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"collect needs attention_mask as [B, T], got {shape}")
        sharding = self._tap.sharding()
        if sharding is not None:
            raise ValueError(
                f"collect needs whole sequences, but {sharding} computes attention over shards of them here: "
                "switch sequence parallelism off"
            )
        cu_seqlens = None
        if position_ids is not None:
            position_ids = _text_positions(position_ids, mask is None)
            _check_begin(position_ids)
        if mask is None and bound.get("cu_seq_lens_q") is not None and self._tap.name not in MASKED:
            cu_seqlens = bound["cu_seq_lens_q"]
        elif mask is None and position_ids is not None:
            cu_seqlens = _packed_bounds(position_ids, batch)
            if cu_seqlens is not None and self._makes_cache(bound):
                raise ValueError(
                    "position_ids restart, but with a key-value cache transformers lets packed sequences see "
                    "each other: pass use_cache=False to the model"
                )
        response_mask = self._response_mask
        if response_mask is not None:
            check_tensor("response_mask", response_mask, [batch, tokens], [torch.bool], inputs.device)
        layout = make_layout(batch, tokens, inputs.device, response_mask, mask, cu_seqlens)
        groups = self._grouping["groups"]
        if groups is not None:
            check_groups(groups, len(self.layers), self.decoder.config.num_attention_heads, layout.sequences)
            self._grouping["groups"] = HeadGroups(*(group.to(inputs.device) for group in groups))
        self.layout = layout

    def _makes_cache(self, bound: dict) -> bool:
        if "flash" in self._tap.name:  # flash attention separates sequences by position_ids alone
            return False
        use_cache = bound.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.decoder.config, "use_cache", False)
        checkpointing = getattr(self.decoder, "gradient_checkpointing", False) and self.decoder.training
        given = any(bound.get(name) is not None for name in ("past_key_values", "cache"))  # its name changed
        return given or (use_cache and not checkpointing)

    def wants(self, module: nn.Module) -> bool:
        """Whether a call from this attention module is to be recorded (once: checkpointing calls it again)."""
        layer = getattr(module, "layer_idx", None)
        return id(module) in self._modules and layer in self.layers and layer not in self.stats

    def record(
        self, module: nn.Module, q: Tensor, k: Tensor, mask, kwargs: dict, reader: LseReader, returned: Tensor | None
    ) -> None:
        """Takes the statistics of a layer from what its attention function was given, has read and returned."""
        layer = module.layer_idx
        self._check_call(module, q, k, mask, kwargs)
        with self._clock, torch.no_grad():
            q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
            options = check_options(
                q,
                k,
                scale=kwargs.get("scaling"),
                sliding_window=self._window(mask, kwargs.get("sliding_window"), layer),
                # transformers' sdpa function ignores the soft-cap and the sinks that it is passed
                softcap=None if self._tap.name == "sdpa" else kwargs.get("softcap"),
                sinks=None if self._tap.name == "sdpa" else kwargs.get("s_aux"),
                need_span=self._grouping["groups"] is None,
                **self._options,
            )
            lse, self.lse_sources[layer] = reader.lse(q, options.sinks, self.layout, returned)
            self.stats[layer] = self.measure(layer, q, k, lse, options)

    def measure(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, options: Options
    ) -> AttentionStats | GroupStats:
        """What is kept of a layer: q [B, HQ, T, D], k [B, H, T, D], lse [B, HQ, T] fp32 where the model computed it."""
        groups = self._grouping["groups"]
        if groups is None:
            return run_stats(q, k, lse, self.layout, options, self._backend)
        local, global_ = (group[..., self.layers.index(layer), :] for group in groups)
        return run_group_stats(q, k, lse, local, global_, self.layout, options, self._backend)

    def _check_call(self, module: nn.Module, q: Tensor, k: Tensor, mask, kwargs: dict) -> None:
        """Raises for a call whose map is not what the statistics would compute."""
        layer = module.layer_idx
        if self.layout is None:
            raise RuntimeError("the attention layers were called outside of the decoder's forward")
        if k.shape[2] != q.shape[2]:
            raise ValueError(
                f"collect needs a forward over whole sequences, got {q.shape[2]} queries and {k.shape[2]} keys in "
                f"layer {layer}: call the model without past_key_values; added or compressed keys cannot be collected"
            )
        if q.shape[2] != self.layout.rows.shape[1] or q.device != self.layout.rows.device:
            raise ValueError(
                f"collect needs layers that see the decoder's input as it is, {self.layout.rows.shape[1]} tokens on "
                f"{self.layout.rows.device}, got {q.shape[2]} tokens on {q.device} in layer {layer}"
            )
        heads = self.decoder.config.num_attention_heads
        if isinstance(heads, int) and q.shape[1] != heads:
            raise ValueError(
                f"collect needs layers with the model's {heads} query heads, got {q.shape[1]} in layer {layer}: shards "
                "of tensor parallelism cannot be collected"
            )
        causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise ValueError(f"collect needs causal attention, layer {layer} is bidirectional")
        if self._tap.name == "eager" and mask is None and q.shape[2] > 1:
            raise ValueError(f"collect needs causal attention, layer {layer} is eager and got no mask")
        others = [name for name in OTHER_SCORES if kwargs.get(name) is not None]
        if others:
            raise ValueError(
                f"collect needs attention by q and k alone, got {', '.join(others)} in layer {layer}: biased scores "
                "and sparse choices of keys cannot be collected"
            )

    def _window(self, mask, given: int | None, layer: int) -> int | None:
        """The sliding window that a layer really has: that of its mask, or what a function without one is given."""
        if not is_mask(mask):
            return None if self._tap.name in MASKED else given
        if id(mask) not in self._windows:  # of all layers of a kind in a forward
            self._windows[id(mask)] = mask, window_of(mask, self.layout, layer)
        return self._windows[id(mask)][1]


def _chosen_layers(decoder: nn.Module, layers: int | Sequence[int]) -> list[int]:
    """`sampled_layers` among the softmax layers of a decoder."""
    count = decoder.config.num_hidden_layers
    softmax = [layer for layer in softmax_layers(decoder) if layer < count]  # others predict further tokens
    if not isinstance(layers, int):
        chosen = sampled_layers(count, layers)
        without = sorted(set(chosen) - set(softmax))
        if without:
            raise ValueError(f"layers must be layers with softmax attention, {softmax} of this model, got {without}")
        return chosen
    if not softmax:
        raise ValueError(f"model must have layers with softmax attention, {type(decoder).__name__} has none")
    chosen = [softmax[index] for index in sampled_layers(len(softmax), layers)]
    if len(softmax) < count:
        warnings.warn(
            f"{type(decoder).__name__} is a hybrid: only {len(softmax)} of its {count} layers have an attention map; "
            f"statistics come from layers {chosen}",
            stacklevel=4,
        )
    return chosen


def _text_positions(position_ids: Tensor, must_separate: bool) -> Tensor:
    """[B or 1, T]: of the axes [3 or 4, B, T] that models of images have, that of the text.

    Raises: ValueError: they are of images, and sequences would have to be told apart by them.
    """
    if position_ids.ndim == 2:
        return position_ids
    if len(position_ids) == 3 and must_separate and (position_ids != position_ids[:1]).any():
        raise ValueError(
            "position_ids must be of text where there is no attention_mask to tell sequences apart, "
            f"got {list(position_ids.shape)} with positions in images"
        )
    return position_ids[0]


def _check_begin(position_ids: Tensor) -> None:
    """Raises for rows that begin inside a sequence. Padding at the left counts as 0 or 1, by custom."""
    first = position_ids[:, :1]
    if (first > 1).any():
        raise ValueError(
            f"collect needs whole sequences, got position_ids that begin at {int(first.max())}: shards of sequence or "
            "context parallelism cannot be collected"
        )


def _packed_bounds(position_ids: Tensor, batch: int) -> Tensor | None:
    """cu_seqlens int32 [S + 1] where positions restart inside a row; None if they do not."""
    restarts = torch.diff(position_ids, dim=-1) != 1
    if not restarts.any():
        return None
    if batch != 1:
        raise ValueError(f"packed sequences need a batch of one row, got B = {batch} with position_ids that restart")
    starts = restarts[0].nonzero().flatten() + 1
    if position_ids[0, starts].any():
        raise ValueError(
            f"collect needs whole sequences, got position_ids that jump to {position_ids[0, starts].max()}: shards of "
            "sequence or context parallelism cannot be collected"
        )
    ends = starts.new_tensor([position_ids.shape[1]])
    return torch.cat([starts.new_zeros(1), starts, ends]).int()


class _Clock:
    """Adds up the time inside its `with` blocks: wall time, or the stream's own time on a GPU."""

    def __init__(self):
        self.on_gpu = False
        self.wall = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self.begin = self._now()

    def __exit__(self, *_) -> None:
        if self.on_gpu:
            self.events.append((self.begin, self._now()))
        else:
            self.wall += self._now() - self.begin

    def seconds(self) -> float:
        for begin, end in self.events:
            end.synchronize()
            self.wall += begin.elapsed_time(end) / 1e3
        self.events.clear()
        return self.wall
