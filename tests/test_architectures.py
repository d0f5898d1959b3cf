"""`collect` on every architecture: WAAD, FAI and span of each sampled layer against the maps of eager attention."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, LATENT, SIZES
from models import dense_stats

from rhythm_kernels import collect, reference, sampled_layers
from rhythm_kernels.listen.taps import decoder_of, softmax_layers, tap_of

TOKENS = 40
# transformers ends rows of these at the batch's own padding, or has them begin behind it: no packed rows
NO_PACKING = ("Bamba", "FalconH1", "Jamba", "Lfm2", "MiniMax", "Qwen3Next", "Qwen3_5", "OPT")

hybrid = pytest.mark.filterwarnings("ignore:.* is a hybrid")
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def attentions_of(model) -> list[torch.nn.Module]:
    """Returns the attention modules of the layers with a map."""
    softmax = softmax_layers(decoder_of(model))
    return [
        module
        for module in decoder_of(model).modules()
        if "Attention" in type(module).__name__ and getattr(module, "layer_idx", None) in softmax
    ]


@contextmanager
def inputs_kept(model):
    """Records the inputs of each layer's attention inside this block: {layer: [B, T, hidden]}."""
    given = {}

    def keep(module, args, kwargs):
        given.setdefault(module.layer_idx, args[0] if args else kwargs["hidden_states"])

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in attentions_of(model)]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def eager_maps_of(model, given: dict[int, torch.Tensor]):
    """The maps that the model's eager attention makes of these inputs inside this block: {layer: [B, HQ, T, T]}.

    Each layer gets the input that it had before: between two forwards whose last bits differ, a router may send a token
    to other experts, and later layers then have other maps.
    """
    maps = {}

    def put(module, args, kwargs):
        if args:
            return (given[module.layer_idx], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": given[module.layer_idx]}

    def keep(module, _, output):
        if isinstance(output, tuple):
            maps.setdefault(module.layer_idx, output[1])

    implementation = decoder_of(model).config._attn_implementation
    hooks = [module.register_forward_pre_hook(put, with_kwargs=True) for module in attentions_of(model)]
    hooks += [module.register_forward_hook(keep) for module in attentions_of(model)]
    model.set_attn_implementation("eager")
    try:
        yield maps
    finally:
        model.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()


def check(model, inputs: dict, rows: torch.Tensor, segments: torch.Tensor, sequences: int):
    """Holds a collected forward of the model against its own eager maps."""
    with torch.no_grad(), inputs_kept(model) as given, collect(model, response_mask=rows) as c:
        model(**inputs)
    if model.config._attn_implementation == "sdpa":  # which ignores soft-capping: so must the maps
        for module in model.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = None
    with torch.no_grad(), eager_maps_of(model, given) as maps:
        model(**inputs)
    assert sorted(c.stats) == c.layers
    for layer in c.layers:
        expected = dense_stats(maps[layer].cpu(), rows.cpu(), segments, sequences)
        for name, found, exact in zip(("waad", "fai", "span"), c.stats[layer], expected):
            where = f"{name} of layer {layer}: "
            torch.testing.assert_close(found.double().cpu(), exact, rtol=2e-5, atol=2e-5, msg=where.__add__)
    return c


def padded(side: str):
    torch.manual_seed(2)
    ids = torch.randint(3, 61, (3, TOKENS))
    lengths, position = torch.tensor([TOKENS, 31, 17])[:, None], torch.arange(TOKENS)
    real = position < lengths if side == "right" else position >= TOKENS - lengths
    return {"input_ids": ids, "attention_mask": real.long()}, real


@hybrid
@architectures
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_batch(name, attention):
    architecture = ARCHITECTURES[name]
    model = architecture.build("eager")
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no sdpa for it")
    model.set_attn_implementation(attention)
    inputs, real = padded("left")
    c = check(model, inputs, real & (torch.rand(3, TOKENS) < 0.7), reference.segment_ids(3, TOKENS, real), 3)
    softmax = architecture.softmax
    assert c.layers == [softmax[index] for index in sampled_layers(len(softmax))]
    assert not tap_of(c.decoder).listeners


REPRESENTATIVE = ("Bamba", "DeepseekV2", "Gemma2", "GptOss")
IN_TIME = pytest.mark.gpu(not_pretended="Triton's interpreter takes seconds for each architecture")
EACH_ON_A_GPU = [pytest.param(name, marks=() if name in REPRESENTATIVE else IN_TIME) for name in ARCHITECTURES]


@pytest.mark.gpu
@hybrid
@pytest.mark.parametrize("name", EACH_ON_A_GPU)
def test_on_a_gpu(name):
    """The Triton kernels take the log-sum-exp of the GPU's own attention where there is one."""
    model = ARCHITECTURES[name].build("eager").cuda()
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    inputs, real = padded("left")
    inputs, real = {key: value.cuda() for key, value in inputs.items()}, real.cuda()
    check(model, inputs, real, reference.segment_ids(3, TOKENS, real), 3)


def packed():
    lengths = [14, 1, 25]
    torch.manual_seed(3)
    inputs = {
        "input_ids": torch.randint(3, 61, (1, TOKENS)),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "use_cache": False,
    }
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return inputs, reference.segment_ids(1, TOKENS, cu_seqlens=bounds)


@architectures
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences(name, attention):
    architecture = ARCHITECTURES[name]
    if name in NO_PACKING or name == "GptOss":
        pytest.skip("transformers does not keep packed sequences apart in it")
    model = architecture.build(attention)
    inputs, segments = packed()
    check(model, inputs, torch.rand(1, TOKENS) < 0.8, segments, 3)


@hybrid
@pytest.mark.parametrize("name", ["Bamba", "FalconH1", "Jamba", "Lfm2", "MiniMax", "Qwen3Next", "Qwen3_5"])
def test_packed_sequences_of_hybrids_are_refused(name):
    """The state of their other layers goes on from one sequence into the next, which no attention map shows."""
    model, (inputs, _) = ARCHITECTURES[name].build("sdpa"), packed()
    positions = inputs["position_ids"]
    refused = pytest.raises(ValueError, match=r"padded batch for .*Model, got 3 sequences .*, and it goes from one")
    with torch.no_grad():
        with refused, collect(model):
            model(**inputs)
        with pytest.raises(ValueError, match="padded batch"), collect(model, cu_seqlens=torch.tensor([0, 9, TOKENS])):
            model(**inputs | {"position_ids": None})
        with collect(model, cu_seqlens=torch.tensor([0, TOKENS])) as c:  # one sequence has no other before it
            model(**inputs | {"position_ids": torch.arange(TOKENS).expand_as(positions)})
    assert c.rhythm().waad.any()


def test_packed_sequences_that_the_model_does_not_keep_apart_are_refused():
    """transformers 5.19 does not tell gpt-oss's masks where sequences begin."""
    with torch.no_grad(), pytest.raises(ValueError, match="from later tokens or from those of other sequences"):
        inputs, _ = packed()
        model = ARCHITECTURES["GptOss"].build("eager")
        with collect(model):
            model(**inputs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Gemma3", "Mistral", "Phimoe"])
def test_flex_attention(name):
    """Windows are in a BlockMask, soft-capping in a score_mod, sinks not on a CPU. It runs uncompiled, to be quick."""
    model = ARCHITECTURES[name].build("flex_attention")
    inputs, real = padded("left")
    with torch.compiler.set_stance("force_eager"):
        check(model, inputs, real, reference.segment_ids(3, TOKENS, real), 3)


def test_a_block_mask_that_is_no_window_is_refused():
    model = ARCHITECTURES["Llama4"].build("flex_attention")
    model.config.attention_chunk_size = 16
    inputs, _ = padded("left")
    refused = pytest.raises(ValueError, match="layer 2, where token 1[67] of row 0 sees . tokens of 1[78]")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), refused, collect(model):
        model(**inputs)


@pytest.fixture
def flash(monkeypatch):
    """Registers an entry like FlashAttention's: its only mask is that of the padding; it is given window and bounds."""
    table = tap_of(decoder_of(ARCHITECTURES["Llama"].build("eager"))).table

    def attend(module, query, key, value, attention_mask, *, scaling, sliding_window=None, softcap=None, **kwargs):
        assert attention_mask is None or attention_mask.ndim == 2
        batch, heads, tokens, _ = query.shape
        position = torch.arange(tokens)
        distance = position[:, None] - position
        seen = (distance >= 0) & (distance < (sliding_window or tokens))
        bounds = kwargs.get("cu_seq_lens_q")
        position_ids = kwargs.get("position_ids")
        if bounds is None and position_ids is not None and batch == 1:
            bounds = torch.cat([(position_ids[0] == 0).nonzero().flatten(), torch.tensor([tokens])])
        if bounds is not None:
            sequence = torch.searchsorted(bounds[1:].long(), position, right=True)
            seen = seen & (sequence[:, None] == sequence)
        seen = seen.expand(batch, 1, -1, -1)
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None]
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        scores = scaling * query @ k.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        maps = scores.masked_fill(~seen, -1e30).softmax(-1)
        return (maps @ v).transpose(1, 2), None

    monkeypatch.setitem(table._local_mapping, "flash_attention_2", attend)

    def build(name):
        model = ARCHITECTURES[name].build("eager")
        model.config._attn_implementation = "flash_attention_2"
        model.set_attn_implementation = lambda way: setattr(model.config, "_attn_implementation", way)
        return model

    return build


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mistral", "Qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_attention_pads(flash, name, side):
    inputs, real = padded(side)
    check(flash(name), inputs, real, reference.segment_ids(3, TOKENS, real), 3)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mistral"])
