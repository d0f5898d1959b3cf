"""`read` and `mean_maps` against whole maps of eager attention, in fp64."""

import math

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from models import dense_rhythm, dense_stats, eager_maps, llama, qwen3
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ByT5Tokenizer

from rhythm_kernels import HeadGroups, reference
from rhythm_kernels.analysis.maps import mean_maps
from rhythm_kernels.analysis.reading import read
from rhythm_kernels.analysis.receivers import FEWEST_ROWS, column_moments, counted_columns, receiver_heads
from rhythm_kernels.analysis.sources import begins_with_bos, encode_prompt, generate, load, sequence_of, token_texts

TOKENS, PROMPT = 96, 17
TO_THE_END = (1, None)
MODELS = {"llama": llama, "qwen3, sliding": qwen3}  # the second with windows of 12 in its upper half
NEAR = {"rtol": 1e-4, "atol": 2e-6}

models = pytest.mark.parametrize("name", MODELS)


def sequence(name: str):
    """Returns (model, ids [T], response [T])."""
    torch.manual_seed(0)
    model = MODELS[name]()
    ids = torch.randint(61, (TOKENS,))
    return model, ids, torch.arange(TOKENS) >= PROMPT


class Dense:
    """Computes everything that a Reading holds from whole maps in fp64."""

    def __init__(self, model, ids, response, sampled: list[int]):
        self.rows, self.segments = response[None], torch.zeros(1, len(ids), dtype=torch.long)
        self.maps = [attention.double() for attention in eager_maps(model, input_ids=ids[None])]
        self.waad, self.credit_fai, (self.groups,) = dense_rhythm(self.maps, sampled, self.rows, self.segments, 1)
        stacked = torch.stack([self.maps[layer][0] for layer in sampled])  # [l, HQ, T, T]
        self.local_map, self.global_map = (stacked[group].mean(0) for group in self.groups)
        self.fai = self._fai(self.global_map)
        stats = [dense_stats(layer, self.rows, self.segments, 1, horizon=TO_THE_END) for layer in self.maps]
        self.columns = torch.cat([fai for _, fai, _ in stats])  # [L, HQ, T]
        self.spans = torch.cat([span for *_, span in stats])

    def _fai(self, attention):
        return reference.fai(attention[None, None], self.rows, self.segments, TO_THE_END)[0, 0]

    def receiver_fai(self, receivers):
        heads = [layer[0][row] for layer, row in zip(self.maps, receivers, strict=True)]
        return self._fai(torch.cat(heads).mean(0))


def kurtosis(columns: np.ndarray) -> np.ndarray:
    """scipy.stats.kurtosis(columns, axis=-1, fisher=True, bias=True)."""
    away = columns - columns.mean(-1, keepdims=True)
    return (away**4).mean(-1) / (away**2).mean(-1) ** 2 - 3.0


def close(got, expected, **near):
    torch.testing.assert_close(got.double(), expected.double(), **(NEAR | near))


@models
def test_every_number_equals_that_of_whole_maps(name):
    model, ids, response = sequence(name)
    reading = read(model, ids, response, layers=4, receivers=5)
    dense = Dense(model, ids, response, reading.sampled)

    assert reading.sampled == reference.sampled_layers(6, 4) and reading.layers == list(range(6))
    assert reading.tokens == TOKENS
    assert torch.equal(reading.ids, ids) and torch.equal(reading.response, response)
    for group, expected in zip(reading.groups, dense.groups, strict=True):
        assert torch.equal(group, expected)
    close(reading.waad, dense.waad[0], atol=2e-5)
    close(reading.fai, dense.fai)
    close(reading.credit_fai, dense.credit_fai[0])
    close(reading.spans, dense.spans, atol=2e-5)
    assert reading.waad[response].min() > 0 and reading.waad[~response].eq(0).all()

    counted = response & (torch.arange(TOKENS) + 1 + FEWEST_ROWS <= TOKENS)
    close(reading.kurtosis, torch.from_numpy(kurtosis(dense.columns[..., counted].numpy())), rtol=1e-4, atol=1e-4)
    top = reading.kurtosis.flatten().sort(descending=True).values
    assert reading.receivers.sum() == 5 and torch.equal(reading.receivers, reading.kurtosis >= top[4])
    close(reading.receiver_fai, dense.receiver_fai(reading.receivers))


