"""`rhythm perturb`: words and positions by hand, rollouts against plain ones without a cache, interrupted runs."""

import json

import numpy as np
import pytest
import torch
from study_cases import cut_places, kept_problems, problem_file, run, tiny_folder, tiny_model
from transformers import ByT5Tokenizer

from rhythm_kernels.analysis import perturb, rollouts
from rhythm_kernels.analysis.perturb import Overlap
from rhythm_kernels.analysis.receivers import FEWEST_ROWS
from rhythm_kernels.analysis.rollouts import roll_out
from rhythm_kernels.analysis.words import STOP_WORDS, content_words, jaccard

# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("", set()),
        ("It is what it is.", set()),
        ("The bakery sold 18 loaves; Loaves!", {"bakery", "sold", "18", "loaves"}),
        ("$1,250.50 - 3.5kg, 7.", {"1,250.50", "3.5", "kg", "7"}),
        ("They don't; Tom's WON’T", {"tom", "won"}),
        ("naïve_Größe 中文", {"naïve", "größe", "中文"}),
    ],
    ids=range(6),
)
def test_content_words_by_hand(text, words):
    assert content_words(text) == words


def test_a_text_that_goes_on_may_begin_inside_a_word():
    assert content_words("ves of bread", begun=True) == {"bread"}
    assert content_words(" loaves of bread", begun=True) == {"loaves", "bread"}
    assert content_words("25 loaves", begun=True) == {"loaves"} and content_words("25 loaves") == {"25", "loaves"}
    assert "one" in STOP_WORDS and "first" not in STOP_WORDS and all(word == word.lower() for word in STOP_WORDS)


def test_jaccard_of_known_texts():
    first = content_words("Tom reads 20 pages every day for 5 days.")  # tom reads 20 pages every day 5 days
    second = content_words("In 5 days Tom reads 100 pages.")  # 5 days tom reads 100 pages
    assert jaccard(first, second) == jaccard(second, first) == 5 / 9
    assert jaccard(first, first) == 1 and jaccard(first, content_words("No.")) == 0
    assert jaccard(content_words(""), content_words("it is")) == 1


# ---- places ----------------------------------------------------------------------------------------------------------


def test_extremes_by_hand():
    tail = [9.0] * FEWEST_ROWS  # too few rows look back at these
    assert perturb.extremes([0.3, 0.1, 0.9, 0.5, 0.0, 0.7, *tail], 2) == {"top": [2, 5], "bottom": [1, 4]}
    assert perturb.extremes([0.5, 0.5, 0.5, 0.5, *tail], 2) == {"top": [0, 1], "bottom": [2, 3]}
    assert perturb.extremes([0.0, 0.0, 0.1, 0.0, *tail], 1) == {"top": [2], "bottom": [0]}
    assert perturb.extremes([0.1, 0.2, 0.3, *tail], 2) is None and perturb.extremes([0.1, 0.2], 1) is None


def place(kind: str, where: int, tokens: list[str], continuations: list[str]) -> dict:
    return {
        "place": where,
        "kind": kind,
        "tokens": tokens,
        "fai": where / 100,
        "entropy": 0.5,
        "probabilities": [0.6, 0.3, 0.1],
        "continuations": continuations,
    }


def test_overlaps_by_hand():
    top = place("top", 4, [" Tom", " Ann", "1"], ["x 1 2 3 4", "y 1 2 3 5", "z 9"])  # letters that end a word
    bottom = place("bottom", 2, ["$", " ", "e"], ["1 2", "1 2", " 2"])
    got = perturb.overlaps({"tokens": 9, "places": [bottom, top]})
    assert got["top"] == [Overlap(pytest.approx(0.3), 0.04, 0.5, 0.5, pytest.approx(0.2))]  # 3/5 and 0
    assert got["bottom"] == [Overlap(0.75, 0.02, 0.5, 0.25, pytest.approx(0.2))]
    assert perturb.overlaps({"tokens": 9, "places": []}) is None


