"""Small random transformers models, and their rhythm computed densely from `output_attentions`."""

from contextlib import contextmanager

import torch
from torch.nn.functional import softmax
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rhythm_kernels import reference

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # large, so that attention is far from uniform; scores stay below 10, where eager's own maps are good to 1e-6
    "initializer_range": 0.15,
}


def llama(attention: str = "sdpa", **sizes):
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZES | sizes), attn_implementation=attention).eval()


def qwen3(attention: str = "sdpa", **sizes):
    config = Qwen3Config(**SIZES | sizes, head_dim=16, use_sliding_window=True, sliding_window=12, max_window_layers=3)
    return Qwen3ForCausalLM._from_config(config, attn_implementation=attention).eval()


@contextmanager
def eager(model):
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.config._attn_implementation = implementation  # the method would look for flash attention's package


@torch.no_grad()
def eager_maps(model, **inputs) -> tuple[torch.Tensor, ...]:
    """The maps of every layer, [B, HQ, T, T] each, that transformers' eager attention materializes."""
    with eager(model):
        return model(**inputs, output_attentions=True).attentions


@torch.no_grad()
def eager_lse(model, **inputs) -> list[torch.Tensor]:
    """The log-sum-exp of the masked scores that transformers' eager attention makes, [B, HQ, T] of each layer."""
    layers = []

    class Scores(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is softmax and args[0].ndim == 4:
                layers.append(args[0].double().logsumexp(-1))
            return func(*args, **(kwargs or {}))

    with eager(model), Scores():
        model(**inputs)
    return layers


def dense_stats(attention, rows, segments, sequences, window=10, horizon=(10, 50)):
    """(waad, fai, span) of one layer's maps, in fp64."""
    attention = attention.double()
    return (
        reference.waad(attention, rows, window),
        reference.fai(attention, rows, segments, horizon),
        reference.span(attention, rows, segments, sequences),
    )


def dense_rhythm(maps, layers, rows, segments, sequences, per_batch=False, window=10, horizon=(10, 50)):
    """(waad [B, T], fai [B, T], groups of each sequence) by Eq. 7-10 from whole maps, one sequence at a time."""
    stacked = torch.stack([maps[layer].double() for layer in layers], 1)  # [B, L, HQ, T, T]
    waad, fai = torch.zeros(rows.shape, dtype=torch.float64), torch.zeros(rows.shape, dtype=torch.float64)
    spans = torch.stack([reference.span(maps[layer].double(), rows, segments, sequences) for layer in layers], 1)
    if per_batch:
        tokens = torch.stack([(rows & (segments == s)).sum() for s in range(sequences)]).double()
        spans = ((spans * tokens[:, None, None]).sum(0) / tokens.sum()).expand(sequences, -1, -1)
    groups = []
    for s in range(sequences):
        group = reference.group_heads(spans[s])
        groups.append(group)
        here = segments == s
        for b in here.any(-1).nonzero().flatten().tolist():
            means = [stacked[b][member].mean(0)[None, None] for member in group]
            part = here[b : b + 1]
            ids = segments[b : b + 1]
            waad[b][part[0]] = reference.waad(means[0], rows[b : b + 1] & part, window)[0, 0][part[0]]
            fai[b][part[0]] = reference.fai(means[1], rows[b : b + 1] & part, ids, horizon)[0, 0][part[0]]
    return waad, fai, groups
