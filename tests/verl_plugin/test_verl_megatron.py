"""The statistics that verl's Megatron engine takes in its old-log-prob pass, with the ranks that share its model."""

import itertools
import re
from functools import cache

import pytest
import torch
import verl_megatron as engines
from ranks import Raised, on_ranks, preload
from test_verl_ulysses import credit

import rhythm_kernels.integrations.verl as plugin

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
preload("verl_megatron", "megatron.core.models.gpt", "verl.workers.engine.megatron")


@cache
def whole(name: str, replica: int = 0) -> dict[str, list]:
    """Returns a pass of one rank, over the sequences of a replica."""
    [output] = on_ranks(1, engines.one_pass, name, {}, replica)
    assert not isinstance(output, Raised), output.args[2]
    return output


@cache
def shared(ranks: int) -> list[dict[str, dict[str, list] | None]]:
    """Returns, by rank, the passes that so many ranks share."""
    names = [name for name, (_, sizes) in engines.SHARED.items() if engines.ranks_of(sizes) == ranks]
    returned = on_ranks(ranks, engines.shared_passes, names)
    assert not any(isinstance(one, Raised) for one in returned), [one.args[2] for one in returned]
    return returned


@cache
def alone(grouped: bool) -> dict[str, list]:
    [rhythm] = on_ranks(1, engines.alone, engines.known_groups() if grouped else None)
    assert not isinstance(rhythm, Raised), rhythm.args[2]
    return rhythm


CREDITED = [name for name, form in engines.PASSES.items() if form.get("request", {}) is not None]


@pytest.mark.parametrize("name", [name for name in CREDITED if name != "groups of a micro-batch"])
def test_equals_the_rhythm_of_each_sequence_alone(name):
    wanted, output = alone(name == "known groups"), whole(name)
    for field, other in (("rhythm_waad", "waad"), ("rhythm_fai", "fai")):
        for row, expected in zip(output[field], wanted[other], strict=True):
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    if name != "known groups":
        for row, expected in zip(output["rhythm_spans"], wanted["spans"], strict=True):
            torch.testing.assert_close(row, expected.flatten(), rtol=1e-5, atol=1e-5)


def passes_with_and_without() -> list[tuple[dict, dict]]:
    """Returns a pass with the block and the same without it, of one rank and of each way in which two share a model."""
    pairs = [(whole("packed"), whole("without the block"))]
    for way in ("tensor", "pipeline"):
        pairs += [(rank[way], rank[f"{way}, without the block"]) for rank in shared(2) if rank[way] is not None]
    return pairs


def test_the_log_probs_keep_their_bits():
    for output, plain in passes_with_and_without():
        assert plain.keys() == {"log_probs", "entropy", "said", "micro-batches"} and plain["said"] == []
        for field in ("log_probs", "entropy"):
            assert all(map(torch.equal, output[field], plain[field]))


def test_the_micro_batches_are_several_and_reordered():
    """The tests above need this: in one micro-batch, in order, they would not see a wrong order."""
    lengths, seen = [sum(pair) for pair in engines.LENGTHS[0]], whole("packed")["micro-batches"]
    order = list(itertools.chain.from_iterable(seen))
    assert len(seen) > 2 and order != lengths and sorted(order) == sorted(lengths)


@pytest.mark.parametrize("way", engines.SHARED)
def test_ranks_that_share_a_model_have_the_credit_of_one(way):
    name, sizes = engines.SHARED[way]
    outputs = [rank[way] for rank in shared(engines.ranks_of(sizes))]
    stages, replicas = (sizes.get(f"{name}_parallel_size", 1) for name in ("pipeline_model", "data"))
    with_output = [output for output in outputs if output is not None]
    assert len(with_output) == len(outputs) // stages
    for replica in range(replicas):  # Megatron's ranks of a replica follow each other, but for its stages
        first, *others = with_output[replica * len(with_output) // replicas :][: len(with_output) // replicas]
        check_output(first, whole(name, replica), engines.fields_of(replica))
        for output in others:
            check_output(output, first, engines.fields_of(replica))
            for field in output.keys() & {*plugin.SIGNALS, plugin.SPANS}:
                assert all(map(torch.equal, output[field], first[field]))  # the same bits on every rank


def check_output(output: dict[str, list], wanted: dict[str, list], fields: dict) -> None:
    """Holds a pass to another one of the same sequences."""
    assert output.keys() == wanted.keys()
    for field in output.keys() - {"said", "micro-batches"}:
        last = -1 if field == "log_probs" else None  # that of a row's end is of whatever verl has put behind it
        for row, expected in zip(output[field], wanted[field], strict=True):
            torch.testing.assert_close(row[:last], expected[:last], rtol=1e-5, atol=1e-5)
    if "rhythm_waad" in output:
        assert all(map(torch.equal, credit(output, fields), credit(wanted, fields)))


def test_the_workers_say_how_they_share_sequences():
    line = "reads the attention rhythm in the old-log-prob pass, for coupled credit"
    assert whole("packed")["said"] == [line]
    assert shared(2)[0]["tensor"]["said"] == [f"{line}; 2 ranks share each sequence (tensor)"]
    assert shared(4)[0]["tensor and context"]["said"] == [f"{line}; 4 ranks share each sequence (tensor 2, context 2)"]


@pytest.mark.parametrize("sizes", [engines.TWO, engines.CONTEXT, engines.STAGES], ids=["tensor", "context", "pipeline"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("options", "must agree, got the block: "),
        ("key", "unknown keys in the block rhythm: widnow"),
        ("mask", "must agree, got"),
        ("scale", "does not attend as collect assumes|must agree, got scaling"),
    ],
)
def test_an_error_on_one_rank_ends_the_pass_of_all(sizes, how, message):
    """Before the pass, in it, and after it, so that no rank waits for another."""
    for raised in on_ranks(2, engines.failing, sizes, how):
        assert isinstance(raised, Raised)
        assert re.search(message, raised.args[1]), raised.args[2]


def test_another_order_of_tokens_is_refused():
    for raised in on_ranks(2, engines.failing, engines.CONTEXT, "order"):
        assert raised.args[0] == "ValueError"
        assert "needs tokens in zigzag order on the ranks of context parallelism, got contiguous" in raised.args[1]
