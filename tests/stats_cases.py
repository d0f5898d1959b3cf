"""Cases for every backend, with values and head groups, and checks against the reference.

A case is made for `attention_stats`. `group_stats` and `attention` take the same case, with `make_groups` and
`make_values`. Its tensors are on the CPU. Results are compared on their own device, where the reference and the eager
formula run too: with the few threads of a test, dense maps in fp64 take a CPU most of a minute.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, D the head size of q and k, Dv that of v; S sequences.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels import AttentionStats, GroupStats, reference
from rhythm_kernels.isolation import exact_products
from rhythm_kernels.statistics.more import NEED_EVERY_KEY

ROUNDED_SUMS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
"""The settings of torch that let a GPU round partial sums of 16-bit products to 16 bits."""


class StatsCase(NamedTuple):
    """The arguments of one call: `attention_stats(case.q, case.k, **case.kwargs, backend=...)`.

    kwargs may hold `lse` (that of the fp64 reference, NaN outside R) and `need_span`. The reference takes neither.
    """

    q: Tensor
    """[B, HQ, T, D], any strides, NaN in padding."""
    k: Tensor
    """[B, H, T, D], the same."""
    kwargs: dict

    def options(self, *without: str) -> dict:
        """Returns kwargs without some names: `group_stats` takes no `need_span`, and `attention` no `lse`."""
        return {name: x for name, x in self.kwargs.items() if name not in without}

    def group_options(self) -> dict:
        """Returns the kwargs of `group_stats`: of `more` those that have sums over heads."""
        more = [name for name in self.kwargs.get("more", ()) if name not in NEED_EVERY_KEY]
        return self.options("need_span", "span_rows") | ({"more": more} if "more" in self.kwargs else {})


def moved(x, device: torch.device | str):
    """Returns a copy of a tensor on the device, in the same memory order; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def case_on(device: torch.device | str, case: StatsCase) -> StatsCase:
    """Returns a case with its tensors on the device."""
    kwargs = {name: moved(x, device) for name, x in case.kwargs.items()}
    return StatsCase(moved(case.q, device), moved(case.k, device), kwargs)


@contextmanager
def dense_formulas_on(device: torch.device) -> Iterator[None]:
    """Opens a context in which dense formulas make their tensors on the device, and their products keep all bits.

    Without it a GPU may round the factors of fp32 products to TF32, and the partial sums of 16-bit products to 16 bits.
    The eager formula would then be worse, and the tolerance, which is twice its error, wider.
    """
    settings = torch.backends.cuda.matmul
    earlier = {name: getattr(settings, name) for name in ROUNDED_SUMS}
    try:
        for name in ROUNDED_SUMS:
            setattr(settings, name, False)
        with torch.device(device), exact_products():
            yield
    finally:
        for name, value in earlier.items():
            setattr(settings, name, value)


def strided(x: Tensor, how: str) -> Tensor:
    """Returns x [B, H, T, D] in a memory order of models: "heads outside", "heads inside" or "slice"."""
    batch, heads, tokens, size = x.shape
    if how == "heads inside":  # view(B, T, H, D).transpose(1, 2)
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "slice":  # a slice of a joint projection, at an odd offset
        joint = torch.full((batch, tokens, 2 * heads * size + 3), math.nan, dtype=x.dtype)
        view = joint[..., 1 : 1 + heads * size].view(batch, tokens, heads, size).transpose(1, 2)
        return view.copy_(x)
    return x.contiguous()


def make_case(
    q_shape: tuple[int, int, int, int],
    key_heads: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharpness: float = 1.0,
    order: str = "heads outside",
    lse_given: bool = False,
    device: str = "cpu",
    **kwargs,
) -> StatsCase:
    """Returns a case of random q and k, on the CPU.

    Args:
        q_shape: B, HQ, T and D.
        sharpness: factor of the scores.
        order: memory order of q, k and lse, as in `strided`.
        lse_given: whether kwargs get the log-sum-exp of the reference.
        device: where the reference computes that log-sum-exp.
        kwargs: arguments of `attention_stats`.
    """
    batch, _, tokens, size = q_shape
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(q_shape, generator=generator) * sharpness).to(dtype)
    k = torch.randn(batch, key_heads, tokens, size, generator=generator).to(dtype)
    padding = (segments_of(StatsCase(q, k, kwargs)) < 0)[:, None, :, None]
    q, k = (strided(x.masked_fill_(padding, math.nan), order) for x in (q, k))
    case = StatsCase(q, k, kwargs)
    if not lse_given:
        return case
    exact = reference_stats(case_on(device, case)).lse.cpu()
    rows = rows_of(case)
    lse = torch.where(rows[:, None], exact, math.nan).float()
    if order != "heads outside":
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    return case._replace(kwargs=kwargs | {"lse": lse})


def make_values(case: StatsCase, size: int, seed: int = 0, order: str = "heads outside") -> Tensor:
    """Returns random v [B, H, T, size] in the dtype of q and the memory order of `strided`, NaN in padding."""
    batch, key_heads, tokens, _ = case.k.shape
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(batch, key_heads, tokens, size, generator=generator).to(case.q.dtype)
    return strided(v.masked_fill_((segments_of(case) < 0)[:, None, :, None], math.nan), order)


