"""Tests whether anchors decide what follows them, as in the paper's Table 1, on any model.

The model answers problems. At the tokens of each answer with the highest and with the lowest future attention influence
(FAI, the attention that a token receives from later ones), the command replaces the token by each of the next most
likely ones and lets the model continue. The fewer words the continuations share, the more depended on the token.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from rhythm_kernels.analysis.bootstrap import Estimate, bootstrap, share
from rhythm_kernels.analysis.reading import read
from rhythm_kernels.analysis.receivers import FEWEST_ROWS
from rhythm_kernels.analysis.rollouts import roll_out
from rhythm_kernels.analysis.study import (
    INTERVALS,
    Answer,
    Study,
    check_flags,
    parser_of,
    report_of,
    shown,
    table,
    too_short,
    write_report,
)
from rhythm_kernels.analysis.style import COLORS, hide_frame
from rhythm_kernels.analysis.words import content_words, jaccard
from rhythm_kernels.checks import check_int

PAPER = {"top": 0.534, "bottom": 0.631, "top below bottom": 0.8714}
"""The numbers for Qwen3-4B-Base in the paper's Table 1."""
KINDS = ("top", "bottom")
"""The tokens with the highest and with the lowest FAI."""


class Overlap(NamedTuple):
    """One perturbed position, averaged over its alternatives."""

    jaccard: float
    """The Jaccard index of the content words of the continuations after the own and after the alternative token."""
    fai: float
    entropy: float
    """Nats, of the distribution that the token was drawn from."""
    where: float
    """The position in the answer, 0 at its first token and 1 at its last."""
    likelihood: float
    """The mean probability of the alternatives."""


# ---- one answer ------------------------------------------------------------------------------------------------------


def extremes(fai: list[float], count: int) -> dict[str, list[int]] | None:
    """Returns the positions of the `count` tokens with the highest and the lowest FAI, by kind, in ascending order.

    The last FEWEST_ROWS tokens are not ranked; ties go to the earlier token. Returns None where fewer than 2 `count`
    tokens are ranked.
    """
    ranked = fai[: len(fai) - FEWEST_ROWS] if len(fai) > FEWEST_ROWS else []
    if len(ranked) < 2 * count:
        return None
    positions = range(len(ranked))
    top = sorted(positions, key=lambda position: (-ranked[position], position))[:count]
    rest = [position for position in positions if position not in top]  # the sets stay disjoint where values are equal
    bottom = sorted(rest, key=lambda position: (ranked[position], position))[:count]
    return {"top": sorted(top), "bottom": sorted(bottom)}


def perturbed(study: Study, answer: Answer) -> dict[str, Any]:
    """Reads an answer and rolls out the alternatives at its extremes; returns texts, whose words are counted later."""
    args, model, tokenizer = study.args, study.model, study.tokenizer
    ids = torch.tensor(answer.prompt + answer.tokens, device=model.device)
    begin = len(answer.prompt)
    response = torch.arange(len(ids), device=model.device) >= begin
    reading = read(model, ids, response, layers=args.layers)
    fai = reading.fai[begin:].tolist()
    chosen = extremes(fai, args.positions)
    result: dict[str, Any] = {"tokens": len(fai), "places": []}
    if chosen is None:
        return result
    kind_of = {position: kind for kind in KINDS for position in chosen[kind]}
    positions = sorted(kind_of)

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    with tqdm(desc="rollouts", unit="token", leave=False) as bar:
        forks = roll_out(
            model,
            tokenizer,
            ids,
            [begin + position for position in positions],
            alternatives=args.alternatives,
            new_tokens=args.rollout_tokens,
            refused=set(tokenizer.all_special_ids),
            progress=bar.update,
        )
    for position, fork in zip(positions, forks, strict=True):
        result["places"].append(
            {
                "place": position,
                "kind": kind_of[position],
                "fai": fai[position],
                "entropy": reading.entropy[begin + position].item(),
                "tokens": [text([token]) for token in fork.tokens],
                "probabilities": fork.probabilities,
                "continuations": [text(tokens) for tokens in fork.continuations],
            }
        )
    return result


# ---- statistics ------------------------------------------------------------------------------------------------------


def overlap_of(place: dict[str, Any], tokens: int) -> Overlap:
    """Returns the overlap of one of the "places" of `perturbed`, whose first token is the answer's own."""
    # after " Tom" a continuation may begin inside a word, after "$" it begins with a whole one
    own, *others = (
        content_words(text, begun=token[-1:].isalnum())
        for token, text in zip(place["tokens"], place["continuations"], strict=True)
    )
    return Overlap(
        jaccard=float(np.mean([jaccard(own, other) for other in others])),
        fai=place["fai"],
        entropy=place["entropy"],
        where=place["place"] / max(1, tokens - 1),
        likelihood=float(np.mean(place["probabilities"][1:])),
    )


def overlaps(result: dict[str, Any]) -> dict[str, list[Overlap]] | None:
    """Returns the overlaps of an answer by kind, or None where it was too short to have any."""
    by_kind: dict[str, list[Overlap]] = {kind: [] for kind in KINDS}
    for place in result["places"]:
        by_kind[place["kind"]].append(overlap_of(place, result["tokens"]))
    return by_kind if result["places"] else None


