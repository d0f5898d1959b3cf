"""Ranks that share each sequence in verl's engine (Ulysses), against workers that have whole sequences."""

from functools import cache

import pytest
import torch
import verl_cases as cases
import verl_ulysses as ulysses
from ranks import Raised, on_ranks

import rhythm_kernels.integrations.verl as plugin
from rhythm_kernels import Rhythm, token_credit

CREDITED = [name for name, form in ulysses.PASSES.items() if form.get("request", {}) is not None]


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    """Returns the model for two ranks and the one for four, of which two have the same key head."""
    return {2: model_folder, 4: cases.save_model(tmp_path_factory.mktemp("model"), num_attention_heads=8)}


@pytest.fixture(scope="module")
def on_four(folders):
    """Returns the passes of four workers, by worker."""
    returned = on_ranks(4, ulysses.passes, folders)
    assert not any(isinstance(one, Raised) for one in returned), returned
    return returned


@pytest.fixture(scope="module")
def whole(folders):
    """Returns a function that gives the pass of a worker that has whole sequences."""

    @cache
    def of(name, place):
        return ulysses.one_pass(folders[sharing(name)], name, ranks=1, place=place)

    return of


def sharing(name: str) -> int:
    return ulysses.PASSES[name].get("ranks", 2)


def places_of(name: str) -> list[int]:
    """Returns for each worker which sequences it has a part of."""
    return [worker // sharing(name) for worker in range(4)]


@pytest.mark.parametrize("name", [name for name in CREDITED if name not in ("groups of a micro-batch", "16 bits")])
def test_equals_the_dense_rhythm(on_four, folders, name):
    groups = ulysses.known_groups() if name == "known groups" else None
    for worker, place in list(enumerate(places_of(name)))[:: sharing(name)]:
        output = {field: cases.nested(on_four[worker][name][field]) for field in plugin.SIGNALS}
        fields = ulysses.fields_of(name, place)
        cases.assert_rhythm(output, folders[sharing(name)], fields, groups=groups)


def credit(output: dict, fields: dict) -> list[torch.Tensor]:
    """Returns the factors of each strategy, over the responses."""
    masks = fields["response_mask"].unbind()
    mask, waad, fai = (
        torch.nn.utils.rnn.pad_sequence([row[-len(of) :] for row, of in zip(rows, masks)], batch_first=True)
        for rows in (masks, output["rhythm_waad"], output["rhythm_fai"])
    )
    return [token_credit(strategy, mask.bool(), Rhythm(waad, fai)) for strategy in ("local", "global", "coupled")]


@pytest.mark.parametrize("name", CREDITED)
def test_credit_is_that_of_workers_with_whole_sequences(on_four, whole, name):
    for worker, place in enumerate(places_of(name)):
        shared, alone, fields = on_four[worker][name], whole(name, place), ulysses.fields_of(name, place)
        assert all(map(torch.equal, credit(shared, fields), credit(alone, fields)))
        assert ("rhythm_spans" in shared) == ("rhythm_spans" in alone) == (name != "known groups")
        for field in (*plugin.SIGNALS, plugin.SPANS):
            for row, wanted in zip(shared.get(field, []), alone.get(field, []), strict=True):
                torch.testing.assert_close(row, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", CREDITED)
def test_ranks_that_share_sequences_have_the_same_bits(on_four, name):
    for worker, place in enumerate(places_of(name)):
        own, first = on_four[worker][name], on_four[place * sharing(name)][name]
        assert own.keys() == first.keys() and own["padding"] == first["padding"]
        assert all(all(map(torch.equal, own[field], first[field])) for field in own if field.startswith("rhythm_"))


def test_the_log_probs_keep_their_bits(on_four):
    for worker in on_four:
        for field in ("log_probs", "entropy"):
            assert all(map(torch.equal, worker["own groups"][field], worker["without the block"][field]))
        assert worker["without the block"].keys() == {"log_probs", "entropy", "padding", "said"}


def test_some_rows_are_padded_to_a_multiple_of_the_ranks(on_four):
    """The tests above need this. Padding is a sequence of its own, without a response token."""
    assert {0, 1} == {padding for worker in on_four for padding in worker["own groups"]["padding"]}
    assert max(padding for worker in on_four for padding in worker["packed lengths rounded up"]["padding"]) > 10
    assert max(on_four[0]["fewer key heads than ranks"]["padding"]) > 1


def test_the_workers_say_that_they_share_sequences(on_four, whole):
    line = "reads the attention rhythm in the old-log-prob pass, for coupled credit"
    assert on_four[0]["own groups"]["said"] == [f"{line}; 2 ranks share each sequence (Ulysses)"]
    assert on_four[0]["fewer key heads than ranks"]["said"] == [f"{line}; 4 ranks share each sequence (Ulysses)"]
    assert whole("own groups", 0)["said"] == [line]


@pytest.fixture(scope="module")
def failures(model_folder):
    returned = on_ranks(2, ulysses.failures, model_folder)
    assert not any(isinstance(one, Raised) for one in returned), returned
    return returned


def test_one_rank_that_raises_ends_the_pass_of_all(failures):
    other, own = (rank["before the pass"].args for rank in failures)
    assert own == ("MemoryError", "no memory is left")
    assert other == ("Disagreement", "rank 1 of Ulysses: MemoryError: no memory is left")
    other, own = (rank["an unknown option"].args for rank in failures)
    assert own[0] == "ValueError" and own[1].startswith("unknown keys in the block rhythm: stratgey; there are")
    assert other[0] == "Disagreement" and "unknown keys in the block rhythm: stratgey" in other[1]


def test_ranks_with_other_options_all_raise(failures):
    for rank in failures:
        kind, text = rank["other options"].args
        assert kind == "Disagreement"
        assert text.startswith("the ranks of Ulysses must agree, got the block: ")
        assert '"window": 10' in text and '"window": 11' in text


def test_the_next_pass_is_read(failures):
    assert all(len(rank["nothing"]) == len(ulysses.LENGTHS[0]) for rank in failures)


def test_attention_that_ulysses_does_not_reach_is_refused(failures):
    """verl takes it, and attends to each rank's tokens alone."""
    for rank in failures:
        wrong, right = rank["without FlashAttention and block"], rank["nothing"]
        assert max((one - other)[:-1].abs().max() for one, other in zip(wrong, right) if len(one) > 1) > 0.1
        kind, text = rank["without FlashAttention"].args
        assert kind in ("ValueError", "Disagreement")
        assert "collect needs layers without a 4-D mask where ranks hold parts of a row" in text
