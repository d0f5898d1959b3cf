"""`rhythm couple`: its statistics on signals by hand, the log that a killed run continues from, and task files."""

import json
import sys

import numpy as np
import pytest
import torch
from study_cases import cut_places, kept_problems, problem_file, run, tiny_folder

from rhythm_kernels.analysis import couple, study
from rhythm_kernels.analysis.bootstrap import bootstrap, share
from rhythm_kernels.analysis.couple import Peaks
from rhythm_kernels.analysis.problems import load_problems, read_problems
from rhythm_kernels.analysis.receivers import FEWEST_ROWS
from rhythm_kernels.analysis.resume import Log


def marks(text: str) -> np.ndarray:
    return np.array([letter == "x" for letter in text])


def peaks(waad: str, fai: str, receiver: str = "", entropy=None) -> Peaks:
    entropy = np.zeros(len(waad)) if entropy is None else np.array(entropy, dtype=float)
    return Peaks(entropy, np.roll(entropy, -1), marks(waad), marks(fai), marks(receiver or fai))


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
    assert couple.observed_sums("co-occurrence", answers, 0).tolist() == [[1, 3], [2, 2]]
    coupling = {within: couple.observed_sums("coupling", answers, within).tolist() for within in range(4)}
    assert coupling == {0: [[1, 3], [0, 2]], 1: [[2, 3], [1, 2]], 2: [[3, 3], [1, 2]], 3: [[3, 3], [2, 2]]}
    row = couple.row_of("", "coupling", answers, within=1, shuffles=10, seed=0)
    assert row.observed.value == 3 / 5
    entropy = couple.row_of("", "entropy", answers, within=0, shuffles=10, seed=0)
    assert entropy.observed.value == 18 / 4 and entropy.baseline == (55 + 40) / 20
    assert entropy.lift.value == pytest.approx(4.5 / 4.75)


def test_the_baseline_is_the_mean_over_all_shifts():
    answer = peaks("x..x......", ".x....x...")
    hits = [(couple.after(np.roll(answer.waad, d), 1) & answer.fai).sum() for d in range(1, 10)]
    row = couple.row_of("", "coupling", [answer], within=1, shuffles=50_000, seed=0)
    assert row.baseline == pytest.approx(np.mean(hits) / 2, abs=0.01)
    assert row.p == pytest.approx(np.mean(np.array(hits) >= 1), abs=0.01)  # one of the two is coupled


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
    assert coupled.lift.low > 1.3 and coupled.nearby_lift.low > 1.3 and coupled.p == 1 / 401
    assert coupled.paper == couple.PAPER["coupling"] and rows["coupling, 0 to 2 after"].paper is None
    assert rows["co-occurrence"].lift.low > 3
    assert rows["entropy at WAAD peaks"].lift.low > 1.3 and rows["entropy of the token after"].p > 0.01
    for row in couple.table_2(random_answers(0.0), within=1, shuffles=400, seed=0):
        if row.name != "co-occurrence":
            assert row.lift.low < 1 < row.lift.high and abs(row.lift.value - 1) < 0.06 and row.p > 0.01, row
            assert abs(row.nearby_lift.value - 1) < 0.06


def test_what_merely_rises_along_an_answer_is_no_coupling_nearby():
    row = couple.row_of("", "coupling", random_answers(0.0, rising=True), within=0, shuffles=400, seed=0)
    assert row.lift.low > 1.5  # two signals that rise meet more often than by chance anywhere
    assert row.nearby_lift.value < 1 + (row.lift.value - 1) / 3


