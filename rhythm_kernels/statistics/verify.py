"""Checks the assumed attention map against what an attention call returned, on a few rows of each sequence.

The output of a row is sum_s A[t, s] v[s], and its log-sum-exp is that of its scores. Both are computed again from q, k
and v, under the assumed scale, window, soft cap, sinks and sequence borders, and compared with those of the call. A
wrong mask, window or border shows as a difference. DESIGN.md, "The map is checked", derives the tolerance.

This file has the check in torch; triton_verify.py has it for a GPU, in three launches.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v; S sequences,
P probed rows of each, L keys of the longest sequence.
"""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.host import send
from rhythm_kernels.statistics import probes
from rhythm_kernels.statistics.backends import kernels_for
from rhythm_kernels.statistics.blockwise_scores import softcapped, weighted_sum
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.lines import lines_of
from rhythm_kernels.statistics.options import DTYPES, Options
from rhythm_kernels.statistics.probes import (
    ACCUMULATED,
    END_ROWS,
    FP32,
    SLACK,
    VANISHING,
    Deviation,
    Rounding,
    probed_rows,
)

CHUNK_BYTES = 64 << 20  # of fp32 keys and values held at once
SHORT = 128  # tokens; sequences up to this length are checked side by side


def probe_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    layout: Layout,
    options: Options,
    rounding: Rounding,
    backend: str = "auto",
    brief: bool = False,
) -> list[tuple[str, Deviation]]:
    """Returns the worst deviation of an attention call's output and, where it is given, of its log-sum-exp.

    Args:
        q: [B, HQ, T, D] floating, any strides.
        k: [B, H, T, D], the same.
        v: [B, H, T, Dv], the same.
        out: [B, T, HQ, Dv], as transformers' attention functions return it.
        lse: [B, HQ, T] fp32, natural log, sinks included.
        layout: the sequences and rows of the assumed map.
        options: the scale, window, soft cap and sinks of the assumed map.
        rounding: the rounding of the call, from `rounding_of`.
        backend: as in `attention_stats`. Torch computes the check where the kernels do not take these inputs.
        brief: leave out, on a CPU in fp32, sequences that are surely right (`_is_surely_right`).

    Returns:
        [("output", Deviation), ("log-sum-exp", Deviation)] on the device of q, which is not waited for; an empty list
        where all is left out. Where R is empty the excess is 0. Rows for which the map itself gives values that are
        not finite do not count: their statistics are not finite either.
    """
    kernels = _kernels(backend, q=q, k=k, v=v)
    if kernels is not None:
        return kernels.probe(q, k, v, out, lse, layout, options, rounding)
    deviations = []
    for part in _parts(k, v, layout, options, probes.PROBES):
        read = _Read.of(part, q, k, v, out, lse)
        if brief and q.device.type == "cpu" and rounding.out <= FP32 and _is_surely_right(part, read, options):
            continue
        rows = _MapRows.of(read, part.bias, options, with_sizes=rounding.scores > 0, with_lse=lse is not None)
        deviations.append(("output", _worst(part, *_output_errors(rows, part.bias, read, rounding))))
        if lse is not None:
            deviations.append(("log-sum-exp", _worst(part, *_lse_errors(rows, read))))
    return _worst_by_name(deviations)


def probe_lse(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    layout: Layout,
    options: Options,
    heads: Tensor | None = None,
    backend: str = "auto",
) -> Deviation | None:
    """Returns the worst deviation of a log-sum-exp at the first and the last row of R of each sequence.

    Args:
        heads: bool [S, HQ], the query heads that are checked; None for all.
        q, k, lse, layout, options, backend: as in `probe_output`.

    Returns:
        The deviation on the device of q, which is not waited for; its excess is 0 where R is empty. None
        where nothing was read.
    """
    kernels = _kernels(backend, q=q, k=k)
    if kernels is not None:
        deviations = kernels.probe(q, k, None, None, lse, layout, options, None, heads)
        return next((deviation for _, deviation in deviations), None)
    deviations = []
    for part in _parts(k, None, layout, options, END_ROWS):
        read = _Read.of(part, q, k, None, None, lse)
        rows = _MapRows.of(read, part.bias, options)
        checked = None if heads is None else heads[part.sequences, part.query_heads(q, k)]
        deviations.append(("log-sum-exp", _worst(part, *_lse_errors(rows, read), checked)))
    return next((deviation for _, deviation in _worst_by_name(deviations)), None)


