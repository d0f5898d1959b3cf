"""Problems: which sets are trained on, where a chat template ends an answer, how much room a sequence is given."""

import copy
import re

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from train_cases import ALONE, TOKENIZER, make_policy, settings
from transformers import PreTrainedTokenizerFast, Qwen3Config

from rhythm_kernels.analysis.sources import end_tokens, load
from rhythm_kernels.stops import end_of_turn
from rhythm_kernels.tasks import Problem
from train.config import BadSetting
from train.launch import launch
from train.problems import Prompts, check_fit, check_trains, load_task, stop_ids
from train.rollout import Completion
from train.setup import load_engine, open_run


def chat_template(end: str) -> str:
    """A template that writes `end` after each message."""
    turn = f"<|im_start|>{{{{ message['role'] }}}} {{{{ message['content'] }}}}{end}"
    return f"{{% for message in messages %}}{turn}{{% endfor %}}<|im_start|>assistant "


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer as that of a base model: a text ends with another token than a turn of its chat template."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "user", "assistant", "one", "two", "."]
    model = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="."))
    model.pre_tokenizer = Whitespace()
    marks = {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>", chat_template=template, **marks)


@pytest.mark.parametrize("after, ends", [("<end>", {3}), ("<s>", set()), ("unheard", set()), ("", set())])
def test_what_begins_a_text_or_is_unknown_ends_no_answer(after, ends):
    words = ["user", "<s>", "<unk>", "<end>"]
    model = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    marks = {"bos_token": "<s>", "unk_token": "<unk>", "extra_special_tokens": ["<end>"]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, chat_template=chat_template(f" {after} ").replace("<|im_start|>", "<s>"), **marks
    )
    assert end_of_turn(tokenizer) == ends


@pytest.mark.parametrize("name", ["gsm8k", "math-500", "aime24", "aime25", "amc23", "olympiadbench", "tinyzero-test"])
def test_what_is_to_evaluate_on_is_not_trained_on(name):
    says = (
        f"--train-data must be a set to train on, got {name}, which is to evaluate on; to train on are words, "
        f"countdown, tinyzero, crossthink-qa, dapo-math, dapo-math-en, gsm8k-train, and files: {name}:FILE.jsonl"
    )
    with pytest.raises(BadSetting, match=re.escape(says)):
        load_task(settings(model="m", train_data=name), ALONE)


@pytest.mark.parametrize("name", ["words", "countdown", "gsm8k-train", "dapo-math", "gsm8k:x.jsonl", "maths:x.jsonl"])
def test_sets_to_train_on_and_files_are_taken(name):
    check_trains(name)


@pytest.mark.parametrize(
    "template, changes, stops",
    [
        (chat_template("<|im_end|>"), {}, [0, 2]),
        (chat_template("\n<|im_end|>\n"), {}, [0, 2]),
        (chat_template("<|endoftext|>"), {}, [0]),
        (chat_template(" ."), {}, [0]),  # a word, which answers may have
        (chat_template(""), {}, [0, 1]),  # the next turn's first token
        ("<|im_start|>{{ messages[0]['content'] }}<|im_end|>", {}, [0]),
        ("{{ raise_exception('one turn') if messages|length > 1 else messages[0]['content'] }}", {}, [0]),
        (chat_template("<|im_end|>"), {"chat_template": False}, [0]),
        (None, {}, [0]),
    ],
    ids=["turn", "lines", "text", "word", "nothing", "no-assistant", "refuses-two", "left-out", "no-template"],
)
def test_the_end_of_an_assistants_turn_ends_an_answer(template, changes, stops):
    prompts = Prompts(chat_tokenizer(template), settings(**changes), [0])
    assert prompts.stops == stops
    ids = [5, 6, stops[-1]]
    assert prompts.decode([Completion(ids, [0.0] * 3, "stop")]) == ["one two"]


def test_a_prompt_keeps_the_end_of_its_own_turn():
    prompts = Prompts(chat_tokenizer(chat_template("<|im_end|>")), settings(), [0])
    assert prompts.encode(Problem("one", "", "words")) == [1, 3, 5, 2, 1, 4]


def test_vllm_is_asked_for_the_room_that_was_checked(monkeypatch):
    """Not for that of --max-prompt-length, which may be beyond the positions of the model."""
    asked = []
    monkeypatch.setattr("train.vllm_engine.VLLMEngine", lambda folder, **options: asked.append(options))
    config = settings(model="m", engine="vllm", max_completion_length=24, max_prompt_length=4096)
    prompts = Prompts(TOKENIZER, config, [TOKENIZER.eos_token_id])
    prompts.fitting([Problem("3 5 ? 8 >", "", "words"), Problem("1 2 3 ? 6 >", "", "words")], "--train-data words")
    shape = Qwen3Config(vocab_size=len(TOKENIZER), max_position_embeddings=6 + 24)
    monkeypatch.setattr("train.problems.AutoConfig.from_pretrained", lambda name: shape)
    check_fit("m", prompts, config)
    load_engine("m", None, prompts, config, None)
    assert asked[0]["max_model_len"] == 6 + 24 and asked[0]["stop_ids"] == [TOKENIZER.eos_token_id]


DAMAGED = [
    ("generation_config.json", "no JSON"),
    ("generation_config.json", "[1]"),
    ("generation_config.json", '{"pad_token_id": "x"}'),
    ("generation_config.json", '{"watermarking_config": {"a": 1}}'),
    ("generation_config.json", '{"num_return_sequences": 3}'),
    ("generation_config.json", '{"eos_token_id": 1.5}'),
    ("generation_config.json", '{"eos_token_id": [[1]]}'),
    ("generation_config.json", '{"eos_token_id": [1, null]}'),
    ("config.json", "no JSON"),
    ("config.json", "[1]"),
    ("config.json", '{"model_type": 3}'),
    ("config.json", '{"model_type": "qwen3", "hidden_size": "x"}'),
    ("tokenizer_config.json", "[1]"),
    ("tokenizer.json", "[1]"),
    ("tokenizer.json", "{}"),
    ("model.safetensors", "{}"),
]


@pytest.mark.parametrize("file, holds", DAMAGED)
def test_a_file_of_a_model_that_holds_something_else_is_named_with_the_model(tmp_path, file, holds):
    make_policy().model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / file).write_text(holds)
    config = settings(model=str(tmp_path / "model"), seeds=(0,))
    refused = pytest.raises(BadSetting, match="--model must be a language model that transformers loads, got")
    with refused, open_run(config, tmp_path / "run"):
        pass
    with pytest.raises(ValueError, match="^the model.*got|^eos_token_id must be a token's number or a list of such"):
        load(str(tmp_path / "model"))


