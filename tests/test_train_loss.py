"""The loss against cases computed by hand."""

import math

import pytest
import torch
from train_cases import ALONE

from train.batch import pack
from train.distributed import World
from train.loss import Groups, grpo_loss, sampler_correction, token_weights
from train.rollout import Completion


def batch_of(*lengths: int):
    """One answer of each length, behind prompts of two tokens."""
    return pack([[1, 2]] * len(lengths), [Completion([3] * n, [0.0] * n, "stop") for n in lengths], 1, ALONE.device)


CLIP = {"epsilon": 0.2, "epsilon_high": 0.2}


def test_clipped_loss_by_hand():
    # ratios 1.5 and 0.5; A = +1 takes min(1.5, 1.2) and min(0.5, 0.8), A = -1 takes min(-1.5, -1.2) and min(-0.5, -0.8)
    ratio, advantages = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, metrics = grpo_loss(ratio.log(), torch.zeros(4), advantages, torch.full((4,), 0.25), **CLIP)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert metrics["clip_ratio/high_mean"] == metrics["clip_ratio/low_mean"] == 1
    assert metrics["approx_kl"].item() == pytest.approx(2 * (1.5 + 0.5 - 2 - math.log(1.5) - math.log(0.5)))


def test_upper_clip_is_its_own():
    one = torch.ones(1)
    loss, _ = grpo_loss(one * math.log(1.5), 0 * one, one, one, epsilon=0.2, epsilon_high=0.28)
    assert loss.item() == pytest.approx(-1.28)


def test_divergence_and_correction_by_hand():
    one, away = torch.ones(1), math.log(2.0)
    loss, metrics = grpo_loss(
        0 * one, 0 * one, one, one, **CLIP, correction=0.5 * one, reference_log_probs=one * away, beta=0.1
    )
    divergence = 2.0 - away - 1
    assert loss.item() == pytest.approx(-0.5 + 0.1 * divergence)
    assert metrics["kl"].item() == pytest.approx(divergence)
    trainer, sampler = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -5.0, -2.0])
    expected = torch.tensor([1.0, 2.0, math.exp(-1)])
    assert torch.allclose(sampler_correction(trainer, sampler, cap=2.0), expected)


@pytest.mark.parametrize(
    "loss_type, expected",
    [("dapo", (2 + 3 + 4) / 3), ("grpo", ((2 + 3) / 2 + 4) / 2), ("dr_grpo", (2 + 3 + 4) / (2 * 5))],
)
def test_averages_by_hand(loss_type, expected):
    """Three answers, of which the last does not count."""
    batch = batch_of(2, 1, 3)
    values = torch.tensor([9.0, 9, 2, 3, 9, 9, 4, 9, 9, 7, 7, 7])
    weights = token_weights(batch, torch.tensor([True, True, False]), loss_type, 5, ALONE)
    assert (weights * values).sum().item() == pytest.approx(expected)
    zeros = torch.zeros(12)
    parts = [grpo_loss(zeros[p], zeros[p], -values[p], weights[p], **CLIP)[0] for p in (slice(0, 5), slice(5, 12))]
    assert sum(parts).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_answers_on_other_ranks_count_in_the_average(loss_type):
    class WithAnother(World):
        def sum(self, values):
            return values + torch.tensor([7.0, 2.0], dtype=values.dtype)  # tokens, answers

    both = token_weights(batch_of(2, 1), torch.ones(2, dtype=torch.bool), loss_type, 5, WithAnother(0, 2, "cpu"))
    expected = {"dapo": [1 / 10] * 3, "grpo": [1 / 8, 1 / 8, 1 / 4], "dr_grpo": [1 / 20] * 3}[loss_type]
    assert torch.allclose(both[both > 0], torch.tensor(expected))


def test_an_empty_step_weighs_nothing():
    assert token_weights(batch_of(2), torch.tensor([False]), "dapo", 5, ALONE).eq(0).all()


def test_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="got 'ppo'"):
        token_weights(batch_of(1), torch.tensor([True]), "ppo", 5, ALONE)


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    groups = Groups.of(rewards, 4, 4, ALONE)
    centred = groups.advantages("none")
    assert centred.tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert torch.allclose(groups.advantages("group"), centred / (0.5 + 1e-4))
    assert torch.allclose(groups.advantages("batch"), centred / (rewards.std() + 1e-4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage(scale):
    """Eight rewards of 0.9 have a mean of 0.90000004, and a deviation."""
    rewards = torch.tensor([0.9] * 8 + [0.9] * 7 + [0.1])
    assert rewards[:8].mean() != rewards[0]
    groups = Groups.of(rewards, 8, 8, ALONE)
    advantages = groups.advantages(scale)
    assert advantages[:8].eq(0).all() and advantages[8:].ne(0).all()
    assert Groups.of(rewards[:8], 8, 8, ALONE).advantages(scale).eq(0).all()
    assert groups.are_equal.tolist() == [True, False]


def test_the_deviation_of_the_batch_is_that_of_all_ranks():
    here, there = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])

    class WithAnother(World):
        def sum(self, values):
            return values + torch.stack([torch.ones(4), there, there**2]).double().sum(-1)

    got = Groups.of(here, 2, 2, WithAnother(0, 2, "cpu")).advantages("batch")
    assert torch.allclose(got, torch.tensor([0.5, -0.5]) / (torch.cat([here, there]).std() + 1e-4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size, here", [(4, 2), (4, 1), (2, 2)])
def test_ranks_that_share_groups_have_the_advantages_of_one(scale, size, here):
    """Four ranks, two optimizer steps: an answer's advantage does not depend on where its group lies."""
    rewards = torch.rand(2 * 4 * here, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    whole = Groups.of(rewards, size, size, ALONE).advantages(scale)

    class OfFour(World):
        def sum(self, values):
            return torch.stack([torch.ones_like(rewards), rewards, rewards**2]).double().sum(-1)

        def gather(self, values):
            return torch.stack([of(self._replace(rank=rank), rewards) for rank in range(4)])

    def of(world, values):
        return torch.tensor(world.share(values.tolist(), 2))

    for rank in range(4):
        world = OfFour(rank, 4, torch.device("cpu"))
        groups = Groups.of(of(world, rewards), size, here, world)
        assert torch.equal(groups.own_rewards, of(world, rewards))
        torch.testing.assert_close(groups.advantages(scale), of(world, whole))