def _kernels(backend: str, **inputs: Tensor) -> ModuleType | None:
    """Returns the module of the Triton kernels where they run these inputs; None for torch."""
    kernels = kernels_for(backend, **inputs)
    # v may have another dtype or head size than q, which the statistics have taken
    if kernels is None or kernels.unsupported(**inputs) or any(x.dtype not in DTYPES for x in inputs.values()):
        return None
    from rhythm_kernels.statistics import triton_verify

    return triton_verify


# ---- sequences, a part at a time -------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Some sequences of similar length and some key heads: the probed rows, and the keys that these may see."""

    sequences: Tensor
    """int64 [S]: indices of the sequences in the layout."""
    batch_row: Tensor
    """int64 [S]."""
    rows: Tensor
    """int64 [S, P]: the probed rows, 0 where there is none."""
    exists: Tensor
    """bool [S, P]: whether there is a row."""
    keys: Tensor
    """int64 [S, L]: positions of the keys; behind a sequence's end, its last position again."""
    single: tuple[int, int, int] | None
    """(batch row, first position, one past the last) of a part of one sequence, whose keys need no copy."""
    bias: Tensor
    """fp32 [S, P, L]: 0 where the row sees the key, else -inf. Adding it is several times as fast as a masked fill."""
    heads: slice
    """The key heads of this part."""
    lines: dict[tuple, Tensor]
    """Where `_at` reads, by what it reads: the layers of a forward have the same strides."""

    def query_heads(self, q: Tensor, k: Tensor) -> slice:
        """Returns the query heads of this part's key heads."""
        group = q.shape[1] // k.shape[1]
        return slice(self.heads.start * group, self.heads.stop * group)


def _parts(k: Tensor, v: Tensor | None, layout: Layout, options: Options, most: int) -> list[_Part]:
    """Returns the parts of a batch; `most` is that of `probed_rows`. All layers of a forward share them."""
    size, window = k.shape[-1] + (0 if v is None else v.shape[-1]), options.sliding_window
    return layout.keep(
        ("parts", most, k.shape[1], size, window, CHUNK_BYTES),
        lambda: list(_make_parts(layout, k.shape[1], size, window, most)),
    )


