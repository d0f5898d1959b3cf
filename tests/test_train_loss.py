"""The loss against cases computed by hand, and its alignment of logits with tokens."""

import math

import pytest
import torch

from train.loss import (
    TokenWeights,
    group_advantages,
    grpo_loss,
    token_entropy,
    token_log_probs,
    token_weights,
)

MASK = torch.tensor([[False, True, True], [False, True, False]])


def test_clipped_loss_by_hand():
    # ratios 1.5 and 0.5; A = +1 takes min(1.5, 1.2) and min(0.5, 0.8), A = -1 takes min(-1.5, -1.2) and min(-0.5, -0.8)
    ratio = torch.tensor([[1.0, 1.5, 0.5], [1.0, 1.5, 0.5]])
    advantages = torch.tensor([[0.0, 1.0, 1.0], [0.0, -1.0, -1.0]])
    mask = torch.tensor([[False, True, True]] * 2)
    loss, metrics = grpo_loss(
        ratio.log(),
        torch.zeros(2, 3),
        advantages,
        token_weights(mask, "dapo", 3),
        epsilon=0.2,
        epsilon_high=0.2,
    )
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert metrics["clip_ratio/high_mean"].item() == metrics["clip_ratio/low_mean"].item() == 0.25


def test_upper_clip_is_its_own():
    loss, _ = grpo_loss(
        torch.tensor([[0.0, math.log(1.5)]]),
        torch.zeros(1, 2),
        torch.ones(1, 2),
        TokenWeights(torch.tensor([[0.0, 1.0]]), torch.tensor(1.0)),
        epsilon=0.2,
        epsilon_high=0.28,
    )
    assert loss.item() == pytest.approx(-1.28)


@pytest.mark.parametrize(
    "loss_type, expected",
    [("dapo", (2 + 3 + 4) / 3), ("grpo", ((2 + 3) / 2 + 4) / 2), ("dr_grpo", (2 + 3 + 4) / (2 * 5))],
)
def test_averages_by_hand(loss_type, expected):
    weights = token_weights(MASK, loss_type, max_completion_length=5)
    advantages = -torch.tensor([[9.0, 2.0, 3.0], [9.0, 4.0, 9.0]])
    zeros = torch.zeros(2, 3)
    loss, _ = grpo_loss(zeros, zeros, advantages, weights, epsilon=0.2, epsilon_high=0.2)
    assert loss.item() == pytest.approx(expected)
    parts = [
        grpo_loss(zeros[r, :w], zeros[r, :w], advantages[r, :w], weights.of(r, w), epsilon=0.2, epsilon_high=0.2)[0]
        for r, w in ((torch.tensor([0]), 3), (torch.tensor([1]), 2))
    ]
    assert sum(parts).item() == pytest.approx(expected)


def test_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="got 'ppo'"):
        token_weights(MASK, "ppo", 5)


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    plain = group_advantages(rewards, 4, "none")
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert torch.allclose(group_advantages(rewards, 4, "group"), plain / (0.5 + 1e-4))


def test_log_probs_and_entropy_stand_at_their_token():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    log_probs, entropy = token_log_probs(logits, ids), token_entropy(logits)
    assert log_probs[:, 0].eq(0).all() and entropy[:, 0].eq(0).all()
    for row in range(2):
        for t in range(1, 5):
            p = logits[row, t - 1].double().softmax(-1)
            assert log_probs[row, t].item() == pytest.approx(p[ids[row, t]].log().item(), abs=1e-6)
            assert entropy[row, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)
