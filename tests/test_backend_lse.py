"""The log-sum-exp read from attention kernels, inside models and against eager scores. For kernels that need a GPU,
stand-ins on the CPU are registered under the real operators' names.
"""

import math
from contextlib import contextmanager

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from models import SIZES, dense_stats, eager_lse, eager_maps, llama, qwen3
from torch.library import _scoped_library
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rhythm_kernels import collect, reference
from rhythm_kernels.listen.backend_lse import EFFICIENT, FUSED_OPS, LseReader, row_pass
from rhythm_kernels.statistics.layout import make_layout

TOKENS = 70
CPU_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
CUDNN = "aten::_scaled_dot_product_cudnn_attention"
UNASKED = row_pass("asking the operator for it may change its output")
ATEN = [name for name in FUSED_OPS if name.startswith("aten")]


def inputs_of(kind: str):
    """Returns (arguments of a forward, rows [B, T], segments [B, T])."""
    torch.manual_seed(2)
    batch, position = 1 if kind == "packed" else 3, torch.arange(TOKENS)
    inputs, bounds = {"input_ids": torch.randint(0, 61, (batch, TOKENS))}, None
    real = torch.ones(batch, TOKENS, dtype=torch.bool)
    if kind == "packed":
        lengths = [20, 1, 33, 16]
        inputs |= {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "use_cache": False}
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    elif kind != "full":
        lengths = torch.tensor([TOKENS, 41, 23])[:, None]
        real = position < lengths if kind == "right" else position >= TOKENS - lengths
        inputs["attention_mask"] = real.long()
    rows = real & (torch.rand(batch, TOKENS) < 0.7)
    mask = None if kind == "packed" else real
    return inputs, rows, reference.segment_ids(batch, TOKENS, mask, bounds)


def assert_lse_of_eager(model, inputs, rows, stats):
    exact = eager_lse(model, **inputs)
    for layer, found in stats.items():
        here = rows[:, None].expand_as(exact[layer])
        torch.testing.assert_close(found.lse.double()[here], exact[layer][here], rtol=1e-6, atol=2e-6)
        assert (found.lse[~here] == 0).all()


@pytest.mark.parametrize("make", [llama, qwen3])
@pytest.mark.parametrize("kind", ["full", "left", "right", "packed"])
def test_sdpa(make, kind):
    torch.manual_seed(1)
    model = make("sdpa")
    inputs, rows, _ = inputs_of(kind)
    for grad_mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with grad_mode():
            plain = model(**inputs).logits
            with collect(model, response_mask=rows) as c:
                assert torch.equal(model(**inputs).logits, plain)
        assert c.lse_sources == dict.fromkeys(c.layers, CPU_FLASH)
        assert_lse_of_eager(model, inputs, rows, c.stats)


def test_what_has_no_lse_takes_the_row_pass():
    torch.manual_seed(1)
    inputs, rows, _ = inputs_of("left")
    eager, sdpa = llama("eager"), llama("sdpa")
    with torch.no_grad(), collect(eager, response_mask=rows) as c:
        eager(**inputs)
    assert c.lse_sources == dict.fromkeys(c.layers, row_pass("eager runs no operator that is known"))
    assert_lse_of_eager(eager, inputs, rows, c.stats)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), collect(sdpa, response_mask=rows) as c:
        sdpa(**inputs)
    assert c.lse_sources == dict.fromkeys(c.layers, row_pass("sdpa runs no operator that is known"))


def test_the_row_pass_can_be_asked_for():
    torch.manual_seed(1)
    model = llama("sdpa")
    inputs, rows, _ = inputs_of("left")
    with torch.no_grad(), collect(model, response_mask=rows, lse="own") as c:
        model(**inputs)
    assert c.lse_sources == dict.fromkeys(c.layers, row_pass('lse="own"'))
    assert_lse_of_eager(model, inputs, rows, c.stats)
    with pytest.raises(ValueError, match="lse must be one of"):
        collect(model, lse="mine")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.slow
