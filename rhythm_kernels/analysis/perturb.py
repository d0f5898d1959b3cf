"""Tests whether anchors decide what follows them, as in the paper's Table 1, on any model.

The model answers problems. At the tokens of each answer with the highest and with the lowest future attention influence
(FAI, the attention that a token receives from later ones), the command replaces the token by each of the next most
likely ones and lets the model continue. The fewer words the continuations share, the more depended on the token.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from rhythm_kernels.analysis.bootstrap import Estimate, bootstrap, share
from rhythm_kernels.analysis.problems import final_answer
from rhythm_kernels.analysis.reading import read
from rhythm_kernels.analysis.rollouts import Start, roll_out
from rhythm_kernels.analysis.study import (
    INTERVALS,
    Answer,
    Study,
    check_flags,
    check_room,
    parser_of,
    quoted,
    report_of,
    shown,
    too_short,
    write_report,
)
from rhythm_kernels.analysis.style import COLORS, hide_frame
from rhythm_kernels.analysis.words import all_words, content_words, jaccard
from rhythm_kernels.checks import check_int
from rhythm_kernels.console import markdown_table
from rhythm_kernels.tasks.answers import same

PAPER = {"top": 0.534, "bottom": 0.631, "top below bottom": 0.8714}
"""The numbers for Qwen3-4B-Base in the paper's Table 1."""
KINDS = ("top", "bottom")
"""The tokens with the highest and with the lowest FAI."""
HORIZONS = (32, 64, 128, 256)
"""Continuations are compared up to so many tokens, where they are longer, and whole."""
LONGEST_QUOTE = 600  # characters of a continuation in the report's examples


class Overlap(NamedTuple):
    """One perturbed position, averaged over its alternatives."""

    jaccard: float
    """The Jaccard index of the words of the continuations after the own and after the alternative token."""
    fai: float
    entropy: float
    """Nats, of the distribution that the token was drawn from."""
    where: float
    """The position in the answer, 0 at its first token and 1 at its last."""
    likelihood: float
    """The mean probability of the alternatives."""
    left: float
    """The tokens that follow the own token, to the end of its continuation."""


# ---- one answer ------------------------------------------------------------------------------------------------------


def extremes(fai: list[float], count: int, without_last: int = 0) -> dict[str, list[int]] | None:
    """Returns the positions of the `count` tokens with the highest and the lowest FAI, by kind, in ascending order.

    The last tokens are not ranked, `without_last` and one more, after which nothing follows; ties go to the earlier
    token. Returns None where fewer than 2 `count` tokens are ranked.
    """
    ranked = fai[: max(0, len(fai) - without_last - 1)]
    if len(ranked) < 2 * count:
        return None
    positions = range(len(ranked))
    top = sorted(positions, key=lambda position: (-ranked[position], position))[:count]
    rest = [position for position in positions if position not in top]  # the sets stay disjoint where values are equal
    bottom = sorted(rest, key=lambda position: (ranked[position], position))[:count]
    return {"top": sorted(top), "bottom": sorted(bottom)}


def perturbed(study: Study, answers: list[Answer]) -> list[dict[str, Any]]:
    """Reads answers and rolls out the alternatives at their extremes in one batch; returns tokens, to be read later."""
    args, results, starts = study.args, [], []
    for answer in answers:
        begin = len(answer.prompt)
        ids = torch.tensor(answer.prompt + answer.tokens, device=study.model.device)
        response = torch.arange(len(ids), device=ids.device) >= begin
        reading = read(study.model, ids, response, layers=args.layers)
        fai = reading.fai[begin:].tolist()
        chosen = extremes(fai, args.positions, args.without_last)
        places = sorted((place, kind) for kind in KINDS for place in chosen[kind]) if chosen else []
        entropy = reading.entropy[begin:].tolist()
        results.append(
            {
                "tokens": len(fai),
                "places": [{"place": t, "kind": kind, "fai": fai[t], "entropy": entropy[t]} for t, kind in places],
            }
        )
        if places:
            starts.append(Start(ids.tolist(), [begin + t for t, _ in places], begin + args.max_new_tokens))
    with tqdm(desc="rollouts", unit="token", leave=False) as bar:
        forks = roll_out(
            study.model,
            study.tokenizer,
            starts,
            alternatives=args.alternatives,
            new_tokens=args.rollout_tokens,
            refused=set(study.tokenizer.all_special_ids),
            progress=bar.update,
        )
    places = [place for result in results for place in result["places"]]
    for place, fork in zip(places, (fork for of_answer in forks for fork in of_answer), strict=True):
        place |= {name: value for name, value in fork._asdict().items() if name != "position"}
    return results


# ---- statistics ------------------------------------------------------------------------------------------------------


