"""The metrics of a step: means over what is known, read from the device at once."""

import pytest
import torch
from train_cases import ALONE, make_batch, make_policy, on_device, settings

from benchmarks.pretended_cuda import counted, pretended_cuda
from rhythm_kernels import Rhythm
from train.batch import Rollouts
from train.distributed import World
from train.loss import Groups
from train.metrics import rollout_metrics
from train.reading import TokenStats

REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0])


def test_metrics_are_means_over_what_is_known():
    """Means are over the tokens that are known; what nothing is known of is left out."""
    batch = make_batch(make_policy())
    mask = batch.response_mask
    known = mask & (batch.sequence_of != 4)
    log_probs = batch.log_probs - torch.linspace(-1, 1, len(mask))
    old = TokenStats(*(x.masked_fill(~known, torch.nan) for x in (log_probs, log_probs.exp())))
    gamma = torch.linspace(1, 2, len(mask))
    credit = settings().credit
    metrics = rollout_metrics(batch, Groups.of(REWARDS, 4, 4, ALONE), old, gamma, credit, ALONE)
    gap = (log_probs - batch.log_probs)[known]
    expected = {
        "entropy": log_probs.exp()[known].double().mean(),
        "completions/mean_terminated_length": batch.per_sequence(mask.long())[batch.finished].double().mean(),
        "completions/min_length": batch.per_sequence(mask.long()).min(),
        "sampling/sampling_logp_difference/mean": gap.abs().double().mean(),
        "sampling/sampling_logp_difference/max": gap.abs().max(),
        "sampling/importance_sampling_ratio/mean": gap.exp().double().mean(),
        "rhythm/gamma_mean": gamma[mask].double().mean(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()})
    none = rollout_metrics(
        batch._replace(finished=torch.zeros(12, dtype=torch.bool)),
        Groups.of(REWARDS, 4, 4, ALONE),
        old,
        gamma,
        credit,
        ALONE,
    )
    assert "completions/mean_terminated_length" not in none


def test_equal_fractions_are_equal_rewards():
    batch = make_batch(make_policy())
    rewards = torch.tensor([0.9] * 4 + [0.1] * 4 + [0.9] * 3 + [0.1])
    old = TokenStats(batch.log_probs, batch.log_probs.exp())
    metrics = rollout_metrics(
        batch, Groups.of(rewards, 4, 4, ALONE), old, torch.ones(len(batch.ids)), settings().credit, ALONE
    )
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that is there need not be pretended")
def test_the_metrics_of_a_step_are_read_at_once():
    batch = make_batch(make_policy())
    with pretended_cuda():
        there, world = on_device(batch, "cuda"), World(0, 1, torch.device("cuda", 0))
        rewards, signal = REWARDS.to("cuda"), there.log_probs.exp()
        old = TokenStats(there.log_probs, signal, Rhythm(signal[None], signal[None]))
        with counted() as work:
            metrics = rollout_metrics(there, Groups.of(rewards, 4, 4, world), old, signal, settings().credit, world)
    assert [wait.where.split(" in ")[-1] for wait in work.waits] == ["reduce"], work.waits
    here = TokenStats(batch.log_probs, batch.log_probs.exp(), Rhythm(*[batch.log_probs.exp()[None]] * 2))
    assert metrics == rollout_metrics(
        batch, Groups.of(REWARDS, 4, 4, ALONE), here, here.entropy, settings().credit, ALONE
    )


def test_the_share_of_rises_among_preplan_tokens():
    """Sequences of 5 and 4 answer tokens after prompts of one: with q = 0.4 two preplan tokens in each."""
    waad = torch.tensor([9.0, 5.0, 1.0, 4.0, 4.0, 4.5, 0.0, 2.0, 8.0, 7.0, 7.0])
    mask = torch.tensor([False, *[True] * 5, False, *[True] * 4])
    cuts = torch.tensor([0, 6, 11], dtype=torch.int32)
    completions = torch.ones(2, dtype=torch.bool)
    batch = Rollouts(torch.arange(11), cuts, mask, torch.zeros(11), completions, (6, 5), (1, 1))
    old = TokenStats(torch.zeros(11), torch.zeros(11), Rhythm(waad[None], waad[None]))
    # Delta: 4 3 0 0.5 0, and 6 1 0 0
    for options, share in (({}, 2 / 4), ({"credit_preplan_fraction": 0.2}, 1 / 2), ({"credit_delta": "drop"}, 0)):
        credit = settings(**options).credit
        metrics = rollout_metrics(
            batch, Groups.of(torch.tensor([1.0, 0.0]), 2, 2, ALONE), old, torch.ones(11), credit, ALONE
        )
        assert metrics["rhythm/preplan_rises"] == share, options
