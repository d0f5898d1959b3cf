"""Do anchors decide what follows? Table 1 of the paper, on a model of yours.

The model answers problems. At the tokens of an answer with the highest and the lowest FAI it is made to take each of
the tokens next most likely there, and goes on from it: the fewer words of the continuation stay, the more hung on the
token.
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
    command_of,
    parser_of,
    shown,
    table,
    versions,
    write_report,
)
from rhythm_kernels.analysis.words import content_words, jaccard
from rhythm_kernels.checks import check_int

PAPER = {"top": 0.534, "bottom": 0.631, "top below bottom": 0.8714}
"""Of Qwen3-4B-Base in the paper's Table 1."""
KINDS = ("top", "bottom")


class Overlap(NamedTuple):
    """One place that was perturbed, on average over its alternatives."""

    jaccard: float
    """Of the content words of the own and of the perturbed continuation."""
    fai: float
    entropy: float
    """Nats, of what the place's token was drawn from."""
    where: float
    """In the answer, 0 at its first token and 1 at its last."""
    likelihood: float
    """The alternatives' mean probability."""


# ---- one answer ------------------------------------------------------------------------------------------------------


def extremes(fai: list[float], count: int) -> dict[str, list[int]] | None:
    """The `count` tokens of an answer with the highest FAI and those with the lowest, in ascending order.

    Only tokens that FEWEST_ROWS later ones look back at are ranked; ties go to the earlier one. None if they are too
    few to be told apart.
    """
    ranked = fai[: len(fai) - FEWEST_ROWS] if len(fai) > FEWEST_ROWS else []
    if len(ranked) < 2 * count:
        return None
    order = sorted(range(len(ranked)), key=lambda place: (-ranked[place], place))
    low = sorted(range(len(ranked)), key=lambda place: (ranked[place], place))
    low = [place for place in low if place not in order[:count]]  # where all are equal
    return {"top": sorted(order[:count]), "bottom": sorted(low[:count])}


def perturbed(study: Study, answer: Answer) -> dict[str, Any]:
    """Reads an answer and rolls out the alternatives at its extremes; texts, so that words can be counted later."""
    args, model, tokenizer = study.args, study.model, study.tokenizer
    ids = torch.tensor(answer.prompt + answer.tokens, device=model.device)
    begin = len(answer.prompt)
    response = torch.arange(len(ids), device=model.device) >= begin
    found = read(model, ids, response, layers=args.layers)
    fai = found.fai[begin:].tolist()
    chosen = extremes(fai, args.positions)
    result: dict[str, Any] = {"tokens": len(fai), "places": []}
    if chosen is None:
        return result
    kind_of = {place: kind for kind in KINDS for place in chosen[kind]}
    places = sorted(kind_of)

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    with tqdm(desc="rollouts", unit="token", leave=False) as bar:
        forks = roll_out(
            model,
            tokenizer,
            ids,
            [begin + place for place in places],
            alternatives=args.alternatives,
            new_tokens=args.rollout_tokens,
            refused=set(tokenizer.all_special_ids),
            progress=bar.update,
        )
    for place, fork in zip(places, forks, strict=True):
        result["places"].append(
            {
                "place": place,
                "kind": kind_of[place],
                "fai": fai[place],
                "entropy": found.entropy[begin + place].item(),
                "tokens": [text([token]) for token in fork.tokens],
                "probabilities": fork.probabilities,
                "continuations": [text(tokens) for tokens in fork.continuations],
            }
        )
    return result


# ---- statistics ------------------------------------------------------------------------------------------------------


def overlap_of(place: dict[str, Any], tokens: int) -> Overlap:
    """Of a place of `perturbed`; the first continuation is that of the answer's own token."""
    # after "Tom reads" a continuation may begin with the end of a word, after "$" with a whole one
    begun = (token[-1:].isalnum() for token in place["tokens"])
    own, *others = (content_words(text, begun=b) for text, b in zip(place["continuations"], begun, strict=True))
    return Overlap(
        jaccard=float(np.mean([jaccard(own, other) for other in others])),
        fai=place["fai"],
        entropy=place["entropy"],
        where=place["place"] / max(1, tokens - 1),
        likelihood=float(np.mean(place["probabilities"][1:])),
    )