def test_peaks_are_of_the_tokens_that_enough_others_look_back_at():
    wave = [0.0, 1.0, 0.0, 3.0, 0.0, 2.0, 0.0, 4.0] * 2 + [0.0, 0.0]
    signal = {name: wave + [9.0, 0.0] * (FEWEST_ROWS // 2) for name in ("waad", "fai", "receiver_fai")}
    signal["entropy"] = [float(n) for n in range(len(signal["waad"]))]
    counted = couple.peaks_of(signal, 0.0)
    assert (counted.waad == marks(".x.x.x.x.x.x.x.x..")).all() and (counted.fai == counted.receiver).all()
    assert counted.entropy.tolist() == list(range(18)) and counted.next_entropy.tolist() == list(range(1, 19))
    # the 15th smallest of 18 is 3: ceil(0.8 x 18)
    assert (couple.peaks_of(signal, 0.8).waad == marks("...x...x...x...x..")).all()
    short = {name: values[: FEWEST_ROWS + couple.FEWEST_TOKENS - 1] for name, values in signal.items()}
    assert couple.peaks_of(short, 0.0) is None


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
    assert bootstrap(columns[:1], share, seed=0) == (0.5, 0.5, 0.5)
    for nothing in (columns[2:], np.zeros((0, 2))):
        assert np.isnan(bootstrap(nothing, share, seed=0)).all()
    assert study.shown(bootstrap(columns[2:], share, seed=0)) == "–"


# ---- the log ---------------------------------------------------------------------------------------------------------


def open_log(path, **settings) -> Log:
    return Log(path, "rhythm couple", {"seed": 0, "model": "m"} | settings)


def test_a_log_gives_back_what_it_was_given(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    with open_log(path) as log:
        first = log.once("a", lambda: {"x": [0.1, 1e-300], "text": "ü\n"})
        with pytest.raises(OSError, match="another process"):
            open_log(path)
        with pytest.raises(ValueError, match="Out of range"):
            log.once("b", lambda: float("nan"))
    with open_log(path) as log:
        assert log.once("a", lambda: 1 / 0) == first and "b" not in log
    content = path.read_bytes()
    for cut in range(len(content)):  # whatever a kill leaves is a beginning
        path.write_bytes(content[:cut])
        with open_log(path) as log:
            assert log.once("a", lambda: {"x": [0.1, 1e-300], "text": "ü\n"}) == first
        assert path.read_bytes() == content


def test_what_is_not_this_log_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    with open_log(path) as log:
        log.once("a", lambda: 1)
        log.once("b", lambda: 2)
    content = path.read_text()
    with pytest.raises(ValueError, match=r"seed was 0 and is 1; layers was 'absent' and is 5. Give another --out"):
        open_log(path, seed=1, layers=5)
    with pytest.raises(ValueError, match="the log of rhythm couple, not of rhythm perturb"):
        Log(path, "rhythm perturb", {})
    path.write_text(content.replace('"value": 1', '"value": 3'))
    with pytest.raises(ValueError, match="line 2: damaged, or not of this run"):
        open_log(path)
    path.write_text(content.replace('"value": 2', '"value": 3'))
    with open_log(path) as log:  # the last line may be torn
        assert "a" in log and "b" not in log
    for other in ("notes of mine", "notes\nof mine\n", "[]\n", '{"study": 1}\n'):
        path.write_text(other)
        with pytest.raises(ValueError, match="not the log of a study"):
            open_log(path)
        assert path.read_text() == other


# ---- problems --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "line 3: not JSON in UTF-8"),
        (b"\xff", "line 3: not JSON in UTF-8"),
        (b"[" * 100_000, "line 3: not JSON in UTF-8"),
        (b"[1]", "line 3: must be an object, got list"),
        (b'{"text": "a"}', 'line 3: must have a "prompt" or a "question", got \'text\''),
        (b'{"prompt": "a", "question": "b"}', "line 3: must have"),
        (b'{"prompt": 7}', "line 3: prompt must be a text, got 7"),
        (b'{"question": " "}', "line 3: question must be a text"),
        (b'{"question": "\\ud800"}', "line 3: question is not Unicode text"),
        (b'{"question": "' + b"a" * 2**20 + b'"}', "line 3: longer than 1,048,576 bytes"),
    ],
    ids=range(10),
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_bytes(b'{"prompt": "one"}\n\n' + line + b'\n{"question": "two"}\n')
    with pytest.raises(ValueError) as caught:
        read_problems(path, 5)
    assert message in str(caught.value) and len(str(caught.value)) < 500
    assert read_problems(path, 1) == ["one"]  # what is not taken is not read


def test_files_with_fewer_and_without_problems(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "one", "answer": 1}\n{"question": "two"}')
    assert load_problems(str(path), 70, 0) == ["one", "two"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no problem"):
        load_problems(str(path), 70, 0)
    with pytest.raises(FileNotFoundError):
        load_problems(str(tmp_path / "absent"), 70, 0)


def test_gsm_problems_are_seeded():
    pytest.importorskip("reasoning_gym")
    problems = load_problems("gsm", 12, 0)
    assert problems == load_problems("gsm", 12, 0) and problems[:5] == load_problems("gsm", 5, 0)
    assert len(set(problems)) == 12 and not set(problems) & set(load_problems("gsm", 12, 1))
    assert all(text.endswith("Explain step by step.") and "final answer" not in text for text in problems)


def test_without_reasoning_gym_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym, or give --task FILE.jsonl"):
        load_problems("gsm", 1, 0)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(arguments of a study of four problems, its folder)."""
    folder = tmp_path_factory.mktemp("couple")
    model, task = tiny_folder(folder / "model"), problem_file(folder / "task.jsonl", 4)
    arguments = [str(model), "--task", str(task), "--batch-size", "2", "--max-new-tokens", "64", "--receivers", "4"]
    arguments += ["--temperature", "0.7", "--shuffles", "20", "--layers", "3"]
    assert run(couple.main, [*arguments, "--out", str(folder / "out")]) is None
    return arguments, folder / "out"


def data_of(folder) -> dict:
    return {
        name: value for name, value in json.loads((folder / "report.json").read_text()).items() if name != "command"
    }


def test_the_report_says_what_was_found(setting):
    arguments, out = setting
    text, data = (out / "report.md").read_text(), json.loads((out / "report.json").read_text())
    assert f"rhythm couple {arguments[0]}" in text and data["command"] in text
    assert data["answers"] + data["left_out"] == 4 and data["answers"] >= 2
    assert "60.8%" in text and "36.9%" in text and "0.239" in text
    assert [row["name"] for row in data["rows"]][:3] == [
        "entropy at WAAD peaks",
        "entropy of the token after",
        "co-occurrence",
    ]
    assert data["settings"]["temperature"] == 0.7 and len(data["settings"]["weights"]) == 16
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG" and not list(out.glob("*.unfinished"))
    assert data["versions"]["torch"] == torch.__version__


def test_a_run_that_is_cut_anywhere_goes_on_to_the_same_bits(setting, tmp_path, monkeypatch):
    arguments, out = setting
    whole = (out / "log.jsonl").read_bytes()
    measured, signals = [], couple.signals
    monkeypatch.setattr(couple, "signals", lambda s, answer: measured.append(answer.index) or signals(s, answer))
    for place in cut_places(whole):
        measured.clear()
        (tmp_path / "log.jsonl").write_bytes(whole[:place])
        assert run(couple.main, [*arguments, "--out", str(tmp_path)]) is None
        assert (tmp_path / "log.jsonl").read_bytes() == whole
        assert measured == list(range(kept_problems(whole[:place]), 4)), "finished work is done again"
        assert data_of(tmp_path) == data_of(out)


def test_other_settings_are_refused_and_other_statistics_are_not(setting, tmp_path, monkeypatch):
    arguments, out = setting
    (tmp_path / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes())
    given = [*arguments, "--out", str(tmp_path)]
    monkeypatch.setattr(couple, "signals", lambda *_: pytest.fail("read again"))
    flags = ["--peak-quantile", "0.2", "--within", "2", "--shuffles", "5"]
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
        (["--max-new-tokens", "20"], "no answer has 48 tokens"),
        (["--peak-quantile", "1.5"], "--peak-quantile must be finite and between 0.0 and 1.0"),
        (["--receivers", "17"], "receivers must be between 1 and 16"),
        (["--temperature", "nan"], "--temperature must be finite"),
        (["--task", "absent.jsonl"], "absent.jsonl"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_the_caller_can_mend_is_told_in_a_line(setting, tmp_path, flags, message):
    assert message in run(couple.main, [*setting[0], "--problems", "2", "--out", str(tmp_path), *flags])
