"""`rhythm value`: continuations against models whose values are known, the command and its page."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from study_cases import cut_places, kept_batches, run, tiny_folder, tiny_model

from rhythm_kernels.analysis import value, value_choices, value_judge, value_tables
from rhythm_kernels.analysis.problems import Problem
from rhythm_kernels.analysis.rollouts import Row, continue_rows
from rhythm_kernels.analysis.study import Answer, Study
from rhythm_kernels.analysis.value_page import render
from train.words import build_tokenizer

# ---- continuations ---------------------------------------------------------------------------------------------------

WORDS = 24
ENDS = [1, 4, 5, 6, 7, 8, 9, 10]
TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def model():
    made = tiny_model(vocab_size=WORDS)
    made.generation_config.eos_token_id = ENDS
    return made


def study_of(model, **options) -> SimpleNamespace:
    args = {"temperature": 1.4, "continuations": 3000, "layers": "all", "max_new_tokens": 3, "rollout_batch_size": 999}
    problem = Problem("3 5 ? 8 >", "8", verify=lambda text: float(sum(map(len, text.split())) % 2))
    return SimpleNamespace(
        model=model,
        tokenizer=TOKENIZER,
        args=SimpleNamespace(**args | options),
        problems=[problem, problem],
        ends=set(ENDS),
        vllm=None,
        words_of=lambda tokens: TOKENIZER.decode([token for token in tokens if token not in ENDS]),
        seeded=lambda work: nullcontext(torch.manual_seed(0)),
    )


@torch.no_grad()
def true_value(study, prompt: list[int], tokens: list[int]) -> float:
    """Returns the value of a prefix by going through all its continuations."""
    if tokens and (tokens[-1] in study.ends or len(tokens) == study.args.max_new_tokens):
        return float(value.solved(study, 0, tokens))
    logits = model_logits(study.model, prompt + tokens) / study.args.temperature
    return sum(p * true_value(study, prompt, [*tokens, one]) for one, p in enumerate(logits.softmax(-1).tolist()))


def model_logits(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


def test_values_are_those_of_all_continuations(model):
    study = study_of(model)
    prompt = TOKENIZER.encode("3 5 ? 8 >")
    answers = [Answer(0, prompt, [16, 2, 3]), Answer(1, prompt[1:], [2, 2, 5]), Answer(0, prompt, [3, 4])]
    results = value.measured(study, answers)  # one is cut off, two end by themselves
    assert [result["solved"] for result in results] == [False, False, True]
    for answer, result in zip(answers, results):
        for t, (own, other) in enumerate(zip(answer.tokens, result["other"])):
            probability = (model_logits(model, answer.prompt + answer.tokens[:t]) / 1.4).softmax(-1)[own]
            assert other == pytest.approx(1 - probability.item(), abs=1e-5)
            assert result["tries"][t] == max(2, round(3000 * other / 2))
        rates = np.array(result["wins"]) / result["tries"]
        assert abs(rates[0] - rates[1]).max() < 0.3 and (rates[0] != rates[1]).any(), "halves are two draws"
        decisions = value_judge.judge(result, answer.index, 0.4).decisions
        truth = [true_value(study, answer.prompt, answer.tokens[:t]) for t in range(len(answer.tokens) + 1)]
        np.testing.assert_allclose(decisions.value, truth, atol=0.035)
        np.testing.assert_allclose(decisions.decision, np.diff(truth), atol=0.05)
        assert truth[-1] == result["solved"] and max(abs(np.diff(truth))) > 0.1


def test_entropies_are_those_of_the_policy_at_its_temperature(model):
    study, prompt, tokens = study_of(model, continuations=4), TOKENIZER.encode("3 5 ? 8 >"), [16, 2, 3]
    (result,) = value.measured(study, [Answer(0, prompt, tokens)])
    for t, entropy in enumerate(result["entropy"]):
        probabilities = (model_logits(model, prompt + tokens[:t]) / 1.4).softmax(-1)
        assert entropy == pytest.approx(torch.special.entr(probabilities).sum().item(), rel=1e-4)


def test_a_model_with_few_heads_is_read(tmp_path):
    few = tiny_model(num_hidden_layers=1)
    answer = Answer(0, [3, 4, 5, 6], [7, 8, 9])
    assert few.config.num_attention_heads < 16
    study = study_of(few, continuations=4, temperature=1.0)
    assert len(value.measured(study, [answer])[0]["waad"]) == 3


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_are_drawn_from_the_policy_at_its_temperature(model, shared):
    torch.manual_seed(1)
    prompt, count = TOKENIZER.encode("3 5 ? 8 >"), 4000
    cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
    rows = [Row(0, 4, 12, 1)] * count + [Row(0, 4, ENDS[2], 1)] + [Row(0, 5, 2, 0)]
    *drawn, ended, full = continue_rows(model, TOKENIZER, [prompt], [cache], rows, temperature=0.7, shared=shared)
    assert ended == full == [] and all(len(one) == 1 for one in drawn)
    share = np.bincount([one[0] for one in drawn], minlength=WORDS) / count
    truth = (model_logits(model, [*prompt[:4], 12]) / 0.7).softmax(-1).detach().numpy()
    assert (abs(share - truth) < 5 * np.sqrt(truth * (1 - truth) / count) + 1e-3).all()
    assert truth.max() < 0.9


def test_other_tokens_are_drawn_without_the_own_one():
    torch.manual_seed(2)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 40.0]])
    others, tokens = value.draw_others(logits, torch.tensor([0, 3]), 8000)
    rest = logits[0, 1:].softmax(-1).numpy()
    assert others[0] == pytest.approx(1 - float(logits[0].softmax(-1)[0]), rel=1e-5) and others[1] == 0.0
    assert tokens[1] == [] and len(tokens[0]) == 2 * round(4000 * others[0]) and 0 not in tokens[0]
    np.testing.assert_allclose(np.bincount(tokens[0])[1:] / len(tokens[0]), rest, atol=0.03)
    _, few = value.draw_others(logits, torch.tensor([0, 3]), 4)
    assert len(few[0]) == 4


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(arguments of a study of four problems, its folder)."""
    folder = tmp_path_factory.mktemp("value")
    saved = tiny_folder(folder / "model")
    often = tiny_model()
    with torch.no_grad():
        often.lm_head.weight[[1, 52, 53]] *= 3  # the end, 0 and 1
    often.save_pretrained(saved)
    task = folder / "task.jsonl"
    task.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": "1"}) + "\n" for n in range(4)))
    arguments = [str(saved), "--task", str(task), "--batch-size", "2", "--max-new-tokens", "24"]
    arguments += ["--continuations", "8", "--layers", "all", "--temperature", "1.5", "--seed", "3"]
    assert run(value.main, [*arguments, "--out", str(folder / "out")]) is None
    return arguments, folder / "out"


