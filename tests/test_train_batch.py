"""Packing: every token once, in its place, in rows within the budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_cases import ALONE, PROMPTS, TOKENIZER, all_micros, encode, make_batch, make_policy

from train.batch import bins, micro_batches, pack, take
from train.distributed import World
from train.rollout import Completion


@pytest.fixture(scope="module")
def batch():
    return make_batch(make_policy())


def test_a_batch_holds_prompts_and_answers_in_order():
    completions = [Completion([7, 8], [-1.0, -2.0], "length"), Completion([9], [-3.0], "stop")] * 3
    prompts = encode(PROMPTS)
    batch = pack(prompts, completions, 2, ALONE.device)
    expected = [ids for prompt in prompts for answer in ([7, 8], [9]) for ids in (*prompt, *answer)]
    assert batch.ids.tolist() == expected
    assert batch.lengths == tuple(len(prompt) + k for prompt in prompts for k in (2, 1))
    assert batch.cu_seqlens.tolist() == [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
    assert batch.ids[batch.response_mask].tolist() == [7, 8, 9] * 3
    assert batch.log_probs[batch.response_mask].tolist() == [-1.0, -2.0, -3.0] * 3
    assert batch.log_probs[~batch.response_mask].eq(0).all()
    assert batch.finished.tolist() == [False, True] * 3
    assert batch.per_sequence(batch.response_mask.long()).tolist() == [2, 1] * 3


@pytest.mark.parametrize(
    "prompts, completions, message",
    [
        ([], [], "must be 2 to each prompt, got 0 to 0 prompts"),
        ([[1]], [[2]], "must be 2 to each prompt, got 1 to 1 prompts"),
        ([[1], []], [[2]] * 4, "each prompt must have a token, got none in prompt 1"),
        ([[1]], [[2], []], "each completion must have a token, got none in completion 1"),
    ],
    ids=["nothing", "too few", "empty prompt", "empty completion"],
)
def test_what_cannot_be_packed_is_refused(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, [Completion(ids, [-1.0] * len(ids), "stop") for ids in completions], 2, ALONE.device)


def test_one_token_prompts_and_answers():
    batch = pack([[5]], [Completion([6], [-1.0], "stop"), Completion([7], [-2.0], "length")], 2, ALONE.device)
    (micro,) = all_micros(batch)
    assert micro.ids.tolist() == [[5, 6, 5, 7]] and micro.answers.tolist() == [1, 3]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_bins_hold_each_sequence_once_within_the_budget(lengths, budget):
    filled = bins(lengths, range(len(lengths)), budget)
    assert sorted(row for rows in filled for row in rows) == list(range(len(lengths)))
    for rows in filled:
        assert sum(lengths[row] for row in rows) <= budget or len(rows) == 1
    # first fit leaves no two bins that could be one
    loads = [sum(lengths[row] for row in rows) for rows in filled]
    assert all(a + b > budget for i, a in enumerate(loads) for b in loads[:i])


@pytest.mark.parametrize("budget", [1, 30, 60, 10_000])
def test_micro_batches_drop_and_pad_nothing(batch, budget):
    micros = all_micros(batch, budget)
    assert sum(micro.ids.numel() for micro in micros) == len(batch.ids)
    assert torch.cat([micro.place for micro in micros]).sort().values.equal(torch.arange(len(batch.ids)))
    assert sum(len(micro.answers) for micro in micros) == batch.response_mask.sum()
    for micro in micros:
        assert micro.ids[0].equal(batch.ids[micro.place])
        assert batch.response_mask[micro.place[micro.answers]].all()
        assert micro.cu_seqlens.diff().tolist() == [batch.lengths[row] for row in micro.sequences]
        assert micro.longest == micro.cu_seqlens.diff().max()
        starts = micro.cu_seqlens[:-1].long()
        assert micro.position_ids[0, starts].eq(0).all()
        assert micro.position_ids[0].diff().ne(1).sum() == len(starts) - 1
        assert micro.answers.min() > 0 and not torch.isin(micro.answers, starts).any()


def test_a_rank_with_fewer_rows_repeats_its_shortest(batch):
    class ThreeElsewhere(World):
        def most(self, value):
            return max(value, 3)

    world = ThreeElsewhere(0, 2, torch.device("cpu"))
    one = micro_batches(batch, [0, 1], 10_000, world)
    assert [micro.is_surplus for micro in one] == [False, True, True]
    assert one[1].ids.numel() == min(batch.lengths)
    assert [micro.is_surplus for micro in micro_batches(batch, [], 10_000, world)] == [True] * 3
    assert micro_batches(batch, [], 10_000, ALONE) == []


def test_ranks_share_each_part_as_one_rank_would():
    items = list(range(24))
    ranks = [World(rank, 2, torch.device("cpu")).share(items, parts=3) for rank in range(2)]
    for part in range(3):
        together = [item for rank in ranks for item in rank[part * 4 : part * 4 + 4]]
        assert together == items[part * 8 : part * 8 + 8]
    assert ALONE.share(items, parts=3) == items


def test_draws_differ_by_seed_step_and_rank():
    worlds = [World(rank, 4, torch.device("cpu")) for rank in range(4)]
    draws = [world.draw(seed, step) for world in worlds for seed in range(3) for step in range(50)]
    assert len(set(draws)) == len(draws) and all(0 <= draw < 2**63 for draw in draws)
    assert worlds[3].draw(2**40, 2**30) < 2**63


def test_take_of_one_sequence(batch):
    micro = take(batch, [3])
    begin, end = batch.cu_seqlens[3:5].tolist()
    assert micro.place.tolist() == list(range(begin, end)) and micro.sequences.tolist() == [3]
    assert TOKENIZER.decode(micro.ids[0, : micro.answers[0]]) == PROMPTS[0]
