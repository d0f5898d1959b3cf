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
megatrons_own = pytest.mark.filterwarnings("ignore::UserWarning:megatron", "ignore::DeprecationWarning:megatron")
pytestmark = [pytest.mark.slow, megatrons_own]  # the import alone takes seconds
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


def hidden_mask(segments: torch.Tensor) -> torch.Tensor:
    """Returns Megatron's mask, True where a key is hidden, [B, 1, T, T]."""
    past = torch.ones(TOKENS, TOKENS).tril().bool()
    return ~(past & (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] >= 0))[:, None]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_read_from_a_mask_that_the_layers_obey(side):
    real = torch.arange(TOKENS) < torch.tensor([TOKENS, 41])[:, None]
    real = real if side == "right" else real.flip(-1)
    model, ids, response = gpt(), token_ids(), some((2, TOKENS)) & real
    watched = Watched(model)
    mask = hidden_mask(reference.segment_ids(2, TOKENS, real))
    with torch.no_grad(), megatron.collect(model, response_mask=response) as c:
        model(ids, positions(ids), mask)
    check_layers(c, watched, response, attention_mask=real)


def test_packing_is_read_from_positions_where_the_mask_keeps_sequences_apart():
    cuts = torch.tensor([0, 20, 21, TOKENS])
    model, ids, response = gpt(), token_ids(1), some((1, TOKENS))
    watched = Watched(model)
    segments = reference.segment_ids(1, TOKENS, cu_seqlens=cuts)
    restarting = torch.cat([torch.arange(n) for n in cuts.diff()])[None]
    with torch.no_grad(), megatron.collect(model, response_mask=response) as c:
        model(ids, restarting, hidden_mask(segments))
    check_layers(c, watched, response, cu_seqlens=cuts)
    with (
        pytest.raises(ValueError, match="token 20 of row 0 sees 1 tokens of 21"),
        torch.no_grad(),
        megatron.collect(model),
    ):
        model(ids, positions(ids), hidden_mask(segments))
    attends = pytest.raises(ValueError, match="does not attend as collect assumes")
    with attends, torch.no_grad(), megatron.collect(model):
        model(ids, restarting, None)


def packed(cuts: torch.Tensor, padded: torch.Tensor | None = None):
    from megatron.core.packed_seq_params import PackedSeqParams

    more = {} if padded is None else {"cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
    longest = int((cuts if padded is None else padded).diff().max())
    return PackedSeqParams("thd", cuts, cuts, max_seqlen_q=longest, max_seqlen_kv=longest, **more)


@pytest.mark.parametrize("with_padding", [False, True], ids=["whole", "padded"])
def test_packed_sequences(with_padding):
    cuts = torch.tensor([0, 20, 21, TOKENS], dtype=torch.int32)
    lengths = torch.tensor([17, 1, 45], dtype=torch.int32) if with_padding else cuts.diff()
    real = torch.cat([torch.arange(room) < n for room, n in zip(cuts.diff(), lengths)])[None]
    params = packed(torch.cat([cuts[:1], lengths.cumsum(0).int()]), cuts) if with_padding else packed(cuts)
    model, ids, response = gpt(core=FusedCore), token_ids(1), some((1, TOKENS))
    watched = Watched(model)
    with torch.no_grad(), megatron.collect(model, response_mask=response) as c:
        model(ids, positions(ids), None, packed_seq_params=params)
    check_layers(c, watched, response & real, cu_seqlens=cuts)
    assert set(c.lse_sources.values()) == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    with torch.no_grad(), megatron.collect(model) as c:
        model(ids, positions(ids), None, packed_seq_params=params)
    check_layers(c, watched, real, cu_seqlens=cuts)


def test_multi_latent_attention_has_values_of_another_size():
    sizes = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 8, "v_head_dim": 8}
    sizes |= {"kv_channels": 8, "num_query_groups": 8, "rope_type": "rope"}
    model = gpt(core=FusedCore, spec={"multi_latent_attention": True}, multi_latent_attention=True, **sizes)
    ids, response, watched = token_ids(), some((2, TOKENS)), Watched(model)
    with torch.no_grad(), megatron.collect(model, response_mask=response) as c:
        model(ids, positions(ids), None)
    assert watched.inputs[2][0].shape == (2, 8, TOKENS, 16)
    scale = model.decoder.layers[0].self_attention.softmax_scale
    check_layers(c, watched, response, options=lambda layer: {"scale": scale})


@pytest.mark.parametrize("core", [None, FusedCore], ids=["own", "fused"])
def test_sixteen_bits(core):
    model = gpt(core=core, bf16=True, params_dtype=torch.bfloat16).bfloat16()
    ids, response, watched = token_ids(), some((2, TOKENS)), Watched(model)
    with torch.no_grad(), megatron.collect(model, response_mask=response) as c:
        model(ids, positions(ids), None)
    for layer in c.layers:
        q, k = watched.inputs[layer]
        alone = attention_stats(q, k, response_mask=response)
        torch.testing.assert_close(c.stats[layer].waad, alone.waad, rtol=0, atol=0)


