"""Describes which tokens have a high WAAD or FAI (the paper's 4.1, 4.2 and B.2).

They are told apart by their class, by tenths of the answer, and by fifths of its tokens in the order of their WAAD.

WAAD is the windowed average attention distance of a token, FAI its future attention influence.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rhythm_kernels.analysis.bootstrap import Estimate, bootstrap, share
from rhythm_kernels.analysis.decisions import TENTHS, ranks, tenths
from rhythm_kernels.analysis.study import shown
from rhythm_kernels.console import markdown_table

CLASSES = ("line break", "number", "punctuation", "first word of a sentence", "other")
FIFTHS = ("lowest", "second", "third", "fourth", "highest")
SENTENCE_END = re.compile(r"[.!?:][\s\"')\]*]*$|\n\s*$")


class Line(NamedTuple):
    """The tokens of one class, of one tenth of the answers, or of one fifth by their WAAD."""

    name: str
    tokens: float
    """The share of all tokens."""
    waad: Estimate
    """The mean WAAD over the mean of the answer; `fai` alike."""
    fai: Estimate
    entropy: Estimate
    """Nats."""
    waad_peaks: Estimate
    """The share of the tokens that are peaks of WAAD; `fai_peaks` alike."""
    fai_peaks: Estimate


def classes_of(texts: Sequence[str]) -> list[str]:
    """Returns the class of each token of an answer, one of CLASSES, by the texts that the tokens add."""
    classes, before = [], "\n"
    for text in texts:
        word = text.strip()
        if "\n" in text:
            classes.append("line break")
        elif re.fullmatch(r"[\d.,]*\d[\d.,]*", word):
            classes.append("number")
        elif word and not any(letter.isalnum() for letter in word):
            classes.append("punctuation")
        elif word and SENTENCE_END.search(before):
            classes.append("first word of a sentence")
        else:
            classes.append("other")
        before = (before + text)[-16:]
    return classes


def tenths_of(count: int) -> list[str]:
    """Returns the tenth of the answer that each of its tokens is in, from "1" to "10"."""
    return [str(1 + tenth) for tenth in tenths(count)]


def fifths_of(waad: Sequence[float]) -> list[str]:
    """Returns the fifth that each token of an answer is in by its WAAD, one of FIFTHS; ties in the order of tokens."""
    order = np.argsort(waad, kind="stable")
    fifths = np.empty(len(order), dtype=int)
    fifths[order] = np.arange(len(order)) * len(FIFTHS) // max(1, len(order))
    return [FIFTHS[fifth] for fifth in fifths]


def profile(measured: list[dict], peaks: list, seed: int) -> dict[str, list[Line]]:
    """Returns the lines of the tables by class, by tenth and by fifth.

    Args:
        measured: the text, WAAD, FAI and entropy of the tokens of each answer.
        peaks: the peaks of each answer, with fields `waad` and `fai`.
    """
    of_class = [classes_of(answer["text"]) for answer in measured]
    of_tenth = [tenths_of(len(answer["text"])) for answer in measured]
    of_fifth = [fifths_of(answer["waad"]) for answer in measured]
    return {
        "class": _lines(measured, peaks, of_class, CLASSES, seed),
        "tenth": _lines(measured, peaks, of_tenth, [str(1 + tenth) for tenth in range(TENTHS)], seed),
        "fifth": _lines(measured, peaks, of_fifth, FIFTHS, seed),
    }


def _lines(measured: list[dict], peaks: list, names: list[list[str]], groups: Sequence[str], seed: int) -> list[Line]:
    """Returns a line for each of the groups, given the name of each token's group."""
    values = []
    for answer, peak in zip(measured, peaks, strict=True):
        waad, fai = (np.array(answer[name]) / (np.mean(answer[name]) or 1.0) for name in ("waad", "fai"))
        values.append(np.stack([waad, fai, answer["entropy"], peak.waad, peak.fai]))  # [5, m]
    total, lines = sum(map(len, names)), []
    for group in groups:
        member = [np.array([name == group for name in answer]) for answer in names]
        counts = np.array([inside.sum() for inside in member])
        sums = np.stack([(value * inside).sum(1) for value, inside in zip(values, member, strict=True)])  # [n, 5]
        estimates = (bootstrap(np.stack([column, counts], 1), share, seed=seed) for column in sums.T)
        lines.append(Line(group, counts.sum() / total, *estimates))
    return lines


def tables(profiles: dict[str, list[Line]]) -> list[str]:
    """Returns the paragraphs of a report that show the tables."""
    head = ["tokens", "WAAD", "FAI", "entropy, nats", "WAAD peaks", "FAI peaks"]

    def rows(lines: list[Line]) -> list[list[str]]:
        return [
            [
                line.name,
                f"{line.tokens:.1%}",
                shown(line.waad, ".2f"),
                shown(line.fai, ".2f"),
                shown(line.entropy, ".2f"),
                shown(line.waad_peaks.value, ".1%"),
                shown(line.fai_peaks.value, ".1%"),
            ]
            for line in lines
        ]

    return [
        "Which tokens they are. WAAD and FAI are multiples of the answer's own mean, and the last columns are the "
        "share of the tokens that are peaks. FAI runs to the end of the answer, so that few tokens look back at the "
        "last ones.",
        markdown_table(["class", *head], rows(profiles["class"])),
        markdown_table(["tenth of the answer", *head], rows(profiles["tenth"])),
        markdown_table(["fifth by WAAD", *head], rows(profiles["fifth"])),
    ]


def correlations(measured: list[dict], seed: int) -> tuple[Estimate, Estimate]:
    """Returns the Pearson and the Spearman correlation of receiver-head and global FAI, as means over answers.

    Answers in which one of the two is the same for all tokens do not count.
    """
    found = []
    for answer in measured:
        pair = np.array([answer["fai"], answer["receiver_fai"]])
        if (pair.min(1) < pair.max(1)).all():
            found.append([np.corrcoef(pair)[0, 1], np.corrcoef([ranks(values) for values in pair])[0, 1], 1.0])
    columns = np.array(found).reshape(-1, 3)
    return tuple(bootstrap(columns[:, [index, 2]], share, seed=seed) for index in (0, 1))