def overlap_of(
    place: dict[str, Any],
    tokens: int,
    text_of: Callable[[list[int]], str],
    words: Callable[..., frozenset[str]] = all_words,
    horizon: int | None = None,
) -> Overlap:
    """Returns the overlap of one of the "places" of `perturbed`, whose first token is the answer's own.

    Args:
        tokens: the number of tokens of the answer.
        text_of: decodes tokens.
        words: returns the words of a text.
        horizon: the number of tokens after the fork that are compared; None for all.
    """
    # after " Tom" a continuation may begin inside a word, after "$" it begins with a whole one
    own, *others = (
        words(text_of(continuation[:horizon]), begun=text_of([token])[-1:].isalnum())
        for token, continuation in zip(place["tokens"], place["continuations"], strict=True)
    )
    return Overlap(
        jaccard=float(np.mean([jaccard(own, other) for other in others])),
        fai=place["fai"],
        entropy=place["entropy"],
        where=place["place"] / max(1, tokens - 1),
        likelihood=float(np.mean(place["probabilities"][1:])),
        left=float(len(place["continuations"][0])),
    )


def overlaps(results: list[dict[str, Any]], overlap: Callable[[dict, int], Overlap]) -> list[dict[str, list[Overlap]]]:
    """Returns the overlaps of each answer by kind; answers that were too short to have any are left out."""
    return [
        {
            kind: [overlap(place, result["tokens"]) for place in result["places"] if place["kind"] == kind]
            for kind in KINDS
        }
        for result in results
        if result["places"]
    ]


def means(answers: list[dict[str, list[Overlap]]], name: str) -> np.ndarray:
    """Returns the mean of a field of `Overlap` over each answer's top and bottom positions, [n, 2]."""
    return np.array([[np.mean([getattr(o, name) for o in answer[kind]]) for kind in KINDS] for answer in answers])


def table_1(answers: list[dict[str, list[Overlap]]], seed: int) -> dict[str, Estimate]:
    """Returns the columns of the table for one horizon, by name.

    They are the mean Jaccard index at top and at bottom positions, their difference, the share of answers whose top is
    below their bottom, and the share of ties. Each answer has the same weight.
    """
    top, bottom = means(answers, "jaccard").T
    ones = np.ones_like(top)
    columns = {
        "top": top,
        "bottom": bottom,
        "top - bottom": top - bottom,
        "top below bottom": (top < bottom).astype(float),
        "tied": (top == bottom).astype(float),
    }
    return {name: bootstrap(np.stack([column, ones], 1), share, seed=seed) for name, column in columns.items()}


def flips(results: list[dict[str, Any]], text_of: Callable[[list[int]], str], seed: int) -> dict[str, Estimate]:
    """Returns the share of alternatives whose final answer differs from that after the own token, by kind.

    Alternatives count where both continuations come to their end and have a final answer.
    """
    sums = np.zeros((len(results), 4))
    for row, result in zip(sums, results, strict=True):
        for place in result["places"]:
            texts = (
                text_of([token, *rest]) for token, rest in zip(place["tokens"], place["continuations"], strict=True)
            )
            own, *others = (
                final_answer(text) if end else None for text, end in zip(texts, place["ended"], strict=True)
            )
            pairs = [(own, other) for other in others if own is not None and other is not None]
            at = 2 * KINDS.index(place["kind"])
            row[at : at + 2] += sum(not same(*pair) for pair in pairs), len(pairs)

    def difference(top, tops, bottom, bottoms):
        return top / tops - bottom / bottoms

    found = {kind: bootstrap(sums[:, 2 * at : 2 * at + 2], share, seed=seed) for at, kind in enumerate(KINDS)}
    return found | {"top - bottom": bootstrap(sums, difference, seed=seed)}


def held_equal(answers: list[dict[str, list[Overlap]]], seed: int) -> Estimate:
    """Returns top - bottom with entropy and position in the answer held equal, as far as both act linearly.

    It is the least-squares coefficient of being a top position, beside those of entropy and position, within answers.
    """
    grams = []
    for answer in answers:
        rows = [(float(kind == "top"), o.entropy, o.where, o.jaccard) for kind in KINDS for o in answer[kind]]
        centered = np.array(rows) - np.mean(rows, 0)
        grams.append((centered.T @ centered).flatten())  # [16]

    def coefficient(*sums: np.ndarray) -> np.ndarray:
        gram = np.stack(sums, -1).reshape(*np.shape(sums[0]), 4, 4)
        return (np.linalg.pinv(gram[..., :3, :3]) @ gram[..., :3, 3:])[..., 0, 0]

    return bootstrap(np.array(grams), coefficient, seed=seed)


# ---- report ----------------------------------------------------------------------------------------------------------