def test_table_1_by_hand():
    def answer(top: list[float], bottom: list[float]) -> dict[str, list[Overlap]]:
        return {
            kind: [Overlap(value, 0.0, 0.0, 0.0, 0.0) for value in values]
            for kind, values in (("top", top), ("bottom", bottom))
        }

    answers = [answer([0.2, 0.4], [0.8, 0.6]), answer([0.5], [0.5]), answer([0.9], [0.1]), answer([0.0], [1.0])]
    got = {name: estimate.value for name, estimate in perturb.table_1(answers, 0).items()}
    expected = {"top": 0.425, "bottom": 0.575, "top - bottom": -0.15, "top below bottom": 0.5, "tied": 0.25}
    # the first answer has two pairs of places, and so twice the weight in the regression
    assert got == pytest.approx(expected | {"held equal": (2 * -0.4 + 0.0 + 0.8 - 1.0) / 5})
    for estimate in perturb.table_1(answers, 0).values():
        assert estimate.low <= estimate.value <= estimate.high
    drop = perturb.table_1([answer([n / 80], [n / 80 + 0.1]) for n in range(70)], 0)
    assert drop["top below bottom"] == (1, 1, 1) and drop["top - bottom"].high == pytest.approx(-0.1)


@pytest.mark.parametrize("hangs_on, raw, equal", [("entropy", -0.3, 0.0), ("fai", -0.2, -0.2)])
def test_a_difference_in_entropy_is_told_from_one_in_fai(hangs_on, raw, equal):
    draw = np.random.default_rng(0)
    answers = []
    for _ in range(70):
        answer = {}
        for kind, mean in (("top", 2.0), ("bottom", 0.5)):
            entropy, noise = mean + draw.normal(0, 0.5, 2), draw.normal(0, 0.05, 2)
            jaccard_of = 0.9 - 0.2 * (entropy if hangs_on == "entropy" else kind == "top") + noise
            answer[kind] = [Overlap(*pair, draw.random(), 0.1) for pair in zip(jaccard_of, [0.0] * 2, entropy)]
        answers.append(answer)
    got = perturb.table_1(answers, 0)
    assert got["top - bottom"].value == pytest.approx(raw, abs=0.03)
    assert got["held equal"].low - 0.01 < equal < got["held equal"].high + 0.01
    assert got["held equal"].value == pytest.approx(equal, abs=0.03)


# ---- rollouts --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain(model, tokens: list[int], count: int) -> list[int]:
    """Returns a greedy continuation without its end token, each token from a forward over all before it."""
    continuation: list[int] = []
    for _ in range(count):
        best = int(model(torch.tensor([tokens + continuation]), use_cache=False).logits[0, -1].argmax())
        if best == model.generation_config.eos_token_id:
            break
        continuation.append(best)
    return continuation


@torch.no_grad()
def check_forks(model, ids, forks, places, alternatives, new_tokens, refused):
    assert [fork.position for fork in forks] == places
    for fork in forks:
        log_probs = model(ids[None, : fork.position], use_cache=False).logits[0, -1].log_softmax(-1)
        out = {int(ids[fork.position]), model.generation_config.eos_token_id, *refused}
        likely = [token for token in log_probs.argsort(descending=True).tolist() if token not in out]
        assert fork.tokens == [int(ids[fork.position]), *likely[:alternatives]]
        np.testing.assert_allclose(fork.probabilities, log_probs[fork.tokens].exp(), rtol=1e-4)
        for token, continuation in zip(fork.tokens, fork.continuations, strict=True):
            assert continuation == plain(model, [*ids[: fork.position].tolist(), token], new_tokens), (
                fork.position,
                token,
            )


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 259, (40,), generator=torch.Generator().manual_seed(1))


TOKENIZER = ByT5Tokenizer(extra_ids=0, padding_side="left")


@pytest.mark.parametrize("shared", [True, False])
def test_forced_tokens_are_forced_and_what_follows_is_the_models_own(model, ids, shared):
    places, grown = [5, 6, 23, 39], []
    options = {"alternatives": 3, "new_tokens": 8, "refused": {0, 2}}
    forks = roll_out(model, TOKENIZER, ids, places, **options, shared=shared, progress=grown.append)
    check_forks(model, ids, forks, places, **options)
    assert len(grown) == (8 if shared else 32)
    assert any(fork.continuations[0] != fork.continuations[1] for fork in forks), "nothing hangs on a token"


@pytest.mark.parametrize("shared", [True, False])
def test_a_rollout_ends_where_the_answer_does(ids, shared):
    model = tiny_model()
    first = plain(model, ids[:10].tolist(), 6)
    model.generation_config.eos_token_id = first[3]
    forks = roll_out(
        model, TOKENIZER, torch.tensor([*ids[:10], *first]), [10, 12], alternatives=2, new_tokens=12, shared=shared
    )
    assert forks[0].continuations[0] == first[1:3] and forks[1].continuations[0] == []
    assert all(first[3] not in [*row, *fork.tokens] for fork in forks for row in fork.continuations)


