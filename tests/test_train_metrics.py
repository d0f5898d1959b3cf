"""The metrics of a step: means over what is known, read from the device at once."""

import pytest
import torch
from host_waits import Waits
from train_cases import ALONE, make_batch, make_policy, settings

from train.metrics import rollout_metrics
from train.policy import TokenStats

REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0])


def test_the_metrics_of_a_step_are_read_at_once():
    """Means are over the tokens that are known; what nothing is known of is left out."""
    batch = make_batch(make_policy())
    mask = batch.response_mask
    known = mask & (batch.sequence_of != 4)
    log_probs = batch.log_probs - torch.linspace(-1, 1, len(mask))
    old = TokenStats(*(x.masked_fill(~known, torch.nan) for x in (log_probs, log_probs.exp())))
    gamma = torch.linspace(1, 2, len(mask))
    credit, events = settings().credit, []
    with Waits(events):
        metrics = rollout_metrics(batch, REWARDS, 4, old, gamma, credit, ALONE)
    assert events == ["tolist"]
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
        batch._replace(finished=torch.zeros(12, dtype=torch.bool)), REWARDS, 4, old, gamma, credit, ALONE
    )
    assert "completions/mean_terminated_length" not in none