EXPLAINED = [
    "*Jaccard*: the words that the continuation after an alternative token shares with the one after the answer's own "
    "token, over the words in either. Words are lowercased and stand between white space. *Content words* are letters "
    "and numbers without English stop words instead. The replaced token itself does not count. Both continuations are "
    "greedy and come from one batch. A *horizon* is the number of tokens after the replaced one that are compared. "
    "*Top* and *bottom* are the tokens of an answer with the highest and with the lowest FAI (future attention "
    f"influence) up to its end. Each answer has the same weight. {INTERVALS}",
    "The model and the problems are not the paper's. Chosen here, and perhaps different there: how many tokens are "
    "perturbed, how many alternatives each has, and what a content word is. The table of averages shows how else the "
    "two kinds of tokens differ; any of these may move the overlap, whatever the FAI. *Held equal* is the difference "
    "of the Jaccard indices that is left beside the entropy and the position of the tokens, in a linear regression "
    "within answers.",
]


def report(
    results: list[dict[str, Any]], answers: list[Answer], study: Study, arguments: list[str]
) -> tuple[str, dict]:
    """Returns (report.md, the data of report.json)."""
    args = study.args
    longest, left_out = args.rollout_tokens, sum(not result["places"] for result in results)
    horizons = [*(n for n in HORIZONS if longest is None or n < longest), None]
    by_horizon = {
        horizon: overlaps(results, partial(overlap_of, text_of=study.text_of, horizon=horizon)) for horizon in horizons
    }
    whole, whole_name = by_horizon[None], "to the end" if longest is None else f"{longest} tokens"
    by_content = overlaps(results, partial(overlap_of, text_of=study.text_of, words=content_words))
    estimates = {
        f"{horizon} tokens" if horizon else whole_name: table_1(found, args.seed)
        for horizon, found in by_horizon.items()
    }
    estimates[f"{whole_name}, content words"] = table_1(by_content, args.seed)
    equal = held_equal(whole, args.seed)
    changed = flips(results, study.text_of, args.seed)

    forms = {"top": ".3f", "bottom": ".3f", "top - bottom": "+.3f", "top below bottom": ".1%", "tied": ".1%"}
    rows = [[label, *(shown(found[name], form) for name, form in forms.items())] for label, found in estimates.items()]
    paper = PAPER | {"top - bottom": PAPER["top"] - PAPER["bottom"]}
    of_paper = [f"{paper[name]:{form}}" if name in paper else "" for name, form in forms.items()]
    rows.append(["*paper, Qwen3-4B-Base*", *of_paper])
    beside = {
        "fai": ("FAI", ".4f"),
        "entropy": ("entropy, nats", ".3f"),
        "where": ("position in the answer, 0 to 1", ".2f"),
        "likelihood": ("mean probability of an alternative", ".4f"),
        "left": ("tokens that follow", ".0f"),
    }
    differing = {name: means(whole, name).mean(0).tolist() for name in beside}
    lower = [[label, *(shown(value, form) for value in differing[name])] for name, (label, form) in beside.items()]
    lower.append(["alternatives that change the final answer", *(shown(changed[kind], ".1%") for kind in KINDS)])
    positions = sum(len(answer[kind]) for answer in whole for kind in KINDS)
    ended = [end for result in results for place in result["places"] for end in place["ended"]]
    skipped = f"; {left_out} shorter answers left out" if left_out else ""
    reach = "up to the limit of an answer" if longest is None else f"for {longest} tokens"
    paragraphs = [
        f"{args.model}, {len(whole)} answers{skipped}; {positions:,} positions with {args.alternatives} alternatives "
        f"each, continued {reach}; {1 - np.mean(ended):.1%} of the continuations were cut off. "
        f"{study.described(answers)}",
        markdown_table(["horizon", "top", "bottom", "top - bottom", "answers with top < bottom", "tied"], rows),
        markdown_table(["on average", "top", "bottom"], lower),
        f"Top - bottom, {whole_name}, entropy and position held equal: {shown(equal, '+.3f')}. Changed final answers, "
        f"top - bottom: {shown(changed['top - bottom'], '+.1%')}.",
        *EXPLAINED,
        *examples(results, whole, study),
        "![Jaccard at the top and bottom positions of each answer](figure.png)",
    ]
    numbers = {
        "answers": len(whole),
        "left_out": left_out,
        "cut_off": sum(not study.ended(answer) for answer in answers),
        "places": positions,
        "estimates": {
            label: {name: one._asdict() for name, one in found.items()} for label, found in estimates.items()
        },
        "held_equal": equal,
        "flips": changed,
        "paper": PAPER,
        "differing": {name: dict(zip(KINDS, values, strict=True)) for name, values in differing.items()},
        "jaccard": [dict(zip(KINDS, pair, strict=True)) for pair in means(whole, "jaccard").tolist()],
    }
    return report_of(study, arguments, "Anchors and what follows them (Table 1)", paragraphs, numbers)