@pytest.mark.parametrize("bounds", [False, True])
def test_flash_attention_packs(flash, name, bounds):
    """Rows are packed by position_ids that restart, or by cu_seq_lens_q, which the eager reference does not read."""
    model = flash(name)
    inputs, segments = packed()
    rows = torch.rand(1, TOKENS) < 0.8
    given = dict(inputs)
    if bounds:
        cuts = torch.tensor([0, 14, 15, TOKENS], dtype=torch.int32)
        given |= {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 25, "max_length_k": 25}
    with torch.no_grad(), collect(model, response_mask=rows) as c:
        model(**given)
    expected = check(model, inputs, rows, segments, 3)
    for layer in c.layers:
        assert torch.equal(c.stats[layer].fai, expected.stats[layer].fai)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_token_of_r(attention):
    """This happens where every answer of a micro-batch was cut off and does not count."""
    model = ARCHITECTURES["Mistral"].build(attention)
    inputs, real = padded("left")
    with torch.no_grad(), collect(model, response_mask=torch.zeros_like(real)) as c:
        model(**inputs)
    assert not c.rhythm().waad.any() and not c.rhythm().fai.any()


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_a_hybrid_says_so():
    model = ARCHITECTURES["Qwen3Next"].build("sdpa")
    with pytest.warns(
        UserWarning, match=r"Qwen3NextModel is a hybrid: only 2 of its 6 layers .* layers \[2, 5\]"
    ) as found:
        assert collect(model).layers == [2, 5]
    assert found[0].filename == __file__
    with pytest.raises(ValueError, match=r"layers with causal softmax attention, \[2, 5\] of this model, got \[3\]"):
        collect(model, layers=[2, 3])
    assert collect(model, layers=[-1]).layers == [5]


