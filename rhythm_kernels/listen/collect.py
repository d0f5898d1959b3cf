"""Records attention statistics inside a transformers model's own forward.

While a `collect` context is open, a tap listens to the attention of its model (`taps.py`): it hands q, k and the
attention kernel's own log-sum-exp of the sampled layers to the statistics. The model's outputs keep their bits.
"""

import inspect
import threading
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rhythm_kernels.checks import check_choice, check_float, check_horizon, check_int
from rhythm_kernels.heads import sampled_layers
from rhythm_kernels.host import send
from rhythm_kernels.isolation import isolated, lowest_precision
from rhythm_kernels.listen.backend_lse import row_pass
from rhythm_kernels.listen.findings import Findings
from rhythm_kernels.listen.masks import is_mask, packing_hint, window_of
from rhythm_kernels.listen.sequences import find_sequences
from rhythm_kernels.listen.taps import (
    NOT_WHOLE,
    Call,
    Layers,
    ancestors_of,
    decoder_of,
    is_of_encoder_decoder,
    is_tensor_parallel,
    layers_of,
    tap_of,
)
from rhythm_kernels.options import GROUP_BY, MAX_WINDOW
from rhythm_kernels.signals import check_groups, rhythm_of
from rhythm_kernels.statistics.api import BACKENDS, run_group_stats, run_stats
from rhythm_kernels.statistics.layout import Layout, make_layout
from rhythm_kernels.statistics.options import Options, check_options
from rhythm_kernels.statistics.poison import scaled
from rhythm_kernels.statistics.probes import Rounding, rounding_of
from rhythm_kernels.statistics.verify import probe_output
from rhythm_kernels.tensor_checks import check_cu_seqlens, check_device, check_tensor
from rhythm_kernels.types import AttentionStats, GroupStats, HeadGroups, Rhythm

MASKED = ("eager", "sdpa")
"""Implementations that know of a sliding window by their mask alone."""
UNKNOWN = ("position_bias", "indices", "block_indices")
"""Arguments of attention functions that change a map in a way that the statistics do not follow."""
LSE = ("auto", "model", "own")
"""The choices of the log-sum-exp that the statistics take: see `collect`."""


def collect(
    model: nn.Module,
    *,
    layers: int | str | Sequence[int] = 5,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    groups: HeadGroups | None = None,
    group_by: str = "sequence",
    local_fraction: float = 0.3,
    global_fraction: float = 0.3,
    backend: str = "auto",
    lse: str = "auto",
) -> "Collector":
    """A context that records the attention statistics of one forward of `model`.

        with collect(model, response_mask=mask) as c:
            logits = model(input_ids, attention_mask=attention_mask).logits
        rhythm = c.rhythm()  # waad [B, T], fai [B, T]

    Padding is taken from the forward's `attention_mask` [B, T], packing (B = 1) from `cu_seq_lens_q` or from
    `position_ids` that restart. A GPU is waited for once to read them, and not at all with `cu_seqlens`.

    The map that they describe is checked: for a few rows of each sequence it must give the output that the layer's
    attention returned (`attention/verify.py`). So packed rows that a model does not keep apart are refused, as
    transformers' sdpa and eager attention do not beside an attention_mask or a key-value cache.

    Statistics are those of the map before dropout. A context belongs to the thread that opened it. The model's outputs
    keep their bits, but for `lse="model"`; under torch.compile the model is compiled in other pieces while a context is
    open, which may move the last ones.

    Args:
        model: a transformers decoder, alone, in an encoder-decoder or in a model of images, or a wrapper of one (PEFT,
            DDP, FSDP, torch.compile without fullgraph=True), whatever its attention implementation. With "sdpa" the
            statistics leave out soft-capping and sinks, as transformers does.
        layers: how many of the middle third, "all", or a list of layer indices in the order in which layers run; see
            `sampled_layers`. Of a hybrid only its softmax layers are counted, which a warning says.
        window, horizon: W of WAAD and (lo, hi) of FAI, tokens.
        response_mask: [B, T] bool, R; every valid token if None.
        cu_seqlens: [S + 1] int32 or int64 on the CPU, bounds of the packed sequences of the forward, where they are
            known: then its own arguments are not read for them, and a GPU is not waited for.
        groups: head groups of an earlier batch, [L, HQ] or, for each sequence of this one, [B, L, HQ], on any device.
            Then spans are not computed and heads outside the groups are skipped.
        group_by: "sequence": head groups from each sequence's own spans (the paper's reading); "batch": from the
            spans over the whole batch.
        local_fraction, global_fraction: fractions of local and global heads.
        backend: of `attention_stats`.
        lse: whose log-sum-exp the statistics take; `Collector.lse_sources` says which it was. "auto": that of the
            model's own attention kernel where the model's output keeps its bits then, else the statistics compute it
            in a row pass. "model": that of cuDNN too, which without gradients is another execution plan: faster
            statistics, and outputs that may differ in their last bits. "own": always a row pass.

    Raises:
        TypeError, ValueError: wrong arguments, or a forward that cannot be collected from: with a key-value cache, a
            4-D mask, groups for another number of sequences, a layer whose output is not that of the map that its
            arguments describe (on a GPU, which is not waited for, its statistics are NaN, and `Collector.check()`
            raises), shards of sequences or of heads, no attention interface, a device without float64.
        RuntimeError: a second forward in one context.
    """
    return Collector(
        model,
        layers=layers,
        window=window,
        horizon=horizon,
        response_mask=response_mask,
        cu_seqlens=cu_seqlens,
        groups=groups,
        group_by=group_by,
        local_fraction=local_fraction,
        global_fraction=global_fraction,
        backend=backend,
        lse=lse,
    )


