"""Opens a context that records attention statistics inside a transformers model's forward."""

import warnings
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from rhythm_kernels.checks import check_choice, check_float, check_horizon, check_int, check_span_rows
from rhythm_kernels.heads import sampled_layers
from rhythm_kernels.listen.collector import Collector
from rhythm_kernels.listen.shards import Shards
from rhythm_kernels.listen.taps import Layers
from rhythm_kernels.options import GROUP_BY, MAX_WINDOW, SPAN_ROWS
from rhythm_kernels.ranks import Parallel, check_parallel, together
from rhythm_kernels.signals import check_groups
from rhythm_kernels.statistics.backends import BACKENDS
from rhythm_kernels.statistics.more import check_more
from rhythm_kernels.tensor_checks import check_cu_seqlens, check_tensor
from rhythm_kernels.types import HeadGroups

LSE = ("auto", "model", "own")
"""The choices of whose log-sum-exp the statistics use."""


class collect(Collector):  # called like a function, and named like one
    """Opens a context that records the attention statistics of one forward of `model`.

        with collect(model, response_mask=mask) as c:
            logits = model(input_ids, attention_mask=attention_mask).logits
        rhythm = c.rhythm()  # waad [B, T], fai [B, T]

    Padding is read from the forward's `attention_mask` [B, T], packing (B = 1) from `cu_seq_lens_q` or from
    `position_ids` that restart. The host waits for a GPU once to read them, and not at all with `cu_seqlens`.

    The map that these arguments describe is checked: for a few rows of each sequence it must give the output that the
    layer's attention returned (`statistics/verify.py`). This refuses packed sequences that the model mixes. The sdpa
    and eager attention of transformers mixes them where it gets an attention_mask or a key-value cache.

    Statistics are those of the map before dropout. A context belongs to the thread that opened it. The model's outputs
    keep their bits, except with `lse="model"`. With torch.compile an open context splits the model
    into other graphs, which may change the last bits.

    Args:
        model: a transformers decoder, alone, in an encoder-decoder or in a model of images, or a wrapper of one (PEFT,
            DDP, FSDP, torch.compile without fullgraph=True), with any attention implementation. With "sdpa" the
            statistics leave out soft-capping and sinks, as transformers does.
        layers: how many of the middle third, "all", or a list of layer indices in the order in which layers run; see
            `sampled_layers`. In a hybrid only softmax layers count, and a warning says so.
        window, horizon: W of WAAD and (lo, hi) of FAI, tokens.
        response_mask: [B, T] bool, R; every valid token if None.
        cu_seqlens: [S + 1] int32 or int64 on the CPU, bounds of the packed sequences of the forward, if the caller
            knows them. They are then not read from the forward's arguments, and the host does not wait for a GPU.
        span_rows: as in `attention_stats`: the spans, which only rank heads, are read from at most so many rows of R in
            each sequence; None for all of them. Without a log-sum-exp of the model (`lse_sources`) it saves nothing.
        more, first_keys, prefix_lengths: names of further statistics, as in `attention_stats`: `stats[layer].more` has
            them of each head, or summed over `groups` as in `group_stats`. "row_entropy" and "largest_score" read every
            key of every row of R, and are refused with `groups`.
        groups: head groups of an earlier batch, [L, HQ] or, for each sequence of this one, [B, L, HQ], on any device.
            Then spans are not computed, nor statistics of the heads outside the groups.
        group_by: "sequence": head groups from each sequence's own spans (the paper's reading); "batch": from the
            spans over the whole batch.
        local_fraction, global_fraction: fractions of local and global heads.
        backend: as in `attention_stats`.
        lse: whose log-sum-exp the statistics use; `lse_sources` says which it was. "auto": the attention kernel's, if
            the model's output keeps its bits; else the statistics compute it in a row pass. "model": cuDNN's too,
            which without gradients takes another execution plan: the statistics are faster, and outputs may differ in
            their last bits. "own": always a row pass.
        parallel: the ranks that share this model's attention, by heads or by tokens; see `Parallel`. If None, those of
            tensor parallelism are found where weights of attention are split over a mesh dimension named "tp". All of
            them open a context with the same arguments, and run the forward. `stats` then has the heads of this rank,
            and `rhythm()` is of all heads and the same on all ranks. Where ranks have some tokens, both are of whole
            rows: T is that of the whole row, and `own_tokens` are the places of this rank's. `response_mask` may be
            of this rank's tokens or of the whole row, the forward's position_ids are needed, and each sampled layer's
            q, k, v and output travel once. An error on one rank is raised on all.

    Raises:
        TypeError, ValueError: wrong arguments, or a forward that cannot be collected from: with a key-value cache, a
            4-D mask, groups for another number of sequences, shards of sequences or of heads without `parallel`, no
            attention interface, a device without float64, or a layer whose output is not that of the map that its
            arguments describe. On a GPU, which the host does not wait for, the statistics of such a layer are NaN, and
            `check()` raises.
        RuntimeError: a second forward in one context; another rank's error.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: int | str | Sequence[int] = 5,
        window: int = 10,
        horizon: tuple[int, int | None] = (10, 50),
        response_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        span_rows: int | None = SPAN_ROWS,
        more: Collection[str] = (),
        first_keys: int = 4,
        prefix_lengths: Tensor | None = None,
        groups: HeadGroups | None = None,
        group_by: str = "sequence",
        local_fraction: float = 0.3,
        global_fraction: float = 0.3,
        backend: str = "auto",
        lse: str = "auto",
        parallel: Parallel | None = None,
    ):
        super().__init__(model)
        parallel = self._find_parallel() if parallel is None else parallel
        self._shards = None if parallel is None else Shards(check_parallel(parallel))
        with together(self._shards.groups if self._shards else ()):
            self.layers = _choose_layers(self.decoder, self._decoder_layers, layers)
            if response_mask is not None:
                check_tensor("response_mask", response_mask, ["B", "T"], [torch.bool])
            if cu_seqlens is not None:
                check_cu_seqlens(cu_seqlens, 1, torch.device("cpu"))
            self._response_mask, self._cu_seqlens = response_mask, cu_seqlens
            self._options = {
                "window": check_int("window", window, 1, MAX_WINDOW),
                "horizon": check_horizon(horizon),
                "span_rows": check_span_rows(span_rows),
            }
            names = check_more(more, first_keys, prefix_lengths, grouped=groups is not None)
            self._more = {"more": names, "first_keys": first_keys, "prefix_lengths": prefix_lengths}
            self._grouping = {
                "group_by": check_choice("group_by", group_by, GROUP_BY),
                "local_fraction": check_float("local_fraction", local_fraction, 0.0, 1.0),
                "global_fraction": check_float("global_fraction", global_fraction, 0.0, 1.0),
            }
            if groups is not None:
                check_groups(groups, len(self.layers), self._query_heads(), "S")
            self.groups, self.backend = groups, check_choice("backend", backend, BACKENDS)
            self._lse = check_choice("lse", lse, LSE)
            self.asks_for_lse = lse == "model" and not (self._shards and self._shards.of_tokens)


def _choose_layers(decoder: nn.Module, decoder_layers: Layers, layers: int | str | Sequence[int]) -> list[int]:
    """Returns the indices of the sampled softmax layers of a decoder."""
    softmax = list(decoder_layers.attention)
    if not isinstance(layers, (int, str)):
        chosen = sampled_layers(decoder_layers.count, layers)
        without = sorted(set(chosen) - set(softmax))
        if without:
            raise ValueError(
                f"layers must be layers with causal softmax attention, {softmax} of this model, got {without}"
            )
        return chosen
    if not softmax:
        raise ValueError(f"model must have layers with causal softmax attention, {type(decoder).__name__} has none")
    chosen = [softmax[index] for index in sampled_layers(len(softmax), layers)]
    if len(softmax) < decoder_layers.count:
        warnings.warn(
            f"{type(decoder).__name__} is a hybrid: only {len(softmax)} of its {decoder_layers.count} layers have a "
            f"causal attention map; statistics come from layers {chosen}",
            stacklevel=3,
        )
    return chosen
