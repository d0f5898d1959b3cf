"""The check of an attention call's output and log-sum-exp finds mismatches, and lets every sound call pass."""

import math
import sys

import pytest
import torch
from models import SIZES, llama, qwen3
from stats_cases import make_case, tensors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from verify_cases import CASES, assumed, damaged, exact

from benchmarks import weakest_mismatch
from benchmarks.weakest_mismatch import (
    CALLS,
    KEY_HEADS,
    QUERY_HEADS,
    SCALE,
    TOKENS,
    answer,
    draw,
    eager,
    excess,
    fused,
    ratios,
    visible,
)
from rhythm_kernels import attention_stats, collect, group_stats, reference
from rhythm_kernels.listen.backend_lse import FUSED_OPS
from rhythm_kernels.statistics.layout import make_layout
from rhythm_kernels.statistics.options import check_options
from rhythm_kernels.statistics.probes import FEWEST, PROBES, probed_rows, rounding_of
from rhythm_kernels.statistics.verify import probe_lse, probe_output

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
modules = [sys.modules[f"rhythm_kernels.{name}"] for name in ("listen.findings", "signals", "statistics.api")]


def options_of(q, k, **options):
    plain = {"scale": None, "window": 10, "horizon": (10, 50), "sliding_window": None, "softcap": None, "sinks": None}
    return check_options(q, k, need_span=True, **plain | options)


# ---- sound calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0, 20.0])
def test_a_sound_call_stays_far_below_the_limit(dtype, call, sharpness):
    for seed in range(3):
        inputs = draw(dtype, sharpness, seed)
        for window in (None, 50):
            out = CALLS[call](*inputs, visible(TOKENS, window))
            assert excess(inputs, out, answer(), call, sliding_window=window) < 0.5
    if call == "eager":
        out = eager(*inputs, visible(TOKENS), softcap=9.0)
        assert excess(inputs, out, answer(), call, softcap=9.0) < 0.5


UNUSUAL = {  # how q, k and v are changed
    "no values": lambda q, k, v: (q, k, v * 0),
    "tiny values": lambda q, k, v: (q, k, v * 1e-6),
    "vanishing values": lambda q, k, v: (q, k, v * 1e-30),
    "a sink key without a value": lambda q, k, v: (q * 4, first(k, 6), first(v, 0)),
    "equal keys": lambda q, k, v: (q * 3, alternate(k, 1), alternate(v, 1)),
    "two clusters": lambda q, k, v: (q * 3, alternate(k, 2), alternate(v, 2)),
    "a massive channel": lambda q, k, v: (q, k, v + 1e3 * (torch.arange(v.shape[-1]) == 5)),
    "a massive key": lambda q, k, v: (q, first(k, 30), v),
}


def first(x, factor):
    return torch.cat([x[:, :, :1] * factor, x[:, :, 1:]], 2)


def alternate(x, period):
    """Returns the first token and then the next `period` tokens again and again. x: [B, H, T, D]."""
    index = torch.arange(x.shape[2])
    return x[:, :, torch.where(index == 0, 0, 1 + index % period)]


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sound_calls_of_unusual_values_pass(kind, dtype, call):
    for seed in range(3):
        inputs = [x.to(dtype) for x in UNUSUAL[kind](*(x.float() for x in draw(dtype, seed=seed)))]
        if all(x.isfinite().all() for x in inputs):
            assert excess(inputs, CALLS[call](*inputs, visible(TOKENS)), answer(), call) < 0.95


