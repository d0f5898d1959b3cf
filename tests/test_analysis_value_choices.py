"""The choices of `rhythm value --choices`: which there are, how they are read, and their differences by hand."""

from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import torch
from architectures import ARCHITECTURES
from study_cases import tiny_model

from rhythm_kernels.analysis import value_choices
from rhythm_kernels.analysis.decisions import Sampled, decide
from rhythm_kernels.analysis.study import Answer
from rhythm_kernels.credit.tokens import token_credit
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.options import READS_ATTENTION, CreditOptions

NOT_COMPARED = {"strategy", "amplification", "group_by", "groups_every", "seed"}
"""Options that say nothing about one answer by itself, and the size of a bonus, which no share depends on."""


def study_of(**flags) -> SimpleNamespace:
    return SimpleNamespace(model=tiny_model(), args=SimpleNamespace(**{"top_fraction": 0.4, "layers": "all"} | flags))


def test_every_option_is_compared_and_nothing_with_itself():
    study = study_of()
    choices = value_choices.choices_of(study)
    own = {strategy: CreditOptions(strategy=strategy, layers="all", span_rows=None) for strategy in READS_ATTENTION}
    assert [choice.strategy for choice in choices if choice.options == own[choice.strategy]] == [
        "local",
        "global",
        "coupled",
    ]
    changed = set()
    for choice in choices:
        before, after = asdict(own[choice.strategy]), asdict(choice.options)
        names = {name for name in after if after[name] != before[name]}
        assert len(names) == (choice.name != "defaults"), choice.name
        changed |= names
    assert changed == {option.name for option in fields(CreditOptions)} - NOT_COMPARED
    thirds = [choice.options.layers for choice in choices if choice.name.endswith("third")][:3]
    assert thirds == [(0,), (1, 2), (3,)]
    fewer = value_choices.choices_of(study_of(top_fraction=0.2))
    assert len(fewer) == len(choices) - 3 and not any("top_fraction 0.2" in choice.name for choice in fewer)


def test_a_hybrid_is_read_in_thirds_of_its_layers_with_attention():
    study = study_of()
    study.model = ARCHITECTURES["Qwen3_5"].build("sdpa")  # its attention is in the layers 2 and 5
    choices = value_choices.choices_of(study)
    thirds = {choice.name: choice.options.layers for choice in choices if choice.name.endswith("third")}
    assert thirds == {"layers first third": (2,), "layers last third": (5,)}
    answers = [Answer(0, [1, 2, 3], [4, 5, 6, 7])]
    assert len(value_choices.gammas_of(study, answers, choices)) == len(choices)


def test_choices_are_read_as_credit_reads_them():
    """Each has the gamma of a forward with its options alone."""
    study = study_of()
    torch.manual_seed(1)
    answers = [
        Answer(0, *torch.randint(259, (2, count)).tolist()) for count in (90, 70)
    ]  # longer than a part of a span
    choices = value_choices.choices_of(study)
    found = value_choices.gammas_of(study, answers, choices)
    for choice, gammas in zip(choices, found, strict=True):
        for answer, gamma in zip(answers, gammas, strict=True):
            ids = torch.tensor([answer.prompt + answer.tokens])
            mask = torch.arange(ids.shape[1])[None] >= len(answer.prompt)
            with torch.no_grad(), collect(study.model, response_mask=mask, **choice.options.collect_arguments) as c:
                study.model(ids, use_cache=False)
            alone = token_credit(choice.strategy, mask, c.rhythm(), **choice.options.credit_arguments)
            assert torch.equal(torch.tensor(gamma).float(), alone[mask]), choice.name
    assert len({tuple(gammas[0]) for gammas in found}) > len(choices) / 3, "choices that change nothing show nothing"


def test_differences_of_choices_by_hand():
    """The defaults select a token that decides nothing in one answer of two, another choice the right ones."""
    square = np.array([4.0, 0.0, 0.0, 0.0])
    decisions = decide(Sampled(True, np.zeros(4), np.zeros((2, 4), int), np.zeros(4, int)))._replace(square=square)
    answers = [SimpleNamespace(decisions=decisions, signals={"entropy": np.zeros(4)})] * 2
    right, wrong = np.array([1.5, 1.0, 1.0, 1.0]), np.array([1.0, 1.5, 1.0, 1.0])
    choices = [value_choices.Choice("local", name, CreditOptions(strategy="local")) for name in ("defaults", "better")]
    base, better = value_choices.compare_choices(answers, choices, [[right, wrong], [right, right]], 0)
    assert base["over chance"].value == 2 and better["over chance"].value == 4 and better["tokens"].value == 0.25
    assert "change of over chance" not in base and better["change of over chance"].value == 2
    assert better["change of credited over chance"][:2] == (2, 0), "of draws of one answer alone too"
    _, same = value_choices.compare_choices(answers, choices, [[right, wrong]] * 2, 0)
    assert same["change of over chance"] == (0, 0, 0) and same["over chance"].low < 2 < same["over chance"].high
    text = "\n".join(value_choices.paragraphs_of([base, better]))
    assert "leaves out 0 for 0 of 1 choices" in text and "| local | better | 25.0% | 4.00 [4.00, 4.00] |" in text
