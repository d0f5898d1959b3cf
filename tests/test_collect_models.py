"""Models and wrappers that people use: encoder-decoders, images, PEFT, removed and repeated layers, own attention.

Each is right, against the maps that its attention function really uses, or refused with the reason.
"""

import copy
import sys
import warnings

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from flash_stand_in import flash_attention
from models import SIZES, dense_stats, llama, qwen3
from own_maps import own_maps
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rhythm_kernels import collect, reference, sampled_layers
from rhythm_kernels.listen.taps import layers_of

TOKENS = 44
MISMATCH = "does not attend as collect assumes"


def assert_right(model, segments=None, rows=None, **inputs):
    """Holds a forward against the model's own maps; returns its collector."""
    with torch.no_grad(), own_maps(model) as own:
        model(**inputs)
    with torch.no_grad(), collect(model, response_mask=rows) as c:
        model(**inputs)
    layout = c.layout
    if segments is None:
        segments = layout.segments.masked_fill(layout.first > layout.last, -1)
    rows = layout.rows if rows is None else rows & (segments >= 0)
    assert sorted(c.stats) == c.layers
    for layer in c.layers:
        exact = dense_stats(own.maps[layer], rows, segments, layout.sequences)
        for got, true in zip(c.stats[layer], exact):
            torch.testing.assert_close(got.double(), true, rtol=2e-5, atol=2e-5)
    return c


def refused(match):
    return pytest.raises(ValueError, match=match)


def ids_of(batch=1, tokens=TOKENS):
    torch.manual_seed(5)
    return torch.randint(3, 58, (batch, tokens))


