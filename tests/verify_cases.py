"""Attention calls to check, and a comparison of the Triton check with that of torch.

Shapes: B batch rows, T tokens, HQ query heads, H key heads, Dv the head size of v.
"""

import math

import torch
from stats_cases import StatsCase, segments_of
from torch import Tensor
from triton_calls import on_device

from rhythm_kernels.reference import attention_map
from rhythm_kernels.statistics import probes
from rhythm_kernels.statistics.layout import Layout, make_layout
from rhythm_kernels.statistics.options import Options, check_options
from rhythm_kernels.statistics.probes import Deviation, Rounding, probed_rows
from rhythm_kernels.statistics.verify import probe_lse, probe_output

MASKS = ("response_mask", "attention_mask", "cu_seqlens")
MAP = ("scale", "sliding_window", "softcap", "sinks")
Deviations = list[tuple[str, Deviation]]


def packed(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def padded(tokens: int, *spans: tuple[int, int]) -> torch.Tensor:
    position = torch.arange(tokens)
    return torch.stack([(position >= begin) & (position < end) for begin, end in spans])


def since(tokens: int, begin: int) -> torch.Tensor:
    return (torch.arange(tokens) >= begin)[None]


# (q [B, HQ, T, D], H, Dv, options)
CASES = {
    "plain": ((1, 2, 90, 32), 2, 32, {}),
    "one token": ((1, 2, 1, 16), 1, 16, {}),
    "no token": ((2, 2, 0, 16), 1, 16, {}),
    "several chunks": ((1, 1, 600, 16), 1, 16, {"response_mask": since(600, 200)}),
    "more rows than a tile has": ((1, 10, 40, 16), 2, 16, {}),
    "head size 5, values of 40": ((1, 2, 50, 5), 1, 40, {}),
    "head size 80": ((1, 2, 50, 80), 1, 24, {}),
    "window": ((1, 2, 300, 16), 1, 16, {"sliding_window": 7, "response_mask": since(300, 250)}),
    "window 1": ((1, 2, 40, 16), 1, 16, {"sliding_window": 1}),
    "soft cap": ((1, 2, 60, 16), 1, 16, {"softcap": 2.0, "scale": 2.0}),
    "soft cap far above the scores": ((1, 2, 60, 16), 1, 16, {"softcap": 50.0, "scale": 0.01}),
    "sinks": ((1, 3, 60, 16), 1, 16, {"sinks": torch.tensor([-2.0, 3.0, 12.0])}),
    "strided sinks": ((1, 2, 40, 16), 1, 16, {"sinks": torch.tensor([1.5, 9.0, -3.0, 9.0])[::2]}),
    "sinks of no weight": ((1, 2, 40, 16), 1, 16, {"sinks": torch.full((2,), -math.inf)}),
    "sinks of no weight, eager": ((1, 2, 40, 16), 1, 16, {"sinks": torch.full((2,), -math.inf)}),
    "padding": ((3, 2, 60, 16), 1, 16, {"attention_mask": padded(60, (25, 60), (0, 33), (0, 60))}),
    "a row of padding": ((2, 2, 40, 16), 1, 16, {"attention_mask": padded(40, (0, 0), (0, 40))}),
    "packed, some empty": ((1, 2, 90, 16), 1, 16, {"cu_seqlens": packed(0, 33, 1, 0, 56)}),
    "packed, one without a row": (
        (1, 2, 90, 16),
        1,
        16,
        {"cu_seqlens": packed(30, 30, 30), "response_mask": padded(90, (20, 70)) & ~padded(90, (30, 60))},
    ),
    "packed, longer than a chunk": ((1, 2, 600, 8), 1, 8, {"cu_seqlens": packed(270, 60, 270), "sliding_window": 260}),
    "many short": ((1, 1, 50, 16), 1, 16, {"cu_seqlens": packed(*[3, 8, 1, 6, 7] * 2)}),
    "no row": ((1, 2, 50, 16), 1, 16, {"response_mask": torch.zeros(1, 50, dtype=torch.bool)}),
    "scale 0": ((1, 2, 50, 16), 1, 16, {"scale": 0.0}),
    "negative scale": ((1, 2, 50, 16), 1, 16, {"scale": -0.5}),
    "large scores": ((1, 2, 50, 16), 1, 16, {"scale": 30.0}),
    "everything": (
        (1, 4, 300, 24),
        2,
        40,
        {
            "sliding_window": 130,
            "softcap": 5.0,
            "sinks": torch.arange(4.0),
            "cu_seqlens": packed(280, 20),
            "response_mask": since(300, 100),
        },
    ),
}


def assumed(case: StatsCase) -> tuple[Layout, Options]:
    """Returns the layout and the options of a case, on the device."""
    q, k = on_device(case.q), on_device(case.k)
    layout = make_layout(len(q), q.shape[2], q.device, **{name: on_device(case.kwargs.get(name)) for name in MASKS})
    options = {name: on_device(case.kwargs.get(name)) for name in MAP}
    return layout, check_options(q, k, window=10, horizon=(10, 50), need_span=True, **options)


def exact(case: StatsCase, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns an output [B, T, HQ, Dv] in v's dtype and its log-sum-exp fp32 [B, HQ, T], computed in fp64.

    The output is NaN in padding. v: [B, H, T, Dv].
    """
    padding = segments_of(case) < 0
    options = {name: case.kwargs[name] for name in MAP if name in case.kwargs}
    q, k, values = (x.masked_fill(padding[:, None, :, None], 0.0) for x in (case.q, case.k, v))
    weights, lse = attention_map(q, k, segments_of(case), **options)
    out = (weights @ values.double().repeat_interleave(weights.shape[1] // v.shape[1], 1)).transpose(1, 2)
    return out.to(v.dtype).masked_fill(padding[..., None, None], torch.nan), lse.float()


def damaged(out: Tensor, lse: Tensor, layout: Layout, seed: int, error: float) -> tuple[Tensor, Tensor]:
    """Returns copies of out and lse with `error` added in one probed row and head each, if any row is probed."""
    generator = torch.Generator().manual_seed(seed)
    out, lse, rows = out.clone(), lse.clone(), probed_rows(layout, probes.PROBES).cpu()
    places = (rows >= 0).nonzero()
    for x in (out.transpose(1, 2), lse):
        if len(places):
            sequence, probe = places[int(torch.randint(len(places), (), generator=generator))]
            head = int(torch.randint(x.shape[1], (), generator=generator))
            x[layout.bounds[sequence][0], head, rows[sequence, probe]] += error
    return out, lse


def deviations_by(
    backend: str, case: StatsCase, v: Tensor, out: Tensor, lse: Tensor | None, rounding: Rounding
) -> Deviations:
    """Returns a backend's deviations of an output and its log-sum-exp, and of the log-sum-exp checked alone."""
    layout, options = assumed(case)
    q, k, v, out, lse = (on_device(x) for x in (case.q, case.k, v, out, lse))
    deviations = probe_output(q, k, v, out, lse, layout, options, rounding, backend)
    if lse is not None:
        alone = probe_lse(q, k, lse, layout, options, None, backend)
        deviations += [] if alone is None else [("log-sum-exp alone", alone)]
    return [(name, Deviation(*(x.cpu() for x in deviation))) for name, deviation in deviations]


def assert_same_probes(case: StatsCase, v: Tensor, out: Tensor, lse: Tensor | None, rounding: Rounding) -> Deviations:
    """Compares the deviations of the Triton kernels with those of torch, and returns the former."""
    by_triton, by_torch = (deviations_by(backend, case, v, out, lse, rounding) for backend in ("triton", "torch"))
    assert [name for name, _ in by_triton] == [name for name, _ in by_torch]
    for (name, mine), (_, other) in zip(by_triton, by_torch):
        # the rounding of the check itself, in fp32
        slack = 1e-3 if name == "output" and case.q.dtype.itemsize == 2 else 0.02
        assert mine.excess.dtype == torch.float32 and mine.excess.shape == ()
        assert mine.place.dtype == torch.int64 and mine.place.shape == mine.values.shape == (3,)
        torch.testing.assert_close(mine.excess, other.excess, rtol=3e-3, atol=slack)
        if mine.excess == 0:
            continue
        batch, token, head = mine.place
        got = out[batch, token, head] if name == "output" else lse[batch, head, token][None]
        assert (got.float() == mine.values[0]).any() or mine.values[0].isnan(), (name, mine, got)
        if mine.excess > 2 * slack and torch.equal(mine.place, other.place):
            (got, expected, allowed), (got_too, expected_too, allowed_too) = mine.values, other.values
            # of several numbers that are off by as much either may be named
            pairs = [allowed, got - expected], [allowed_too, got_too - expected_too]
            torch.testing.assert_close(*pairs, rtol=3e-3, atol=1e-6, equal_nan=True)
    return by_triton
