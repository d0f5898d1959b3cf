"""The Triton kernels over random shapes, masks, windows, horizons and head ratios; FUZZ_CASES=5000 draws more."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from stats_cases import make_values
from stats_strategy import stats_case
from triton_calls import CALLS, DEVICE, HALF, check
from verify_cases import assert_same_probes, assumed, damaged, exact

from rhythm_kernels.statistics.probes import rounding_of

FUZZ_CASES = int(os.environ.get("FUZZ_CASES", 300))
# a GPU compiles kernels for each new shape, so a failing case is reported as it was drawn
PHASES = [phase for phase in Phase if DEVICE == "cpu" or phase not in (Phase.shrink, Phase.explain)]


@pytest.mark.parametrize("call", CALLS)
@settings(
    max_examples=FUZZ_CASES // 3,
    deadline=None,
    phases=PHASES,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
@given(
    case=stats_case(dtypes=(torch.float32, HALF) if DEVICE == "cpu" else (torch.float32, HALF, torch.bfloat16)),
    seed=st.integers(0, 999),
)
def test_fuzz(call, case, seed):
    check(call, case, seed)


@settings(
    max_examples=FUZZ_CASES // 10,
    deadline=None,
    phases=PHASES,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
@given(
    case=stats_case(40, dtypes=(torch.float32, HALF) if DEVICE == "cpu" else (torch.float32, HALF, torch.bfloat16)),
    seed=st.integers(0, 999),
    fused=st.booleans(),
    error=st.sampled_from((0.0, 1e-3, 0.03, 1.0)),
)
def test_probes(case, seed, fused, error):
    v = make_values(case, (16, 5, 40, 32)[seed % 4], seed, ("heads inside", "slice", "heads outside")[seed % 3])
    out, lse = exact(case, v)
    if error > 0:
        out, lse = damaged(out, lse, assumed(case)[0], seed, error)
    rounding = rounding_of(case.q.dtype, fused=fused, softcap=case.kwargs["softcap"] is not None)
    for _, deviation in assert_same_probes(case, v, out, None if seed % 5 == 0 else lse, rounding):
        assert error > 0 or deviation.excess < 0.5
