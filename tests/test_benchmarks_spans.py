"""The benchmark of spans from a sample of rows: it runs, and refuses spans that are wrong."""

import json

import pytest
import torch
from benchmark_cases import TINY_LLAMA
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import span_sample


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Replaces the models by a tiny one, and the text by random tokens."""

    def load_model(name):
        torch.manual_seed(0)
        options = dict(TINY_LLAMA)
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval(), "random weights"

    monkeypatch.setattr(span_sample, "load_model", load_model)
    monkeypatch.setattr(span_sample, "text_ids", lambda name, least, vocabulary: torch.randint(vocabulary, (least,)))


LINE = ["--models", "qwen3-small", "--tokens", "300", "--texts", "2", "--rounds", "1"]


def test_it_runs_and_writes(tmp_path, capsys):
    span_sample.main([*LINE, "--rows", "64", "320", "--out", str(tmp_path / "sample")])
    data = json.loads((tmp_path / "sample.json").read_text())
    assert (tmp_path / "sample.md").read_text() in capsys.readouterr().out
    (result,) = data["results"]
    assert len(result["texts"]) == 2 and set(result["times"]) == {"all", "64", "320"}
    for text in result["texts"]:
        assert text["320"] == {"local": 1, "global_": 1, "waad": 1, "fai": 1, "gamma": 0}
        assert text["64"]["waad"] < 1 or text["64"]["local"] == 1


def test_wrong_spans_are_refused(monkeypatch):
    real = span_sample.run_stats

    def wrong(q, k, lse, layout, options):
        stats = real(q, k, lse, layout, options)
        return stats._replace(span=stats.span * 1.01)

    monkeypatch.setattr(span_sample, "run_stats", wrong)
    with pytest.raises(SystemExit, match="spans from all rows are off by 1.0e-02"):
        span_sample.main([*LINE, "--rows", "64"])


def test_a_model_that_is_no_folder_is_refused(capsys):
    with pytest.raises(SystemExit):
        span_sample.main(["--models", "no-such-model"])
    assert "--models must be smollm2-135m, qwen3-small or folders, got 'no-such-model'" in capsys.readouterr().err
