"""`integrations.megatron.collect` on real megatron-core modules on a CPU, against dense fp64 maps and transformers.

`megatron_cases.without_cuda` says what is replaced for want of CUDA.
"""

import pytest
import torch
from megatron_cases import FusedCore, Watched, gpt, megatron_groups, positions
from models import dense_rhythm
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rhythm_kernels import attention_stats, collect, reference
from rhythm_kernels.integrations import megatron

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
TOKENS = 70


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    with megatron_groups():
        yield


def token_ids(batch: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(0, 61, (batch, tokens), generator=torch.Generator().manual_seed(2))


def some(shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.7


def check_layers(c, watched: Watched, response, attention_mask=None, cu_seqlens=None, options=lambda layer: {}):
    """Holds the statistics of each layer, and the rhythm, against the definitions in fp64."""
    segments = reference.segment_ids(*response.shape, attention_mask, cu_seqlens)
    sequences = len(response) if cu_seqlens is None else len(cu_seqlens) - 1
    maps = {}
    for layer in c.layers:
        q, k = watched.inputs[layer]
        maps[layer], _ = reference.attention_map(q, k, segments, **options(layer))
        waad = reference.waad(maps[layer], response, 10)
        torch.testing.assert_close(c.stats[layer].waad.double(), waad, rtol=2e-5, atol=2e-5)
        fai = reference.fai(maps[layer], response, segments, (10, 50))
        torch.testing.assert_close(c.stats[layer].fai.double(), fai, rtol=2e-5, atol=2e-6)
        span = reference.span(maps[layer], response, segments, sequences)
        torch.testing.assert_close(c.stats[layer].span.double(), span, rtol=2e-5, atol=2e-5)
    waad, fai, groups = dense_rhythm(maps, c.layers, response, segments, sequences)
    rhythm = c.rhythm()
    torch.testing.assert_close(rhythm.waad.double(), waad, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(rhythm.fai.double(), fai, rtol=2e-5, atol=2e-6)
    for sequence, group in enumerate(groups):
        for got, expected in zip(rhythm.groups, group, strict=True):
            assert torch.equal(got[sequence], expected)


@pytest.mark.parametrize(
    ("made", "options"),
    [
        ({}, lambda layer: {}),
        ({"num_query_groups": 8}, lambda layer: {}),
        ({"softmax_scale": 0.3}, lambda layer: {"scale": 0.3}),
        ({"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}, lambda layer: {}),
        ({"window_size": (7, 0)}, lambda layer: {"sliding_window": 8}),
        (
            {"window_size": (7, 0), "window_attn_skip_freq": 2},
            lambda layer: {"sliding_window": 8} if (layer + 1) % 2 else {},
        ),
        ({"softmax_type": "off-by-one"}, lambda layer: {"sinks": torch.zeros(8)}),
        ({"core": FusedCore}, lambda layer: {}),
    ],
    ids=["grouped keys", "as many keys", "scale", "layer scaling", "window", "windows", "off by one", "fused"],
)
def test_layers_are_those_of_the_definitions(made, options):
    model, ids, response = gpt(**made), token_ids(), some((2, TOKENS))
    watched = Watched(model)
    with torch.no_grad(), megatron.collect(model, response_mask=response) as c:
        model(ids, positions(ids), None)
    assert c.layers == [2, 3, 4] == sorted(c.stats)
    check_layers(c, watched, response, options=options)