class Collector:
    """What `collect` returns; `stats`, `lse_sources`, `layout` and `rhythm()` are filled by the forward."""

    def __init__(
        self,
        model,
        *,
        layers=5,
        window=10,
        horizon=(10, 50),
        response_mask=None,
        cu_seqlens=None,
        groups=None,
        group_by="sequence",
        local_fraction=0.3,
        global_fraction=0.3,
        backend="auto",
        lse="auto",
    ):
        self.stats: dict[int, AttentionStats] | dict[int, GroupStats] = {}
        """The statistics of each sampled layer: of each head, or summed over the groups where `groups` is given."""
        self.lse_sources: dict[int, str] = {}
        """Where each sampled layer's log-sum-exp comes from: the name of the model's attention operator, such as
        "aten::_scaled_dot_product_flash_attention", "flex_attention", or "row pass: " with the reason why the
        statistics computed it."""
        self.layout: Layout | None = None
        self.findings = Findings()
        """Holds what `check()` and `seconds` read. It is small, and may be kept longer than the statistics."""
        self.decoder = decoder_of(model)
        every = layers_of(self.decoder)
        self.layers = _chosen_layers(self.decoder, every, layers)
        self._places: dict[int, list[int]] = {}  # by the id of a module: its layers, in the order of its calls
        for layer, module in every.attention.items():
            self._places.setdefault(id(module), []).append(layer)
        # what stands around a decoder of another configuration may make its masks, from the [B, T] one
        outer = ancestors_of(self.decoder, model)
        self._outer = [module for module in outer if getattr(module, "config", None) is not self.decoder.config]
        self._response_mask = response_mask
        if response_mask is not None:
            check_tensor("response_mask", response_mask, ["B", "T"], [torch.bool])
        self._cu_seqlens = cu_seqlens
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, 1, "T", torch.device("cpu"))
        self._options = {"window": check_int("window", window, 1, MAX_WINDOW), "horizon": check_horizon(horizon)}
        self._check_grouping(groups, group_by, local_fraction, global_fraction)
        self._grouping = {
            "groups": groups,
            "group_by": group_by,
            "local_fraction": local_fraction,
            "global_fraction": global_fraction,
        }
        self._backend = check_choice("backend", backend, BACKENDS)
        self._lse = check_choice("lse", lse, LSE)
        self.asks_for_lse = lse == "model"
        self._windows: dict[int, tuple[object, int | None]] = {}  # by the id of a mask, which is kept, and so its id
        self._hooks: list = []

    def _check_grouping(self, groups, group_by, local_fraction, global_fraction) -> None:
        check_choice("group_by", group_by, GROUP_BY)
        check_float("local_fraction", local_fraction, 0.0, 1.0)
        check_float("global_fraction", global_fraction, 0.0, 1.0)
        if groups is not None:
            sequences = groups[0].shape[0] if isinstance(groups, HeadGroups) else 0
            check_groups(groups, len(self.layers), query_heads(self.decoder), sequences)

    def __enter__(self) -> "Collector":
        if self._hooks:
            raise RuntimeError("this collect context is open already")
        self._thread, self._calls, self._mask_outside = threading.get_ident(), None, ...
        self._tap = tap_of(self.decoder)
        self._tap.add(self)
        self._hooks = [
            *(module.register_forward_pre_hook(self._before_outer, with_kwargs=True) for module in self._outer),
            self.decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_forward, always_call=True),
        ]
        return self

    def __exit__(self, *_) -> None:
        self._tap.remove(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._windows.clear()

    @property
    def seconds(self) -> float:
        """Time spent in the statistics of this forward, their check included; on a GPU this waits for them."""
        return self.findings.seconds

    @property
    def check_seconds(self) -> float:
        """The part of `seconds` in which the layers' outputs were checked; on a GPU this waits for it."""
        return self.findings.check_seconds

    def rhythm(self) -> Rhythm:
        """The group means: Rhythm(waad [B, T], fai [B, T], spans, groups). Needs a finished forward.

        On a GPU, which is not waited for, statistics are NaN where a layer does not attend as they assume: `check()`
        says which and why.
        """
        missing = [layer for layer in self.layers if layer not in self.stats]
        if missing:
            why = (
                "no forward ran inside the context"
                if not self.stats
                else "the forward did not call their attention, or failed"
            )
            raise RuntimeError(f"no statistics of layers {missing}: {why}")
        with self.findings.clock, isolated(self.layout.rows.device):
            return rhythm_of(self.stats, self.layout, **self._grouping)

    def check(self) -> None:
        """Raises where a layer's output, or its log-sum-exp, is not that of the map that its statistics are of.

        On a CPU the forward itself has raised. On a GPU, which the forward does not wait for, this does.

        Raises:
            ValueError: with the layer, the token, the head and both values.
        """
        self.findings.check()

    # ---- around the forward ------------------------------------------------------------------------------------------

    def _is_mine(self) -> bool:
        """Whether this is a forward of the thread that opened the context, and no recomputation for a gradient."""
        return threading.get_ident() == self._thread and torch._C._current_graph_task_id() == -1

    def __deepcopy__(self, memo) -> "Collector":
        return self  # the hooks of a model that is copied inside the context; they ignore the copy

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _before_outer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = _bound(module, args, kwargs)
        if self._is_mine() and "attention_mask" in {*bound, *inspect.signature(module.forward).parameters}:
            self._mask_outside = bound.get("attention_mask")

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._is_mine() or decoder is not self.decoder:
            return
        if self.layout is not None:
            raise RuntimeError("collect records one forward: open a new context for the next one")
        bound = _bound(decoder, args, kwargs)
        inputs = bound.get("input_ids") if bound.get("input_ids") is not None else bound.get("inputs_embeds")
        check_device("the model's inputs", inputs.device)
        with isolated(inputs.device):
            self._prepare(bound, inputs)

    def _prepare(self, bound: dict, inputs: Tensor) -> None:
        """Finds out where the sequences of a forward begin and end."""
        self.findings.clock.on_gpu = self.findings.check_clock.on_gpu = inputs.is_cuda
        batch, tokens = inputs.shape[:2]
        sharding = self._tap.sharding()
        if sharding is not None:
            raise ValueError(
                f"collect needs whole sequences, but {sharding} computes attention over shards of them here: "
                "switch sequence parallelism off"
            )
        mask, cu_seqlens = find_sequences(bound, batch, self._mask_outside, self._cu_seqlens)
        response_mask = self._response_mask
        if response_mask is not None:
            check_tensor("response_mask", response_mask, [batch, tokens], [torch.bool], inputs.device)
        layout = make_layout(batch, tokens, inputs.device, response_mask, mask, cu_seqlens)
        groups = self._grouping["groups"]
        if groups is not None:
            check_groups(groups, len(self.layers), query_heads(self.decoder), layout.sequences)
            self._grouping["groups"] = HeadGroups(*(send(group, inputs.device) for group in groups))
        self.layout, self._calls = layout, {}

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _after_forward(self, decoder: nn.Module, *_) -> None:
        if not self._is_mine() or decoder is not self.decoder:
            return
        self._calls = None  # a layer may be called again: by a backward pass, by another model
        poison = self.findings.poison()
        if poison is not None:
            with self.findings.clock, isolated(poison.device):
                self.stats = dict(zip(self.stats, scaled(list(self.stats.values()), poison), strict=True))

    def layer_of(self, module: nn.Module) -> int | None:
        """The sampled layer that this call of an attention module is; None for others, and outside of the forward."""
        places = self._places.get(id(module))
        if places is None or not self._is_mine() or self._calls is None:
            return None
        call = self._calls[id(module)] = self._calls.get(id(module), -1) + 1
        if call == len(places):
            raise ValueError(
                f"collect needs layers that run as often as they stand in the decoder, got call {call + 1} of the "
                f"attention of layer {places[-1]}: which of its maps is the layer's is not known"
            )
        return places[call] if places[call] in self.layers else None

    # ---- one layer ---------------------------------------------------------------------------------------------------

    def record(self, layer: int, call: Call) -> None:
        """Takes the statistics of a layer from what its attention function was given, has read and returned."""
        self._check_call(layer, call)
        with self.findings.clock:
            rounding = _rounding(call)
            out = call.out
            if call.kwargs.get("dropout"):  # which makes the output random; the map is the one before it
                with torch.no_grad():
                    out = call.attend(**call.kwargs | {"dropout": 0.0})[0]
            with isolated(call.query.device):
                q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.query, call.key))
                options = check_options(
                    q,
                    k,
                    scale=call.kwargs.get("scaling"),
                    sliding_window=self._window(call.mask, call.kwargs.get("sliding_window"), layer),
                    # transformers' sdpa function ignores the soft-cap and the sinks that it is passed
                    softcap=None if self._tap.name == "sdpa" else call.kwargs.get("softcap"),
                    sinks=None if self._tap.name == "sdpa" else call.kwargs.get("s_aux"),
                    need_span=self._grouping["groups"] is None,
                    **self._options,
                )
                lse, self.lse_sources[layer] = self._lse_of(call, q, options)
                with self.findings.check_clock:
                    found = probe_output(q, k, call.value, out, lse, self.layout, options, rounding, self._backend)
                    self.findings.add(layer, found, _hints(self.layout, call))
                self.stats[layer] = self.measure(layer, q, k, lse, options)

    def _lse_of(self, call: Call, q: Tensor, options: Options) -> tuple[Tensor | None, str]:
        """The log-sum-exp of a call, [B, HQ, T] fp32, None where the statistics are to compute it; and its source."""
        if self._lse == "own":
            return None, row_pass('lse="own"')
        return call.reader.lse(q, options.sinks, self.layout, call.beside)

    def measure(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, options: Options
    ) -> AttentionStats | GroupStats:
        """What is kept of a layer: q [B, HQ, T, D], k [B, H, T, D], lse [B, HQ, T] fp32 where the model computed it."""
        groups = self._grouping["groups"]
        if groups is None:
            return run_stats(q, k, lse, self.layout, options, self._backend)
        local_heads, global_heads = (group[..., self.layers.index(layer), :] for group in groups)
        return run_group_stats(q, k, lse, local_heads, global_heads, self.layout, options, self._backend)

    def _check_call(self, layer: int, call: Call) -> None:
        """Raises for a call of other shapes than the statistics know."""
        q, k, v = call.query, call.key, call.value
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
        heads = query_heads(self.decoder)
        if isinstance(heads, int) and q.shape[1] != heads:
            sharded = is_tensor_parallel(call.module)
            why = "layers of several sizes, and heads that another rank holds," if not sharded else "shards of heads"
            raise ValueError(
                f"collect needs layers with the model's {heads} query heads, got {q.shape[1]} in layer {layer}: "
                f"{why} cannot be collected"
            )
        expected = [q.shape[0], q.shape[2], q.shape[1], v.shape[3]]
        if v.shape[:3] != k.shape[:3] or list(call.out.shape) != expected:
            raise ValueError(
                f"collect checks what attention returns, [B, T, HQ, Dv] = {expected} in layer {layer} for q "
                f"{list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}, got {list(call.out.shape)}"
            )

    def _window(self, mask, given: int | None, layer: int) -> int | None:
        """The sliding window that a layer really has: that of its mask, or what a function without one is given."""
        if not is_mask(mask):
            return None if self._tap.name in MASKED else given
        if id(mask) not in self._windows:  # of all layers of a kind in a forward
            self._windows[id(mask)] = mask, window_of(mask, self.layout, layer)
        return self._windows[id(mask)][1]