def test_flex_attention():
    """transformers does not ask FlexAttention for its log-sum-exp on a CPU."""
    torch.manual_seed(1)
    model = llama("flex_attention")
    inputs, rows, segments = inputs_of("full")
    maps = eager_maps(model, **inputs)
    for stance in ("default", "force_eager"):
        with torch.no_grad(), torch.compiler.set_stance(stance):
            plain = model(**inputs).logits
            with collect(model, response_mask=rows) as c:
                assert torch.equal(model(**inputs).logits, plain)
        assert c.lse_sources == dict.fromkeys(c.layers, row_pass("flex_attention runs no operator that is known"))
        for layer, stats in c.stats.items():
            for found, exact in zip(stats, dense_stats(maps[layer], rows, segments, 3)):
                torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5)


# ---- kernels that need a GPU -----------------------------------------------------------------------------------------


def random_qk(batch=2, heads=6, key_heads=6, tokens=TOKENS, size=16):
    torch.manual_seed(5)
    q, k = torch.randn(batch, heads, tokens, size), torch.randn(batch, key_heads, tokens, size)
    return q, k, make_layout(batch, tokens, q.device)


def attention_lse(q, k, **options):
    return reference.attention_map(q, k, torch.zeros(len(q), q.shape[2]), **options)[1].float()


@contextmanager
def gpu_operator(name: str):
    """Gives the CUDA operator a CPU kernel, whose log-sum-exp has the real one's shape; what each call was asked.

    As of another plan, the last bits of cuDNN's output differ where it is asked for the log-sum-exp.
    """
    asked = []

    def kernel(query, key, value, *args, scale=None):
        weights, exact = reference.attention_map(query, key, torch.zeros(len(query), query.shape[2]), scale=scale)
        out, lse = reference.attention_out(weights, value).float(), exact.float()
        empty = lse.new_empty(0)
        asked.append("flash" in name or args[1])
        if "flash" in name:
            return out, lse, empty, empty, TOKENS, TOKENS, empty, empty, empty
        if name == CUDNN:
            if asked[-1]:
                out = out.nextafter(torch.tensor(math.inf))
            return out, lse[..., None] if asked[-1] else empty, empty, empty, TOKENS, TOKENS, empty, empty, empty
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.nan)
        return out, padded if asked[-1] else padded[..., :0], empty, empty

    with _scoped_library("aten", "IMPL") as library:
        library.impl(name.removeprefix("aten::"), kernel, "CPU")
        yield asked


def call_operator(name: str, q, k, asks: bool):
    operator = getattr(torch.ops.aten, name.removeprefix("aten::"))
    args = (q, k, k, None, asks, 0.0, True) if FUSED_OPS[name] else (q, k, k, 0.0, True)
    return operator(*args, scale=0.3)


@pytest.mark.parametrize("name", ATEN)
def test_the_operators_schema(name):
    schema = getattr(torch.ops.aten, name.removeprefix("aten::")).default._schema
    assert schema.returns[1].name in ("logsumexp", "log_sumexp")
    assert schema.arguments[0].name == "query"
    switch = FUSED_OPS[name]
    assert switch is None or switch in [argument.name for argument in schema.arguments]
    assert all(a.name == switch for a in schema.arguments if "log" in a.name)


@pytest.mark.parametrize("model_asks", [False, True])
@pytest.mark.parametrize("name", [name for name in ATEN if name != CPU_FLASH])
def test_sdpa_of_a_gpu(name, model_asks):
    q, k, layout = random_qk()
    with gpu_operator(name) as asked, torch.no_grad():
        plain = call_operator(name, q, k, model_asks)
        with LseReader() as reader:
            read = call_operator(name, q, k, model_asks)
    assert torch.equal(read[0], plain[0]) and len(asked) == 2
    lse, source = reader.lse(q, None, layout)
    if name == CUDNN and not model_asks:
        assert (lse, source) == (None, UNASKED) and read[1].numel() == 0
    else:
        assert source == name and lse.dtype == torch.float32
        torch.testing.assert_close(lse, attention_lse(q, k, scale=0.3), rtol=1e-6, atol=1e-6)


