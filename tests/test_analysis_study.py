"""Tests what `rhythm couple`, `perturb` and `value` share: bad input, reports, and the log of a killed run."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
from study_cases import run, tiny_folder, tiny_model
from transformers import ByT5Tokenizer

from rhythm_kernels.analysis import couple, perturb, study, value
from rhythm_kernels.analysis.bootstrap import Estimate
from rhythm_kernels.analysis.resume import Log
from rhythm_kernels.analysis.sources import encode_prompt, end_tokens, layer_names, load
from rhythm_kernels.analysis.study import shown
from train.presets import load_preset
from train.problems import Prompts, stop_ids
from train.words import build_tokenizer

STUDIES = {"couple": couple.main, "perturb": perturb.main, "value": value.main}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Arguments of a study of three problems, whose right answers are never given."""
    folder = tmp_path_factory.mktemp("study")
    task = folder / "task.jsonl"
    task.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": "none"}) + "\n" for n in range(3)))
    return [str(tiny_folder(folder / "model")), "--task", str(task), "--max-new-tokens", "40"]


@pytest.fixture
def unasked(monkeypatch):
    """Fails where the model is asked for an answer."""
    monkeypatch.setattr(study, "answer_prompts", lambda *_, **__: pytest.fail("the model was asked"))


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize(
    "content, message",
    [
        (None, "a file to read, got '{path}': No such file or directory"),
        ("folder", "a file to read, got '{path}': Is a directory"),
        ("", "--task {path} has no problem"),
        ("no JSON", "--task {path}, line 1: not JSON in UTF-8"),
        ('{"question": "a"}\n{"question": 7}', "--task {path}, line 2: question must be a text, got 7"),
        ('{"question": "a", "answer": NaN}', "--task {path}, line 1: answer must be finite, got nan"),
        ('{"question": "a", "answer": -Infinity}', "--task {path}, line 1: answer must be finite, got -inf"),
    ],
    ids=["missing", "a folder", "empty", "no JSON", "no text", "NaN", "infinity"],
)
def test_the_error_of_a_task_file_names_the_flag_and_the_place(setting, unasked, tmp_path, name, content, message):
    path = tmp_path / "problems.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    said = run(STUDIES[name], [*setting, "--task", str(path), "--out", str(tmp_path / "out")])
    assert said.startswith("--task ") and message.format(path=path) in said


@pytest.mark.parametrize("task", ["gym:chess", "gym:chain_sum,terms=2", "gym:chain_sum,max_terms=1", "maths:absent"])
def test_the_error_of_a_named_task_names_the_flag(setting, unasked, tmp_path, task):
    pytest.importorskip("reasoning_gym")
    said = run(couple.main, [*setting, "--task", task, "--out", str(tmp_path / "out")])
    assert said.startswith("--task ") and re.split("[:,]", task)[1] in said


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("layers", ["0,9", "-5,1", "1,1"])
def test_layers_that_the_model_lacks_are_named_before_it_answers(setting, unasked, tmp_path, name, layers):
    said = run(STUDIES[name], [*setting, f"--layers={layers}", "--out", str(tmp_path / "out")])
    assert said.startswith("--layers ") and not (tmp_path / "out").exists()


def test_more_receivers_than_heads_are_named_before_the_model_answers(setting, unasked, tmp_path):
    said = run(couple.main, [*setting, "--receivers", "17", "--out", str(tmp_path / "out")])
    assert said == "--receivers must be between 1 and 16, got 17" and not (tmp_path / "out").exists()


def test_more_alternatives_than_tokens_are_named_before_the_model_answers(setting, unasked, tmp_path):
    said = run(perturb.main, [*setting, "--alternatives", "9999", "--out", str(tmp_path / "out")])
    most = re.fullmatch(r"--alternatives must be between 1 and (\d+), got 9999", said)
    model, tokenizer = load(setting[0])
    assert int(most[1]) == model.config.vocab_size - len(tokenizer.all_special_ids) - 1 > 0
    assert not (tmp_path / "out").exists()


def test_the_end_of_a_prompt_is_the_callers_and_is_refused_where_nothing_reads_it(setting, unasked, tmp_path):
    flags = [*setting, "--prompt-end", " Be brief.", "--out", str(tmp_path / "out")]
    said = run(couple.main, [*flags, "--prompt-format", "paper"])
    assert said == "--prompt-end is read with --prompt-format chat alone, got ' Be brief.'"
    said = run(couple.main, [*setting, "--prompt-format", "chat", "--prompt-end", "\udcff"])
    assert said == "--prompt-end must be valid text, got '\\udcff'"
    path = tmp_path / "maths.jsonl"
    path.write_text('{"problem": "What is 2 + 2?", "answer": "4"}\n')
    said = run(value.main, [*flags, "--task", f"maths:{path}"])
    assert said == f"--prompt-end is not read with --task maths:{path}, whose problems say how to answer"


