"""Computes GRPO's advantages, averages and clipped loss, as pure functions of tensors.

Shapes: N tokens and B answers in the batch, m tokens in a part of it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from train.batch import Rollouts
from train.distributed import World


class Groups(NamedTuple):
    """The rewards of whole groups, the answers to one problem each, some of which other ranks may have."""

    rewards: Tensor
    """[groups, n] float32."""
    own: slice
    """The answers of each group that this rank has."""
    world: World

    @classmethod
    def of(cls, rewards: Tensor, size: int, here: int, world: World) -> "Groups":
        """Returns the groups of this rank's answers.

        Args:
            rewards: [B], this rank's; the answers to one problem are adjacent.
            size: n, the answers of a group.
            here: how many of them this rank has: all, or a share that divides them. Ranks that share a group follow
                one another, as `World.share` deals the answers out.
        """
        sharing = size // here
        first = world.rank // sharing * sharing
        of_ranks = world.gather(rewards)[first : first + sharing] if sharing > 1 else rewards[None]
        whole = of_ranks.view(sharing, -1, here).transpose(0, 1).flatten(1)
        begin = (world.rank - first) * here
        return cls(whole, slice(begin, begin + here), world)

    @property
    def own_rewards(self) -> Tensor:
        """The rewards of this rank's answers, [B]."""
        return self.rewards[:, self.own].flatten()

    @property
    def are_equal(self) -> Tensor:
        """Whether the rewards of each group are equal throughout, [groups] bool.

        Deviations do not tell: the mean of equal fractions is rounded, and may differ from each of them.
        """
        return (self.rewards == self.rewards[:, :1]).all(-1)

    def advantages(self, scale: str) -> Tensor:
        """Returns the reward of each of this rank's answers minus its group's mean, [B], over a standard deviation.

        Equal rewards have advantages of 0.

        Args:
            scale: "group", "batch" (over the answers of all ranks), or "none", without division.
        """
        advantages = self.rewards - self.rewards.mean(-1, keepdim=True)
        advantages = advantages.masked_fill(self.are_equal[:, None], 0.0)
        if scale == "group":
            advantages = advantages / (self.rewards.std(-1, keepdim=True) + 1e-4)
        elif scale == "batch":
            own = self.own_rewards
            count, total, squares = self.world.sum(torch.stack([torch.ones_like(own), own, own**2]).double().sum(-1))
            variance = (squares - total**2 / count) / (count - 1)
            advantages = advantages / (variance.clamp(min=0).sqrt().to(own) + 1e-4)
        return advantages[:, self.own].flatten()


def token_weights(batch: Rollouts, chosen: Tensor, loss_type: str, max_completion_length: int, world: World) -> Tensor:
    """Returns the weight of each token's loss in the sum over all micro-batches and ranks, [N]; 0 outside `chosen`.

    Args:
        chosen: [B] bool, the answers of one optimizer step that count.
        loss_type: "dapo": every token counts the same; "grpo": every answer; "dr_grpo": a constant in place of length.
    """
    tokens = batch.per_sequence(batch.response_mask.float())
    counts = torch.stack([(tokens * chosen).sum(), chosen.sum()])  # indexing by `chosen` would make the host wait
    all_tokens, all_answers = world.sum(counts.double()).clamp(min=1).float()
    if loss_type == "dapo":
        weights = torch.ones_like(tokens) / all_tokens
    elif loss_type == "grpo":
        weights = 1 / (tokens.clamp(min=1) * all_answers)
    elif loss_type == "dr_grpo":
        weights = torch.ones_like(tokens) / (all_answers * max_completion_length)
    else:
        raise ValueError(f"loss_type must be one of dapo, grpo, dr_grpo, got {loss_type!r}")
    return (weights * chosen)[batch.sequence_of] * batch.response_mask


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
    correction: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the clipped surrogate, -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), and its metrics.

    Losses are weighted sums over the m tokens, metrics plain ones. Both add up over micro-batches and ranks.

    Args:
        log_probs, old_log_probs, advantages, weights: [m], see `token_weights`.
        correction: [m], factors for the sampler's mismatch, see `sampler_correction`.
        reference_log_probs, beta: [m] for the KL divergence from a reference, by the estimator
            exp(d) - d - 1, and its weight.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    token_loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if correction is not None:
        token_loss = token_loss * correction
    with torch.no_grad():
        metrics = {
            "clip_ratio/low_mean": ((ratio < 1 - epsilon) & (advantages < 0)).sum(),
            "clip_ratio/high_mean": ((ratio > 1 + epsilon_high) & (advantages > 0)).sum(),
            "approx_kl": (ratio - 1 - (log_probs - old_log_probs)).sum(),
        }
    if reference_log_probs is not None:
        difference = reference_log_probs - log_probs
        divergence = difference.exp() - difference - 1
        token_loss = token_loss + beta * divergence
        metrics["kl"] = divergence.detach().sum()
    return (token_loss * weights).sum(), metrics


def sampler_correction(log_probs: Tensor, sampler_log_probs: Tensor, cap: float) -> Tensor:
    """Returns importance weights, the trainer's probability of each token over the sampler's, cut off at `cap`."""
    return (log_probs - sampler_log_probs).exp().clamp(max=cap)