def data_of(folder) -> dict:
    data = json.loads((folder / "report.json").read_text())
    return {name: one for name, one in data.items() if name not in ("command", "versions")}


def test_the_report_says_what_was_found(setting):
    _, out = setting
    text, data = (out / "report.md").read_text(), data_of(out)
    assert data["answers"] == 4 and data["continuations"] >= 4 * (data["tokens"] - data["certain"])
    assert data["balance"]["value"]["value"] > 0 and data["balance"]["decisions"]["value"] > 0
    assert set(data["strategies"]) == {"all answers", "solved answers"} and len(data["tenths"]) == 10
    assert set(data["strategies"]["all answers"]) == {*value_judge.STRATEGIES, "oracle"}
    assert set(data["signals"]) == set(value_tables.SIGNALS)
    for strategy in value_judge.STRATEGIES:
        assert f"| {strategy} |" in text
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_is_cut_anywhere_goes_on_to_the_same_bits(setting, tmp_path, monkeypatch):
    arguments, out = setting
    whole = (out / "log.jsonl").read_bytes()
    done, measured = [], value.measured
    monkeypatch.setattr(value, "measured", lambda study, batch: done.append(batch[0].index) or measured(study, batch))
    for place in cut_places(whole):
        done.clear()
        (tmp_path / "log.jsonl").write_bytes(whole[:place])
        torch.manual_seed(place)
        assert run(value.main, [*arguments, "--out", str(tmp_path)]) is None
        assert (tmp_path / "log.jsonl").read_bytes() == whole
        assert done == [0, 2][kept_batches(whole[:place]) :], "finished work is done again"
        assert data_of(tmp_path) == data_of(out)


