"""The check of an attention call by Triton kernels, on a GPU or in Triton's interpreter, against that of torch."""

import math

import pytest
import torch
from stats_cases import make_case, make_values, rows_of, segments_of
from triton_calls import DEVICE, HALF, on_device
from verify_cases import CASES, assert_same_probes, assumed, damaged, deviations_by, exact, packed, since

from benchmarks.pretended_cuda import counted, pretended_cuda
from rhythm_kernels.statistics import probes, triton_verify
from rhythm_kernels.statistics.layout import make_layout
from rhythm_kernels.statistics.probes import probed_rows, rounding_of
from rhythm_kernels.statistics.verify import probe_lse, probe_output

DTYPES = [torch.float32, HALF] if DEVICE == "cpu" else [torch.float32, HALF, torch.bfloat16]


@pytest.fixture(autouse=True)
def few_probes(monkeypatch):
    """Probes fewer rows, since the interpreter is slow."""
    if DEVICE == "cpu":
        monkeypatch.setattr(probes, "PROBES", 4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_both_find_the_same(name):
    shape, key_heads, size_v, options = CASES[name]
    dtype = DTYPES[len(name) % len(DTYPES)]
    order = ("heads inside", "slice", "heads outside")[len(name) % 3]
    case = make_case(shape, key_heads, dtype=dtype, order=order, **options)
    v = make_values(case, size_v, order=order)
    out, lse = exact(case, v)
    fused, softcap = len(name) % 2 == 0, "softcap" in options
    rounding = rounding_of(dtype, fused=fused, softcap=softcap)
    for _, deviation in assert_same_probes(case, v, out, lse, rounding):
        assert deviation.excess < 0.5
    wrong = damaged(out, lse, assumed(case)[0], seed=len(name), error=0.4)
    deviations = assert_same_probes(case, v, *wrong, rounding)
    assert len(deviations) == (3 if shape[2] else 0)
    if rows_of(case).any():
        assert deviations[0][1].excess > 1 and deviations[1][1].excess > 1
    else:
        assert all(deviation.excess == 0 for _, deviation in deviations)


@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_that_round_their_factors(dtype):
    """The tolerance has a term for autocast and TF32."""
    case = make_case((1, 2, 80, 16), 1, dtype=dtype, sharpness=3.0)
    v = make_values(case, 16)
    q, k, rough_v = (x.bfloat16().to(dtype) for x in (case.q, case.k, v))
    out, _ = exact(case._replace(q=q, k=k), rough_v)
    for fused in (True, False):
        rounding = rounding_of(dtype, lowered=torch.bfloat16, fused=fused)
        [(_, deviation)] = assert_same_probes(case, v, out.bfloat16(), None, rounding)
        assert 0 < deviation.excess < 1


@pytest.mark.parametrize("name", ["q", "k", "v", "out", "lse"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.slow
def test_what_is_not_finite_is_left_out_in_the_map_and_found_in_the_call(bad, name):
    """The value lies in the second of three sequences; the others are checked as before."""
    case = make_case((1, 2, 90, 16), 2, cu_seqlens=packed(30, 30, 30))
    v = make_values(case, 16)
    out, lse = exact(case, v)
    rounding = rounding_of(torch.float32, fused=True)
    tensors = {"q": case.q, "k": case.k, "v": v, "out": out, "lse": lse}
    place = {"out": (0, 59, 1), "lse": (0, 1, 59)}.get(name, (0, 1, 40))
    tensors[name][place] = bad
    deviations = [deviation for _, deviation in assert_same_probes(case, v, out, lse, rounding)]
    for deviation in deviations:
        assert deviation.excess < 0.5 or deviation.place.tolist() == [0, 59, 1], deviation
    assert any(deviation.excess == math.inf for deviation in deviations) == (name in ("out", "lse"))
    out[0, 89, 1] += 1  # of the third sequence
    assert dict(assert_same_probes(case, v, out, lse, rounding))["output"].excess > 1


def test_values_and_outputs_of_any_strides_and_dtypes():
    case = make_case((1, 2, 50, 16), 1, dtype=HALF)
    v = make_values(case, 12)
    out, lse = exact(case, v)
    every_other = torch.full((*v.shape, 2), math.nan, dtype=v.dtype)[..., 0].copy_(v)
    turned = out.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    late = lse.transpose(1, 2).contiguous().transpose(1, 2)
    for inputs in ((every_other, turned, late), (v.float(), out.float(), lse), (v.double(), out.double(), lse)):
        deviations = assert_same_probes(case, *inputs, rounding_of(HALF, fused=True))
        assert all(deviation.excess < 0.5 for _, deviation in deviations)


def test_weights_keep_the_bits_of_fp32_beside_values_of_16_bits():
    """The output comes from 2,000 keys whose weights fp16 rounds to 0, beside one key of weight 1 and value 0."""
    tokens = 2000
    case = make_case((1, 1, tokens, 16), 1, dtype=HALF, scale=1.0, response_mask=since(tokens, tokens - 1))
    case.q.zero_()
    case.k.zero_()
    case.q[..., 0], case.k[0, 0, 0, 0] = 1.0, 17.0
    v = torch.ones(1, 1, tokens, 16, dtype=HALF)
    v[0, 0, 0] = 0.0
    out, lse = exact(case, v)
    [(_, deviation), *_] = deviations_by("triton", case, v, out.float(), lse, rounding_of(torch.float32, fused=True))
    expected = (tokens - 1) / (tokens - 1 + math.exp(17.0))
    assert abs(deviation.values[1] / expected - 1) < 1e-5


def test_heads_that_are_not_wanted_are_not_looked_at():
    case = make_case((1, 4, 60, 16), 2, cu_seqlens=packed(20, 40), lse_given=True)
    (layout, options), lse = assumed(case), on_device(case.kwargs["lse"])
    q, k = on_device(case.q), on_device(case.k)
    wrong = torch.where(torch.tensor([False, True, False, False], device=DEVICE)[:, None], lse + 1, lse)
    for heads, is_found in (([0, 1, 0, 0], True), ([1, 0, 1, 1], False), ([0, 0, 0, 0], False)):
        wanted = torch.tensor(heads, dtype=torch.bool, device=DEVICE).expand(2, -1)
        deviation = probe_lse(q, k, wrong, layout, options, wanted, "triton")
        assert (deviation.excess > 1).item() == is_found
        if is_found:
            assert deviation.place[2] == 1
    later = torch.zeros(2, 4, dtype=torch.bool, device=DEVICE)
    later[1] = True
    deviation = probe_lse(q, k, wrong, layout, options, later, "triton")
    assert deviation.place[1] >= 20 and deviation.place[2] == 1


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch():
    whole = make_case((1, 2, 600, 16), 1, dtype=HALF, cu_seqlens=packed(17, 283, 300))
    v = make_values(whole, 16)
    out, lse = exact(whole, v)
    out[:, 299, 1] *= 1.5
    alone = whole._replace(q=whole.q[:, :, 17:300], k=whole.k[:, :, 17:300], kwargs={})
    rounding = rounding_of(HALF)
    [(_, one), *_] = deviations_by("triton", whole, v, out, lse, rounding)
    [(_, other), *_] = deviations_by("triton", alone, v[:, :, 17:300], out[:, 17:300], lse[:, :, 17:300], rounding)
    assert torch.equal(one.excess, other.excess) and torch.equal(one.values, other.values)
    assert one.place.tolist() == [0, 299, 1] and other.place.tolist() == [0, 282, 1]


# ---- on a pretended GPU ----------------------------------------------------------------------------------------------

pretended = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is there")
KERNELS = {"probe_scores_kernel": 1, "probe_errors_kernel": 1, "probe_worst_kernel": 1}


def moved(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Returns the tensors on the pretended GPU, with their strides."""
    return [None if x is None else x.cuda() for x in tensors]


@pretended
@pytest.mark.parametrize("name", ["packed, some empty", "sinks"])
@pytest.mark.slow
def test_three_launches_and_no_wait(name, monkeypatch):
    monkeypatch.setattr(torch, "empty", torch._C._VariableFunctions.empty)  # poison would be a launch
    shape, key_heads, size_v, options = CASES[name]
    case = make_case(shape, key_heads, dtype=torch.bfloat16, order="heads inside", **options)
    v = make_values(case, size_v, order="heads inside")
    out, lse = exact(case, v)
    rounding = rounding_of(torch.bfloat16)
    on_cpu = deviations_by("torch", case, v, out, lse, rounding)
    bounds = [options.get(name) for name in ("response_mask", "attention_mask", "cu_seqlens")]
    with pretended_cuda():
        q, k, v, out, lse, sinks = moved(case.q, case.k, v, out, lse, options.get("sinks"))
        layout = make_layout(len(q), q.shape[2], q.device, *moved(*bounds))
        map_options = assumed(case)[1]._replace(sinks=sinks)
        wanted = torch.ones(layout.sequences, shape[1], dtype=torch.bool, device="cuda")
        for _ in range(2):  # the first layer makes the layout's tables
            with counted() as output:
                deviations = probe_output(q, k, v, out, lse, layout, map_options, rounding)
            with counted() as alone:
                lse_alone = probe_lse(q, k, lse, layout, map_options, wanted)
        excesses = [*(deviation.excess.item() for _, deviation in deviations), lse_alone.excess.item()]
    assert output.launches == alone.launches == KERNELS
    assert output.waits == alone.waits == []
    assert excesses == pytest.approx([deviation.excess.item() for _, deviation in on_cpu], rel=3e-3, abs=0.02)


def test_nothing_is_read_where_no_token_is(monkeypatch):
    monkeypatch.setattr(triton_verify, "probe_scores_kernel", None)
    case = make_case((1, 2, 40, 16), 1, attention_mask=torch.zeros(1, 40, dtype=torch.bool))
    assert (segments_of(case) < 0).all() and len(probed_rows(assumed(case)[0])) == 1
    v = make_values(case, 16)
    assert assert_same_probes(case, v, *exact(case, v), rounding_of(torch.float32)) == []