def make_groups(case: StatsCase, seed: int = 0, per_sequence: bool = True) -> tuple[Tensor, Tensor]:
    """Returns random disjoint local_heads and global_heads, bool [S, HQ] or [HQ]; a group is often empty."""
    shape = (sequences_of(case), case.q.shape[1]) if per_sequence else (case.q.shape[1],)
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(3, shape, generator=generator)
    kept = torch.rand(2, generator=generator) < 0.8
    return (group == 0) & kept[0], (group == 1) & kept[1]


def segments_of(case: StatsCase) -> Tensor:
    """Returns the sequence of each token, -1 for padding: [B, T]."""
    batch, _, tokens, _ = case.q.shape
    with dense_formulas_on(case.q.device):
        return reference.segment_ids(batch, tokens, case.kwargs.get("attention_mask"), case.kwargs.get("cu_seqlens"))


def sequences_of(case: StatsCase) -> int:
    """Returns S."""
    bounds = case.kwargs.get("cu_seqlens")
    return len(case.q) if bounds is None else len(bounds) - 1


def rows_of(case: StatsCase) -> Tensor:
    """Returns R, [B, T] bool."""
    valid = segments_of(case) >= 0
    response_mask = case.kwargs.get("response_mask")
    return valid if response_mask is None else valid & response_mask


def reference_stats(case: StatsCase, dtype: torch.dtype = torch.float64) -> AttentionStats:
    """Returns the statistics of the reference, on the device of the case."""
    with dense_formulas_on(case.q.device):
        return reference.attention_stats(case.q, case.k, **case.options("lse", "need_span"), dtype=dtype)


def reference_map(case: StatsCase, dtype: torch.dtype) -> Tensor:
    """Returns A [B, HQ, T, T] of all tokens that are not padding, whether in R or not."""
    names = ("scale", "sliding_window", "softcap", "sinks")
    options = {name: case.kwargs[name] for name in names if name in case.kwargs}
    with dense_formulas_on(case.q.device):
        return reference.attention_map(case.q, case.k, segments_of(case), **options, dtype=dtype)[0]


def attention_out(weights: Tensor, v: Tensor) -> Tensor:
    """Returns the reference's output of a map, on the device of the map."""
    with dense_formulas_on(v.device):
        return reference.attention_out(weights, v)


def named(stats: AttentionStats | GroupStats) -> dict[str, Tensor]:
    """Returns the statistics that are not None by their names, those of `more` too."""
    fields = {name: x for name, x in stats._asdict().items() if name != "more" and x is not None}
    return fields | stats.more


def tensors(stats: AttentionStats | GroupStats) -> list[Tensor]:
    """Returns the statistics that are not None in order."""
    return list(named(stats).values())


def errors(stats: AttentionStats, exact: AttentionStats) -> dict[str, float]:
    """Returns the largest absolute error of each statistic that is not None; a NaN counts as an infinite error."""
    largest, exact = {}, named(exact)
    for name, x in named(stats).items():
        error = (x.double().to(exact[name].device) - exact[name].double()).abs().nan_to_num(nan=math.inf)
        largest[name] = error.max().item() if error.numel() else 0.0
    return largest