def overlaps(result: dict[str, Any]) -> dict[str, list[Overlap]] | None:
    """The places of an answer by kind; None if it was too short to have any."""
    found: dict[str, list[Overlap]] = {kind: [] for kind in KINDS}
    for place in result["places"]:
        found[place["kind"]].append(overlap_of(place, result["tokens"]))
    return found if result["places"] else None


def means(answers: list[dict[str, list[Overlap]]], name: str) -> np.ndarray:
    """[n, 2]: of each answer's top and bottom places the mean of a field of `Overlap`."""
    return np.array([[np.mean([getattr(o, name) for o in answer[kind]]) for kind in KINDS] for answer in answers])


def table_1(answers: list[dict[str, list[Overlap]]], seed: int) -> dict[str, Estimate]:
    """Mean Jaccard at top and bottom places, their difference, how often an answer's top is below its bottom, and
    `held_equal`.

    Answers weigh alike; a tie is not below.
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
    found = {name: bootstrap(np.stack([column, ones], 1), share, seed=seed) for name, column in columns.items()}
    return found | {"held equal": held_equal(answers, seed)}


def held_equal(answers: list[dict[str, list[Overlap]]], seed: int) -> Estimate:
    """top - bottom among places of equal entropy and equal place in the answer, as far as both act linearly.

    The least-squares coefficient of being a top place, beside those of entropy and place, each within its answer.
    """
    grams = []
    for answer in answers:
        of_kind = [(float(kind == "top"), o.entropy, o.where, o.jaccard) for kind in KINDS for o in answer[kind]]
        away = np.array(of_kind) - np.mean(of_kind, 0)
        grams.append((away.T @ away).flatten())  # [16]

    def coefficient(*sums: np.ndarray) -> np.ndarray:
        gram = np.stack(sums, -1).reshape(*np.shape(sums[0]), 4, 4)
        return (np.linalg.pinv(gram[..., :3, :3]) @ gram[..., :3, 3:])[..., 0, 0]

    return bootstrap(np.array(grams), coefficient, seed=seed)


# ---- report ----------------------------------------------------------------------------------------------------------

EXPLAINED = [
    "*Jaccard*: content words (lowercased words and numbers without English stop words) that the continuation "
    "after an alternative token shares with that after the answer's own token, over the words in either; the "
    "forked token itself does not count. Both are greedy and made in one batch. *Top* and *bottom*: the tokens of"
    f" an answer with the highest and the lowest FAI to its end, without its last {FEWEST_ROWS} tokens. Each "
    f"answer weighs alike. {INTERVALS}",
    "Not the paper's: the model, its size, the problems. Chosen here, and perhaps otherwise there: how many "
    "tokens are perturbed, how many alternatives each has, how far a continuation goes, and the stop words. The "
    "lower table says in what else the two kinds of tokens differ: any of it may move the overlap, whatever FAI "
    "says. *Held equal* is what is left of the difference beside the entropy and the place of the tokens, in a "
    "linear regression within each answer.",
]


def report(
    estimates: dict[str, Estimate], answers: list[dict[str, list[Overlap]]], left_out: int, study: Study, command: str
) -> tuple[str, dict]:
    """(report.md, report.json)."""
    args, environment = study.args, versions(study.model.device)
    names = {
        "top": ("mean Jaccard, top FAI", ".3f"),
        "bottom": ("mean Jaccard, bottom FAI", ".3f"),
        "top - bottom": ("top - bottom", "+.3f"),
        "top below bottom": ("answers whose top is below their bottom", ".1%"),
        "tied": ("answers whose top equals their bottom", ".1%"),
        "held equal": ("top - bottom, entropy and place held equal", "+.3f"),
    }
    paper = PAPER | {"top - bottom": PAPER["top"] - PAPER["bottom"]}
    rows = [
        [label, shown(estimates[name], form), f"{paper[name]:{form}}" if name in paper else ""]
        for name, (label, form) in names.items()
    ]
    beside = {
        "fai": ("FAI", ".4f"),
        "entropy": ("entropy, nats", ".3f"),
        "where": ("place in the answer, 0 to 1", ".2f"),
        "likelihood": ("mean probability of an alternative", ".4f"),
    }
    differing = {name: means(answers, name).mean(0).tolist() for name in beside}
    lower = [[label, *(f"{value:{form}}" for value in differing[name])] for name, (label, form) in beside.items()]
    places = sum(len(answer[kind]) for answer in answers for kind in KINDS)
    skipped = f"; {left_out} shorter answers left out" if left_out else ""
    text = "\n".join(
        [
            "# Anchors and what follows them (Table 1)\n",
            f"    {command}\n",
            ", ".join(f"{name} {value}" for name, value in environment.items()) + "\n",
            f"{args.model}, {len(answers)} answers{skipped}; {places:,} places, at each {args.alternatives} "
            f"alternatives, continued for {args.rollout_tokens} tokens. The paper's numbers are of Qwen3-4B-Base.\n",
            table(["", "here", "paper"], rows) + "\n",
            table(["on average", "top", "bottom"], lower) + "\n",
            *(paragraph + "\n" for paragraph in EXPLAINED),
            "![Jaccard at the top and bottom places of each answer](figure.png)\n",
        ]
    )
    data = {
        "command": command,
        "versions": environment,
        "settings": study.settings,
        "answers": len(answers),
        "left_out": left_out,
        "places": places,
        "estimates": {name: estimate._asdict() for name, estimate in estimates.items()},
        "paper": PAPER,
        "differing": {name: dict(zip(KINDS, values, strict=True)) for name, values in differing.items()},
        "jaccard": [dict(zip(KINDS, pair, strict=True)) for pair in means(answers, "jaccard").tolist()],
    }
    return text, data


def draw(estimates: dict[str, Estimate], answers: list[dict[str, list[Overlap]]], path: Path) -> None:
    """Each answer's Jaccard at its top against its bottom places, and how Jaccard is spread over the places."""
    matplotlib.use("Agg")  # files only
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    top, bottom = means(answers, "jaccard").T
    left.plot([0, 1], [0, 1], color="#c9cdd4", linewidth=1, zorder=0)
    left.scatter(bottom, top, s=18, color="#2f6db5", alpha=0.7, label="an answer")
    here, paper = (estimates["bottom"].value, estimates["top"].value), (PAPER["bottom"], PAPER["top"])
    left.plot(*here, "P", color="#1c3f6e", markersize=10, label="mean")
    left.plot(*paper, "D", color="#c2620e", label="paper, Qwen3-4B-Base")
    left.set(xlabel="Jaccard at bottom FAI", ylabel="Jaccard at top FAI", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    left.set_aspect("equal")
    left.legend(fontsize=8, loc="lower right")
    left.set_title(f"top below bottom in {estimates['top below bottom'].value:.0%} of the answers", fontsize=9)
    bins = np.linspace(0, 1, 21)
    for kind, color in zip(KINDS, ("#c2620e", "#2f6db5"), strict=True):
        values = [place.jaccard for answer in answers for place in answer[kind]]
        right.hist(values, bins, histtype="stepfilled", alpha=0.35, color=color, label=f"{kind} FAI")
        right.axvline(float(np.mean(values)), color=color, linestyle=":", linewidth=1.5)
    right.set(xlabel="Jaccard of a place (dotted: means)", ylabel="places", xlim=(0, 1))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> None:
    """`rhythm perturb`: answers, perturbs, and writes the report."""
    parser = parser_of("perturb", __doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=3, help="perturbed in an answer, of each kind")
    parser.add_argument("--alternatives", type=int, default=5, help="at each position")
    parser.add_argument("--rollout-tokens", type=int, default=64, help="that a continuation has at most")
    args = parser.parse_args(arguments)
    check_flags(args, "perturb")
    own = ("positions", "alternatives", "rollout_tokens")
    for name in own:
        check_int(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    with Study("perturb", args, also=own, longer=args.rollout_tokens) as study:
        results = study.measured(partial(perturbed, study))
    answers = [each for each in map(overlaps, results) if each is not None]
    if not answers:
        raise ValueError(
            f"no answer has {FEWEST_ROWS + 2 * args.positions} tokens, which are needed to look at one: give more "
            "--max-new-tokens, or other problems"
        )
    estimates = table_1(answers, args.seed)
    text, data = report(estimates, answers, len(results) - len(answers), study, command_of("perturb", arguments))
    draw(estimates, answers, args.out / "figure.png")
    write_report(args.out, text, data)
    print(text)
    print(f"{args.out / 'report.md'}, {args.out / 'report.json'}, {args.out / 'figure.png'}")
