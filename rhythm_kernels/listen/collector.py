"""Records the statistics of a model's forward while it runs.

A tap listens to the model's attention (`taps.py`) and passes q, k and the attention kernel's log-sum-exp of the sampled
layers to the statistics. The model's outputs keep their bits.
"""

import hashlib
import inspect
import threading

import torch
from torch import Tensor, nn

from rhythm_kernels.host import send
from rhythm_kernels.isolation import graphs_of_their_own, isolated
from rhythm_kernels.listen.backend_lse import row_pass
from rhythm_kernels.listen.findings import Findings
from rhythm_kernels.listen.masks import is_mask, window_of
from rhythm_kernels.listen.proof import check_call, hints_of, output_of, rounding_of_call
from rhythm_kernels.listen.sequences import find_sequences
from rhythm_kernels.listen.shards import Shards, check_shard
from rhythm_kernels.listen.taps import (
    NOT_WHOLE,
    Call,
    Layers,
    Tap,
    ancestors_of,
    find_decoder,
    mesh_of_heads,
    query_heads,
    state_beside_attention,
    tap_of,
)
from rhythm_kernels.ranks import HeadShards, Parallel, together
from rhythm_kernels.signals import check_groups, rhythm_of
from rhythm_kernels.statistics.api import run_group_stats, run_stats
from rhythm_kernels.statistics.layout import Layout, make_layout
from rhythm_kernels.statistics.more import check_prefix_lengths, with_more
from rhythm_kernels.statistics.options import Options, check_options
from rhythm_kernels.statistics.poison import scaled
from rhythm_kernels.statistics.verify import probe_output
from rhythm_kernels.tensor_checks import check_device, check_tensor
from rhythm_kernels.types import AttentionStats, GroupStats, HeadGroups, Rhythm

MASKED = ("eager", "sdpa")
"""Implementations that apply a sliding window only through their mask."""