@pytest.mark.parametrize("flags, end", [([], " Explain step by step."), (["--prompt-end", " Be brief."], " Be brief.")])
def test_a_problem_in_the_chat_template_ends_as_the_caller_says(setting, tmp_path, flags, end):
    args = study.parser_of("value", "", temperature=1.0, batch_size=1).parse_args(
        [*setting, "--prompt-format", "chat", "--out", str(tmp_path), *flags]
    )
    study.check_flags(args, "value")
    with study.Study("value", args) as opened:
        assert sorted(map(opened.text_of, opened.prompts)) == [f"What is {n}?{end}" for n in range(3)]


def test_a_model_that_is_not_there_is_named(tmp_path, monkeypatch):
    (tmp_path / "damaged.gguf").write_bytes(b"no model")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("./absent", "a/b/c", "", "absent.gguf", "damaged.gguf", "./empty"):
        with pytest.raises(ValueError, match=f"the model must be smollm2, a folder, .* got '{re.escape(name)}': "):
            load(name)


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, read, words",
    [
        ("all", [0, 1, 2, 3], "all 4 layers."),
        ("0,2", [0, 2], "layers 0, 2 of 4."),
        ("99", [1, 2], "layers 1, 2 of 4."),
        ("1", [1], "layer 1 of 4."),
    ],
)
def test_the_report_names_the_layers_that_were_read(setting, tmp_path, layers, read, words):
    flags = ["--layers", layers, "--problems", "1", "--shuffles", "5", "--out", str(tmp_path)]
    assert run(couple.main, [*setting, *flags]) is None
    assert json.loads((tmp_path / "report.json").read_text())["layers"] == read
    assert f"WAAD and FAI are those of {words}" in " ".join((tmp_path / "report.md").read_text().split())


def test_layers_have_names():
    assert layer_names([0, 1], [0, 1]) == "all 2 layers" and layer_names([3], [0, 3]) == "layer 3"
    assert layer_names([1, 3], [1, 2, 3]) == "layers 1, 3"


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("couple", ["--without-last", "30", "--shuffles", "5"], "No answer has the 46 tokens that a table without"),
        ("couple", ["--without-last", "8", "--shuffles", "5"], "few others, 3 answers:"),
        ("perturb", ["--positions", "1", "--rollout-tokens", "3"], "are cut off"),
        ("value", ["--continuations", "4"], "No answer is solved, so nothing is said of solved answers."),
    ],
)
def test_no_report_shows_a_number_that_is_not_defined(setting, tmp_path, name, flags, words):
    flags = ["--seed", "1", *flags, "--out", str(tmp_path)]
    assert run(STUDIES[name], [*setting, *flags]) is None
    text = " ".join((tmp_path / "report.md").read_text().split())
    assert words in text.replace("were cut off", "are cut off") and not re.search(r"\b(nan|inf)\b", text)


def test_answers_without_peaks_give_dashes():
    none = np.zeros(20, dtype=bool)
    rows = couple.table_2([couple.Peaks(np.ones(20), np.ones(20), none, none, none)], within=1, shuffles=3, seed=0)
    lines = [line for line in couple.table_of(rows).splitlines()[2:] if "*paper" not in line]
    assert len(lines) == len(rows) and all(line.endswith("| – | – | – | – | – |") for line in lines)


def test_a_word_that_the_tokenizer_lacks_is_named():
    with pytest.raises(ValueError, match="the model's tokenizer does not read the text 'What is 2'"):
        encode_prompt(build_tokenizer(), "What is 2")


def test_a_long_command_is_folded_so_that_a_shell_still_reads_it():
    command = shlex.join(["rhythm", "value", "a" * 130, "--prompt-end", "", *["--prompt", "it is  one"] * 20])
    lines = study.folded(command).split("\n")
    assert len(lines) > 3 and all(line.startswith("    ") and "\\" not in line[:-1] for line in lines)
    assert all(len(line) <= 120 or "aaa" in line for line in lines)
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)
    assert study.folded("rhythm couple") == "    rhythm couple"


def test_what_is_not_defined_is_a_dash():
    nothing = float("nan")
    assert shown(nothing, ".1%") == shown(Estimate(nothing, nothing, nothing)) == "–"
    assert shown(Estimate(0.5, nothing, nothing), ".2f") == "0.50"
    assert shown(0.25, ".1%") == "25.0%" and shown(Estimate(0.5, 0.25, 0.75), ".2f") == "0.50 [0.25, 0.75]"


