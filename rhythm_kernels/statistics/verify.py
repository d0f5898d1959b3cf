"""Holds the map that the statistics assume against what an attention call returned, on a few rows of each sequence.

The output of a row is sum_s A[t, s] v[s], and its log-sum-exp is that of its scores: both are computed here again, from
q, k and v under the assumed scale, window, soft cap, sinks and sequences, and compared. A mask, window or sequence
border that was taken for another one shows in them.

The rule is written here for torch; triton_verify.py has it for a GPU, in three launches.

Shapes: S sequences, P probed rows of each, L the most keys of a sequence, HQ query heads, H key heads.
"""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.host import send
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import DTYPES, Options

PROBES = 12
"""Probed rows of a batch row; more where it is packed from many sequences, of which each gets at least FEWEST."""
FEWEST = 4
END_ROWS = 2  # of a log-sum-exp alone: the first and the last
CHUNK_BYTES = 64 << 20  # of fp32 keys and values held at once
SLACK = 2.0
"""How many times the size of its rounding errors a row may be off. Each error counts at its largest."""
FP32 = 2.0**-24  # the unit roundoff
TINY = torch.finfo(torch.float32).tiny
VANISHING = 1e-18  # values below it say nothing: their squares are 0 in fp32
ACCUMULATED = 24 * FP32
"""Error of a sum of fp32 products, in the call and again in this file, relative to the lengths of the vectors."""


class Rounding(NamedTuple):
    """How coarsely an attention call computes: unit roundoffs, relative to what is rounded."""

    factors: float
    """The rounding of q and k on their way into the product, beyond the dtype that they arrive in."""
    scores: float
    """The rounding of scores; 0 where it is below that of their sum in fp32."""
    weights: float
    """The rounding of the weights and of v."""
    out: float
    """The rounding of the output."""
    smallest: float
    """Absolute error of a weight close to 0: half the smallest number above 0; 0 where fp32 has none so small."""


class Deviation(NamedTuple):
    """Where an attention call is furthest from the assumed map, relative to what its rounding explains."""

    excess: Tensor
    """0-dim fp32: the difference there over what is allowed; above 1 it is a mismatch."""
    place: Tensor
    """int64 [3]: batch row, token, query head."""
    values: Tensor
    """fp32 [3]: what the call gave there, what the assumed map gives, and the allowed difference."""


def rounding_of(
    dtype: torch.dtype, *, lowered: torch.dtype | None = None, fused: bool = False, softcap: bool = False
) -> Rounding:
    """Returns the rounding of a call on inputs of `dtype`.

    Args:
        lowered: the dtype that its products round fp32 factors to (autocast, TF32), if they do.
        fused: whether the scores stay in fp32 inside one kernel. The eager formula rounds them to the dtype, after the
            product and after the scale.
        softcap: whether there is one, which takes three roundings more.
    """
    unit, coarse = (torch.finfo(x).eps / 2 for x in (dtype, lowered or dtype))
    scores = 0.0 if fused else (3.0 if softcap else 1.5) * coarse
    smallest = torch.finfo(lowered or dtype).smallest_normal * coarse
    return Rounding(
        factors=coarse if coarse > unit else 0.0,
        scores=scores if scores > ACCUMULATED else 0.0,
        weights=coarse,
        out=coarse,
        smallest=smallest if smallest > TINY else 0.0,
    )