def _make_parts(layout: Layout, key_heads: int, size: int, window: int | None, most: int) -> Iterator[_Part]:
    """Yields parts of sequences whose lengths are within a factor of two, each as large as CHUNK_BYTES allows.

    Those of at most SHORT tokens are one part: a few more keys take less time than the operations of another part.
    """
    device = layout.rows.device
    rows, (batch_row, begin, end) = probed_rows(layout, most), layout.table.unbind(-1)
    by_length: dict[int, list[int]] = {}
    for index, (_, first, last) in enumerate(layout.bounds):
        if last > first:
            by_length.setdefault((max(last - first, SHORT) - 1).bit_length(), []).append(index)
    for bits, members in by_length.items():
        head_bytes = 4 * size << bits  # at most
        heads = max(1, min(key_heads, CHUNK_BYTES // head_bytes))
        run = max(1, CHUNK_BYTES // (head_bytes * heads))
        for at in range(0, len(members), run):
            bounds = [layout.bounds[index] for index in members[at : at + run]]
            length = max(last - first for _, first, last in bounds)
            single = bounds[0] if len(bounds) == 1 else None
            sequences = send(torch.tensor(members[at : at + run], device="cpu"), device)
            row, first, last = batch_row[sequences], begin[sequences, None], end[sequences, None]
            probed = rows[sequences]
            position = first + torch.arange(length, device=device)
            distance = probed[:, :, None] - position[:, None]
            visible = (position < last)[:, None] & (distance >= 0)
            if window is not None:
                visible &= distance < window
            bias = torch.zeros(visible.shape, dtype=torch.float32, device=device).masked_fill_(~visible, -math.inf)
            keys = torch.minimum(position, last - 1)
            for head in range(0, key_heads, heads):
                part_heads = slice(head, min(head + heads, key_heads))
                yield _Part(sequences, row, probed.clamp(min=0), probed >= 0, keys, single, bias, part_heads, {})


class _Read(NamedTuple):
    """The tensors of an attention call at the rows and keys of a part, fp32, of some heads."""

    queries: Tensor
    """[S, HQ, P, D]."""
    keys: Tensor
    """[S, H, L, D]."""
    values: Tensor | None
    """[S, H, L, Dv]."""
    out: Tensor | None
    """[S, HQ, P, Dv], what the call returned."""
    lse: Tensor | None
    """[S, HQ, P, 1]."""
    head: int
    """The first query head, in the call."""

    @classmethod
    def of(cls, part: _Part, q: Tensor, k: Tensor, v: Tensor | None, out: Tensor | None, lse: Tensor | None) -> "_Read":
        """Reads a part of the tensors of `probe_output`."""
        heads = part.query_heads(q, k)
        by_row = (q, None if out is None else out.transpose(1, 2), None if lse is None else lse[..., None])
        queries, out, lse = (None if x is None else _at(x, part, heads, part.rows) for x in by_row)
        keys, values = (None if x is None else _at_keys(x, part) for x in (k, v))
        return cls(queries, keys, values, out, lse, heads.start)


def _at_keys(x: Tensor, part: _Part) -> Tensor:
    """Returns x [B, H, T, D] at the keys of a part, fp32 [S, H of the part, L, D]."""
    if part.single is not None:
        batch_row, begin, end = part.single
        return x[batch_row : batch_row + 1, part.heads, begin:end].float()
    return _at(x, part, part.heads, part.keys)


def _at(x: Tensor, part: _Part, heads: slice, positions: Tensor) -> Tensor:
    """Returns x [B, H, T, D] at positions [S, n] of a part's sequences, for some heads: a new fp32 [S, heads, n, D]."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    stride = x.stride()[:-1]
    key = (positions is part.keys, heads.start, heads.stop, *stride)
    if key not in part.lines:
        head = torch.arange(heads.start, heads.stop, device=x.device)[:, None] * stride[1]
        line = (part.batch_row * stride[0])[:, None, None] + head + (positions * stride[2])[:, None]
        part.lines[key] = line.flatten()
    at_lines = lines_of(x).index_select(0, part.lines[key])
    return at_lines.view(len(positions), -1, positions.shape[1], x.shape[-1]).float()


# ---- the assumed map on the probed rows ------------------------------------------------------------------------------


class _MapRows(NamedTuple):
    """The probed rows of the assumed map."""

    weights: Tensor
    """A [S, HQ, P, L] fp32, before a sink takes its share."""
    sizes: Tensor | None
    """[S, HQ, P, L] fp32: absolute scores after the soft cap, also of hidden keys; None if not asked for."""
    largest: Tensor | None
    """[S, HQ, P, 1] fp32: the largest score, the sink's included; None if not asked for."""
    lse: Tensor | None
    """[S, HQ, P, 1] fp32, the sink included; None if not asked for."""
    reach: Tensor | None
    """[S, HQ, P, 1] fp32: scale |q| max |k|. The rounding error of a sum of D products is proportional to it. None if
    not asked for."""
    sink: tuple[Tensor, Tensor] | None
    """The sink's logit, fp32 [HQ, 1, 1], and the share of each row that it leaves, fp32 [S, HQ, P, 1]."""

    @classmethod
    def of(
        cls,
        read: _Read,
        bias: Tensor,
        options: Options,
        with_sizes: bool = False,
        with_lse: bool = True,
        with_reach: bool = True,
    ) -> "_MapRows":
        """Computes the rows of a part; `largest` and `lse` are asked for together."""
        queries, keys = read.queries, read.keys
        group, reach = queries.shape[1] // keys.shape[1], None
        if with_reach:
            longest = keys.norm(dim=-1).amax(-1).repeat_interleave(group, 1)[..., None, None]  # for each query head
            reach = abs(options.scale) * queries.norm(dim=-1, keepdim=True) * longest

        scores = queries.mul(options.scale).unflatten(1, (-1, group)).flatten(2, 3) @ keys.mT
        scores = scores.view(*queries.shape[:3], -1)
        softcapped(scores, options)
        sizes = scores.abs() if with_sizes else None
        scores += bias[:, None]
        weights = scores.softmax(-1)  # one pass over memory; written out it would take seven
        if not with_lse and options.sinks is None:
            return cls(weights, sizes, None, None, reach, None)
        largest = scores.amax(-1, keepdim=True)
        lse = largest - weights.amax(-1, keepdim=True).log()
        if options.sinks is None:
            return cls(weights, sizes, largest, lse, reach, None)
        sink = options.sinks[read.head : read.head + queries.shape[1], None, None]
        kept = (lse - sink).sigmoid()  # 1 - the sink's share would lose its bits where the sink takes almost all
        return cls(weights, sizes, largest.maximum(sink), lse.logaddexp(sink), reach, (sink, kept))


def _is_surely_right(part: _Part, read: _Read, options: Options) -> bool:
    """Returns whether the output and the log-sum-exp of a part are within the least that any tolerance allows.

    That least needs no further sum over keys, and no length of a query or key, so it takes less time than the whole
    check. What a tolerance has beyond it can only add to it.
    """
    rows = _MapRows.of(read, part.bias, options, with_lse=read.lse is not None, with_reach=False)
    expected = weighted_sum(rows.weights, read.values)
    if rows.sink is not None:
        expected *= rows.sink[1]
    longest = read.values.norm(dim=-1).amax(-1).repeat_interleave(expected.shape[1] // read.values.shape[1], 1)
    is_right = (read.out - expected).norm(dim=-1) <= SLACK * ACCUMULATED * longest[..., None]  # not where one is NaN
    if read.lse is not None:
        is_right &= ((read.lse - rows.lse).abs() <= SLACK * ACCUMULATED * (8 + rows.lse.abs())).squeeze(-1)
    return bool((is_right | ~part.exists[:, None]).all())


def _output_errors(rows: _MapRows, bias: Tensor, read: _Read, rounding: Rounding) -> tuple:
    """Returns the arguments of `_worst` for the output, n = Dv.

    A relative error e of one weight moves the output by e A[t, s] (v[s] - out). The errors of different keys are added
    as independent ones. Half of their plain sum is added too, since equal keys have equal errors.
    """
    values = read.values
    lengths = values.norm(dim=-1, keepdim=True)
    factors = torch.cat([lengths, torch.ones_like(lengths)], -1)  # of an error of a weight: |v[s]|, and 1 for |out|
    expected = weighted_sum(rows.weights, values)

    error = rounding.weights + (rounding.factors + ACCUMULATED) * rows.reach  # the relative error of a weight
    kept, sink_error = 1.0, 0.0  # the share that a sink leaves, and the error of its own
    if rows.sink is not None:
        sink, kept = rows.sink
        sink_share = 1 - kept
        sink_error = sink_share * error
        expected *= kept
        if rounding.scores > 0:  # the call subtracts the maximum in its dtype
            sink_size = sink.abs().masked_fill(sink == -math.inf, 0.0)  # a sink of -inf has no weight
            rounded = rounding.scores * (sink_size + rows.largest.abs())
            error, sink_error = error + rounded, sink_share * rounded
    size = expected.norm(dim=-1, keepdim=True)
    if rounding.smallest > 0:  # smaller weights vanish, each of them
        vanished = weighted_sum((rows.weights * kept).clamp_(max=rounding.smallest), factors)
        visible = (bias == 0).float()[:, None] @ factors.square()  # [S, H, P, 2]
        visible = visible.repeat_interleave(size.shape[1] // values.shape[1], 1)
    if rows.sizes is None:
        plain_sum = weighted_sum(rows.weights, factors)
        square_sum = weighted_sum(rows.weights.square_(), factors.square())
    else:
        weight_errors = torch.add(error, rows.sizes, alpha=rounding.scores, out=rows.sizes).mul_(rows.weights)
        error = 1.0
        plain_sum = weighted_sum(weight_errors, factors)
        square_sum = weighted_sum(weight_errors.square_(), factors.square())
    plain_sum, square_sum = plain_sum * (kept * error), square_sum * (kept * error) ** 2
    if rounding.smallest > 0:
        plain_sum += 2 * vanished
        square_sum += rounding.smallest**2 * visible
    plain_sum[..., 1:] += sink_error
    scale = torch.cat([torch.ones_like(size), size], -1)
    noise = ((square_sum + (plain_sum / 2).square()) * scale.square()).sum(-1)
    noise += (rounding.out * size.squeeze(-1)).square()
    longest = lengths.amax((-2, -1)).repeat_interleave(noise.shape[1] // values.shape[1], 1)
    noise += (ACCUMULATED * longest[..., None]).square()
    noise += values.shape[-1] * max(rounding.smallest, VANISHING) ** 2
    return read.out, expected, SLACK * noise.sqrt(), read.head


def _lse_errors(rows: _MapRows, read: _Read) -> tuple:
    """Returns the arguments of `_worst` for the log-sum-exp, n = 1. An error x of it multiplies each weight by e^-x."""
    allowed = SLACK * ACCUMULATED * (8 + rows.lse.abs() + rows.reach)
    return read.lse, rows.lse, allowed.squeeze(-1), read.head


def _worst(
    part: _Part,
    returned: Tensor,
    expected: Tensor,
    allowed: Tensor,
    head: int,
    checked: Tensor | None = None,
) -> Deviation:
    """Returns the largest difference relative to the allowed one.

    Args:
        returned: [S, HQ, P, n], what the call returned.
        expected: [S, HQ, P, n], what the map gives.
        allowed: [S, HQ, P], the largest allowed norm of their difference.
        head: the first query head of these rows.
        checked: bool [S, HQ], the heads that count; None for all.
    """
    error = returned - expected
    excess = error.norm(dim=-1) / allowed
    # A call that is not finite where the map is finite does not match it. Where the map is not finite, neither is what
    # is allowed, and nothing can be said.
    known = part.exists[:, None] & (allowed < math.inf)
    if checked is not None:
        known &= checked[..., None]
    excess = excess.nan_to_num(nan=math.inf, posinf=math.inf).where(known, 0.0)
    worst = excess.flatten().argmax(keepdim=True)  # [1]: the device would be waited for with a 0-dim index
    sequence, rest = worst // excess[0].numel(), worst % excess[0].numel()
    of_head, probe = rest // excess.shape[2], rest % excess.shape[2]
    largest = error.flatten(0, 2)[worst].abs().nan_to_num(nan=math.inf).argmax(-1)
    values = [x.flatten(0, 2)[worst, largest] for x in (returned, expected)]
    place = [part.batch_row[sequence], part.rows[sequence, probe], of_head + head]
    return Deviation(
        excess.flatten()[worst].squeeze(0), torch.cat(place), torch.cat([*values, allowed.flatten()[worst].float()])
    )


def _worst_by_name(deviations: list[tuple[str, Deviation]]) -> list[tuple[str, Deviation]]:
    """Returns the worst deviation of each name."""
    worst = []
    for name in dict.fromkeys(name for name, _ in deviations):
        candidates = [deviation for other, deviation in deviations if other == name]
        if len(candidates) > 1:
            index = torch.stack([candidate.excess for candidate in candidates]).argmax(keepdim=True)
            candidates = [Deviation(*(torch.stack(field)[index].squeeze(0) for field in zip(*candidates)))]
        worst += [(name, candidate) for candidate in candidates]
    return worst
