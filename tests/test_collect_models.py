"""Models and wrappers that people use: packed rows, own attention, encoder-decoders, images, PEFT.

Each is right, against the maps that its attention function really uses, or refused with the reason.
"""

import warnings

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from collect_cases import TOKENS, assert_right, ids_of, refused
from flash_stand_in import flash_attention
from models import SIZES, llama, qwen3
from own_maps import own_maps
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rhythm_kernels import collect, reference, sampled_layers
from rhythm_kernels.listen.taps import layers_of

MISMATCH = "does not attend as collect assumes"


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
    with torch.no_grad(), refused("past_key_values of 4 tokens: .*prefix tuning always passes one"), collect(model):
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
