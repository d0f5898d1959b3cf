"""`rhythm couple`: its statistics on signals by hand, and its command."""

import json

import numpy as np
import pytest
import torch
from study_cases import cut_places, kept_batches, problem_file, run, tiny_folder

from rhythm_kernels.analysis import couple, study
from rhythm_kernels.analysis.bootstrap import bootstrap, share
from rhythm_kernels.analysis.couple import Peaks
from rhythm_kernels.analysis.profile import CLASSES


def marks(text: str) -> np.ndarray:
    return np.array([letter == "x" for letter in text])


def peaks(waad: str, fai: str, receiver: str = "", entropy=None) -> Peaks:
    entropy = np.zeros(len(waad)) if entropy is None else np.array(entropy, dtype=float)
    return Peaks(entropy, np.append(entropy[1:], entropy[-1:]), marks(waad), marks(fai), marks(receiver or fai))


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "within, expected", [(0, "x..x......x"), (1, "xx.xx.....x"), (2, "xxxxxx....x"), (99, "xxxxxxxxxxx")]
)
def test_after_reaches_to_the_right_and_no_further(within, expected):
    assert (couple.after(marks("x..x......x"), within) == marks(expected)).all()
    both = np.stack([marks("..x"), marks("x..")])
    assert (couple.after(both, 1) == np.stack([marks("..x"), marks("xx.")])).all()


def test_shifts_go_around_and_are_never_zero():
    moved = couple.shifted(marks("xx..."), np.array([1, 4, -1]))
    assert (moved == np.stack([marks(".xx.."), marks("x...x"), marks("x...x")])).all()
    for nearby, most in ((False, 39), (True, couple.NEARBY)):
        shifts = couple.draw_shifts(40, 2000, 0, 3, nearby)
        assert set(abs(shifts)) == set(range(1, most + 1))
        assert (shifts == couple.draw_shifts(40, 2000, 0, 3, nearby)).all()
        assert (shifts != couple.draw_shifts(40, 2000, 1, 3, nearby)).any()