class Collector:
    """Holds the statistics of one forward.

    The forward fills `stats`, `lse_sources`, `layout` and `rhythm()`.
    """

    # set by `collect`, from its arguments once they are checked
    layers: list[int]
    """The sampled layers, ascending."""
    groups: HeadGroups | None
    backend: str
    asks_for_lse: bool
    _response_mask: Tensor | None
    _cu_seqlens: Tensor | None
    _options: dict[str, object]
    """Arguments of `check_options`."""
    _more: dict[str, object]
    """Arguments of `with_more`."""
    _grouping: dict[str, object]
    """Arguments of `rhythm_of`, without the groups."""
    _lse: str
    _shards: Shards | None
    """The shards of this rank where several share the attention; None where it has whole sequences and all heads."""

    def __init__(self, model: nn.Module):
        self.stats: dict[int, AttentionStats] | dict[int, GroupStats] = {}
        """The statistics of each sampled layer: of each head, or summed over the groups where `groups` is given. Their
        field `more` has what `collect(more=...)` asked for, by name."""
        self.lse_sources: dict[int, str] = {}
        """The source of each sampled layer's log-sum-exp: the name of the model's attention operator, such as
        "aten::_scaled_dot_product_flash_attention", "flex_attention", or "row pass: " with the reason why the
        statistics computed it."""
        self.layout: Layout | None = None
        """The sequences of the forward: of the whole row where ranks have some of its tokens."""
        self._rhythm: Rhythm | None = None  # where ranks share the attention: computed at the forward's end, by all
        self._failure: Exception | None = None  # this rank's, until all ranks are told
        self._all_told = False  # whether all ranks have raised an error inside the forward
        self.findings = Findings()
        """Holds what `check()` and `seconds` read. It is small, and may be kept longer than the statistics."""
        self.decoder, self._decoder_layers = self._find_decoder(model)
        self._places: dict[int, list[int]] = {}  # by the id of a module: its layers, in the order of its calls
        for layer, module in self._decoder_layers.attention.items():
            self._places.setdefault(id(module), []).append(layer)
        # a module around the decoder with another configuration may build the decoder's masks from its own [B, T] mask
        outer = ancestors_of(self.decoder, model)
        self._outer = [module for module in outer if getattr(module, "config", None) is not self.decoder.config]
        # by the id of a mask; the mask is kept too, so that no other gets its id
        self._windows: dict[int, tuple[object, int | None]] = {}
        self._hooks: list = []

    def __enter__(self) -> "Collector":
        if self._hooks:
            raise RuntimeError("this collect context is open already")
        self._thread, self._calls, self._outer_mask = threading.get_ident(), None, ...
        self._tap = self._find_tap()
        self._tap.add(self)
        self._hooks = [
            *(module.register_forward_pre_hook(self._before_outer, with_kwargs=True) for module in self._outer),
            self.decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_forward, always_call=True),
        ]
        self._graphs = graphs_of_their_own()
        self._graphs.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._graphs.__exit__(None, None, None)
        self._tap.remove(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._windows.clear()

    @property
    def seconds(self) -> float:
        """Seconds spent on the statistics of this forward, including their check; waits for a GPU."""
        return self.findings.seconds

    @property
    def check_seconds(self) -> float:
        """The part of `seconds` spent on checking the layers' outputs; waits for a GPU."""
        return self.findings.check_seconds

    def rhythm(self) -> Rhythm:
        """Returns the means over the groups: Rhythm(waad [B, T], fai [B, T], spans, groups).

        The host does not wait for a GPU: there they are NaN if a layer does not attend as its statistics assume, and
        `check()` says which layer and why.

        Raises:
            RuntimeError: no forward has finished, or it did not call the attention of a sampled layer.
        """
        missing = [layer for layer in self.layers if layer not in self.stats]
        if missing:
            ran = self.layout is not None
            why = "the forward did not call their attention, or failed" if ran else "no forward ran inside the context"
            raise RuntimeError(f"no statistics of layers {missing}: {why}")
        if self._rhythm is not None:
            return self._rhythm
        with self.findings.clock, isolated(self.layout.rows.device):
            return rhythm_of(self.stats, self.layout, groups=self.groups, **self._grouping)

    @property
    def own_tokens(self) -> Tensor | None:
        """The place in the whole row of each token that this rank has, [T of this rank] int64; None before a forward.

        `gamma[:, c.own_tokens]` are the factors of this rank's tokens.
        """
        if self.layout is None:
            return None
        own = None if self._shards is None else self._shards.own_tokens
        return torch.arange(self.layout.rows.shape[1], device=self.layout.rows.device) if own is None else own

    def check(self) -> None:
        """Raises if a layer's output or log-sum-exp is not that of the map that its statistics assume.

        On a CPU the forward itself raises this error. On a GPU the host does not wait for the forward: call `check`.

        Raises:
            ValueError: names the layer, the token, the head and both values.
        """
        self.findings.check()

    # ---- what is listened to: another kind of model overrides these --------------------------------------------------

    def _find_decoder(self, model: nn.Module) -> tuple[nn.Module, Layers]:
        """Returns the module whose forward calls the layers, and its layers."""
        return find_decoder(model)

    def _find_tap(self) -> Tap:
        """Returns what passes the attention calls of the decoder on."""
        return tap_of(self.decoder)

    def _find_parallel(self) -> Parallel | None:
        """Returns the ranks that share the attention, as far as the model shows them; None for one rank."""
        mesh = mesh_of_heads(self._decoder_layers)
        return None if mesh is None else Parallel(heads=mesh)

    def _query_heads(self) -> object:
        """Returns the number of query heads of the decoder's layers."""
        return query_heads(self.decoder)

    def _read_arguments(self, args: tuple, kwargs: dict) -> dict:
        """Returns the arguments of the decoder's forward under the names that a transformers decoder gives them."""
        return _arguments_of(self.decoder, args, kwargs)

    # ---- around the forward ------------------------------------------------------------------------------------------

    def _is_mine(self) -> bool:
        """Returns whether this is the thread that opened the context, in a forward and not in its recomputation."""
        return threading.get_ident() == self._thread and torch._C._current_graph_task_id() == -1

    def __deepcopy__(self, memo) -> "Collector":
        return self  # a model that is copied inside the context copies its hooks, which ignore the copy

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _before_outer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = _arguments_of(module, args, kwargs)
        if self._is_mine() and "attention_mask" in {*arguments, *inspect.signature(module.forward).parameters}:
            self._outer_mask = arguments.get("attention_mask")

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._is_mine() or decoder is not self.decoder:
            return
        with together(self._shards.groups if self._shards else ()) as facts:
            if self.layout is not None:
                raise RuntimeError(
                    "collect records one forward: open a new context for the next one. generate runs one for each "
                    "token: read its text in a forward of its own"
                )
            arguments = self._read_arguments(args, kwargs)
            _check_cache(arguments.get("past_key_values"))
            ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
            inputs = embeddings if ids is None else ids
            if not isinstance(inputs, Tensor):
                raise ValueError(f"the model needs input_ids or inputs_embeds, got neither among {[*arguments]}")
            check_device("the model's inputs", inputs.device)
            facts |= {"the batch's rows": len(inputs), "layers": self.layers, "options": self._options | self._grouping}
            facts |= {"more": (self._more["more"], self._more["first_keys"])}
            facts["groups"] = None if self._shards is None else digest_of(*(self.groups or ()))
            facts |= {name: _form_of(value) for name, value in self._values_of_tokens(arguments).items()}
        with isolated(inputs.device):
            self._prepare(arguments, inputs)

    def _prepare(self, arguments: dict, inputs: Tensor) -> None:
        """Reads where the sequences of a forward begin and end, and moves the groups to its device.

        Args:
            arguments: the arguments of the decoder's forward, by name.
            inputs: the token ids or the embeddings, [B, T, ...].
        """
        self.findings.clock.device = self.findings.check_clock.device = inputs.device
        batch, tokens = inputs.shape[:2]
        if self._shards is None:
            sharding = self._tap.sharding()
            if sharding is not None:
                raise ValueError(
                    f"collect needs whole sequences, but {sharding} computes attention over shards of them here: "
                    "name the ranks that share them by parallel=Parallel(tokens=group)"
                )
            self._find_layout(arguments, batch, tokens, inputs.device)
            self._shard = tokens, inputs.device
            return
        whole, values = self._shards.whole_row(tokens, self._values_of_tokens(arguments), self._cu_seqlens)
        self._outer_mask = self._outer_mask if values["outer mask"] is None else values["outer mask"]
        self._response_mask = values["response_mask"]
        with together(self._shards.groups) as facts:
            given = {name: x for name, x in values.items() if x is not None}
            self._find_layout(arguments | given, batch, whole, inputs.device)
            facts |= {"tokens": whole, "sequences": self.layout.bounds, "response_mask": digest_of(self.layout.rows)}
        self._shard = tokens, inputs.device

    def _values_of_tokens(self, arguments: dict) -> dict[str, Tensor | None]:
        """Returns the tensors that have a value for each token, by name; None for what is none."""
        values = {name: arguments.get(name) for name in ("position_ids", "attention_mask")}
        values |= {"outer mask": self._outer_mask, "response_mask": self._response_mask}
        return {name: value if isinstance(value, Tensor) else None for name, value in values.items()}

    def _find_layout(self, arguments: dict, batch: int, tokens: int, device: torch.device) -> None:
        mask, cu_seqlens = find_sequences(arguments, batch, self._outer_mask, self._cu_seqlens)
        if self._response_mask is not None:
            check_tensor("response_mask", self._response_mask, [batch, tokens], [torch.bool], device)
        layout = make_layout(batch, tokens, device, self._response_mask, mask, cu_seqlens)
        state = state_beside_attention(self.decoder, self._decoder_layers)
        if state is not None and layout.sequences > batch:
            raise ValueError(
                f"collect needs a padded batch for {type(self.decoder).__name__}, got {layout.sequences} sequences "
                f"packed in one row: {state}, and it goes from one sequence into the next"
            )
        if self.groups is not None:
            check_groups(self.groups, len(self.layers), self._query_heads(), layout.sequences)
            self.groups = HeadGroups(*(send(group, device) for group in self.groups))
        self._more["prefix_lengths"] = check_prefix_lengths(self._more["prefix_lengths"], layout)
        self.layout, self._calls = layout, {}

    @torch.compiler.disable(reason=NOT_WHOLE)
    def _after_forward(self, decoder: nn.Module, args: tuple, output: object) -> None:
        if not self._is_mine() or decoder is not self.decoder:
            return
        self._calls = None  # a backward pass or another model may call a layer again
        poison = self.findings.poison()
        if poison is not None:
            with self.findings.clock, isolated(poison.device):
                self.stats = dict(zip(self.stats, scaled(list(self.stats.values()), poison), strict=True))
        # a forward that failed says so itself: the other ranks may still be in the model, which this one has left
        if self._shards is not None and not self._all_told and output is not None:
            with self.findings.clock, isolated(self.layout.rows.device):
                self._finish()

    def _finish(self) -> None:
        """Makes the rhythm of the heads of all ranks, which all call it once."""
        self._settle()
        if sorted(self.stats) == self.layers:  # else `rhythm` says which are missing
            groups, heads = self.groups, self._shards.heads
            self._rhythm = rhythm_of(self.stats, self.layout, groups=groups, heads=heads, **self._grouping)

    def _settle(self) -> None:
        """Raises an error of this forward on all ranks, and makes sums over known groups of the heads of all ranks."""
        with together(self._shards.groups) as facts:
            if self._failure is not None:
                raise self._failure
            facts["layers whose attention was called"] = sorted(self.stats)
        for ranks in self._shards.groups:  # each group hears what the one before has told
            self.findings.tell(ranks, self.layout.rows.device)
        if self.groups is not None and self.stats:
            self.stats = _total(self.stats, self._shards.heads)

    def layer_of(self, module: nn.Module) -> int | None:
        """Returns which sampled layer this call of an attention module is; None for others, and outside the forward."""
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

    def record(self, layer: int, call: Call | None) -> None:
        """Computes the statistics of a layer from a call of its attention function, and checks the call's output.

        Where ranks share the attention, call may be None: `_failure` then has this rank's error, which all will raise.
        """
        shards = self._shards
        with self.findings.clock:
            if shards is None:
                check_call(layer, call, *self._shard, self._query_heads())
                self._record(layer, call, output_of(call))
                return
            if shards.of_tokens or shards.heads is None:
                try:
                    with isolated(self.layout.rows.device):
                        self._agree_on(layer, call)
                except Exception:
                    self._all_told = True  # all ranks raise, and leave the forward here
                    raise
            if self._failure is None:
                # an error is kept until the ranks tell each other: others wait for this one in the model
                try:
                    check_call(layer, call, *self._shard, shards.call_heads)
                    self._record(layer, *shards.turned(call, output_of(call)))
                except Exception as error:
                    self._failure = error

    def _agree_on(self, layer: int, call: Call | None) -> None:
        """Raises on all ranks if one cannot go on, or attends otherwise; then finds the heads of each."""
        shards = self._shards
        with together(shards.groups) as facts:
            if self._failure is not None:
                raise self._failure
            check_call(layer, call, *self._shard, shards.call_heads)
            if shards.of_tokens:
                check_shard(layer, call)
            facts |= {
                "layer": layer,
                "dtype": call.query.dtype,
                "sizes of heads": (call.key.shape[3], call.value.shape[3]),
            }
            facts |= {name: call.kwargs.get(name) for name in ("scaling", "sliding_window", "softcap", "dropout")}
        if shards.heads is None:
            shards.count_heads(call.query.shape[1], self._query_heads())

    def _record(self, layer: int, call: Call, out: Tensor) -> None:
        """Does the work of `record` for a call whose heads have all tokens; out: its output, [B, T, HQ, Dv]."""
        if call.query.shape[1] == 0:  # there are more ranks than heads
            self.stats[layer] = self._nothing(call.query)
            return
        rounding = rounding_of_call(call)
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
                need_span=self.groups is None,
                **self._options,
            )
            options = with_more(options, layout=self.layout, **self._more)
            lse, self.lse_sources[layer] = self._lse_of(call, q, options)
            with self.findings.check_clock:
                inputs = q, k, call.value, out, lse, self.layout, options, rounding, self.backend
                probed = probe_output(*inputs, brief=True)
                self.findings.add(layer, probed, hints_of(call, self.layout))
            self.stats[layer] = self.measure(layer, q, k, lse, options)

    def _nothing(self, q: Tensor) -> AttentionStats | GroupStats:
        """Returns the statistics of no heads."""
        none = q.new_zeros(*q.shape[:3], dtype=torch.float32)  # [B, 0, T]
        more = dict.fromkeys(self._more["more"], none)
        if self.groups is None:
            return AttentionStats(none, none, none.new_zeros(self.layout.sequences, 0), none, more)
        return GroupStats(none.sum(1), none.sum(1), {name: none.sum(1) for name in more})

    def _lse_of(self, call: Call, q: Tensor, options: Options) -> tuple[Tensor | None, str]:
        """Returns the log-sum-exp of a call, [B, HQ, T] fp32, and its source; None where the statistics compute it."""
        if self._lse == "own":
            return None, row_pass('lse="own"')
        if self._shards is not None and self._shards.of_tokens:
            return None, row_pass("each rank has some tokens")
        return call.reader.lse(q, options.sinks, self.layout, call.beside)

    def measure(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, options: Options
    ) -> AttentionStats | GroupStats:
        """Returns what `stats` keeps of a layer.

        Args:
            q, k: [B, HQ, T, D] and [B, H, T, D].
            lse: [B, HQ, T] fp32 where the model computed it, else None.
        """
        if self.groups is None:
            return run_stats(q, k, lse, self.layout, options, self.backend)
        local_heads, global_heads = (group[..., self.layers.index(layer), :] for group in self.groups)
        if self._shards is not None:
            local_heads, global_heads = map(self._shards.heads.own_heads, (local_heads, global_heads))
        return run_group_stats(q, k, lse, local_heads, global_heads, self.layout, options, self.backend)

    def _window(self, mask, given: int | None, layer: int) -> int | None:
        """Returns a layer's sliding window in tokens: its mask's, or `given` if it has no mask."""
        if not is_mask(mask):
            return None if self._tap.name in MASKED else given
        if id(mask) not in self._windows:  # all layers of a kind share one mask in a forward
            self._windows[id(mask)] = mask, window_of(mask, self.layout, layer)
        return self._windows[id(mask)][1]


