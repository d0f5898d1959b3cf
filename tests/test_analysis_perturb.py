"""`rhythm perturb`: words and positions by hand, rollouts against plain ones without a cache, interrupted runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from study_cases import cut_places, kept_batches, problem_file, run, tiny_folder, tiny_model
from transformers import ByT5Tokenizer

from rhythm_kernels.analysis import perturb, rollouts
from rhythm_kernels.analysis.perturb import Overlap
from rhythm_kernels.analysis.rollouts import Start, _choose, answer_prompts, roll_out
from rhythm_kernels.analysis.sources import generate
from rhythm_kernels.analysis.study import quoted
from rhythm_kernels.analysis.words import STOP_WORDS, all_words, content_words, jaccard

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


def test_words_between_white_space_keep_their_punctuation():
    assert all_words("The cost: $5.00, the COST") == {"the", "cost:", "$5.00,", "cost"}
    assert all_words("ves of bread", begun=True) == {"of", "bread"}
    assert all_words(" loaves of", begun=True) == all_words("\nloaves of", begun=True) == {"loaves", "of"}
    assert all_words("", begun=True) == all_words(" ") == frozenset()


def test_the_papers_four_similarities_come_out_nearly():
    """B.1 prints 0.383, 0.255, 1.000 and 0.946, and leaves open what a content word is."""
    fixture = json.loads((Path(__file__).parent / "paper_words.json").read_text(encoding="utf-8"))
    first = all_words(" ".join(fixture["original"]))
    got = [jaccard(first, all_words(" ".join(each["words"]))) for each in fixture["perturbed"]]
    paper = [each["jaccard"] for each in fixture["perturbed"]]
    assert paper == [0.383, 0.255, 1.0, 0.946]
    np.testing.assert_allclose(got, paper, atol=0.03)
    assert np.round(got, 3).tolist() == [0.406, 0.252, 1.0, 0.947]  # what docs/paper.md says
    by_list = [
        jaccard(*(content_words(" ".join(words)) for words in (fixture["original"], each["words"])))
        for each in fixture["perturbed"]
    ]
    assert np.abs(np.subtract(by_list, paper)).max() > 2 * np.abs(np.subtract(got, paper)).max()


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
    end = 9.0  # nothing follows the last token
    assert perturb.extremes([0.3, 0.1, 0.9, 0.5, 0.0, 0.7, end], 2) == {"top": [2, 5], "bottom": [1, 4]}
    assert perturb.extremes([0.5, 0.5, 0.5, 0.5, end], 2) == {"top": [0, 1], "bottom": [2, 3]}
    assert perturb.extremes([0.0, 0.0, 0.1, 0.0, end], 1) == {"top": [2], "bottom": [0]}
    assert perturb.extremes([0.3, 0.1, 0.9, 0.5, 8.0, end], 2, without_last=1) == {"top": [2, 3], "bottom": [0, 1]}
    assert perturb.extremes([0.1, 0.2, 0.3, end], 2) is None and perturb.extremes([0.1, 0.2, 0.3], 1, 1) is None
    assert perturb.extremes([], 1, without_last=3) is None


def text_of(tokens: list[int]) -> str:
    """Decodes bytes: a token is one of them."""
    return bytes(tokens).decode()


def place(kind: str, where: int, tokens: str, continuations: list[str], ended: tuple = (True, True, True)) -> dict:
    return {
        "place": where,
        "kind": kind,
        "tokens": list(tokens.encode()),
        "fai": where / 100,
        "entropy": 0.5,
        "probabilities": [0.6, 0.3, 0.1],
        "continuations": [list(text.encode()) for text in continuations],
        "ended": list(ended),
    }


def overlaps(results: list[dict], **options) -> list[dict]:
    return perturb.overlaps(results, lambda place, count: perturb.overlap_of(place, count, text_of, **options))


def test_overlaps_by_hand():
    top = place("top", 4, "mn1", ["x 1 2 3 4", "y 1 2 3 5", "z 9"])  # letters that end a word
    bottom = place("bottom", 2, "$ e", ["1 2", "1 2", " 2"])
    (got,) = overlaps([{"tokens": 9, "places": [bottom, top]}, {"tokens": 2, "places": []}])
    assert got["top"] == [Overlap(pytest.approx(0.3), 0.04, 0.5, 0.5, pytest.approx(0.2), 9.0)]  # 3/5 and 0
    assert got["bottom"] == [Overlap(0.75, 0.02, 0.5, 0.25, pytest.approx(0.2), 3.0)]
    (soon,) = overlaps([{"tokens": 9, "places": [bottom, top]}], horizon=3)
    assert soon["top"][0].jaccard == 0.5 and soon["bottom"][0].jaccard == 0.75  # {1} and {1}, {1} and {9}
    (by_list,) = overlaps(
        [{"tokens": 9, "places": [place("top", 0, "$$$", ["The 7.", "a 7", "is 8"])]}], words=content_words
    )
    assert by_list["top"][0].jaccard == 0.5


def test_flips_by_hand():
    top = place("top", 4, "123", [" so \\boxed{7}", " so 7.0", " so 8"])
    other = place("top", 5, "123", [" is 5", " is 6", " is 6"], ended=(True, True, False))  # one was cut off
    lost = place("top", 6, "123", [" is 5", " is 6", " is 7"], ended=(False, True, True))
    bottom = place("bottom", 2, "xyz", [" it 3", " it 3", " none"])
    results = [{"tokens": 9, "places": [bottom, top, other, lost]}]
    got = {name: estimate.value for name, estimate in perturb.flips(results, text_of, 0).items()}
    assert got == pytest.approx({"top": 2 / 3, "bottom": 0.0, "top - bottom": 2 / 3})


def test_model_text_cannot_leave_its_block():
    assert quoted("a ``` b ````") == "`````text\na ``` b ````\n`````"
    assert quoted("") == "```text\n\n```"
    words = " ".join(["seven"] * 60 + ["x" * 300])
    lines = quoted(f"  {words}\n\n end ").split("\n")
    assert all(len(line) <= 100 for line in lines) and lines[-3:] == ["", " end ", "```"]
    assert "".join(lines[1:-3]).replace(" ", "") == words.replace(" ", "")


def test_table_1_by_hand():
    def answer(top: list[float], bottom: list[float]) -> dict[str, list[Overlap]]:
        return {
            kind: [Overlap(value, 0.0, 0.0, 0.0, 0.0, 0.0) for value in values]
            for kind, values in (("top", top), ("bottom", bottom))
        }

    answers = [answer([0.2, 0.4], [0.8, 0.6]), answer([0.5], [0.5]), answer([0.9], [0.1]), answer([0.0], [1.0])]
    got = {name: estimate.value for name, estimate in perturb.table_1(answers, 0).items()}
    expected = {"top": 0.425, "bottom": 0.575, "top - bottom": -0.15, "top below bottom": 0.5, "tied": 0.25}
    assert got == pytest.approx(expected)
    # the first answer has two pairs of places, and so twice the weight in the regression
    assert perturb.held_equal(answers, 0).value == pytest.approx((2 * -0.4 + 0.0 + 0.8 - 1.0) / 5)
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
            answer[kind] = [Overlap(*pair, draw.random(), 0.1, 50.0) for pair in zip(jaccard_of, [0.0] * 2, entropy)]
        answers.append(answer)
    assert perturb.table_1(answers, 0)["top - bottom"].value == pytest.approx(raw, abs=0.03)
    held = perturb.held_equal(answers, 0)
    assert held.low - 0.01 < equal < held.high + 0.01
    assert held.value == pytest.approx(equal, abs=0.03)


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
        for token, continuation, ended in zip(fork.tokens, fork.continuations, fork.ended, strict=True):
            expected = plain(model, [*ids[: fork.position].tolist(), token], new_tokens)
            assert continuation == expected, (fork.position, token)
            assert ended == (len(expected) < new_tokens)


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
    other, limit = torch.cat([ids[20:30], ids[:7]]), 512
    starts = [
        Start(ids.tolist(), places, limit),
        Start(other.tolist(), [8, 16], limit),
    ]  # of other lengths, in one batch
    forks, of_other = roll_out(model, TOKENIZER, starts, **options, shared=shared, progress=grown.append)
    check_forks(model, ids, forks, places, **options)
    check_forks(model, other, of_other, [8, 16], **options)
    assert len(grown) == (8 if shared else 48)
    assert any(fork.continuations[0] != fork.continuations[1] for fork in forks), "nothing hangs on a token"


@pytest.mark.parametrize("shared", [True, False])
def test_a_rollout_ends_where_the_answer_does(ids, shared):
    model = tiny_model()
    first = plain(model, ids[:10].tolist(), 6)
    model.generation_config.eos_token_id = first[3]
    start = Start([*ids[:10].tolist(), *first], [10, 12], 512)
    (forks,) = roll_out(model, TOKENIZER, [start], alternatives=2, new_tokens=12, shared=shared)
    assert forks[0].continuations[0] == first[1:3] and forks[1].continuations[0] == []
    assert forks[0].ended[0] and forks[1].ended[0]
    assert all(first[3] not in [*row, *fork.tokens] for fork in forks for row in fork.continuations)


@pytest.mark.parametrize("shared", [True, False])
def test_a_rollout_ends_at_the_limit_of_its_sequence(model, ids, shared):
    starts = [Start(ids.tolist(), [5, 30], 40), Start(ids[:20].tolist(), [19], 20)]
    (early, late), (last,) = roll_out(model, TOKENIZER, starts, alternatives=1, refused={0, 2}, shared=shared)
    for fork, room in ((early, 34), (late, 9), (last, 0)):
        for token, continuation, ended in zip(fork.tokens, fork.continuations, fork.ended, strict=True):
            assert continuation == plain(model, [*ids[: fork.position].tolist(), token], room)
            assert ended == (len(continuation) < room)
    assert roll_out(model, TOKENIZER, [], alternatives=1) == []


@pytest.mark.parametrize("shared", [True, False], ids=["one batch", "a batch for each position"])
def test_layers_with_windows_begin_from_no_cache(ids, shared, monkeypatch):
    monkeypatch.setattr(rollouts, "_on_one_cache", lambda *_: pytest.fail("one cache for all places"))
    batches, generated = [], rollouts.generate

    def counted(model, tokenizer, prompts, **options):
        batches.append(len(prompts))
        return generated(model, tokenizer, prompts, **options)

    monkeypatch.setattr(rollouts, "generate", counted)
    sliding = tiny_model(use_sliding_window=True, sliding_window=6, max_window_layers=2)
    options = {"alternatives": 2, "new_tokens": 5, "refused": set()}
    (forks,) = roll_out(sliding, TOKENIZER, [Start(ids.tolist(), [9, 30], 512)], **options, shared=shared)
    check_forks(sliding, ids, forks, [9, 30], **options)
    assert batches == ([6] if shared else [3, 3])


@pytest.mark.parametrize("sizes", [{}, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}])
def test_answers_are_those_of_generate(ids, sizes):
    model = tiny_model(**sizes)
    prompts = [ids[:9].tolist(), ids[4:20].tolist(), ids[:2].tolist(), ids[30:].tolist()]
    expected = generate(model, TOKENIZER, prompts, max_new_tokens=12)
    assert answer_prompts(model, TOKENIZER, prompts, max_new_tokens=12) == expected
    first = expected[1]
    model.generation_config.eos_token_id = first[3]  # the others go on when this one leaves
    got = answer_prompts(model, TOKENIZER, prompts, max_new_tokens=12)
    assert (
        got == generate(model, TOKENIZER, prompts, max_new_tokens=12) and got[1] == first[: first.index(first[3]) + 1]
    )
    for special in ([7], [5, first[3]]):  # a prompt of one token, and one that ends as answers do
        got = answer_prompts(model, TOKENIZER, [*prompts, special], max_new_tokens=4)
        assert got == generate(model, TOKENIZER, [*prompts, special], max_new_tokens=4) and got[-1]


HABITS = {"repetition_penalty": 1.5, "min_p": 0.9, "no_repeat_ngram_size": 1, "suppress_tokens": [*range(3, 100)]}


@pytest.mark.parametrize("sizes", [{}, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_models_own_generation_settings_change_no_answer(ids, sizes, temperature):
    """transformers would take them for whatever a call leaves open."""
    model = tiny_model(**sizes)
    prompts = [ids[:9].tolist(), ids[4:20].tolist()]
    answers = []
    for habits in ({}, HABITS):
        model.generation_config.update(**habits)
        for sample in (generate, answer_prompts):
            torch.manual_seed(0)
            answers.append(sample(model, TOKENIZER, prompts, max_new_tokens=12, temperature=temperature))
    assert answers[:2] == answers[2:] and model.generation_config.min_p == 0.9


def test_one_prompt_needs_no_token_for_padding(ids):
    model, bare = tiny_model(), SimpleNamespace(pad_token_id=None)
    prompt = [ids[:9].tolist()]
    assert generate(model, bare, prompt, max_new_tokens=5) == generate(model, TOKENIZER, prompt, max_new_tokens=5)


def test_sampled_answers_follow_the_seed_and_the_temperature(model, ids):
    def sample(seed: int, temperature: float) -> list[list[int]]:
        torch.manual_seed(seed)
        prompts = [ids[:9].tolist()] * 400
        return answer_prompts(model, TOKENIZER, prompts, max_new_tokens=1, temperature=temperature)

    assert sample(0, 0.7) == sample(0, 0.7) != sample(1, 0.7)
    logits = model(ids[None, :9]).logits[0, -1] / 0.7
    drawn = torch.tensor(sample(0, 0.7)).flatten()
    share = torch.bincount(drawn, minlength=259) / 400
    expected = logits.softmax(-1).detach()
    assert (share - expected).abs().max() < 4 * (expected * (1 - expected) / 400).max().sqrt()


def test_words_of_a_large_vocabulary_are_drawn_by_their_probability():
    words, rows, rounds = 2**16, 64, 60
    logits = torch.zeros(words)
    logits[1000] = np.log(words - 2)  # as likely as all others but the two below
    logits[[0, -1]] = -torch.inf
    torch.manual_seed(0)
    drawn = torch.cat([_choose(2 * logits.expand(rows, -1), 2.0) for _ in range(rounds)])
    count = rows * rounds
    assert abs((drawn == 1000).sum() - count / 2) < 4 * (count / 4) ** 0.5
    assert not ((drawn == 0) | (drawn == words - 1)).any()
    others = drawn[drawn != 1000]
    by_eighth = torch.bincount(others * 8 // words, minlength=8)
    assert ((by_eighth - len(others) / 8) ** 2 / (len(others) / 8)).sum() < 7 + 5 * 14**0.5  # chi-squared of 7 degrees
    assert len(others.unique()) > 0.97 * len(others)
    assert _choose(logits.expand(3, -1), 0.0).tolist() == [1000] * 3


def test_more_alternatives_than_tokens_are_refused(model, ids):
    with pytest.raises(ValueError, match="alternatives must be fewer than the tokens of the model, got 258"):
        roll_out(model, TOKENIZER, [Start(ids.tolist(), [5], 512)], alternatives=258, new_tokens=1)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(arguments of a study of four problems, its folder)."""
    folder = tmp_path_factory.mktemp("perturb")
    model, task = tiny_folder(folder / "model"), problem_file(folder / "task.jsonl", 4)
    arguments = [str(model), "--task", str(task), "--batch-size", "2", "--max-new-tokens", "48", "--positions", "2"]
    arguments += ["--temperature", "0.7"]
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
    results = [result for line in log if line.get("key", "").startswith("measured") for result in line["value"]]
    places = [place for result in results for place in result["places"]]
    assert len(places) == data["places"] and set(data["estimates"]) > {"32 tokens", "to the end"}
    assert all(len(place["tokens"]) == len(place["continuations"]) == len(place["ended"]) == 3 for place in places)
    # up to the limit of an answer, of which the replaced token is one
    room = [48 - 1 - place["place"] for place in places]
    assert any(not all(place["ended"]) for place in places), "no continuation was cut off"
    for place, most in zip(places, room, strict=True):
        for tokens, ended in zip(place["continuations"], place["ended"], strict=True):
            assert len(tokens) == most if not ended else len(tokens) < most
    assert "*Top FAI*" in text and "*Bottom FAI*" in text and text.count("```text") >= 4