def examples(results: list[dict[str, Any]], answers: list[dict[str, list[Overlap]]], study: Study) -> list[str]:
    """Returns paragraphs with one fork of each kind (Fig. 3).

    They are of the answer whose difference of top and bottom is the median one, and of each kind the place whose
    Jaccard index is nearest to the mean of its kind.
    """
    difference = np.subtract(*means(answers, "jaccard").T)
    median = int(np.argsort(difference, kind="stable")[(len(difference) - 1) // 2])
    result = [result for result in results if result["places"]][median]
    paragraphs = ["Two forks of the answer whose difference of top and bottom is the median one:"]
    for kind in KINDS:
        found = answers[median][kind]
        nearest = int(np.argmin([abs(o.jaccard - np.mean([each.jaccard for each in found])) for o in found]))
        place = [place for place in result["places"] if place["kind"] == kind][nearest]
        texts = [
            study.text_of([token, *continuation])[:LONGEST_QUOTE]
            for token, continuation in zip(place["tokens"][:2], place["continuations"][:2], strict=True)
        ]
        jaccard_of_first = overlap_of(
            {**place, "tokens": place["tokens"][:2], "continuations": place["continuations"][:2]},
            result["tokens"],
            study.text_of,
        ).jaccard
        paragraphs += [
            f"*{kind.capitalize()} FAI*, token {place['place']} of the answer, Jaccard {jaccard_of_first:.3f}. The "
            "answer's own token and what follows, then the most likely other one:",
            *map(quoted, texts),
        ]
    return paragraphs


def draw(estimates: dict[str, Estimate], answers: list[dict[str, list[Overlap]]], path: Path) -> None:
    """Draws the Jaccard index of each answer at top against bottom positions, and its distribution over positions."""
    matplotlib.use("Agg")  # files only
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    top, bottom = means(answers, "jaccard").T
    left.plot([0, 1], [0, 1], color="#c9cdd4", linewidth=1, zorder=0)
    left.scatter(bottom, top, s=18, color=COLORS["waad"], alpha=0.7, label="an answer")
    here, paper = (estimates["bottom"].value, estimates["top"].value), (PAPER["bottom"], PAPER["top"])
    left.plot(*here, "P", color="#1c3f6e", markersize=10, label="mean")
    left.plot(*paper, "D", color=COLORS["fai"], label="paper, Qwen3-4B-Base")
    left.set(xlabel="Jaccard at bottom FAI", ylabel="Jaccard at top FAI", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    left.set_aspect("equal")
    left.legend(fontsize=8, loc="best")
    left.set_title(f"top below bottom in {estimates['top below bottom'].value:.0%} of the answers", fontsize=9)
    bins = np.linspace(0, 1, 21)
    for kind, color in zip(KINDS, (COLORS["fai"], COLORS["waad"]), strict=True):
        values = [overlap.jaccard for answer in answers for overlap in answer[kind]]
        right.hist(values, bins, histtype="stepfilled", alpha=0.35, color=color, label=f"{kind} FAI")
        right.axvline(float(np.mean(values)), color=color, linestyle=":", linewidth=1.5)
    right.set(xlabel="Jaccard of a position (dotted: means)", ylabel="positions", xlim=(0, 1))
    right.legend(frameon=False)
    for axes in (left, right):
        hide_frame(axes)
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> None:
    """Runs `rhythm perturb`: generates answers, perturbs them, and writes the report."""
    parser = parser_of("perturb", __doc__, temperature=0.0, batch_size=10)
    parser.add_argument(
        "--positions", type=int, default=3, help="number of tokens to replace with the highest FAI, and with the lowest"
    )
    parser.add_argument("--alternatives", type=int, default=2, help="number of replacements for each token")
    parser.add_argument(
        "--rollout-tokens",
        type=int,
        help="largest number of tokens of a continuation; if left out, up to --max-new-tokens of the whole answer",
    )
    parser.add_argument(
        "--without-last", type=int, default=0, help="number of last tokens that are not ranked by their FAI"
    )
    args = parser.parse_args(arguments)
    check_flags(args, "perturb")
    for name in ("positions", "alternatives"):
        check_int(f"--{name}", getattr(args, name), 1)
    if args.rollout_tokens is not None:
        check_int("--rollout-tokens", args.rollout_tokens, 1)
    check_int("--without-last", args.without_last, 0)
    check_room(args, args.without_last + 1 + 2 * args.positions)
    with Study("perturb", args, also=["positions", "alternatives", "rollout_tokens", "without_last"]) as study:
        answers, results = study.measured(partial(perturbed, study))
    if not any(result["places"] for result in results):
        raise too_short(args.without_last + 1 + 2 * args.positions)
    text, data = report(results, answers, study, arguments)
    whole = overlaps(results, partial(overlap_of, text_of=study.text_of))
    draw(table_1(whole, args.seed), whole, args.out / "figure.png")
    write_report(args.out, text, data)