def test_counts_by_hand():
    #                waad          fai           receiver
    answers = [
        peaks("x...x..x..", ".x..x....x", ".x.x..x...", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        peaks("..x.......", "...x.x....", "...x.x....", [4] * 10),
    ]
    assert couple.observed_sums("entropy", answers, 0).tolist() == [[14, 3], [4, 1]]  # 1 + 5 + 8
    assert couple.observed_sums("next entropy", answers, 0).tolist() == [[17, 3], [4, 1]]  # 2 + 6 + 9
    assert couple.random_sums("entropy", answers, 0).tolist() == [[55, 10], [40, 10]]
    assert couple.random_sums("co-occurrence", answers, 0).tolist() == [[3, 10], [2, 10]]
    # 6 and 2 of 10 tokens are at a WAAD peak or one after
    assert couple.random_sums("coupling", answers, 1) == pytest.approx(np.array([[3 * 0.6, 3], [2 * 0.2, 2]]))
    assert couple.observed_sums("co-occurrence", answers, 0).tolist() == [[1, 3], [2, 2]]
    coupling = {within: couple.observed_sums("coupling", answers, within).tolist() for within in range(4)}
    assert coupling == {0: [[1, 3], [0, 2]], 1: [[2, 3], [1, 2]], 2: [[3, 3], [1, 2]], 3: [[3, 3], [2, 2]]}
    row = couple.row_of("", "coupling", answers, within=1, shuffles=10, seed=0)
    assert row.observed.value == 3 / 5
    entropy = couple.row_of("", "entropy", answers, within=0, shuffles=10, seed=0)
    assert entropy.observed.value == 18 / 4 and entropy.random == (55 + 40) / 20
    assert entropy.lift.value == pytest.approx(4.5 / 4.75 - 1)
    together = couple.row_of("", "co-occurrence", answers, within=0, shuffles=10, seed=0)
    assert together.observed.value == 3 / 5 and together.random == 5 / 20 and together.lift.value == pytest.approx(1.4)


def test_shifted_peaks_are_shifted_by_every_distance():
    answer = peaks("x..x......", ".x....x...")
    hits = [(couple.after(np.roll(answer.waad, d), 1) & answer.fai).sum() for d in range(1, 10)]
    row = couple.row_of("", "coupling", [answer], within=1, shuffles=50_000, seed=0)
    assert row.shifted_lift.value == pytest.approx(0.5 / (np.mean(hits) / 2) - 1, abs=0.02)  # one of the two is coupled


def test_shuffled_peaks_are_at_every_place():
    """The number of FAI peaks at reached tokens is hypergeometric: 2 of 10 tokens are peaks, 4 are reached."""
    answer = peaks("x..x......", ".x....x...")
    row = couple.row_of("", "coupling", [answer], within=1, shuffles=50_000, seed=0)
    assert row.random == 0.4 and row.lift.value == pytest.approx(0.5 / 0.4 - 1)
    assert row.p == pytest.approx(1 - (6 / 10) * (5 / 9), abs=0.01)
    sums = couple.shuffled_sums("entropy", [peaks("x.x.", "x...", entropy=[1, 2, 3, 6])], 20_000, 0, 0)
    assert set(np.unique(sums)) == {3.0, 4.0, 5.0, 7.0, 8.0, 9.0} and sums.mean() == pytest.approx(6, abs=0.05)


def test_the_papers_lifts_are_those_of_its_columns():
    lifts = {name: observed / random - 1 for name, (observed, random) in couple.PAPER.items()}
    assert lifts["co-occurrence"] == pytest.approx(1.7149, abs=2e-3)
    assert lifts["coupling"] == pytest.approx(0.4247, abs=2e-3)
    assert lifts["entropy"] == pytest.approx(0.512, abs=1e-3)  # it prints 51.97 %


def random_answers(plant: float, *, rising: bool = False, count: int = 40, size: int = 200) -> list[Peaks]:
    """Returns sparse peaks; a share `plant` of the WAAD peaks has an FAI peak one token later.

    With `rising`, most peaks are in the last quarter.
    """
    draw = np.random.default_rng(7)
    chance = np.where(np.arange(size) > 0.75 * size, 0.4, 0.04) if rising else np.full(size, 0.15)
    answers = []
    for _ in range(count):
        waad, fai = draw.random(size) < chance, draw.random(size) < chance
        planted = np.roll(waad, 1) & (draw.random(size) < plant)
        fai = planted | fai if plant else fai
        entropy = draw.exponential(1.0, size)
        answers.append(Peaks(entropy + plant * waad, entropy, waad, fai, fai ^ (draw.random(size) < 0.02)))
    return answers


def test_a_planted_coupling_is_found_and_chance_is_not():
    rows = {row.name: row for row in couple.table_2(random_answers(0.7), within=1, shuffles=400, seed=0)}
    coupled = rows["coupling, 0 to 1 after"]
    assert min(each.low for each in (coupled.lift, coupled.shifted_lift, coupled.nearby_lift)) > 0.3
    assert coupled.p == 1 / 401
    assert coupled.paper == couple.PAPER["coupling"] and rows["coupling, 0 to 2 after"].paper is None
    assert rows["co-occurrence"].lift.low > 2
    assert rows["entropy at WAAD peaks"].lift.low > 0.3 and rows["entropy of the token after"].p > 0.01
    for row in couple.table_2(random_answers(0.0), within=1, shuffles=400, seed=0):
        if row.name != "co-occurrence":
            assert row.lift.low < 0 < row.lift.high and abs(row.lift.value) < 0.06 and row.p > 0.01, row
            assert abs(row.shifted_lift.value) < 0.06 and abs(row.nearby_lift.value) < 0.06


def test_what_merely_rises_along_an_answer_is_no_coupling_nearby():
    row = couple.row_of("", "coupling", random_answers(0.0, rising=True), within=0, shuffles=400, seed=0)
    assert row.lift.low > 0.5 and row.shifted_lift.low > 0.5  # two signals that rise meet more often than by chance
    assert row.nearby_lift.value < row.lift.value / 3


def test_last_tokens_can_be_left_out():
    wave = [0.0, 1.0, 0.0, 3.0, 0.0, 2.0, 0.0, 4.0] * 2 + [0.0, 0.0]
    signal = {name: wave + [9.0, 0.0] * 4 for name in ("waad", "fai", "receiver_fai")}
    signal["entropy"] = [float(n) for n in range(26)]
    whole = couple.peaks_of(signal, 0.0)
    assert (whole.waad == marks(".x.x.x.x.x.x.x.x..x.x.x.x.")).all()
    assert whole.next_entropy.tolist() == [*range(1, 26), 25]
    counted = couple.peaks_of(signal, 0.0, 8)
    assert (counted.waad == marks(".x.x.x.x.x.x.x.x..")).all() and (counted.fai == counted.receiver).all()
    assert counted.entropy.tolist() == list(range(18)) and counted.next_entropy.tolist() == list(range(1, 19))
    # the 15th smallest of 18 is 3: ceil(0.8 x 18)
    assert (couple.peaks_of(signal, 0.8, 8).waad == marks("...x...x...x...x..")).all()
    assert couple.peaks_of(signal, 0.0, 26 - couple.FEWEST_TOKENS) is not None
    assert couple.peaks_of(signal, 0.0, 27 - couple.FEWEST_TOKENS) is None


def test_an_interval_covers_what_it_should():
    draw = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        estimate = bootstrap(np.stack([draw.normal(2.0, 1.0, 60), np.ones(60)], 1), share, seed=seed, resamples=500)
        covered += estimate.low <= 2.0 <= estimate.high
    assert 178 <= covered <= 200  # of 200, 95 % expected
    columns = np.array([[1, 2], [3, 4], [0, 0]])
    estimate = bootstrap(columns, share, seed=0)
    assert estimate.value == 4 / 6 and (estimate.low, estimate.high) == (0.5, 0.75)
    assert estimate == bootstrap(columns, share, seed=0)
    one = bootstrap(columns[:1], share, seed=0)
    assert one.value == 0.5 and np.isnan(one[1:]).all(), "other problems may give anything"
    assert np.isnan(bootstrap(columns * 1e-20, share, seed=0)).all(), "a share of rounding errors"
    for nothing in (columns[2:], np.zeros((0, 2))):
        assert np.isnan(bootstrap(nothing, share, seed=0)).all()
    assert study.shown(bootstrap(columns[2:], share, seed=0)) == "–"


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(arguments of a study of four problems, its folder)."""
    folder = tmp_path_factory.mktemp("couple")
    model, task = tiny_folder(folder / "model"), problem_file(folder / "task.jsonl", 4)
    arguments = [str(model), "--task", str(task), "--batch-size", "2", "--max-new-tokens", "64", "--receivers", "4"]
    arguments += ["--shuffles", "20"]
    assert run(couple.main, [*arguments, "--out", str(folder / "out")]) is None
    return arguments, folder / "out"


def data_of(folder) -> dict:
    return {
        name: value for name, value in json.loads((folder / "report.json").read_text()).items() if name != "command"
    }


def test_the_report_says_what_was_found(setting):
    arguments, out = setting
    text, data = (out / "report.md").read_text(), json.loads((out / "report.json").read_text())
    assert f"rhythm couple {arguments[0]}" in text and study.folded(data["command"]) in text
    assert data["answers"] + data["left_out"] == 4 and data["answers"] >= 2
    assert "60.8%" in text and "36.9%" in text and "0.239" in text
    assert [row["name"] for row in data["rows"]][:3] == [
        "entropy at WAAD peaks",
        "entropy of the token after",
        "co-occurrence",
    ]
    assert data["settings"]["temperature"] == 0.7 and data["settings"]["layers"] == "all"
    assert data["without_last"]["tokens"] == 32 and len(data["without_last"]["rows"]) == len(data["rows"])
    assert [line["name"] for line in data["profiles"]["class"]] == list(CLASSES)
    assert "answers were cut off after 64 tokens" in text and "(Spearman)" in text and "tenth of the answer" in text
    assert len(data["settings"]["weights"]) == 16
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG" and not list(out.glob("*.unfinished"))
    assert data["versions"]["torch"] == torch.__version__


def test_a_run_that_is_cut_anywhere_goes_on_to_the_same_bits(setting, tmp_path, monkeypatch):
    arguments, out = setting
    whole = (out / "log.jsonl").read_bytes()
    measured, signals = [], couple.signals
    monkeypatch.setattr(couple, "signals", lambda s, batch: measured.append(batch[0].index) or signals(s, batch))
    for place in cut_places(whole):
        measured.clear()
        (tmp_path / "log.jsonl").write_bytes(whole[:place])
        assert run(couple.main, [*arguments, "--out", str(tmp_path)]) is None
        assert (tmp_path / "log.jsonl").read_bytes() == whole
        assert measured == [0, 2][kept_batches(whole[:place]) :], "finished work is done again"
        assert data_of(tmp_path) == data_of(out)


def test_other_settings_are_refused_and_other_statistics_are_not(setting, tmp_path, monkeypatch):
    arguments, out = setting
    (tmp_path / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes())
    given = [*arguments, "--out", str(tmp_path)]
    monkeypatch.setattr(couple, "signals", lambda *_: pytest.fail("read again"))
    flags = ["--peak-quantile", "0.2", "--within", "2", "--shuffles", "5", "--without-last", "8"]
    assert run(couple.main, [*given, *flags]) is None
    assert json.loads((tmp_path / "report.json").read_text())["peaks"]["waad"] > data_of(out)["peaks"]["waad"]
    for flags, message in (
        (["--seed", "1"], "seed was 0 and is 1"),
        (["--temperature", "0"], "temperature was 0.7 and is 0.0"),
        (["--receivers", "3"], "receivers was 4 and is 3"),
    ):
        error = run(couple.main, [*given, *flags])
        assert message in error and "other settings" in error
    assert (tmp_path / "log.jsonl").read_bytes() == (out / "log.jsonl").read_bytes()


def test_more_problems_go_on_where_fewer_ended(setting, tmp_path):
    arguments, out = setting
    given = [*arguments, "--out", str(tmp_path)]
    assert run(couple.main, [*given, "--problems", "3"]) is None  # the second batch has one problem
    assert run(couple.main, given) is None
    got, expected = (data_of(folder) for folder in (tmp_path, out))
    assert got == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--problems", "0"], "--problems must be at least 1, got 0"),
        (["--max-new-tokens", "500"], "within the model's 512 positions"),
        (["--max-new-tokens", "15"], "--max-new-tokens must be at least 16, the tokens that are needed"),
        (["--without-last", "0"], "--without-last must be at least 1, got 0"),
        (["--layers", "none"], "--layers must be all, a number or a list such as 10,13,15, got 'none'"),
        (["--peak-quantile", "1.5"], "--peak-quantile must be finite and between 0.0 and 1.0"),
        (["--receivers", "17"], "receivers must be between 1 and 16"),
        (["--temperature", "nan"], "--temperature must be finite"),
        (["--temperature", "1e-40"], "--temperature must be 0 (greedy) or at least 0.01, got 1e-40"),
        (["--task", "absent.jsonl"], "absent.jsonl"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_the_caller_can_mend_is_told_in_a_line(setting, tmp_path, flags, message):
    assert message in run(couple.main, [*setting[0], "--problems", "2", "--out", str(tmp_path), *flags])