# ---- the log ---------------------------------------------------------------------------------------------------------


def open_log(path, **settings) -> Log:
    return Log(path, "rhythm couple", {"seed": 0, "model": "m"} | settings)


def test_a_log_gives_back_what_it_was_given(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    with open_log(path) as log:
        first = log.once("a", lambda: {"x": [0.1, 1e-300], "text": "ü\n"})
        with pytest.raises(OSError, match="another process"):
            open_log(path)
        with pytest.raises(ValueError, match="Out of range"):
            log.once("b", lambda: float("nan"))
    with open_log(path) as log:
        assert log.once("a", lambda: 1 / 0) == first and "b" not in log
    content = path.read_bytes()
    for cut in range(len(content)):  # whatever a kill leaves is a beginning
        path.write_bytes(content[:cut])
        with open_log(path) as log:
            assert log.once("a", lambda: {"x": [0.1, 1e-300], "text": "ü\n"}) == first
        assert path.read_bytes() == content


def test_a_log_without_work_binds_nobody(tmp_path):
    path = tmp_path / "log.jsonl"
    open_log(path, seed=1).close()
    with open_log(path, seed=2) as log:
        log.once("a", lambda: 1)
    with open_log(path, seed=2) as log:
        assert "a" in log


def test_what_is_not_this_log_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    with open_log(path) as log:
        log.once("a", lambda: 1)
        log.once("b", lambda: 2)
    content = path.read_text()
    with pytest.raises(ValueError, match=r"seed was 0 and is 1; layers was 'absent' and is 5. Give another --out"):
        open_log(path, seed=1, layers=5)
    with pytest.raises(ValueError, match="the log of rhythm couple, not of rhythm perturb"):
        Log(path, "rhythm perturb", {})
    path.write_text(content.replace('"value": 1', '"value": 3'))
    with pytest.raises(ValueError, match="line 2: damaged, or not of this run"):
        open_log(path)
    path.write_text(content.replace('"value": 2', '"value": 3'))
    with open_log(path) as log:  # the last line may be torn
        assert "a" in log and "b" not in log
    for other in ("notes of mine", "notes\nof mine\n", "[]\n", '{"study": 1}\n'):
        path.write_text(other)
        with pytest.raises(ValueError, match="not the log of a study"):
            open_log(path)
        assert path.read_text() == other


def test_an_answer_ends_where_one_ends_in_the_trainer(tmp_path):
    """At the tokenizer's end, at the model's, and at the end of a turn that the chat template writes."""
    model, tokenizer = tiny_model(vocab_size=270), ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}<|end|>{% endfor %}"
    turn, other = tokenizer.convert_tokens_to_ids("<|end|>"), 7
    for named in (None, other, [other, turn]):
        model.generation_config.eos_token_id = named
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        ends = end_tokens(load(str(tmp_path))[0])
        assert ends == {tokenizer.eos_token_id, turn} | ({other} if named else set())
        stops, chat = stop_ids(str(tmp_path), tokenizer), load_preset("countdown-smoke")
        assert ends == set(Prompts(tokenizer, chat, stops).stops)
        plain = Prompts(tokenizer, chat.change(chat_template=False), stops)
        assert end_tokens(load(str(tmp_path), chat=False)[0]) == set(plain.stops)


def test_a_log_is_of_one_set_of_ends_and_of_one_version(setting, tmp_path, monkeypatch):
    model, out = tmp_path / "model", ["--out", str(tmp_path / "out")]
    shutil.copytree(setting[0], model)
    arguments = [str(model), *setting[1:], "--problems", "1", *out]
    assert run(couple.main, arguments) is None
    monkeypatch.setattr(study, "VERSION", study.VERSION + 1)
    assert f"version was {study.VERSION - 1} and is {study.VERSION}" in run(couple.main, arguments)
    monkeypatch.undo()
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    assert "ends was [1] and is [1, 9]" in run(couple.main, arguments)


def test_a_model_that_gives_nan_is_named_before_it_answers(setting, tmp_path, unasked):
    """Its weights are numbers; what they make of a prompt is not."""
    broken = tiny_model()
    broken.model.norm.weight.data *= 1e38
    broken.lm_head.weight.data *= 1e38
    broken.save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), *setting[1:], "--out", str(tmp_path / "out")]
    said = "model must give logits that are numbers, got NaN or infinity from Qwen3ForCausalLM in torch.float32"
    assert run(couple.main, arguments) == said
