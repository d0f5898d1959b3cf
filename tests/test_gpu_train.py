"""Compares attention over packed rows on a GPU, torch's variable-length kernel, with transformers' and torch's own."""

import pytest
import torch
from models import llama

import train.attention
from benchmarks.pretended_cuda import is_pretended
from rhythm_kernels import collect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (5, 31, 1, 40) if is_pretended() else (5, 131, 1, 200)


def packed(device: str = "cuda") -> dict:
    ids = torch.randint(61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0)).to(device)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(device)
    return {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": bounds, "max_length_q": max(LENGTHS)}


def model_of(attention: str, dtype: torch.dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.06}
    return llama(attention, **sizes).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_attention_is_that_of_each_sequence(dtype):
    """It is at most twice as far from the float32 model as transformers' sdpa in the same dtype, plus rounding."""
    exact, rounded, ours = model_of("sdpa", torch.float32), model_of("sdpa", dtype), model_of("packed", dtype)
    inputs = packed()
    with torch.no_grad():
        parts = inputs["input_ids"].split(LENGTHS, 1)
        want, plain = (torch.cat([m(p, use_cache=False).logits[0] for p in parts]).float() for m in (exact, rounded))
        got = ours(**inputs, use_cache=False).logits[0].float()
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max() + torch.finfo(dtype).eps


def test_gradients_reach_every_parameter():
    ours, rounded = model_of("packed", torch.bfloat16), model_of("sdpa", torch.bfloat16)
    inputs = packed()
    ours(**inputs, use_cache=False).logits.float().square().mean().backward()
    logits = [rounded(part, use_cache=False).logits for part in inputs["input_ids"].split(LENGTHS, 1)]
    torch.cat(logits, 1).float().square().mean().backward()
    for mine, other in zip(ours.parameters(), rounded.parameters(), strict=True):
        assert (mine.grad - other.grad).norm() <= 0.05 * other.grad.norm()


def test_statistics_read_its_log_sum_exp():
    model, inputs = model_of("packed", torch.bfloat16), packed()
    with torch.no_grad(), collect(model, layers=[1, 4], horizon=(2, 9)) as own:
        model(**inputs, use_cache=False)
    model.set_attn_implementation("eager")
    with torch.no_grad(), collect(model, layers=[1, 4], horizon=(2, 9)) as itself:
        model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
    assert set(own.lse_sources.values()) == {"torch_attn::_varlen_attn"}
    torch.testing.assert_close(own.stats[1].lse, itself.stats[1].lse, rtol=0, atol=0.05)
    torch.testing.assert_close(own.stats[1].waad, itself.stats[1].waad, rtol=0, atol=0.2)


def test_the_kernel_takes_what_packed_attention_gives_it():
    """A sliding window of 7 tokens is compared with torch's attention of each sequence with a mask."""
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, sum(LENGTHS), 64, generator=draw, device="cuda", dtype=torch.bfloat16)
        for heads in (6, 2, 2)
    )
    bounds = packed()["cu_seq_lens_q"]
    options = {"scaling": 0.1, "sliding_window": 7, "cu_seq_lens_q": bounds, "max_length_q": max(LENGTHS)}
    got, _ = train.attention.packed_attention(torch.nn.Module(), q, k, v, None, **options)
    want = train.attention._one_by_one(q.float().cpu(), k.float().cpu(), v.float().cpu(), bounds.tolist(), 0.1, 7)
    torch.testing.assert_close(got.float().cpu(), want, rtol=0, atol=0.03)