def test_a_model_without_softmax_attention_is_refused():
    config = transformers.MambaConfig(vocab_size=61, hidden_size=48, num_hidden_layers=2, state_size=4)
    with pytest.raises(ValueError, match=r"layers go through the attention interface .*, got MambaForCausalLM"):
        collect(transformers.MambaForCausalLM(config))
    bloom = transformers.BloomConfig(vocab_size=61, hidden_size=48, n_layer=2, n_head=6)
    with pytest.raises(ValueError, match=r"layers go through the attention interface .*, got BloomForCausalLM"):
        collect(transformers.BloomForCausalLM(bloom))


# ---- what cannot be right --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sparse_indexer_is_refused_where_it_leaves_tokens_out(attention):
    config = transformers.DeepseekV32Config(**SIZES | LATENT, index_topk=16, index_head_dim=8, index_n_heads=2)
    model = transformers.DeepseekV32ForCausalLM._from_config(config, attn_implementation=attention).eval()
    ids = torch.randint(3, 61, (1, TOKENS))
    with torch.no_grad(), pytest.raises(ValueError, match="every earlier token or in a sliding window"), collect(model):
        model(ids)
    with torch.no_grad(), collect(model) as c:
        model(ids[:, :16])
    assert (c.rhythm().waad > 0).any()