@pytest.mark.parametrize("core", [None, FusedCore], ids=["own", "fused"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_training_with_dropout_keeps_loss_and_gradients(core, recompute):
    made = {"attention_dropout": 0.2}
    if recompute:
        made |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    model, ids = gpt(core=core, **made).train(), token_ids()
    watched = Watched(model)

    def loss_and_gradient(context):
        model.zero_grad()
        torch.manual_seed(5)
        with context as c:
            loss = model(ids, positions(ids), None, labels=ids).sum()
        loss.backward()
        return c, loss.detach(), model.embedding.word_embeddings.weight.grad.clone()

    _, *alone = loss_and_gradient(torch.enable_grad())
    c, *listened = loss_and_gradient(megatron.collect(model))
    assert all(map(torch.equal, alone, listened))
    check_layers(c, watched, torch.ones(2, TOKENS, dtype=torch.bool))


@torch.no_grad()
def llama_of(model) -> LlamaForCausalLM:
    """Returns a Llama of transformers with a GPTModel's weights."""
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_query_groups,
            rms_norm_eps=config.layernorm_epsilon,
            attn_implementation="eager",
        )
    ).eval()
    heads, keys, size = config.num_attention_heads, config.num_query_groups, config.kv_channels
    llama.model.embed_tokens.weight.copy_(model.embedding.word_embeddings.weight)
    llama.lm_head.weight.copy_(model.output_layer.weight)
    llama.model.norm.weight.copy_(model.decoder.final_layernorm.weight)
    for own, layer in zip(llama.model.layers, model.decoder.layers, strict=True):
        joint = layer.self_attention.linear_qkv.weight.view(keys, heads // keys + 2, size, -1)
        q, k, v = joint[:, :-2], joint[:, -2], joint[:, -1]
        attention = own.self_attn
        for projection, weight in zip((attention.q_proj, attention.k_proj, attention.v_proj), (q, k, v), strict=True):
            projection.weight.copy_(weight.reshape(-1, config.hidden_size))
        attention.o_proj.weight.copy_(layer.self_attention.linear_proj.weight)
        gate, up = layer.mlp.linear_fc1.weight.chunk(2)
        own.mlp.gate_proj.weight.copy_(gate)
        own.mlp.up_proj.weight.copy_(up)
        own.mlp.down_proj.weight.copy_(layer.mlp.linear_fc2.weight)
        own.input_layernorm.weight.copy_(layer.input_layernorm.weight)
        own.post_attention_layernorm.weight.copy_(layer.pre_mlp_layernorm.weight)
    return llama


def test_the_same_weights_in_transformers_give_the_same_rhythm():
    model, ids, response = gpt(), token_ids(), some((2, TOKENS))
    llama = llama_of(model)
    with torch.no_grad(), megatron.collect(model, response_mask=response) as c:
        logits = model(ids, positions(ids), None)
    with torch.no_grad(), collect(llama, response_mask=response) as expected:
        expected_logits = llama(ids).logits
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    maps = llama(ids, output_attentions=True).attentions
    segments = reference.segment_ids(2, TOKENS)
    waad, fai, _ = dense_rhythm([x.detach() for x in maps], c.layers, response, segments, 2)
    for rhythm in (c.rhythm(), expected.rhythm()):
        torch.testing.assert_close(rhythm.waad.double(), waad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rhythm.fai.double(), fai, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, c.rhythm().groups, expected.rhythm().groups))


# ---- what is refused -------------------------------------------------------------------------------------------------


class NarrowCore(FusedCore):
    """Attends in a window that nothing names."""

    def forward(self, query, key, value, *args, **kwargs):
        return super().forward(query, key, torch.cat([value[:1] * 0, value[:-1]]), *args, **kwargs)


def forward_with(model, ids, mask=None, **kwargs):
    with torch.no_grad(), megatron.collect(model):
        model(ids, positions(ids), mask, **kwargs)


def test_what_is_not_causal_self_attention_is_refused():
    from megatron.core.transformer.enums import AttnMaskType

    ids = token_ids()
    with pytest.raises(ValueError, match="does not attend as collect assumes"):
        forward_with(gpt(core=NarrowCore), ids)
    with pytest.raises(ValueError, match="attention_bias must be None, got one in layer 2"):
        forward_with(gpt(core=FusedCore), ids, extra_block_kwargs={"attention_bias": torch.zeros(1)})
    model = gpt(core=FusedCore)
    for layer in model.decoder.layers:
        layer.self_attention.attn_mask_type = AttnMaskType.no_mask
    with pytest.raises(ValueError, match="got attn_mask_type no_mask without a mask in layer 2"):
        forward_with(model, ids)
    params = packed(torch.tensor([0, TOKENS], dtype=torch.int32))
    params.local_cp_size = 2
    with pytest.raises(ValueError, match="leave the context parallel ranks as they are, got 2"):
        forward_with(gpt(core=FusedCore), ids[:1], packed_seq_params=params)
    everything = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    with pytest.raises(ValueError, match="token 0 of row 0 sees 70 tokens of 1"):
        forward_with(gpt(), ids, everything)


def test_a_model_without_a_gpt_model_is_refused():
    with pytest.raises(ValueError, match="model must be a megatron-core GPTModel or a wrapper of one, got Linear"):
        megatron.collect(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a megatron-core GPTModel or a wrapper of one, got list"):
        megatron.collect([gpt()])
    with pytest.raises(ValueError, match="layers"):
        megatron.collect(gpt(), layers=[0, 6])


def test_a_wrapper_is_looked_through_and_hooks_go_with_the_context():
    model = gpt()
    ids = token_ids()
    with torch.no_grad(), megatron.collect(nn.ModuleDict({"chunk": model})) as c:
        model(ids, positions(ids), None)
    c.rhythm()
    cores = [layer.self_attention.core_attention for layer in model.decoder.layers]
    assert not any(core._forward_hooks or core._forward_pre_hooks for core in cores)
    with torch.no_grad(), megatron.collect(model) as c:
        model(ids, positions(ids), None)
        with pytest.raises(RuntimeError, match="collect records one forward"):
            model(ids, positions(ids), None)
