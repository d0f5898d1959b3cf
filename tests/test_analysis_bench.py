"""`rhythm bench`: what it times is checked first, and the table has what was asked for."""

import gc
import json

import pytest
import torch
from models import dense_stats, eager_maps, llama

from rhythm_kernels import reference
from rhythm_kernels.analysis import bench, cli
from rhythm_kernels.analysis.measure import interleave

TOKENS = 96


@pytest.fixture
def model():
    torch.manual_seed(1)
    return llama("sdpa")


@pytest.fixture
def ids():
    return torch.randint(0, 61, (1, TOKENS), generator=torch.Generator().manual_seed(2))


def test_the_papers_way_is_the_definition(model, ids):
    stats = bench.eager_forward(model, model.model, [2, 3], ids)
    assert model.config._attn_implementation == "sdpa" and not model.model.layers[2].self_attn._forward_hooks
    rows, segments = torch.ones(1, TOKENS, dtype=torch.bool), reference.segment_ids(1, TOKENS)
    for layer, maps in enumerate(eager_maps(model, input_ids=ids)):
        if layer in stats:
            for got, want in zip(stats[layer], dense_stats(maps, rows, segments, 1)):
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert sorted(stats) == [2, 3]


def test_what_is_timed_agrees(model, ids):
    variants, worst = bench.make_variants(model, ids, eager=True)
    assert list(variants) == ["forward", "groups known", "with spans", "paper's way"] and worst < bench.EXACT
    logits, c = variants["groups known"]()
    assert torch.equal(logits, variants["forward"]()) and c.rhythm().spans is None
    assert "paper's way" not in bench.make_variants(model, ids, eager=False)[0]


def test_layers_are_places_where_some_were_removed(model, ids):
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in (0, 3, 4, 4, 5))
    model.config.num_hidden_layers = 5
    assert bench.make_variants(model, ids, eager=True)[1] < bench.EXACT


def test_a_run_that_fails_leaves_the_garbage_collector_as_it_was():
    before = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError):
        interleave({"one": lambda: 1 / 0}, 3, "test")
    assert gc.get_freeze_count() == before


def test_a_model_whose_logits_are_nan_is_not_timed(model, ids):
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="the logits of this model are NaN in torch.float32: nothing is timed"):
        bench.make_variants(model, ids, eager=False)


def test_wrong_statistics_are_not_timed(model, ids, monkeypatch):
    right = bench.EagerSums.__call__
    monkeypatch.setattr(bench.EagerSums, "__call__", lambda self, maps: right(self, maps * 1.01))
    with pytest.raises(ValueError, match="statistics are off by 9.*e-03 of the largest, .*nothing timed"):
        bench.make_variants(model, ids, eager=True)


def test_the_command(tmp_path, capsys):
    torch.manual_seed(1)
    llama("sdpa").save_pretrained(tmp_path / "model")
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    given = ["bench", str(tmp_path / "model"), "--tokens", "128", "--rounds", "3", "--out", str(tmp_path / "out")]
    assert cli.main(given) == 0
    said = capsys.readouterr().out
    assert "| paper's way |" in said and "medians of 3 interleaved rounds" in said
    assert (tmp_path / "out" / "bench.md").read_text() == said[:-1]
    data = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert data["tokens"] == 128 and len(data["with spans"]["samples"]) == 3
    assert cli.main([*given[:2], "--tokens", "8"]) == 2
    assert "rhythm bench: --tokens must be at least 64, got 8" in capsys.readouterr().err