def means(answers: list[dict[str, list[Overlap]]], name: str) -> np.ndarray:
    """Returns the mean of a field of `Overlap` over each answer's top and bottom positions, [n, 2]."""
    return np.array([[np.mean([getattr(o, name) for o in answer[kind]]) for kind in KINDS] for answer in answers])


def table_1(answers: list[dict[str, list[Overlap]]], seed: int) -> dict[str, Estimate]:
    """Returns the rows of the table, by name.

    They are the mean Jaccard index at top and at bottom positions, their difference, the share of answers whose top is
    below their bottom, the share of ties, and `held_equal`. Each answer has the same weight.
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
    estimates = {name: bootstrap(np.stack([column, ones], 1), share, seed=seed) for name, column in columns.items()}
    return estimates | {"held equal": held_equal(answers, seed)}


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
    "*Jaccard*: the content words (lowercased words and numbers without English stop words) that the continuation "
    "after an alternative token shares with the one after the answer's own token, over the words in either. The "
    "replaced token itself does not count. Both continuations are greedy and come from one batch. *Top* and "
    "*bottom* are the tokens of an answer with the highest and with the lowest FAI (future attention influence) up "
    f"to its end, without its last {FEWEST_ROWS} tokens. Each answer has the same weight. {INTERVALS}",
    "The model, its size and the problems are not the paper's. Chosen here, and perhaps different there: how many "
    "tokens are perturbed, how many alternatives each has, how long a continuation is, and the stop words. The "
    "lower table shows how else the two kinds of tokens differ; any of these may move the overlap, whatever the "
    "FAI. *Held equal* is the difference that is left beside the entropy and the position of the tokens, in a "
    "linear regression within answers.",
]


def report(
    estimates: dict[str, Estimate],
    answers: list[dict[str, list[Overlap]]],
    left_out: int,
    study: Study,
    arguments: list[str],
) -> tuple[str, dict]:
    """Returns (report.md, the data of report.json)."""
    args = study.args
    names = {
        "top": ("mean Jaccard, top FAI", ".3f"),
        "bottom": ("mean Jaccard, bottom FAI", ".3f"),
        "top - bottom": ("top - bottom", "+.3f"),
        "top below bottom": ("answers whose top is below their bottom", ".1%"),
        "tied": ("answers whose top equals their bottom", ".1%"),
        "held equal": ("top - bottom, entropy and position held equal", "+.3f"),
    }
    paper = PAPER | {"top - bottom": PAPER["top"] - PAPER["bottom"]}
    rows = [
        [label, shown(estimates[name], form), f"{paper[name]:{form}}" if name in paper else ""]
        for name, (label, form) in names.items()
    ]
    beside = {
        "fai": ("FAI", ".4f"),
        "entropy": ("entropy, nats", ".3f"),
        "where": ("position in the answer, 0 to 1", ".2f"),
        "likelihood": ("mean probability of an alternative", ".4f"),
    }
    differing = {name: means(answers, name).mean(0).tolist() for name in beside}
    lower = [[label, *(f"{value:{form}}" for value in differing[name])] for name, (label, form) in beside.items()]
    positions = sum(len(answer[kind]) for answer in answers for kind in KINDS)
    skipped = f"; {left_out} shorter answers left out" if left_out else ""
    paragraphs = [
        f"{args.model}, {len(answers)} answers{skipped}; {positions:,} positions with {args.alternatives} alternatives "
        f"each, continued for {args.rollout_tokens} tokens. The paper's numbers are those of Qwen3-4B-Base.",
        table(["", "here", "paper"], rows),
        table(["on average", "top", "bottom"], lower),
        *EXPLAINED,
        "![Jaccard at the top and bottom positions of each answer](figure.png)",
    ]
    numbers = {
        "answers": len(answers),
        "left_out": left_out,
        "places": positions,
        "estimates": {name: estimate._asdict() for name, estimate in estimates.items()},
        "paper": PAPER,
        "differing": {name: dict(zip(KINDS, values, strict=True)) for name, values in differing.items()},
        "jaccard": [dict(zip(KINDS, pair, strict=True)) for pair in means(answers, "jaccard").tolist()],
    }
    return report_of(study, arguments, "Anchors and what follows them (Table 1)", paragraphs, numbers)


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
    left.legend(fontsize=8, loc="lower right")
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
    parser = parser_of("perturb", __doc__)
    parser.add_argument(
        "--positions", type=int, default=3, help="number of tokens to replace with the highest FAI, and with the lowest"
    )
    parser.add_argument("--alternatives", type=int, default=5, help="number of replacements for each token")
    parser.add_argument("--rollout-tokens", type=int, default=64, help="largest number of tokens of a continuation")
    args = parser.parse_args(arguments)
    check_flags(args, "perturb")
    own = ("positions", "alternatives", "rollout_tokens")
    for name in own:
        check_int(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    with Study("perturb", args, also=own, longer=args.rollout_tokens) as study:
        results = study.measured(partial(perturbed, study))
    answers = [by_kind for by_kind in map(overlaps, results) if by_kind is not None]
    if not answers:
        raise too_short(FEWEST_ROWS + 2 * args.positions)
    estimates = table_1(answers, args.seed)
    text, data = report(estimates, answers, len(results) - len(answers), study, arguments)
    draw(estimates, answers, args.out / "figure.png")
    write_report(args.out, text, data)