def test_a_run_that_is_cut_anywhere_goes_on_to_the_same_bits(setting, tmp_path, monkeypatch):
    arguments, out = setting
    whole = (out / "log.jsonl").read_bytes()
    measured, perturbed = [], perturb.perturbed
    monkeypatch.setattr(perturb, "perturbed", lambda s, batch: measured.append(batch[0].index) or perturbed(s, batch))
    for place in cut_places(whole):
        measured.clear()
        (tmp_path / "log.jsonl").write_bytes(whole[:place])
        assert run(perturb.main, [*arguments, "--out", str(tmp_path)]) is None
        assert (tmp_path / "log.jsonl").read_bytes() == whole
        assert measured == [0, 2][kept_batches(whole[:place]) :], "finished work is done again"
        assert data_of(tmp_path) == data_of(out)


def test_other_settings_are_refused(setting, tmp_path):
    arguments, out = setting
    (tmp_path / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes())
    for flags, message in (
        (["--positions", "1"], "positions was 2 and is 1"),
        (
            ["--alternatives", "3", "--rollout-tokens", "7", "--without-last", "1"],
            "alternatives was 2 and is 3; rollout_tokens was None and is 7; without_last was 0 and is 1",
        ),
    ):
        assert message in run(perturb.main, [*arguments, "--out", str(tmp_path), *flags])
    assert (tmp_path / "log.jsonl").read_bytes() == (out / "log.jsonl").read_bytes()


def test_no_horizon_is_longer_than_the_continuations(setting, tmp_path):
    assert run(perturb.main, [*setting[0], "--rollout-tokens", "34", "--out", str(tmp_path)]) is None
    assert set(data_of(tmp_path)["estimates"]) == {"32 tokens", "34 tokens", "34 tokens, content words"}
    assert "to the end" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--positions", "0"], "--positions must be at least 1, got 0"),
        (["--rollout-tokens", "0"], "--rollout-tokens must be at least 1, got 0"),
        (["--max-new-tokens", "490"], "within the model's 512 positions"),
        (["--positions", "40"], "--max-new-tokens must be at least 81, the tokens that are needed"),
        (["--without-last", "-1"], "--without-last must be at least 0, got -1"),
    ],
    ids=range(5),
)
def test_what_the_caller_can_mend_is_told_in_a_line(setting, tmp_path, flags, message):
    assert message in run(perturb.main, [*setting[0], "--problems", "1", "--out", str(tmp_path), *flags])