@pytest.mark.parametrize("bias", [0.0, 0.01])
def test_scores_with_a_bias_are_refused_where_it_changes_them(flash, bias):
    model, (inputs, _) = flash("Llama"), padded("left")
    table = tap_of(decoder_of(model)).table
    plain = table["flash_attention_2"]

    def biased(module, query, key, value, mask, *, position_bias, **kwargs):
        # a column of ones and one of the bias times the position: q k^T plus the bias of each key
        ones = torch.ones_like(query[..., :1]) / kwargs["scaling"]
        slope = position_bias * torch.arange(key.shape[2])[:, None].expand_as(key[..., :1])
        query, key = torch.cat([query, ones], -1), torch.cat([key, slope], -1)
        return plain(module, query, key, value, mask, **kwargs)

    table["flash_attention_2"] = biased
    with torch.no_grad(), nullcontext() if bias == 0 else pytest.raises(ValueError, match="given position_bias"):
        with collect(model) as c:
            c.decoder(**inputs, position_bias=torch.tensor(bias))
        assert c.rhythm().waad.any()


@pytest.mark.parametrize("origin", ["deepspeed.runtime.sequence_parallel.ulysses_sp", "ring_flash_attn.adapters"])
def test_sequence_parallel_attention_is_refused(flash, origin):
    model = flash("Llama")
    tap_of(decoder_of(model)).table["flash_attention_2"].__module__ = origin
    inputs, _ = padded("left")
    with torch.no_grad(), pytest.raises(ValueError, match=f"{origin} computes attention over shards"), collect(model):
        model(**inputs)


def test_shards_are_refused():
    model = ARCHITECTURES["Llama"].build("sdpa")
    ids = torch.randint(3, 61, (1, TOKENS))
    with (
        torch.no_grad(),
        pytest.raises(
            ValueError, match="position_ids that begin at 40: ranks that share a sequence are named by parallel="
        ),
        collect(model),
    ):
        model(ids, position_ids=torch.arange(TOKENS)[None] + TOKENS)
    zigzag = torch.cat([torch.arange(20), torch.arange(60, 80)])[None]
    with (
        torch.no_grad(),
        pytest.raises(
            ValueError, match=r"restart at 0, got 60 after \d+ at token \d+: padding is a sequence too, and ranks"
        ),
        collect(model),
    ):
        model(ids, position_ids=zigzag, use_cache=False)
    model.model.config.num_attention_heads = 12  # as if this rank had half of them
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="12 query heads, got 6 in layer 2: .* another rank"),
        collect(model),
    ):
        model(ids)


def test_image_positions():
    model = ARCHITECTURES["Llama"].build("sdpa")
    ids = torch.randint(3, 61, (1, TOKENS))
    text = torch.arange(TOKENS).expand(3, 1, -1)
    mixed = text.clone()
    mixed[1] //= 2
    refused = pytest.raises(ValueError, match=r"position_ids must be of text .* got \[3, 1, 40\] with positions in im")
    with torch.no_grad(), refused, collect(model):
        model(ids, position_ids=mixed)
    c = collect(model)
    with c:
        c._before_forward(c.decoder, (ids,), {"position_ids": text})
    assert c.layout.sequences == 1


# ---- wrappers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped_ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def wrapped_fsdp2(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrapped_peft(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("wrap", [wrapped_ddp, wrapped_fsdp2, wrapped_peft])
def test_wrapped_models(one_rank, wrap):
    inputs, real = padded("left")
    with torch.no_grad(), collect(ARCHITECTURES["Llama"].build("sdpa"), response_mask=real) as c:
        c.decoder(**inputs)
    expected = c.rhythm()
    model = wrap(ARCHITECTURES["Llama"].build("sdpa"))
    with torch.no_grad(), collect(model, response_mask=real) as c:
        model(**inputs)
    assert torch.equal(c.rhythm().waad, expected.waad) and torch.equal(c.rhythm().fai, expected.fai)
    assert not c.decoder._forward_pre_hooks or wrap is wrapped_fsdp2


def test_lora_changes_the_rhythm_with_its_adapter():
    model = wrapped_peft(ARCHITECTURES["Llama"].build("sdpa"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    inputs, real = padded("left")
    check(model, inputs, real, reference.segment_ids(3, TOKENS, real), 3)
    with torch.no_grad(), collect(model) as with_adapter:
        model(**inputs)
    with torch.no_grad(), model.disable_adapter(), collect(model) as without:
        model(**inputs)
    assert not torch.allclose(with_adapter.rhythm().fai, without.rhythm().fai, atol=1e-3)
