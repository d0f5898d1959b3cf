"""Records attention statistics inside a transformers model's own forward.

Every attention layer of transformers calls a function from one table, ALL_ATTENTION_FUNCTIONS, with q and k after RoPE
and norms. While a `collect` context is open, the entry that its model uses is wrapped: the wrapper calls the entry and
returns what it returned, and hands q, k and the attention kernel's own log-sum-exp of the sampled layers to the
statistics. Nothing about the model changes.
"""

import inspect
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from rhythm_kernels.attention.api import BACKENDS, run_group_stats, run_stats
from rhythm_kernels.attention.layout import Layout, make_layout
from rhythm_kernels.attention.options import MAX_WINDOW, check_options
from rhythm_kernels.backend_lse import LseReader
from rhythm_kernels.checks import check_choice, check_float, check_horizon, check_int, check_tensor
from rhythm_kernels.heads import sampled_layers
from rhythm_kernels.signals import GROUPS_PER, check_groups, rhythm_of
from rhythm_kernels.types import AttentionStats, GroupStats, HeadGroups, Rhythm


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
    (with `use_cache=False`, else transformers does not separate the sequences).

    Args:
        model: a transformers decoder-only model, or a wrapper of one, whatever its attention implementation. With
            "sdpa" the statistics leave out a soft-cap, as transformers does.
        layers: how many of the middle third, or a list of layer indices; see `sampled_layers`.
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
            sliding window, or no attention interface.
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
        self.decoder = _decoder(model)
        self.layers = sampled_layers(self.decoder.config.num_hidden_layers, layers)
        self._modules = {id(module) for module in self.decoder.modules()}
        self._response_mask = response_mask
        if response_mask is not None:
            check_tensor("response_mask", response_mask, ["B", "T"], [torch.bool])
        self._options = {"window": check_int("window", window, 1, MAX_WINDOW), "horizon": check_horizon(horizon)}
        self._check_grouping(groups, groups_per, local, global_)
        self._grouping = {"groups": groups, "groups_per": groups_per, "local": local, "global_": global_}
        self._backend = check_choice("backend", backend, BACKENDS)
        self._plain_masks: set[tuple[int, int | None]] = set()
        self._clock = _Clock(on_gpu=next(self.decoder.parameters()).is_cuda)
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
        self._tap = _tap_of(self.decoder)
        self._tap.add(self)
        self._hook = self.decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self._tap.remove(self)
        self._hook.remove()
        self._hook = None

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

    def _before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.layout is not None:
            raise RuntimeError("collect records one forward: open a new context for the next one")
        bound = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        bound = {**bound.pop("kwargs", {}), **bound}
        inputs = bound.get("input_ids") if bound.get("input_ids") is not None else bound.get("inputs_embeds")
        batch, tokens = inputs.shape[:2]
        mask, position_ids = bound.get("attention_mask"), bound.get("position_ids")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"collect needs attention_mask as [B, T], got {shape}")
        cu_seqlens = None
        if mask is None and position_ids is not None:
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
        if self.layout is None:
            raise RuntimeError("the attention layers were called outside of the decoder's forward")
        if k.shape[2] != q.shape[2]:
            raise ValueError(
                f"collect needs a forward over whole sequences, got {q.shape[2]} queries and {k.shape[2]} keys: "
                "call the model without past_key_values"
            )
        causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise ValueError(f"collect needs causal attention, layer {layer} is bidirectional")
        groups = self._grouping["groups"]
        with self._clock, torch.no_grad():
            q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
            options = check_options(
                q,
                k,
                scale=kwargs.get("scaling"),
                sliding_window=kwargs.get("sliding_window"),
                # transformers' sdpa function ignores the soft-cap that it is passed
                softcap=None if self._tap.name == "sdpa" else kwargs.get("softcap"),
                sinks=kwargs.get("s_aux"),
                need_span=groups is None,
                **self._options,
            )
            self._check_mask(mask, options.sliding_window, layer)
            lse, self.lse_sources[layer] = reader.lse(q, options.sinks, self.layout, returned)
            if groups is None:
                self.stats[layer] = run_stats(q, k, lse, self.layout, options, self._backend)
            else:
                local, global_ = (group[..., self.layers.index(layer), :] for group in groups)
                self.stats[layer] = run_group_stats(q, k, lse, local, global_, self.layout, options, self._backend)

    def _check_mask(self, mask, window: int | None, layer: int) -> None:
        """Raises for a mask [B, 1, T, T], bool or added to the scores, that is not the layout's within the window."""
        key = (id(mask), window)  # of all layers of a kind in a forward
        if not isinstance(mask, Tensor) or mask.ndim != 4 or key in self._plain_masks:
            return
        visible = (mask if mask.dtype == torch.bool else mask == 0).sum(-1, dtype=torch.int32)
        position = torch.arange(mask.shape[-1], device=mask.device)
        expected = position + 1 - self.layout.first[:, None]
        if window is not None:
            expected = expected.clamp(max=window)
        wrong = (visible != expected) & self.layout.rows[:, None]
        if wrong.any():
            row, head, token = wrong.nonzero()[0].tolist()
            seen, wanted = visible.expand_as(wrong)[row, head, token], expected[row, 0, token]
            raise ValueError(
                f"collect needs attention to every earlier token or in a sliding window, got layer {layer}, where "
                f"token {token} of row {row} sees {seen} tokens, not {wanted}"
            )
        self._plain_masks.add(key)


