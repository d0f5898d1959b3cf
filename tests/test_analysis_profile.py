"""The tables of `rhythm couple` by class of token and by tenth of the answer, on answers by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from rhythm_kernels.analysis.profile import FIFTHS, TENTHS, classes_of, correlations, fifths_of, profile, tenths_of


def test_classes_by_hand():
    texts = [
        "To",
        " pay",
        " $",
        "1",
        "2",
        ".",
        "5",
        ".",
        " So",
        ":",
        "\n",
        "\n\n",
        "1",
        ".",
        " Tom",
        ")",
        " has",
        "",
        " 3,000",
    ]
    names = {"n": "number", "p": "punctuation", "l": "line break", "f": "first word of a sentence", "o": "other"}
    assert classes_of(texts) == [names[letter] for letter in "fopnnpnpfpllnpfpoon"]
    assert classes_of([]) == []
    assert classes_of(['."', " Ann"]) == ["punctuation", "first word of a sentence"]  # a quotation ends in between
    assert classes_of(["a", " Ann", "7b"]) == ["first word of a sentence", "other", "other"]


def test_tenths_cover_an_answer_evenly():
    assert tenths_of(20) == [str(1 + place // 2) for place in range(20)]
    assert tenths_of(3) == ["1", "4", "7"] and tenths_of(0) == []


def test_fifths_are_ranks_of_waad():
    assert fifths_of([3.0, 1.0, 9.0, 2.0, 4.0]) == ["third", "lowest", "highest", "second", "fourth"]
    assert fifths_of([1.0] * 10) == [name for name in FIFTHS for _ in range(2)]
    assert fifths_of([2.0, 1.0]) == ["third", "lowest"] and fifths_of([]) == []


def answer(texts: list[str], waad: list[float], fai: list[float]) -> dict:
    return {"text": texts, "waad": waad, "fai": fai, "entropy": [0.5] * len(texts), "receiver_fai": fai[::-1]}


def marks(text: str) -> np.ndarray:
    return np.array([letter == "x" for letter in text])


def test_lines_are_means_of_multiples_of_the_answers_own_mean():
    measured = [answer(["5", " a", " b", "\n"], [2, 1, 1, 0], [0, 0, 3, 1]), answer(["7", " c"], [30, 10], [0, 0])]
    peaks = [SimpleNamespace(waad=marks("x..."), fai=marks("..x.")), SimpleNamespace(waad=marks(".."), fai=marks(".x"))]
    lines = {line.name: line for line in profile(measured, peaks, 0)["class"]}
    assert [lines[name].tokens for name in ("number", "other", "line break")] == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    assert lines["number"].waad.value == pytest.approx((2 + 1.5) / 2)
    assert lines["other"].waad.value == pytest.approx((1 + 1 + 0.5) / 3)
    assert lines["other"].fai.value == pytest.approx((0 + 3 + 0) / 3)  # an answer without any FAI has 0
    assert lines["number"].waad_peaks.value == 1 / 2 and lines["other"].fai_peaks.value == pytest.approx(2 / 3)
    assert lines["number"].entropy.value == 0.5 and np.isnan(lines["punctuation"].waad.value)
    fifths = {line.name: line for line in profile(measured, peaks, 0)["fifth"]}
    assert fifths["lowest"].waad.value == pytest.approx((0 + 0.5) / 2)  # the least of each answer
    assert fifths["fourth"].waad.value == pytest.approx(2) and np.isnan(fifths["highest"].waad.value)
    tenths = profile(measured, peaks, 0)["tenth"]
    assert len(tenths) == TENTHS and sum(line.tokens for line in tenths) == pytest.approx(1)
    assert tenths[0].waad.value == pytest.approx((2 + 1.5) / 2)


def test_correlations_are_means_over_answers():
    up = answer(["a"] * 4, [1] * 4, [1.0, 2.0, 4.0, 9.0])
    same = {**up, "receiver_fai": up["fai"]}
    flat = {**up, "receiver_fai": [1.0] * 4}
    pearson, spearman = correlations([same, flat], 0)
    assert pearson.value == pytest.approx(1) and spearman.value == pytest.approx(1)
    pearson, spearman = correlations([up, same], 0)
    assert spearman.value == pytest.approx(0) and pearson.value == pytest.approx(
        (1 + np.corrcoef(up["fai"], up["fai"][::-1])[0, 1]) / 2
    )
    ties = {**up, "fai": [1.0, 1.0, 2.0, 3.0], "receiver_fai": [0.0, 0.0, 5.0, 9.0]}
    assert correlations([ties], 0)[1].value == pytest.approx(1)
    assert np.isnan(correlations([flat], 0)[0].value)