def eager_score_error(case: StatsCase) -> float:
    """Returns the largest error of a visible score, q k^T times the scale, that the eager formula computes in fp32."""
    _, query_heads, tokens, size = case.q.shape
    segments = segments_of(case)
    distance = reference.distances(tokens).to(segments.device)
    visible = (distance >= 0) & (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    if case.kwargs.get("sliding_window") is not None:
        visible &= distance < case.kwargs["sliding_window"]
    scale = size**-0.5 if case.kwargs.get("scale") is None else case.kwargs["scale"]
    k = case.k.repeat_interleave(query_heads // case.k.shape[1], 1)
    with dense_formulas_on(case.q.device):
        error = (case.q.float() @ k.float().mT * scale).double() - case.q.double() @ k.double().mT * scale
    error = error.abs()[visible[:, None].expand_as(error)]
    return error.max().item() if error.numel() else 0.0


def weight_slip(case: StatsCase, lse: Tensor) -> float:
    """Returns the relative error of a weight after a few roundings of its score to fp32. lse: [B, HQ, T]."""
    largest = lse.abs().max().item() if lse.numel() else 0.0
    return (8 + largest + (case.kwargs.get("softcap") or 0.0)) * 2**-22


def tolerances(case: StatsCase, exact: AttentionStats) -> dict[str, float]:
    """Returns the allowed error of each statistic: twice that of the eager formula in fp32, plus a rounding band.

    It holds for 16-bit inputs too, since no backend rounds scores or weights below fp32. The band: each rounding of an
    fp32 score x is off by |x| 2^-24, and a few of them change a weight by `weight_slip`, relatively. In a softmax the
    errors of a row's scores cancel in part. With a given lse they do not, and each weight of the eager formula is off
    by the error of its score.
    """
    eager = errors(reference_stats(case, torch.float32), exact)
    tokens = max(case.q.shape[2], 1)
    slip = weight_slip(case, exact.lse)
    if "lse" in case.kwargs:
        slip += 2 * eager_score_error(case)
    unit = {"waad": case.kwargs.get("window", 10), "span": tokens, "row_entropy": 1 + math.log(tokens)}
    if "column_sum" in exact.more and exact.fai.numel():
        unit["column_sum"] = exact.more["column_sum"].max().item()
    return {name: 2 * eager[name] + slip * unit.get(name, 1.0) for name in named(exact)}


def assert_close_to_reference(stats: AttentionStats, case: StatsCase) -> None:
    """Checks shapes, dtypes, zeros where the contract says 0, and that errors against fp64 are within `tolerances`."""
    case = case_on(stats.waad.device, case)
    exact = reference_stats(case)
    assert (stats.span is None) == (not case.kwargs.get("need_span", True))
    assert set(stats.more) == set(case.kwargs.get("more", ()))
    outside = ~rows_of(case)[:, None].expand_as(exact.waad)
    for name, x in named(stats).items():
        true = named(exact)[name]
        assert x.dtype == torch.float32, (name, x.dtype)
        assert x.shape == true.shape, (name, x.shape, true.shape)
        if name not in ("span", "fai", "column_sum"):
            assert (x[outside] == 0).all(), f"{name} is not 0 outside R"
    allowed = tolerances(case, exact)
    largest = errors(stats, exact)
    wrong = {name: (error, allowed[name]) for name, error in largest.items() if not error <= allowed[name]}
    assert not wrong, f"error and tolerance: {wrong}"


def assert_groups_close(stats: GroupStats, case: StatsCase, local_heads: Tensor, global_heads: Tensor) -> None:
    """Checks shapes, dtypes, zeros, and that each sum is off by at most `tolerances` for each of its heads."""
    case = case_on(stats.waad.device, case)
    local_heads, global_heads = (moved(group, stats.waad.device) for group in (local_heads, global_heads))
    exact, segments = reference_stats(case), segments_of(case)
    more = {name: exact.more[name] for name in case.group_options().get("more", ())}
    sums = named(reference.group_sums(exact.waad, exact.fai, local_heads, global_heads, segments, more))
    one = torch.ones_like(exact.waad)
    ones = dict.fromkeys(more, one)
    head_counts = named(reference.group_sums(one, one, local_heads, global_heads, segments, ones))
    allowed = tolerances(case, exact)
    assert set(stats.more) == set(more)
    for name, x in named(stats).items():
        true, heads = sums[name], head_counts[name]
        assert x.dtype == torch.float32, (name, x.dtype)
        assert x.shape == true.shape, (name, x.shape, true.shape)
        excess = (x.double() - true).abs().nan_to_num(nan=math.inf) - heads * allowed[name]
        assert (excess <= 0).all(), f"{name}: above heads x {allowed[name]} by {excess.max().item()}"
        if name not in ("fai", "column_sum"):
            assert (x[~rows_of(case)] == 0).all(), f"{name} is not 0 outside R"


def assert_attention_close(out: Tensor, stats: AttentionStats, case: StatsCase, v: Tensor) -> None:
    """Checks the statistics as `assert_close_to_reference`, and out [B, HQ, T, Dv].

    out has q's dtype and is 0 in padding. Elsewhere, in R or not, it is off by at most twice the largest error of the
    eager formula plus a rounding band. Eager is transformers' formula with scores kept in fp32: it rounds the weights
    to q's dtype and multiplies them with v in that dtype. The band, in units of sum_s A[t, s] |v[s]|, is `weight_slip`
    for the fp32 weights, and two roundings to q's dtype: of the weights (tensor cores take both factors in 16 bits) and
    of the result.
    """
    case = case._replace(kwargs=case.options("lse"))  # `attention` takes no lse, so none widens its tolerance
    assert_close_to_reference(stats, case)
    case, v = case_on(out.device, case), moved(v, out.device)
    exact_map = reference_map(case, torch.float64)
    exact = attention_out(exact_map, v)
    assert out.dtype == case.q.dtype, out.dtype
    assert out.shape == exact.shape, (out.shape, exact.shape)
    padding = (segments_of(case) < 0)[:, None, :, None].expand_as(exact)
    assert (out[padding] == 0).all(), "out is not 0 in padding"

    eager = attention_out(reference_map(case, torch.float32).to(v.dtype), v)
    eager_error = (eager.double() - exact).abs()
    every_row = case._replace(kwargs=case.options("response_mask"))
    slip = weight_slip(case, reference_stats(every_row).lse) + torch.finfo(v.dtype).eps
    allowed = slip * attention_out(exact_map, v.abs())
    if eager_error.numel():
        allowed += 2 * eager_error.max()
    error = (out.double() - exact).abs().nan_to_num(nan=math.inf)
    wrong = error > allowed
    assert not wrong.any(), f"out is off by {error[wrong].max().item()}, allowed {allowed[wrong].min().item()}"