class _Tap:
    """One wrapped entry of an attention table, shared by all collectors that need it and gone with the last."""

    def __init__(self, table, name: str):
        self.table, self.name = table, name
        self.collectors: list[Collector] = []

    def add(self, collector: Collector) -> None:
        if not self.collectors:
            self.had_own = self.name in self.table._local_mapping
            self.wrapped = self.table.get(self.name)
            self.table[self.name] = self
        self.collectors.append(collector)

    def remove(self, collector: Collector) -> None:
        self.collectors.remove(collector)
        if not self.collectors:
            del self.table[self.name]
            if self.had_own:
                self.table[self.name] = self.wrapped
            del _taps[id(self.table), self.name]

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        # "eager" has no entry in the table: it is a function beside the model
        attend: Callable = self.wrapped or _modeling_file(module, "eager_attention_forward").eager_attention_forward
        collectors = [collector for collector in self.collectors if collector.wants(module)]
        if not collectors:
            return attend(module, query, key, value, attention_mask, **kwargs)
        with LseReader() as reader:
            out = attend(module, query, key, value, attention_mask, **kwargs)
        returned = out[1] if self.name == "flex_attention" else None
        for collector in collectors:
            collector.record(module, query, key, attention_mask, kwargs, reader, returned)
        return out


_taps: dict[tuple[int, str], _Tap] = {}


def _tap_of(decoder: nn.Module) -> _Tap:
    table = _modeling_file(decoder, "ALL_ATTENTION_FUNCTIONS").ALL_ATTENTION_FUNCTIONS
    name = getattr(decoder.config, "_attn_implementation", None) or "eager"
    return _taps.setdefault((id(table), name), _Tap(table, name))


def _modeling_file(module: nn.Module, attribute: str) -> ModuleType:
    """The file of the model's class, or of a class it derives from, that has this attribute."""
    for base in type(module).__mro__:
        file = sys.modules.get(base.__module__)
        if hasattr(file, attribute):
            return file
    raise ValueError(
        f"{type(module).__name__} does not use transformers' attention interface: no {attribute} beside it"
    )


def _decoder(model: nn.Module) -> nn.Module:
    """The module whose forward gets attention_mask and position_ids and calls the layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "config"):
            _modeling_file(module, "ALL_ATTENTION_FUNCTIONS")
            return module
    raise ValueError(f"model must be a transformers decoder with a list of layers, got {type(model).__name__}")


def _packed_bounds(position_ids: Tensor, batch: int) -> Tensor | None:
    """cu_seqlens int32 [S + 1] where positions restart inside a row; None if they do not."""
    restarts = torch.diff(position_ids, dim=-1) != 1
    if not restarts.any():
        return None
    if batch != 1:
        raise ValueError(f"packed sequences need a batch of one row, got B = {batch} with position_ids that restart")
    starts = restarts[0].nonzero().flatten() + 1
    ends = starts.new_tensor([position_ids.shape[1]])
    return torch.cat([starts.new_zeros(1), starts, ends]).int()


class _Clock:
    """Adds up the time inside its `with` blocks: wall time, or the stream's own time on a GPU."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
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
