"""`rhythm show` on a tiny random model that reads bytes, from its arguments to its files."""

import base64
import json
import re
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM

from rhythm_kernels.analysis import cli, page, show
from rhythm_kernels.analysis.problems import JEWELS
from rhythm_kernels.analysis.reading import read
from rhythm_kernels.analysis.sources import encode_prompt, load, sequence_of

NASTY = "</script><img src=x onerror=alert(1)> <!-- & \u2028 Äpfel 十二 🍎\n"
PROMPT = "Two pens cost "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Returns a folder that from_pretrained reads: a random Qwen3 over bytes, with 24 heads."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=259,
        num_hidden_layers=6,
        head_dim=16,
        eos_token_id=1,
        pad_token_id=0,
        max_position_embeddings=512,
        initializer_range=0.15,
        **sizes,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def answered(tiny, tmp_path_factory):
    """Returns (folder, ShownAnswer) for a given answer and a window."""
    out = tmp_path_factory.mktemp("out")
    arguments = [tiny, "--prompt", PROMPT + NASTY, "--response", NASTY * 4, "--window", "20:90", "--layers", "3"]
    return out, show.show(show.parse([*arguments, "--out", str(out)]))


def data_of(html: str) -> dict:
    got = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert len(got) == 1
    return json.loads(got[0])


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_the_command_answers_and_writes(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert cli.main(["show", tiny, "--prompt", PROMPT, "--max-new-tokens", "40", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    drawn = ("curves", "text", "credit", "maps", "maps-window", "spans")
    files = {"index.html", "reading.json", "reading.npz", *(f"{name}.png" for name in drawn)}
    assert {path.name for path in out.iterdir()} == files
    for name in files:
        assert f"wrote     {out / name}" in said
    for name in drawn:
        picture = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert picture.shape[0] > 100 and picture.std() > 5, f"{name}.png is empty"
    for pattern in (
        r"^model .*6 layers of 4 heads$",
        r"^tokens    14 of prompt, \d+ of answer$",
        r"^WAAD .* on average, \d+ peaks",
        r"^coupled   \d+ preplan tokens, \d+ anchors",
        r"^seconds   load [\d.]+, answer [\d.]+",
    ):
        assert re.search(pattern, said, re.MULTILINE), said


@pytest.mark.slow
def test_the_same_seed_gives_the_same_answer(tiny, tmp_path):
    def ids(seed: int):
        arguments = [tiny, "--prompt", PROMPT, "--max-new-tokens", "24", "--temperature", "1", "--seed", str(seed)]
        return show.show(show.parse([*arguments, "--out", str(tmp_path)])).reading.ids

    assert torch.equal(ids(1), ids(1)) and not torch.equal(ids(1), ids(2))


@pytest.mark.slow
def test_the_numbers_of_the_page_are_those_of_the_reading(tiny, answered):
    folder, shown = answered
    model, tokenizer = load(tiny)
    answer = tokenizer(NASTY * 4, add_special_tokens=False)["input_ids"]
    ids, response, texts = sequence_of(tokenizer, encode_prompt(tokenizer, PROMPT + NASTY), answer, "cpu")
    reading = read(model, ids, response, layers=3, receivers=16, min_quantile=show.PEAK_QUANTILE)
    data = data_of((folder / "index.html").read_text(encoding="utf-8"))

    assert data["texts"] == texts == shown.texts and "".join(texts) == PROMPT + NASTY + NASTY * 4
    assert data["prompt_tokens"] == int((~response).sum()) and data["sampled"] == reading.sampled
    for name, values in (
        ("waad", reading.waad),
        ("fai", reading.fai),
        ("credit_fai", reading.credit_fai),
        ("entropy", reading.entropy),
        ("receiver", reading.receiver_fai),
        ("gamma", reading.gamma),
    ):
        np.testing.assert_allclose(floats(data["values"][name]), values[response].numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(floats(data["spans"]), reading.spans.flatten().numpy(), rtol=1e-4)
    np.testing.assert_allclose(floats(data["kurtosis"]), reading.kurtosis.flatten().numpy(), rtol=1e-4)

    flags = torch.frombuffer(bytearray(base64.b64decode(data["flags"])), dtype=torch.uint8)
    for bit, members in (
        (page.PREPLAN, reading.sets.preplan),
        (page.ANCHORS, reading.sets.anchors),
        (page.DOMINATED, reading.sets.dominated),
        (page.INTRO, reading.sets.intros),
        (page.WAAD_PEAK, reading.waad_peaks),
        (page.FAI_PEAK, reading.fai_peaks),
        (page.RECEIVER_PEAK, reading.receiver_peaks),
    ):
        assert torch.equal((flags & bit) != 0, members[response]) and members.any()
    back = np.frombuffer(base64.b64decode(data["intro_back"]), np.uint8)
    place = np.arange(len(ids))[response.numpy()]
    expected = np.where(reading.sets.intro_of[response] >= 0, place - reading.sets.intro_of[response].numpy(), 0)
    assert (back == expected).all() and back.max() <= 3
    members = np.frombuffer(base64.b64decode(data["members"]), np.uint8).reshape(6, 4)
    assert ((members & page.RECEIVER) != 0).sum() == 16
    assert ((members[reading.sampled] & page.LOCAL) != 0).tolist() == reading.groups.local_heads.tolist()
    assert ((members[reading.sampled] & page.GLOBAL) != 0).tolist() == reading.groups.global_heads.tolist()


def test_the_maps_of_the_page_are_those_of_the_model(answered):
    folder, shown = answered
    data = data_of((folder / "index.html").read_text(encoding="utf-8"))
    assert [(maps["begin"], maps["end"], maps["bin"]) for maps in data["maps"]] == [
        (0, shown.reading.tokens, -(-shown.reading.tokens // 256)),
        (20, 90, 1),
    ]
    for drawn, maps in zip(data["maps"], shown.maps, strict=True):
        row, column = np.tril_indices(drawn["bins"])
        np.testing.assert_allclose(floats(drawn["local"]), maps.local_map.numpy()[row, column], atol=1e-6)
        np.testing.assert_allclose(floats(drawn["global"]), maps.global_map.numpy()[row, column], atol=1e-6)


def test_the_files_of_numbers_hold_the_reading(answered):
    folder, shown = answered
    with np.load(folder / "reading.npz", allow_pickle=False) as got:
        arrays = dict(got)
    reading = shown.reading
    for name in (
        "ids",
        "response",
        "waad",
        "fai",
        "credit_fai",
        "receiver_fai",
        "entropy",
        "gamma",
        "spans",
        "kurtosis",
    ):
        assert np.array_equal(arrays[name], getattr(reading, name).numpy()), name
    assert np.array_equal(arrays["sets_anchors"], reading.sets.anchors.numpy())
    assert np.array_equal(arrays["groups_global"], reading.groups.global_heads.numpy())
    assert np.array_equal(arrays["map_local"], shown.maps[0].local_map.numpy())
    assert arrays["window_bounds"].tolist() == [20, 90, 1]
    about = json.loads((folder / "reading.json").read_text(encoding="utf-8"))
    assert about["texts"] == shown.texts and about["tokens"] == reading.tokens and about["sampled"] == reading.sampled
    assert about["versions"]["torch"] == version("torch") and about["settings"]["answer"] == "given"
    assert about["settings"]["receiver heads"] == "16 of 24"
    assert (folder / "maps-window.png").exists()


def test_nothing_that_was_written_by_others_is_markup(answered):
    folder, _ = answered
    html = (folder / "index.html").read_text(encoding="utf-8")
    inside = html.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&") & set(inside) and inside.isascii() and json.loads(inside)["texts"].count("<") == 15
    assert html.count("</script>") == 2 and html.count("<script") == 2
    assert re.findall(r"(?:src|href)=[\"']?([^\"'> ]*)", html) == ["data:,"]  # nothing is fetched
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert "default-src 'none'" in policy and "sha256-" in policy and "script-src 'unsafe-inline'" not in policy


def test_prompts_and_answers_from_files(tiny, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8-sig")  # with the mark that some editors write
    (tmp_path / "answer.txt").write_text("4 dollars.\n", encoding="utf-8")
    files = ["--prompt-file", str(tmp_path / "prompt.txt"), "--response-file", str(tmp_path / "answer.txt")]
    shown = show.show(show.parse([tiny, *files, "--out", str(tmp_path / "out")]))
    assert "".join(shown.texts) == PROMPT + "4 dollars."
    assert shown.settings["receiver heads"] == "0 of 24: only an answer of more than 32 tokens tells which"
    assert not shown.reading.receiver_fai.any() and not shown.reading.receiver_peaks.any()


@pytest.mark.slow
def test_a_long_answer_has_maps_in_bins(tiny, tmp_path):
    arguments = [tiny, "--prompt", PROMPT, "--response", "ten words in all " * 25, "--out", str(tmp_path)]
    shown = show.show(show.parse(arguments))
    maps, of_answer = shown.maps
    assert maps.bin == 2 and len(maps.local_map) == -(-shown.reading.tokens // 2)
    assert (of_answer.begin, of_answer.end, of_answer.bin) == (shown.prompt_tokens, shown.reading.tokens, 1)


def test_the_window_is_the_beginning_of_a_very_long_answer(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(show, "MOST_WINDOW", 50)
    shown = show.show(show.parse([tiny, "--prompt", PROMPT, "--response", "word " * 20, "--out", str(tmp_path)]))
    begin = shown.prompt_tokens
    assert (shown.maps[1].begin, shown.maps[1].end) == (begin, begin + 50)


def test_the_papers_example_shows_the_shortest_right_answer(tiny, tmp_path, monkeypatch, capsys):
    texts = ["It is 23, I think, and sure.", "It is 23, I think.", "It is 22.", "23 and"]

    def answers(model, tokenizer, prompts, *, temperature, **_):
        assert len(prompts) == 8 and temperature == 0.7
        asked = tokenizer.decode(prompts[0])
        assert asked.startswith("System: ") and asked.endswith("\nQuestion: " + JEWELS.text.split(". ")[-1] + "\n")
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [[*each, 1] for each in tokens[:3]] + [tokens[3]] * 5  # the last ones were cut off

    monkeypatch.setattr(show, "generate", answers)
    shown = show.show(show.parse([tiny, "--example", "paper", "--max-new-tokens", "40", "--out", str(tmp_path)]))
    assert "".join(shown.texts[shown.prompt_tokens : -1]) == texts[1]
    assert "answers   8, of which 3 came to their end and 2 are right" in capsys.readouterr().out
    texts[:2] = ["It is 20, I think.", "It is 21, I think."]
    shown = show.show(show.parse([tiny, "--example", "paper", "--max-new-tokens", "40", "--out", str(tmp_path)]))
    assert "".join(shown.texts[shown.prompt_tokens : -1]) == texts[2]


def test_all_layers_are_read_unless_some_are_named(tiny, tmp_path):
    arguments = [tiny, "--prompt", PROMPT, "--response", "a few words", "--out", str(tmp_path)]
    shown = show.show(show.parse(arguments))
    assert shown.reading.sampled == shown.reading.layers == list(range(6))
    assert "WAAD and FAI are read in\nall 6 layers." in (tmp_path / "index.html").read_text(encoding="utf-8")
    shown = show.show(show.parse([*arguments, "--layers", "1,3"]))
    assert shown.reading.sampled == [1, 3]
    assert "read in\nlayers 1, 3." in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "--prompt must not be empty"),
        (["--prompt", "a", "--response", ""], "--response must not be empty"),
        (["--prompt", "a\udcff"], "--prompt must be valid text"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file must be a file to read.*nowhere.txt"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature must be"),
        (["--prompt", "a", "--seed", "-1"], "--seed must be"),
        (["--prompt", "a", "--layers", "some"], "--layers must be all, a number or a list.*'some'"),
        (["--prompt", "a", "--layers", ""], "--layers must be all, a number or a list.*''"),
        (["--prompt", "a", "--layers", "0"], "--layers must be at least 1"),
        (["--prompt", "a", "--receivers", "0"], "--receivers must be at least 1"),
        (["--prompt", "a", "--window", "7"], "--window must be BEGIN:END"),
        (["--prompt", "a", "--window", "9:3"], "--window must begin at 0 or later and before its end"),
        (["--prompt", "a", "--window", "0:5000"], "--window must have at most 1024 tokens"),
        (["--prompt", "a", "--device", "abacus"], "--device must be auto"),
        (["--prompt", "a", "--out", __file__], "--out must be a folder"),
    ],
)
def test_bad_arguments_are_named_before_a_model_is_loaded(monkeypatch, capsys, arguments, message):
    def loaded(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(show, "load", loaded)
    with pytest.raises(ValueError, match=message):
        show.main(["model", *arguments])
    assert cli.main(["show", "model", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rhythm show: ") and re.search(message, said)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "3,9"], "--layers.*between -6 and 5"),
        (["--receivers", "25"], "--receivers must be between 1 and 24"),
        (["--max-new-tokens", "600"], "--max-new-tokens must leave the sequence within the model's 512 positions"),
        (["--window", "0:900"], "--window must end at most at"),
        (["--response", "abc", "--window", "0:18"], "--window must end at most at 17 tokens, got 18"),
        (["--response", "a" * 600], "--response must leave the sequence within the model's 512 positions"),
    ],
)
def test_what_does_not_fit_the_model_is_named_before_it_answers(monkeypatch, tiny, tmp_path, arguments, message):
    def asked(*_, **__):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(show, "generate", asked)
    with pytest.raises(ValueError, match=message):
        show.main([tiny, "--prompt", PROMPT, "--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_a_prompt_is_needed_and_only_one(capsys):
    for arguments in ([], ["--prompt", "a", "--prompt-file", "b"], ["--prompt", "a", "--example", "paper"]):
        with pytest.raises(SystemExit):
            show.parse(arguments)
        assert "--prompt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        show.parse(["--example", "paper", "--response", "23"])
    assert "--example: not allowed with a response" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "bench", "couple", "value"])
def test_an_empty_folder_is_refused(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "model", "--out", ""])
    assert "argument --out: must name a folder, got ''" in capsys.readouterr().err


def test_no_such_model(tmp_path, capsys):
    assert cli.main(["show", str(tmp_path), "--prompt", "a"]) == 2
    assert "rhythm show: " in capsys.readouterr().err