@pytest.mark.parametrize("sink", [3.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sound_call_with_sinks_passes(dtype, sink):
    """The eager formula of gpt-oss rounds the sink, and the scores after their maximum is subtracted."""
    q, k, v = draw(dtype)
    sinks = torch.full((QUERY_HEADS,), sink, dtype=dtype)
    scores = q @ k.repeat_interleave(QUERY_HEADS // KEY_HEADS, 1).mT * SCALE
    scores = scores + torch.where(visible(TOKENS), 0.0, -math.inf).to(dtype)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = (scores - scores.amax(-1, keepdim=True)).softmax(-1, dtype=dtype)[..., :-1]
    out = (weights @ v.repeat_interleave(QUERY_HEADS // KEY_HEADS, 1)).transpose(1, 2)
    assert excess((q, k, v), out, answer(), "eager", sinks=sinks) < 0.95


def test_a_call_whose_factors_were_rounded_passes_as_such_alone():
    """TF32 and autocast give the output of q, k and v in fewer bits."""
    inputs = draw(torch.float32)
    out = fused(*(x.bfloat16().float() for x in inputs), visible(TOKENS))
    q, k, v = inputs
    for lowered, passes in ((torch.bfloat16, True), (None, False)):
        rounding = rounding_of(torch.float32, lowered=lowered, fused=True)
        [(_, deviation)] = probe_output(q, k, v, out, None, answer(), options_of(q, k), rounding)
        assert (deviation.excess < 1) == passes


# ---- what is surely right --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_only_what_is_right_is_left_out(name, with_lse):
    """A brief check leaves out sound calls, and nothing whose deviation the whole check would find or cannot know."""
    shape, key_heads, values, options = CASES[name]
    case = make_case(shape, key_heads, **options)
    v = torch.randn(shape[0], key_heads, shape[2], values, generator=torch.Generator().manual_seed(1))
    out, lse = exact(case, v)
    layout, assumed_options = assumed(case)
    left_out, found = 0, 0
    for seed, error in enumerate([0.0, *[10.0**-power for power in range(1, 8)], math.nan, math.inf] * 2):
        wrong_out, wrong_lse = damaged(out, lse, layout, seed, error)
        lse_given = wrong_lse if with_lse else None
        inputs = case.q, case.k, v, wrong_out, lse_given, layout, assumed_options, rounding_of(torch.float32)
        whole, brief = probe_output(*inputs), probe_output(*inputs, brief=True)
        left_out += not brief
        found += any(deviation.excess > 1 for _, deviation in whole)
        for (kind, one), (brief_kind, other) in zip(whole, brief or whole, strict=True):
            assert kind == brief_kind
            assert not one.excess > 1 or (brief and torch.equal(one.place, other.place))
    rows = layout.rows.any()
    assert left_out == 20 if not rows else left_out >= 6, "sound calls are left out"
    assert found >= 8 or not rows
    coarse = rounding_of(torch.float32, lowered=torch.bfloat16)
    assert not rows or probe_output(*inputs[:3], out, inputs[4], *inputs[5:7], coarse, brief=True)


# ---- the weakest mismatch that is found ------------------------------------------------------------------------------

FOUND = {  # (dtype, call) -> the mismatches that are found, with scores of a standard deviation of 1
    ("fp32", "fused"): {"window + 1", "leak 0.1 %", "scale 0.1 %"},
    ("fp32", "eager"): {"window + 1", "leak 0.1 %", "scale 0.1 %"},
    ("fp16", "fused"): {"window + 1", "leak 0.3 %", "scale 0.5 %"},
    ("fp16", "eager"): {"window + 1", "leak 0.3 %", "scale 2 %"},
    ("bf16", "fused"): {"window + 1", "leak 1 %", "scale 2 %"},
    ("bf16", "eager"): {"window + 1", "leak 1 %"},
}


@pytest.mark.parametrize(("dtype", "call"), FOUND)
def test_the_weakest_mismatch_that_is_found(dtype, call):
    excesses = ratios(draw(weakest_mismatch.DTYPES[dtype], seed=11), call)
    assert {name for name, ratio in excesses.items() if ratio > 1} >= FOUND[dtype, call], excesses
    assert all(ratio < 0.5 for name, ratio in excesses.items() if name.startswith("sound"))


@pytest.mark.slow
def test_the_table_of_mismatches(tmp_path, capsys):
    weakest_mismatch.main(["--draws", "1", "--out", str(tmp_path / "table")])
    text = (tmp_path / "table.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert sum(line.startswith(("| fp", "| bf")) for line in text.splitlines()) == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_mismatch_is_found(dtype):
    inputs = draw(dtype, 2.0)
    q, k, v = inputs
    seen, position = visible(TOKENS), torch.arange(TOKENS)
    chunks = seen & (position[:, None] // 128 == position // 128)
    sparse = seen & ((position[:, None] - position < 64) | (position % 2 == 0))
    kinds = {
        "later tokens": torch.ones_like(seen),
        "the next token": visible(TOKENS + 1)[1:, :-1],
        "chunks": chunks,
        "a sparse choice": sparse,
        "a window": visible(TOKENS, 300),
        "another sequence": visible(TOKENS, cut=100),
        "without the first token": seen & (position != 0),
    }
    for kind, other in kinds.items():
        assert excess(inputs, fused(*inputs, other), answer(), "fused") > 1, kind
    for kind, out in {
        "another order of the heads": fused(q, k, v, seen).flip(2),
        "another order of the key heads": fused(q, k.flip(1), v.flip(1), seen),
        "shifted rows": fused(q, k, v, seen).roll(1, 1),
        "a cap": eager(q, k, v, seen, softcap=4.0),
        "not a number": fused(q, k, v, seen) * math.nan,
    }.items():
        assert excess(inputs, out, answer(), "fused") > 1, kind


def test_one_head_in_one_row_is_enough():
    inputs = draw(torch.bfloat16)
    out = fused(*inputs, visible(TOKENS))
    row = int(probed_rows(answer())[0, 5])
    out[0, row, 3] *= 1.05
    q, k, v = inputs
    rounding = rounding_of(q.dtype, fused=True)
    [(name, deviation)] = probe_output(q, k, v, out, None, answer(), options_of(q, k), rounding)
    assert name == "output" and deviation.excess > 1 and deviation.place.tolist() == [0, row, 3]


def test_what_is_not_finite_by_itself_is_left_out():
    """A NaN in q or k makes the statistics NaN anyway, so that the check leaves it out."""
    q, k, v = draw(torch.float32)
    q[0, 2, TOKENS // 2] = k[0, 1, TOKENS - 3] = math.nan
    out = fused(q, k, v, visible(TOKENS))
    assert excess((q, k, v), out, answer(), "fused") < 1


# ---- which rows ------------------------------------------------------------------------------------------------------


def test_each_sequence_has_its_first_and_last_row_of_r_probed():
    torch.manual_seed(0)
    for lengths in ([90], [30, 1, 0, 59], [3] * 30):
        tokens = sum(lengths)
        rows = torch.rand(1, tokens) < 0.6
        cuts = torch.tensor([0, *lengths]).cumsum(0)
        layout = make_layout(1, tokens, torch.device("cpu"), rows, cu_seqlens=cuts)
        probed = probed_rows(layout)
        assert probed.shape == (len(lengths), max(FEWEST, PROBES // len(lengths)))
        for begin, end, probes in zip(cuts, cuts[1:], probed):
            own_rows = rows[0, begin:end].nonzero().flatten() + begin
            if len(own_rows) == 0:
                assert (probes == -1).all()
                continue
            assert set(probes.tolist()) <= set(own_rows.tolist())
            assert probes[0] == own_rows[0] and probes[-1] == own_rows[-1]
            assert len(probes.unique()) >= min(len(own_rows), len(probes) // 2)


def test_a_long_batch_is_probed_in_parts(monkeypatch):
    """Parts of one sequence and one head have the same worst row as one part of all."""
    verify = sys.modules["rhythm_kernels.statistics.verify"]
    q, k, v = draw(torch.float32)
    layout = make_layout(1, TOKENS, q.device, cu_seqlens=torch.tensor([0, 9, 9, 40, 200, TOKENS]))
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for _, begin, end in layout.bounds:
        seen[begin:end, begin:end] = visible(end - begin)
    out = eager(q, k, v, seen)
    assert excess((q, k, v), out, layout, "eager") < 0.5
    out[0, 39, 6] += 0.01
    excesses = []
    for size in (verify.CHUNK_BYTES, 1):
        monkeypatch.setattr(verify, "CHUNK_BYTES", size)
        [(_, deviation)] = probe_output(q, k, v, out, None, layout, options_of(q, k), rounding_of(q.dtype))
        assert deviation.place.tolist() == [0, 39, 6]
        excesses.append(deviation.excess)
    torch.testing.assert_close(*excesses)


# ---- the log-sum-exp -------------------------------------------------------------------------------------------------

WRONG_LSE = {
    "base 2": lambda lse: lse / math.log(2),
    "of scores without their scale": lambda lse: lse * SCALE**-1,
    "without the maximum": lambda lse: lse - lse.amax(-1, keepdim=True),
    "16 bits": lambda lse: lse.bfloat16().float(),
    "a row late": lambda lse: lse.roll(1, -1),
    "another head": lambda lse: lse.flip(1),
    "0.001 too large": lambda lse: lse + 1e-3,
    "not a number": lambda lse: lse * math.nan,
}


@pytest.mark.parametrize("kind", WRONG_LSE)
def test_a_wrong_log_sum_exp_is_refused(kind):
    q, k, _ = draw(torch.float32, 3.0)
    rows = torch.arange(TOKENS)[None] >= 50
    lse = attention_stats(q, k).lse
    right = attention_stats(q, k, lse=lse, need_span=False, response_mask=rows)
    assert right.waad.isfinite().all()
    refused = (
        r"lse must be the natural log-sum-exp of each row's scores, a sink included, got \S+ for token \d+ of row 0"
    )
    wrong = WRONG_LSE[kind](lse)
    with pytest.raises(ValueError, match=refused):
        attention_stats(q, k, lse=wrong, need_span=False, response_mask=rows)
    heads = torch.arange(QUERY_HEADS) < 3
    with pytest.raises(ValueError, match=refused):
        group_stats(q, k, heads, ~heads, lse=wrong, response_mask=rows)
    wrong_elsewhere = torch.where(heads[:, None], lse, wrong)  # in heads that are not read
    group_stats(q, k, heads, heads, lse=wrong_elsewhere, response_mask=rows)


def test_a_log_sum_exp_without_its_sink_is_refused():
    q, k, _ = draw(torch.float32)
    sinks = torch.linspace(-1, 3, QUERY_HEADS)
    lse = attention_stats(q, k, sinks=sinks).lse
    attention_stats(q, k, lse=lse, sinks=sinks, need_span=False)
    with pytest.raises(ValueError, match="a sink included"):
        attention_stats(q, k, lse=attention_stats(q, k).lse, sinks=sinks, need_span=False)


def test_a_log_sum_exp_of_fp64_passes():
    for sharpness in (0.1, 1.0, 20.0):
        q, k, _ = draw(torch.float32, sharpness)
        segments = reference.segment_ids(1, TOKENS)
        lse = reference.attention_map(q, k, segments)[1].float()
        deviation = probe_lse(q, k, lse, answer(), options_of(q, k))
        assert deviation.excess < 0.5


# ---- where the device is not waited for ------------------------------------------------------------------------------


@pytest.fixture
def unseen(monkeypatch):
    """Makes the host look at no tensor's content, as on a GPU."""
    for module in modules:
        monkeypatch.setattr(module, "can_look", lambda tensor: False)


class Waiting(TorchDispatchMode):
    """Raises where a GPU would be waited for: where Python reads a number, or a size depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split("::")[1] not in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cuts", [None, [0, 9, 9, 40, 200, TOKENS]])
def test_the_device_is_not_waited_for(cuts):
    q, k, v = draw(torch.float32)
    layout = make_layout(1, TOKENS, q.device, cu_seqlens=None if cuts is None else torch.tensor(cuts))
    out, options = eager(q, k, v, visible(TOKENS)), options_of(q, k, sinks=torch.zeros(QUERY_HEADS))
    lse = attention_stats(q, k).lse
    with Waiting():
        assert len(probe_output(q, k, v, out, lse, layout, options, rounding_of(q.dtype))) == 2
        probe_lse(q, k, lse, layout, options, torch.ones(layout.sequences, QUERY_HEADS, dtype=torch.bool))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Waiting():
        q[0, 0, 0, 0].item()


@pytest.mark.usefixtures("unseen")
def test_on_a_gpu_a_wrong_log_sum_exp_gives_nan():
    q, k, _ = draw(torch.float32, tokens=60)
    lse = attention_stats(q, k).lse
    heads = torch.arange(QUERY_HEADS) < 3
    for factor, is_nan in ((1.0, False), (1.4427, True)):
        stats = attention_stats(q, k, lse=factor * lse, need_span=False, more=["first_mass", "column_sum"])
        sums = group_stats(q, k, heads, ~heads, lse=factor * lse, more=["first_mass", "column_sum"])
        for x in (*tensors(stats), *tensors(sums)):
            assert x.isnan().all() if is_nan else x.isfinite().all()


@pytest.mark.usefixtures("unseen")
def test_on_a_gpu_a_mismatch_gives_nan_and_check_says_which():
    torch.manual_seed(1)
    model, ids = llama("sdpa"), torch.randint(0, 61, (1, 60))
    with torch.no_grad(), collect(model, group_by="batch") as sound:
        model(ids)
    groups = sound.rhythm().groups
    sound.check()
    restarting = {"position_ids": (torch.arange(60) % 30)[None], "use_cache": True}
    with torch.no_grad(), collect(model, groups=groups) as c:
        logits = model(ids, **restarting).logits
    assert logits.isfinite().all()
    assert c.rhythm().waad.isnan().all() and c.rhythm().fai.isnan().all()
    with pytest.raises(ValueError, match="layer 2 does not attend as collect assumes: the output of token"):
        c.check()
    with torch.no_grad(), collect(model) as c:
        model(ids, **restarting)
    with pytest.raises(ValueError, match="layer 2 does not attend as collect assumes: .* pass use_cache=False"):
        c.check()
    assert c.rhythm().waad.isnan().all()


# ---- inside a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, qwen3])
@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_models_of_every_dtype_pass(make, attention, dtype, spread):
    torch.manual_seed(1)
    model = make(attention, initializer_range=spread).to(dtype)
    ids, mask = torch.randint(0, 61, (3, 70)), torch.arange(70) >= torch.tensor([[0], [13], [40]])
    with torch.no_grad(), collect(model) as c:
        model(ids, attention_mask=mask.long())
    assert c.rhythm().waad.isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast_passes(attention):
    torch.manual_seed(1)
    model, ids = llama(attention), torch.randint(0, 61, (2, 70))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), collect(model) as c:
        model(ids)
    assert c.rhythm().waad.isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_in_attention_is_checked_without_it_and_changes_no_draw(attention):
    config = GPT2Config(vocab_size=61, n_embd=48, n_layer=6, n_head=6, n_positions=128, attn_pdrop=0.3)
    torch.manual_seed(1)
    model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
    ids = torch.randint(0, 61, (2, 50))
    torch.manual_seed(2)
    plain = model.train()(ids).logits
    torch.manual_seed(2)
    with collect(model, layers=[0]) as c:
        assert torch.equal(model(ids).logits, plain)
    for dropout in model.modules():  # in layer 0 the embeddings are dropped before attention
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.0
    with torch.no_grad(), collect(model, layers=[0]) as later:
        model(ids)
    model.transformer.drop.p = 0.1
    with torch.no_grad(), collect(model.eval(), layers=[0]) as still:
        model(ids)
    assert torch.equal(later.rhythm().waad, still.rhythm().waad) and c.rhythm().waad.isfinite().all()


@pytest.mark.parametrize("kind", ["base 2", "of scores without their scale", "16 bits", "another head"])
def test_a_wrong_log_sum_exp_of_the_models_own_kernel_is_refused(kind, monkeypatch):
    torch.manual_seed(1)
    model, ids = llama("sdpa", initializer_range=0.3), torch.randint(0, 61, (1, 60))
    reader = sys.modules["rhythm_kernels.listen.backend_lse"].LseReader
    read = reader.lse

    def wrong(self, *args):
        lse, source = read(self, *args)
        assert source in FUSED_OPS
        return WRONG_LSE[kind](lse), source

    monkeypatch.setattr(reader, "lse", wrong)
    refused = pytest.raises(ValueError, match="layer 2 does not attend as collect assumes: the log-sum-exp of token")
    with torch.no_grad(), refused, collect(model):
        model(ids)


@pytest.mark.parametrize("output", [lambda out: out.flatten(2), lambda out: out.transpose(1, 2)])
def test_an_output_of_another_shape_is_refused(output, monkeypatch):
    torch.manual_seed(1)
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args, **kwargs):
        return output(plain(*args, **kwargs)[0]), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "mine", attend)
    model = llama("sdpa")
    model.config._attn_implementation = "mine"
    refused = r"collect checks what attention returns, \[B, T, HQ, Dv\] = \[1, 60, 6, 8\] in layer 2"
    with torch.no_grad(), pytest.raises(ValueError, match=refused), collect(model):
        model(torch.randint(0, SIZES["vocab_size"], (1, 60)))