def test_a_single_query_keeps_the_efficient_kernel_that_it_has():
    """Unless asked, that kernel puts the heads of expanded keys in the place of rows."""
    q, k, layout = random_qk(tokens=1)
    with gpu_operator(EFFICIENT) as asked, torch.no_grad(), LseReader() as reader:
        call_operator(EFFICIENT, q, k, False)
    assert asked == [False] and reader.lse(q, None, layout) == (None, UNASKED)


@pytest.fixture
def cudnn_model(monkeypatch):
    """Returns a model with cuDNN's attention, which is asked for a log-sum-exp where SDPA does: for gradients."""

    def attend(module, query, key, value, mask, scaling, **kwargs):
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        asks = torch.is_grad_enabled() and query.requires_grad
        operator = torch.ops.aten._scaled_dot_product_cudnn_attention
        out = operator(query, key, value, None, asks, 0.0, True, scale=scaling)[0]
        return out.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "cudnn", attend)
    torch.manual_seed(1)
    model = llama("sdpa")
    model.config._attn_implementation = "cudnn"
    with gpu_operator(CUDNN) as asked:
        yield model, asked


@pytest.mark.parametrize("lse", ["auto", "own", "model"])
@pytest.mark.parametrize("gradients", [False, True])
def test_cudnn_is_asked_by_gradients_or_by_name(cudnn_model, gradients, lse):
    """Only `lse="model"` makes another plan run; the statistics are those of the eager scores in each case."""
    model, asked = cudnn_model
    inputs, rows, _ = inputs_of("full")
    with torch.set_grad_enabled(gradients):
        plain = model(**inputs).logits
        calls = len(asked)
        with collect(model, response_mask=rows, lse=lse) as c:
            logits = model(**inputs).logits
    assert len(asked) == 2 * calls
    assert torch.equal(logits, plain) == (gradients or lse != "model")
    sources = {"auto": CUDNN if gradients else UNASKED, "own": row_pass('lse="own"'), "model": CUDNN}
    assert c.lse_sources == dict.fromkeys(c.layers, sources[lse])
    assert_lse_of_eager(model, inputs, rows, c.stats)


def test_a_context_that_asks_serves_others(cudnn_model):
    model, asked = cudnn_model
    inputs, rows, _ = inputs_of("full")
    with torch.no_grad(), collect(model, lse="model") as asks, collect(model) as other:
        model(**inputs)
    assert set(asks.lse_sources.values()) == set(other.lse_sources.values()) == {CUDNN}
    assert sum(asked) == len(asks.layers)


def test_flex_attention_of_a_gpu(monkeypatch):
    """transformers returns the log-sum-exp on a GPU: without sinks, in the dtype of the values."""

    def attend(module, query, key, value, mask, scaling, **kwargs):
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), attention_lse(query, key, scale=scaling).to(value.dtype)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flex_attention", attend)
    torch.manual_seed(1)
    model = llama("flex_attention")
    inputs, rows, _ = inputs_of("full")
    with collect(model, response_mask=rows) as c:
        model(**inputs)
    assert c.lse_sources == dict.fromkeys(c.layers, "flex_attention")
    assert_lse_of_eager(model, inputs, rows, c.stats)

    q, k, layout = random_qk()
    sinks = torch.randn(6)
    lse, with_sinks = attention_lse(q, k), attention_lse(q, k, sinks=sinks)
    found, source = LseReader().lse(q, sinks, layout, lse)
    assert source == "flex_attention"
    torch.testing.assert_close(found, with_sinks, rtol=1e-6, atol=1e-6)
    rounded = LseReader(attention="flex_attention").lse(q, None, layout, lse.bfloat16())
    assert rounded == (None, row_pass("flex_attention rounds it to bfloat16"))
    short = LseReader().lse(q, None, layout, lse[:, :, 1:])
    assert short == (None, row_pass(f"its shape is [2, 6, {TOKENS - 1}]"))