def probed_rows(layout: Layout, most: int = PROBES) -> Tensor:
    """Returns the rows of R that are probed: int64 [S, P], -1 where a sequence has none.

    They are the first and the last of each sequence and, by a fixed rule, some between: dense at the beginning, where
    tokens of another sequence or of the padding would weigh most.
    """
    return layout.keep(("probes", most), lambda: _probed_rows(layout, most))


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
) -> list[tuple[str, Deviation]]:
    """Returns the worst deviation of an attention call's output and, where given, of its log-sum-exp.

    Args:
        q: [B, HQ, T, D]; k: [B, H, T, D]; v: [B, H, T, Dv], floating, any strides.
        out: [B, T, HQ, Dv], as transformers' attention functions return it.
        lse: [B, HQ, T] fp32, natural log, sinks included.
        layout, options: the map that is assumed.
        backend: of `attention_stats`; where its kernels do not take these inputs, torch computes the check.

    Returns:
        ("output", Deviation) and ("log-sum-exp", Deviation), on the device of q, which is not waited for; the list is
        empty without a row of R. Rows whose own values are not finite are left out: so are their statistics.
    """
    kernels = _kernels(backend, q=q, k=k, v=v)
    if kernels is not None:
        return kernels.probe(q, k, v, out, lse, layout, options, rounding)
    found = []
    for part in _parts(k, v, layout, options, PROBES):
        row = _Row.of(part, q, k, options, with_sizes=rounding.scores > 0, with_lse=lse is not None)
        found.append(("output", _worst(part, *_output_errors(part, row, v, out, rounding))))
        if lse is not None:
            found.append(("log-sum-exp", _worst(part, *_lse_errors(part, row, lse))))
    return _by_name(found)


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
        heads: bool [S, HQ], those that are looked at; all if None.
        q, k, lse, layout, options, backend: as in `probe_output`.
    """
    kernels = _kernels(backend, q=q, k=k)
    if kernels is not None:
        return next(iter(kernels.probe(q, k, None, None, lse, layout, options, None, heads)), (None, None))[1]
    found = []
    for part in _parts(k, None, layout, options, END_ROWS):
        row = _Row.of(part, q, k, options)
        known = None if heads is None else heads[part.sequences, row.heads]
        found.append(("log-sum-exp", _worst(part, *_lse_errors(part, row, lse), known)))
    return next((deviation for _, deviation in _by_name(found)), None)


def _kernels(backend: str, **inputs: Tensor) -> ModuleType | None:
    """The Triton kernels of this file where they run, by the rule of the statistics; None for torch."""
    if backend != "triton" and not (backend == "auto" and inputs["q"].is_cuda):
        return None
    # imported here, since Triton decides at its import whether it interprets or compiles
    from rhythm_kernels.statistics import triton_backend, triton_verify

    known = all(x.dtype in DTYPES for x in inputs.values())  # v need not have the dtype of q
    return triton_verify if known and triton_backend.unsupported(**inputs) is None else None


# ---- which rows ------------------------------------------------------------------------------------------------------


def _probed_rows(layout: Layout, most: int) -> Tensor:
    batch, tokens = layout.rows.shape
    device = layout.rows.device
    probes = most if layout.sequences <= batch else max(min(FEWEST, most), most * batch // layout.sequences)
    # positions along all batch rows, one after another; before[i]: how many rows of R lie below position i
    before = torch.nn.functional.pad(layout.rows.flatten().long().cumsum(0), (1, 0))
    batch_row, begin, end = layout.table.unbind(-1)
    first, count = before[batch_row * tokens + begin], before[batch_row * tokens + end]
    count = count - first
    index = torch.arange(probes, device=device)
    rank = (count[:, None] - 1) * index**2 // max(1, (probes - 1) ** 2)  # 0 to count - 1
    place = torch.searchsorted(before[1:], first[:, None] + rank + 1)
    return torch.where(count[:, None] > 0, place - batch_row[:, None] * tokens, -1)


class _Part(NamedTuple):
    """Some sequences of similar length, with the rows that are probed in them and the keys that these may see."""

    sequences: Tensor
    """int64 [S]: their indices in the layout."""
    batch_row: Tensor
    """int64 [S]."""
    rows: Tensor
    """int64 [S, P], 0 where there is none."""
    exists: Tensor
    """bool [S, P]."""
    keys: Tensor
    """int64 [S, L]: positions, the sequence's last one again behind its end."""
    alone: tuple[int, int, int] | None
    """(batch row, first position, one past the last) where it is one sequence, whose keys need no copy."""
    bias: Tensor
    """fp32 [S, P, L]: 0 where the row sees the key, else -inf; a sum is several times as fast as a fill by a mask."""
    heads: slice
    """The key heads of this part."""


def _parts(k: Tensor, v: Tensor | None, layout: Layout, options: Options, most: int) -> list[_Part]:
    """Sequences whose lengths are within a factor of two together, as many as CHUNK_BYTES hold."""
    size, window = k.shape[-1] + (0 if v is None else v.shape[-1]), options.sliding_window
    # the layers of a forward share them
    return layout.keep(
        ("parts", most, k.shape[1], size, window, CHUNK_BYTES),
        lambda: list(_make_parts(layout, k.shape[1], size, window, most)),
    )


