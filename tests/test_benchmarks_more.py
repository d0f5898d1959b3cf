"""The benchmark of the statistics that `more` names: it runs, compares right numbers, and times nothing wrong."""

import json

import pytest
import torch

from benchmarks import more_statistics
from rhythm_kernels.statistics.more import MORE


def test_it_reports_every_statistic(tmp_path, capsys):
    out = tmp_path / "more"
    more_statistics.main(["--tokens", "70", "--rounds", "1", "--device", "cpu", "--out", str(out)])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip().replace(" ", "_") for line in table[2:]] == ["nothing", *MORE]
    assert all("| - |" not in line for line in table[3:]), "a way without a time"
    measured = json.loads((tmp_path / "more.json").read_text())["measured"]
    assert set(measured) == {f"{name}, {how}" for name in MORE for how in ("lse", "no lse", "maps")} | {
        "nothing, lse",
        "nothing, no lse",
    }


@pytest.mark.parametrize("name", MORE)
def test_the_maps_are_the_same_numbers(name):
    problem = more_statistics.make_problem(90, torch.device("cpu"))
    for lse_known in (False, True):
        torch.testing.assert_close(problem.from_map(name), problem.run((name,), lse_known)[name], rtol=1e-4, atol=1e-5)


def test_a_wrong_statistic_is_not_timed(monkeypatch):
    real = more_statistics.attention_stats

    def spoiled(*args, **options):
        stats = real(*args, **options)
        return stats._replace(more={name: x * (1.01 if name == "self_mass" else 1) for name, x in stats.more.items()})

    monkeypatch.setattr(more_statistics, "attention_stats", spoiled)
    with pytest.raises(SystemExit, match="self_mass is off by 1.0e-02, allowed are 1.0e-04: it is not timed"):
        more_statistics.main(["--tokens", "70", "--rounds", "1", "--device", "cpu"])
