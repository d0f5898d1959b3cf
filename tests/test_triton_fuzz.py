"""The Triton kernels over random shapes, masks, windows, horizons and head ratios; FUZZ_CASES=5000 draws more."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stats_strategy import stats_case
from triton_calls import CALLS, DEVICE, HALF, check

FUZZ_CASES = int(os.environ.get("FUZZ_CASES", 300))


@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=FUZZ_CASES // 3, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(
    case=stats_case(dtypes=(torch.float32, HALF) if DEVICE == "cpu" else (torch.float32, HALF, torch.bfloat16)),
    seed=st.integers(0, 999),
)
def test_fuzz(call, case, seed):
    check(call, case, seed)
