"""`rhythm value --engine vllm`: what vLLM samples, on a CPU, against the model's own probabilities."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from study_cases import cut_places, run, tiny_folder, tiny_model

from rhythm_kernels.analysis import value
from rhythm_kernels.analysis.vllm_engine import VLLM

pytestmark = pytest.mark.xdist_group("vllm")  # one engine, in one worker

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed: make test installs it", allow_module_level=True)

SIZES = {"hidden_size": 64, "head_dim": 32}  # which vLLM's attention takes on a CPU
ENDS = [1, 52]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    saved = tiny_folder(tmp_path_factory.mktemp("model"))
    model = tiny_model(**SIZES)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(saved)
    return saved


def test_tokens_are_drawn_from_the_model(folder):
    model = tiny_model(**SIZES)
    engine = VLLM(str(folder), ends=ENDS, max_model_len=64, dtype=torch.float32, memory=0.5, seed=0)
    count, prompts = 3000, [[5, 60, 70, 80], [90, 91]]
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    rows = [prompt for prompt in prompts for _ in range(count)]
    one = engine.complete(rows, [1] * len(rows), temperature=0.7, work="a")
    assert torch.equal(torch.random.get_rng_state(), before)
    for place, prompt in enumerate(prompts):
        drawn = np.bincount([row[0] for row in one[place * count :][:count]], minlength=259) / count
        with torch.no_grad():
            truth = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1).numpy()
        assert (abs(drawn - truth) < 5 * np.sqrt(truth * (1 - truth) / count) + 1e-3).all()
        assert 0.02 < truth.max() < 0.9
    few = rows[:50]
    again, other = (engine.complete(few, [1] * 50, temperature=0.7, work=work) for work in ("a", "b"))
    assert again == one[:50] != other
    rooms = [0, 1, 7] * 10
    grown = engine.complete(rows[:30], rooms, temperature=1.5, work="c")
    for tokens, room in zip(grown, rooms):
        assert len(tokens) == room or tokens[-1] in ENDS
        assert not set(tokens[:-1]) & set(ENDS)
    assert engine.complete([[5, 6], [7]], [0, 0], temperature=1.0, work="d") == [[], []]
    assert engine.complete([], [], temperature=1.0, work="e") == []
    engine.close()


def test_the_command_runs_and_goes_on_with_vllm(folder, tmp_path, monkeypatch):
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": "1"}) + "\n" for n in range(4)))
    arguments = [str(folder), "--task", str(task), "--batch-size", "2", "--max-new-tokens", "12", "--engine", "vllm"]
    arguments += ["--continuations", "8", "--layers", "all", "--temperature", "1.5"]
    monkeypatch.setattr(value, "continue_rows", lambda *_, **__: pytest.fail("continued by transformers"))
    assert run(value.main, [*arguments, "--out", str(tmp_path / "whole")]) is None
    whole = (tmp_path / "whole" / "log.jsonl").read_bytes()
    data = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert data["answers"] == 4 and data["continuations"] >= 4 * (data["tokens"] - data["certain"])
    place = cut_places(whole)[1]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "log.jsonl").write_bytes(whole[:place])
    assert run(value.main, [*arguments, "--out", str(tmp_path / "cut")]) is None
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == whole
    message = run(value.main, [*arguments[:-8], "--out", str(tmp_path / "cut")])
    assert "engine was" in message


@pytest.mark.parametrize(
    "model, flags, message",
    [
        ("smollm2", [], "--engine vllm needs a folder or a name on the Hugging Face hub as the model, got 'smollm2'"),
        ("some/model.gguf", [], "--engine vllm needs a folder or a name on the Hugging Face hub"),
        ("some/model", ["--temperature", "0.001"], "--temperature must be 0 (greedy) or at least 0.01, got 0.001"),
        ("some/model", ["--vllm-memory", "1.5"], "--vllm-memory must be finite and between 0.0 and 1.0, got 1.5"),
        ("some/model", ["--vllm-memory", "0"], "--vllm-memory must be above 0, got 0.0"),
        ("a", ["--engine", "transformers", "--vllm-memory", "0.4"], "--vllm-memory would have no effect with --engine"),
    ],
    ids=range(6),
)
def test_what_vllm_cannot_do_is_told_before_anything_is_loaded(model, flags, message):
    assert message in run(value.main, [model, "--engine", "vllm", *flags])