@models
def test_selections_are_those_of_the_reference(name):
    model, ids, response = sequence(name)
    reading = read(model, ids, response, receivers=5, min_quantile=0.6)
    rows = response[None]
    for peaks, values in (
        (reading.waad_peaks, reading.waad),
        (reading.fai_peaks, reading.fai),
        (reading.receiver_peaks, reading.receiver_fai),
    ):
        assert torch.equal(peaks[None], reference.find_peaks(values[None], rows, 0.6)) and peaks.any()
    waad, fai = reading.waad[None], reading.credit_fai[None]
    anchors, dominated, intros = reference.coupled_sets(waad, fai, rows)
    assert torch.equal(reading.sets.preplan[None], reference.segment_topq(reference.delta(waad, rows), rows, 0.4))
    assert torch.equal(reading.sets.anchors[None], anchors)
    assert torch.equal(reading.sets.dominated[None], dominated)
    assert torch.equal(reading.sets.intros[None], intros)
    named = reading.sets.intro_of[reading.sets.dominated]
    assert reading.sets.dominated.any() and torch.equal(named.unique(), intros[0].nonzero().flatten())
    assert reading.sets.intro_of[~reading.sets.dominated].eq(-1).all()
    assert torch.equal(reading.gamma[None], reference.gamma("coupled", rows, waad, fai))


@pytest.mark.parametrize("name", ["llama", "Gemma2", "Cohere", "Granite"])
def test_entropy_is_that_of_the_whole_logits(name):
    """The models have soft-capped, scaled up and scaled down logits too."""
    _, ids, response = sequence("llama")
    torch.manual_seed(1)
    if name == "llama":
        model = llama()
    else:
        options = {"Cohere": {"logit_scale": 0.5}, "Granite": {"logits_scaling": 3.0}}
        architecture = ARCHITECTURES[name]
        model = architecture._replace(options=architecture.options | options.get(name, {})).build("sdpa")
    reading = read(model, ids, response, receivers=4)
    with torch.no_grad():
        log_probs = model(ids[None]).logits[0].double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    expected = torch.zeros(TOKENS, dtype=torch.float64)
    expected[response] = entropy[:-1][response[1:]]  # a token was drawn from the logits of the one before
    close(reading.entropy, expected, atol=1e-5)
    assert reading.entropy[response].min() > 0 and reading.entropy.max() < math.log(61)


def test_a_model_in_16_bits_is_read():
    model, ids, response = sequence("llama")
    exact = read(model, ids, response, receivers=4)
    reading = read(model.bfloat16(), ids, response, receivers=4)
    assert reading.waad.dtype == torch.float32
    torch.testing.assert_close(reading.waad, exact.waad, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_bit(dtype):
    torch.manual_seed(0)
    model, ids, answer = llama(), torch.randint(61, (90,)), torch.arange(90) >= 20
    groups = HeadGroups(*(torch.rand(2, 6) < 0.5 for _ in range(2)))

    def tensors():
        signals = read(model, ids, answer, receivers=4), mean_maps(model, ids[None], [2, 3], groups)
        maps = [vars(x) if hasattr(x, "__dict__") else x for x in signals]
        return [x for x in tree_leaves(maps) if isinstance(x, torch.Tensor)]

    expected = tensors()
    torch.set_default_dtype(dtype)
    try:
        got = tensors()
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(got) == len(expected) > 10
    for x, y in zip(got, expected):
        assert x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num())


def test_logits_that_are_made_otherwise_are_refused():
    model, ids, response = sequence("llama")
    model.lm_head.register_forward_hook(lambda _, args, output: 2 * output)
    with pytest.raises(ValueError, match="logits that are its output layer's.*LlamaForCausalLM"):
        read(model, ids, response, receivers=4)