def test_tokens_without_a_row_in_the_model_neither_pad_nor_keep_it_from_ending(tmp_path):
    """A tokenizer was given <pad> and an end of its own, and the model no rows for them."""
    model = make_policy().model
    model.save_pretrained(tmp_path / "model")
    rows, end = model.config.vocab_size, TOKENIZER.eos_token_id
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"pad_token": "<fill>", "eos_token": "<over>"})
    assert min(tokenizer.pad_token_id, tokenizer.eos_token_id) >= rows
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(f'{{"eos_token_id": {end}}}')
    config = settings(model=str(tmp_path / "model"), seeds=(0,), max_steps=1, output=str(tmp_path / "run"))
    assert launch(config) == 0
    (tmp_path / "model" / "generation_config.json").write_text(f'{{"eos_token_id": {rows}}}')
    with pytest.raises(BadSetting, match=f"--model must have a row for a token that ends an answer, got {rows} rows"):
        launch(config.change(output=str(tmp_path / "other")))


def test_a_model_without_generation_settings_ends_where_its_configuration_says(tmp_path):
    """As transformers does, and so the studies."""
    model = make_policy().model
    model.config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert stop_ids(str(tmp_path), TOKENIZER) == sorted({7, 9, TOKENIZER.eos_token_id})
    assert end_tokens(load(str(tmp_path))[0]) == {7, 9, TOKENIZER.eos_token_id}
