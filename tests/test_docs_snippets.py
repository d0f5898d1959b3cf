"""The python blocks of two pages run as they stand, one after the other, and say what is true."""

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from models import eager_maps
from torch.nn.functional import avg_pool1d

from rhythm_kernels import reference

DOCS = Path(__file__).resolve().parent.parent / "docs"
ANY_TRAINER, WHICH_STATISTIC = DOCS / "frameworks" / "any.md", DOCS / "how-to" / "which-statistic.md"


def run_blocks(page: Path, found: dict[str, object]) -> Iterator[str]:
    """Runs the blocks of a page in `found`, and yields each after it has run."""
    for block in re.finditer(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        line = page.read_text()[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), found)
        yield block[1]


@pytest.fixture(scope="module")
def names():
    found: dict[str, object] = {}
    for _ in run_blocks(ANY_TRAINER, found):
        pass
    return found


@pytest.mark.slow
def test_the_passes_agree(names):
    assert torch.equal(names["gamma"], names["gamma_now"])
    assert torch.equal(names["gamma"], names["unpacked"])
    assert not names["gamma_now"].requires_grad and names["model"].model.embed_tokens.weight.grad is not None


def test_a_token_keeps_its_own_gamma_when_the_trainer_shifts(names):
    inside = names["response"][:, 1:]
    assert torch.equal(names["shaped_shifted"][inside], names["per_token"][:, 1:][inside])
    assert names["shaped_shifted"][~inside].eq(0).all()


@pytest.mark.parametrize("row", range(3))
def test_gamma_is_that_of_the_sequence_alone(names, row):
    kept = names["attention_mask"][row].bool()
    mask = names["response"][row, kept][None]
    with torch.no_grad(), names["collect"](names["model"], response_mask=mask) as c:
        names["model"](names["ids"][row, kept][None])
    alone = names["token_credit"]("coupled", response_mask=mask, rhythm=c.rhythm())
    assert torch.equal(names["gamma"][row, kept], alone[0])


def test_the_groups_serve_the_steps_between(names):
    assert names["schedule"].groups.local_heads.any() and names["drift"] is None
    assert names["rhythm"].spans is None


@pytest.fixture(scope="module")
def statistics():
    """Returns the names of the page about statistics, and the maps of its model, [L, B, HQ, T, T] fp64."""
    found: dict[str, object] = {}
    blocks = run_blocks(WHICH_STATISTIC, found)
    next(blocks)
    maps = torch.stack(eager_maps(found["model"], input_ids=found["ids"])).double()
    found["unclipped"] = deepcopy(found["model"])
    sizes = [len([line for line in block.splitlines() if line]) for block in blocks]
    return found, maps, sizes


def close(got, exact):
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


def test_each_statistic_takes_few_lines(statistics):
    assert len(statistics[2]) == 7 and max(statistics[2]) <= 7, "five statements, some over two lines"


def test_h2o_and_snapkv_keep_what_whole_maps_say(statistics):
    found, maps, _ = statistics
    received = maps.sum(-2).unflatten(2, (2, 3)).sum(3)
    close(found["received"], received)
    votes = maps[:, :, :, 184:, :184].sum(-2).unflatten(2, (2, 3)).mean(3)
    close(found["votes"], votes)
    pooled = avg_pool1d(votes.flatten(0, 2), 5, stride=1, padding=2).view_as(votes)
    for kept, scores, count in (("heavy", received[..., :-20], 40), ("kept", pooled, 44)):
        least = scores.topk(count).values[..., -1:]
        assert found[kept].shape == (4, 2, 2, count)
        assert (scores.gather(-1, found[kept]) >= least - 1e-5).all()


def test_masses_and_entropies_are_those_of_whole_maps(statistics):
    found, maps, _ = statistics
    sampled = maps[list(reference.sampled_layers(4))]
    on_prompt = sampled[..., :150].mean(-1)
    rows = torch.arange(150, 200)
    written = torch.stack([sampled[..., t, 150 : t + 1].mean(-1) for t in rows.tolist()], -1)
    close(found["ratio"][..., 150:], on_prompt[..., 150:] / (on_prompt[..., 150:] + written))
    close(found["mass_on_first"], maps[..., :4].sum(-1))
    assert found["sink_heads"].shape == (4, 6)
    close(found["entropy"], torch.special.entr(maps).sum(-1))
    assert found["spread"].min() >= 0 and found["spread"].max() <= 1 + 1e-5


def test_receiver_heads_have_the_largest_kurtosis(statistics):
    found, maps, _ = statistics
    assert found["columns"][0].nonzero().flatten().tolist() == list(range(150, 168))
    segments = torch.zeros(1, 200, dtype=torch.long)
    fai = torch.stack([reference.fai(layer[:1], found["answer"][:1], segments, (1, None))[0] for layer in maps])
    x = fai[..., 150:168] - fai[..., 150:168].mean(-1, keepdim=True)
    kurtosis = x.pow(4).mean(-1) / x.pow(2).mean(-1) ** 2 - 3
    torch.testing.assert_close(found["kurtosis"], kurtosis, rtol=1e-3, atol=1e-3)
    assert found["receivers"].sum() == 4
    assert kurtosis[found["receivers"]].min() >= kurtosis[~found["receivers"]].max() - 1e-3


def test_clipped_heads_keep_the_limit(statistics):
    """The first layer reads the same states as before, so its scores are the old ones times the factor."""
    found, _, _ = statistics

    def largest(model):
        with torch.no_grad(), found["collect"](model, layers=[0], more=["largest_score"]) as c:
            model(found["ids"])
        return c.stats[0].more["largest_score"].amax((0, 2))

    before, after = largest(found["unclipped"]), largest(found["model"])
    assert (before > 5).any() and (before < 5).any()
    torch.testing.assert_close(after, before.clamp(max=5.0))