def test_what_another_score_may_have_made_is_not_used():
    q, k, layout = random_qk()

    def read(*attend, query=q, sinks=None):
        with LseReader() as reader:
            for call in attend:
                call()
        return reader.lse(query, sinks, layout)

    def sdpa(query=q, key=k):
        scaled_dot_product_attention(query, key, key, is_causal=True)

    def refused(*attend, **options):
        lse, source = read(*attend, **options)
        assert lse is None
        return source.removeprefix(row_pass(""))

    assert read(sdpa)[1] == CPU_FLASH
    assert refused() == "attention runs no operator that is known"
    assert refused(sdpa, sdpa) == "2 calls are not one a packed sequence"
    half = q.bfloat16(), k.bfloat16()
    assert refused(lambda: sdpa(*half)) == "float32 queries were cast to bfloat16"
    assert refused(lambda: sdpa(*half), query=half[0]) == "exponentials of 16 bits on a CPU are coarse"
    assert refused(lambda: sdpa(q[:, :3], k[:, :3])) == f"its shape is [2, 3, {TOKENS}]"
    assert refused(lambda: sdpa(q[:, :, :50], k[:, :, :50])) == "its shape is [2, 6, 50]"
    assert refused(sdpa, sinks=torch.zeros(6)) == "the operator was not given the sinks"
    torch.set_float32_matmul_precision("high")
    try:
        assert refused(sdpa) == "fp32 products are rounded to TF32 or bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def attend_flat(q, k, v, cu_seqlens, scale, window_left, sinks):
    """(out, lse) as FlashAttention has them: [B, T, HQ, D] -> [B, HQ, T], or [tokens, HQ, D] -> [HQ, tokens]."""
    unpadded = q.ndim == 3
    q, k, v = ((x[None] if unpadded else x).transpose(1, 2) for x in (q, k, v))
    bounds = cu_seqlens.long() if unpadded else None
    segments = reference.segment_ids(len(q), q.shape[2], cu_seqlens=bounds)
    window = None if window_left < 0 else window_left + 1
    weights, lse = reference.attention_map(q, k, segments, scale=scale, sliding_window=window, sinks=sinks)
    out, lse = reference.attention_out(weights, v).to(q.dtype).transpose(1, 2), lse.float()
    return (out[0], lse[0]) if unpadded else (out, lse)


FLASH = {
    "FlashAttention 2": ("flash_attn", "_flash_attn_forward", "_flash_attn_varlen_forward"),
    "FlashAttention 2 of the hub": ("_flash_attn2_0a1b2c3", "_flash_attn_forward", "_flash_attn_varlen_forward"),
    "FlashAttention 3": ("flash_attn_3", "_flash_attn_forward", "_flash_attn_forward"),
    "FlashAttention 3 of vLLM": ("_vllm_flash_attn3_0a1b2c3", "fwd", "fwd"),
}


@pytest.fixture(params=FLASH)
def flash_operators(request, monkeypatch):
    """transformers' flash attention calls stand-ins of the real operators, without the arguments that it leaves out."""
    namespace, dense, varlen = FLASH[request.param]
    operators = getattr(torch.ops, namespace)

    def of_batch(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), s_aux=None):
        return getattr(operators, dense)(q, k, v, None, softmax_scale, window_size[0], s_aux)[0]

    def of_tokens(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        window_size=(-1, -1), s_aux=None,
    ):  # fmt: skip
        return getattr(operators, varlen)(q, k, v, cu_seqlens_q, softmax_scale, window_size[0], s_aux)[0]

    functions = of_batch, of_tokens, None, flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    arguments = "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, float scale, int window_size_left, Tensor? s_aux"
    with _scoped_library(namespace, "FRAGMENT") as library:
        for name in {dense, varlen}:
            library.define(f"{name}({arguments}) -> (Tensor, Tensor)")
            library.impl(name, attend_flat, "CPU")
        yield f"{namespace}::{dense}", f"{namespace}::{varlen}"