def test_another_top_fraction_needs_no_new_continuations(setting, tmp_path, monkeypatch):
    arguments, out = setting
    (tmp_path / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes())
    monkeypatch.setattr(value, "measured", lambda *_: pytest.fail("continued again"))
    assert run(value.main, [*arguments, "--out", str(tmp_path), "--top-fraction", "1"]) is None
    numbers = data_of(tmp_path)["strategies"]["all answers"]["global"]
    assert numbers["tokens"]["value"] == numbers["decisions"]["value"] == numbers["chance"]["value"] == 1
    message = run(value.main, [*arguments, "--out", str(tmp_path), "--continuations", "16"])
    assert "continuations was 8 and is 16" in message


def test_corrected_answers_are_measured_anew(setting, tmp_path, monkeypatch):
    """The answers that the model gave stay; which of them are right is another question."""
    arguments, out = setting
    (tmp_path / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes())
    corrected = tmp_path / "corrected.jsonl"
    task = Path(arguments[arguments.index("--task") + 1])
    before = task.read_text()
    corrected.write_text(before.replace('"answer": "1"', '"answer": "0"'))
    monkeypatch.setattr(Study, "_generate", lambda *_: pytest.fail("answered again"))
    try:
        task.write_text(corrected.read_text())
        assert run(value.main, [*arguments, "--out", str(tmp_path)]) is None
    finally:
        task.write_text(before)
    assert data_of(tmp_path)["balance"]["value"] != data_of(out)["balance"]["value"]


def test_choices_need_no_new_continuations(setting, tmp_path, monkeypatch):
    arguments, out = setting
    (tmp_path / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes())
    monkeypatch.setattr(value, "measured", lambda *_: pytest.fail("continued again"))
    assert run(value.main, [*arguments, "--out", str(tmp_path), "--choices"]) is None
    before, after = data_of(out), data_of(tmp_path)
    rows = after.pop("choices")
    assert before.pop("choices") == [] and len(rows) > 40 and before == after
    for row in rows:
        if row["choice"] == "defaults":
            judged = after["strategies"]["all answers"][row["strategy"]]
            for name in value_choices.RATIOS:
                assert row[name] == judged[name], "the defaults are what the first table has"
    assert "| coupled | horizon 1 to the end |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--temperature", "0"], "--temperature must be above 0, since continuations are sampled, got 0.0"),
        (["--continuations", "3"], "--continuations must be at least 4, got 3"),
        (["--rollout-batch-size", "0"], "--rollout-batch-size must be at least 1, got 0"),
        (["--top-fraction", "1.5"], "--top-fraction must be finite and between 0.0 and 1.0, got 1.5"),
        (["--top-fraction", "0"], "--top-fraction must be above 0, since a strategy that selects nothing is GRPO"),
        (["--max-new-tokens", "600"], "within the model's 512 positions"),
    ],
    ids=range(6),
)
def test_what_the_caller_can_mend_is_told_in_a_line(setting, tmp_path, flags, message):
    assert message in run(value.main, [*setting[0], "--out", str(tmp_path), *flags])


def test_a_problem_without_an_answer_is_refused(setting, tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_text('{"question": "What is it?"}\n')
    message = run(value.main, [*setting[0], "--task", str(task), "--out", str(tmp_path / "out")])
    assert message == "--task must give the right answer to every problem, got none to 'What is it?'"


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_escapes_what_a_model_wrote_and_loads_nothing(setting):
    answer = {
        "prompt": "</code><script>alert(1)</script>",
        "solved": True,
        "words": ["<b>", '" onmouseover="x', "\u2067\n", "fine"],
        "value": [0.25, 0.5, 0.25, 0.25, 1.0],
        "decision": [0.25, -0.25, 0.0, 0.75],
        "noise": [0.01] * 4,
        "probability": [0.5] * 4,
        "gamma": [1.0, 1.5, 1.0, 1.0],
        "signals": {name: [0.0, 1.0, 2.0, 0.5] for name in ("waad", "fai", "entropy")},
    }
    html = render([answer], "a <model>")
    assert "\u2067" not in html and "⟨U+2067⟩⏎" in html
    assert "<script" not in html and "<b>" not in html and '" onmouse' not in html and "a <model>" not in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    page = (setting[1] / "answers.html").read_text(encoding="utf-8")
    for text in (html, page):
        assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import", text)
    row = html.split('class="tokens decision"')[1].split("</div>")[0]
    assert [float(one) for one in re.findall(r"--h: ([\d.]+)", row)] == [0.333, 0.333, 0.0, 1.0]
    assert re.findall(r'<span class="(\w+)', row) == ["up", "down", "down", "up"] and row.count("credited") == 1
    assert "value 0.250 → 1.000, decision +0.750 ± 0.010" in row
