"""From logits to GRPO's clipped loss, as pure functions of tensors.

Everything is [B, T] and indexed by the token's own position: column t of the log-probabilities is that of token t given
the tokens before it, which the logits at t-1 hold. Column 0 has no prediction and is 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenWeights(NamedTuple):
    """How a batch's tokens are averaged: loss = sum(weight * token loss) / denominator."""

    weight: Tensor  # [B, T], 0 outside the response
    denominator: Tensor  # scalar

    def of(self, rows: Tensor, width: int) -> "TokenWeights":
        """These rows' part, up to column `width`, of the same average: the parts' losses add up to the batch's."""
        return TokenWeights(self.weight[rows, :width], self.denominator)


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, T], aligned with the tokens."""
    before = logits[:, :-1]
    chosen = before.gather(-1, ids[:, 1:, None]).squeeze(-1) - before.logsumexp(-1)
    return torch.nn.functional.pad(chosen, (1, 0))


def token_entropy(logits: Tensor) -> Tensor:
    """[B, T]: the entropy in nats of the distribution that each token was drawn from."""
    log_probs = logits[:, :-1].log_softmax(-1)
    return torch.nn.functional.pad(-(log_probs.exp() * log_probs).sum(-1), (1, 0))


def group_advantages(rewards: Tensor, num_generations: int, scale: str) -> Tensor:
    """[B]: each reward against the mean of its group, over the group's deviation if `scale` is "group"."""
    groups = rewards.view(-1, num_generations)
    advantages = groups - groups.mean(-1, keepdim=True)
    if scale == "group":
        advantages = advantages / (groups.std(-1, keepdim=True) + 1e-4)
    return advantages.flatten()


def token_weights(response_mask: Tensor, loss_type: str, max_completion_length: int) -> TokenWeights:
    """The average that `loss_type` stands for, over the answers with tokens here, so that micro-batches only add."""
    mask = response_mask.float()
    answers = response_mask.any(-1).sum()
    if loss_type == "dapo":  # every token counts the same
        return TokenWeights(mask, mask.sum())
    if loss_type == "grpo":  # every answer counts the same
        return TokenWeights(mask / mask.sum(-1, keepdim=True).clamp(min=1), answers)
    if loss_type == "dr_grpo":  # no length in the denominator
        return TokenWeights(mask, answers * max_completion_length)
    raise ValueError(f"loss_type must be one of dapo, grpo, dr_grpo, got {loss_type!r}")


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: TokenWeights,
    *,
    epsilon: float,
    epsilon_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate, -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), and this batch's part of each metric.

    Losses and metrics of micro-batches that share a denominator add up to those of the whole.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    token_loss = -torch.minimum(ratio * advantages, clipped * advantages)
    weight, denominator = weights

    def average(values: Tensor) -> Tensor:
        return (values * weight).sum() / denominator

    with torch.no_grad():
        metrics = {
            "clip_ratio/low_mean": average((ratio < 1 - epsilon) & (advantages < 0)),
            "clip_ratio/high_mean": average((ratio > 1 + epsilon_high) & (advantages > 0)),
            "approx_kl": average(ratio - 1 - (log_probs - old_log_probs)),
        }
    return average(token_loss), metrics
