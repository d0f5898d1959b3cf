"""Cases for every backend of `attention_stats`: a hypothesis strategy, and the check against the fp64 reference."""

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from rhythm_kernels import AttentionStats, reference

HEADS = ((1, 1), (2, 2), (2, 1), (4, 2), (3, 1))  # (HQ, H)
HEAD_SIZES = (1, 3, 16, 20, 32, 40, 80)


class StatsCase(NamedTuple):
    """`attention_stats(case.q, case.k, **case.kwargs, backend=...)` is held against the reference.

    kwargs may hold `lse` (the fp64 reference's, NaN outside R) and `need_span`, which the reference does not take.
    """

    q: Tensor
    """[B, HQ, T, D], any strides, NaN in padding."""
    k: Tensor
    """[B, H, T, D], the same."""
    kwargs: dict


def strided(x: Tensor, how: str) -> Tensor:
    """The values of x [B, H, T, D] in the memory order that models make."""
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
    **kwargs,
) -> StatsCase:
    """Random q and k; `sharpness` scales the scores; kwargs go to `attention_stats`."""
    batch, _, tokens, size = q_shape
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(q_shape, generator=generator) * sharpness).to(dtype)
    k = torch.randn(batch, key_heads, tokens, size, generator=generator).to(dtype)
    segments = reference.segment_ids(batch, tokens, kwargs.get("attention_mask"), kwargs.get("cu_seqlens"))
    for x in (q, k):
        x.masked_fill_((segments < 0)[:, None, :, None], math.nan)
    case = StatsCase(strided(q, order), strided(k, order), kwargs)
    if not lse_given:
        return case
    exact = reference_stats(case)
    rows = rows_of(case)
    lse = torch.where(rows[:, None], exact.lse, math.nan).float()
    if order != "heads outside":
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    return case._replace(kwargs=kwargs | {"lse": lse})


@st.composite
def stats_case(draw, max_tokens: int = 80, dtypes=(torch.float32, torch.float16)) -> StatsCase:
    """Every feature of the contract, alone and together."""
    query_heads, key_heads = draw(st.sampled_from(HEADS))
    kind = draw(st.sampled_from(("plain", "padded", "packed")))
    batch = 1 if kind == "packed" else draw(st.integers(1, 2))
    tokens = draw(st.integers(0, max_tokens))
    kwargs = {}
    if kind == "padded":
        kwargs["attention_mask"] = torch.zeros(batch, tokens, dtype=torch.int64)
        for b in range(batch):
            length = draw(st.integers(0, tokens))
            begin = draw(st.sampled_from((0, tokens - length)))
            kwargs["attention_mask"][b, begin : begin + length] = 1
    if kind == "packed":
        cuts = draw(st.lists(st.integers(0, tokens), max_size=4))
        kwargs["cu_seqlens"] = torch.tensor([0, *sorted(cuts), tokens], dtype=torch.int32)

    rows = draw(st.sampled_from(("all", "response", "holes", "few")))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    if rows == "response":
        prompt = draw(st.integers(0, tokens))
        kwargs["row_mask"] = (torch.arange(tokens) >= prompt).expand(batch, tokens).clone()
    elif rows != "all":
        kwargs["row_mask"] = torch.rand(batch, tokens, generator=generator) < (0.6 if rows == "holes" else 0.03)

    lo = draw(st.integers(0, 12))
    kwargs["horizon"] = (lo, draw(st.none() | st.integers(lo, lo + 60)))
    kwargs["window"] = draw(st.sampled_from((1, 2, 10, 33, 256)))
    kwargs["sliding_window"] = draw(st.none() | st.integers(1, 40))
    kwargs["softcap"] = draw(st.none() | st.sampled_from((1.0, 20.0, 50.0)))
    kwargs["scale"] = draw(st.none() | st.sampled_from((0.0, 0.1, 1.0, -0.3)))
    if draw(st.booleans()):
        kwargs["sinks"] = 2 * torch.randn(query_heads, generator=generator)
    kwargs["need_span"] = draw(st.booleans())
    return make_case(
        (batch, query_heads, tokens, draw(st.sampled_from(HEAD_SIZES))),
        key_heads,
        dtype=draw(st.sampled_from(dtypes)),
        seed=seed,
        sharpness=draw(st.sampled_from((0.3, 1.0, 4.0))),
        order=draw(st.sampled_from(("heads outside", "heads inside", "slice"))),
        lse_given=draw(st.booleans()),
        **kwargs,
    )