def query_heads(decoder: nn.Module) -> int:
    """Returns the number of query heads of a decoder's layers."""
    config = decoder.config
    if is_of_encoder_decoder(config) and hasattr(config, "decoder_attention_heads"):
        return config.decoder_attention_heads
    return config.num_attention_heads


def _bound(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of a module's forward by name."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**bound.pop("kwargs", {}), **bound}


def _chosen_layers(decoder: nn.Module, every: Layers, layers: int | str | Sequence[int]) -> list[int]:
    """`sampled_layers` among the softmax layers of a decoder."""
    softmax = list(every.attention)
    if not isinstance(layers, (int, str)):
        chosen = sampled_layers(every.count, layers)
        without = sorted(set(chosen) - set(softmax))
        if without:
            raise ValueError(
                f"layers must be layers with causal softmax attention, {softmax} of this model, got {without}"
            )
        return chosen
    if not softmax:
        raise ValueError(f"model must have layers with causal softmax attention, {type(decoder).__name__} has none")
    chosen = [softmax[index] for index in sampled_layers(len(softmax), layers)]
    if len(softmax) < every.count:
        warnings.warn(
            f"{type(decoder).__name__} is a hybrid: only {len(softmax)} of its {every.count} layers have a causal "
            f"attention map; statistics come from layers {chosen}",
            stacklevel=4,
        )
    return chosen


# ---- what a call's output proves -------------------------------------------------------------------------------------


def _rounding(call: Call) -> Rounding:
    """How coarsely a call computed, in the settings that it ran under."""
    device, dtype = call.query.device.type, call.query.dtype
    used = [dtype, call.out.dtype, *call.reader.dtypes]
    if torch.is_autocast_enabled(device):
        used.append(torch.get_autocast_dtype(device))
    if dtype == torch.float32:
        used += {"bf16": [torch.bfloat16], "tf32": [torch.float16]}.get(
            lowest_precision(device), []
        )  # 11 bits, as TF32
    coarsest = max(used, key=lambda each: torch.finfo(each).eps)
    fused = bool(call.reader.dtypes) or call.beside is not None
    return rounding_of(dtype, lowered=coarsest, fused=fused, softcap=call.kwargs.get("softcap") is not None)


def _hints(layout: Layout, call: Call) -> str:
    """Returns sentences that name what is unusual about a call."""
    hints = []
    if call.mask is None and any(begin or end < layout.rows.shape[1] for _, begin, end in layout.bounds):
        if layout.sequences == len(layout.rows):
            hints.append("There is padding, but the attention function was given no mask.")
    causal = call.kwargs.get("is_causal")
    if not (getattr(call.module, "is_causal", True) if causal is None else causal):
        hints.append("The layer is not causal.")
    named = [name for name in UNKNOWN if call.kwargs.get(name) is not None]
    if named:
        hints.append(f"Its attention function was given {', '.join(named)}, which the statistics do not know of.")
    return "".join(f" {hint}" for hint in hints) + packing_hint(layout)
