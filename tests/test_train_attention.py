"""Attention over packed sequences against transformers' own, of each sequence alone."""

import pytest
import torch
from models import llama, qwen3

import train.attention
from benchmarks.pretended_cuda import counted, pretended_cuda
from rhythm_kernels import collect

LENGTHS = (5, 31, 1, 20)


def packed_inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": bounds, "max_length_q": max(LENGTHS)}


@pytest.mark.parametrize("make", [llama, qwen3], ids=["full", "sliding-window"])
def test_each_sequence_is_as_alone(make):
    torch.manual_seed(0)
    model = make()
    inputs = packed_inputs()
    expected = [model(ids, use_cache=False).logits[0] for ids in inputs["input_ids"].split(LENGTHS, 1)]
    model.set_attn_implementation(train.attention.NAME)
    got = model(**inputs, use_cache=False).logits[0]
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_each_sequence():
    torch.manual_seed(0)
    model, inputs = llama(), packed_inputs()
    loss = sum(model(ids, use_cache=False).logits.square().sum() for ids in inputs["input_ids"].split(LENGTHS, 1))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    model.set_attn_implementation(train.attention.NAME)
    got = torch.autograd.grad(model(**inputs, use_cache=False).logits.square().sum(), list(model.parameters()))
    for mine, other in zip(got, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that is there need not be pretended")
@pytest.mark.parametrize("make", [llama, qwen3], ids=["full", "sliding-window"])
def test_float32_on_a_gpu_attends_in_one_sequence_at_a_time(make):
    """By torch's kernel for it, which holds no map; FlashAttention takes 16 bits only."""
    torch.manual_seed(0)
    model, inputs = make(train.attention.NAME), packed_inputs()
    expected = model(**inputs, use_cache=False).logits
    loss = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    with pretended_cuda():
        model.to("cuda")
        there = {name: x.to("cuda") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        with counted() as work:
            got = model(**there, sequence_bounds=inputs["cu_seq_lens_q"].tolist(), use_cache=False).logits
        gradients = torch.autograd.grad(got.square().sum(), list(model.parameters()))
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
        for mine, other in zip(gradients, loss, strict=True):
            assert torch.allclose(mine.cpu(), other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    assert not work.waits
    assert "aten::_scaled_dot_product_efficient_attention" in work.launches, work.launches


def test_nothing_of_the_size_of_all_tokens_squared_is_made():
    """4 x 256 tokens: a mask over all of them would have 2^20 entries."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    model = llama("packed")
    bounds = torch.arange(0, 1025, 256).int()
    with torch.no_grad(), Sizes():
        model.model(
            torch.zeros(1, 1024, dtype=torch.long),
            position_ids=(torch.arange(1024) % 256)[None],
            use_cache=False,
            cu_seq_lens_q=bounds,
            max_length_q=256,
        )
    assert max(sizes) < 2**20


def test_statistics_read_its_log_sum_exp():
    """Reads one log-sum-exp a sequence, joined, and gets what the statistics compute by themselves under sdpa."""
    torch.manual_seed(0)
    model, inputs = llama("packed"), packed_inputs()
    rows = torch.rand(1, sum(LENGTHS), generator=torch.Generator().manual_seed(1)) < 0.7
    options = {"layers": [1, 4], "horizon": (2, 9), "response_mask": rows}
    with torch.no_grad(), collect(model, **options) as own:
        model(**inputs, use_cache=False)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), collect(model, **options) as masked:
        model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
    assert set(own.lse_sources.values()) == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    for layer in own.stats:
        for name, got in own.stats[layer]._asdict().items():
            torch.testing.assert_close(got, getattr(masked.stats[layer], name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "cannot do a mask"),
        ({"softcap": 30.0}, "cannot do soft-capping"),
        ({"s_aux": torch.zeros(2)}, "cannot do sinks"),
        ({"dropout": 0.1}, "cannot do dropout"),
        ({"is_causal": False}, "cannot do bidirectional attention"),
        ({"cu_seq_lens_q": None}, "needs one row with cu_seq_lens_q"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_cannot_do_is_refused(options, message):
    q = torch.randn(1, 2, 4, 8)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    arguments = {"attention_mask": None, "cu_seq_lens_q": bounds, "max_length_q": 4, **options}
    with pytest.raises(ValueError, match=message):
        train.attention.packed_attention(torch.nn.Module(), q, q, q, **arguments)