def test_a_hook_that_fails_leaves_nothing_behind():
    model, ids, response = sequence("llama")
    before = len(model.model._forward_hooks)
    with pytest.raises(IndexError):
        read(model, ids.new_full(ids.shape, 10**6), response, receivers=4)
    assert len(model.model._forward_hooks) == before
    read(model, ids, response, receivers=4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ids": torch.zeros(TOKENS)}, "ids must be torch.int64"),
        ({"ids": torch.zeros(1, TOKENS, dtype=torch.long)}, "ids must have shape"),
        ({"response": torch.zeros(TOKENS)}, "response must be torch.bool"),
        ({"response": torch.zeros(TOKENS - 1, dtype=torch.bool)}, "response must have shape"),
        ({"response": torch.zeros(TOKENS, dtype=torch.bool)}, "response must have a token, and not the first, got 0"),
        ({"response": torch.ones(TOKENS, dtype=torch.bool)}, "the first among them"),
        ({"receivers": 0}, "receivers must be between 1 and 36"),
        ({"receivers": 37}, "receivers must be between 1 and 36"),
        ({"layers": [6]}, "layers must be between"),
        ({"min_quantile": 1.5}, "min_quantile"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    model, ids, response = sequence("llama")
    arguments = {"ids": ids, "response": response, "receivers": 4} | change
    with pytest.raises((TypeError, ValueError), match=message):
        read(model, arguments.pop("ids"), arguments.pop("response"), **arguments)


# ---- receiver heads --------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_counted_columns():
    torch.manual_seed(2)
    fai = torch.rand(2, 3, 50) ** 4
    columns = torch.rand(2, 50) < 0.6
    got = column_moments(fai, columns)
    for row in range(2):
        values = fai[row][:, columns[row]].double().numpy()
        assert got.count[row] == columns[row].sum()
        close(got.kurtosis[row], torch.from_numpy(kurtosis(values)), rtol=1e-9, atol=1e-9)


def test_wrong_input_of_heads_and_maps_is_refused():
    model, ids = llama("sdpa"), torch.randint(0, 61, (40,))
    reading = read(model, ids, torch.arange(40) >= 10)
    for wrong in (ids, ids[None].expand(2, -1)):
        with pytest.raises(ValueError, match=r"ids must have shape \[1, T\], got"):
            mean_maps(model, wrong, reading.sampled, reading.groups)
    with pytest.raises(ValueError, match=r"response must have shape \[B, T\], got \[40\]"):
        counted_columns(ids > 3, 1)
    with pytest.raises(TypeError, match="response must be torch.bool, got torch.int64"):
        counted_columns(ids[None], 1)
    kurtosis = column_moments(torch.tensor([[[0.1, 0.2, math.nan]]]), torch.ones(1, 3, dtype=torch.bool)).kurtosis
    assert kurtosis.isnan().all()
    with pytest.raises(ValueError, match="kurtosis must not hold NaN, got 1 of 1"):
        receiver_heads(kurtosis, 1)


def test_equal_columns_and_none_have_a_kurtosis_of_0():
    columns = torch.ones(1, 8, dtype=torch.bool)
    assert column_moments(torch.full((1, 2, 8), 0.25), columns).kurtosis.eq(0).all()
    assert column_moments(torch.rand(1, 2, 8), ~columns).kurtosis.eq(0).all()


def test_columns_count_where_enough_rows_look_back():
    response = torch.arange(100)[None] >= 40
    response[0, 70] = False
    got = counted_columns(response, 4)
    for s in range(100):
        rows = int(response[0, s + 4 :].sum())
        assert got[0, s] == bool(response[0, s] and rows >= FEWEST_ROWS), s


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_whose_states_are_not_finite_is_refused(value):
    model, ids, response = sequence("llama")
    model.model.norm.weight.data[0] = value
    with pytest.raises(ValueError, match="model must have finite states, got NaN or infinity from LlamaForCausalLM"):
        read(model, ids, response, receivers=4)


def test_receiver_heads_break_ties_by_place():
    chosen = receiver_heads(torch.tensor([[1.0, 5.0, 3.0], [3.0, 3.0, 0.0]], dtype=torch.float64), 3)
    assert chosen.tolist() == [[False, True, True], [True, False, False]]


# ---- mean maps -------------------------------------------------------------------------------------------------------


def binned(attention: torch.Tensor, begin: int, end: int, size: int) -> torch.Tensor:
    """Returns a map [T, T] in bins, [bins, bins]: what the rows of one pay to another, averaged over the rows."""
    window = attention[begin:end, begin:end]
    bins = math.ceil(len(window) / size)
    got = torch.zeros(bins, bins, dtype=torch.float64)
    for row in range(bins):
        for column in range(bins):
            block = window[row * size : (row + 1) * size, column * size : (column + 1) * size]
            got[row, column] = block.sum(-1).mean()
    return got


@models
@pytest.mark.parametrize(
    "begin, end, bins, size", [(0, 96, 256, 1), (0, 96, 96, 1), (0, 96, 20, 5), (11, 70, 30, 2), (30, 31, 8, 1)]
)
def test_mean_maps_equal_whole_ones(monkeypatch, name, begin, end, bins, size):
    monkeypatch.setattr("rhythm_kernels.analysis.maps.TILE", 700)  # several tiles, none of which fits a bin
    model, ids, response = sequence(name)
    reading = read(model, ids, response, receivers=4)
    dense = Dense(model, ids, response, reading.sampled)
    maps = mean_maps(model, ids[None], reading.sampled, reading.groups, begin=begin, end=end, bins=bins)
    assert (maps.begin, maps.end, maps.bin) == (begin, end, size) and maps.local_map.dtype == torch.float32
    close(maps.local_map, binned(dense.local_map, begin, end, size))
    close(maps.global_map, binned(dense.global_map, begin, end, size))


@pytest.mark.parametrize("name", ["Gemma2", "GptOss", "Cohere2"])
def test_mean_maps_know_soft_caps_sinks_and_windows(name):
    model = ARCHITECTURES[name].build("eager")
    _, ids, _ = sequence("llama")
    torch.manual_seed(4)
    chosen = torch.rand(2, 2, 6) < 0.5
    layers = [2, 3]
    maps = mean_maps(model, ids[None], layers, HeadGroups(chosen[0], chosen[1]))
    whole = torch.stack([eager_maps(model, input_ids=ids[None])[layer][0].double() for layer in layers])
    close(maps.local_map, whole[chosen[0]].mean(0), atol=1e-5)
    close(maps.global_map, whole[chosen[1]].mean(0), atol=1e-5)


def test_a_group_without_heads_has_an_empty_map():
    model, ids, _ = sequence("llama")
    groups = HeadGroups(torch.zeros(1, 6, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool))
    maps = mean_maps(model, ids[None], [2], groups)
    assert maps.local_map.eq(0).all()
    torch.testing.assert_close(maps.global_map.sum(-1), torch.ones(TOKENS))


@pytest.mark.parametrize("window", [{"begin": -1}, {"begin": 96}, {"end": 97}, {"begin": 5, "end": 5}, {"bins": 0}])
def test_a_window_outside_of_the_sequence_is_refused(window):
    model, ids, _ = sequence("llama")
    groups = HeadGroups(*(torch.ones(1, 6, dtype=torch.bool) for _ in range(2)))
    with pytest.raises(ValueError, match=next(iter(reversed(window)))):
        mean_maps(model, ids[None], [2], groups, **window)


# ---- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returns."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() > x.element_size():  # not expanded
                self.most = max(self.most, x.numel())
        return out


def largest_of(tokens: int, what: str) -> int:
    torch.manual_seed(0)
    model = llama(max_position_embeddings=tokens)
    ids = torch.randint(61, (tokens,))
    groups = HeadGroups(*(torch.rand(2, 6) < 0.5 for _ in range(2)))
    with Largest() as maps:
        if what == "read":
            read(model, ids, torch.arange(tokens) >= 20, receivers=4)
        elif what == "maps":
            mean_maps(model, ids[None], [2, 3], groups)
        else:
            mean_maps(model, ids[None], [2, 3], groups, begin=500, end=756)
    return maps.most


@pytest.mark.usefixtures("open_to_modes")
@pytest.mark.parametrize("what", ["read", "maps", "window"])
def test_no_map_is_held(what):
    tokens = 2048
    short, long = largest_of(tokens // 2, what), largest_of(tokens, what)
    assert long < tokens**2 / 4, f"a tensor of {long:,} elements"
    assert long < 2.2 * short  # with the tokens, not with their square


# ---- sources ---------------------------------------------------------------------------------------------------------

MIXED = "Zwölf Äpfel – 十二個 🍎🍏\n\tend"


def test_token_texts_put_characters_together_from_bytes():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    ids = tokenizer(MIXED, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == MIXED
    assert "�" not in "".join(texts)


def test_token_texts_keep_the_spaces_that_a_text_would_begin_without(tmp_path):
    """The tokenizer is like that of Llama 1 and 2, whose tokens say where a word begins."""
    from tokenizers import Tokenizer, decoders
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    words = ["▁one", "▁two", "s", "<unk>"]
    plain = Tokenizer(tokenizer_models.WordLevel({word: place for place, word in enumerate(words)}, "<unk>"))
    plain.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    assert token_texts(tokenizer, [0, 1, 2, 1]) == ["one", " two", "s", " two"]


def test_a_prompt_has_no_end():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert tokenizer("ab")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encode_prompt(tokenizer, "ab")) == "ab"


def test_generated_answers_end_where_they_should():
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0, padding_side="left")
    model = llama(vocab_size=259, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    prompts = [encode_prompt(tokenizer, text) for text in ("a", "a longer one")]
    steps = []
    answers = generate(model, tokenizer, prompts, max_new_tokens=12, temperature=1.0, progress=steps.append)
    assert len(answers) == 2 and all(0 < len(answer) <= 12 for answer in answers) and sum(steps) <= 12
    alone = generate(model, tokenizer, prompts[:1], max_new_tokens=12)
    together = generate(model, tokenizer, prompts, max_new_tokens=12)
    assert alone[0] == together[0]
    sequence = sequence_of(tokenizer, prompts[0], alone[0], "cpu")
    assert sequence.response.sum() == len(alone[0]) and not sequence.response[: len(prompts[0])].any()
    assert len(sequence.texts) == len(sequence.ids)


@pytest.mark.parametrize(
    "kind, flag, begins", [("llama", None, True), ("llama", False, False), ("gpt2", None, False), ("gpt2", True, True)]
)
def test_a_gguf_file_says_whether_texts_begin_with_a_token(tmp_path, kind, flag, begins):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tokenizer_model(kind)
    if flag is not None:
        writer.add_add_bos_token(flag)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    assert begins_with_bos(tmp_path / "tiny.gguf") is begins


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=r"got '.*absent.gguf': there is no file"):
        load(str(tmp_path / "absent.gguf"))