@pytest.mark.parametrize("kind", ["full", "left", "right", "packed"])
def test_flash_attention(flash_operators, kind):
    torch.manual_seed(1)
    model = qwen3("eager")
    inputs, rows, segments = inputs_of(kind)
    maps = eager_maps(model, **inputs)
    model.config._attn_implementation = "flash_attention_2"  # set_attn_implementation would ask for the package
    with torch.no_grad():
        plain = model(**inputs).logits
        with collect(model, response_mask=rows) as c:
            assert torch.equal(model(**inputs).logits, plain)
    assert c.lse_sources == dict.fromkeys(c.layers, flash_operators[kind != "full"])
    assert_lse_of_eager(model, inputs, rows, c.stats)
    for layer, stats in c.stats.items():
        exact = dense_stats(maps[layer], rows, segments, int(segments.max()) + 1)
        for found, true in zip(stats, exact):
            torch.testing.assert_close(found.double(), true, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["full", "left"])
def test_flash_attention_with_sinks(flash_operators, kind):
    torch.manual_seed(1)
    sizes = SIZES | {"num_attention_heads": 6, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = GptOssForCausalLM._from_config(GptOssConfig(**sizes, sliding_window=12), attn_implementation="eager").eval()
    inputs, rows, segments = inputs_of(kind)
    maps = eager_maps(model, **inputs)
    model.config._attn_implementation = "flash_attention_2"
    with torch.no_grad(), collect(model, response_mask=rows) as c:
        model(**inputs)
    assert c.lse_sources == dict.fromkeys(c.layers, flash_operators[kind != "full"])
    for layer, stats in c.stats.items():
        for found, true in zip(stats, dense_stats(maps[layer], rows, segments, 3)):
            torch.testing.assert_close(found.double(), true, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["full", "left", "packed"])
@pytest.mark.parametrize("gradients", [False, True])
def test_flash_attention_4_takes_the_row_pass(kind, gradients, monkeypatch):
    """A function of autograd launches its kernels beside torch's operators, of which none must be read in its place."""

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, cu_seqlens, scale, window_left):
            ctx.set_materialize_grads(False)
            return attend_flat(q, k, v, cu_seqlens, scale, window_left, None)

    def of_batch(q, k, v, softmax_scale=None, causal=False, window_size=(None, None)):
        left = -1 if window_size[0] is None else window_size[0]
        return Attend.apply(q, k, v, None, softmax_scale, left)

    def of_tokens(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, window_size=(None, None),
    ):  # fmt: skip
        left = -1 if window_size[0] is None else window_size[0]
        return Attend.apply(q, k, v, cu_seqlens_q, softmax_scale, left)

    functions = of_batch, of_tokens, None, flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    torch.manual_seed(1)
    model = qwen3("eager")
    inputs, rows, _ = inputs_of(kind)
    model.config._attn_implementation = "flash_attention_4"  # set_attn_implementation would ask for the package
    with torch.set_grad_enabled(gradients):
        plain = model(**inputs).logits
        with collect(model, response_mask=rows) as c:
            assert torch.equal(model(**inputs).logits, plain)
    assert c.lse_sources == dict.fromkeys(c.layers, row_pass("flash_attention_4 runs no operator that is known"))
    assert_lse_of_eager(model, inputs, rows, c.stats)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_kernels_of_a_gpu(name, asks):
    """Outputs keep their bits unless cuDNN is asked, and the log-sum-exp that is read is that of fp64 scores."""
    q, k, _ = random_qk(tokens=300, size=64)
    q, k = q.cuda().bfloat16(), k.cuda().bfloat16()
    with torch.no_grad(), sdpa_kernel(getattr(SDPBackend, f"{name.upper()}_ATTENTION")):
        plain = scaled_dot_product_attention(q, k, k, is_causal=True)
        with LseReader("cuda", asks=asks) as reader:
            read = scaled_dot_product_attention(q, k, k, is_causal=True)
    lse, source = reader.lse(q, None, make_layout(2, 300, q.device))
    if name == "cudnn" and not asks:
        assert (lse, source) == (None, UNASKED)
    else:
        assert source == f"aten::_scaled_dot_product_{name}_attention"
        torch.testing.assert_close(lse.cpu(), attention_lse(q.cpu(), k.cpu()), rtol=0, atol=1e-4)
    if name != "cudnn" or not asks:
        assert torch.equal(read, plain)