def test_layers_that_do_not_see_all_tokens_get_batches_of_their_own(ids, monkeypatch):
    monkeypatch.setattr(rollouts, "_on_one_cache", lambda *_: pytest.fail("one cache for all places"))
    sliding = tiny_model(use_sliding_window=True, sliding_window=6, max_window_layers=2)
    options = {"alternatives": 2, "new_tokens": 5, "refused": set()}
    check_forks(sliding, ids, roll_out(sliding, TOKENIZER, ids, [9, 30], **options), [9, 30], **options)


def test_more_alternatives_than_tokens_are_refused(model, ids):
    with pytest.raises(ValueError, match="alternatives must be fewer than the tokens of the model, got 258"):
        roll_out(model, TOKENIZER, ids, [5], alternatives=258, new_tokens=1)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(arguments of a study of four problems, its folder)."""
    folder = tmp_path_factory.mktemp("perturb")
    model, task = tiny_folder(folder / "model"), problem_file(folder / "task.jsonl", 4)
    arguments = [str(model), "--task", str(task), "--batch-size", "2", "--max-new-tokens", "48", "--positions", "2"]
    arguments += ["--alternatives", "2", "--rollout-tokens", "6", "--temperature", "0.7", "--layers", "3"]
    assert run(perturb.main, [*arguments, "--out", str(folder / "out")]) is None
    return arguments, folder / "out"


def data_of(folder) -> dict:
    data = json.loads((folder / "report.json").read_text())
    return {name: value for name, value in data.items() if name != "command"}


def test_the_report_says_what_was_found(setting):
    _, out = setting
    text, data = (out / "report.md").read_text(), data_of(out)
    assert data["answers"] + data["left_out"] == 4 and data["answers"] >= 2
    assert data["places"] == 4 * data["answers"] and len(data["jaccard"]) == data["answers"]
    assert data["differing"]["fai"]["top"] > data["differing"]["fai"]["bottom"]
    assert "0.534" in text and "0.631" in text and "87.1%" in text and "-0.097" in text
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    places = [place for line in log if line.get("key", "").startswith("problem") for place in line["value"]["places"]]
    assert len(places) == data["places"]
    assert all(len(place["tokens"]) == len(place["continuations"]) == 3 for place in places)


def test_a_run_that_is_cut_anywhere_goes_on_to_the_same_bits(setting, tmp_path, monkeypatch):
    arguments, out = setting
    whole = (out / "log.jsonl").read_bytes()
    measured, perturbed = [], perturb.perturbed
    monkeypatch.setattr(perturb, "perturbed", lambda s, answer: measured.append(answer.index) or perturbed(s, answer))
    for place in cut_places(whole):
        measured.clear()
        (tmp_path / "log.jsonl").write_bytes(whole[:place])
        assert run(perturb.main, [*arguments, "--out", str(tmp_path)]) is None
        assert (tmp_path / "log.jsonl").read_bytes() == whole
        assert measured == list(range(kept_problems(whole[:place]), 4)), "finished work is done again"
        assert data_of(tmp_path) == data_of(out)


def test_other_settings_are_refused(setting, tmp_path):
    arguments, out = setting
    (tmp_path / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes())
    for flags, message in (
        (["--positions", "1"], "positions was 2 and is 1"),
        (
            ["--alternatives", "3", "--rollout-tokens", "7"],
            "alternatives was 2 and is 3; rollout_tokens was 6 and is 7",
        ),
    ):
        assert message in run(perturb.main, [*arguments, "--out", str(tmp_path), *flags])
    assert (tmp_path / "log.jsonl").read_bytes() == (out / "log.jsonl").read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--positions", "0"], "--positions must be at least 1, got 0"),
        (["--rollout-tokens", "490"], "within the model's 512 positions"),
        (["--positions", "40"], "no answer has 112 tokens"),
    ],
    ids=range(3),
)
def test_what_the_caller_can_mend_is_told_in_a_line(setting, tmp_path, flags, message):
    assert message in run(perturb.main, [*setting[0], "--problems", "1", "--out", str(tmp_path), *flags])