def _check_cache(cache: object) -> None:
    """Raises ValueError if a forward continues a cache. A length that only a GPU knows shows at the attention calls."""
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    if isinstance(length, int) and length > 0:
        raise ValueError(
            f"collect needs a forward over whole sequences, got past_key_values of {length} tokens: run one over "
            "prompt and answer without a cache (prefix tuning always passes one)"
        )


def _arguments_of(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Returns the arguments of a module's forward by name."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**bound.pop("kwargs", {}), **bound}


def _form_of(value: Tensor | None) -> str:
    """Returns what must be the same of a tensor on ranks that hold some of its tokens."""
    return "None" if value is None else f"{value.dtype} {[*value.shape[:-1], 'T']}"


def digest_of(*tensors: Tensor) -> str:
    """Returns a text that differs where values differ, by which ranks compare them; waits for a GPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _total(stats: dict[int, GroupStats], heads: HeadShards) -> dict[int, GroupStats]:
    """Returns the sums over the groups' heads of all ranks, from the sums over those of this rank."""
    layers = [torch.stack([*layer[:2], *layer.more.values()]) for layer in stats.values()]
    totals = heads.total(torch.stack(layers)).unbind(0)
    return {
        layer: GroupStats(total[0], total[1], dict(zip(own.more, total[2:], strict=True)))
        for (layer, own), total in zip(stats.items(), totals, strict=True)
    }