def rows_of(case: StatsCase) -> Tensor:
    """R, [B, T] bool."""
    batch, _, tokens, _ = case.q.shape
    mask, bounds = case.kwargs.get("attention_mask"), case.kwargs.get("cu_seqlens")
    valid = reference.segment_ids(batch, tokens, mask, bounds) >= 0
    row_mask = case.kwargs.get("row_mask")
    return valid if row_mask is None else valid & row_mask


def reference_stats(case: StatsCase, dtype: torch.dtype = torch.float64) -> AttentionStats:
    options = {name: x for name, x in case.kwargs.items() if name not in ("lse", "need_span")}
    return reference.attention_stats(case.q, case.k, **options, dtype=dtype)


def errors(stats: AttentionStats, exact: AttentionStats) -> dict[str, float]:
    """The largest absolute error of each statistic that is there; a NaN is an infinite error."""
    out = {}
    for name, x, true in zip(stats._fields, stats, exact, strict=True):
        if x is not None:
            error = (x.double().cpu() - true.double()).abs().nan_to_num(nan=math.inf)
            out[name] = error.max().item() if error.numel() else 0.0
    return out


def eager_score_error(case: StatsCase) -> float:
    """The largest error of a visible score that the eager formula computes in fp32, q k^T times the scale."""
    batch, query_heads, tokens, size = case.q.shape
    segments = reference.segment_ids(batch, tokens, case.kwargs.get("attention_mask"), case.kwargs.get("cu_seqlens"))
    distance = reference.distances(tokens)
    visible = (distance >= 0) & (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    if case.kwargs.get("sliding_window") is not None:
        visible &= distance < case.kwargs["sliding_window"]
    scale = size**-0.5 if case.kwargs.get("scale") is None else case.kwargs["scale"]
    k = case.k.repeat_interleave(query_heads // case.k.shape[1], 1)
    error = (case.q.float() @ k.float().mT * scale).double() - case.q.double() @ k.double().mT * scale
    error = error.abs()[visible[:, None].expand_as(error)]
    return error.max().item() if error.numel() else 0.0


def tolerances(case: StatsCase, exact: AttentionStats) -> dict[str, float]:
    """Twice the error of the eager formula in fp32 on the same rounded inputs, plus a rounding band.

    No backend rounds scores or weights below fp32, so this holds for inputs of 16 bits as well. The band: an fp32
    score of size |x| is off by |x| 2^-24 a step; a few such steps move each weight by `slip`, relatively. In a softmax
    the error of a row's scores partly cancels; against an lse that is given it does not, and each weight of the eager
    formula is off by the error of its score.
    """
    eager = errors(reference_stats(case, torch.float32), exact)
    tokens = max(case.q.shape[2], 1)
    largest = exact.lse.abs().max().item() if exact.lse.numel() else 0.0
    slip = (8 + largest + (case.kwargs.get("softcap") or 0.0)) * 2**-22
    if "lse" in case.kwargs:
        slip += 2 * eager_score_error(case)
    unit = {"waad": case.kwargs.get("window", 10), "fai": 1.0, "span": tokens, "lse": 1.0}
    return {name: 2 * eager[name] + slip * unit[name] for name in unit}


def assert_close_to_reference(stats: AttentionStats, case: StatsCase) -> None:
    """Shapes, exact zeros where the contract says 0, and errors against fp64 within `tolerances`."""
    exact = reference_stats(case)
    assert (stats.span is None) == (not case.kwargs.get("need_span", True))
    for name, x, true in zip(stats._fields, stats, exact, strict=True):
        if x is not None:
            assert x.dtype == torch.float32, (name, x.dtype)
            assert x.shape == true.shape, (name, x.shape, true.shape)
    outside = ~rows_of(case)[:, None].expand_as(exact.waad)
    assert (stats.waad.cpu()[outside] == 0).all(), "waad is not 0 outside R"
    assert (stats.lse.cpu()[outside] == 0).all(), "lse is not 0 outside R"
    allowed = tolerances(case, exact)
    found = errors(stats, exact)
    wrong = {name: (error, allowed[name]) for name, error in found.items() if not error <= allowed[name]}
    assert not wrong, f"error and tolerance: {wrong}"
