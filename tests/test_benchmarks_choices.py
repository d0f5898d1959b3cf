"""The benchmark of the choices that the paper leaves open: it runs, and refuses credit that is wrong."""

import json

import pytest
import torch
from benchmark_cases import TINY_LLAMA
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import choices


def load(problems: int, most: int, seed: int):
    """Returns a tiny model, and `problems` random answers of different lengths."""
    torch.manual_seed(seed)
    options = dict(TINY_LLAMA)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    lengths = torch.arange(problems)[:, None] + most
    valid = torch.arange(problems + most) < lengths
    return model, torch.randint(64, valid.shape), valid.long(), valid & (torch.arange(problems + most) >= 8)


LINE = ["--problems", "3", "--max-new-tokens", "60"]


def test_it_runs_and_writes(tmp_path, capsys):
    choices.main([*LINE, "--out", str(tmp_path / "choices")], load)
    data = json.loads((tmp_path / "choices.json").read_text())
    assert (tmp_path / "choices.md").read_text() in capsys.readouterr().out
    assert data["tokens"] == [52, 53, 54]
    lines = {(line["strategy"], repr(line["choice"])): line for line in data["lines"]}
    plain, drop = lines["coupled", "{}"], lines["coupled", "{'delta': 'drop'}"]
    assert plain["changed"] == plain["moved"] == [0, 0, 0] and plain["bonus"] == [1, 1, 1]
    assert min(plain["rises"]) > 0 == max(drop["rises"]) and min(drop["changed"]) > 0
    assert drop["before_maxima"] == 0 < drop["at_maxima"]  # a token before a maximum rises


def test_wrong_credit_is_refused(monkeypatch):
    monkeypatch.setattr(choices, "token_credit", lambda strategy, mask, rhythm, **options: mask.float() + 1)
    with pytest.raises(SystemExit, match=r"gamma is not that of reference.py for CreditOptions\(strategy='coupled'"):
        choices.main(LINE, load)