def _make_parts(layout: Layout, key_heads: int, size: int, window: int | None, most: int) -> Iterator[_Part]:
    device = layout.rows.device
    rows, (batch_row, begin, end) = probed_rows(layout, most), layout.table.unbind(-1)
    by_size: dict[int, list[int]] = {}
    for index, (_, first, last) in enumerate(layout.bounds):
        if last > first:
            by_size.setdefault((last - first - 1).bit_length(), []).append(index)
    for bits, members in by_size.items():
        head_bytes = 4 * size << bits  # at most
        heads = max(1, min(key_heads, CHUNK_BYTES // head_bytes))
        run = max(1, CHUNK_BYTES // (head_bytes * heads))
        for at in range(0, len(members), run):
            bounds = [layout.bounds[index] for index in members[at : at + run]]
            length = max(last - first for _, first, last in bounds)
            alone = bounds[0] if len(bounds) == 1 else None
            some = send(torch.tensor(members[at : at + run], device="cpu"), device)
            row, first, last = batch_row[some], begin[some, None], end[some, None]
            probed = rows[some]
            position = first + torch.arange(length, device=device)
            distance = probed[:, :, None] - position[:, None]
            visible = (position < last)[:, None] & (distance >= 0)
            if window is not None:
                visible &= distance < window
            bias = torch.zeros(visible.shape, dtype=torch.float32, device=device).masked_fill_(~visible, -math.inf)
            keys = torch.minimum(position, last - 1)
            for head in range(0, key_heads, heads):
                some_heads = slice(head, min(head + heads, key_heads))
                yield _Part(some, row, probed.clamp(min=0), probed >= 0, keys, alone, bias, some_heads)


def _keys_of(x: Tensor, part: _Part) -> Tensor:
    """x [B, H, T, D] at the keys of a part: fp32 [S, heads, L, D]."""
    if part.alone is not None:
        batch_row, begin, end = part.alone
        return x[batch_row : batch_row + 1, part.heads, begin:end].float()
    return x[part.batch_row[:, None], part.heads, part.keys].transpose(1, 2).float()


# ---- the assumed map on these rows -----------------------------------------------------------------------------------


class _Row(NamedTuple):
    """The probed rows of the assumed map."""

    heads: slice
    """Their query heads."""
    weights: Tensor
    """A [S, HQ, P, L] fp32, before a sink takes its share."""
    sizes: Tensor | None
    """The absolute scores after the soft cap, [S, HQ, P, L] fp32, also of what is hidden; None if not asked for."""
    largest: Tensor | None
    """[S, HQ, P, 1] fp32: the largest score, that of the sink included; None if not asked for."""
    lse: Tensor | None
    """[S, HQ, P, 1] fp32, the sink included; None if not asked for."""
    reach: Tensor
    """[S, HQ, P, 1] fp32: scale |q| max |k|, to which the rounding error of a sum of D products is proportional."""
    sink: tuple[Tensor, Tensor] | None
    """The sink's logit [HQ, 1, 1], and the share that it leaves of each row [S, HQ, P, 1]; fp32."""

    @classmethod
    def of(
        cls, part: _Part, q: Tensor, k: Tensor, options: Options, with_sizes: bool = False, with_lse: bool = True
    ) -> "_Row":
        group = q.shape[1] // k.shape[1]
        heads = slice(part.heads.start * group, part.heads.stop * group)
        queries = q[part.batch_row[:, None], heads, part.rows].transpose(1, 2).float()  # [S, HQ, P, D]
        keys = _keys_of(k, part)  # [S, H, L, D]
        longest = keys.norm(dim=-1).amax(-1).repeat_interleave(group, 1)[..., None, None]  # of each query head
        reach = abs(options.scale) * queries.norm(dim=-1, keepdim=True) * longest

        scores = queries.mul(options.scale).unflatten(1, (-1, group)).flatten(2, 3) @ keys.mT
        scores = scores.view(*reach.shape[:3], -1)
        if options.softcap is not None:
            scores.div_(options.softcap).tanh_().mul_(options.softcap)
        sizes = scores.abs() if with_sizes else None
        scores += part.bias[:, None]
        weights = scores.softmax(-1)  # one pass over memory, where its steps are seven
        if not with_lse and options.sinks is None:
            return cls(heads, weights, sizes, None, None, reach, None)
        largest = scores.amax(-1, keepdim=True)
        lse = largest - weights.amax(-1, keepdim=True).log()
        if options.sinks is None:
            return cls(heads, weights, sizes, largest, lse, reach, None)
        sink = options.sinks[heads, None, None]
        kept = (lse - sink).sigmoid()  # not 1 - share, which loses its bits where the sink takes almost all
        return cls(heads, weights, sizes, largest.maximum(sink), lse.logaddexp(sink), reach, (sink, kept))


def _output_errors(part: _Part, row: _Row, v: Tensor, out: Tensor, rounding: Rounding) -> tuple:
    """(what the call gave, what the map gives, the allowed norm of their difference over Dv, the heads of q).

    Each weight has a relative error, of which one of size e moves the output by e A[t, s] (v[s] - out). Errors of
    different keys are added as independent ones, and, since equal keys have equal errors, half of their plain sum
    beside that.
    """
    values = _keys_of(v, part)  # [S, H, L, Dv]
    lengths = values.norm(dim=-1, keepdim=True)
    both = torch.cat([lengths, torch.ones_like(lengths)], -1)  # of v[s], and of out
    expected = _grouped(row.weights, values)
    got = out[part.batch_row[:, None], part.rows].transpose(1, 2)[:, row.heads].float()

    slip = rounding.weights + (rounding.factors + ACCUMULATED) * row.reach
    kept, sink_error = 1.0, 0.0  # of a row without a sink
    if row.sink is not None:
        sink, kept = row.sink
        share = 1 - kept
        sink_error = share * slip
        expected *= kept
        if rounding.scores > 0:  # the maximum is subtracted in the dtype
            sink_size = sink.abs().masked_fill(sink == -math.inf, 0.0)  # of no weight
            sink_size = rounding.scores * (sink_size + row.largest.abs())
            slip, sink_error = slip + sink_size, share * sink_size
    size = expected.norm(dim=-1, keepdim=True)
    if rounding.smallest > 0:  # weights below it vanish, all of them
        vanish = _grouped((row.weights * kept).clamp_(max=rounding.smallest), both)
        visible = (part.bias == 0).float()[:, None] @ both.square()  # [S, H, P, 2]
        visible = visible.repeat_interleave(size.shape[1] // values.shape[1], 1)
    if row.sizes is None:
        together = _grouped(row.weights, both)
        apart = _grouped(row.weights.square_(), both.square())
    else:
        errors = torch.add(slip, row.sizes, alpha=rounding.scores, out=row.sizes).mul_(row.weights)
        slip = 1.0
        together = _grouped(errors, both)
        apart = _grouped(errors.square_(), both.square())
    together, apart = together * (kept * slip), apart * (kept * slip) ** 2
    if rounding.smallest > 0:
        together += 2 * vanish
        apart += rounding.smallest**2 * visible
    together[..., 1:] += sink_error
    scale = torch.cat([torch.ones_like(size), size], -1)
    noise = ((apart + (together / 2).square()) * scale.square()).sum(-1)
    noise += (rounding.out * size.squeeze(-1)).square()
    longest = lengths.amax((-2, -1)).repeat_interleave(noise.shape[1] // values.shape[1], 1)
    noise += (ACCUMULATED * longest[..., None]).square()
    noise += values.shape[-1] * max(rounding.smallest, VANISHING) ** 2
    return got, expected, SLACK * noise.sqrt(), row.heads


def _grouped(weights: Tensor, values: Tensor) -> Tensor:
    """[S, HQ, P, L] and [S, H, L, Dv] -> [S, HQ, P, Dv], each query head with the values of its key head."""
    grouped = weights.unflatten(1, (values.shape[1], -1)).flatten(2, 3)
    return (grouped @ values).view(*weights.shape[:3], -1)


def _lse_errors(part: _Part, row: _Row, lse: Tensor) -> tuple:
    """The same as `_output_errors` returns. A log-sum-exp that is off by x moves each weight by the share x."""
    got = lse[part.batch_row[:, None], row.heads, part.rows].transpose(1, 2)
    allowed = SLACK * ACCUMULATED * (8 + row.lse.abs() + row.reach)
    return got[..., None].float(), row.lse, allowed.squeeze(-1), row.heads


def _worst(
    part: _Part,
    got: Tensor,
    expected: Tensor,
    allowed: Tensor,
    heads: slice,
    wanted: Tensor | None = None,
) -> Deviation:
    """The largest difference relative to what is allowed, of the wanted heads [S, HQ].

    got and expected [S, HQ, P, n], allowed [S, HQ, P].
    """
    error = got - expected
    excess = error.norm(dim=-1) / allowed
    # what is not finite where the map is finite is a mismatch; where the map, and so what is allowed, is not, nothing
    # can be said
    known = part.exists[:, None] & allowed.isfinite()
    if wanted is not None:
        known &= wanted[..., None]
    excess = excess.nan_to_num(nan=math.inf, posinf=math.inf).where(known, 0.0)
    best = excess.flatten().argmax(keepdim=True)  # [1]: an index of no dimensions would be waited for
    sequence, rest = best // excess[0].numel(), best % excess[0].numel()
    head, probe = rest // excess.shape[2], rest % excess.shape[2]
    largest = error.abs().nan_to_num(nan=math.inf).flatten(0, 2)[best].argmax(-1)
    values = [x.flatten(0, 2)[best, largest] for x in (got, expected)]
    place = [part.batch_row[sequence], part.rows[sequence, probe], head + heads.start]
    return Deviation(
        excess.flatten()[best].squeeze(0), torch.cat(place), torch.cat([*values, allowed.flatten()[best].float()])
    )


def _by_name(found: list[tuple[str, Deviation]]) -> list[tuple[str, Deviation]]:
    """The worst of each name."""
    worst = []
    for name in dict.fromkeys(name for name, _ in found):
        parts = [deviation for other, deviation in found if other == name]
        if len(parts) > 1:
            best = torch.stack([part.excess for part in parts]).argmax(keepdim=True)
            parts = [Deviation(*(torch.stack(field)[best].squeeze(0) for field in zip(*parts)))]
        worst += [(name, part) for part in parts]
    return worst