def restarting(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


# ---- packed rows -----------------------------------------------------------------------------------------------------

LENGTHS = (17, 2, 25)
SEGMENTS = reference.segment_ids(1, TOKENS, cu_seqlens=torch.tensor([0, 17, 19, TOKENS]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["a mask of ones", "a cache"])
def test_packed_rows_that_the_model_does_not_keep_apart_are_refused(attention, how):
    torch.manual_seed(1)
    model, inputs = llama(attention), {"input_ids": ids_of(), "position_ids": restarting(*LENGTHS)}
    if how == "a mask of ones":
        inputs |= {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long), "use_cache": False}
    with torch.no_grad(), refused(f"({MISMATCH}: |sees .* tokens of).* pass use_cache=False"), collect(model):
        model(**inputs)
    alone = torch.zeros(1, TOKENS, dtype=torch.bool)
    alone[:, :17] = True  # the first sequence sees nothing of the others
    assert_right(model, SEGMENTS, alone, **inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [None, True, False])
def test_packed_rows_with_checkpointing_and_no_gradients(use_cache, attention):
    """Versions of transformers differ in whether the masks are made for a cache."""
    torch.manual_seed(1)
    model = llama(attention).train()
    model.gradient_checkpointing_enable()
    inputs = {"input_ids": ids_of(), "position_ids": restarting(*LENGTHS), "use_cache": use_cache}
    try:
        with torch.no_grad(), collect(model):
            model(**inputs)
    except ValueError:
        assert use_cache is not False
        with torch.no_grad(), own_maps(model) as own:
            model(**inputs)
        assert own.maps[2][..., 19:, :17].any(), "it was kept apart"
    else:
        assert_right(model, SEGMENTS, **inputs)


@pytest.mark.parametrize("mask", [None, "ones"])
@pytest.mark.parametrize("make", [llama, qwen3])
def test_flash_attention_keeps_packed_rows_apart_beside_a_mask_of_ones(make, mask):
    torch.manual_seed(1)
    model = make("eager")
    model.config._attn_implementation = "flash_attention_2"
    inputs = {"input_ids": ids_of(), "position_ids": restarting(*LENGTHS)}
    if mask is not None:
        inputs["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.long)
    with flash_attention():
        assert assert_right(model, SEGMENTS, **inputs).layout.sequences == 3


@pytest.mark.parametrize("given", [["cu_seq_lens_q"], ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"]])
def test_bounds_without_their_partners_are_refused(given):
    """transformers needs all four and runs one sequence otherwise."""
    torch.manual_seed(1)
    model = llama("eager")
    model.config._attn_implementation = "flash_attention_2"
    cuts = torch.tensor([0, 17, 19, TOKENS], dtype=torch.int32)
    every = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 25, "max_length_k": 25}
    with flash_attention():
        with torch.no_grad(), refused(f"{MISMATCH}: .* all four of cu_seq_lens_q"), collect(model):
            model(ids_of(), **{name: every[name] for name in given})
        assert_right(model, SEGMENTS, input_ids=ids_of(), **every)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["OPTForCausalLM", "BioGptForCausalLM"])
def test_models_that_never_keep_packed_rows_apart(name, attention):
    torch.manual_seed(1)
    cls = getattr(transformers, name)
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 48} if name.startswith("OPT") else {}
    model = cls._from_config(cls.config_class(**SIZES | sizes), attn_implementation=attention).eval()
    with torch.no_grad(), refused(f"{MISMATCH}|sees .* tokens of"), collect(model):
        model(ids_of(), position_ids=restarting(*LENGTHS), use_cache=False)
    assert_right(model, input_ids=ids_of(2))


# ---- an attention function of one's own ------------------------------------------------------------------------------


@pytest.fixture
def mine(monkeypatch):
    """transformers' sdpa under a name that it makes no mask for."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "mine", ALL_ATTENTION_FUNCTIONS["sdpa"])

    def build(make):
        torch.manual_seed(1)
        model = make("sdpa")
        model.config._attn_implementation = "mine"
        return model

    return build


def test_an_attention_without_a_mask_is_right_where_it_needs_none(mine):
    real = torch.arange(TOKENS) < torch.tensor([[TOKENS], [20]])
    for inputs in ({}, {"attention_mask": torch.ones(2, TOKENS)}, {"attention_mask": real.long()}):
        assert_right(mine(llama), input_ids=ids_of(2), **inputs)


def test_an_attention_without_a_mask_is_refused_where_it_needs_one(mine):
    real = torch.arange(TOKENS) >= torch.tensor([[0], [20]])
    hint = "There is padding, but the attention function was given no mask"
    with torch.no_grad(), refused(f"layer 2 {MISMATCH}: .* of row 1, .*{hint}"), collect(mine(llama)) as c:
        c.decoder(ids_of(2), attention_mask=real.long())
    windows = collect(mine(qwen3), layers=[4])  # a layer with a window, which sdpa alone does not apply
    with torch.no_grad(), refused(f"layer 4 {MISMATCH}"), windows:
        windows.decoder(ids_of(2))


@pytest.mark.parametrize("window", [7, 8, 9])
def test_a_window_that_is_off_by_one_is_refused(window, monkeypatch):
    def attend(module, query, key, value, mask, scaling, sliding_window=None, **kwargs):
        position = torch.arange(query.shape[2])
        distance = position[:, None] - position
        seen = (distance >= 0) & (distance < window)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        maps = (scaling * query @ key.mT).masked_fill(~seen, -torch.inf).softmax(-1)
        return (maps @ value).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "mine", attend)
    torch.manual_seed(1)
    config = transformers.MistralConfig(**SIZES, sliding_window=8)
    model = transformers.MistralForCausalLM._from_config(config).eval()
    model.config._attn_implementation = "mine"
    if window == 8:
        assert_right(model, input_ids=ids_of(2))
        return
    with torch.no_grad(), refused(MISMATCH), collect(model):
        model(ids_of(2))


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_layers_are_counted_as_they_run():
    """Layers are removed, repeated, reordered, merged, with the configuration kept in step and not."""
    for kept in ([0, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 1, 1, 2, 2, 2, 3], [2, 2, 2]):
        for in_step in (True, False):
            torch.manual_seed(1)
            model = llama("sdpa")
            model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in kept)
            if in_step or len(kept) > 6:
                model.config.num_hidden_layers = len(kept)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # it is no hybrid
                c = assert_right(model, input_ids=ids_of(2), use_cache=False)
            assert c.layers == sampled_layers(len(kept))


def test_layers_that_do_not_run_are_named_as_such():
    torch.manual_seed(1)
    model = llama("sdpa")
    model.model.layers[3].forward = lambda hidden_states, **kwargs: hidden_states
    with torch.no_grad(), collect(model) as c:
        model(ids_of())
    with pytest.raises(RuntimeError, match=r"no statistics of layers \[3\]: the forward did not call their attention"):
        c.rhythm()


def test_a_subclass_of_an_attention_is_one():
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Louder(LlamaAttention):
        def forward(self, *args, **kwargs):
            out, maps = super().forward(*args, **kwargs)
            return 1.1 * out, maps

    class Different(LlamaAttention):
        """This is no softmax attention."""

        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states.cumsum(1), None

    torch.manual_seed(1)
    model = llama("sdpa")
    for layer in model.model.layers[::2]:
        layer.self_attn.__class__ = Louder
    assert_right(model, input_ids=ids_of(2))
    model.model.layers[1].self_attn.__class__ = Different
    assert list(layers_of(model.model).attention) == [0, 2, 3, 4, 5]
    with pytest.warns(UserWarning, match="only 5 of its 6 layers have a causal attention map"):
        assert_right(model, input_ids=ids_of(2))


def test_layers_that_run_more_often_than_they_stand_there_are_refused():
    """In a loop over all layers, or where a layer calls its attention twice, no map is known to be the layer's."""
    torch.manual_seed(1)
    model = llama("sdpa")
    attention = model.model.layers[2].self_attn
    once = attention.forward
    attention.forward = lambda *args, **kwargs: once(*args, **kwargs) and once(*args, **kwargs)
    message = "run as often as they stand in the decoder, got call 2 of .* layer 2"
    with torch.no_grad(), refused(message), collect(model, layers=[3]):
        model(ids_of(), use_cache=False)


def test_several_attentions_of_a_layer_are_counted_one_by_one():
    class Pair(torch.nn.Module):
        def __init__(self, layer, second):
            super().__init__()
            self.self_attn, self.second = layer.self_attn, second
            self.mlp, self.norm = layer.mlp, layer.input_layernorm

        def forward(self, hidden_states, **kwargs):
            for attention in (self.self_attn, self.second):
                hidden_states = hidden_states + attention(hidden_states=self.norm(hidden_states), **kwargs)[0]
            return hidden_states + self.mlp(hidden_states)

    torch.manual_seed(1)
    model = llama("sdpa")
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(Pair(layers[i], layers[i + 1].self_attn) for i in (0, 2, 4))
    assert assert_right(model, input_ids=ids_of(2), use_cache=False).layers == sampled_layers(6)


def test_an_attention_keeps_the_eager_function_that_it_names():
    """It is that of a base class where its own file has another. Other towers of a model have theirs."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    module = sys.modules[__name__]
    module.eager_attention_forward = lambda *args, **kwargs: 1 / 0

    class Mine(LlamaAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    try:
        torch.manual_seed(1)
        model = llama("eager")
        plain = model(ids_of(2)).logits
        for layer in model.model.layers:
            layer.self_attn.__class__ = Mine
        with torch.no_grad(), collect(model, layers=[2]):
            assert torch.equal(model(ids_of(2)).logits, plain)
    finally:
        del module.eager_attention_forward
    from transformers.models.llama4 import modeling_llama4

    from rhythm_kernels.listen.taps import _eager_function

    assert _eager_function(modeling_llama4.Llama4VisionAttention) is modeling_llama4.vision_eager_attention_forward
    assert _eager_function(modeling_llama4.Llama4TextAttention) is modeling_llama4.eager_attention_forward


def test_an_entry_that_another_tool_puts_back_does_no_harm():
    torch.manual_seed(1)
    model, table = llama("sdpa"), ALL_ATTENTION_FUNCTIONS
    plain = model(ids_of()).logits
    with torch.no_grad(), collect(model):
        inside = table["sdpa"]
        table["sdpa"] = lambda *args, **kwargs: inside(*args, **kwargs)
        model(ids_of())
    table["sdpa"] = inside  # after the context has ended
    for _ in range(2):
        with torch.no_grad(), collect(model) as c:
            assert torch.equal(model(ids_of()).logits, plain)
        assert c.rhythm().waad.any()
    assert "sdpa" not in table._local_mapping
    with torch.no_grad(), collect(model):
        del table["sdpa"]
    assert torch.equal(model(ids_of()).logits, plain)


def test_a_copy_made_inside_is_not_collected_from():
    torch.manual_seed(1)
    model = llama("sdpa")
    with torch.no_grad(), collect(model) as c:
        other = copy.deepcopy(model)
        other(ids_of())
        model(ids_of())
    expected = assert_right(model, input_ids=ids_of()).rhythm()
    assert torch.equal(c.rhythm().waad, expected.waad)
    other(ids_of()), other(ids_of())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_that_is_recomputed_inside_the_context(reentrant):
    torch.manual_seed(1)
    model = llama("sdpa").train()
    embeds = model.get_input_embeddings()(ids_of(2)).detach().requires_grad_()

    def run(embeds):
        return model(inputs_embeds=embeds, use_cache=False).logits

    with collect(model) as c:
        checkpoint(run, embeds, use_reentrant=reentrant).logsumexp(-1).mean().backward()
    assert torch.equal(c.rhythm().waad, assert_right(model, inputs_embeds=embeds, use_cache=False).rhythm().waad)


def test_removed_heads_are_not_called_shards():
    torch.manual_seed(1)
    model = llama("sdpa")
    attention = model.model.layers[2].self_attn
    attention.q_proj = torch.nn.Linear(48, 32, bias=False)
    attention.o_proj = torch.nn.Linear(32, 48, bias=False)
    attention.num_key_value_groups = 2
    message = "the model's 6 query heads, got 4 in layer 2: layers of several sizes, and heads that another rank holds"
    with torch.no_grad(), refused(message), collect(model):
        model(ids_of())


# ---- encoder-decoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("encoder", "decoder", "encoder_heads"), [(2, 7, 6), (9, 4, 6), (4, 4, 3), (3, 3, 2)])
def test_the_decoder_of_an_encoder_decoder_is_read(encoder, decoder, encoder_heads, attention):
    sizes = {"encoder_layers": encoder, "decoder_layers": decoder, "encoder_attention_heads": encoder_heads}
    sizes |= {"decoder_attention_heads": 6, "d_model": 48, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    torch.manual_seed(1)
    config = transformers.MBartConfig(vocab_size=61, **sizes, init_std=0.2)
    model = transformers.MBartForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    padding = torch.ones(2, 30, dtype=torch.long)
    padding[1, 12:] = 0  # of the encoder's tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = assert_right(model, input_ids=ids_of(2, 30), attention_mask=padding, decoder_input_ids=ids_of(2))
    assert c.layers == sampled_layers(decoder)


@pytest.mark.parametrize("name", ["Bart", "Pegasus", "Marian", "Whisper"])
def test_the_decoder_half_alone(name):
    """Its configuration does not say that it is half of an encoder-decoder."""
    cls = getattr(transformers, f"{name}ForCausalLM")
    sizes = {"encoder_layers": 2, "decoder_layers": 7, "encoder_attention_heads": 4, "decoder_attention_heads": 6}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(1)
    config = cls.config_class(vocab_size=61, d_model=48, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes, **special)
    assert assert_right(cls(config).eval(), input_ids=ids_of(2), use_cache=False).layers == sampled_layers(7)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_decoder_with_biased_scores_is_refused(attention):
    """T5 adds a learned bias of distance to its scores."""
    torch.manual_seed(1)
    config = transformers.T5Config(vocab_size=61, d_model=48, d_kv=8, d_ff=32, num_layers=3, num_heads=6)
    model = transformers.T5ForConditionalGeneration(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.set_attn_implementation(attention)
    with torch.no_grad(), refused(MISMATCH), collect(model):
        model(input_ids=ids_of(1, 20), decoder_input_ids=ids_of())


# ---- images ----------------------------------------------------------------------------------------------------------

TEXT = SIZES | {"head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def gemma3(attention):
    config = transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 12, "query_pre_attn_scalar": 30},
        vision_config=VISION | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=59,
        boi_token_index=58,
        eoi_token_index=60,
    )
    torch.manual_seed(1)
    return transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_alone_in_a_model_of_images(attention):
    model = gemma3(attention)
    text = transformers.Gemma3ForCausalLM._from_config(model.config.text_config, attn_implementation=attention).eval()
    text.model.load_state_dict(model.model.language_model.state_dict())
    real = (torch.arange(TOKENS) >= torch.tensor([[0], [13]])).long()
    for inputs in ({}, {"attention_mask": real}):
        c = assert_right(model, input_ids=ids_of(2), **inputs)
        same = assert_right(text, input_ids=ids_of(2), **inputs)
        assert torch.equal(c.rhythm().waad, same.rhythm().waad)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_image_in_the_prompt(attention):
    """Tokens of the image see each other in both directions: only rows of the answer are causal."""
    model = gemma3(attention)
    ids = ids_of()
    ids[0, 5:11] = torch.tensor([58, 59, 59, 59, 59, 60])
    types = (ids == 59).long()
    torch.manual_seed(2)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": types}
    answer = torch.arange(TOKENS)[None] >= 15
    assert_right(model, rows=answer, **inputs)
    with torch.no_grad(), refused(MISMATCH + "|sees .* tokens of"), collect(model):
        model(**inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_that_look_at_images_are_not_sampled(attention):
    """Mllama skips its cross-attention layers where there is no image."""
    text = TEXT | {"num_hidden_layers": 8, "cross_attention_layers": [2, 3, 5], "pad_token_id": 0}
    del text["head_dim"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.MllamaConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1,
                       "attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 32,
                       "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.MllamaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    with pytest.warns(UserWarning, match="only 5 of its 8 layers have a causal attention map"):
        c = assert_right(model, input_ids=ids_of(2), attention_mask=torch.ones(2, TOKENS, dtype=torch.long))
    assert c.layers == [1, 4, 6] or set(c.layers) <= {0, 1, 4, 6, 7}


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def peft(config, **sizes):
    torch.manual_seed(1)
    return get_peft_model(llama("sdpa", **sizes), config).eval()


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("padded", [False, True])
def test_virtual_tokens_come_before_the_prompt(config, padded):
    model = peft(config(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    real = torch.arange(TOKENS) < torch.tensor([[TOKENS], [30 if padded else TOKENS]])
    rows = torch.nn.functional.pad(real & (torch.arange(TOKENS) >= 12), (4, 0))
    c = assert_right(model, rows=rows, input_ids=ids_of(2), attention_mask=real.long())
    assert c.rhythm().waad.shape == (2, TOKENS + 4)
    short = collect(model, response_mask=rows[:, 4:])
    with torch.no_grad(), refused(r"response_mask must have shape \[2, 48\], got \[2, 44\]"), short:
        model(ids_of(2), attention_mask=real.long())


def test_prefix_tuning_adds_keys_and_is_refused():
    model = peft(PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with torch.no_grad(), refused("44 queries and 48 keys in layer 2|attention_mask"), collect(model):
        model(ids_of(2), attention_mask=torch.ones(2, TOKENS, dtype=torch.long))


def test_a_mask_that_is_no_mask_is_refused():
    model = llama("sdpa")
    for value in (0.5, -1e30):
        mask = torch.ones(1, TOKENS)
        mask[0, :3] = value
        with torch.no_grad(), refused("attention_mask must hold only 0 and 1"), collect(model):
            model(ids_of(), attention_mask=mask)


def test_lora_merged_and_not():
    model = peft(LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    before = assert_right(model, input_ids=ids_of(2)).rhythm()
    after = assert_right(model.merge_and_unload(), input_ids=ids_of(2)).rhythm()
    torch.testing.assert_close(after.waad, before.waad, atol=1e-3, rtol=1e-3)


# ---- every architecture ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* is a hybrid")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_of_every_architecture(name):
    """Places are those of layer_idx where no layer was moved."""
    architecture = ARCHITECTURES[name]
    decoder = collect(architecture.build("eager")).decoder
    layers = layers_of(decoder)
    assert tuple(layers.attention) == architecture.softmax and layers.count == 6
    assert all(module.layer_idx == place for place, module in layers.attention.items())
